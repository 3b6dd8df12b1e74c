r"""EMBED: abstracts that look to the model as the query does.

$\tau(z_i, z) = \frac1C\sum_c \cos(h_c(z_i), h_c(z))$, with $h$ the mean over tokens of one layer's hidden states, of the encoder (which
reads the sentence) or the decoder (which reads its target). Layer 0 is the embedding.

Source: Akyürek et al. (2022), [Towards tracing factual knowledge in language models back to the training
data](https://huggingface.co/papers/2205.11482), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from hf_trak.evaluation.baselines.base import check_scores, similarity
from hf_trak.evaluation.fact_tracing.encoding import IGNORED, EncodedRows, Encoder
from hf_trak.sources.checkpoints import load_model


@dataclass
class Embed:
    """Cosines of mean hidden states.

    Args:
        checkpoints (`Sequence`): Folders, or models in memory.
        layer (`str`): `encoder.0`, `decoder.2` and the like.
    """

    checkpoints: Sequence[Any]
    encoder: Encoder
    layer: str = "encoder.0"
    batch_size: int = 64

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        found = self.sweep(train, queries)
        if self.layer not in found:
            raise ValueError(f"The model has no layer {self.layer!r}; it has {', '.join(found)}.")
        return found[self.layer]

    def sweep(self, train: Dataset, queries: Dataset) -> dict[str, Float[np.ndarray, "n_train n_query"]]:
        """Return the scores by every layer for the price of one."""
        scores: dict[str, np.ndarray] = {}
        for checkpoint in self.checkpoints:
            model = load_model(str(checkpoint)) if not isinstance(checkpoint, torch.nn.Module) else checkpoint
            states = [self._states(model, rows) for rows in (train, queries)]
            for layer in states[0]:
                found = similarity(states[0][layer], states[1][layer], "cosine") / len(self.checkpoints)
                scores[layer] = scores.get(layer, 0) + found
        return {layer: check_scores(values, train, queries) for layer, values in scores.items()}

    @torch.no_grad()
    def _states(self, model: Any, dataset: Dataset) -> dict[str, Float[np.ndarray, "n hidden_dim"]]:
        rows = EncodedRows(dataset, self.encoder)
        order = np.argsort(rows.lengths, kind="stable")
        model.eval()
        parts: dict[str, list[np.ndarray]] = {}
        blocks = [order[start : start + self.batch_size].tolist() for start in range(0, len(order), self.batch_size)]
        for batch in rows.batches(blocks, next(model.parameters()).device):
            labels = batch.pop("labels")
            output = model(**batch, use_cache=False, output_hidden_states=True)
            for side, states, mask in (
                ("encoder", output.encoder_hidden_states, batch["attention_mask"].bool()),
                ("decoder", output.decoder_hidden_states, labels != IGNORED),
            ):
                for number, state in enumerate(states):
                    parts.setdefault(f"{side}.{number}", []).append(_mean_over_tokens(state, mask))
        back = np.argsort(order)
        return {layer: np.concatenate(values)[back] for layer, values in parts.items()}


def _mean_over_tokens(states: Float[Tensor, "batch tokens dim"], mask: Tensor) -> Float[np.ndarray, "batch dim"]:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return ((states * weights).sum(1) / weights.sum(1).clamp(min=1)).float().cpu().numpy()
