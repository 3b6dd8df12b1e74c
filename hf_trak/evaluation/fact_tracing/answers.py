"""What a model answers, and which facts fine-tuning taught it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool

from hf_trak.evaluation.fact_tracing.data import answer_of
from hf_trak.evaluation.fact_tracing.encoding import EncodedRows, Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

N_BEAMS = 3
_MAX_LENGTH = 20


def normalize(text: str) -> str:
    """Return an answer as it is compared: without mask tokens, a full stop at its end, or capitals."""
    return answer_of(text).removesuffix(".").strip().lower()


@torch.no_grad()
def beams(
    model: PreTrainedModel, encoder: Encoder, queries: Dataset, *, n_beams: int = N_BEAMS, batch_size: int = 128
) -> list[list[str]]:
    """Return each query's `n_beams` best answers, normalized, the best first."""
    rows = EncodedRows(queries, encoder)
    order = np.argsort(rows.lengths, kind="stable")
    model.eval()
    found: list[list[str]] = [[] for _ in order]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size].tolist()
        batch = rows.batch(chosen)
        texts = _generate(model, encoder.tokenizer, batch["input_ids"], batch["attention_mask"], n_beams)
        for place, row in enumerate(chosen):
            found[row] = [normalize(text) for text in texts[n_beams * place : n_beams * (place + 1)]]
    return found


def _generate(model: Any, tokenizer: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, n_beams: int) -> list[str]:
    written = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        num_beams=n_beams,
        num_return_sequences=n_beams,
        max_length=_MAX_LENGTH,
        do_sample=False,
    )
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    return tokenizer.batch_decode([[token for token in row if token not in special] for row in written.tolist()])


def is_right(answers: Sequence[Sequence[str]], queries: Dataset, *, among: int = 1) -> Bool[np.ndarray, " n_query"]:
    """Return whether the gold answer is among each query's first answers."""
    gold = [normalize(target) for target in queries["targets_pretokenized"][:]]
    return np.array([right in given[:among] for right, given in zip(gold, answers, strict=True)], dtype=bool)


def fine_tune_learned(
    before: Sequence[Sequence[str]], after: Sequence[Sequence[str]], queries: Dataset
) -> Bool[np.ndarray, " n_query"]:
    """Return which facts fine-tuning taught: the gold answer was not among the first three before, and is the first after."""
    return ~is_right(before, queries, among=N_BEAMS) & is_right(after, queries)
