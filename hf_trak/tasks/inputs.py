"""From rows of a dataset to a batch of tensors: one class per modality."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_trak.errors import MissingProcessor

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

Rows = Mapping[str, Sequence[Any]]
"""Columns of a slice of a dataset, as `Dataset.map(batched=True)` hands them out."""


class Inputs(Protocol):
    """How one modality becomes a model's inputs."""

    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError that names the columns if a dataset cannot serve."""
        ...

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return the model's inputs for `rows`, without labels."""
        ...

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        """Return a number per row that grows with its cost, so that rows of like cost share a batch; None if all are alike.

        It is the row's tokens where they are given, or a tokenizer is.
        """
        ...


@dataclass(frozen=True)
class TextInputs:
    """Text columns through a tokenizer, or rows already tokenized.

    Padding of tokenized rows is taken off and put back on the right, no wider than the batch needs: a feature then depends on
    neither the side nor the width of padding, whatever the model does with absolute positions.

    Args:
        accepted (`frozenset[str]`): Names the model's `forward` takes.
        pad_token_id (`int`): The model's.
    """

    text_columns: tuple[str, ...] | None
    max_length: int | None
    accepted: frozenset[str]
    pad_token_id: int

    @classmethod
    def for_model(cls, model: PreTrainedModel, text_columns: tuple[str, ...] | None, max_length: int | None) -> TextInputs:
        accepted = frozenset(inspect.signature(model.forward).parameters)
        limit = getattr(model.config, "max_position_embeddings", None)
        pad_token_id = getattr(model.config, "pad_token_id", None) or 0
        return cls(text_columns, max_length or limit, accepted, pad_token_id)

    def check(self, features: Features, processing_class: Any) -> None:
        if "input_ids" in features and self.text_columns is None:
            return
        for column in self._columns(features):
            if getattr(features[column], "dtype", None) not in ("string", "large_string"):
                raise ValueError(f"The text column {column!r} holds {features[column]}, not strings. Set `text_columns`.")
        if processing_class is None:
            raise MissingProcessor(
                "Text columns need a tokenizer: pass it as `processing_class`, or tokenize the dataset first."
            )

    def _columns(self, features: Features) -> list[str]:
        if self.text_columns is not None:
            missing = [column for column in self.text_columns if column not in features]
            if missing:
                raise ValueError(f"The dataset has no column {', '.join(map(repr, missing))}; it has {', '.join(features)}.")
            return list(self.text_columns)
        strings = [name for name, kind in features.items() if getattr(kind, "dtype", None) in ("string", "large_string")]
        if not 1 <= len(strings) <= 2:
            raise ValueError(
                f"Expected tokenized rows ('input_ids') or one or two text columns, but the dataset has {', '.join(features)}. "
                "Set `text_columns`."
            )
        return strings

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        if "input_ids" in rows and self.text_columns is None:
            encoded = {key: rows[key] for key in rows if key in self.accepted and key not in ("labels", "label")}
        else:
            columns = self.text_columns or tuple(key for key, values in rows.items() if isinstance(values[0], str))
            tokenized = self._tokenize([list(rows[column]) for column in columns], processing_class)
            encoded = {key: values for key, values in tokenized.items() if key in self.accepted}
        return self._pad({key: [np.asarray(row) for row in values] for key, values in encoded.items()})

    def _tokenize(self, texts: list[list[str]], processing_class: Any) -> Mapping[str, list[list[int]]]:
        limit = min(self.max_length or 10**9, processing_class.model_max_length)
        options = {"truncation": True, "max_length": limit} if limit < 10**9 else {}
        return processing_class(*texts, **options)

    def _pad(self, encoded: dict[str, list[np.ndarray]]) -> dict[str, Tensor]:
        masks = encoded.pop("attention_mask", None) or [np.ones(len(row)) for row in encoded["input_ids"]]
        kept = np.concatenate(masks).astype(bool)
        lengths = torch.tensor([np.count_nonzero(mask) for mask in masks])
        filled = torch.arange(max(1, int(lengths.max()))) < lengths.unsqueeze(1)
        batch = {}
        for key, values in encoded.items():
            fill = self.pad_token_id if key == "input_ids" else 0
            batch[key] = torch.full(filled.shape, fill, dtype=torch.int64)
            # Row after row on both sides; a loop over rows takes several times as long.
            batch[key][filled] = torch.from_numpy(np.concatenate(values)[kept]).long()
        if "attention_mask" in self.accepted:
            batch["attention_mask"] = filled.long()
        return batch

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        if "input_ids" in dataset.column_names and self.text_columns is None:
            column = "attention_mask" if "attention_mask" in dataset.column_names else "input_ids"
            count = sum if column == "attention_mask" else len
            return [int(count(row)) for row in dataset[column]]
        texts = [dataset[column][:] for column in self._columns(dataset.features)]
        if processing_class is None:
            return [sum(map(len, row)) for row in zip(*texts, strict=True)]
        return [len(ids) for ids in self._tokenize(texts, processing_class)["input_ids"]]


@dataclass(frozen=True)
class ImageInputs:
    """An image column through an image processor, or rows that already hold `pixel_values`."""

    image_column: str | None
    mode: str

    @classmethod
    def for_model(cls, model: PreTrainedModel, image_column: str | None) -> ImageInputs:
        return cls(image_column, "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB")

    def check(self, features: Features, processing_class: Any) -> None:
        if "pixel_values" in features and self.image_column is None:
            return
        self._column(features)
        if processing_class is None:
            raise MissingProcessor("An image column needs an image processor: pass it as `processing_class`.")

    def _column(self, features: Features) -> str:
        column = self._named_or_found(features)
        if not getattr(features[column], "decode", True):
            raise ValueError(
                f"The images of column {column!r} are not decoded. Use `dataset.cast_column({column!r}, datasets.Image(decode=True))`."
            )
        return column

    def _named_or_found(self, features: Features) -> str:
        if self.image_column is not None:
            if self.image_column not in features:
                raise ValueError(f"The dataset has no column {self.image_column!r}; it has {', '.join(features)}.")
            return self.image_column
        images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
        if len(images) != 1:
            raise ValueError(
                f"Expected 'pixel_values' or one image column, but the dataset has {', '.join(features)}. Set `image_column`."
            )
        return images[0]

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        if "pixel_values" in rows and self.image_column is None:
            return {"pixel_values": torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in rows["pixel_values"]])}
        column = self.image_column or next(key for key, values in rows.items() if hasattr(values[0], "convert"))
        images = [image.convert(self.mode) for image in rows[column]]
        return {"pixel_values": processing_class(images, return_tensors="pt")["pixel_values"]}

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        return None


@dataclass(frozen=True)
class CustomInputs:
    """Whatever a user's own collator makes of rows."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]]

    def check(self, features: Features, processing_class: Any) -> None:
        """Nothing is known of a custom task's columns; its collator speaks for itself."""

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        return self.collator([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)])

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        return None
