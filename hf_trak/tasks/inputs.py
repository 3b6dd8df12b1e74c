"""From rows of a dataset to a batch of tensors: one class per modality."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hf_trak.messages import MissingProcessor
from hf_trak.tasks.columns import find_text_columns, is_string
from hf_trak.tasks.padding import (
    extra_columns,
    has_learned_positions,
    pad_tokens,
    position_limit,
    refuse_texts_without_boxes,
    text_limit,
    vocabulary_size,
)
from hf_trak.tasks.rows import is_transformed, missing_rows, name_rows

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

Rows = Mapping[str, Sequence[Any]]
"""Columns of a slice of a dataset, as `Dataset.map(batched=True)` hands them out."""

LABELS = ("labels", "label")
_TOKENS = ("input_ids", "attention_mask", "token_type_ids")
_NOT_PER_TOKEN = ("pixel_values", "pixel_mask", "pixel_attention_mask", "spatial_shapes", "image_sizes")


class Inputs(Protocol):
    """How one modality becomes a model's inputs."""

    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError that names the columns if a dataset cannot serve."""
        ...

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Raise a ValueError that names the rows that cannot serve, before anything is computed."""
        ...

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> Inputs:
        """Return these inputs with the columns of a dataset decided on, so that no batch decides again.

        Args:
            features (`Mapping`): The type of each column that rows really have.
            dataset (`Dataset`, *optional*): Its first rows help where names do not decide.

        Raises:
            ValueError: If no column can serve, or several may be meant.
        """
        ...

    def columns_read(self, features: Features) -> dict[str, Any]:
        """Return which columns are read and as what, without labels: `{"text": [...]}`, `{"tokens": [...]}`, `{"image": ...}`, JSON-able."""
        ...

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return the model's inputs for `rows`, without labels."""
        ...

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        """Return a number per row that grows with its cost, so that rows of like cost share a batch; None if all are alike.

        It is the row's tokens where they are given, or a tokenizer is.
        """
        ...


@runtime_checkable
class CutsTexts(Protocol):
    """Inputs that cut texts at a number of tokens, which is then part of what features mean."""

    def text_limit(self, tokenizer: Any) -> int | None:
        """Return how many tokens of a text are kept; None for all."""
        ...


def need_tokenizer(processing_class: Any) -> None:
    """Check that texts can be read: what reads pixels or sound alone has no tokens.

    Raises:
        MissingProcessor: If there is no tokenizer.
    """
    from transformers import FeatureExtractionMixin, ImageProcessingMixin

    if processing_class is None or isinstance(processing_class, (FeatureExtractionMixin, ImageProcessingMixin)):
        raise MissingProcessor("Text columns need a tokenizer: pass it as `processing_class`, or tokenize the dataset first.")


@dataclass(frozen=True)
class TextInputs:
    """Text columns through a tokenizer, or rows already tokenized.

    Padding of tokenized rows is taken off and put back on the right, no wider than the batch needs: a feature then depends on
    neither the side nor the width of padding, whatever the model does with absolute positions. Other columns that the model's `forward`
    takes, such as `bbox` or `position_ids`, are padded with them if they have an entry per token, and stacked if all rows have one shape.

    Args:
        accepted (`frozenset[str]`): Names the model's `forward` takes.
        pad_token_id (`int`): The model's.
        positions (`int`, *optional*): Tokens the model has positions for: where texts are cut.
        strict (`bool`): Whether a longer row is an error in the model, and not only longer than what it was trained on.
        vocabulary (`int`, *optional*): Token ids that the model has an embedding for.
    """

    text_columns: tuple[str, ...] | None
    max_length: int | None
    accepted: frozenset[str]
    pad_token_id: int
    positions: int | None = None
    strict: bool = False
    vocabulary: int | None = None

    @classmethod
    def for_model(cls, model: PreTrainedModel, text_columns: tuple[str, ...] | None, max_length: int | None) -> TextInputs:
        accepted = frozenset(inspect.signature(model.forward).parameters)
        limit, strict = position_limit(model), has_learned_positions(model)
        if strict and limit is not None and max_length is not None and max_length > limit:
            raise ValueError(
                f"max_length={max_length} (--max_length) is more than the {limit} tokens that {type(model).__name__} has positions for. Set "
                f"it to {limit} or less, or leave it out."
            )
        pad_token_id = getattr(model.config, "pad_token_id", None) or 0
        return cls(text_columns, max_length, accepted, pad_token_id, limit, strict, vocabulary_size(model))

    def check(self, features: Features, processing_class: Any) -> None:
        if self._is_tokenized(features):
            self._extra(features)
            return
        refuse_texts_without_boxes(self.accepted)
        for column in self._columns(features):
            if not is_string(features[column]):
                raise ValueError(
                    f"The text column {column!r} holds {features[column]}, not strings. Set `text_columns` (--text_columns)."
                )
        need_tokenizer(processing_class)

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> TextInputs:
        if self._is_tokenized(features) or self.text_columns is not None:
            return self
        plain = None if dataset is None or is_transformed(dataset) else dataset
        return replace(self, text_columns=find_text_columns(features, label_column=label_column, dataset=plain))

    def columns_read(self, features: Features) -> dict[str, Any]:
        if self._is_tokenized(features):
            return {"tokens": [name for name in features if name in self.accepted and name not in LABELS]}
        return {"text": self._columns(features)}

    def _is_tokenized(self, columns: Mapping[str, Any]) -> bool:
        return "input_ids" in columns and self.text_columns is None

    def _columns(self, features: Mapping[str, Any]) -> list[str]:
        if self.text_columns is None:
            return list(find_text_columns(features))
        missing = [column for column in self.text_columns if column not in features]
        if missing:
            raise ValueError(
                f"The dataset has no column {', '.join(map(repr, missing))}; it has {', '.join(features)}. These rows are read by the text "
                f"columns {', '.join(map(repr, self.text_columns))}: rename theirs, or set `text_columns` (--text_columns)."
            )
        return list(self.text_columns)

    def _extra(self, names: Mapping[str, Any]) -> list[str]:
        return extra_columns(list(names), self.accepted, (*_TOKENS, *LABELS))

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        if is_transformed(dataset):
            return  # rows pass through a function; each is looked at when it is read
        if self._is_tokenized(dataset.features):
            self._check_tokens(dataset)
            return
        for column in self._columns(dataset.features):
            empty = missing_rows(dataset, column)
            if len(empty):
                raise _no_text(empty, column, len(dataset))
        self._check_empty(dataset, processing_class)

    def _check_empty(self, dataset: Dataset, processing_class: Any) -> None:
        """Refuse rows without a character where the tokenizer adds no token of its own: nothing would be left of them."""
        columns = self._columns(dataset.features)
        if len(processing_class(*[""] * len(columns))["input_ids"]):
            return
        texts = zip(*(dataset[column][:] for column in columns), strict=True)
        empty = [row for row, parts in enumerate(texts) if not any(part.strip() for part in parts)]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(dataset)} rows have an empty text, of which the tokenizer makes no token: {name_rows(empty)}. Filter "
                "these rows."
            )

    def _check_tokens(self, dataset: Dataset) -> None:
        ids = list_lengths(dataset, "input_ids")
        kept = ids
        if "attention_mask" in dataset.features:
            given = list_lengths(dataset, "attention_mask")
            refuse_rows(given != ids, "do not have one entry in 'attention_mask' for each token in 'input_ids'")
            kept = _list_sums(dataset, "attention_mask", given)
        refuse_rows(ids < 0, "have no tokens (None in 'input_ids')")
        refuse_rows(kept == 0, "have no token but padding")
        self._check_ids(dataset, ids)
        if self.strict and self.positions is not None:
            refuse_rows(
                kept > self.positions,
                f"are longer than the {self.positions} tokens that the model has positions for",
                f"Tokenize again with `truncation=True, max_length={self.positions}`",
            )
        if self.max_length is not None:
            refuse_rows(
                kept > self.max_length,
                f"are longer than max_length={self.max_length}",
                "Tokenize again with `truncation=True`, or leave out `max_length`",
            )
        for name in ("token_type_ids", *self._extra(dataset.features)):
            if name in dataset.features and name in self.accepted:
                self._check_extra(dataset, name, ids)

    def _check_ids(self, dataset: Dataset, lengths: np.ndarray) -> None:
        """Refuse ids that the model has no embedding for. Those of padding may be any, since batches have the model's own."""
        import pyarrow.compute as pc

        if self.vocabulary is None or not len(dataset):
            return
        flat = pc.list_flatten(_arrow(dataset, "input_ids")).to_numpy(zero_copy_only=False)
        if flat.dtype.kind not in "iu":
            raise ValueError(
                f"'input_ids' must hold whole numbers, the ids of tokens, but holds {flat.dtype} such as {flat[0]!r}."
            )
        wrong = (flat < 0) | (flat >= self.vocabulary)
        if "attention_mask" in dataset.features and wrong.any():
            wrong &= pc.list_flatten(_arrow(dataset, "attention_mask")).to_numpy(zero_copy_only=False).astype(bool)
        if wrong.any():
            rows = np.unique(np.repeat(np.arange(len(lengths)), lengths)[wrong])
            raise ValueError(
                f"{len(rows)} of {len(dataset)} rows have token ids outside 0 to {self.vocabulary - 1}, the model's vocabulary, such as "
                f"{flat[wrong][0]}: {name_rows(rows)}. They come from another tokenizer: tokenize with the model's own."
            )

    @staticmethod
    def _check_extra(dataset: Dataset, name: str, ids: np.ndarray) -> None:
        lengths = list_lengths(dataset, name)
        refuse_rows(
            lengths == -1, f"have nothing (None) in {name!r}, which the model reads", f"Fill the column, or remove {name!r}"
        )
        if not (lengths == ids).all() and len(set(lengths.tolist())) > 1:
            raise ValueError(
                f"The model reads the column {name!r}, which has neither one entry for each token in 'input_ids' nor one shape in all rows: "
                f"{name_rows(np.flatnonzero(lengths != ids))}. It cannot be put into batches. Correct it, or remove it if the model was "
                f"trained without: `dataset.remove_columns({name!r})`."
            )

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        if self._is_tokenized(rows):
            names = [name for name in rows if name in self.accepted and name not in LABELS]
            self._extra(rows)
            encoded: Mapping[str, Any] = {name: rows[name] for name in (*names, "attention_mask") if name in rows}
        else:
            texts = [list(rows[column]) for column in self._columns_of(rows)]
            for column, values in zip(self._columns_of(rows), texts, strict=True):
                empty = [row for row, value in enumerate(values) if not isinstance(value, str)]
                if empty:
                    raise _no_text(empty, column, len(values), "of this batch")
            tokenized = self._tokenize(texts, processing_class)
            encoded = {key: values for key, values in tokenized.items() if key in self.accepted}
        return self._pad({key: [np.asarray(row) for row in values] for key, values in encoded.items()})

    def _columns_of(self, rows: Rows) -> Sequence[str]:
        """Return the text columns; where none was decided on, by the names of those that hold strings."""
        if self.text_columns is not None:
            return self._columns(rows)
        from datasets import Value

        kinds = {
            name: Value("string" if isinstance(next((v for v in values if v is not None), None), str) else "int64")
            for name, values in rows.items()
        }
        return self._columns(kinds)

    def text_limit(self, tokenizer: Any) -> int | None:
        """Return how many tokens of a text are kept; None for all."""
        return text_limit(self.max_length, self.positions, tokenizer, strict=self.strict)

    def _tokenize(self, texts: list[list[str]], processing_class: Any) -> Mapping[str, list[list[int]]]:
        limit = self.text_limit(processing_class)
        options = {"truncation": True, "max_length": limit} if limit is not None else {}
        return processing_class(*texts, **options)

    def _pad(self, encoded: dict[str, list[np.ndarray]]) -> dict[str, Tensor]:
        masks = encoded.pop("attention_mask", None) or [np.ones(len(row)) for row in encoded["input_ids"]]
        for row, (ids, mask) in enumerate(zip(encoded["input_ids"], masks, strict=True)):
            if ids.shape != mask.shape:
                raise ValueError(
                    f"Row {row} of this batch has 'input_ids' of shape {ids.shape} and a mask of shape {mask.shape}."
                )
        kept = np.concatenate(masks).astype(bool)
        lengths = torch.tensor([np.count_nonzero(mask) for mask in masks])
        if not lengths.all():
            empty = (lengths == 0).nonzero().flatten().tolist()
            raise ValueError(
                f"{len(empty)} of {len(masks)} rows have no token but padding: {name_rows(empty)} of this batch. Filter them."
            )
        filled = torch.arange(max(1, int(lengths.max()))) < lengths.unsqueeze(1)
        batch = {}
        for key, values in encoded.items():
            if (
                not all(value.ndim and len(value) == len(mask) for value, mask in zip(values, masks, strict=True))
                or key in _NOT_PER_TOKEN
            ):
                batch[key] = stack_rows(key, values)
            elif any(value.ndim > 1 or np.issubdtype(value.dtype, np.floating) for value in values):
                batch[key] = pad_tokens([value[mask.astype(bool)] for value, mask in zip(values, masks, strict=True)])
            else:
                batch[key] = torch.full(filled.shape, self.pad_token_id if key == "input_ids" else 0, dtype=torch.int64)
                # Row after row on both sides; a loop over rows takes several times as long.
                batch[key][filled] = torch.from_numpy(np.concatenate(values)[kept]).long()
        if "attention_mask" in self.accepted:
            batch["attention_mask"] = filled.long()
        return batch

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        if is_transformed(dataset):
            rows = dataset[:]
            if self._is_tokenized(rows):
                masks = rows.get("attention_mask")
                return (
                    [len(ids) for ids in rows["input_ids"]]
                    if masks is None
                    else [int(np.asarray(mask).astype(bool).sum()) for mask in masks]  # lists, arrays or tensors
                )
            texts = [list(rows[column]) for column in self._columns_of(rows)]
        elif self._is_tokenized(dataset.features):
            column = "attention_mask" if "attention_mask" in dataset.column_names else "input_ids"
            lengths = list_lengths(dataset, column)
            return (_list_sums(dataset, column, lengths) if column == "attention_mask" else lengths).tolist()
        else:
            texts = [dataset[column][:] for column in self._columns(dataset.features)]
        if processing_class is None:
            return [sum(map(len, row)) for row in zip(*texts, strict=True)]
        return [len(ids) for ids in self._tokenize(texts, processing_class)["input_ids"]]


def _no_text(rows: Sequence[int] | np.ndarray, column: str, count: int, where: str = "") -> ValueError:
    return ValueError(
        f"{len(rows)} of {count} rows have no text (None) in {column!r}: {name_rows(rows)}{' ' * bool(where)}{where}. Filter these rows."
    )


def refuse_rows(wrong: np.ndarray, what: str, way_out: str = "Filter these rows") -> None:
    """Refuse the rows where `wrong` is true, if there are any."""
    rows = np.flatnonzero(wrong)
    if len(rows):
        raise ValueError(f"{len(rows)} of {len(wrong)} rows {what}: {name_rows(rows)}. {way_out}.")


def list_lengths(dataset: Dataset, column: str) -> np.ndarray:
    """Return the length of each row's list, without making Python objects; -1 where there is none, -2 where it is no list."""
    import pyarrow as pa
    import pyarrow.compute as pc

    values = _arrow(dataset, column)
    if isinstance(values.type, pa.ExtensionType):  # ArrayXD, whose storage is lists
        values = pa.chunked_array([chunk.storage for chunk in values.chunks], values.type.storage_type)
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type)):
        missing = values.is_null().to_numpy(zero_copy_only=False)
        return np.where(missing, -1, -2)
    return pc.fill_null(pc.list_value_length(values), -1).to_numpy()


def _list_sums(dataset: Dataset, column: str, lengths: np.ndarray) -> np.ndarray:
    import pyarrow.compute as pc

    flat = pc.list_flatten(_arrow(dataset, column)).to_numpy()
    ends = np.cumsum(lengths)
    totals = np.concatenate([[0], np.cumsum(flat.astype(np.int64))])
    return totals[ends] - totals[ends - lengths]


def _arrow(dataset: Dataset, column: str) -> Any:
    return dataset.select_columns([column]).with_format("arrow")[:][column]


def stack_rows(name: str, values: Sequence[Any]) -> Tensor:
    """Return one tensor of values of one shape.

    Raises:
        ValueError: If their shapes differ.
    """
    arrays = [value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value)) for value in values]
    shapes = sorted({tuple(array.shape) for array in arrays})
    if len(shapes) > 1:
        raise ValueError(
            f"The rows of {name!r} must have one shape to share a batch, but have {', '.join(map(str, shapes[:4]))}. Bring them to one "
            f"shape when they are prepared, or remove {name!r} if the model was trained without it."
        )
    stacked = torch.stack(arrays)
    return stacked.float() if stacked.is_floating_point() else stacked.long()


@dataclass(frozen=True)
class CustomInputs:
    """Whatever a user's own collator makes of rows."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]]

    def check(self, features: Features, processing_class: Any) -> None:
        """Check nothing: only the collator knows which columns it reads."""

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Check nothing: only the collator knows what rows must hold."""

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> CustomInputs:
        return self

    def columns_read(self, features: Features) -> dict[str, Any]:
        """Return nothing: only the collator knows which columns it reads."""
        return {}

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        return self.collator([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)])

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        return None
