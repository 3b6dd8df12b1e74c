"""Rows to batches where the labels are tokens, or lie on tokens: one class per kind of language model."""

from __future__ import annotations

import abc
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_trak.config import TrakConfig
from hf_trak.tasks.inputs import Rows
from hf_trak.tasks.token_outputs import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

_ROWS_CHECKED_AT_ONCE = 1000
_SENTINEL = re.compile(r"<extra_id_\d+>")
_LOGITS_OF_A_TOKEN = 1 << 15  # a larger vocabulary's tokens count for several, so that a batch's logits stay within memory


class Example(NamedTuple):
    """One row as token ids."""

    ids: np.ndarray
    labels: np.ndarray
    """Of the tokens, -100 where none is scored; of a decoder's, if there is one; for a span, its first and last token."""
    types: np.ndarray | None = None
    decoder_ids: np.ndarray | None = None


@dataclass(frozen=True)
class TokenInputs(abc.ABC):
    """What language models' inputs have in common.

    Padding is taken off and put back on the right, no wider than a batch needs: features depend on neither its side nor its width.

    Args:
        accepted (`frozenset[str]`): Names the model's `forward` takes.
        pad_token_id (`int`): The model's.
        n_labels (`int`): Of the vocabulary, or of the classes of a token.
        positions (`int`, *optional*): Tokens the model has positions for.
        score_tokens (`str`): "all", or "content": neither special tokens, such as EOS, nor sentinels, such as `<extra_id_0>`.
        decoder_start (`int`, *optional*): What a decoder reads first.
    """

    text_columns: tuple[str, ...] | None
    label_column: str | None
    max_length: int | None
    accepted: frozenset[str]
    pad_token_id: int
    n_labels: int
    positions: int | None = None
    score_tokens: str = "all"
    decoder_start: int | None = None

    @classmethod
    def for_model(cls, model: PreTrainedModel, config: TrakConfig) -> TokenInputs:
        """Read what is needed off a model and a configuration."""
        text = model.config.get_text_config()
        return cls(
            text_columns=config.text_columns,
            label_column=config.label_column,
            max_length=config.max_length,
            accepted=frozenset(inspect.signature(model.forward).parameters),
            pad_token_id=getattr(text, "pad_token_id", None) or 0,
            n_labels=cls._count_labels(model),
            positions=getattr(text, "max_position_embeddings", None),
            score_tokens=config.score_tokens,
            decoder_start=getattr(text, "decoder_start_token_id", None),
        )

    @staticmethod
    def _count_labels(model: PreTrainedModel) -> int:
        return model.config.get_text_config().vocab_size

    # A dataset's columns.

    @abc.abstractmethod
    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError that names the columns if a dataset cannot serve."""

    @abc.abstractmethod
    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        """Return one row's tokens; raise a ValueError that says what is wrong with it."""

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> TokenInputs:
        """Return these inputs: which columns they read is decided by names alone."""
        return self

    def columns_read(self, features: Features) -> dict[str, Any]:
        """Return which columns are read and as what, JSON-able; by default tokens, or the columns of strings."""
        if self._is_tokenized(features):
            found: dict[str, Any] = {"tokens": [name for name in features if name in self.accepted and name != "labels"]}
            label = self.label_column or "labels"
            return {**found, "label": label} if label in features else found
        found = {"text": list(self.text_columns or self._string_columns(features))}
        return {**found, "label": self.label_column} if self.label_column is not None else found

    def _need(self, features: Features, columns: Sequence[str], purpose: str) -> None:
        missing = [column for column in columns if column not in features]
        if missing:
            raise ValueError(
                f"{purpose} need{'' if ' and ' in purpose else 's'} the columns {', '.join(map(repr, columns))}, but the dataset has "
                f"{', '.join(features)}. Set `text_columns` and `label_column`."
            )

    @staticmethod
    def _need_tokenizer(processing_class: Any) -> None:
        if processing_class is None:
            raise ValueError("Text columns need a tokenizer: pass it as `processing_class`, or tokenize the dataset first.")

    def _is_tokenized(self, columns: Sequence[str] | Rows | Features) -> bool:
        return "input_ids" in columns and self.text_columns is None

    # Rows.

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Encode every row once, before anything is computed.

        Raises:
            ValueError: Naming the first row that cannot serve.
        """
        for start in range(0, len(dataset), _ROWS_CHECKED_AT_ONCE):
            stop = min(start + _ROWS_CHECKED_AT_ONCE, len(dataset))
            for _ in self._examples(dataset[start:stop], processing_class, first=start):
                pass

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return a batch."""
        return self._pad(list(self._examples(rows, processing_class)))

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int]:
        """Return what a row costs: its tokens, those with logits over a large vocabulary counted as several."""
        times = max(1, self.n_labels // _LOGITS_OF_A_TOKEN)
        return [
            len(example.ids) + len(example.labels) * times if example.decoder_ids is not None else len(example.ids) * times
            for example in self._examples(dataset[:], processing_class)
        ]

    def _examples(self, rows: Rows, processing_class: Any, *, first: int = 0) -> Iterator[Example]:
        names = list(rows)
        for place, values in enumerate(zip(*rows.values(), strict=True)):
            try:
                example = self._encode(dict(zip(names, values, strict=True)), processing_class)
                example = example._replace(labels=self._score(example.labels, processing_class))
                self._check(example)
            except ValueError as error:
                raise ValueError(f"Row {first + place} cannot serve: {error}.") from error
            yield example

    def _score(self, labels: np.ndarray, processing_class: Any) -> np.ndarray:
        """Leave out what `score_tokens` does not count."""
        if self.score_tokens == "all":
            return labels
        if processing_class is None:
            raise ValueError(
                'score_tokens="content" needs a tokenizer that knows the special tokens: pass it as `processing_class`'
            )
        special = set(processing_class.all_special_ids)
        kept = [
            value >= 0
            and value not in special
            # mT5's tokenizer does not list its sentinels among the special tokens.
            and not _SENTINEL.search(str(processing_class.convert_ids_to_tokens(int(value))))
            for value in labels.tolist()
        ]
        return np.where(kept, labels, IGNORED)

    def _check(self, example: Example) -> None:
        if len(example.ids) == 0:
            raise ValueError("it has no token")
        for name, values in (("inputs", example.ids), ("labels", example.labels)):
            if self.positions is not None and len(values) > self.positions:
                raise ValueError(
                    f"its {name} are {len(values)} tokens, more than the model's {self.positions} positions; tokenize again with "
                    "`truncation=True`"
                )
            if self.max_length is not None and len(values) > self.max_length:
                raise ValueError(
                    f"its {name} are {len(values)} tokens, more than max_length={self.max_length}; tokenize again with "
                    "`truncation=True`, or leave out `max_length`"
                )
        labels = example.labels
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= self.n_labels))]
        if len(wrong):
            raise ValueError(
                f"its labels must be -100 or lie in 0 to {self.n_labels - 1}, what the model can predict, but one is {wrong[0]}"
            )
        self._check_scored(example)

    def _check_scored(self, example: Example) -> None:
        if not (example.labels != IGNORED).any():
            raise ValueError(
                "no token of it is scored: all its labels are -100"
                + (' or left out by score_tokens="content"' if self.score_tokens != "all" else "")
                + "; filter it out"
            )

    def _pad(self, examples: list[Example]) -> dict[str, Tensor]:
        batch = {"input_ids": _stack([example.ids for example in examples], self.pad_token_id)}
        lengths = torch.tensor([len(example.ids) for example in examples])
        if "attention_mask" in self.accepted:
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths.unsqueeze(1)).long()
        types = [example.types for example in examples if example.types is not None]
        if types and "token_type_ids" in self.accepted:
            batch["token_type_ids"] = _stack(types, 0)
        decoder_ids = [example.decoder_ids for example in examples if example.decoder_ids is not None]
        if decoder_ids:
            batch["decoder_input_ids"] = _stack(decoder_ids, self.pad_token_id)
        batch["labels"] = _stack([example.labels for example in examples], IGNORED)
        return batch

    def _limit(self, processing_class: Any) -> dict[str, Any]:
        """Return a tokenizer's options that cut a text."""
        limit = min(self.max_length or 10**9, self.positions or 10**9, getattr(processing_class, "model_max_length", 10**9))
        return {"truncation": True, "max_length": limit} if limit < 10**9 else {}

    def _string_columns(self, features: Features) -> list[str]:
        return [name for name, kind in features.items() if getattr(kind, "dtype", None) in ("string", "large_string")]


def without_padding(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return a tokenized row's ids without padding, which tokens were kept, and its token types."""
    ids = np.asarray(row["input_ids"], dtype=np.int64)
    mask = row.get("attention_mask")
    kept = np.ones(len(ids), dtype=bool) if mask is None else np.asarray(mask).astype(bool)
    types = row.get("token_type_ids")
    return ids[kept], kept, None if types is None else np.asarray(types, dtype=np.int64)[kept]


def labels_like(row: Mapping[str, Any], column: str, kept: np.ndarray) -> np.ndarray:
    """Return a tokenized row's labels without padding; there must be one per token."""
    labels = np.asarray(row[column], dtype=np.int64)
    if labels.shape != kept.shape:
        raise ValueError(
            f"it has {len(kept)} tokens in 'input_ids' and {labels.size} labels in {column!r}; there must be one each"
        )
    return labels[kept]


def _stack(values: Sequence[np.ndarray], fill: int) -> Tensor:
    result = torch.full((len(values), max(map(len, values))), fill, dtype=torch.int64)
    for row, value in zip(result, values, strict=True):
        row[: len(value)] = torch.from_numpy(value)
    return result
