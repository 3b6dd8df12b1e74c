"""An image column through an image processor, or rows of prepared pixels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_trak.messages import MissingProcessor
from hf_trak.tasks.inputs import LABELS, Rows, list_lengths, refuse_rows, stack_rows
from hf_trak.tasks.padding import extra_columns
from hf_trak.tasks.pictures import check_pictures, find_image_columns, open_pictures
from hf_trak.tasks.rows import is_transformed

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

_PIXELS = ("pixel_values", "pixel_values_videos", "flattened_patches", "input_ids")


def refuse_whole_numbers(name: str, pixels: Tensor) -> None:
    """Refuse pixels as a file holds them where prepared ones are expected: a model cannot have been trained on them as they are.

    Raises:
        ValueError: If they are whole numbers.
    """
    if not pixels.is_floating_point():
        raise ValueError(
            f"{name!r} holds whole numbers from {int(pixels.min())} to {int(pixels.max())}, where the numbers are expected that the image "
            f"processor makes of a picture. Put pictures into an image column, or write what the model was trained on into {name!r}, as floats."
        )


@dataclass(frozen=True)
class ImageInputs:
    """An image column through an image processor, or rows that already hold `pixel_values`.

    Args:
        mode (`str`): "RGB", or "L" for models of one channel.
        accepted (`frozenset[str]`): Names the model's `forward` takes; what the processor makes under these names is passed on.
        dtype (`torch.dtype`): Of the model's weights, in which it gets its pixels.
        main (`str`): What the image becomes: `pixel_values`, `pixel_values_videos`, or the `input_ids` of ImageGPT.
    """

    image_column: str | None
    mode: str
    accepted: frozenset[str] = frozenset({"pixel_values"})
    dtype: torch.dtype = torch.float32
    main: str = "pixel_values"

    @classmethod
    def for_model(cls, model: PreTrainedModel, image_column: str | None) -> ImageInputs:
        mode = "L" if getattr(model.config, "num_channels", 3) == 1 else "RGB"
        accepted = frozenset(inspect.signature(model.forward).parameters)
        floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        main = next((name for name in _PIXELS if name in accepted), "pixel_values")
        return cls(image_column, mode, accepted, next(floating, torch.float32), main)

    def check(self, features: Features, processing_class: Any) -> None:
        if self._has_pixels(features):
            return
        self._column(features)
        if processing_class is None or hasattr(processing_class, "convert_tokens_to_ids"):
            raise MissingProcessor("An image column needs an image processor: pass it as `processing_class`.")

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        if is_transformed(dataset):
            return
        if self._has_pixels(dataset.features):
            refuse_rows(list_lengths(dataset, self.main) == -1, f"have no {self.main!r} (None)")
            return
        check_pictures(dataset, self._column(dataset.features))

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> ImageInputs:
        return self if self._has_pixels(features) else replace(self, image_column=self._column(features))

    def columns_read(self, features: Features) -> dict[str, Any]:
        return {"image": self.main if self._has_pixels(features) else self._column(features)}

    def _has_pixels(self, columns: Mapping[str, Any]) -> bool:
        return self.main in columns and self.image_column is None

    def _column(self, features: Mapping[str, Any]) -> str:
        if self.image_column is not None:
            if self.image_column not in features:
                raise ValueError(f"The dataset has no column {self.image_column!r}; it has {', '.join(features)}.")
            return self.image_column
        images = find_image_columns(features)
        if len(images) != 1:
            several = f" Images may be in {', '.join(map(repr, images))}." if images else ""
            raise ValueError(
                f"Expected {self.main!r} or one image column, but the dataset has {', '.join(features)}.{several} Set `image_column` "
                "(--image_column)."
            )
        return images[0]

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        if self._has_pixels(rows):
            names = extra_columns(list(rows), self.accepted, LABELS)
            found = {name: stack_rows(name, rows[name]) for name in names}
            if self.main != "input_ids":
                refuse_whole_numbers(self.main, found[self.main])
        else:
            column = self._column_of(rows)
            images = open_pictures(rows[column], self.mode, column)
            encoded = processing_class(images, return_tensors="pt")
            found = {name: torch.as_tensor(values) for name, values in encoded.items() if name in self.accepted}
            if self.main not in found:
                raise ValueError(
                    f"The image processor {type(processing_class).__name__} makes {', '.join(encoded)}, but no {self.main!r}. Pass the "
                    "model's own image processor as `processing_class`."
                )
        return {name: values.to(self.dtype) if values.is_floating_point() else values for name, values in found.items()}

    def _column_of(self, rows: Rows) -> str:
        """Return the image column; where none was decided on, the one whose first value that is there is a picture."""
        if self.image_column is not None:
            return self._column(rows)
        firsts = {name: next((value for value in values if value is not None), None) for name, values in rows.items()}
        images = [name for name, value in firsts.items() if hasattr(value, "convert")]
        return images[0] if len(images) == 1 else replace(self, image_column=None)._column(_kinds_of(firsts))

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        return None


def _kinds_of(firsts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a column type for the first value of each column, as far as images are concerned."""
    from datasets import Image, List, Value

    def kind(value: Any) -> Any:
        if hasattr(value, "convert"):
            return Image()
        if isinstance(value, dict):
            return dict.fromkeys(value)
        if isinstance(value, (bytes, bytearray)):
            return Value("binary")
        if isinstance(value, str):
            return Value("string")
        return List(List(Value("int64"))) if np.ndim(value) > 1 else Value("int64")

    return {name: kind(value) for name, value in firsts.items()}
