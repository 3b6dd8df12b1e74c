"""What decides the weights that a training run ends with, as JSON: two runs of equal descriptions are the same run."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_trak.feature_args import FeatureArguments
from hf_trak.hashing import fingerprint_of, hash_json, hash_tensors
from hf_trak.members import Members
from hf_trak.messages import list_differences
from hf_trak.sources.row_digests import digest_rows, hash_digests

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
    if isinstance(value, Dataset):
        return {"class": kind, "fingerprint": fingerprint_of(value)}
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


_FINGERPRINT = "fingerprint"
_LOSS_METHODS = (
    "compute_loss",
    "training_step",
    "get_train_dataloader",
    "_get_train_sampler",
    "create_optimizer",
    "create_scheduler",
)
# Arguments that cannot change the final weights. Any other argument decides, so that a new one of transformers is noticed.
_INDIFFERENT = {
    # Where files go.
    "output_dir",
    "run_name",
    "keep_optimizer",
    # What is logged, and where to.
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "logging_nan_inf_filter",
    "log_on_each_node",
    "log_level",
    "log_level_replica",
    "disable_tqdm",
    "report_to",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "include_num_input_tokens_seen",
    "skip_memory_metrics",
    # Which checkpoints stay on disk. `_ONLY_FOR_THE_BEST` has those that decide which weights are the best.
    "save_total_limit",
    "save_on_each_node",
    "enable_jit_checkpoint",
    # Uploads.
    "push_to_hub",
    "hub_token",
    "hub_private_repo",
    "hub_model_id",
    "hub_strategy",
    "hub_always_push",
    "hub_revision",
    # How batches are brought, not which.
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    # How long processes wait, when memory is given back, and which process this is.
    "ddp_timeout",
    "torch_empty_cache_steps",
    "local_rank",
    # Flags that only scripts read.
    "do_train",
    "do_eval",
    "do_predict",
    "resume_from_checkpoint",
    # `members` is described by its kind: an ensemble may grow.
    "members",
}
# Checkpoints are written without random numbers, and matter only where the best is loaded.
_ONLY_FOR_THE_BEST = {"save_strategy", "save_steps"}


def describe_run(trainer: Trainer, before: dict[str, Any] | None = None, *, subset: str | None = None) -> dict[str, Any]:
    """Return what decides a run of a trainer, before it begins.

    Callbacks are left out but for early stopping: most report, and what one does in the middle of a run is not known.

    Args:
        before (`dict`, *optional*): An earlier description of the same trainer. What training changes is taken from it: the model and its
            weights, and what collators and others remember.
        subset (`str`, *optional*): The name of the run, if its training set is a part of the one in `before`.
    """
    before = before or {}
    return {
        "arguments": _describe_arguments(trainer.args),
        "data": {**before["data"], "subset": subset} if subset is not None else _describe_data(trainer, before.get("data")),
        "given": before.get("given") or _describe_given(trainer),
        "model": before.get("model") or _describe_model(trainer.model),
        "initial_weights": before.get("initial_weights") or _describe_weights(trainer.model),
    }


def _describe_arguments(args: TrainingArguments) -> dict[str, Any]:
    """Return the arguments that decide a run, and how many processes make it."""
    members = Members.parse(args.members)
    best = args.load_best_model_at_end or args.save_strategy == "best"
    left_out = _INDIFFERENT | {field.name for field in fields(FeatureArguments)}
    left_out = left_out | (set() if best else _ONLY_FOR_THE_BEST) | ({"subset_alpha"} if members.kind != "subsets" else set())
    names = [field.name for field in fields(args) if field.name not in left_out]
    return {
        "members": args.members if members.is_single_run else members.kind,
        **{name: describe(getattr(args, name, None)) for name in names},
        "world_size": args.world_size,
    }


def _describe_given(trainer: Trainer) -> dict[str, Any]:
    """What a trainer was made from besides its arguments, and what its class overrides."""
    stopping = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)]
    found = {
        "trainer": describe({name: method_of(trainer, name) for name in _LOSS_METHODS}),
        "data_collator": describe(trainer.data_collator),
        "processing_class": describe(trainer.processing_class),
        "label_names": describe(trainer.label_names),
        "compute_loss_func": describe(trainer.compute_loss_func),
        "optimizers": describe([trainer.optimizer, trainer.lr_scheduler]),
        "optimizer_cls_and_kwargs": describe(trainer.optimizer_cls_and_kwargs),
        "early_stopping": [[one.early_stopping_patience, one.early_stopping_threshold] for one in stopping],
    }
    if stopping or trainer.args.load_best_model_at_end or trainer.args.save_strategy == "best":
        found["compute_metrics"] = describe(trainer.compute_metrics)
        found["eval_dataset"] = _fingerprint(trainer.eval_dataset)
    return found


def method_of(trainer: Trainer, name: str) -> Any:
    """Return the function behind a method of a trainer, whether its class has it or it was set on the trainer."""
    found = vars(trainer).get(name) or getattr(type(trainer), name)
    return getattr(found, "__func__", found)


def _describe_model(model: Any) -> dict[str, Any]:
    own: Any = getattr(model, "config", None)
    values = own.to_dict() if hasattr(own, "to_dict") else {}
    # The weights are compared by content, wherever they were loaded from. `use_cache` is set by Trainer.
    config = {key: item for key, item in values.items() if key not in ("_name_or_path", "transformers_version", "use_cache")}
    shapes = {name: [list(p.shape), str(p.dtype), p.requires_grad] for name, p in model.named_parameters()}
    return {"class": type(model).__name__, "config": describe(config), "parameters_sha256": hash_json(shapes)}


def _describe_data(trainer: Trainer, before: dict[str, Any] | None) -> dict[str, Any]:
    """Return what tells a training set from another: the content of its rows, and what is made of them when they are read."""
    dataset: Any = trainer.train_dataset
    if isinstance(dataset, IterableDataset):
        dataset = trainer._attributed  # the rows that are read of it
    fingerprint = _fingerprint(dataset)
    if before is not None and before[_FINGERPRINT] == fingerprint:
        return before
    found = {_FINGERPRINT: fingerprint, "n_rows": len(dataset) if hasattr(dataset, "__len__") else None}
    if not isinstance(dataset, Dataset):
        return {**found, "class": type(dataset).__name__}
    return {
        **found,
        "rows_sha256": hash_digests(digest_rows(dataset, dataset.column_names)),
        "shown": [dataset.format["type"], sorted(dataset.format["columns"])],
        # Not what it makes of rows, which may be random.
        "transform": describe(dataset.format["format_kwargs"].get("transform")),
    }


def _fingerprint(dataset: Any) -> Any:
    if isinstance(dataset, dict):
        return {name: _fingerprint(one) for name, one in dataset.items()}
    return fingerprint_of(dataset) if isinstance(dataset, Dataset) else type(dataset).__name__


def _describe_weights(model: Any) -> dict[str, Any]:
    """Return where initial weights come from, and a hash of each tensor that is not one value throughout."""
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    hashes = {name: hash_tensors({"": value})[:_DIGITS] for name, value in tensors.items() if _tells(value)}
    return {"name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None), "tensors": hashes}


def _tells(value: Tensor) -> bool:
    """Whether a tensor tells one initialization from another: zeros and ones do not."""
    if value.numel() < 2 or value.is_meta:
        return False
    flat = value.detach().reshape(-1)
    return bool((flat != flat[0]).any()) if flat.dtype != torch.bool else False


def list_run_differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return one line per setting in which two described runs differ; their initial weights are compared by [`compare_weights`]."""
    return list_differences(_compared(found), _compared(wanted))


def _compared(run: dict[str, Any]) -> dict[str, Any]:
    data = {key: item for key, item in run["data"].items() if key != _FINGERPRINT}  # it may differ where the rows do not
    return {**{key: item for key, item in run.items() if key != "initial_weights"}, "data": data}


def compare_weights(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[bool, str | None]:
    """Return whether two runs may be one by their initial weights, and a line that says how these differ; None if they are equal.

    A head that is drawn anew in each process does not make a run another one, since a checkpoint holds what it had become: then other
    tensors of the same source are equal.
    """
    found, wanted = found["initial_weights"], wanted["initial_weights"]
    there, here = found["tensors"], wanted["tensors"]
    changed = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if not changed:
        return True, None
    name = changed[0]
    line = (
        f"initial weights: {len(changed)} of {len({**there, **here})} tensors differ, such as {name}: {there.get(name)} there, "
        f"{here.get(name)} here"
    )
    if found["name_or_path"] != wanted["name_or_path"]:
        line += f" (loaded from {found['name_or_path']!r} there, {wanted['name_or_path']!r} here)"
    is_same_source = found["name_or_path"] == wanted["name_or_path"] and any(there.get(key) == here[key] for key in here)
    return is_same_source, line
