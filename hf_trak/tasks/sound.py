"""Rows of sound: through a feature extractor, or already `input_values` or `input_features`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_trak.messages import MissingProcessor
from hf_trak.tasks.inputs import Rows, list_lengths
from hf_trak.tasks.outputs import APART
from hf_trak.tasks.rows import is_transformed, missing_rows, name_rows

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

    from hf_trak.config import TrakConfig

_PREPARED = ("input_values", "input_features")
_USUAL_NAMES = ("audio", "speech", "sound", "wav")
_RATE = "sampling_rate"


@dataclass(frozen=True)
class SoundInputs:
    """A column of sounds, or rows that already hold `input_values` or `input_features`.

    Sounds have `datasets.Audio`'s form: an array and its sampling rate, which must be the feature extractor's. Each row is extracted alone, so
    that its features do not depend on its batch. In a batch, shorter rows are padded with zeros at their end and masked; models that
    take no mask compute rows of different lengths apart.

    Args:
        accepted (`frozenset[str]`): Names the model's `forward` takes.
        main (`str`): Which of them the sound is.
        dtype (`torch.dtype`): Of the model's weights.
    """

    sound_column: str | None
    accepted: frozenset[str]
    main: str
    dtype: torch.dtype = torch.float32

    @classmethod
    def for_model(cls, model: PreTrainedModel, config: TrakConfig) -> SoundInputs:
        accepted = frozenset(inspect.signature(model.forward).parameters)
        main = model.main_input_name if model.main_input_name in _PREPARED else next(n for n in _PREPARED if n in accepted)
        floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        return cls(None, accepted, main, next(floating, torch.float32))

    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError that names the columns if a dataset cannot serve."""
        read = (self.main, "attention_mask", "labels", self.sound_column)
        if others := [name for name in features if name in self.accepted and name not in read]:
            raise ValueError(
                f"The model's `forward` takes {others[0]!r}, which the dataset has and this task does not read. Remove the column "
                f"(`dataset.remove_columns({others[0]!r})`), or make a task with `Task.custom`."
            )
        if self._is_prepared(features):
            return
        column = self._column(features)
        extractor = _extractor(processing_class)
        rate = getattr(features[column], "sampling_rate", None)
        if rate is not None and rate != extractor.sampling_rate:
            raise _wrong_rate(rate, extractor.sampling_rate, column)
        if getattr(features[column], "decode", True) is False:
            raise ValueError(
                f"The sounds in {column!r} are not decoded. `dataset.cast_column({column!r}, Audio(sampling_rate={extractor.sampling_rate}))`."
            )

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Raise a ValueError that names the rows without sound, or with another sampling rate."""
        if is_transformed(dataset):
            return
        prepared = self._is_prepared(dataset.features)
        column = self.main if prepared else self._column(dataset.features)
        empty = missing_rows(dataset, column)
        if len(empty):
            raise ValueError(
                f"{len(empty)} of {len(dataset)} rows have no sound in {column!r}: {name_rows(empty)}. Filter these rows."
            )
        if prepared or type(dataset.features[column]).__name__ == "Audio":
            return
        expected = _extractor(processing_class).sampling_rate
        names = [column] if isinstance(dataset.features[column], dict) else [_RATE]
        table = dataset.select_columns(names).with_format("arrow")[:]
        if isinstance(dataset.features[column], dict):
            import pyarrow.compute as pc

            rates = pc.struct_field(table[column], _RATE).to_numpy()
        else:
            rates = table[_RATE].to_numpy()
        wrong = np.flatnonzero(rates != expected)
        if len(wrong):
            raise ValueError(f"{_wrong_rate(rates[wrong[0]], expected, column)} It is so in {name_rows(wrong)}.")

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> SoundInputs:
        return self if self._is_prepared(features) else replace(self, sound_column=self._column(features))

    def columns_read(self, features: Features) -> dict[str, Any]:
        return {"sound": self._names(features) if self._is_prepared(features) else self._column(features)}

    def _is_prepared(self, columns: Mapping[str, Any]) -> bool:
        return self.main in columns and self.sound_column is None

    def _names(self, columns: Mapping[str, Any]) -> list[str]:
        """Return the columns of prepared rows that are inputs."""
        return [self.main, *(["attention_mask"] if "attention_mask" in columns and "attention_mask" in self.accepted else [])]

    def _column(self, features: Mapping[str, Any]) -> str:
        if self.sound_column is not None:
            if self.sound_column not in features:
                raise ValueError(f"The dataset has no column {self.sound_column!r}; it has {', '.join(features)}.")
            return self.sound_column
        found = [name for name, kind in features.items() if type(kind).__name__ == "Audio"]
        found = found or [name for name in _USUAL_NAMES if name in features]
        if len(found) != 1:
            raise ValueError(
                f"Expected a column {self.main!r} or one column of sounds (`datasets.Audio`), but the dataset has {', '.join(features)}. Keep one "
                f"of them, or prepare {self.main!r} with the model's feature extractor."
            )
        kind = features[found[0]]
        if not (type(kind).__name__ == "Audio" or isinstance(kind, dict) or _RATE in features):
            raise ValueError(
                f"The sounds in {found[0]!r} do not say their sampling rate. Give `datasets.Audio` cells, cells with 'array' and "
                f"'sampling_rate', or a column {_RATE!r}."
            )
        return found[0]

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return a batch without labels."""
        return self.join([self.encode(row, processing_class) for row in each(rows)])

    def encode(self, row: Mapping[str, Any], processing_class: Any) -> dict[str, np.ndarray]:
        """Return the sound of a row, without padding, and a mask where it has one that is not along it."""
        if self._is_prepared(row):
            values = np.asarray(row[self.main], dtype=np.float32)
            found = {self.main: values}
            mask = row.get("attention_mask")
            if mask is not None and "attention_mask" in self.accepted:
                kept = np.asarray(mask).astype(bool)
                if kept.shape == values.shape[:1]:
                    found[self.main] = values[kept]
                else:  # of a fixed width, as Whisper's
                    found["attention_mask"] = np.asarray(mask, dtype=np.int64)
        else:
            extractor = _extractor(processing_class)
            column = self.sound_column or self._column({name: kind_of_cell(value) for name, value in row.items()})
            array = _array(row[column], row.get(_RATE), extractor.sampling_rate, column)
            encoded = extractor(array, sampling_rate=extractor.sampling_rate, return_tensors="np")
            if self.main not in encoded:
                raise ValueError(
                    f"The feature extractor {type(extractor).__name__} makes {', '.join(encoded)}, but no {self.main!r}. Pass the model's own."
                )
            found = {self.main: np.asarray(encoded[self.main][0], dtype=np.float32)}
            mask = encoded.get("attention_mask")
            if mask is not None and np.asarray(mask[0]).shape == found[self.main].shape[:1]:
                found[self.main] = found[self.main][np.asarray(mask[0]).astype(bool)]
        if found[self.main].ndim == 0 or found[self.main].size == 0:
            raise ValueError(f"A row of this batch has no sound: its {self.main!r} has the shape {found[self.main].shape}.")
        return found

    def join(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """Return a batch of encoded rows; [`calls.APART`] says why if they cannot share one."""
        values = [row[self.main] for row in rows]
        width = max(map(len, values))
        apart = None
        if len({value.shape[1:] for value in values}) > 1:
            raise ValueError(
                f"The rows' {self.main!r} have the shapes {', '.join(map(str, sorted({value.shape for value in values})))}, which differ in "
                "more than their length."
            )
        filled = torch.zeros(len(values), width, *values[0].shape[1:], dtype=self.dtype)
        mask = torch.zeros(len(values), width, dtype=torch.int64)
        for target, kept, value in zip(filled, mask, values, strict=True):
            target[: len(value)] = torch.from_numpy(value)
            kept[: len(value)] = 1
        batch: dict[str, Any] = {self.main: filled}
        masks = [row["attention_mask"] for row in rows if "attention_mask" in row]
        if masks:
            batch["attention_mask"] = torch.from_numpy(np.stack(masks))
        elif not mask.all():
            if "attention_mask" in self.accepted:
                batch["attention_mask"] = mask
            else:
                apart = "their sounds differ in length, and the model takes no mask"
        return batch if apart is None else {**batch, APART: apart}

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        """Return the number of frames of each row, where it is stored."""
        if is_transformed(dataset) or not self._is_prepared(dataset.features):
            return None
        return list_lengths(dataset, self.main).tolist()


def each(rows: Rows) -> list[dict[str, Any]]:
    """Return the rows of columns, one dictionary each."""
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


def kind_of_cell(value: Any) -> Any:
    """Return a cell of sound as a column type, as far as [`SoundInputs`] looks at it."""
    return dict.fromkeys(("array", _RATE)) if isinstance(value, Mapping) or hasattr(value, "get_all_samples") else None


def _extractor(processing_class: Any) -> Any:
    """Return the feature extractor of a processor, or the thing itself."""
    found = getattr(processing_class, "feature_extractor", processing_class)
    if found is None or not hasattr(found, "sampling_rate"):
        raise MissingProcessor(
            "A column of sounds needs a feature extractor: pass it, or the model's processor, as `processing_class`."
        )
    return found


def _array(cell: Any, rate: Any, expected: int, column: str) -> np.ndarray:
    """Return a sound as one channel."""
    if isinstance(cell, Mapping) or hasattr(cell, "get_all_samples"):
        cell, rate = cell["array"], cell[_RATE]
    if cell is None:
        raise ValueError(f"A row of this batch has no sound (None) in {column!r}. Filter it.")
    if rate != expected:
        raise _wrong_rate(rate, expected, column)
    array = np.asarray(cell, dtype=np.float32)
    if array.ndim != 1:
        raise ValueError(
            f"A sound in {column!r} has the shape {array.shape}; expected one channel. Average the channels first."
        )
    return array


def _wrong_rate(rate: Any, expected: int, column: str) -> ValueError:
    return ValueError(
        f"The sounds in {column!r} have {rate} samples per second, and the model was trained on {expected}. Resample them: "
        f"`dataset.cast_column({column!r}, Audio(sampling_rate={expected}))`."
    )
