"""Soft thresholds: all scores of a query move towards 0 until no more than a few are left."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hf_trak.scoring.top_k import TopK


def soft_threshold(scores: Float[Tensor, "n_train n_query"], keep: int) -> Float[Tensor, "n_train n_query"]:
    r"""Move every score towards 0 by its query's threshold, at which `keep` of them stay nonzero.

    $S(\tau; t) = \text{sign}(\tau)\max(|\tau| - t, 0)$ with $t$ the `keep + 1`-th largest $|\tau|$ of the query. Source: Park et al.
    (2023), [TRAK](https://huggingface.co/papers/2303.14186), step 5, which picks the number by cross-validation.
    """
    if keep >= len(scores):
        return scores
    return _shrink(scores, scores.abs().topk(keep + 1, dim=0).values[-1])


def _shrink(scores: Float[Tensor, "..."], threshold: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    return scores.sign() * (scores.abs() - threshold).clamp_min(0)


def soft_threshold_top_k(best: tuple[TopK, TopK], keep: int, k: int) -> tuple[TopK, TopK]:
    """Return what [`top_k`] of [`soft_threshold`]ed scores would: the first `k` of `best`, moved towards 0.

    Args:
        best (`tuple`): Proponents and opponents, at least `keep + 1` of each, or all training rows.
    """
    proponents, opponents = best
    # No row is counted twice where the two overlap.
    sizes = torch.cat([proponents.scores.clamp_min(0), -opponents.scores.clamp_max(0)], 1)
    largest = sizes.topk(min(keep + 1, sizes.shape[1]), dim=1).values
    threshold = largest[:, keep:].sum(1, keepdim=True) if proponents.rows.shape[1] > keep else torch.zeros(len(sizes), 1)
    shrunk = [TopK(side.rows[:, :k], _shrink(side.scores[:, :k], threshold.to(side.scores))) for side in best]
    return shrunk[0], shrunk[1]
