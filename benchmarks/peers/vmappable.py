"""What lets `torch.func.vmap`, on which traker and dattri both stand, trace a model of transformers 5. In their favour: eager
attention, whose vmap is the faster one, and a mask of four dimensions, since what the library does with one of two cannot be traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from workloads import Batch


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention inside, and what the model had before outside, where plain training is timed."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def as_tuple(batch: Batch) -> tuple[torch.Tensor, ...]:
    """The model's inputs in order, the labels last; of the attention mask what is added to the scores, (batch, 1, seq, seq)."""
    if "pixel_values" in batch:
        return batch["pixel_values"], batch["labels"]
    seen = batch["attention_mask"][:, None, None, :].expand(-1, 1, batch["attention_mask"].shape[1], -1)
    additive = torch.zeros(seen.shape).masked_fill(seen == 0, torch.finfo(torch.float32).min)
    return batch["input_ids"], batch["token_type_ids"], additive, batch["labels"]
