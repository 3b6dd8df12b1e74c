"""What a Python object is made of, as JSON that another process can compare: plain values, code, tensors, files, attributes."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_trak.hashing import hash_json, hash_tensors

_PLAIN = (int, float, str, bool, type(None))
_DIGITS = 16
# Code of these is told by its name: a fix in a library does not make a run another one.
_LIBRARIES = {"accelerate", "builtins", "datasets", "hf_trak", "numpy", "peft", "torch", "torchvision", "transformers", "trl"}
_DEEPEST = 8


def describe(value: Any) -> Any:
    """Return a JSON value that is equal for objects of equal content, in this process and in others.

    Functions are told by their code, what they close over and the globals that they name; tensors by their bytes; tokenizers and image
    processors by the files that they save; datasets by their fingerprint; models by their class, since their weights are compared
    elsewhere; other objects by their class and attributes. Of what has no such content (loggers, random generators, locks), the class is
    all that is told.
    """
    return _describe(value, {}, 0)


def _describe(value: Any, seen: dict[int, Any], depth: int) -> Any:
    if isinstance(value, Enum):
        return _describe(value.value, seen, depth)
    if isinstance(value, _PLAIN):
        return "nan" if value != value else value
    if depth > _DEEPEST:
        return _name(type(value))

    def below(item: Any) -> Any:
        return _describe(item, seen, depth + 1)

    if isinstance(value, (Tensor, np.ndarray)):
        return _describe_numbers(value)
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()[:_DIGITS]
    if isinstance(value, Mapping):
        return {str(key): below(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((below(item) for item in value), key=hash_json)
    if isinstance(value, (list, tuple, range)):
        return [below(item) for item in value]
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, functools.partial):
        return {"partial": below(value.func), "args": below(value.args), "keywords": below(value.keywords)}
    if isinstance(value, types.MethodType):
        return {"method": below(value.__func__), "of": below(value.__self__)}
    # Objects may refer to each other in circles. `seen` keeps them, so that no id is given twice.
    if id(value) in seen:
        return _name(value) if isinstance(value, (type, types.FunctionType)) else _name(type(value))
    seen[id(value)] = value
    if isinstance(value, types.FunctionType):
        return _describe_function(value, below)
    if isinstance(value, type):
        return _describe_class(value, below)
    return _describe_object(value, below)


def _describe_object(value: Any, below: Callable[[Any], Any]) -> Any:
    kind = _name(type(value))
    if isinstance(value, torch.nn.Module) or _root(type(value)) in sys.stdlib_module_names:
        return kind
    if isinstance(value, torch.optim.Optimizer):
        groups = [{key: item for key, item in group.items() if key != "params"} for group in value.param_groups]
        return {"class": kind, "groups": below(groups)}
    if hasattr(value, "_fingerprint"):
        return {"class": kind, "fingerprint": value._fingerprint}
    if hasattr(value, "save_pretrained"):
        return {"class": kind, "files_sha256": _hash_saved(value)}
    own = {} if _is_library(type(value)) else {"code": below(type(value))}
    return {"class": kind, **own, "attributes": _attributes(value, below)}


def _hash_saved(value: Any) -> str:
    """Return a hash of the files that a tokenizer or image processor saves, without what its last call left in it."""
    with tempfile.TemporaryDirectory() as folder:
        value.save_pretrained(folder)
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}
    if "tokenizer.json" in files:
        # A fast tokenizer saves how it cut and padded last: that differs where `Dataset.map` found its cache.
        content = json.loads(files["tokenizer.json"])
        files["tokenizer.json"] = json.dumps({**content, "truncation": None, "padding": None}, sort_keys=True).encode()
    return hash_json({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})


def _attributes(value: Any, below: Callable[[Any], Any]) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    found = {**{name: getattr(value, name) for name in slots if hasattr(value, name)}, **getattr(value, "__dict__", {})}
    return {name: below(item) for name, item in found.items() if not isinstance(item, types.ModuleType)}


def _describe_numbers(value: Tensor | np.ndarray) -> Any:
    if isinstance(value, np.ndarray) and value.dtype == object:
        return describe(value.tolist())
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value).view(np.uint8).reshape(-1))
    return {"dtype": str(value.dtype), "shape": list(value.shape), "sha256": hash_tensors({"": tensor})[:_DIGITS]}


def _describe_function(function: types.FunctionType, below: Callable[[Any], Any]) -> Any:
    if _is_library(function):
        return _name(function)
    closure = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    names = [name for name in _names(function.__code__) if name in function.__globals__]
    found = {name: function.__globals__[name] for name in names}
    return {
        "function": function.__qualname__,
        "code": _hash_code(function.__code__),
        "defaults": below([function.__defaults__, function.__kwdefaults__]),
        "closure": below(closure),
        "globals": {name: below(item) for name, item in sorted(found.items()) if not isinstance(item, types.ModuleType)},
    }


def _describe_class(kind: type, below: Callable[[Any], Any]) -> Any:
    if _is_library(kind):
        return _name(kind)
    members = {name: item for base in reversed(_own_bases(kind)) for name, item in vars(base).items()}
    code = {name: getattr(item, "__func__", getattr(item, "fget", item)) for name, item in members.items()}
    return {
        "class": _name(kind),
        "members": {
            name: below(item)
            for name, item in sorted(code.items())
            if isinstance(item, (types.FunctionType, *_PLAIN)) and name not in ("__module__", "__doc__", "__firstlineno__")
        },
    }


def _own_bases(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if not _is_library(base)]


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # a name that is not bound yet
        return False
    return True


def _names(code: types.CodeType) -> Iterable[str]:
    """The names that a function's code, and that of functions inside it, looks up."""
    inner = [name for constant in code.co_consts if isinstance(constant, types.CodeType) for name in _names(constant)]
    return dict.fromkeys([*code.co_names, *inner])


def _hash_code(code: types.CodeType) -> str:
    """Return a hash of what code does: neither its file nor its lines."""
    constants = [_hash_code(value) if isinstance(value, types.CodeType) else _constant(value) for value in code.co_consts]
    return hash_json([code.co_code.hex(), constants, code.co_names, code.co_varnames])[:_DIGITS]


def _constant(value: Any) -> str:
    return str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _root(value: Any) -> str:
    return (getattr(value, "__module__", None) or "builtins").partition(".")[0]


def _is_library(value: Any) -> bool:
    return _root(value) in _LIBRARIES or _root(value) in sys.stdlib_module_names - {"__main__"}


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
