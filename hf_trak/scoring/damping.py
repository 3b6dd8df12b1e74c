r"""`damping="auto"`: the λ whose scores best rank the outputs of models trained on recorded subsets, with no extra training.

Members that were trained on random subsets of the data allow a small linear datamodeling score without further training. The
checkpoints are split in halves. The features of one half give scores τ_λ. For a checkpoint c of the other half, the sum over the rows
that it was trained on,

    g(c, j) = Σ_{i in mask_c} τ_λ(z_i, z_j)

predicts its output f(z_j; θ_c) on a row j that it was not trained on, which takes the place of a query. The best λ is the one whose
predictions rank these outputs best, over both halves and several splits. With few checkpoints, λ has to be much better than the usual
values to be chosen. Only stored features, outputs and masks of the training rows are read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from hf_trak.hashing import hash_json, random_bits, stream_key
from hf_trak.linalg import factor, solve
from hf_trak.messages import DamagedFile
from hf_trak.scoring.score import weigh
from hf_trak.storage.files import read_sealed, write_sealed
from hf_trak.storage.format import DAMPING_NAME
from hf_trak.storage.reader import MemberReader

GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
FEWEST_CHECKPOINTS = 4  # a half with one checkpoint has nothing to rank
_TARGETS = 2048

# The curve of few checkpoints is noisy: with five, the best λ of the curve once was 30, although .3 to 3 had twice the LDS. So a term is
# subtracted from the curve that grows with the distance of λ from _USUAL. A good λ is usually within a factor of ten of it.
_USUAL = 3**0.5  # between the defaults of one checkpoint and of many
_STRENGTH = 0.4  # the term for one checkpoint at ten times, or a tenth of, the usual λ
_SPLITS = 4


@dataclass(frozen=True)
class DampingChoice:
    """The chosen λ, and the curve from which it was chosen.

    Args:
        damping (`float`): The chosen λ of `grid`.
        grid (`tuple[float, ...]`): The values of λ that were tried, as multiples of the Gram matrix's mean nonzero eigenvalue.
        curve (`tuple[float, ...]`): For each λ, the mean Spearman correlation of predicted and actual outputs.
        n_checkpoints (`int`): Number of checkpoints, each with its own mask.
        n_targets (`int`): Number of training rows whose outputs were ranked.
        members_sha256 (`str`): Hash of the members' files. If it differs, the choice belongs to another index.
    """

    damping: float
    grid: tuple[float, ...]
    curve: tuple[float, ...]
    n_checkpoints: int
    n_targets: int
    members_sha256: str

    def save(self, folder: Path) -> None:
        """Write `damping.json`."""
        write_sealed(folder / DAMPING_NAME, asdict(self))

    @classmethod
    def load(cls, folder: Path, members: Sequence[MemberReader]) -> DampingChoice | None:
        """Return the choice recorded for these members; None if there is none, or if it belongs to other members."""
        if not (folder / DAMPING_NAME).is_file():
            return None
        try:
            values: dict[str, Any] = read_sealed(folder / DAMPING_NAME)
            choice = cls(**{**values, "grid": tuple(values["grid"]), "curve": tuple(values["curve"])})
        except (TypeError, KeyError, DamagedFile) as error:
            reason = error.reason if isinstance(error, DamagedFile) else f"a field is missing or of another kind ({error})"
            raise DamagedFile(
                f"{folder / DAMPING_NAME} is damaged: {reason}. Delete it: it is computed again.", reason=reason
            ) from error
        return choice if choice.members_sha256 == hash_members(members) else None


def hash_members(members: Sequence[MemberReader]) -> str:
    """Return a hash of the members' files as they were when written."""
    return hash_json([member.info["files"] for member in members])


class Fold(NamedTuple):
    """One half of the checkpoints gives scores; the outputs of the other half are ranked."""

    scoring: list[int]
    ranked: list[int]


def split_in_halves(n_checkpoints: int, *, n_splits: int = _SPLITS) -> list[Fold]:
    """Return both folds of each of `n_splits` random splits in halves. They depend only on the number of checkpoints."""
    folds = []
    for split in range(n_splits):
        order = random_bits(stream_key("damping split", split), torch.arange(n_checkpoints)).argsort().tolist()
        first, second = sorted(order[: n_checkpoints // 2]), sorted(order[n_checkpoints // 2 :])
        folds += [Fold(first, second), Fold(second, first)]
    return folds


def choose_damping(
    members: Sequence[MemberReader],
    checkpoints: Sequence[int],
    *,
    grid: Sequence[float] = GRID,
    out_to_loss_power: float = 1.0,
) -> DampingChoice | None:
    """Choose λ by the members' own masks. Return None if fewer than four checkpoints have a mask, or if no λ ranks their outputs better
    than chance.

    Each Gram matrix is factored once per λ. For up to about twelve values, this is cheaper than an eigendecomposition.

    Args:
        checkpoints (`Sequence[int]`): For each member, the number of its checkpoint; for points of a path, that of the model. Members
            with the same number are always in the same half.
        out_to_loss_power (`float`): As in the scores for which λ is chosen.
    """
    by_checkpoint = [
        [m for m, c in zip(members, checkpoints, strict=True) if c == number] for number in sorted(set(checkpoints))
    ]
    masks = [group[0].mask() for group in by_checkpoint]
    if len(masks) < FEWEST_CHECKPOINTS or any(mask is None for mask in masks):
        return None
    mask = torch.stack([mask for mask in masks if mask is not None])
    outputs = torch.stack([_mean_column(group, "output") for group in by_checkpoint])
    out_to_loss = torch.stack([_mean_column(group, "out_to_loss") for group in by_checkpoint])
    targets = _targets(mask.shape[1])
    folds = split_in_halves(len(by_checkpoint))
    predictions = [torch.zeros(len(grid), len(fold.ranked), len(targets), dtype=torch.float64) for fold in folds]
    for number, group in enumerate(by_checkpoint):
        mine = [index for index, fold in enumerate(folds) if number in fold.scoring]
        weights = [_weights(mask, out_to_loss, folds[index], out_to_loss_power) for index in mine]
        for member in group:
            found = _predictions(member, torch.cat(weights), targets, grid)
            for index, part in zip(mine, found.split([len(w) for w in weights], dim=1), strict=True):
                predictions[index] += part
    curve = _curve(predictions, folds, outputs[:, targets], mask[:, targets])
    if curve is None or curve.max() <= 0:
        return None
    damping = take(curve.tolist(), grid, n_checkpoints=len(by_checkpoint))
    return DampingChoice(damping, tuple(grid), tuple(curve.tolist()), len(by_checkpoint), len(targets), hash_members(members))


def take(curve: Sequence[float], grid: Sequence[float], *, n_checkpoints: int) -> float:
    """Return the λ with the highest correlation minus the term for its distance from the usual λ."""
    weighed = [
        value - _STRENGTH / n_checkpoints * math.log10(damping / _USUAL) ** 2
        for value, damping in zip(curve, grid, strict=True)
    ]
    return float(grid[max(range(len(grid)), key=weighed.__getitem__)])


def _mean_column(group: Sequence[MemberReader], column: str) -> Float64[Tensor, " n_train"]:
    """Return a column's mean over the members of one checkpoint."""
    values = [torch.cat([getattr(shard, column) for shard in member.shards()]).double() for member in group]
    return torch.stack(values).mean(0)


def _targets(n_rows: int) -> Int64[Tensor, " n_targets"]:
    """Draw the rows whose outputs are ranked."""
    return random_bits(stream_key("damping targets"), torch.arange(n_rows)).argsort()[:_TARGETS].sort().values


def _weights(
    mask: Bool[Tensor, "n_checkpoints n_train"],
    out_to_loss: Float64[Tensor, "n_checkpoints n_train"],
    fold: Fold,
    out_to_loss_power: float,
) -> Float64[Tensor, "n_ranked n_train"]:
    """Return the weight of each training row's influence for each ranked checkpoint: its mean Q if it was trained on, else 0."""
    return mask[fold.ranked] * weigh(out_to_loss[fold.scoring].mean(0), out_to_loss_power)


def _predictions(
    member: MemberReader,
    weights: Float64[Tensor, "n_ranked n_train"],
    targets: Int64[Tensor, " n_targets"],
    grid: Sequence[float],
) -> Float64[Tensor, "n_grid n_ranked n_targets"]:
    """Return Σ_i weights_i φ_iᵀ (K + λμ̄)⁻¹ φ_j for every λ, K being the Gram matrix. The sum over training rows comes first, so no
    matrix of scores is formed."""
    gram = member.gram()
    sums = torch.zeros(len(weights), gram.shape[0], dtype=torch.float64)
    queries = []
    for shard in member.shards():
        features = shard.features.double()
        sums += weights[:, shard.example_id] @ features
        queries.append(features[torch.isin(shard.example_id, targets)])
    solved = [solve(factor(gram, n_rows=member.n_rows, damping=damping), sums) for damping in grid]
    return torch.stack(solved) @ torch.cat(queries).T


def _curve(
    predictions: Sequence[Float64[Tensor, "n_grid n_ranked n_targets"]],
    folds: Sequence[Fold],
    outputs: Float64[Tensor, "n_checkpoints n_targets"],
    mask: Bool[Tensor, "n_checkpoints n_targets"],
) -> Float64[Tensor, " n_grid"] | None:
    """Return each λ's mean rank correlation over folds and targets, weighted by the number of ranked outputs minus one."""
    total, weight = torch.zeros(predictions[0].shape[0], dtype=torch.float64), 0.0
    for predicted, fold in zip(predictions, folds, strict=True):
        valid = ~mask[fold.ranked]
        degrees = (valid.sum(0) - 1).clamp_min(0).double()
        correlations = torch.stack([spearman(one, outputs[fold.ranked], valid) for one in predicted])
        total += correlations @ degrees
        weight += degrees.sum().item()
    return total / weight if weight else None


def spearman(
    first: Float[Tensor, "n_values n_columns"],
    second: Float[Tensor, "n_values n_columns"],
    valid: Bool[Tensor, "n_values n_columns"],
) -> Float64[Tensor, " n_columns"]:
    """Return each column's rank correlation over its valid entries; 0 if the values of either matrix are constant."""
    ranks = [_ranks(values, valid) for values in (first, second)]
    count = valid.sum(0).clamp_min(1)
    centred = [torch.where(valid, values - values.sum(0) / count, 0.0) for values in ranks]
    norm = centred[0].square().sum(0).sqrt() * centred[1].square().sum(0).sqrt()
    return (centred[0] * centred[1]).sum(0) / norm.where(norm > 0, math.inf)


def _ranks(
    values: Float[Tensor, "n_values n_columns"], valid: Bool[Tensor, "n_values n_columns"]
) -> Float64[Tensor, "n_values n_columns"]:
    """Return average ranks among the valid entries of each column; 0 elsewhere."""
    below = (values.unsqueeze(0) < values.unsqueeze(1)) & valid.unsqueeze(0)
    equal = (values.unsqueeze(0) == values.unsqueeze(1)) & valid.unsqueeze(0)
    return torch.where(valid, below.sum(1).double() + (equal.sum(1).double() - 1) / 2, 0.0)
