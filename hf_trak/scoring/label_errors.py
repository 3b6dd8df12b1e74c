r"""How suspicious the label of each training row is, from the influences of other rows and the model's own doubt.

With $A = \Phi^\top\Phi + \lambda\bar\mu I$ of a member, and influences averaged over members:

    support of other rows      r_i = Σ_{j≠i} t_j φ_jᵀ A_{-i}⁻¹ φ_i / √h_i        h_i = φ_iᵀ A⁻¹ φ_i, the row's leverage
    trust                      t_i = tanh(r_i / std(r)), from t = 1, repeated ITERATIONS times
    support of held-out rows   v_i = Σ_q φ_qᵀ A⁻¹ φ_i / √h_i
    doubt                      d_i = 1 − p of the given label

A row's features are the gradient of the log-odds of its own label. So two similar rows with consistent labels have a positive influence
on each other, and a row with a wrong label has negative influences from the rows that it resembles. $A_{-i}$ leaves row i out, which has a
closed form. If r_i is half the log-odds that the label is right, then tanh(r_i) is the expected value of +1 (right) or −1 (wrong). So a row
whose own label is doubtful supports the opposite of its label.

The suspicion is a weighted mean of the ranks of d, −r and −v, with the weights 2a⁴, b⁴ and 1. Both d and r come from the training labels.
They can be wrong in the same rows if the model has learned from wrong labels or has memorised its rows. Held-out rows reveal this:

    a = corr(rank d, rank −v) / corr(rank d, rank −r)        b = corr(rank −r, rank −v) / corr(rank d, rank −r)        both clipped to 0 to 1

are the agreement of d and of r with the held-out rows, relative to their agreement with each other. Without held-out rows, d and −r have
equal weights. docs/evidence/label_errors.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from hf_trak.linalg import factor, solve
from hf_trak.linalg import leverage as leverage_of
from hf_trak.storage.reader import MemberReader, member_blocks

ITERATIONS = 4
"""Iterations of trust. Two to eight give the same within .005 AUC at 5 and 20 % of wrong labels; four are better than two at 40 %."""


class Suspicion(NamedTuple):
    """The result for the label of every training row."""

    score: Float64[Tensor, " n_train"]
    """Above 0 and at most 1; the higher, the more suspicious."""
    evidence: Float64[Tensor, " n_train"]
    """Positive if other rows and held-out rows support the given label."""
    doubt: Float64[Tensor, " n_train"]
    """1 − p of the given label."""


def check_labels_task(task: str, out_to_loss_kind: str) -> None:
    """Refuse features of tasks that do not have one class label per row.

    Raises:
        ValueError: Naming the task.
    """
    if out_to_loss_kind != "one_minus_p" or not task.endswith("-classification"):
        raise ValueError(
            f"Label errors are found among rows with one class label each, but this index is of the task {task!r}. For other tasks, "
            "`index.self_influence()` ranks the training rows that are unlike the others."
        )


class LabelEvidence:
    """Influences among training rows, and between held-out and training rows.

    It keeps one float64 matrix of (proj_dim, proj_dim) per member: 134 MB at proj_dim 4,096. Features are read from disk.

    Args:
        damping (`float`): λ, as a multiple of the mean nonzero eigenvalue of ΦᵀΦ.

    Raises:
        ValueError: If the damped matrix is singular, or a row's leverage is 1.
    """

    def __init__(self, members: Sequence[MemberReader], *, damping: float) -> None:
        self.members = members
        self.n_rows = members[0].n_rows
        self._cholesky = [factor(member.gram(), n_rows=self.n_rows, damping=damping) for member in members]
        self._leverage = torch.zeros(len(members), self.n_rows, dtype=torch.float64)
        output = torch.zeros(self.n_rows, dtype=torch.float64)
        for number, member in enumerate(members):
            for block in member_blocks(member):
                self._leverage[number, block.example_id] = leverage_of(self._cholesky[number], block.features)
                output[block.example_id] += block.output.double() / len(members)
        self.doubt = torch.sigmoid(-output)
        if (alone := int((self._leverage > 1 - 1e-9).any(0).sum())) > 0:
            raise ValueError(
                f"{alone} training rows have a leverage of 1, so no other row has an influence on them. Use a positive damping."
            )
        # A row without a gradient has no leverage and no influences.
        self._root = self._leverage.mean(0).clamp_min(torch.finfo(torch.float64).tiny).sqrt()

    def held_out_support(self, features: Sequence[Float[Tensor, "n_query proj_dim"]]) -> Float64[Tensor, " n_train"]:
        """Return the support of held-out rows, given their features under every member."""
        return self._influence([rows.double().sum(0, keepdim=True) for rows in features])[:, 0] / self._root

    def support(self, trust: Float64[Tensor, " n_train"]) -> Float64[Tensor, " n_train"]:
        """Return the support of other training rows, each weighted by its trust."""
        return self.support_by_group(trust.unsqueeze(1)).squeeze(1)

    def support_by_group(self, weights: Float64[Tensor, "n_train n_groups"]) -> Float64[Tensor, "n_train n_groups"]:
        """Return the support of several groups of other training rows. A row does not count for itself."""
        total = torch.zeros_like(weights)
        for member, cholesky, leverage in zip(self.members, self._cholesky, self._leverage, strict=True):
            sums = torch.zeros(weights.shape[1], cholesky.shape[0], dtype=torch.float64)
            for block in member_blocks(member):
                sums += weights[block.example_id].T @ block.features.double()
            solved = solve(cholesky, sums)
            for block in member_blocks(member):
                rows, own = block.example_id, leverage[block.example_id].unsqueeze(1)
                # Leaving row i out of both the sum and A, by the Sherman-Morrison formula: (s - h w) / (1 - h).
                total[rows] += (block.features.double() @ solved.T - own * weights[rows]) / (1 - own)
        return total / len(self.members) / self._root.unsqueeze(1)

    def _influence(self, sums: Sequence[Float64[Tensor, "n_groups proj_dim"]]) -> Float64[Tensor, "n_train n_groups"]:
        total = torch.zeros(self.n_rows, len(sums[0]), dtype=torch.float64)
        for member, cholesky, of_member in zip(self.members, self._cholesky, sums, strict=True):
            solved = solve(cholesky, of_member)
            for block in member_blocks(member):
                total[block.example_id] += block.features.double() @ solved.T
        return total / len(self.members)


def label_suspicion(evidence: LabelEvidence, held_out: Sequence[Float[Tensor, "n_query proj_dim"]] | None = None) -> Suspicion:
    """Return how suspicious each training row's label is.

    Args:
        held_out (`Sequence`, *optional*): Features of held-out rows under every member. Most of their labels should be right.
    """
    trust = torch.ones(evidence.n_rows, dtype=torch.float64)
    for _ in range(ITERATIONS):
        trust = torch.tanh(standardized(evidence.support(trust)))
    support = standardized(evidence.support(trust))
    doubted, opposed = rank_share(evidence.doubt), rank_share(-support)
    if held_out is None:
        return Suspicion((doubted + opposed) / 2, support, evidence.doubt)
    held_out_support = standardized(evidence.held_out_support(held_out))
    against = rank_share(-held_out_support)
    among = _correlation(doubted, opposed)
    of_doubt = 2 * _relative(_correlation(doubted, against), among) ** 4
    of_support = _relative(_correlation(opposed, against), among) ** 4
    score = (of_doubt * doubted + of_support * opposed + against) / (of_doubt + of_support + 1)
    return Suspicion(score, support + held_out_support, evidence.doubt)


def _relative(correlation: float, other: float) -> float:
    """Return a correlation divided by another, clipped to 0 to 1."""
    if correlation <= 0:
        return 0.0
    return 1.0 if correlation >= other else correlation / other


def _correlation(first: Float64[Tensor, " n"], second: Float64[Tensor, " n"]) -> float:
    first, second = first - first.mean(), second - second.mean()
    length = (first.norm() * second.norm()).item()
    return (first @ second).item() / length if length > 0 else 0.0


def suggest_labels(evidence: LabelEvidence, labels: Int64[Tensor, " n_train"]) -> Int64[Tensor, " n_train"]:
    """Return for each row the class, other than the given one, whose rows oppose the given label most.

    Args:
        labels (`torch.Tensor`): The given class of each training row, from 0 to the number of classes minus one.
    """
    by_class = evidence.support_by_group(torch.nn.functional.one_hot(labels).double())
    return by_class.scatter(1, labels.unsqueeze(1), torch.inf).argmin(1)


def standardized(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Return values divided by their standard deviation, without centring; zeros if they are constant."""
    spread = values.std(correction=0)
    return values / spread if spread > 0 else torch.zeros_like(values)


def rank_share(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Return the rank of each value divided by their number, above 0 and at most 1. Equal values have their mean rank."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    return ((count.cumsum(0) - (count - 1) / 2)[place] / len(values)).double()
