"""Fingerprints of a user's functions by their code, and of a dataset's transform by its code and its results."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Mapping
from types import CodeType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_trak.hashing import hash_json, random_signs, stream_key
from hf_trak.sources.processors import hash_tokenizer, tokenizer_of

if TYPE_CHECKING:
    from datasets import Dataset

_PROJECTIONS = 4


def has_transform(dataset: Dataset) -> bool:
    """Return whether a dataset applies a function to rows on access (`with_transform`, `set_transform`)."""
    return dataset.format["type"] == "custom"


def describe_transform(dataset: Dataset) -> dict[str, str] | None:
    """Return a fingerprint of a dataset's transform; None if there is none.

    `rows` describes the result for the first, the middle and the last row. Floats are reduced to a few projections with three digits, so
    the round-off of another machine does not matter. `code` is a hash of its code and of that of the functions it calls.
    """
    if not has_transform(dataset):
        return None
    rows = sorted({0, len(dataset) // 2, len(dataset) - 1})
    return {
        "rows": hash_json([_canonical(dataset[row]) for row in rows])[:32],
        "code": hash_callable(dataset.format["format_kwargs"]["transform"]),
    }


def hash_callable(*functions: Any) -> str:
    """Return a hash of the bytecode of functions, with the minor version of Python."""
    python = ".".join(platform.python_version_tuple()[:2])
    return f"{hash_json([describe_callable(function) for function in functions])[:32]} (Python {python})"


def describe_callable(function: Any, *, depth: int = 3) -> Any:
    """Return a JSON-able description of a function's code, and of plain values, tokenizers and functions that it uses."""
    if isinstance(function, functools.partial):
        given = [*function.args, *(function.keywords[key] for key in sorted(function.keywords))]
        return {
            "partial": describe_callable(function.func, depth=depth),
            "keywords": sorted(function.keywords),
            "given": [_plain(value, depth) for value in given],
        }
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:  # a callable object
        code = getattr(vars(type(function)).get("__call__"), "__code__", None)
        values = dict(getattr(function, "__dict__", {}))
    else:
        closed = zip(code.co_freevars, function.__closure__ or (), strict=True)
        values = {name: cell.cell_contents for name, cell in closed if not _is_empty(cell)}
        values |= {name: function.__globals__[name] for name in code.co_names if name in function.__globals__}
        values |= {f"default {i}": value for i, value in enumerate(function.__defaults__ or ())}
    return {
        "name": getattr(function, "__name__", type(function).__name__),
        "code": None if code is None else _describe_code(code),
        "values": {name: plain for name, value in sorted(values.items()) if (plain := _plain(value, depth)) is not None},
    }


def _is_empty(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _describe_code(code: CodeType) -> Any:
    """Return a function's bytecode, names and constants, without its file and line numbers."""
    constants = [_describe_code(value) if isinstance(value, CodeType) else _spell(value) for value in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), list(code.co_varnames), constants]


def _spell(value: Any) -> str:
    """Return a constant as text. The elements of a set are sorted, because their order differs between processes."""
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_spell, value)))}}}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_spell, value))})"
    return repr(value)


def _plain(value: Any, depth: int) -> Any:
    """Return a JSON-able description of a value, with hashes of tensors and arrays; None if it cannot be described."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _hash_array(value)
    if isinstance(value, (set, frozenset)):
        return _spell(value) if all(isinstance(one, (bool, int, float, str)) for one in value) else None
    if isinstance(value, (list, tuple, dict)):
        try:
            return json.loads(json.dumps(value))
        except (TypeError, ValueError):
            return None
    if (tokenizer := tokenizer_of(value)) is not None:
        return hash_tokenizer(tokenizer)
    is_function = isinstance(value, (FunctionType, MethodType, functools.partial))
    return describe_callable(value, depth=depth - 1) if is_function and depth else None


def _hash_array(value: torch.Tensor | np.ndarray) -> str | None:
    array = value.detach().cpu() if isinstance(value, torch.Tensor) else value
    if isinstance(array, torch.Tensor):
        array = array.contiguous().view(torch.uint8).numpy() if array.dtype == torch.bfloat16 else array.numpy()
    if array.dtype.kind not in "biufcSU":
        return None
    content = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:32]
    return f"{array.dtype} {list(array.shape)} {content}"


def _canonical(value: Any) -> Any:
    """Return a JSON-able fingerprint of a value in a row."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(value[key]) for key in sorted(value, key=str)}
    if hasattr(value, "convert") and hasattr(value, "tobytes"):  # a Pillow image
        return [value.mode, list(value.size), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, (list, tuple)):
        try:
            array = np.asarray(value)
        except ValueError:  # of different lengths
            return [_canonical(one) for one in value]
        if array.dtype.kind not in "biuf":
            return [_canonical(one) for one in value]
        value = array
    if isinstance(value, np.ndarray | np.generic):
        return _describe_array(np.asarray(value))
    if isinstance(value, float):
        return _describe_array(np.asarray(value))
    return value if isinstance(value, (str, int, bool, type(None))) else repr(value)


def _describe_array(array: np.ndarray) -> Any:
    if array.dtype.kind not in "f":
        return [list(array.shape), hashlib.sha256(repr(array.ravel().tolist()).encode()).hexdigest()]
    flat = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64)).reshape(-1)
    norm = float(flat.norm())
    if not norm > 0 or not np.isfinite(norm):
        return [list(array.shape), repr(norm)]
    signs = (random_signs(stream_key("transform", i), len(flat)).double() for i in range(_PROJECTIONS))
    return [list(array.shape), f"{norm:.2e}", [round(float(sign @ flat) / norm, 3) + 0.0 for sign in signs]]
