r"""The task of fact tracing: tokens of masked sentences, and the log-odds or the loss of their answers.

A target is what a T5 model writes: `<extra_id_0>`, the answer, and the end of the sequence. The first and the last tell nothing of
the fact, but have gradients; which of them are scored is said where it matters.

The log-odds of token t are $\text{logit}_t - \text{logsumexp}_{c \ne t}\,\text{logit}_c = \log\frac{p_t}{1 - p_t}$; of an example, their
mean over the scored tokens. Source: `NLPModelOutput` in the early history of MadryLab/trak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.evaluation.fact_tracing.data import MASK
from hf_trak.hashing import hash_tensors
from hf_trak.tasks import Task, token_margins

if TYPE_CHECKING:
    from datasets import Dataset, Features


IGNORED = -100
_TEXTS = ("inputs_pretokenized", "targets_pretokenized")


@dataclass(frozen=True)
class Encoder:
    """Texts to tokens to tensors.

    Args:
        tokenizer: Of the model; `<extra_id_0>` must be one token, and the end of the sequence added to every text.
        decoder_start_token_id (`int`): The model's.
        max_length, max_target_length (`int`): Tokens kept.
        score_sentinel, score_eos (`bool`): Whether `<extra_id_0>` and the end of the sequence are scored. The answer always is.
    """

    tokenizer: Any
    decoder_start_token_id: int
    max_length: int = 128
    max_target_length: int = 32
    score_sentinel: bool = True
    score_eos: bool = True

    def __post_init__(self) -> None:
        ids = self.tokenizer([MASK])["input_ids"][0]
        if len(ids) != 2 or ids[1] != self.tokenizer.eos_token_id:
            raise ValueError(
                f"Expected {MASK} to be one token, followed by the end of the sequence ({self.tokenizer.eos_token_id}), but it is "
                f"{ids}. The tokenizer must be a T5 or mT5 one."
            )

    @property
    def sentinel_id(self) -> int:
        """The token of `<extra_id_0>` in a text, which `convert_tokens_to_ids` does not know for mT5."""
        return int(self.tokenizer([MASK])["input_ids"][0][0])

    def tokens(self, rows: Mapping[str, Sequence[Any]] | Dataset) -> tuple[list[list[int]], list[list[int]]]:
        """Return the tokens of inputs and of targets."""
        limits = (self.max_length, self.max_target_length)
        inputs, targets = (
            self.tokenizer(list(rows[column][:]), truncation=True, max_length=limit)["input_ids"]
            for column, limit in zip(_TEXTS, limits, strict=True)
        )
        return inputs, targets

    def batch(self, inputs: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `decoder_input_ids`, and `labels` that are -100 where nothing is scored."""
        pad = self.tokenizer.pad_token_id
        ids, written = _padded(inputs, pad), _padded(targets, pad)
        there = _padded([[1] * len(row) for row in targets], 0).bool()
        start = torch.full_like(written[:, :1], self.decoder_start_token_id)
        labels = written.masked_fill(~there, IGNORED)
        if not self.score_sentinel:
            labels = labels.masked_fill(labels == self.sentinel_id, IGNORED)
        if not self.score_eos:
            labels = labels.masked_fill(labels == self.tokenizer.eos_token_id, IGNORED)
        return {
            "input_ids": ids,
            "attention_mask": _padded([[1] * len(row) for row in inputs], 0),
            "decoder_input_ids": torch.cat([start, written[:, :-1]], 1),
            "labels": labels,
        }


def _padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


class EncodedRows:
    """A dataset's tokens, in memory; batches are made as they are needed."""

    def __init__(self, rows: Dataset, encoder: Encoder) -> None:
        self.encoder = encoder
        inputs, targets = encoder.tokens(rows)
        self._inputs, self._targets = _Ragged(inputs), _Ragged(targets)

    def __len__(self) -> int:
        return len(self._inputs)

    def fingerprint(self) -> str:
        """Return a hash of the tokens."""
        parts = {"inputs": self._inputs, "targets": self._targets}
        arrays = {f"{name}_{kind}": array for name, part in parts.items() for kind, array in part.arrays().items()}
        return hash_tensors({name: torch.from_numpy(array) for name, array in arrays.items()})

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row's input."""
        return self._inputs.lengths

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return some rows as tensors."""
        return self.encoder.batch([self._inputs[row] for row in rows], [self._targets[row] for row in rows])

    def batches(self, order: Iterable[Sequence[int]], device: str | torch.device = "cpu") -> Iterator[dict[str, Tensor]]:
        """Yield one batch per list of rows."""
        for rows in order:
            yield {key: values.to(device) for key, values in self.batch(rows).items()}


class _Ragged:
    """Lists of numbers, end to end: a tenth of the memory of Python's."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        self._ends = np.cumsum(self.lengths)
        self._flat = np.fromiter((token for row in rows for token in row), dtype=np.int32, count=int(self.lengths.sum()))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> list[int]:
        return self._flat[self._ends[row] - self.lengths[row] : self._ends[row]].tolist()

    def arrays(self) -> dict[str, np.ndarray]:
        return {"flat": self._flat, "lengths": self.lengths}


OUTPUTS = ("log_odds", "log_probability")


def fact_task(encoder: Encoder, *, output: str = "log_odds", reduction: str = "mean") -> Task:
    """Return the task whose output is about a masked sentence's answer.

    Args:
        encoder (`Encoder`): Says which tokens are scored.
        output (`"log_odds"` or `"log_probability"`): The latter is minus the loss, and its `out_to_loss` is 1.
        reduction (`"mean"` or `"sum"`): Over the scored tokens.

    Raises:
        ValueError: If an option is none of these.
    """
    if output not in OUTPUTS:
        raise ValueError(f"`output` must be one of {', '.join(OUTPUTS)}, but is {output!r}.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"`reduction` must be 'mean' or 'sum', but is {reduction!r}.")

    def output_function(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return answer_output(model(**inputs, use_cache=False).logits, batch["labels"], output=output, reduction=reduction)

    scored = f"{'+sentinel' * encoder.score_sentinel}{'+eos' * encoder.score_eos}"
    name = f"fact-tracing:{reduction} {output} of answer{scored}"
    kind = "mean_one_minus_p" if output == "log_odds" else "one"
    return Task(name, FactInputs(encoder), output_function, needs_labels=False, out_to_loss_kind=kind)


def answer_output(
    logits: Float[Tensor, "batch tokens vocabulary"], labels: Int64[Tensor, "batch tokens"], *, output: str, reduction: str
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return the output and `out_to_loss` of each example; tokens whose label is -100 are not scored."""
    scored = labels != IGNORED
    margins = token_margins(logits, labels.masked_fill(~scored, 0))
    wrong = torch.sigmoid(-margins.detach())  # 1 - p
    # log p = log sigmoid(margin), so that one function of the logits serves both
    values, out_to_loss = (margins, wrong) if output == "log_odds" else (F.logsigmoid(margins), torch.ones_like(margins))
    weights = scored.to(values.dtype)
    mean_weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    output_weights = weights if reduction == "sum" else mean_weights
    return (values * output_weights).sum(1), (out_to_loss * mean_weights).sum(1).detach()


def token_loss(logits: Float[Tensor, "batch tokens vocabulary"], labels: Int64[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over all scored tokens of a batch: what is trained on."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


_COLUMNS = ("inputs_pretokenized", "targets_pretokenized")


@dataclass(frozen=True)
class FactInputs:
    """The columns of FTRACE, through a tokenizer; how [`Task`] sees an [`Encoder`]."""

    encoder: Encoder

    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError if a text column is missing."""
        if absent := [column for column in _COLUMNS if column not in features]:
            raise ValueError(f"Fact tracing needs {', '.join(absent)}, but the dataset has {', '.join(features)}.")

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Sentences and their answers are made by the protocol, which checks them."""

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> FactInputs:
        """The columns are known."""
        return self

    def columns_read(self, features: Features) -> dict[str, Any]:
        """Return the columns of texts."""
        return {"text": list(_COLUMNS)}

    def collate(self, rows: Mapping[str, Any], processing_class: Any) -> dict[str, Tensor]:
        """Return the batch of some rows."""
        return self.encoder.batch(*self.encoder.tokens(rows))

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        """Return each row's tokens, of input and target together."""
        inputs, targets = self.encoder.tokens(dataset)
        return [len(row) + len(target) for row, target in zip(inputs, targets, strict=True)]
