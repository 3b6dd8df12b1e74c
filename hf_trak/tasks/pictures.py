"""Cells of an image column: found missing before anything is computed, and brought to RGB whatever their mode."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

_SHOWN = 10
_AT_ONCE = 1000


def to_rgb(image: Image) -> Image:
    """Return a picture of any mode in RGB: what the image processors of CLIP do, but for pictures deeper than eight bits.

    Pillow clips those, which leaves white; here 16-bit pictures are scaled, and floating ones stretched from their least to their
    greatest value. Transparency is dropped, as by the processors.
    """
    from PIL import Image as pillow

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image).astype(np.float64)
        if image.mode.startswith("I"):  # "I" is how Pillow reads some 16-bit files
            values = values / 257 if values.max(initial=0) > 255 or image.mode != "I" else values
        else:
            span = values.max(initial=0) - values.min(initial=0)
            values = (values - values.min(initial=0)) * (255 / span if span > 0 else 0)
        image = pillow.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:  # Pillow warns where it is converted at once
        image = image.convert("RGBA")
    return image.convert("RGB")


def check_pictures(dataset: Dataset, column: str) -> None:
    """Check that every row has a picture, without decoding any.

    Raises:
        ValueError: Naming the rows where there is none, or where its file is gone.
    """
    from datasets import Image

    cells = dataset.select_columns([column]).cast_column(column, Image(decode=False)).with_format("arrow")
    empty: list[int] = []
    gone: list[tuple[int, str]] = []
    for start in range(0, len(dataset), _AT_ONCE):
        chunk = cells[start : start + _AT_ONCE][column].combine_chunks()
        without_bytes = chunk.field("bytes").is_null().to_pylist()
        for offset, path in enumerate(chunk.field("path").to_pylist()):
            if not chunk[offset].is_valid or (without_bytes[offset] and path is None):
                empty.append(start + offset)
            elif without_bytes[offset] and "://" not in path and not os.path.exists(path):
                gone.append((start + offset, path))
    if empty:
        raise ValueError(f"{len(empty)} rows have no image in {column!r}: {_list(empty)}. Filter these rows.")
    if gone:
        raise ValueError(
            f"The image files of {len(gone)} rows are not there: {_list([row for row, _ in gone])}; the first is {gone[0][1]}. "
            "Restore the files, or filter these rows."
        )


def _list(rows: list[int]) -> str:
    return f"row {', '.join(map(str, rows[:_SHOWN]))}{', ...' if len(rows) > _SHOWN else ''}"
