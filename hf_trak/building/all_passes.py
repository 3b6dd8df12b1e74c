"""The loop over an index's passes of gradients: by one process, by several that know of each other, or by one job of an array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hf_trak.building.one_pass import build_part_of_pass, build_pass
from hf_trak.building.parts import Part, forget_parts, remember_parts
from hf_trak.config import CONFIG_NAME, TrakConfig
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.featurizing.placement import check_whole
from hf_trak.members import lay_out_passes
from hf_trak.processes.group import Processes
from hf_trak.sources.checkpoints import check_is_checkpoint
from hf_trak.storage.files import TEMPORARY, discard, write_folder, write_json, write_json_once
from hf_trak.storage.layout import member_folders
from hf_trak.tasks import draw_rows, needs_bank

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_trak.tasks import Task


def begin_index(folder: Path, config: TrakConfig, n_members: int, *, overwrite: bool, shared: bool = False) -> None:
    """Make sure `folder` is new, or holds this very index, perhaps unfinished.

    Args:
        shared (`bool`): Other processes may be beginning it at this moment. Nothing is ever replaced then.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, where an index needs a folder; choose another name.")
    write_folder(folder)
    is_new = all(path.name.endswith(TEMPORARY) for path in folder.iterdir())
    if is_new and write_json_once(folder / CONFIG_NAME, config.to_dict()):
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
    if not shared:
        write_json(folder / CONFIG_NAME, config.to_dict())


def build_members(
    folder: Path,
    checkpoints: Sequence[PreTrainedModel | str | Path],
    dataset: Dataset,
    config: TrakConfig,
    *,
    processes: Processes,
    part: Part | None = None,
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
    """Featurize a dataset for every member of an index; see [`AttributionIndex.build`], whose arguments these are.

    Args:
        processes ([`Processes`]): Among which shards are divided, and of which the first does what only one may do.
        part ([`Part`], *optional*): Make only this part of the shards, in a folder that others write to, and leave it unfinished.
    """
    if not checkpoints:
        raise ValueError("`models` is empty: give at least one checkpoint.")
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: there is nothing to featurize.")
    _check_masks(masks, n_checkpoints=len(checkpoints), n_rows=len(dataset))
    for checkpoint in checkpoints:
        if isinstance(checkpoint, (str, Path)):  # the last one, too, is looked up before work begins
            check_is_checkpoint(str(checkpoint), revision)
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
            device=processes.device,
        )
        check_whole(featurizer.model)
        featurizer.check(dataset)
        if number == 0:
            if needs_bank(featurizer.task):
                draw_rows(
                    len(dataset), config.bank_size, config.bank_seed
                )  # a bank that cannot be is refused before a file is written
            config = replace(config, task=featurizer.task.name)
            n_members = passes[-1].members[-1] + 1
            if part is not None:
                begin_index(folder, config, n_members, overwrite=False, shared=True)
                remember_parts(folder, part, n_members)
            elif processes.is_first:
                begin_index(folder, config, n_members, overwrite=overwrite)
            processes.wait()
        build = (
            partial(build_pass, processes=processes, overwrite=overwrite)
            if part is None
            else partial(build_part_of_pass, part=part)
        )
        mask = None if masks is None else masks[plan.checkpoint]
        description = f"Featurizing {number + 1}/{len(passes)}"
        build(folder, plan, featurizer, dataset, mask=mask, description=description, **options)
    if part is None and processes.is_first:
        forget_parts(folder)


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
