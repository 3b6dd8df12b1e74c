r"""Scores from features: products of blocks of training rows with preconditioned queries.

    τ(z_i, z) = [1/M Σ_m φ_m(z_i)ᵀ (K_m + λ μ̄_m I)⁻¹ φ_m(z)] · [1/M Σ_m Q_m,ii]

This is a product of two means over members, as in the paper (Park et al., 2023) and MadryLab/trak; K_m is the Gram matrix of member m. A
positive score marks a proponent: training on z_i raises the query's output. Q may have a power below 1. By default, members are combined
by another formula:

    τ(z_i, z) = 1/M Σ_m Q_m,ii · r̄(z) / r_m(z) · φ_m(z_i)ᵀ (K_m + λ μ̄_m I)⁻¹ φ_m(z)

Here r_m(z) is the root mean square over the training set of φ_m(z_i)ᵀ (K_m + λ μ̄_m I)⁻¹ φ_m(z), and r̄(z) is its mean over members. So
members have equal weight whatever the size of their influences. A member with a small 1 − p of an example adds little to its score.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from hf_trak.linalg import factor, solve
from hf_trak.matmul import inner_products

SOLVED_AT_ONCE = 1024  # queries in float64


class MemberBlock(NamedTuple):
    """A block of training rows of one member."""

    features: Float[Tensor, "rows proj_dim"]
    out_to_loss: Float[Tensor, " rows"]
    leverage: Float64[Tensor, " rows"] | None = None
    """If given, influences are divided by 1 − leverage."""


def residual_weights(out_to_loss: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return R = p(1 − p) of each row, from 1 − p."""
    return out_to_loss * (1 - out_to_loss)


def precondition(
    features: Float[Tensor, "n_query proj_dim"],
    gram: Float64[Tensor, "proj_dim proj_dim"],
    *,
    n_rows: int,
    damping: float,
    reference_rescale: bool = False,
    dtype: torch.dtype = torch.float64,
    cholesky: Float64[Tensor, "proj_dim proj_dim"] | None = None,
) -> Float[Tensor, "n_query proj_dim"]:
    r"""Right-multiply query features by $(\Phi^\top\Phi + \lambda\bar\mu I)^{-1}$.

    Args:
        gram (`torch.Tensor`): $\Phi^\top\Phi$, summed over the training set.
        n_rows (`int`): Rows in that sum.
        damping (`float`): $\lambda$, as a multiple of the Gram matrix's mean nonzero eigenvalue. The paper uses 0.
        reference_rescale (`bool`): Divide the inverse by its mean absolute entry, only to reproduce MadryLab/trak's numbers.
        dtype (`torch.dtype`): Dtype of the result; the solve is in float64.
        cholesky (`torch.Tensor`, *optional*): The factor of the damped Gram matrix, if it is already known.

    Raises:
        ValueError: If the damped Gram matrix is singular.
    """
    cholesky = factor(gram, n_rows=n_rows, damping=damping) if cholesky is None else cholesky
    preconditioned = torch.cat([solve(cholesky, some).to(dtype) for some in features.split(SOLVED_AT_ONCE)])
    # Differs from the reference: MadryLab/trak divides each member's inverse Gram matrix by its mean absolute entry since version 0.2,
    # which weights members of an ensemble by the squared size of their gradients.
    if reference_rescale:
        preconditioned = preconditioned / torch.cholesky_inverse(cholesky).abs().mean()
    return preconditioned


def weigh(out_to_loss: Float64[Tensor, "*rows"], power: float) -> Float64[Tensor, "*rows"]:
    """Return |`out_to_loss`| to a power, with the sign of `out_to_loss`."""
    return out_to_loss if power == 1 else out_to_loss.sign() * out_to_loss.abs() ** power


def score_blocks(
    blocks: Iterator[Sequence[MemberBlock]],
    preconditioned: Sequence[Float[Tensor, "n_query proj_dim"]],
    *,
    out_to_loss_power: float = 1.0,
    combination: str = "means",
) -> Iterator[Float[Tensor, "_ n_query"]]:
    """Yield the scores of each block of training rows, in the dtype of `preconditioned`.

    Args:
        blocks (`Iterator`): Blocks of rows; each item has the rows of every member.
        preconditioned (`Sequence`): The queries of every member, from [`precondition`]. Float32 is enough after a float64 solve,
            because features are stored in float32 at most (docs/evidence/decisions.md).
        out_to_loss_power (`float`): The exponent of `out_to_loss`. The paper has 1.
        combination (`str`): "means", the mean influence over members times the mean `out_to_loss`, as in the paper; or "scaled", the
            mean over members of each one's influence times its own `out_to_loss`.
    """
    for members in blocks:
        yield _combined(members, preconditioned, member_weights(members, out_to_loss_power, combination))


def member_weights(members: Sequence[MemberBlock], power: float, combination: str) -> list[Float64[Tensor, " rows"]]:
    """Return the factor of each member's influence on each row, in the sum over members."""
    each = torch.stack([block.out_to_loss.double() for block in members])
    if combination == "means":
        return [weigh(each.mean(0), power) / len(members)] * len(members)
    return [weigh(values, power) / len(members) for values in each]


def _combined(
    members: Sequence[MemberBlock],
    preconditioned: Sequence[Float[Tensor, "n_query proj_dim"]],
    weights: Sequence[Float64[Tensor, " rows"]],
) -> Float[Tensor, "rows n_query"]:
    """Return the sum over members of influence times weight."""
    influences = (_influence(*pair) for pair in zip(members, preconditioned, strict=True))
    if all(weight is weights[0] for weight in weights):
        total = functools.reduce(Tensor.add_, influences)
        return total.mul_(weights[0].to(total.dtype).unsqueeze(1))
    weighed = (
        influence.mul_(weight.to(influence.dtype).unsqueeze(1)) for influence, weight in zip(influences, weights, strict=True)
    )
    return functools.reduce(Tensor.add_, weighed)


def _influence(block: MemberBlock, preconditioned: Float[Tensor, "n_query proj_dim"]) -> Float[Tensor, "rows n_query"]:
    influence = inner_products(block.features.to(preconditioned.dtype), preconditioned)
    return influence if block.leverage is None else influence.div_((1 - block.leverage).to(influence.dtype).unsqueeze(1))
