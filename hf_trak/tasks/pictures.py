"""Cells of an image column: found missing before anything is computed, opened whatever they are, and brought to one mode."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_trak.tasks.rows import is_transformed, missing_rows, name_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

_AT_ONCE = 1000
_ORIENTATION = 0x0112
_USUAL_NAMES = (
    "image",
    "img",
    "picture",
    "photo",
    "imagepath",
    "imagefile",
    "imagebytes",
    "filename",
    "filepath",
    "file",
    "path",
)


def find_image_columns(features: Mapping[str, Any]) -> list[str]:
    """Return the columns that hold images: those of type `Image`; else arrays, bytes and files under a usual name."""
    found = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    return found or [
        name
        for name, kind in features.items()
        if re.sub(r"[\W_]+", "", name).lower() in _USUAL_NAMES and not hasattr(kind, "names") and _may_hold_images(kind)
    ]


def _may_hold_images(kind: Any) -> bool:
    """Return whether cells of a type may be images: a file's name, its bytes, both, or an array of two or three axes."""
    dtype = getattr(kind, "dtype", None)
    if isinstance(kind, dict):
        return bool({"bytes", "path"} & set(kind))
    if type(kind).__name__ in ("Array2D", "Array3D") or hasattr(getattr(kind, "feature", None), "feature"):
        return True
    return dtype in ("string", "large_string", "binary", "large_binary")


def pictures_of(given: Any) -> list[Any]:
    """Return one picture, or several, as a list of cells; nothing for None.

    Raises:
        FileNotFoundError: If a file is not there.
    """
    cells = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for cell in cells:
        if isinstance(cell, (str, os.PathLike)) and "://" not in os.fspath(cell) and not os.path.isfile(cell):
            raise FileNotFoundError(f"There is no image file {os.fspath(cell)}.")
    return [os.fspath(cell) if isinstance(cell, os.PathLike) else cell for cell in cells]


def side_by_side(cells: Sequence[Any]) -> Image | None:
    """Return pictures as one, from left to right, each as high as the first; None for none."""
    from PIL import Image as pillow

    pictures = [to_rgb(open_picture(cell)) for cell in cells if cell is not None]
    if len(pictures) < 2:
        return open_picture(next(cell for cell in cells if cell is not None)) if pictures else None
    height = pictures[0].height
    scaled = [one.resize((max(1, round(one.width * height / one.height)), height)) for one in pictures]
    result = pillow.new("RGB", (sum(one.width for one in scaled) + 4 * (len(scaled) - 1), height), "white")
    left = 0
    for one in scaled:
        result.paste(one, (left, 0))
        left += one.width + 4
    return result


def open_picture(cell: Any) -> Image:
    """Return a cell of an image column as a picture: an image, a file's name or bytes, or an array of unsigned integers.

    Arrays have the axes (height, width), (height, width, channels) or (channels, height, width). Pictures are turned upright as
    `datasets.Image` turns them.

    Raises:
        ValueError: If it is none of them, or the address of a file on the network. The message begins with "it".
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    if cell is None:
        raise ValueError("it is missing (None)")
    if hasattr(cell, "convert"):
        return cell
    if isinstance(cell, dict):
        cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
        return open_picture(cell)
    if isinstance(cell, (str, os.PathLike)):
        name = os.fspath(cell)
        if "://" in name:
            raise ValueError(
                f"it is an address, {name[:80]!r}, and nothing is downloaded while rows are read. Download the images first and give "
                "`datasets.Image` cells or the files' names"
            )
        if not os.path.isfile(name):
            raise ValueError(f"there is no file {name!r}. Names are taken from the current folder; give whole ones")
        cell = name
    elif isinstance(cell, (bytes, bytearray, memoryview)):
        cell = io.BytesIO(bytes(cell))
    elif hasattr(cell, "__array__") or isinstance(cell, (list, tuple)):
        return _from_array(cell)
    else:
        raise ValueError(f"it is of type {type(cell).__name__}, which is no image")
    try:
        image = pillow.open(cell)
        image.load()
    except OSError as error:
        raise ValueError(f"it cannot be read as an image: {error}") from error
    return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION) is not None else image


def _from_array(cell: Any) -> Image:
    from PIL import Image as pillow

    values = np.asarray(cell)
    if values.ndim == 3 and values.shape[2] not in (1, 2, 3, 4) and values.shape[0] in (1, 2, 3, 4):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    whole = np.issubdtype(values.dtype, np.integer) or values.dtype == bool
    if not whole or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] > 4):
        raise ValueError(
            f"it is an array of {values.dtype} of shape {values.shape}; expected whole numbers of shape (height, width), (height, width, "
            "channels) or (channels, height, width). Prepared pixels belong in a column 'pixel_values'"
        )
    deep = values.dtype == np.uint16 and values.ndim == 2
    low, high, most = int(values.min(initial=0)), int(values.max(initial=0)), 65535 if deep else 255
    if low < 0 or high > most:  # scaled by its own greatest value, each image would be scaled by another
        raise ValueError(f"it is an array of {values.dtype} with values from {low} to {high}; expected 0 to {most}")
    return pillow.fromarray(np.ascontiguousarray(values if deep or values.dtype == bool else values.astype(np.uint8)))


def to_mode(image: Image, mode: str) -> Image:
    """Return a picture as RGB or L. Deeper greys are scaled to eight bits, not clipped; see [`to_rgb`]."""
    return to_rgb(image) if mode == "RGB" else _grey(image)


def _grey(image: Image) -> Image:
    return (to_rgb(image) if image.mode.startswith(("I", "F", "P")) else image).convert("L")


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


def open_pictures(cells: Sequence[Any], mode: str, column: str) -> list[Image]:
    """Return the cells of a column as pictures of one mode.

    Raises:
        ValueError: Naming the row, as counted in `cells`, that cannot be opened.
    """
    found = []
    for row, cell in enumerate(cells):
        try:
            found.append(to_mode(open_picture(cell), mode))
        except ValueError as error:
            raise ValueError(f"The image in {column!r} of row {row} of this batch cannot serve: {error}.") from error
    return found


def check_pictures(dataset: Dataset, column: str) -> None:
    """Check that every row has a picture, without decoding any; of one that is neither an image nor a file, the first row is opened.

    Raises:
        ValueError: Naming the rows where there is none, where its file is gone, or where an address stands for it.
    """
    if is_transformed(dataset):
        return  # rows pass through a function; each is looked at when it is read
    kind = dataset.features[column]
    if type(kind).__name__ == "Image" or isinstance(kind, dict):
        _check_cells(dataset, column)
        return
    empty = missing_rows(dataset, column)
    if len(empty):
        raise _no_image(empty, column)
    if getattr(kind, "dtype", None) in ("string", "large_string"):
        _check_files([(row, path) for row, path in enumerate(dataset.with_format(None)[column][:])], column)
    elif len(dataset):
        try:
            open_picture(dataset.with_format(None)[0][column])
        except ValueError as error:
            raise ValueError(f"The images in {column!r} cannot serve: in row 0, {error}.") from error


def _check_cells(dataset: Dataset, column: str) -> None:
    """Check cells of bytes and paths, as `datasets.Image` stores them."""
    from datasets import Image

    cells = dataset.select_columns([column])
    if type(dataset.features[column]).__name__ == "Image":
        cells = cells.cast_column(column, Image(decode=False))
    cells = cells.with_format("arrow")
    empty: list[int] = []
    files: list[tuple[int, str]] = []
    for start in range(0, len(dataset), _AT_ONCE):
        chunk = cells[start : start + _AT_ONCE][column].combine_chunks()
        names = [field.name for field in chunk.type]
        without_bytes = chunk.field("bytes").is_null().to_pylist() if "bytes" in names else [True] * len(chunk)
        paths = chunk.field("path").to_pylist() if "path" in names else [None] * len(chunk)
        for offset, path in enumerate(paths):
            if not chunk[offset].is_valid or (without_bytes[offset] and path is None):
                empty.append(start + offset)
            elif without_bytes[offset]:
                files.append((start + offset, path))
    if empty:
        raise _no_image(empty, column)
    _check_files(files, column, may_download=type(dataset.features[column]).__name__ == "Image")


def _check_files(files: Sequence[tuple[int, str]], column: str, *, may_download: bool = False) -> None:
    addresses = [(row, path) for row, path in files if "://" in path]
    if addresses and not may_download:
        raise ValueError(
            f"{len(addresses)} rows of {column!r} hold addresses in place of images: {name_rows([row for row, _ in addresses])}; the first "
            f"is {addresses[0][1][:80]!r}. Nothing is downloaded while rows are read: download the images first, and give files or "
            "`datasets.Image` cells."
        )
    gone = [(row, path) for row, path in files if "://" not in path and not os.path.isfile(path)]
    if gone:
        raise ValueError(
            f"The image files of {len(gone)} rows are not there: {name_rows([row for row, _ in gone])}; the first is {gone[0][1]}. "
            "Restore the files, or filter these rows."
        )


def _no_image(rows: Sequence[int] | np.ndarray, column: str) -> ValueError:
    return ValueError(f"{len(rows)} rows have no image in {column!r}: {name_rows(rows)}. Filter these rows.")
