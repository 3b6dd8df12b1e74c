"""Scores of an ensemble: the members' Gram matrices, the queries solved under each, and the scores of one row group after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from hf_trak.linalg import accumulate_gram, factor
from hf_trak.linalg import leverage as leverage_of
from hf_trak.runtime import ahead, one_thread
from hf_trak.scoring.score import SOLVED_AT_ONCE, MemberBlock, precondition, residual_weights, score_blocks
from hf_trak.storage.columns import Shard
from hf_trak.storage.reader import MemberReader, aligned_blocks, member_blocks

COMBINATIONS = ("scaled", "means")


@dataclass(frozen=True)
class ScoreOptions:
    r"""Options of scores that can be changed after features are stored.

    ```python
    >>> scores = index.score(validation, options=ScoreOptions(damping=1.0, out_to_loss_power=0.5), progress=False)
    ```

    Args:
        damping (`float`): $\lambda$, as a multiple of the Gram matrix's mean nonzero eigenvalue.
        residual_weighting (`bool`): Weight each row of the Gram matrix by $R = p(1 - p)$, as the one-step Newton approximation of
            logistic regression does ([Pregibon, 1981](https://doi.org/10.1214/aos/1176345513)). The TRAK paper derives it and
            drops it.
        leverage (`bool`): Divide by $1 - h_i$, with $h_i$ the training row's leverage, as the same approximation does. The TRAK
            paper drops it too.
        reference_rescale (`bool`): Divide each inverse Gram matrix by its mean absolute entry, only to reproduce MadryLab/trak's numbers.
        out_to_loss_power (`float`): The exponent of Q; the paper has 1. See [`default_power`].
        combination (`str`): How members are combined. "scaled", the default: for each query, each member's influences are scaled to
            the same root mean square over the training set and multiplied by the member's own Q, and then averaged. "means": the mean
            influence times the mean Q, as in the paper.
        soft_threshold (`int`, *optional*): Number of scores per query that stay nonzero: all scores are moved towards 0 by the same
            amount. This is the paper's last step, which chooses the number by cross-validation.
    """

    damping: float
    residual_weighting: bool = False
    leverage: bool = False
    reference_rescale: bool = False
    out_to_loss_power: float = 1.0
    # Differs from the paper, whose members are runs on random subsets: docs/evidence/decisions.md has the LDS of both.
    combination: str = "scaled"
    soft_threshold: int | None = None


class ScoreShortcuts(TypedDict, total=False):
    """Fields of [`ScoreOptions`] as keyword arguments. Damping may be "auto"; None means the value of the index."""

    damping: float | str | None
    residual_weighting: bool
    leverage: bool
    reference_rescale: bool
    out_to_loss_power: float | None
    combination: str | None
    soft_threshold: int | None


def default_power(out_to_loss_kind: str, *, points: bool = False) -> float:
    """Return the default power of Q: 1/2 if Q is 1 − p (or a mean of them) of a final checkpoint, and 1 otherwise.

    Args:
        out_to_loss_kind (`str`): As a [`Task`] defines it and a member records it. The name of the task does not matter.
        points (`bool`): Whether every member is a point of a path before its end. If only some are, the power is that of final checkpoints.

    A model is overconfident about its training examples: 1 − p of an example is smaller than for a model trained without the
    example. The square root compensates for this. A point before the end of the path has not learned the example as well.
    """
    # Differs from the paper, which uses Q itself: docs/evidence/decisions.md has the LDS of both.
    return 0.5 if out_to_loss_kind in ("one_minus_p", "mean_one_minus_p") and not points else 1.0


def default_power_of(members: Sequence[MemberReader]) -> float:
    """Return the default power of Q for an ensemble: see [`default_power`]."""
    kind = members[0].identity["out_to_loss_kind"]
    return default_power(kind, points=all("point" in member.identity for member in members))


class SolvedQueries(NamedTuple):
    """Solved queries of one member, ready for products with its training rows."""

    preconditioned: Float32[Tensor, "n_query proj_dim"]
    leverage: Float64[Tensor, " n_train"] | None
    influence_rms: Float64[Tensor, " n_query"] | None = None
    """Root mean square of each query's influences over the training set, before Q; only for `combination="scaled"`."""


def check_residuals(member: MemberReader) -> None:
    """Refuse residual weighting if `trak_out_to_loss` is not 1 − p of one class label.

    Raises:
        ValueError: Naming the task.
    """
    task, kind = member.identity["task"], member.identity["out_to_loss_kind"]
    if kind != "one_minus_p":
        raise ValueError(
            f"residual_weighting needs the probability of one label, but these are features of {task}, whose out_to_loss is of the kind "
            f"{kind!r}. Leave it out."
        )


def member_gram(member: MemberReader, *, residual_weighting: bool) -> Float64[Tensor, "proj_dim proj_dim"]:
    """Return the stored Gram matrix, or the residual-weighted one, which is computed from all features."""
    gram = member.gram()
    if not residual_weighting:
        return gram
    gram = torch.zeros_like(gram)
    for shard in member_blocks(member):
        accumulate_gram(gram, shard.features * residual_weights(shard.out_to_loss).sqrt().unsqueeze(1))
    return gram


def solve_queries(member: MemberReader, queries: Float[Tensor, "n_query proj_dim"], options: ScoreOptions) -> SolvedQueries:
    """Precondition queries under one member. With leverage, all features are read to compute the leverage of each row.

    Raises:
        ValueError: If the damped Gram matrix is singular, or a row's leverage is 1.
    """
    gram = member_gram(member, residual_weighting=options.residual_weighting)
    cholesky = _factor(member, gram, options)
    preconditioned = precondition(
        queries,
        gram,
        n_rows=member.n_rows,
        damping=options.damping,
        reference_rescale=options.reference_rescale,
        dtype=torch.float32,
        cholesky=cholesky,
    )
    rms = influence_rms(preconditioned, gram, n_rows=member.n_rows) if options.combination == "scaled" else None
    if not options.leverage:
        return SolvedQueries(preconditioned, None, rms)
    leverage = torch.cat([_leverage(shard, cholesky, options.residual_weighting) for shard in member_blocks(member)])
    if (alone := int((leverage > 1 - 1e-9).sum())) > 0:
        raise ValueError(
            f"{alone} training rows have a leverage of 1, so 1 / (1 - h) is infinite: no other row has a gradient in their directions. "
            "Use a positive damping."
        )
    return SolvedQueries(preconditioned, leverage, rms)


def _factor(
    member: MemberReader, gram: Float64[Tensor, "proj_dim proj_dim"], options: ScoreOptions
) -> Float64[Tensor, "proj_dim proj_dim"]:
    """Return the factor of a member's damped Gram matrix. A member in memory keeps its last factor."""
    key, kept = (options.damping, options.residual_weighting), member.in_memory
    if kept is not None and key in kept.factors:
        return kept.factors[key]
    found = factor(gram, n_rows=member.n_rows, damping=options.damping)
    if kept is not None:
        kept.factors = {key: found}
    return found


def influence_rms(
    preconditioned: Float[Tensor, "n_query proj_dim"], gram: Float64[Tensor, "proj_dim proj_dim"], *, n_rows: int
) -> Float64[Tensor, " n_query"]:
    r"""Return $\sqrt{v^\top K v / n}$ of each preconditioned query $v$, where $K$ is the Gram matrix. No features are read."""
    squares = [((some := part.double()) @ gram * some).sum(1) for part in preconditioned.split(SOLVED_AT_ONCE)]
    return (torch.cat(squares).clamp_min(0) / n_rows).sqrt()


def bring_to_one_scale(solved: Sequence[SolvedQueries], *, like: int | None = None) -> list[SolvedQueries]:
    """Scale every member's queries so that the root mean square of their influences is the mean over members. A single member's queries do
    not change.

    Args:
        like (`int`, *optional*): Scale all queries by the factor of this one. The others are parts of it.
    """
    sizes = [one.influence_rms for one in solved]
    if any(size is None for size in sizes):
        return list(solved)
    stacked = torch.stack([size for size in sizes if size is not None])
    factors = torch.where(stacked > 0, stacked.mean(0) / stacked, 1.0)
    if like is not None:
        factors = factors[:, like : like + 1].expand_as(factors)
    return [
        one._replace(preconditioned=one.preconditioned * factor.to(one.preconditioned.dtype).unsqueeze(1))
        for one, factor in zip(solved, factors, strict=True)
    ]


def solve_all(
    members: Sequence[MemberReader],
    features: list[Float[Tensor, "n_query proj_dim"]],
    options: ScoreOptions,
    *,
    like: int | None = None,
) -> list[SolvedQueries]:
    """Precondition the queries of every member. `features` is emptied, because it may be large.

    Args:
        like (`int`, *optional*): See [`bring_to_one_scale`].
    """
    solved: list[SolvedQueries] = []
    for member in members:
        solved.append(solve_queries(member, features.pop(0), options))
    return bring_to_one_scale(solved, like=like)


def self_influence(members: Sequence[MemberReader], *, damping: float) -> Float64[Tensor, " n_train"]:
    r"""Return $\phi^\top(K + \lambda\bar\mu I)^{-1}\phi \cdot |Q|$ of every training row; both factors are means over members."""
    # Differs from the usual definition, which has no Q: far more wrong labels come first with Q (docs/evidence/decisions.md).
    n_rows = members[0].n_rows
    alone, out_to_loss = torch.zeros(2, n_rows, dtype=torch.float64)
    for member in members:
        cholesky = factor(member.gram(), n_rows=n_rows, damping=damping)
        for block in member_blocks(member):
            alone[block.example_id] += leverage_of(cholesky, block.features) / len(members)
            out_to_loss[block.example_id] += block.out_to_loss.double() / len(members)
    return alone * out_to_loss.abs()


def _leverage(shard: Shard, cholesky: Tensor, residual_weighting: bool) -> Float64[Tensor, " rows"]:
    leverage = leverage_of(cholesky, shard.features)
    return leverage * residual_weights(shard.out_to_loss).double() if residual_weighting else leverage


def stream_scores(
    members: Sequence[MemberReader],
    solved: Sequence[SolvedQueries],
    *,
    out_to_loss_power: float,
    combination: str,
    shards: range | None = None,
    read_ahead: bool = True,
) -> Iterator[Float32[Tensor, "_ n_query"]]:
    """Yield the scores of one row group after another.

    Args:
        out_to_loss_power, combination: From the [`ScoreOptions`] of `solved`.
        shards (`range`, *optional*): Only these shards.
        read_ahead (`bool`): Read the next row group while this one is scored. This needs memory for a second row group.
    """
    preconditioned = [queries.preconditioned for queries in solved]
    rows = aligned_blocks(members, shards)
    with one_thread("scoring") as thread:
        coming = ahead(rows, thread, depth=1) if read_ahead else rows
        blocks = ([_block(shard, queries) for shard, queries in zip(row, solved, strict=True)] for row in coming)
        yield from score_blocks(blocks, preconditioned, out_to_loss_power=out_to_loss_power, combination=combination)


def _block(shard: Shard, queries: SolvedQueries) -> MemberBlock:
    leverage = None if queries.leverage is None else queries.leverage[shard.example_id]
    return MemberBlock(shard.features, shard.out_to_loss, leverage)
