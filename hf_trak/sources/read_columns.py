"""What of a dataset is read: the columns whose content tells rows apart, the names of its labels, and which strings name files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_trak.sources.transforms import has_transform

if TYPE_CHECKING:
    from datasets import Dataset, Features


def names_read(columns: Mapping[str, Any]) -> list[str]:
    """Return the names in what [`Task.columns_read`] says, each once."""
    return list(dict.fromkeys(name for value in columns.values() for name in ([value] if isinstance(value, str) else value)))


def in_order(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return what [`Task.columns_read`] says, so that the order of a dataset's columns does not matter where it means nothing."""
    return {key: sorted(value) if key == "tokens" else value for key, value in columns.items()}


def describe_columns(columns: Mapping[str, Any]) -> str:
    """Return the columns that are read and as what, in a line."""
    return "; ".join(f"{key} {value if isinstance(value, str) else ', '.join(value)}" for key, value in columns.items())


def columns_to_digest(dataset: Dataset, columns: Mapping[str, Any]) -> list[str]:
    """Return the columns that rows are told apart by: those read, or all where that is not known.

    A transform may read any column, and so may the collator of a custom task.
    """
    read = names_read(columns)
    if has_transform(dataset) or not read or not set(read) <= set(dataset.column_names):
        return sorted(dataset.column_names)
    return sorted(read)


def label_names(features: Features, columns: Mapping[str, Any]) -> list[str] | None:
    """Return the names of the classes of the label column that is read; None where it has none."""
    label = columns.get("label")
    kind = features.get(label) if isinstance(label, str) else None
    kind = getattr(kind, "feature", kind)  # a list of labels, one for each token
    names = getattr(kind, "names", None)
    return None if names is None else list(names)


def file_columns(features: Features, columns: Mapping[str, Any]) -> list[str]:
    """Return the columns read as images that hold the names of files."""
    images = columns.get("image", [])
    named = [images] if isinstance(images, str) else images
    return [name for name in named if getattr(features.get(name), "dtype", None) in ("string", "large_string")]
