"""Methods that look at texts alone. Like all methods here, they are called as `(abstracts, queries) -> scores`.

A method with `whole_corpus = True` needs every abstract, candidate or not: for the rarity of words, or for a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from jaxtyping import Float, Int64

from hf_trak.evaluation.baselines.bm25 import BM25PlusIndex
from hf_trak.evaluation.fact_tracing.data import restored
from hf_trak.hashing import stream_key

Method = Callable[[Dataset, Dataset], Float[np.ndarray, "n_train n_query"]]


@dataclass
class BM25PlusSentences:
    """BM25+ of sentences and questions with their answers put back. All maskings of a sentence tie."""

    whole_corpus = True

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        return self.index(train).score(restored(queries))

    def index(self, train: Dataset) -> BM25PlusIndex:
        """Return the index of the abstracts, which is made once for a dataset."""
        key = train._fingerprint
        if getattr(self, "_key", None) != key:
            self._key, self._index = key, BM25PlusIndex(restored(train))
        return self._index

    def nearest_to(self, train: Dataset, queries: Dataset, k: int) -> Callable[[int], Int64[np.ndarray, " k"]]:
        """Return `(query number) -> its k best abstracts`, for [`draw_candidates`]."""
        index, texts = self.index(train), restored(queries)
        return lambda number: index.nearest(texts[number], k)


@dataclass(frozen=True)
class RandomTarget:
    """Abstracts whose target is the query's, in random order, before all others, in random order."""

    seed: int = 0

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        targets = np.array(train["targets_pretokenized"][:], dtype=object)
        same = targets[:, None] == np.array(queries["targets_pretokenized"][:], dtype=object)[None, :]
        return same + random_scores(train, queries, self.seed)


@dataclass(frozen=True)
class Random:
    """Uniform scores: what any method must beat."""

    seed: int = 0

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        return random_scores(train, queries, self.seed)


def random_scores(train: Dataset, queries: Dataset, seed: int) -> Float[np.ndarray, "n_train n_query"]:
    """Return numbers in [0, 1) that depend on the seed, the query and the abstract, not on what else is scored."""
    order = np.array([stream_key("abstract", seed, identity) for identity in train["id"][:]])
    drawn = np.empty((len(train), len(queries)))
    for column, uuid in enumerate(queries["uuid"][:]):
        mixed = (order ^ stream_key("query", seed, uuid)).astype(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64, as in hf_trak.hashing
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        drawn[:, column] = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) / 2.0**53
    return drawn
