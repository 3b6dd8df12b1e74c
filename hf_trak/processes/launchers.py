"""Which processes were started together with this one, by `accelerate launch`, `torchrun` or a scheduler, and whether they know it."""

from __future__ import annotations

import atexit
import os
from typing import Any

import torch
import torch.distributed as dist

from hf_trak.processes.group import Processes


def launched_processes() -> int:
    """Return how many processes a launcher says it has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def current_processes() -> Processes:
    """Return the processes this one was launched with, joining them where nobody has yet.

    Raises:
        ValueError: If a launcher started several, but they do not know of each other: they would all do the same work.
    """
    wanted = launched_processes()
    if not (dist.is_available() and dist.is_initialized()):
        _check_launcher(wanted)
        if wanted == 1:
            return Processes()
        _join()
    found = _known_to_accelerate() or (dist.get_world_size() if dist.is_initialized() else 1)
    if "WORLD_SIZE" in os.environ and found != wanted:
        raise ValueError(
            f"{wanted} processes were launched (WORLD_SIZE), but they know of {found}: each would do the work of all. {_WAY_OUT}"
        )
    return Processes(dist.get_rank(), found, _group_store(), _device()) if found > 1 else Processes()


def _known_to_accelerate() -> int | None:
    """Return how many processes accelerate believes in, if it has been asked to join them.

    On a machine without GPUs a plain `Accelerator()` joins them, and then takes each for the only one, and so for the main one.
    """
    from accelerate import PartialState

    return PartialState().num_processes if PartialState._shared_state else None


_WAY_OUT = (
    "Without a GPU, start them with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`, and let "
    "`Accelerator(cpu=True)` or nobody make the process group. docs/processes.md has the commands that work."
)


def _check_launcher(wanted: int) -> None:
    """Refuse processes that were started together and not told of each other."""
    if wanted == 1:
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if int(os.environ.get(name, "1")) > 1:
                raise ValueError(
                    f"{os.environ[name]} processes were started ({name}), but WORLD_SIZE is not set, so that each would do the work "
                    "of all. Start one launcher per machine (`srun --ntasks-per-node 1 torchrun ...`), or an array of jobs with "
                    "--shard-index and --num-shards: docs/processes.md."
                )
        return
    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise ValueError(
            f"{wanted} processes were launched (WORLD_SIZE), but {', '.join(lacking)} are not set: each would do the work of all. "
            "Start them with `accelerate launch` or `torchrun`, or unset WORLD_SIZE to run in one process."
        )


def _join() -> None:
    """Make the process group that the launcher prepared, on CPUs (gloo) where there is no GPU or none is wanted."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "Featurizing does not run under DeepSpeed: it needs no optimizer, and each process loads the whole model. Leave out "
            "--use_deepspeed; if the checkpoint is of ZeRO-3, gather it to a folder first (docs/processes.md)."
        )
    from accelerate import PartialState

    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    PartialState(cpu=cpu)
    atexit.register(_part)


def _part() -> None:
    """Take leave of the others: a group that is left to the end of the process complains."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _group_store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def _device() -> torch.device:
    from accelerate import PartialState

    if PartialState._shared_state:
        device = PartialState().device
    else:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return device if device.type == "cuda" else torch.device("cpu")


def warn_of_lone_process() -> str | None:
    """Return a warning if `accelerate launch --cpu --num_processes N` started this process alone, which it does without a word."""
    alone = "WORLD_SIZE" not in os.environ and not (dist.is_available() and dist.is_initialized())
    # What accelerate 1.15 sets for several processes, but not for one, and then starts one.
    launched = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
    return f"`accelerate launch --cpu --num_processes N` starts one process. {_WAY_OUT}" if alone and launched else None
