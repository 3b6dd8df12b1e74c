"""What a member of an index is of: its identity, which decides its rows, and what is told of it besides."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_trak.config import TrakConfig
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.hashing import hash_tensors
from hf_trak.members import ADAPTER, Pass
from hf_trak.messages import list_differences
from hf_trak.sources.checkpoints import describe_model_config
from hf_trak.sources.processors import describe_processing, tokenizer_of
from hf_trak.sources.repositories import describe_source, pinned_revision
from hf_trak.sources.transforms import hash_callable
from hf_trak.storage.object_store import seen_from
from hf_trak.storage.reader import MemberReader
from hf_trak.tasks import Task
from hf_trak.tasks.inputs import CustomInputs, CutsTexts

if TYPE_CHECKING:
    from datasets import Dataset


logger = logging.getLogger(__name__)


def identity_of(config: TrakConfig) -> dict[str, Any]:
    """Return the part of a configuration that decides the rows: not the task's name, which may be "auto", nor the damping."""
    return config.identity()


def describe_member(folder: Path, plan: Pass, featurizer: Featurizer, dataset: Dataset) -> dict[str, Any]:
    """What is told of the members that a pass makes, and does not decide their rows."""
    return {
        "checkpoint": _describe_checkpoint(folder, featurizer),
        "checkpoint_number": plan.checkpoint,
        **({"model_number": plan.model} if plan.model is not None else {}),
        **_describe_base(folder, featurizer),
        **_describe_processor(folder, featurizer),
        **describe_source(dataset),
        "training_set": describe_dataset(dataset),
        "coverage": featurizer.selection.coverage,
        "grad_dim": featurizer.selection.grad_dim,
        "engine": featurizer.engine.to_dict() if featurizer.engine is not None else None,
        **({"task_import_path": path} if (path := featurizer.task.import_path) is not None else {}),
        "versions": library_versions(),
        "hardware": hardware_name(featurizer.device),
        **_describe_bank(featurizer),
        **({"statistics": {"sha256": hash_tensors(found)}} if (found := featurizer.checkpoint.statistics) is not None else {}),
    }


def _describe_bank(featurizer: Featurizer) -> dict[str, Any]:
    bank, config = featurizer.bank, featurizer.config
    return {} if bank is None else {"bank": {"seed": config.bank_seed, "size": len(bank.rows), "sha256": bank.sha256}}


def describe_featurizer(featurizer: Featurizer, columns: Mapping[str, Any]) -> dict[str, Any]:
    """What a feature means beyond the configuration, and what a query must share with it.

    Args:
        columns (`Mapping`): Which columns are read and as what, from [`Task.columns_read`]: tokens and pixels that are there already pass
            through no tokenizer or processor.
    """
    return {
        "task": featurizer.task.name,
        "out_to_loss_kind": featurizer.task.out_to_loss_kind,
        "seed": featurizer.seed,
        # Members without dropout say nothing of it, as those made before there was any.
        **({"dropout_seed": featurizer.dropout_seed} if featurizer.dropout_seed is not None else {}),
        "model_class": type(featurizer.model).__name__,
        "parameters": featurizer.selection.shapes,
        "model_sha256": featurizer.checkpoint.hash(),
        **({"point": made.identity} if (made := featurizer.checkpoint.made) is not None else {}),
        "model_config": describe_model_config(featurizer.model),
        **_describe_processing(featurizer, columns),
        **({"gpu_model": featurizer.gpu_model} if featurizer.gpu_model is not None else {}),
    }


def describe_task_code(task: Task) -> dict[str, str]:
    """Return what tells a custom task from others of its name: a hash of its functions. Nothing for a built-in task."""
    if not isinstance(task.inputs, CustomInputs):
        return {}
    return {"task_code": hash_callable(task.output_function, task.inputs.collator)}


def _describe_processing(featurizer: Featurizer, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a tokenizer or processor decides the rows, and the length at which texts are cut."""
    inputs = featurizer.task.inputs
    reads_texts = bool(columns) and ("tokens" not in columns or featurizer.config.chunk_overlap is not None)
    reads_files = (isinstance(columns.get("image"), str) and columns["image"] != "pixel_values") or "audio" in columns
    found = describe_processing(
        featurizer.processing_class,
        tokenizer=reads_texts or (bool(columns) and featurizer.config.score_tokens != "all"),
        pixels=reads_files,
        padded=getattr(inputs, "fixed_length", None) is not None,
        chats=bool({"messages", "completion", "chosen"} & set(columns)),
    )
    limit = None
    if reads_texts and "tokenizer" in found and isinstance(inputs, CutsTexts):
        limit = inputs.text_limit(tokenizer_of(featurizer.processing_class))
    return {**({"processing": found} if found else {}), **({"max_length": limit} if limit is not None else {})}


def recorded_passes(members: Sequence[MemberReader]) -> list[Pass]:
    """Return how the members of a finished index group into passes of gradients."""
    passes: list[Pass] = []
    for number, member in enumerate(members):
        # Before there were several members to a checkpoint, none was recorded.
        checkpoint = member.info.get("checkpoint_number", number)
        dropout_seed = member.identity.get("dropout_seed")
        seed = member.identity["seed"]
        if passes and (passes[-1].checkpoint, passes[-1].dropout_seed) == (checkpoint, dropout_seed):
            before = passes.pop()
            passes.append(Pass(checkpoint, dropout_seed, (*before.members, number), (*before.seeds, seed), before.model))
        else:
            passes.append(Pass(checkpoint, dropout_seed, (number,), (seed,), member.info.get("model_number")))
    return passes


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """What a training set is called, which does not tell whether it is the same."""
    info = dataset.info
    return {
        "name": info.dataset_name,
        "config": info.config_name,
        "split": str(dataset.split) if dataset.split is not None else None,
        "columns": dataset.column_names,
    }


def _describe_checkpoint(folder: Path, featurizer: Featurizer) -> dict[str, Any]:
    """Where to find the weights again: a repository, or a folder as seen from the index."""
    source = featurizer.source
    if source is not None and Path(source).exists():
        return {"path": seen_from(folder, Path(source)), "repository": None, "revision": None}
    return {"path": None, "repository": source, "revision": featurizer.checkpoint.commit}


def _describe_base(folder: Path, featurizer: Featurizer) -> dict[str, Any]:
    """Where to find the base of a point's path again, and how far the final weights are from it; nothing for a checkpoint itself."""
    point, made = featurizer.point, featurizer.checkpoint.made
    if point is None or made is None:
        return {}
    if point.base == ADAPTER:
        return {"base": {"path": None, "repository": None, "revision": None}}
    is_folder = Path(point.base).exists()
    place = {
        "path": seen_from(folder, Path(point.base)) if is_folder else None,
        "repository": None if is_folder else point.base,
        "revision": point.revision,
    }
    measured = {"distance": round(made.report.distance, 6), "cosine": round(made.report.cosine, 6)}
    return {"base": {**place, **measured}}


def recorded_base(folder: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base of a member's path, its point and the base's commit, as [`Featurizer`] takes them; nothing for a checkpoint itself.

    Raises:
        FileNotFoundError: If the base's folder is not there now.
    """
    point = info["identity"].get("point")
    if point is None:
        return {}
    place = info["base"]
    base: Any = ADAPTER if point.get("base") == ADAPTER else place["repository"]
    if place["path"] is not None:
        base = folder / place["path"]
        if not base.exists():
            raise FileNotFoundError(
                f"The base of {folder} was at {base}, and is not there now. It is needed to make the points of the path that the index is of: "
                "say where it is with `base` (--base)."
            )
    return {"base": base, "alpha": point["alpha"], "base_revision": place["revision"]}


def _describe_processor(folder: Path, featurizer: Featurizer) -> dict[str, Any]:
    """Where to find a tokenizer or processor again that is not the checkpoint's own; nothing where none was given by name."""
    source = featurizer.processor
    if source is None:
        return {}
    if Path(source).exists():
        return {"processor": {"path": seen_from(folder, Path(source)), "repository": None, "revision": None}}
    return {"processor": {"path": None, "repository": source, "revision": pinned_revision(source)}}


def recorded_processor(folder: Path, info: dict[str, Any]) -> str | None:
    """Return the folder or repository of the tokenizer or processor that a member's rows were read with, if it is recorded."""
    found = info.get("processor")
    if found is None:
        return None
    return str(folder / found["path"]) if found["path"] is not None else found["repository"]


def recorded_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> str:
    """Return the folder or repository that a member of the index in `folder` was featurized with."""
    if checkpoint["path"] is not None:
        path = folder / checkpoint["path"]
        if not path.exists():
            raise FileNotFoundError(
                f"The checkpoint of {folder} was at {path}, and is not there now. Say where it is with `models` (--model)."
            )
        return str(path)
    if checkpoint["repository"] is None:
        raise ValueError(
            f"{folder} was made from a model in memory; give that model, or a folder it is saved in, as `models` (--model)."
        )
    return checkpoint["repository"]


def library_minors() -> dict[str, str]:
    """Return the versions that features may depend on, as far as their minor number: what computes them, and what reads rows."""
    import tokenizers
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    return {name: ".".join(version.split(".")[:2]) for name, version in versions.items()}


def warn_of_libraries(member: Path, recorded: Mapping[str, str] | None) -> None:
    """Say it where a finished member was made with other versions of libraries than those here."""
    if lines := list_differences(recorded or {}, library_minors()):
        logger.warning(
            "%s was made with other versions of libraries (%s). Its rows are kept; features of queries made here may differ slightly.",
            member,
            "; ".join(lines),
        )


def library_versions() -> dict[str, str]:
    """Return the versions of what features are computed with."""
    import datasets
    import transformers

    from hf_trak import __version__

    return {
        "hf_trak": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "datasets": datasets.__version__,
        "python": platform.python_version(),
    }


def hardware_name(device: torch.device) -> str:
    """Return the GPU's model, or the kind of CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
