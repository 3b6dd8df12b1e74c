"""Rows of a multiple-choice model: a question and its possible answers, as columns of texts or already tokenized."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_trak.tasks.inputs import Rows, need_tokenizer
from hf_trak.tasks.outputs import APART
from hf_trak.tasks.padding import NOT_DATA, has_learned_positions, position_limit, refuse_texts_without_boxes, text_limit
from hf_trak.tasks.rows import features_of, is_transformed, name_rows

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

    from hf_trak.config import TrakConfig

_LABELS = ("labels", "label", "answerKey", "answer", "gold")
_LISTS = ("choices", "endings", "options", "answers")
_NUMBERED = ("ending", "choice", "sol", "option", "answer")
# (what the choices are about, what each choice is appended to): SWAG, RACE and CosmosQA, ARC, HellaSwag, PIQA.
_TEXTS = (
    ("sent1", "sent2"), ("article", "question"), ("passage", "question"), ("context", "question"), ("question", None),
    ("question_stem", None), ("ctx", None), ("goal", None), ("context", None), ("prompt", None), ("startphrase", None),
)  # fmt: skip
_AT_ONCE = 1000


class Columns(NamedTuple):
    """Which columns hold what.

    Args:
        text (`str`): What all choices are about: a tokenizer's first text.
        header (`str`, *optional*): What stands before each choice in the second.
        choices (`tuple[str, ...]`): One column of lists, or one for each choice.
        label (`str`): The right choice.
    """

    text: str
    header: str | None
    choices: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class ChoiceInputs:
    """A batch has `input_ids` (batch, choices, tokens), padded on the right no wider than its longest choice.

    Rows are tokenized (`input_ids`: a list of tokens for each choice), or texts: the formats of SWAG, HellaSwag, ARC, CommonsenseQA, OpenBookQA,
    RACE, PIQA and MMLU are known by their columns, and `text_columns=(text, choices)` or `(text, header, choices)` names others. Rows with
    different numbers of choices are computed apart. The label is a number, a letter, or one of the `label` of `choices`.

    Args:
        accepted (`frozenset[str]`): Names the model's `forward` takes.
        pad_token_id (`int`): The model's.
        positions (`int`, *optional*): Tokens the model has positions for: where texts are cut.
        strict (`bool`): Whether a longer row is an error in the model.
    """

    text_columns: tuple[str, ...] | None
    label_column: str | None
    max_length: int | None
    accepted: frozenset[str]
    pad_token_id: int
    positions: int | None = None
    strict: bool = False

    @classmethod
    def for_model(cls, model: PreTrainedModel, config: TrakConfig) -> ChoiceInputs:
        return cls(
            config.text_columns,
            config.label_column,
            config.max_length,
            frozenset(inspect.signature(model.forward).parameters),
            getattr(model.config, "pad_token_id", None) or 0,
            position_limit(model),
            has_learned_positions(model),
        )

    # Columns.

    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError that names the columns if a dataset cannot serve."""
        if self._is_tokenized(features):
            self._label(features)
            self._names(features)
            return
        self._columns(features)
        refuse_texts_without_boxes(self.accepted)
        need_tokenizer(processing_class)

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> ChoiceInputs:
        return self

    def columns_read(self, features: Features) -> dict[str, Any]:
        if self._is_tokenized(features):
            return {"tokens": self._names(features), "label": self._label(features)}
        found = self._columns(features)
        texts = [found.text] if found.header is None else [found.text, found.header]
        return {"text": texts, "choices": list(found.choices), "label": found.label}

    def _is_tokenized(self, columns: Mapping[str, Any]) -> bool:
        return "input_ids" in columns and self.text_columns is None

    def _names(self, columns: Mapping[str, Any]) -> list[str]:
        """Return the columns of tokenized rows that are inputs."""
        found = [name for name in columns if (name in self.accepted or name == "attention_mask") and name not in _LABELS]
        found = [name for name in found if name != self.label_column]
        if wrong := sorted(NOT_DATA.intersection(found)):
            raise ValueError(
                f"The column {wrong[0]!r} has the name of an argument of the model's `forward` that rows cannot give. Remove or rename it: "
                f"`dataset.remove_columns({wrong[0]!r})`."
            )
        return found

    def _label(self, columns: Mapping[str, Any]) -> str:
        candidates = (self.label_column,) if self.label_column else _LABELS
        found = [name for name in candidates if name in columns]
        if not found:
            raise ValueError(
                f"multiple-choice needs a column with the right choice, {' or '.join(map(repr, candidates))}, but the dataset has "
                f"{', '.join(columns)}. Set `label_column` (--label_column)."
            )
        return found[0]

    def _columns(self, columns: Mapping[str, Any]) -> Columns:
        choices = self._choices(columns)
        if self.text_columns is not None:
            if missing := [name for name in self.text_columns if name not in columns]:
                raise ValueError(
                    f"The dataset has no column {', '.join(map(repr, missing))}; it has {', '.join(columns)}. Set `text_columns` "
                    "(--text_columns)."
                )
            texts = tuple(name for name in self.text_columns if name not in choices)
        else:
            known = [pair for pair in _TEXTS if all(name is None or (name in columns and name not in choices) for name in pair)]
            texts = tuple(name for name in known[0] if name is not None) if known else ()
        if not choices or not 1 <= len(texts) <= 2:
            raise ValueError(
                "Expected tokenized rows ('input_ids', a list of tokens for each choice), or a text and its choices, such as 'sent1', 'sent2' and "
                f"'ending0' to 'ending3', or 'question' and 'choices', but the dataset has {', '.join(columns)}. Set `text_columns` "
                "(--text_columns) to the text's column, that of what precedes each choice, if there is one, and that of the choices."
            )
        return Columns(texts[0], texts[1] if len(texts) > 1 else None, choices, self._label(columns))

    def _choices(self, columns: Mapping[str, Any]) -> tuple[str, ...]:
        if self.text_columns is not None and len(self.text_columns) > 1:
            return self.text_columns[-1:]
        for name in _LISTS:
            if name in columns and not self._is_label(name):
                return (name,)
        for name in _NUMBERED:
            found = sorted(column for column in columns if re.fullmatch(rf"{name}_?(\d|[A-E])", column))
            if len(found) > 1:
                return tuple(found)
        return ()

    def _is_label(self, name: str) -> bool:
        return name == self.label_column

    # Rows.

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Look at every row's choices and label.

        Raises:
            ValueError: Naming the rows that cannot serve.
        """
        if is_transformed(dataset):
            return
        features = features_of(dataset)
        tokenized = self._is_tokenized(features)
        names = self._names(features) if tokenized else []
        columns = ["input_ids"] if tokenized else [*self._texts_of(self._columns(features))]
        read = dataset.select_columns(list(dict.fromkeys([*columns, *names, self._label(features)])))
        faults: dict[str, list[int]] = {}
        for start in range(0, len(read), _AT_ONCE):
            rows = read[start : min(start + _AT_ONCE, len(read))]
            for place in range(len(next(iter(rows.values())))):
                try:
                    row = {name: values[place] for name, values in rows.items()}
                    self._tokens(row) if tokenized else self._texts(row)
                except ValueError as error:
                    faults.setdefault(str(error), []).append(start + place)
        if faults:
            reasons = "; ".join(f"{name_rows(rows)}: {reason}" for reason, rows in list(faults.items())[:5])
            count = sum(map(len, faults.values()))
            raise ValueError(f"{count} of {len(dataset)} rows cannot serve: {reasons}. Correct or filter these rows.")

    @staticmethod
    def _texts_of(columns: Columns) -> list[str]:
        return [columns.text, *([columns.header] if columns.header else []), *columns.choices]

    def _texts(self, row: Mapping[str, Any]) -> tuple[list[str], list[str], int]:
        """Return a row's first and second texts, one for each choice, and the number of the right one."""
        columns = self._columns(row)
        names = None
        if len(columns.choices) == 1:
            cell = row[columns.choices[0]]
            if isinstance(cell, Mapping):
                names, cell = cell.get("label"), cell.get("text")
            elif isinstance(cell, (list, tuple)) and cell and isinstance(cell[0], Mapping):
                names, cell = [choice.get("label") for choice in cell], [choice.get("text") for choice in cell]
            choices = list(cell) if isinstance(cell, (list, tuple, np.ndarray)) else []
        else:
            choices = [row[name] for name in columns.choices]
        header = row[columns.header] if columns.header is not None else None
        if len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
            raise ValueError(f"it needs at least two choices, which are texts, but has {str(choices)[:60]}")
        if not isinstance(row[columns.text], str) or (columns.header is not None and not isinstance(header, str)):
            raise ValueError(f"its {columns.text!r} or {columns.header!r} is no text")
        label = self._number(row[columns.label], len(choices), names, columns.label)
        second = choices if header is None else [f"{header} {choice}" for choice in choices]
        return [row[columns.text]] * len(choices), second, label

    @staticmethod
    def _number(value: Any, count: int, names: Sequence[Any] | None, column: str) -> int:
        """Return the number of the right choice, counted from 0."""
        if names is not None and isinstance(value, str) and value in list(names):
            return list(names).index(value)
        if isinstance(value, str) and len(value) == 1 and "A" <= value <= "Z" and names is None:
            number: Any = ord(value) - ord("A")
        elif isinstance(value, str):
            number = int(value) if value.isdecimal() and names is None else None
        else:
            number = value.item() if hasattr(value, "item") else value
        if number is None or isinstance(number, bool) or number != number or int(number) != number or not 0 <= number < count:
            among = "" if names is None else f" or one of {list(names)}"
            raise ValueError(f"its {column!r} is {value!r}, but must be 0 to {count - 1}, a letter{among}")
        return int(number)

    def _tokens(self, row: Mapping[str, Any]) -> tuple[dict[str, list[np.ndarray]], int]:
        """Return a tokenized row's inputs, a list with an array for each choice, without padding, and the right one."""
        if row["input_ids"] is None:
            raise ValueError("its 'input_ids' are None")
        ids = [np.asarray(choice) for choice in row["input_ids"]]
        if len(ids) < 2 or any(choice.ndim != 1 or not len(choice) for choice in ids):
            raise ValueError("its 'input_ids' must be a list of tokens for each of at least two choices")
        masks = row.get("attention_mask")
        kept = (
            [np.ones(len(choice), bool) for choice in ids]
            if masks is None
            else [np.asarray(mask).astype(bool) for mask in masks]
        )
        found: dict[str, list[np.ndarray]] = {}
        for name in self._names(row):
            values = [np.asarray(choice) for choice in row[name]]
            if [len(value) for value in values] != [len(choice) for choice in ids] or len(kept) != len(ids):
                raise ValueError(f"its {name!r} does not have one entry for each token of each choice")
            if name != "attention_mask":
                found[name] = [value[mask] for value, mask in zip(values, kept, strict=True)]
        longest = max(len(choice) for choice in found["input_ids"])
        if not all(len(choice) for choice in found["input_ids"]):
            raise ValueError("a choice of it has no token but padding")
        limits = [limit for limit in (self.positions if self.strict else None, self.max_length) if limit is not None]
        if limits and longest > min(limits):
            raise ValueError(
                f"a choice of it has {longest} tokens, more than {min(limits)}; tokenize again with `truncation=True`"
            )
        label = self._label(row)
        return found, self._number(row[label], len(ids), None, label)

    def text_limit(self, tokenizer: Any) -> int | None:
        """Return how many tokens of a choice are kept; None for all."""
        return text_limit(self.max_length, self.positions, tokenizer, strict=self.strict)

    def _encode(self, row: Mapping[str, Any], tokenizer: Any) -> tuple[dict[str, list[np.ndarray]], int]:
        if self._is_tokenized(row):
            return self._tokens(row)
        first, second, label = self._texts(row)
        limit = self.text_limit(tokenizer)
        encoded = tokenizer(first, second, **({"truncation": True, "max_length": limit} if limit is not None else {}))
        names = [name for name in encoded if name in self.accepted and name != "attention_mask"]
        return {name: [np.asarray(choice) for choice in encoded[name]] for name in names}, label

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return a batch with `labels`."""
        encoded = []
        for place in range(len(next(iter(rows.values())))):
            try:
                encoded.append(self._encode({name: values[place] for name, values in rows.items()}, processing_class))
            except ValueError as error:
                raise ValueError(f"Row {place} of this batch cannot serve: {error}.") from error
        choices = [len(row["input_ids"]) for row, _ in encoded]
        width = max(len(choice) for row, _ in encoded for choice in row["input_ids"])
        batch: dict[str, Any] = {}
        mask = torch.zeros(len(encoded), max(choices), width, dtype=torch.int64)
        for name in encoded[0][0]:
            fill = self.pad_token_id if name == "input_ids" else 0
            inner = encoded[0][0][name][0].shape[1:]
            floating = any(np.issubdtype(choice.dtype, np.floating) for row, _ in encoded for choice in row[name])
            values = torch.full(
                (len(encoded), max(choices), width, *inner), fill, dtype=torch.float32 if floating else torch.int64
            )
            for place, (row, _) in enumerate(encoded):
                for number, choice in enumerate(row[name]):
                    values[place, number, : len(choice)] = torch.from_numpy(choice.astype(np.float32 if floating else np.int64))
                    mask[place, number, : len(choice)] = 1
            batch[name] = values
        if "attention_mask" in self.accepted:
            batch["attention_mask"] = mask
        batch["labels"] = torch.tensor([label for _, label in encoded])
        if len(set(choices)) > 1:
            batch[APART] = f"they have {', '.join(map(str, sorted(set(choices))))} choices"
        return batch

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int]:
        """Return the number of tokens of all of a row's choices."""
        rows = dataset[:]
        count = len(next(iter(rows.values())))
        found = []
        for place in range(count):
            row = {name: values[place] for name, values in rows.items()}
            if self._is_tokenized(row) or processing_class is not None:
                found.append(sum(len(choice) for choice in self._encode(row, processing_class)[0]["input_ids"]))
            else:
                first, second, _ = self._texts(row)
                found.append(sum(map(len, first)) + sum(map(len, second)))
        return found
