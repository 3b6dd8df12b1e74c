"""From scores to chosen rows: means over groups of a target, shares of a budget, and diverse rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor


def group_means(
    rows: Float[Tensor, "n_target dim"], codes: Int64[np.ndarray, " n_target"], n_groups: int
) -> Float64[Tensor, "n_groups dim"]:
    """Return the mean of each group's rows. Scores are linear in the target's rows, so the score of the mean is the mean of the scores."""
    places = torch.from_numpy(codes)
    total = torch.zeros(n_groups, rows.shape[1], dtype=torch.float64).index_add_(0, places, rows.double())
    return total / torch.bincount(places, minlength=n_groups).double().unsqueeze(1)


def shares(sizes: Sequence[int], budget: int) -> list[int]:
    """Divide a budget evenly over groups of the given sizes. If a group is smaller than its share, the others get the rest. A remainder
    goes to the first groups.

    Raises:
        ValueError: If the groups have fewer rows than the budget.
    """
    if budget > sum(sizes):
        raise ValueError(f"The groups have {sum(sizes)} rows, fewer than the budget of {budget}.")
    found = [0] * len(sizes)
    while (left := budget - sum(found)) > 0:
        growing = [group for group, size in enumerate(sizes) if found[group] < size]
        each = left // len(growing)
        for group in growing if each else growing[:left]:
            found[group] += min(max(each, 1), sizes[group] - found[group])
    return found


def first_rows(
    scores: Float[np.ndarray, " n_train"], codes: Int64[np.ndarray, " n_train"], counts: Sequence[int]
) -> Int64[np.ndarray, " n_chosen"]:
    """Return the best `counts` rows of each group, sorted by score over all groups. Equal scores keep the order of the rows."""
    order = np.argsort(-scores, kind="stable")
    groups = codes[order]
    chosen = np.zeros(len(order), dtype=bool)
    for group, count in enumerate(counts):
        chosen[np.flatnonzero(groups == group)[:count]] = True
    return order[chosen]


def spread_out(
    scores: Float[np.ndarray, " n"],
    directions: Float32[np.ndarray, "n dim"],
    codes: Int64[np.ndarray, " n"],
    counts: Sequence[int],
    *,
    diversity: float,
) -> Int64[np.ndarray, " n_chosen"]:
    r"""Choose rows one after another. Each is the row with the largest

    $$(1 - d)\,\frac{s_i}{\max_j |s_j|} - d \max_{j\ \text{chosen}} \cos(\phi_i, \phi_j)$$

    among the rows of groups that are not full. Equal values keep the order of the rows. Source: Carbonell and Goldstein (1998), [The use of
    MMR](https://doi.org/10.1145/290941.291025), with features of training rows instead of texts.

    Args:
        directions (`np.ndarray`): Normalised features; their inner products are the cosines.
        counts (`Sequence[int]`): Number of rows to choose from each group.
        diversity (`float`): $d$, 0 to 1.

    Returns:
        `np.ndarray`: Positions in `scores`, in the order in which they were chosen.
    """
    size = np.abs(scores).max(initial=0.0)
    value = (1 - diversity) * scores.astype(np.float64) / (size or 1.0)
    nearest = np.full(len(scores), -1.0)
    left, chosen = list(counts), []
    open_rows = np.array(counts)[codes] > 0
    while sum(left):
        place = int(np.argmax(np.where(open_rows, value - diversity * nearest, -np.inf)))
        chosen.append(place)
        open_rows[place] = False
        left[codes[place]] -= 1
        if not left[codes[place]]:
            open_rows[codes == codes[place]] = False
        np.maximum(nearest, directions @ directions[place], out=nearest)
    return np.array(chosen, dtype=np.int64)
