"""The processes of one run: which they are, how they wait for each other, and what they share.

They share a folder and exchange a few words: where each has got to, that it is alive, why it ended. Not a tensor passes between them,
so the backend of their process group does not matter, nor how long one takes.
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
_BEAT = 2.0  # seconds between two signs of life
_POLL = 0.05
_LATE = 30  # patiences for one that has yet to come: it may have other things to do first
_runs = 0  # entered in this process: all processes of a group enter the same ones


class ProcessEnded(ConnectionError):
    """Another process of this run has ended before it was done; the message says which, and why if that is known."""


class Processes:
    """The processes of one run, seen from one of them. Enter it for the length of the run.

    An error within the block is told to the others, and raised there as [`ProcessEnded`] when they next check or wait. So is the
    silence of a process that was killed, after a minute; the environment variable `HF_TRAK_PATIENCE` has other seconds.

    Args:
        rank (`int`): Which process this is.
        count (`int`): How many there are.
        store (`torch.distributed.Store`, *optional*): Where they leave word for each other; not needed by one process.
        device (`torch.device`, *optional*): What this process computes on; None for whatever it would use alone.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None, device: torch.device | None = None) -> None:
        self.rank = rank
        self.count = count
        self.device = device
        self._group_store = store
        self._lost: str | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that does what only one may do."""
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
        """Leave word of why this process ends, unless another was first."""
        reason = f": {str(error).rstrip('.')}" if isinstance(error, Exception) else ""
        why = self._lost or f"{_name_of(self.rank, self.count)} has ended with {type(error).__name__}{reason}."
        with suppress(RuntimeError):  # whoever keeps the words may be gone
            if not self._store.check(["failed"]):
                self._store.set("failed", json.dumps(why))

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of some work: a stretch of neighbours, empty where there are fewer items than processes."""
        return share(items, self.rank, self.count)

    def tell(self, value: T | None = None) -> T:
        """Return in every process the JSON value that the first one gives."""
        if self.count == 1:
            return value  # type: ignore[return-value]
        self._steps += 1
        key = f"word/{self._steps}"
        if self.is_first:
            self._store.set(key, json.dumps(value))
        self._wait_until(lambda: self._store.check([key]))
        return json.loads(self._store.get(key))

    def wait(self) -> None:
        """Wait until all processes have come here.

        Raises:
            ProcessEnded: If one never will.
        """
        if self.count == 1:
            return
        self._steps += 1
        key = f"step/{self._steps}"
        self._store.add(key, 1)
        self._wait_until(lambda: self._store.add(key, 0) >= self.count)

    def check(self) -> None:
        """Go on, unless another process has ended before it was done.

        Raises:
            ProcessEnded: Naming it.
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
        """Leave last if the others' words are kept here: when this process exits, they are gone."""
        with suppress(RuntimeError):
            left = self._store.add("left", 1)
            until = time.monotonic() + 5
            while self.is_first and left < self.count and time.monotonic() < until:
                time.sleep(_POLL)
                left = self._store.add("left", 0)


class _Watch(threading.Thread):
    """Gives signs of life, and looks for those of the others."""

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
            except Exception as error:  # whatever it is, nobody would tell the main thread of it
                me._lost = _host_is_gone(error)
            if self._ended.wait(self._beat):
                return

    def _find_failed(self) -> str | None:
        if not self._store.check(["failed"]):
            return None
        return json.loads(self._store.get("failed"))

    def _find_silent(self) -> str | None:
        """Count one's own beats between two of another's: a clock would mistake a machine that slept for one that died."""
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
    """Return part `index` of `count` stretches that differ by one item at most."""
    return items[len(items) * index // count : len(items) * (index + 1) // count]


def rank_and_size() -> tuple[int, int]:
    """Return this process's number and how many there are, by torch's process group."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_available() and group.is_initialized() else (0, 1)


def share_of(n_items: int) -> range:
    """Return this process's share of so many items: as even as can be, one after another, empty where there are too few."""
    rank, size = rank_and_size()
    return range(n_items * rank // size, n_items * (rank + 1) // size)


def gather(tensor: Tensor) -> list[Tensor]:
    """Return every process's tensor, by rank; they have one shape. All processes must call it."""
    size = rank_and_size()[1]
    if size == 1:
        return [tensor]
    device = _gathering_device()
    found = [torch.empty_like(tensor, device=device) for _ in range(size)]
    torch.distributed.all_gather(found, tensor.to(device).contiguous())
    return [part.to(tensor.device) for part in found]


def wait_for_all() -> None:
    """Return when every process has come here."""
    if rank_and_size()[1] > 1:
        gather(torch.zeros(1))


def _gathering_device() -> torch.device:
    """Return where the group's backend wants tensors."""
    if torch.distributed.get_backend() == "gloo":
        return torch.device("cpu")
    from accelerate import PartialState

    return PartialState().device


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
    "`Accelerator(cpu=True)` or nobody make the process group. docs/guides/processes.md has the commands that work."
)


def _check_launcher(wanted: int) -> None:
    """Refuse processes that were started together and not told of each other."""
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
    """Make the process group that the launcher prepared, on CPUs (gloo) where there is no GPU or none is wanted."""
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
