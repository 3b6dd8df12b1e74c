r"""Preferences: rows of a prompt, a chosen and a rejected answer, and the difference of their log-probabilities.

    f = log π(chosen) − log π(rejected)           summed over the answers' tokens, as DPO does, or the mean of each
    out_to_loss = 1 − σ(β (f − f_ref))            f_ref the same of a reference model, where rows have it, else 0

DPO's loss is −log σ(β (f − f_ref)), whose derivative by f is −β times out-to-loss. The gradient of f does not depend on the reference.

Source: Rafailov et al. (2023), [Direct preference optimization](https://huggingface.co/papers/2305.18290). What is scored is what TRL's
`DPOTrainer` trains on with the same settings, or its own tokenized dataset.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from hf_trak.tasks.base import Task
from hf_trak.tasks.chat import ChatTemplate
from hf_trak.tasks.inputs import Rows, need_tokenizer
from hf_trak.tasks.language_inputs import CausalInputs, conversation_of, with_eos
from hf_trak.tasks.outputs import call_model
from hf_trak.tasks.rows import Faults
from hf_trak.tasks.token_inputs import Example, text_of
from hf_trak.tasks.token_outputs import IGNORED, token_margins

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

    from hf_trak.config import TrakConfig

logger = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")
PREFERENCE_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids")
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
ROW_OPTIONS = ("tools", "chat_template_kwargs")
_AT_ONCE = 1000
_Side = TypeVar("_Side")


@dataclass(frozen=True)
class PreferenceInputs:
    """Rows of `chosen` and `rejected`, both texts or both conversations, with their `prompt` or with a beginning in common; or the
    `prompt_ids`, `chosen_ids` and `rejected_ids` that `DPOTrainer` makes of them.

    Columns `ref_chosen_logps` and `ref_rejected_logps` (`precompute_ref_log_probs=True` in TRL) are the summed log-probabilities that the
    reference model gives. A batch holds the chosen answers behind their prompts, and the rejected ones under names that begin with `rejected_`.

    Args:
        texts ([`CausalInputs`]): What cuts and pads each answer behind its prompt.
        reduction (`str`): Of the output: "sum" or "mean".
    """

    texts: CausalInputs
    reduction: str = "sum"

    def has_reference(self, columns: Any) -> bool:
        """Return whether rows have what a reference model gives; sums, which are of no use beside means."""
        return self.reduction == "sum" and all(name in columns for name in _REFERENCE)

    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError that names the columns if a dataset cannot serve."""
        self.columns_read(features)
        if not set(PREFERENCE_TOKENS) <= set(features):
            need_tokenizer(processing_class)

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> PreferenceInputs:
        return self

    def columns_read(self, features: Features) -> dict[str, Any]:
        names = set(features)
        reference = {"reference": list(_REFERENCE)} if self.has_reference(features) else {}
        if set(PREFERENCE_TOKENS) <= names:
            return {"tokens": list(PREFERENCE_TOKENS), **reference}
        if not set(SIDES) <= names:
            raise ValueError(
                "preference needs the columns 'chosen' and 'rejected', texts or conversations, with a 'prompt' or with a beginning in common, "
                f"or DPOTrainer's {', '.join(map(repr, PREFERENCE_TOKENS))}, but the dataset has {', '.join(features)}. Rename a column with "
                "`dataset.rename_column`."
            )
        return {name: name for name in ("prompt", *SIDES, *ROW_OPTIONS) if name in names} | reference

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Encode every row once, before anything is computed.

        Raises:
            ValueError: Naming all rows that cannot serve, with the reasons.
        """
        faults = Faults(len(dataset))
        for number, row in numbered_rows(dataset):
            try:
                pair = self._pair(row, processing_class)
            except ValueError as error:
                faults.cannot_serve(number, str(error))
                continue
            if any(example.n_cut for example in pair):
                faults.cut(number)
        faults.raise_for_rows()
        for line in faults.notes(self.texts._describe_limit(processing_class), skip=False):
            logger.warning(line)

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return a batch."""
        pairs = read_pairs(rows, lambda row: self._pair(row, processing_class))
        chosen, rejected = (self.texts._pad([pair[side] for pair in pairs]) for side in range(2))
        batch = {**chosen, **{f"rejected_{name}": values for name, values in rejected.items()}}
        if self.has_reference(rows):
            first, second = (torch.tensor(list(rows[name]), dtype=torch.float64) for name in _REFERENCE)
            batch["reference"] = first - second
        return batch

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int]:
        """Return the tokens of both sequences of a row."""
        return [sum(len(example.ids) for example in self._pair(row, processing_class)) for row in each_row(dataset[:])]

    def text_limit(self, tokenizer: Any) -> int | None:
        """Return how many tokens of a prompt and its answer are kept; None for all."""
        return self.texts.text_limit(tokenizer)

    def _pair(self, row: Mapping[str, Any], tokenizer: Any) -> tuple[Example, Example]:
        """Return both answers behind their prompt, of which the answers are scored.

        Raises:
            ValueError: If a side has no scored token, or the row cannot be read.
        """
        for name in _REFERENCE:
            if name in row and row[name] is None:
                raise ValueError(f"its {name!r} is None; compute it, or remove the column")
        border, sequences = self._sequences(row, tokenizer)
        pair = []
        for side, ids in zip(SIDES, sequences, strict=True):
            example = self.texts._cut(ids, [place >= border for place in range(len(ids))], tokenizer)
            self.texts._check(example)
            if not self.texts._scores(example):
                reason = example.unscored or "no token of it is scored"
                raise ValueError(f"of its {side} answer nothing is scored ({reason}); filter it out, or raise `max_length`")
            pair.append(example)
        return pair[0], pair[1]

    def _sequences(self, row: Mapping[str, Any], tokenizer: Any) -> tuple[int, list[list[int]]]:
        """Return the token at which the answers begin, and the tokens of both sequences."""
        if all(name in row for name in PREFERENCE_TOKENS):
            before = _ids(row, "prompt_ids")
            return len(before), [before + _ids(row, f"{side}_ids") for side in SIDES]
        if tokenizer is None:
            need_tokenizer(tokenizer)
        prompt, answers = _split(row)
        if isinstance(prompt, str):
            before = list(tokenizer(prompt)["input_ids"])
            whole = [list(tokenizer(prompt + with_eos(answer, tokenizer))["input_ids"]) for answer in answers]
        else:
            template = ChatTemplate.for_row(row, tokenizer, self.texts.chat_template_kwargs)
            before = template.ids(prompt, add_generation_prompt=True)
            whole = [template.ids([*prompt, *answer]) for answer in answers]
        return min(_shared(before, ids) for ids in whole), whole


def _split(row: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """Return the prompt and both answers: texts, or conversations. Without a prompt, it is what both have in common, as in TRL."""
    is_text = any(isinstance(row[side], str) for side in SIDES)
    read: Callable[[Mapping[str, Any], str], Any] = text_of if is_text else conversation_of
    answers = [read(row, side) for side in SIDES]
    if "prompt" in row:
        if isinstance(row["prompt"], str) != is_text:
            raise ValueError("its 'prompt' must be a text where its answers are, and a conversation where they are")
        return read(row, "prompt"), answers
    border = _shared(*answers)
    if is_text and 0 < border < min(map(len, answers)) and answers[0][border - 1] == " ":
        border -= 1  # the space belongs to the answers
    if border == 0:
        raise ValueError("its 'chosen' and 'rejected' have no beginning in common, and there is no 'prompt'; add the column")
    return answers[0][:border], [answer[border:] for answer in answers]


def _shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many leading entries two sequences share."""
    pairs = zip(first, second, strict=False)
    return next((place for place, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(first), len(second)))


def _ids(row: Mapping[str, Any], name: str) -> list[int]:
    if row[name] is None:
        raise ValueError(f"its {name!r} are None; filter it out")
    return [int(value) for value in row[name]]


def each_row(rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield the rows of columns."""
    for values in zip(*rows.values(), strict=True):
        yield dict(zip(rows, values, strict=True))


def numbered_rows(dataset: Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a dataset with their numbers, read a thousand at a time."""
    for start in range(0, len(dataset), _AT_ONCE):
        yield from enumerate(each_row(dataset[start : min(start + _AT_ONCE, len(dataset))]), start)


def read_pairs(rows: Rows, read: Callable[[dict[str, Any]], tuple[_Side, _Side]]) -> list[tuple[_Side, _Side]]:
    """Return both sides of each row.

    Raises:
        ValueError: Naming the row that `read` refuses.
    """
    pairs = []
    for place, row in enumerate(each_row(rows)):
        try:
            pairs.append(read(row))
        except ValueError as error:
            raise ValueError(f"Row {place} cannot serve: {error}.") from error
    return pairs


@dataclass(frozen=True)
class PreferenceOutput:
    """The difference of the log-probabilities of two answers, and 1 − σ(β (f − f_ref)).

    Args:
        reduction (`str`): "sum" over an answer's tokens, or "mean".
        beta (`float`): DPO's β.
    """

    reduction: str = "sum"
    beta: float = 0.1

    def __call__(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return f and Q of every example."""
        rejected = {name.removeprefix("rejected_"): values for name, values in batch.items() if name.startswith("rejected_")}
        chosen = {name: values for name, values in batch.items() if not name.startswith("rejected_") and name != "reference"}
        output = self._log_p(model, chosen) - self._log_p(model, rejected)
        margin = output.detach() - (batch["reference"].to(output.dtype) if "reference" in batch else 0.0)
        return output, torch.sigmoid(-self.beta * margin)

    def _log_p(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> Float[Tensor, " batch"]:
        logits = call_model(model, batch).logits
        labels = torch.cat([batch["labels"][:, 1:], torch.full_like(batch["labels"][:, :1], IGNORED)], 1)
        if logits.shape[:2] != labels.shape:
            raise ValueError(
                f"The model returns logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}. Make a task with "
                "`Task.custom`."
            )
        scored = labels != IGNORED
        each = logsigmoid(token_margins(logits, labels.where(scored, 0)))  # log p, from log p / (1 − p)
        total = torch.where(scored, each, each.new_zeros(())).sum(1)
        return total / scored.sum(1).clamp(min=1) if self.reduction == "mean" else total


def preference_task(model: PreTrainedModel, config: TrakConfig) -> Task:
    """Return the task of a causal language model's preferences.

    Raises:
        ValueError: If rows are said to be in a format without preferences.
    """
    if config.row_format != "auto":
        raise ValueError(f"row_format={config.row_format!r} (--row_format) has no preferences: leave it out.")
    texts = CausalInputs.for_model(model, config)
    assert isinstance(texts, CausalInputs)
    inputs = PreferenceInputs(texts, config.preference_reduction)
    output = PreferenceOutput(config.preference_reduction, config.preference_beta)
    return Task("preference", inputs, output, needs_labels=False, out_to_loss_kind="one_minus_p")
