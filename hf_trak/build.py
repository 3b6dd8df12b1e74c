"""Making an index: which members a folder holds, what identifies them, and the loop over them."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hf_trak.config import CONFIG_NAME, TrakConfig
from hf_trak.featurize import featurize, kernel_of
from hf_trak.featurizer import Featurizer
from hf_trak.members import Pass, lay_out_passes
from hf_trak.passes import PassWriter
from hf_trak.processing import describe_processing
from hf_trak.sources import describe_source
from hf_trak.store import TEMPORARY, MemberReader, MemberWriter, discard, write_json
from hf_trak.tasks import Bank, draw_rows, needs_bank

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_trak.tasks import Task


def member_folders(folder: Path) -> list[Path]:
    """Return member_0, member_1, ... as far as they go."""
    folders: list[Path] = []
    while (folder / f"member_{len(folders)}").exists():
        folders.append(folder / f"member_{len(folders)}")
    return folders


def begin_index(folder: Path, config: TrakConfig, n_members: int, *, overwrite: bool) -> None:
    """Make sure `folder` is new, or holds this very index, perhaps unfinished."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, where an index needs a folder; choose another name.")
    folder.mkdir(parents=True, exist_ok=True)
    if all(path.name.endswith(TEMPORARY) for path in folder.iterdir()):
        write_json(folder / CONFIG_NAME, config.to_dict())
        return
    if not (folder / CONFIG_NAME).exists():
        raise ValueError(f"{folder} is not empty and holds no {CONFIG_NAME}; choose another folder.")
    lines = config.differences(TrakConfig.from_pretrained(folder))
    found = len(member_folders(folder))
    if found > n_members:
        lines.append(f"members: {n_members} here, {found} there")
    if lines and not overwrite:
        raise ValueError(
            f"{folder} holds another index:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nChoose another folder, or pass overwrite=True (--overwrite) to replace it."
        )
    if lines:
        for member in member_folders(folder):
            discard(member)
    write_json(folder / CONFIG_NAME, config.to_dict())


def identity_of(config: TrakConfig) -> dict[str, Any]:
    """Return the part of a configuration that decides the rows: not the task's name, which may be "auto", nor the damping."""
    return config.identity()


def build_members(
    folder: Path,
    checkpoints: Sequence[PreTrainedModel | str | Path],
    dataset: Dataset,
    config: TrakConfig,
    *,
    processing_class: Any,
    task: Task | None,
    revision: str | None,
    sketch_seeds_per_checkpoint: int,
    dropout_seeds: int,
    masks: Bool[Tensor, "n_checkpoints n_train"] | None,
    overwrite: bool,
    trust_remote_code: bool = False,
    **options: Any,
) -> None:
    """Featurize a dataset for every member of an index; see [`AttributionIndex.build`], whose arguments these are."""
    if not checkpoints:
        raise ValueError("`models` is empty: give at least one checkpoint.")
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is nothing to featurize.")
    _check_masks(masks, n_checkpoints=len(checkpoints), n_rows=len(dataset))
    passes = lay_out_passes(
        len(checkpoints),
        seed=config.seed,
        sketch_seeds_per_checkpoint=sketch_seeds_per_checkpoint,
        dropout_seeds=dropout_seeds,
    )
    for number, plan in enumerate(passes):
        featurizer = Featurizer(
            checkpoints[plan.checkpoint],
            config,
            processing_class,
            task=task,
            seed=plan.seeds,
            dropout_seed=plan.dropout_seed,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        featurizer.task.check(dataset, featurizer.processing_class)
        if number == 0:
            if needs_bank(featurizer.task):
                draw_rows(
                    len(dataset), config.bank_size, config.bank_seed
                )  # a bank that cannot be is refused before a file is written
            config = replace(config, task=featurizer.task.name)
            begin_index(folder, config, passes[-1].members[-1] + 1, overwrite=overwrite)
        mask = None if masks is None else masks[plan.checkpoint]
        description = f"Featurizing {number + 1}/{len(passes)}"
        build_pass(folder, plan, featurizer, dataset, mask=mask, overwrite=overwrite, description=description, **options)


def _check_masks(masks: Bool[Tensor, "n_checkpoints n_train"] | None, *, n_checkpoints: int, n_rows: int) -> None:
    """Check that there is one entry per checkpoint and training row.

    Raises:
        ValueError: With both shapes.
    """
    if masks is not None and (masks.dtype != torch.bool or masks.shape != (n_checkpoints, n_rows)):
        raise ValueError(
            f"`masks` must be boolean of shape (n_checkpoints, n_train), here ({n_checkpoints}, {n_rows}), but are {masks.dtype} of "
            f"shape {tuple(masks.shape)}."
        )


def build_pass(
    folder: Path,
    plan: Pass,
    featurizer: Featurizer,
    dataset: Dataset,
    *,
    mask: Bool[Tensor, " rows"] | None = None,
    batch_size: int | str,
    shard_rows: int,
    overwrite: bool,
    progress: bool,
    description: str,
) -> None:
    """Featurize a dataset once for all members of a pass, going on where an earlier call stopped.

    Args:
        folder (`Path`): The index.
        mask (`torch.Tensor`, *optional*): Which rows the checkpoint was trained on, to be recorded.
    """
    config = featurizer.config
    shared = {"config": identity_of(config), "dataset": _describe_dataset(dataset)}
    found = describe_featurizer(featurizer)
    writers = [
        MemberWriter(
            folder / f"member_{number}",
            identity={**found, "seed": seed, **shared},
            n_rows=len(dataset),
            shard_rows=shard_rows,
            overwrite=overwrite,
        )
        for number, seed in zip(plan.members, plan.seeds, strict=True)
    ]
    unfinished = [writer for writer in writers if not writer.is_finished]
    if not unfinished:
        return
    _share_bank(writers, featurizer, dataset)
    featurize(
        featurizer,
        dataset,
        PassWriter(writers, plan.seeds),
        batch_size=batch_size,
        progress=progress,
        description=description,
    )
    for writer in unfinished:
        writer.finish(
            kernel_of(writer, proj_dim=config.proj_dim),
            {
                "checkpoint": _describe_checkpoint(folder, featurizer),
                "checkpoint_number": plan.checkpoint,
                **describe_source(dataset),
                **describe_processing(featurizer.processing_class, dataset.column_names),
                "coverage": featurizer.selection.coverage,
                "grad_dim": featurizer.selection.grad_dim,
                "versions": library_versions(),
                "hardware": hardware_name(featurizer.device),
                **_describe_bank(featurizer),
            },
            mask,
        )


def _share_bank(writers: Sequence[MemberWriter], featurizer: Featurizer, dataset: Dataset) -> None:
    """Give every member of a pass the same bank: the one an earlier call wrote, so that going on gives the same bytes, or a new one."""
    found = next((tensors for writer in writers if (tensors := writer.bank()) is not None), None)
    if found is not None:
        featurizer.use_bank(Bank.from_tensors(found))
    bank = featurizer.make_bank(dataset) if found is None else featurizer.bank
    for writer in writers:
        if bank is not None and writer.bank() is None:
            writer.write_bank(bank.tensors())


def _describe_bank(featurizer: Featurizer) -> dict[str, Any]:
    bank, config = featurizer.bank, featurizer.config
    return {} if bank is None else {"bank": {"seed": config.bank_seed, "size": len(bank.rows), "sha256": bank.sha256}}


def describe_featurizer(featurizer: Featurizer) -> dict[str, Any]:
    """What a feature means beyond the configuration, and what a query must share with it."""
    return {
        "task": featurizer.task.name,
        "seed": featurizer.seed,
        # Members without dropout say nothing of it, as those made before there was any.
        **({"dropout_seed": featurizer.dropout_seed} if featurizer.dropout_seed is not None else {}),
        "model_class": type(featurizer.model).__name__,
        "parameters": featurizer.selection.shapes,
        "model_sha256": featurizer.model_hash(),
        **({"gpu_model": featurizer.gpu_model} if featurizer.gpu_model is not None else {}),
    }


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
            passes.append(Pass(checkpoint, dropout_seed, (*before.members, number), (*before.seeds, seed)))
        else:
            passes.append(Pass(checkpoint, dropout_seed, (number,), (seed,)))
    return passes


def _describe_dataset(dataset: Dataset) -> dict[str, Any]:
    info = dataset.info
    return {
        "fingerprint": dataset._fingerprint,
        "name": info.dataset_name,
        "config": info.config_name,
        "split": str(dataset.split) if dataset.split is not None else None,
        "columns": dataset.column_names,
    }


def _describe_checkpoint(folder: Path, featurizer: Featurizer) -> dict[str, Any]:
    """Where to find the weights again: a repository, or a folder as seen from the index."""
    source = featurizer.source
    if source is not None and Path(source).exists():
        source = os.path.relpath(source, folder)
        return {"path": source, "repository": None, "revision": None}
    return {"path": None, "repository": source, "revision": featurizer.commit}


def recorded_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> str:
    """Return the folder or repository that a member of the index in `folder` was featurized with."""
    if checkpoint["path"] is not None:
        path = folder / checkpoint["path"]
        if not path.exists():
            raise FileNotFoundError(
                f"The checkpoint of {folder} was at {path}, and is not there now. Say where it is with `models`."
            )
        return str(path)
    if checkpoint["repository"] is None:
        raise ValueError(f"{folder} was made from a model in memory; give that model, or a folder it is saved in, as `models`.")
    return checkpoint["repository"]


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
