"""Scores of solved queries over an index's rows, as a matrix or as the top k of each query."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from hf_trak.distributed import gather, rank_and_size, share_of, wait_for_all
from hf_trak.hashing import hash_json
from hf_trak.runtime import Bar
from hf_trak.scoring.damping import hash_members
from hf_trak.scoring.documents import DocumentTopK
from hf_trak.scoring.ensemble import ScoreOptions, SolvedQueries, stream_scores
from hf_trak.scoring.memory import ScoringMemory, parse_memory
from hf_trak.scoring.top_k import TopK, merge_top_k, soft_threshold, soft_threshold_top_k, top_k
from hf_trak.storage.files import TEMPORARY
from hf_trak.storage.outputs import output_file, reserve, resumable_file
from hf_trak.storage.reader import MemberReader, block_size

if TYPE_CHECKING:
    from datasets import Dataset


_IN_MEMORY_BYTES = 1 << 30  # larger matrices are memory-mapped


def allocate(shape: tuple[int, int], *, at_most: int = _IN_MEMORY_BYTES) -> np.ndarray:
    """Return an empty float32 matrix. Above 1 GiB, or above `at_most` bytes, it is mapped to a temporary file, which is deleted with
    the array.

    Raises:
        OSError: If the disk of temporary files is full.
    """
    n_bytes = 4 * shape[0] * shape[1]
    if n_bytes <= min(at_most, _IN_MEMORY_BYTES):
        return np.empty(shape, dtype=np.float32)
    with tempfile.TemporaryFile() as file:
        # Writing to a memory map of a full disk would kill the process.
        reserve(file.fileno(), n_bytes, Path(tempfile.gettempdir()) / "scores")
        return np.memmap(file, dtype=np.float32, mode="r+", shape=shape)


def npy_bytes(shape: tuple[int, int]) -> int:
    """Return the maximum size of a `.npy` file of a float32 matrix."""
    return 4 * shape[0] * shape[1] + 4096


def map_npy(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """Turn an existing file into the `.npy` file of a float32 matrix, and map it. Its reserved space is kept."""
    with open(file, "r+b") as opened:
        np.lib.format.write_array_header_1_0(opened, {"descr": "<f4", "fortran_order": False, "shape": shape})
        opened.truncate(opened.tell() + 4 * shape[0] * shape[1])
    return np.load(file, mmap_mode="r+")


def check_keep(keep: int | None) -> None:
    """Check that at least one score per query is kept."""
    if keep is not None and keep < 1:
        raise ValueError(f"`soft_threshold` is the number of scores per query to keep, at least 1, but is {keep}.")


def soft_threshold_in_place(scores: np.ndarray, keep: int, *, at_most: int = _IN_MEMORY_BYTES) -> None:
    """Soft-threshold a few queries at a time, so a memory-mapped matrix is never completely in memory."""
    at_once = max(1, min(at_most, _IN_MEMORY_BYTES) // (16 * max(1, len(scores))))  # scores, sizes, signs and the result
    for start in range(0, scores.shape[1], at_once):
        columns = torch.from_numpy(np.array(scores[:, start : start + at_once]))
        scores[:, start : start + at_once] = soft_threshold(columns, keep).numpy()


_RECORD_SECONDS = 20.0  # the most work that a stopped process loses


def check_top_k(top_k: int) -> int:
    """Return `top_k` if it is valid."""
    if top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, but is {top_k}.")
    return top_k


@dataclass(frozen=True)
class Scorer:
    """Scores queries under some members, with a limit on memory.

    Args:
        n_query (`int`): Number of columns of the scores.
        top_k (`int`): Number of scores kept per query; 0 for all of them.
        max_memory (`int` or `str`, *optional*): Bytes, or a string with a unit; see [`AttributionIndex.score`].
        nearest (`int`): If above 0, a row has one score: the largest over this number of solved queries. 0 for a score per query.

    Raises:
        ValueError: If `max_memory` is too small. Nothing is computed then.
    """

    members: Sequence[MemberReader]
    options: ScoreOptions
    n_query: int
    top_k: int = 0
    max_memory: int | str | None = None
    progress: bool = True
    nearest: int = 0

    def __post_init__(self) -> None:
        if self.n_query < 1:
            raise ValueError("There are no queries: the dataset is empty.")
        check_keep(self.options.soft_threshold)
        self._given  # noqa: B018

    @property
    def n_rows(self) -> int:
        return self.members[0].n_rows

    @property
    def _kept(self) -> int:
        """The number of scores to keep per query; the soft threshold needs one more than it keeps."""
        return min(self.n_rows, max(self.top_k, (self.options.soft_threshold or 0) + 1)) if self.top_k else 0

    @property
    def _memory(self) -> ScoringMemory:
        block = block_size(self.members[0])
        return ScoringMemory(
            block_rows=block.rows,
            block_bytes=block.bytes,
            proj_dim=block.proj_dim,
            n_members=len(self.members),
            n_rows=self.n_rows,
            n_query=max(self.n_query, self.nearest),
            top_k=self._kept,
            leverage=self.options.leverage,
        )

    @property
    def _given(self) -> int:
        return self._memory.fit(parse_memory(self.max_memory))

    def matrix(
        self, solve: Callable[[], Sequence[SolvedQueries]], path: str | Path | None = None
    ) -> Float32[np.ndarray, "n_train n_query"]:
        """Return all scores. With `path`, several processes fill the file together.

        Args:
            solve (`Callable`): Returns the solved queries. It is called after space for the scores is reserved.

        Raises:
            OSError: If there is not enough space, or `path` cannot be written.
        """
        shape, free = (self.n_rows, self.n_query), self._given - self._memory.queries - self._memory.streaming
        everything = range(len(self.members[0].shard_paths))
        if path is None:
            scores = allocate(shape, at_most=free)
            self._fill(scores, solve(), everything)
            if self.options.soft_threshold is not None:
                soft_threshold_in_place(scores, self.options.soft_threshold, at_most=free)
            return scores
        target, is_first = Path(path), rank_and_size()[0] == 0
        if rank_and_size()[1] == 1:
            self._resume(target, solve, free)
            return np.load(target, mmap_mode="r+")
        with self._file(target, shape) as file:
            if is_first:
                map_npy(file, shape)
            wait_for_all()
            scores = np.load(file, mmap_mode="r+")
            self._fill(scores, solve(), share_of(len(everything)))
            wait_for_all()
            if is_first and self.options.soft_threshold is not None:
                soft_threshold_in_place(scores, self.options.soft_threshold, at_most=free)
            if isinstance(scores, np.memmap):
                scores.flush()
        wait_for_all()
        return np.load(target, mmap_mode="r+")

    def _resume(self, target: Path, solve: Callable[[], Sequence[SolvedQueries]], free: int) -> None:
        """Fill a file. If an earlier process for the same queries was stopped, continue its work."""
        shape, n_shards = (self.n_rows, self.n_query), len(self.members[0].shard_paths)
        with resumable_file(target, n_bytes=npy_bytes(shape)) as progress:
            solved = solve()
            done = progress.begin(self._identity(solved))
            scores: Any = np.load(progress.file, mmap_mode="r+") if done else map_npy(progress.file, shape)
            last = time.monotonic()

            def record(shard: int) -> None:
                nonlocal last
                if time.monotonic() - last >= _RECORD_SECONDS:
                    scores.flush()
                    progress.record(shard)
                    last = time.monotonic()

            self._fill(scores, solved, range(done, n_shards), record)
            if self.options.soft_threshold is not None:
                if progress.done:
                    progress.record(0)  # thresholding is in place, so a process that is stopped during it starts again
                soft_threshold_in_place(scores, self.options.soft_threshold, at_most=free)
                scores.flush()

    def _identity(self, solved: Sequence[SolvedQueries]) -> str:
        """Return a hash of everything that determines the scores before the soft threshold."""
        queries = hashlib.sha256()
        for one in solved:
            queries.update(one.preconditioned.contiguous().numpy().tobytes())
        return hash_json([hash_members(self.members), queries.hexdigest(), repr(self.options), self.n_query, self.nearest])

    @contextmanager
    def _file(self, target: Path, shape: tuple[int, int]) -> Iterator[Path]:
        """Yield the file that becomes `target` when it is complete. The first process creates it; all processes get the same file."""
        rank, size = rank_and_size()
        unfinished = None
        if size > 1:
            first = int(gather(torch.tensor([os.getpid()]))[0])
            unfinished = target.with_name(f".{target.name}.shared.{first}{TEMPORARY}")
        if rank == 0:
            with output_file(target, n_bytes=npy_bytes(shape), unfinished=unfinished) as file:
                yield file
        else:
            assert unfinished is not None
            yield unfinished

    def _fill(
        self,
        scores: np.ndarray,
        solved: Sequence[SolvedQueries],
        shards: range,
        on_shard: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Fill the rows of some shards. `on_shard` is called with the number of filled shards."""
        shard_rows = self.members[0].identity["shard_rows"]
        row = shards.start * shard_rows
        for block in self._blocks(solved, shards):
            scores[row : row + len(block)] = block.numpy()
            row += len(block)
            if row % shard_rows == 0:
                on_shard(row // shard_rows)
        if isinstance(scores, np.memmap):
            scores.flush()

    def best(self, solved: Sequence[SolvedQueries]) -> tuple[TopK, TopK]:
        """Return each query's `top_k` proponents and opponents. Each of several processes ranks a part of the rows; all return the whole result."""
        shards = share_of(len(self.members[0].shard_paths))
        first_row = shards.start * self.members[0].identity["shard_rows"]
        blocks = self._blocks(solved, shards)
        mine = top_k(blocks, self._kept, first_row=first_row) if len(shards) else _nothing(self.n_query)
        pair = _merge_ranks(mine[0], self._kept, largest=True), _merge_ranks(mine[1], self._kept, largest=False)
        keep = self.n_rows if self.options.soft_threshold is None else self.options.soft_threshold
        return soft_threshold_top_k(pair, keep, self.top_k)

    def stream(self, solved: Sequence[SolvedQueries]) -> Iterator[Float[Tensor, "_ n_query"]]:
        """Yield the scores of all training rows, some rows at a time; of several processes, each computes all."""
        return self._blocks(solved, range(len(self.members[0].shard_paths)))

    def _blocks(self, solved: Sequence[SolvedQueries], shards: range) -> Iterator[Float[Tensor, "_ n_query"]]:
        memory = self._memory
        scores = stream_scores(
            self.members,
            solved,
            out_to_loss_power=self.options.out_to_loss_power,
            combination=self.options.combination,
            shards=shards,
            read_ahead=self._given >= memory.least + memory.block,
        )
        n_rows = min(self.n_rows, shards.stop * self.members[0].identity["shard_rows"])
        n_rows -= min(self.n_rows, shards.start * self.members[0].identity["shard_rows"])
        with Bar(total=n_rows, unit="rows", desc="Scoring", disable=not self.progress) as bar:
            for block in scores:
                yield block.amax(1, keepdim=True) if self.nearest else block
                bar.update(len(block))


def _nothing(n_query: int) -> tuple[TopK, TopK]:
    empty = TopK(torch.zeros(n_query, 0, dtype=torch.int64), torch.zeros(n_query, 0))
    return empty, empty


def _merge_ranks(mine: TopK, k: int, *, largest: bool) -> TopK:
    """Return the first `k` over all processes. Processes have consecutive rows, so ties keep the order of the training set."""
    if rank_and_size()[1] == 1:
        return mine
    missing = (0, k - mine.rows.shape[1])  # so that all have the same shape; all processes together have at least `k` real ones
    pad = torch.nn.functional.pad
    rows = gather(pad(mine.rows, missing, value=-1))
    scores = gather(pad(mine.scores, missing, value=-torch.inf if largest else torch.inf))
    return merge_top_k([TopK(*part) for part in zip(rows, scores, strict=True)], k, largest=largest)


def to_hits(
    best: tuple[TopK, TopK] | tuple[DocumentTopK, DocumentTopK], output: Float[np.ndarray, " n_query"] | None
) -> Dataset:
    """Return the Dataset of [`AttributionIndex.attribute`]."""
    from datasets import Dataset

    columns = {"query_id": np.arange(len(best[0].rows))}
    if output is not None:
        columns["query_output"] = output
    for kind, found in (("proponent", best[0]), ("opponent", best[1])):
        columns[f"{kind}s"] = (found.documents if isinstance(found, DocumentTopK) else found.rows).numpy()
        columns[f"{kind}_scores"] = found.scores.float().numpy()
        if isinstance(found, DocumentTopK):
            columns[f"{kind}_rows"] = found.rows.numpy()
    return Dataset.from_dict(columns)
