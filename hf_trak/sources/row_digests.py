"""The content of training rows: the columns that are read or kept, and a digest of each row."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import UInt8

from hf_trak.sources.transforms import has_transform

if TYPE_CHECKING:
    from datasets import Dataset, Features


def names_read(columns: Mapping[str, Any]) -> list[str]:
    """Return the column names in the result of [`Task.columns_read`], each once."""
    return list(dict.fromkeys(name for value in columns.values() for name in ([value] if isinstance(value, str) else value)))


def in_order(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of [`Task.columns_read`] in a normal order, so that the order of a dataset's columns does not matter."""
    return {key: sorted(value) if key == "tokens" else value for key, value in columns.items()}


def describe_columns(columns: Mapping[str, Any]) -> str:
    """Return one line with the columns that are read and their use."""
    return "; ".join(f"{key} {value if isinstance(value, str) else ', '.join(value)}" for key, value in columns.items())


def columns_to_digest(dataset: Dataset, columns: Mapping[str, Any]) -> list[str]:
    """Return the columns for the digests of rows: those that are read, or all if that is unknown.

    It is unknown for a dataset with a transform and for custom tasks, because a transform and a collator can read any column.
    """
    read = names_read(columns)
    if has_transform(dataset) or not read or not set(read) <= set(dataset.column_names):
        return sorted(dataset.column_names)
    return sorted(read)


def label_names(features: Features, columns: Mapping[str, Any]) -> list[str] | None:
    """Return the class names of the label column that is read; None if it has none."""
    label = columns.get("label")
    kind = features.get(label) if isinstance(label, str) else None
    kind = getattr(kind, "feature", kind)  # a list of labels, one for each token
    names = getattr(kind, "names", None)
    return None if names is None else list(names)


def file_columns(features: Features, columns: Mapping[str, Any]) -> list[str]:
    """Return the columns that are read as images and contain file names."""
    images = columns.get("image", [])
    named = [images] if isinstance(images, str) else images
    return [name for name in named if getattr(features.get(name), "dtype", None) in ("string", "large_string")]


# `attribute` calls them proponent_<column> and opponent_<column>, next to proponent_scores.
_TAKEN = ("example_id", "scores")


def check_kept(dataset: Dataset, columns: Sequence[str]) -> tuple[str, ...]:
    """Return the columns to be kept.

    Raises:
        ValueError: If the dataset lacks a column, or if a column is named twice or has a name that the index uses.
    """
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"`keep_columns` (--keep_columns) names {', '.join(map(repr, missing))}, but the dataset has "
            f"{', '.join(dataset.column_names)}."
        )
    twice = sorted({column for column in columns if list(columns).count(column) > 1})
    if twice:
        raise ValueError(f"`keep_columns` (--keep_columns) names {', '.join(map(repr, twice))} twice; name each column once.")
    taken = [column for column in columns if column in _TAKEN or column.startswith("trak_")]
    if taken:
        raise ValueError(
            f"`keep_columns` (--keep_columns) names {', '.join(map(repr, taken))}, a name that the index uses for a column of its "
            "results; rename the column first, with `dataset.rename_column`."
        )
    for column in columns:
        _check_readable(dataset, column)
    return tuple(columns)


def _check_readable(dataset: Dataset, column: str) -> None:
    """Refuse types of which pyarrow cannot read single rows from a file, such as `string_view`, before anything is computed."""
    kind = dataset.features.arrow_schema.field(column).type
    try:
        pa.nulls(1, kind).take(pa.array([0]))
    except pa.ArrowNotImplementedError as error:
        raise ValueError(
            f"`keep_columns` (--keep_columns) names {column!r}, of the type {kind}, of which some rows cannot be read again. Cast it "
            f"first: `dataset.cast_column({column!r}, Value('large_string'))` or another type."
        ) from error


def take_kept(dataset: Dataset, columns: Sequence[str], rows: range) -> pa.Table:
    """Return some rows of the kept columns, with the dataset's types. The content of image and audio files is included.

    The schema's metadata describes the features as `datasets` does, so `load_dataset` restores them.
    """
    from datasets import Features
    from datasets.table import embed_table_storage, table_cast

    schema = Features({column: dataset.features[column] for column in columns}).arrow_schema
    raw = dataset.with_format(None).select_columns(list(columns)).with_format("arrow")
    table = raw[rows.start : rows.stop].select(list(columns))
    return embed_table_storage(table_cast(table, schema).replace_schema_metadata(schema.metadata), remote_files=False)


_BYTES = 16
_AT_ONCE = 1000
_LIMIT = 2.0**63  # integral floats below it fit into int64
_MEDIA = ("bytes", "path")  # how datasets stores images, audio and other files


def digest_rows(
    dataset: Dataset, columns: Sequence[str], *, file_columns: Sequence[str] = ()
) -> UInt8[np.ndarray, "n_rows 16"]:
    """Return a digest of each row's content in some columns.

    The digest depends only on content. Integers and floats of the same value are equal for every width, and so are strings and lists of
    every Arrow type. An image is digested by the content of its file, whether it is decoded or not, inside the table or outside. A null
    field of a struct counts as missing. The dataset's format and transform do not matter.

    Args:
        columns (`Sequence[str]`): The columns; their order does not matter.
        file_columns (`Sequence[str]`): Columns whose strings are file names. If a file exists, its content is digested.
    """
    names = sorted(columns)
    head = json.dumps(names).encode()
    raw = dataset.with_format(None).select_columns(names).with_format("arrow")
    digests = []
    for start in range(0, len(dataset), _AT_ONCE):
        table = raw[start : start + _AT_ONCE]
        parts = [_encode(_whole(table.column(name)), files=name in file_columns) for name in names]
        digests += [_hash(head + b"".join(values)) for values in zip(*parts, strict=True)]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, _BYTES)


def hash_digests(digests: UInt8[np.ndarray, "n_rows 16"]) -> str:
    """Return the SHA-256 of the digests of rows, in order."""
    return hashlib.sha256(np.ascontiguousarray(digests).data).hexdigest()


def spell_digests(digests: UInt8[np.ndarray, "n_rows 16"]) -> list[str]:
    """Return digests in hexadecimal, as they are stored."""
    whole, width = np.ascontiguousarray(digests).tobytes().hex(), 2 * _BYTES
    return [whole[start : start + width] for start in range(0, len(whole), width)]


def _hash(content: Any) -> bytes:
    return hashlib.blake2b(content, digest_size=_BYTES).digest()


def _whole(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found


def _encode(array: pa.Array, *, files: bool = False) -> list[bytes]:
    """Return the canonical bytes of each value. No value's bytes are a prefix of another's."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    encode: Callable[[pa.Array], list[bytes]]
    if pa.types.is_null(kind):
        return [b"n"] * len(array)
    if _is_number(kind):
        encode = _encode_numbers
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        encode = _encode_paths if files else _encode_strings
    elif _is_binary(kind):
        encode = _encode_binary
    elif _is_list(kind):
        encode = _encode_lists
    elif pa.types.is_struct(kind):
        encode = _encode_media if {field.name for field in kind} == set(_MEDIA) else _encode_structs
    elif pa.types.is_map(kind):
        array = array.cast(pa.list_(pa.struct([pa.field("key", kind.key_type), pa.field("value", kind.item_type)])))
        encode = _encode_lists
    else:
        encode = _encode_others
    found = encode(array)
    if array.null_count:
        found = [value if valid else b"n" for value, valid in zip(found, array.is_valid().to_pylist(), strict=True)]
    return found


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _is_binary(kind: pa.DataType) -> bool:
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(test(kind) for test in tests)


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(test(kind) for test in tests)


def _numbers(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Return eight bytes for each number, and whether they are an int64. Nulls are 0."""
    kind = array.type
    if pa.types.is_floating(kind):
        values = pc.fill_null(array.cast(pa.float64()), 0.0).to_numpy(zero_copy_only=False)
        with np.errstate(invalid="ignore"):
            whole = (np.floor(values) == values) & (np.abs(values) < _LIMIT)
        values = np.where(np.isnan(values), np.nan, values)  # one of the many bit patterns of NaN
        return np.where(whole, np.where(whole, values, 0).astype(np.int64).view(np.float64), values).view(np.int64), whole
    if pa.types.is_uint64(kind):
        large = pc.fill_null(array, 0).to_numpy(zero_copy_only=False)
        return large.view(np.int64), large < np.uint64(1 << 63)
    values = pc.fill_null(array.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
    return values, np.ones(len(values), dtype=bool)


def _encode_numbers(array: pa.Array) -> list[bytes]:
    values, whole = _numbers(array)
    packed = np.ascontiguousarray(values, dtype="<i8").tobytes()
    return [(b"i" if is_whole else b"f") + packed[8 * i : 8 * i + 8] for i, is_whole in enumerate(whole.tolist())]


def _sized(tag: bytes, content: bytes) -> bytes:
    return tag + len(content).to_bytes(8, "little") + content


def _encode_strings(array: pa.Array) -> list[bytes]:
    return [_sized(b"s", text.encode("utf-8", "surrogatepass")) if text is not None else b"n" for text in array.to_pylist()]


def _encode_binary(array: pa.Array) -> list[bytes]:
    # A view into Arrow's buffer, so images are not copied.
    return [b"b" + _hash(value.as_buffer()) if value.is_valid else b"n" for value in array]


def _encode_paths(array: pa.Array) -> list[bytes]:
    return [_encode_file(path) if path is not None else b"n" for path in array.to_pylist()]


def _encode_media(array: pa.Array) -> list[bytes]:
    contents, paths = _encode(array.field("bytes")), array.field("path").to_pylist()
    return [
        _encode_file(path) if content == b"n" and path is not None else content
        for content, path in zip(contents, paths, strict=True)
    ]


def _encode_file(path: str) -> bytes:
    """Encode the content of a file like bytes in a table. A file that does not exist here is encoded by its name."""
    if "://" in path or not os.path.isfile(path):
        return _sized(b"p", path.encode("utf-8", "surrogatepass"))
    with open(path, "rb") as file:
        return b"b" + hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_BYTES)).digest()


def _encode_lists(array: pa.Array) -> list[bytes]:
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    items = array.flatten()
    stops = np.cumsum(lengths)
    starts = stops - lengths
    is_packed = np.zeros(len(lengths), dtype=bool)
    if _is_number(items.type):
        nulls = np.concatenate([[0], np.cumsum(items.is_null().to_numpy(zero_copy_only=False))])
        is_packed = (lengths > 0) & (nulls[stops] == nulls[starts])
    packed = _encode_number_lists(items, starts[is_packed], stops[is_packed]) if is_packed.any() else iter(())
    one_by_one = [] if is_packed.all() else _encode(items)
    spans = zip(starts.tolist(), stops.tolist(), is_packed.tolist(), strict=True)
    return [
        next(packed) if whole else b"l" + (stop - start).to_bytes(8, "little") + b"".join(one_by_one[start:stop])
        for start, stop, whole in spans
    ]


def _encode_number_lists(items: pa.Array, starts: np.ndarray, stops: np.ndarray) -> Iterator[bytes]:
    """Yield the bytes of lists without a loop over their numbers. If some numbers are not integral, one bit per number marks them."""
    values, whole = _numbers(items)
    packed = memoryview(np.ascontiguousarray(values, dtype="<i8").tobytes())
    broken = np.concatenate([[0], np.cumsum(~whole)])
    some_broken = broken[stops] > broken[starts]
    for start, stop, is_broken in zip(starts.tolist(), stops.tolist(), some_broken.tolist(), strict=True):
        kinds = np.packbits(whole[start:stop]).tobytes() if is_broken else b""
        tag = b"F" if is_broken else b"I"
        yield tag + (stop - start).to_bytes(8, "little") + kinds + packed[8 * start : 8 * stop]


def _encode_structs(array: pa.Array) -> list[bytes]:
    fields = sorted((field.name, place) for place, field in enumerate(array.type))
    parts = [[_sized(b"k", name.encode()) + value if value != b"n" else b"" for value in _encode(pc.struct_field(array, place))]
             for name, place in fields]  # fmt: skip
    rows = zip(*parts, strict=True) if parts else ((),) * len(array)
    return [b"d" + b"".join(values) + b"e" for values in rows]


def _encode_others(array: pa.Array) -> list[bytes]:
    """Encode dates, times and decimals by their text."""
    return [_sized(b"t", str(value).encode()) for value in array.to_pylist()]
