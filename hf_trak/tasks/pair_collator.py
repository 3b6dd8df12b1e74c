"""Batches of images and captions for training a dual encoder with its own contrastive loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hf_trak.tasks.contrastive import contrastive_task
from hf_trak.tasks.pairs import PairInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_trak.config import TrakConfig


@dataclass
class PairCollator:
    """Batches of pairs for training a dual encoder: the model's inputs, and the word that its own loss is wanted.

    The loss is the model's, over the pairs of the batch: for CLIP the mean of the cross-entropies of its rows and columns, for SigLIP
    the sigmoid loss of all its pairings. Of a row with several captions one is drawn, by torch's generator.

    Args:
        model (`PreTrainedModel`): A dual encoder.
        processing_class: Its processor.
    """

    model: PreTrainedModel
    config: TrakConfig
    processing_class: Any = None

    def __post_init__(self) -> None:
        self.inputs = contrastive_task(self.model, self.config).inputs

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.inputs.collate({key: [row[key] for row in rows] for key in rows[0]}, self.processing_class)
        drawn = torch.multinomial(batch.pop("caption_weights"), 1).squeeze(1)
        del batch["pair_keys"]
        assert isinstance(self.inputs, PairInputs)
        for name in self.inputs.text_names:
            if name in batch:
                batch[name] = batch[name][torch.arange(len(rows)), drawn]
        return {**batch, "return_loss": True}
