r"""Scores from features: a stream of blocks of training rows against a few preconditioned queries.

    τ(z_i, z) = [1/M Σ_m φ_m(z_i)ᵀ (K_m + λ μ̄_m I)⁻¹ φ_m(z)] · [1/M Σ_m Q_m,ii]

A product of two means over members, as in the paper (Park et al., 2023) and MadryLab/trak. A positive score marks a proponent:
training on z_i raises the query's output. The second mean may be taken to a power below 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from hf_trak.linalg import factor, solve


class MemberBlock(NamedTuple):
    """Some training rows of one member."""

    features: Float[Tensor, "rows proj_dim"]
    out_to_loss: Float[Tensor, " rows"]
    leverage: Float64[Tensor, " rows"] | None = None
    """Where given, influence is divided by 1 − leverage."""


def residual_weights(out_to_loss: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return R = p(1 − p) of each row, from 1 − p."""
    return out_to_loss * (1 - out_to_loss)


def precondition(
    features: Float[Tensor, "n_query proj_dim"],
    kernel: Float64[Tensor, "proj_dim proj_dim"],
    *,
    n_rows: int,
    damping: float,
    reference_rescale: bool = False,
) -> Float64[Tensor, "n_query proj_dim"]:
    r"""Right-multiply query features by $(\Phi^\top\Phi + \lambda\bar\mu I)^{-1}$.

    Args:
        kernel (`torch.Tensor`): $\Phi^\top\Phi$, summed over the training set.
        n_rows (`int`): Rows in that sum.
        damping (`float`): $\lambda$, as a multiple of the kernel's mean nonzero eigenvalue. The paper uses 0.
        reference_rescale (`bool`): Divide the inverse by its mean absolute entry, only to reproduce MadryLab/trak's numbers.

    Raises:
        ValueError: If the damped kernel is singular.
    """
    cholesky = factor(kernel, n_rows=n_rows, damping=damping)
    preconditioned = solve(cholesky, features)
    # Differs from the reference: MadryLab/trak divides each member's inverse kernel by its mean absolute entry since version 0.2,
    # which weights members of an ensemble by the squared size of their gradients.
    if reference_rescale:
        preconditioned = preconditioned / torch.cholesky_inverse(cholesky).abs().mean()
    return preconditioned


def weigh(out_to_loss: Float64[Tensor, "*rows"], power: float) -> Float64[Tensor, "*rows"]:
    """Return `out_to_loss` to a power, its sign kept."""
    return out_to_loss if power == 1 else out_to_loss.sign() * out_to_loss.abs() ** power


def score_blocks(
    blocks: Iterator[Sequence[MemberBlock]],
    preconditioned: Sequence[Float64[Tensor, "n_query proj_dim"]],
    *,
    out_to_loss_power: float = 1.0,
) -> Iterator[Float64[Tensor, "_ n_query"]]:
    """Yield the scores of each block of training rows, in float64.

    Args:
        blocks (`Iterator`): For each block of rows, those rows of every member.
        preconditioned (`Sequence`): The queries of every member, from [`precondition`].
        out_to_loss_power (`float`): What the mean `out_to_loss` is raised to. The paper has 1.
    """
    for members in blocks:
        influence = torch.stack([_influence(*pair) for pair in zip(members, preconditioned, strict=True)]).mean(0)
        out_to_loss = torch.stack([block.out_to_loss.double() for block in members]).mean(0)
        yield influence * weigh(out_to_loss, out_to_loss_power).unsqueeze(1)


def _influence(block: MemberBlock, preconditioned: Float64[Tensor, "n_query proj_dim"]) -> Float64[Tensor, "rows n_query"]:
    influence = block.features.double() @ preconditioned.T
    return influence if block.leverage is None else influence / (1 - block.leverage).unsqueeze(1)


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


class TopK(NamedTuple):
    """The extreme scores of each query, the most extreme first; ties keep the training set's order."""

    rows: Int64[Tensor, "n_query top_k"]
    scores: Float64[Tensor, "n_query top_k"]


def top_k(blocks: Iterator[Float64[Tensor, "_ n_query"]], k: int) -> tuple[TopK, TopK]:
    """Return the `k` largest (proponents) and `k` smallest (opponents) scores of each query, holding one block at a time.

    With fewer than `k` training rows, all of them are returned.
    """
    proponents: TopK | None = None
    opponents: TopK | None = None
    first_row = 0
    for block in blocks:
        rows = torch.arange(first_row, first_row + len(block)).expand(block.shape[1], -1)
        first_row += len(block)
        proponents = _merge(proponents, TopK(rows, block.T), k, descending=True)
        opponents = _merge(opponents, TopK(rows, block.T), k, descending=False)
    if proponents is None or opponents is None:
        raise ValueError("There are no training rows to rank.")
    return proponents, opponents


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


def _merge(best: TopK | None, block: TopK, k: int, *, descending: bool) -> TopK:
    if best is not None:
        block = TopK(torch.cat([best.rows, block.rows], 1), torch.cat([best.scores, block.scores], 1))
    scores, order = block.scores.sort(dim=1, descending=descending, stable=True)
    return TopK(block.rows.gather(1, order[:, :k]), scores[:, :k])
