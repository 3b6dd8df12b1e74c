"""The processes of one run: their ranks, barriers, and division of work.

They share a folder, and exchange only small messages through a store: progress, heartbeats and the reason of an error. They exchange no
tensors, so neither the backend of their process group nor the duration of one process matters.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_PATIENCE = "HF_TRAK_PATIENCE"
_BEAT = 2.0  # seconds between two heartbeats
_POLL = 0.05
_LATE = 30  # how many times longer to wait for a process that has not started yet: it may have other work first
_runs = 0  # number of runs entered in this process; all processes of a group enter the same runs


class ProcessEnded(ConnectionError):
    """Another process of this run ended early. The message says which, and why if that is known."""


class Processes:
    """The processes of one run. Use it as a context manager for the duration of the run.

    If a process fails inside the block, the others raise [`ProcessEnded`] at their next check or wait. The same happens if a process was
    killed, after a minute without heartbeats; the environment variable `HF_TRAK_PATIENCE` sets another number of seconds.

    Args:
        rank (`int`): The number of this process.
        count (`int`): The number of processes.
        store (`torch.distributed.Store`, *optional*): The store for messages; not needed for a single process.
        device (`torch.device`, *optional*): The device of this process; None for the default device.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None, device: torch.device | None = None) -> None:
        self.rank = rank
        self.count = count
        self.device = device
        self._group_store = store
        self._lost: str | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the first process, which does work that only one process may do."""
        return self.rank == 0

    def __enter__(self) -> Processes:
        if self.count > 1:
            global _runs
            _runs += 1
            self._store = dist.PrefixStore(f"hf_trak/{_runs}", self._group_store)
            self._steps = 0
            self._watch = _Watch(self)
            self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.count == 1:
            return
        try:
            if error is None:
                self.wait()
            else:
                self._tell_why(error)
        finally:
            self._watch.stop()
            self._leave()

    def _tell_why(self, error: BaseException) -> None:
        """Store the reason why this process ends, unless another process was first."""
        reason = f": {str(error).rstrip('.')}" if isinstance(error, Exception) else ""
        why = self._lost or f"{_name_of(self.rank, self.count)} has ended with {type(error).__name__}{reason}."
        with suppress(RuntimeError):  # the process with the store may have ended
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps(why))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's share of some items: consecutive ones; empty if there are fewer items than processes."""
        return share(items, self.rank, self.count)

    def tell(self, value: T | None = None) -> T:
        """Broadcast a JSON value from the first process to all."""
        if self.count == 1:
            return value  # type: ignore[return-value]
        self._steps += 1
        key = f"word/{self._steps}"
        if self.is_first:
            self._store.set(key, json.dumps(value))
        self._wait_until(lambda: self._store.check([key]))
        return json.loads(self._store.get(key))

    def wait(self) -> None:
        """Wait until all processes have called this.

        Raises:
            ProcessEnded: If a process has ended.
        """
        if self.count == 1:
            return
        self._steps += 1
        key = f"step/{self._steps}"
        self._store.add(key, 1)
        self._wait_until(lambda: self._store.add(key, 0) >= self.count)

    def check(self) -> None:
        """Check that no other process has ended early.

        Raises:
            ProcessEnded: Naming the process.
        """
        if self._lost is not None:
            raise ProcessEnded(f"{self._lost} This process ends too; what was finished is kept. Run the same again to go on.")

    def _wait_until(self, condition: Any) -> None:
        pause = _POLL
        while True:
            try:
                if condition():
                    return
            except RuntimeError as error:
                self._lost = self._lost or _host_is_gone(error)
            self.check()
            time.sleep(pause)
            pause = min(2 * pause, 1.0)

    def _leave(self) -> None:
        """Wait for the others if this process holds the store, because the store ends with this process."""
        with suppress(RuntimeError):
            left = self._store.add("left", 1)
            until = time.monotonic() + 5
            while self.is_first and left < self.count and time.monotonic() < until:
                time.sleep(_POLL)
                left = self._store.add("left", 0)


class _Watch(threading.Thread):
    """Sends heartbeats, and watches those of the other processes."""

    def __init__(self, processes: Processes) -> None:
        super().__init__(name="hf_trak-watch", daemon=True)
        self._processes = processes
        self._store = processes._store.clone()  # type: ignore[attr-defined]
        self._ended = threading.Event()
        patience = float(os.environ.get(_PATIENCE, "60"))
        self._beat = min(_BEAT, patience / 3)
        self._patience = max(3, round(patience / self._beat))
        self._beats: dict[int, tuple[bytes, int]] = {}

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def run(self) -> None:
        me, number = self._processes, 0
        while me._lost is None:
            number += 1
            try:
                self._store.set(f"alive/{me.rank}", json.dumps([number, _name_of(me.rank, me.count)]))
                me._lost = self._find_failed() or self._find_silent()
            except Exception as error:  # catch everything, because nothing else would report an error to the main thread
                me._lost = _host_is_gone(error)
            if self._ended.wait(self._beat):
                return

    def _find_failed(self) -> str | None:
        if not self._store.check(["failed"]):
            return None
        return json.loads(self._store.get("failed"))

    def _find_silent(self) -> str | None:
        """Count own heartbeats between two of another process. A clock would count the time in which a machine is suspended."""
        for rank in range(self._processes.count):
            key = f"alive/{rank}"
            found = self._store.get(key) if self._store.check([key]) else b""
            last, beats = self._beats.get(rank, (found, 0))
            self._beats[rank] = (found, beats + 1 if found == last else 0)
            if self._beats[rank][1] >= self._patience * (1 if found else _LATE):
                seconds = self._beats[rank][1] * self._beat
                return f"{self._who(rank)} has not been heard of for {seconds:.0f} s: it was killed, or is out of reach."
        return None

    def _who(self, rank: int) -> str:
        key = f"alive/{rank}"
        known = self._store.check([key])
        return json.loads(self._store.get(key))[1] if known else f"Process {rank} of {self._processes.count}"


def _name_of(rank: int, count: int) -> str:
    return f"Process {rank} of {count} (pid {os.getpid()} on {socket.gethostname()})"


def _host_is_gone(error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"The process that the others meet at has ended: the first one, or the launcher ({reason[:200]})."


def share(items: Sequence[T], index: int, count: int) -> Sequence[T]:
    """Return part `index` of `count` consecutive parts, whose sizes differ by at most one item."""
    return items[len(items) * index // count : len(items) * (index + 1) // count]


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes in torch's process group."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_available() and group.is_initialized() else (0, 1)


def share_of(n_items: int) -> range:
    """Return this process's share of `n_items` items: consecutive and of almost equal size; empty if there are too few."""
    rank, size = rank_and_size()
    return range(n_items * rank // size, n_items * (rank + 1) // size)


def gather(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, by rank. They have the same shape. All processes must call this."""
    size = rank_and_size()[1]
    if size == 1:
        return [tensor]
    device = _gathering_device()
    found = [torch.empty_like(tensor, device=device) for _ in range(size)]
    torch.distributed.all_gather(found, tensor.to(device).contiguous())
    return [part.to(tensor.device) for part in found]


def wait_for_all() -> None:
    """Wait until all processes have called this."""
    if rank_and_size()[1] > 1:
        gather(torch.zeros(1))


def _gathering_device() -> torch.device:
    """Return the device that the group's backend needs for tensors."""
    if torch.distributed.get_backend() == "gloo":
        return torch.device("cpu")
    from accelerate import PartialState

    return PartialState().device


def launched_processes() -> int:
    """Return the number of processes that a launcher has set in WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def current_processes() -> Processes:
    """Return the processes of this launch, and create the process group if there is none yet.

    Raises:
        ValueError: If a launcher started several processes without a common group, so that each would do all the work.
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
    """Return the number of processes that accelerate has found, if it is initialised.

    On a machine without GPUs, a plain `Accelerator()` treats each process as the only one, and so as the main process.
    """
    from accelerate import PartialState

    return PartialState().num_processes if PartialState._shared_state else None


_WAY_OUT = (
    "Without a GPU, start them with `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N`, and let "
    "`Accelerator(cpu=True)` or nobody make the process group. docs/guides/processes.md has the commands that work."
)


def _check_launcher(wanted: int) -> None:
    """Refuse processes that were started together without a common WORLD_SIZE."""
    if wanted == 1:
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if int(os.environ.get(name, "1")) > 1:
                raise ValueError(
                    f"{os.environ[name]} processes were started ({name}), but WORLD_SIZE is not set, so that each would do the work "
                    "of all. Start one launcher per machine (`srun --ntasks-per-node 1 torchrun ...`), or an array of jobs with "
                    "--shard-index and --num-shards: docs/guides/processes.md."
                )
        return
    lacking = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if lacking:
        raise ValueError(
            f"{wanted} processes were launched (WORLD_SIZE), but {', '.join(lacking)} are not set: each would do the work of all. "
            "Start them with `accelerate launch` or `torchrun`, or unset WORLD_SIZE to run in one process."
        )


def _join() -> None:
    """Create the process group for the launcher's settings; with gloo if there is no GPU or the CPU was chosen."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "Featurizing does not run under DeepSpeed: it needs no optimizer, and each process loads the whole model. Leave out "
            "--use_deepspeed; if the checkpoint is of ZeRO-3, gather it to a folder first (docs/guides/processes.md)."
        )
    from accelerate import PartialState

    cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    PartialState(cpu=cpu)
    atexit.register(_part)


def _part() -> None:
    """Destroy the process group, because torch warns about a group that still exists at exit."""
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
    """Return a warning if `accelerate launch --cpu --num_processes N` started only this process, which it does silently."""
    alone = "WORLD_SIZE" not in os.environ and not (dist.is_available() and dist.is_initialized())
    # accelerate 1.15 sets these variables for several processes and not for one, but then starts one.
    launched = os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_PORT" in os.environ
    return f"`accelerate launch --cpu --num_processes N` starts one process. {_WAY_OUT}" if alone and launched else None
