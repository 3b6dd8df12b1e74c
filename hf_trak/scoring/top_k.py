"""The largest and smallest scores of each query, found block by block, and soft thresholds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def soft_threshold(scores: Float[Tensor, "n_train n_query"], keep: int) -> Float[Tensor, "n_train n_query"]:
    r"""Move every score of a query towards 0 by the same threshold, so that `keep` of them stay nonzero.

    $S(\tau; t) = \text{sign}(\tau)\max(|\tau| - t, 0)$ with $t$ the `keep + 1`-th largest $|\tau|$ of the query. Source: Park et al.
    (2023), [TRAK](https://huggingface.co/papers/2303.14186), step 5, which chooses the number by cross-validation.
    """
    if keep >= len(scores):
        return scores
    return _shrink(scores, scores.abs().topk(keep + 1, dim=0).values[-1])


def _shrink(scores: Float[Tensor, "..."], threshold: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return scores.sign() * (scores.abs() - threshold).clamp_min(0)


def soft_threshold_top_k(best: tuple[TopK, TopK], keep: int, k: int) -> tuple[TopK, TopK]:
    """Return the same as [`top_k`] of scores after [`soft_threshold`]: the first `k` of `best`, moved towards 0.

    Args:
        best (`tuple`): Proponents and opponents, at least `keep + 1` of each, or all training rows.
    """
    proponents, opponents = best
    # Proponents and opponents may overlap. Count no row twice.
    sizes = torch.cat([proponents.scores.clamp_min(0), -opponents.scores.clamp_max(0)], 1)
    largest = sizes.topk(min(keep + 1, sizes.shape[1]), dim=1).values
    threshold = largest[:, keep:].sum(1, keepdim=True) if proponents.rows.shape[1] > keep else torch.zeros(len(sizes), 1)
    shrunk = [TopK(side.rows[:, :k], _shrink(side.scores[:, :k], threshold.to(side.scores))) for side in best]
    return shrunk[0], shrunk[1]


RANKED_AT_ONCE = 256  # queries whose candidates are sorted together; limits the memory of sorting


class TopK(NamedTuple):
    """The extreme scores of each query, the most extreme first. Ties keep the order of the training set."""

    rows: Int64[Tensor, "n_query top_k"]
    scores: Float[Tensor, "n_query top_k"]


def top_k(blocks: Iterator[Float[Tensor, "_ n_query"]], k: int, *, first_row: int = 0) -> tuple[TopK, TopK]:
    """Return the `k` largest (proponents) and `k` smallest (opponents) scores of each query, holding one block at a time.

    With fewer than `k` training rows, all of them are returned.

    Args:
        first_row (`int`): Number of the first block's first row.

    Raises:
        ValueError: If there are no rows, or a score is not finite.
    """
    sides: dict[bool, list[_Extremes]] = {True: [], False: []}
    row = first_row
    for block in blocks:
        scores = block.T.contiguous()  # one query's scores side by side
        if not scores.sum().isfinite():
            raise ValueError(
                f"Scores of training rows {row} to {row + len(block) - 1} are not finite. Look for NaN, or for numbers too large for "
                "float32, in the features of these rows and of the queries."
            )
        for number, some in enumerate(scores.split(RANKED_AT_ONCE)):
            for largest, side in sides.items():
                if number == len(side):
                    side.append(_Extremes(some, k, largest=largest))
                side[number].add(some, row)
        row += len(block)
    if row == first_row:
        raise ValueError("There are no training rows to rank.")
    proponents, opponents = ([extremes.result() for extremes in side] for side in sides.values())
    return _stack(proponents), _stack(opponents)


def _stack(parts: Sequence[TopK]) -> TopK:
    return TopK(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


class _Extremes:
    """The `k` most extreme scores of some queries, among the blocks added so far.

    A score that is not beyond the `k`-th of its query is dropped immediately; it comes later in the training set, so it also loses ties.
    Other scores wait in a buffer of size `k`. When it is full, they are sorted and merged.
    """

    def __init__(self, scores: Float[Tensor, "n_query rows"], k: int, *, largest: bool) -> None:
        self.k = k
        self.largest = largest
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # queries, rows and scores; the first ones are kept
        self.n_waiting = 0
        self.last = scores.new_full((len(scores), 1), -math.inf if largest else math.inf)  # the k-th of each query

    def add(self, scores: Float[Tensor, "n_query rows"], first_row: int) -> None:
        """Add a block of scores."""
        query, row = torch.where(scores > self.last if self.largest else scores < self.last)
        self.waiting.append((query, first_row + row, scores[query, row]))
        self.n_waiting += len(query)
        if self.n_waiting >= self.k * len(scores):
            self._sort_in()

    def _sort_in(self) -> None:
        """Keep the first `k` of each query, sorted by query, then by score, then by row (the order in which they were added)."""
        query, row, score = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        order = score.sort(stable=True, descending=self.largest).indices
        order = order[query[order].sort(stable=True).indices]
        counts = query.bincount(minlength=len(self.last))
        place = torch.arange(len(query)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        order = order[place < self.k]
        self.waiting, self.n_waiting = [(query[order], row[order], score[order])], 0
        if len(order) == self.k * len(self.last):
            self.last = score[order].view(-1, self.k)[:, -1:].contiguous()

    def result(self) -> TopK:
        """Return the extreme scores."""
        self._sort_in()
        _, rows, scores = self.waiting[0]
        return TopK(rows.view(len(self.last), -1), scores.view(len(self.last), -1))


def merge_top_k(parts: Sequence[TopK], k: int, *, largest: bool) -> TopK:
    """Return the first `k` over several parts of the training set, which are ranked separately and given in order."""
    scores, order = torch.cat([part.scores for part in parts], 1).sort(dim=1, descending=largest, stable=True)
    return TopK(torch.cat([part.rows for part in parts], 1).gather(1, order[:, :k]), scores[:, :k])
