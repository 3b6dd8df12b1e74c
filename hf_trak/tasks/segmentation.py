"""Semantic segmentation: a class of each pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_trak.tasks.image_inputs import ImageInputs
from hf_trak.tasks.inputs import Rows
from hf_trak.tasks.outputs import APART, call_model
from hf_trak.tasks.pictures import check_pictures, open_picture, open_pictures
from hf_trak.tasks.rows import is_transformed, missing_rows, name_rows
from hf_trak.tasks.token_outputs import IGNORED, reduce_tokens, token_margins

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

    from hf_trak.config import TrakConfig

_MAPS = ("labels", "annotation", "label", "mask", "segmentation_mask", "semantic_segmentation", "label_map")


@dataclass(frozen=True)
class SegmentationInputs:
    """An image and its map of classes, as two image columns, or `pixel_values` and `labels` (height, width).

    Args:
        n_labels (`int`): Classes of the model.
        ignored (`int`): The class of pixels that the model's loss leaves out.
    """

    images: ImageInputs
    label_column: str | None
    n_labels: int
    ignored: int

    @classmethod
    def for_model(cls, model: PreTrainedModel, config: TrakConfig) -> SegmentationInputs:
        if model.config.num_labels < 2:
            raise ValueError(
                f"{type(model).__name__} has one label, for which its loss is that of a yes or no per pixel. Make a task with `Task.custom`."
            )
        return cls(
            ImageInputs.for_model(model, config.image_column), config.label_column, model.config.num_labels, _ignored(model)
        )

    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError that names the columns if a dataset cannot serve."""
        self._resolved(features).images.check(features, processing_class)

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> SegmentationInputs:
        return self._resolved(features)

    def columns_read(self, features: Features) -> dict[str, Any]:
        return {**self._resolved(features).images.columns_read(features), "label": self._map(features)}

    def _resolved(self, features: Mapping[str, Any]) -> SegmentationInputs:
        """Return these inputs with their image column, which is not that of the map."""
        column = self._map(features)
        if "pixel_values" in features and self.images.image_column is None:
            return self
        others = {name: kind for name, kind in features.items() if name != column}
        return replace(self, images=self.images.reading(others, None, None))

    def _map(self, columns: Mapping[str, Any]) -> str:
        candidates = (self.label_column,) if self.label_column else _MAPS
        found = [name for name in candidates if name in columns]
        if not found:
            raise ValueError(
                f"semantic-segmentation needs a map of classes, {' or '.join(map(repr, candidates))}, but the dataset has "
                f"{', '.join(columns)}. Set `label_column` (--label_column)."
            )
        return found[0]

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Check that every row has an image and a map, and the classes of prepared ones.

        Raises:
            ValueError: Naming the rows that do not.
        """
        if is_transformed(dataset):
            return
        mine = self._resolved(dataset.features)
        mine.images.check_rows(dataset, processing_class)
        column = self._map(dataset.features)
        if type(dataset.features[column]).__name__ == "Image":
            check_pictures(dataset, column)
            return
        empty = missing_rows(dataset, column)
        if len(empty):
            raise ValueError(f"{len(empty)} rows have no map in {column!r}: {name_rows(empty)}. Filter these rows.")
        if "pixel_values" in dataset.features:
            for row, value in enumerate(dataset.select_columns([column]).with_format("numpy")):
                self._classes(np.asarray(value[column]), f"row {row}")

    def _classes(self, labels: np.ndarray, where: str) -> np.ndarray:
        if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"The map of classes of {where} is an array of {labels.dtype} of shape {labels.shape}; expected whole numbers, (height, width)."
            )
        labels = np.where((labels == self.ignored) | (labels == IGNORED), IGNORED, labels)
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= self.n_labels))]
        if len(wrong):
            raise ValueError(
                f"The map of classes of {where} has the class {wrong[0]}, but the model has 0 to {self.n_labels - 1}, and {self.ignored} for "
                "pixels that do not count."
            )
        if (labels == IGNORED).all():
            raise ValueError(f"The map of classes of {where} has no pixel that counts. Filter it.")
        return labels

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return a batch with `labels`, -100 for pixels that do not count; images of different sizes are computed apart."""
        first = {name: values[0] for name, values in rows.items()}
        column = self._map(first)
        if self.images._has_pixels(rows):
            names = [name for name in rows if name in self.images.accepted and name not in (column, "labels")]
            images = [{name: torch.as_tensor(np.asarray(rows[name][i])) for name in names} for i in range(len(rows[column]))]
            maps = [np.asarray(value) for value in rows[column]]
        else:
            source = self.images._column_of({name: values for name, values in rows.items() if name != column})
            pictures = open_pictures(rows[source], self.images.mode, source)
            images, maps = [], []
            for picture, cell in zip(pictures, rows[column], strict=True):
                encoded = processing_class(picture, segmentation_maps=_as_map(cell, column), return_tensors="pt")
                images.append(
                    {name: value[0] for name, value in encoded.items() if name in self.images.accepted and name != "labels"}
                )
                maps.append(np.asarray(encoded["labels"][0]))
        labels = [self._classes(np.asarray(value).astype(np.int64), f"row {i} of this batch") for i, value in enumerate(maps)]
        batch: dict[str, Any] = {}
        shapes = {tuple(row["pixel_values"].shape) for row in images}
        sizes = {value.shape for value in labels}
        if len(shapes) > 1 or len(sizes) > 1:  # padded to be one tensor, and not computed
            batch[APART] = (
                f"their images have the shapes {', '.join(map(str, sorted(shapes)))}, and their maps {', '.join(map(str, sorted(sizes)))}"
            )
        for name in images[0]:
            values = [row[name].to(self.images.dtype) if row[name].is_floating_point() else row[name] for row in images]
            batch[name] = _padded(values, 0)
        batch["labels"] = _padded([torch.from_numpy(value) for value in labels], IGNORED)
        return batch

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        return None


@dataclass(frozen=True)
class SegmentationOutput:
    """The mean over an image's pixels of the log-odds of their classes, at the size of the map, and the mean of their 1 − p.

    Logits are scaled up as the losses of transformers' classes do. Auxiliary heads, which train the layers below, are no part of it.
    """

    reduction: str = "mean"

    def __call__(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        labels = batch["labels"]
        logits = call_model(model, batch).logits
        logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        flat = logits.flatten(2).transpose(1, 2)  # (batch, pixels, classes)
        labels = labels.flatten(1)
        scored = labels != IGNORED
        return reduce_tokens(token_margins(flat, labels.where(scored, 0)), scored, self.reduction)


def _ignored(model: PreTrainedModel) -> int:
    for name in ("semantic_loss_ignore_index", "loss_ignore_index"):
        if isinstance(value := getattr(model.config, name, None), int):
            return value
    return 255


def _as_map(cell: Any, column: str) -> np.ndarray:
    """Return a cell as numbers of classes, not converted to another mode: a palette's index is the class."""
    try:
        picture = open_picture(cell)
    except ValueError as error:
        raise ValueError(f"A map in {column!r} cannot be read: {error}.") from error
    values = np.asarray(picture)
    if values.ndim != 2:
        raise ValueError(
            f"A map in {column!r} is a picture of mode {picture.mode}, whose colours are no numbers of classes. Give maps of one channel."
        )
    return values


def _padded(values: list[Tensor], fill: float) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    result = torch.full((len(values), *shape), fill, dtype=values[0].dtype)
    for target, value in zip(result, values, strict=True):
        target[tuple(slice(0, size) for size in value.shape)] = value
    return result
