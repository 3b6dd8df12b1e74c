"""What decides the weights that a training run ends with, as JSON: two runs of equal descriptions are the same run."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_trak.feature_args import FeatureArguments
from hf_trak.hashing import hash_json, hash_tensors
from hf_trak.members import Members
from hf_trak.sources.row_digests import digest_rows, hash_digests
from hf_trak.storage.differences import list_differences
from hf_trak.training.content import describe

_DIGITS = 16
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
    dataset = trainer.train_dataset
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
    return getattr(dataset, "_fingerprint", None) or type(dataset).__name__


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
