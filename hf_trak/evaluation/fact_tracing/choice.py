"""The choice among a method's variants, made on one half of the queries for the other: no query has a say in how it is ranked.

Akyürek et al. choose and report on the same queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Float

from hf_trak.hashing import stream_key

Half = Bool[np.ndarray, " n_query"]


class Chosen(NamedTuple):
    """A method's scores, and the variant they are of; two, where the halves chose differently."""

    variant: str
    scores: Float[np.ndarray, "n_train n_query"]


def halves(queries: Dataset, *, seed: int = 0) -> tuple[Half, Half]:
    """Return which queries are of either half: those whose ids come first by their hash, and the others.

    Raises:
        ValueError: If there are fewer than two queries.
    """
    if len(queries) < 2:
        raise ValueError(
            f"Variants are chosen on one half of the queries for the other, which takes two, but there are {len(queries)}."
        )
    order = np.argsort([stream_key("half", seed, uuid) for uuid in queries["uuid"][:]], kind="stable")
    first = np.zeros(len(queries), dtype=bool)
    first[order[: len(queries) // 2]] = True
    return first, ~first


def best_variant(measures: Mapping[str, Mapping[str, np.ndarray]], chosen_on: Half, *, metric: str = "mrr_expected") -> str:
    """Return the variant of the highest mean on some queries; the first of equals.

    Raises:
        ValueError: If there is no variant, or no query with proponents to choose on.
    """
    means = {name: of_variant[metric][chosen_on] for name, of_variant in measures.items()}
    if not means or any(np.isnan(values).all() for values in means.values()):
        raise ValueError("There is nothing to choose among, or no query with a proponent to choose on.")
    return max(means, key=lambda name: float(np.nanmean(means[name])))


def cross_fit(choose: Callable[[Half], Chosen], parts: tuple[Half, Half]) -> Chosen:
    """Return scores in which each half of the queries is ranked by what `choose` picks on the other half."""
    first, second = choose(parts[1]), choose(parts[0])
    names = dict.fromkeys([first.variant, second.variant])
    return Chosen(" / ".join(names), np.where(parts[0], first.scores, second.scores))
