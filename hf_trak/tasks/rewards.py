r"""Reward models: rows of a chosen and a rejected answer, and the difference of the rewards that a sequence classifier gives them.

    f = r(chosen) − r(rejected)
    out_to_loss = 1 − σ(f − margin)        margin of the row, where it has one, else 0

The loss of a reward model is −log σ(f − margin), whose derivative by f is minus out-to-loss. What is read is what TRL's `RewardTrainer` trains
on with the same settings, or its own tokenized dataset.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_trak.tasks.base import Task
from hf_trak.tasks.chat import ChatTemplate
from hf_trak.tasks.inputs import Rows, TextInputs, need_tokenizer
from hf_trak.tasks.language_inputs import conversation_of, with_eos
from hf_trak.tasks.outputs import call_model, logits_of
from hf_trak.tasks.padding import tokenizer_limit
from hf_trak.tasks.preferences import ROW_OPTIONS, SIDES, each_row, numbered_rows, read_pairs
from hf_trak.tasks.rows import Faults
from hf_trak.tasks.token_inputs import text_of

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

    from hf_trak.config import TrakConfig

REWARD_TOKENS = ("chosen_ids", "rejected_ids")
_MARGIN = "margin"


@dataclass(frozen=True)
class RewardInputs:
    """Rows of `chosen` and `rejected`, both texts or both conversations, with their `prompt` before them or within; or the `chosen_ids` and
    `rejected_ids` that `RewardTrainer` makes of them. A column `margin` is the margin of its loss.

    A batch holds the chosen sequences, and the rejected ones under names that begin with `rejected_`.

    Args:
        texts ([`TextInputs`]): What pads sequences, and knows the model's limits.
        chat_template_kwargs (`dict`, *optional*): Of the chat template.
    """

    texts: TextInputs
    chat_template_kwargs: Mapping[str, Any] | None = None

    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError that names the columns if a dataset cannot serve."""
        self.columns_read(features)
        if not set(REWARD_TOKENS) <= set(features):
            need_tokenizer(processing_class)

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> RewardInputs:
        return self

    def columns_read(self, features: Features) -> dict[str, Any]:
        names = set(features)
        margin = {_MARGIN: _MARGIN} if _MARGIN in names else {}
        if "prompt_ids" in names:
            raise ValueError(
                "The dataset has 'prompt_ids', which are DPOTrainer's, and this is a reward model, whose sequences hold their prompts. Give "
                "'chosen' and 'rejected' as they were, or remove 'prompt_ids' if 'chosen_ids' and 'rejected_ids' hold the prompts."
            )
        if set(REWARD_TOKENS) <= names:
            return {"tokens": list(REWARD_TOKENS), **margin}
        if not set(SIDES) <= names:
            raise ValueError(
                "preference needs the columns 'chosen' and 'rejected', texts or conversations, or RewardTrainer's 'chosen_ids' and 'rejected_ids', "
                f"but the dataset has {', '.join(features)}. Rename a column with `dataset.rename_column`."
            )
        return {name: name for name in ("prompt", *SIDES, *ROW_OPTIONS) if name in names} | margin

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Encode every row once, before anything is computed.

        Raises:
            ValueError: Naming all rows that cannot serve, with the reasons.
        """
        faults = Faults(len(dataset))
        for number, row in numbered_rows(dataset):
            try:
                self._pair(row, processing_class)
            except ValueError as error:
                faults.cannot_serve(number, str(error))
        faults.raise_for_rows()

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return a batch."""
        pairs = read_pairs(rows, lambda row: self._pair(row, processing_class))
        chosen, rejected = (self.texts.collate({"input_ids": [pair[side] for pair in pairs]}, None) for side in range(2))
        batch = {**chosen, **{f"rejected_{name}": values for name, values in rejected.items()}}
        if _MARGIN in rows:
            batch[_MARGIN] = torch.tensor([float(value) for value in rows[_MARGIN]], dtype=torch.float64)
        return batch

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int]:
        """Return the tokens of both sequences of a row."""
        return [sum(map(len, self._pair(row, processing_class))) for row in each_row(dataset[:])]

    def text_limit(self, tokenizer: Any) -> int | None:
        """Return how many tokens a sequence may have; None for any."""
        limits = (self.texts.max_length, self.texts.positions, tokenizer_limit(tokenizer))
        return min((limit for limit in limits if limit is not None), default=None)

    def _pair(self, row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
        """Return the tokens of both sequences.

        Raises:
            ValueError: If the row cannot be read, or a sequence is empty or too long.
        """
        if _MARGIN in row and not isinstance(row[_MARGIN], (int, float)):
            raise ValueError(f"its 'margin' is {row[_MARGIN]!s:.20}, not a number; fill it in, or remove the column")
        found = []
        for side in SIDES:
            ids = self._sequence(row, side, tokenizer)
            if not ids:
                raise ValueError(f"its {side} sequence has no token; filter it out")
            if self.texts.vocabulary is not None and (wrong := [i for i in ids if not 0 <= i < self.texts.vocabulary]):
                raise ValueError(
                    f"its {side}_ids must lie in 0 to {self.texts.vocabulary - 1}, the model's vocabulary, but one is {wrong[0]}; tokenize with "
                    "the model's own tokenizer"
                )
            limit = self.text_limit(tokenizer)
            if limit is not None and len(ids) > limit:
                raise ValueError(
                    f"its {side} sequence is {len(ids)} tokens, more than {limit}; RewardTrainer leaves such rows out: filter it out, or raise "
                    "`max_length`"
                )
            found.append(ids)
        return found[0], found[1]

    def _sequence(self, row: Mapping[str, Any], side: str, tokenizer: Any) -> list[int]:
        if all(name in row for name in REWARD_TOKENS):
            if row[f"{side}_ids"] is None:
                raise ValueError(f"its '{side}_ids' are None; filter it out")
            return [int(value) for value in row[f"{side}_ids"]]
        is_text = any(isinstance(row[name], str) for name in SIDES)
        if "prompt" in row and isinstance(row["prompt"], str) != is_text:
            raise ValueError("its 'prompt' must be a text where its answers are, and a conversation where they are")
        if is_text:
            prompt = text_of(row, "prompt") if "prompt" in row else ""
            return list(tokenizer(prompt + with_eos(text_of(row, side), tokenizer), verbose=False)["input_ids"])
        turns = conversation_of(row, "prompt") if "prompt" in row else []
        return ChatTemplate.for_row(row, tokenizer, self.chat_template_kwargs).ids([*turns, *conversation_of(row, side)])


@dataclass(frozen=True)
class RewardOutput:
    """The difference of the rewards of two sequences, and 1 − σ of it less the margin."""

    def __call__(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return f and Q of every example."""
        rejected = {name.removeprefix("rejected_"): values for name, values in batch.items() if name.startswith("rejected_")}
        chosen = {name: values for name, values in batch.items() if not name.startswith("rejected_") and name != _MARGIN}
        output = (logits_of(call_model(model, chosen)) - logits_of(call_model(model, rejected))).squeeze(1)
        margin = batch[_MARGIN].to(output.dtype) if _MARGIN in batch else 0.0
        return output, torch.sigmoid(margin - output.detach())


def reward_task(model: PreTrainedModel, config: TrakConfig) -> Task:
    """Return the task of a reward model's preferences."""
    texts = TextInputs.for_model(model, None, config.max_length)
    options = json.loads(config.chat_template_kwargs) if config.chat_template_kwargs else None
    inputs = RewardInputs(texts, options)
    return Task("preference", inputs, RewardOutput(), needs_labels=False, out_to_loss_kind="one_minus_p")
