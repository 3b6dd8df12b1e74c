"""Every method's scores of all abstracts for the asked queries, what they are worth, and the choice among a method's variants."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from datasets import Dataset

from hf_trak.evaluation.fact_tracing.choice import Chosen, Half, best_variant, cross_fit, halves
from hf_trak.evaluation.fact_tracing.data import sentence_numbers
from hf_trak.evaluation.fact_tracing.embed import Embed
from hf_trak.evaluation.fact_tracing.measuring import Level, measure, pick
from hf_trak.evaluation.fact_tracing.methods import BM25PlusSentences, Method, Random, RandomTarget
from hf_trak.evaluation.fact_tracing.stages import timed
from hf_trak.evaluation.fact_tracing.tracin import SIMILARITIES, TracIn, Variant
from hf_trak.evaluation.fact_tracing.trak_variants import trak_scores
from hf_trak.evaluation.fact_tracing.workspace import Workspace
from hf_trak.storage.files import write_atomically

Scores = dict[str, np.ndarray]
"""(n_train, n_query) by variant."""

_BOTH = "TracIn + EMBED"
LAYERS = ("", r"^shared", r"^encoder\.block", r"^decoder\.block")
"""Which layers TracIn is tried on; the embedding is the best single one in the paper."""


class Rankings:
    """The scores of a workspace."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.folder = workspace.folder / "scores"

    def compute(self) -> None:
        """Score every abstract for every asked query by this shard's methods, if they have no scores yet."""
        number, n_shards = self.workspace.shard
        for name, method in list(self._methods().items())[number::n_shards]:
            path = self._path(name)
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                with timed(self.workspace.folder, f"rank: {name}"):
                    scores = {variant: values.astype(np.float32) for variant, values in method().items()}
                write_atomically(path, partial(_write_scores, scores))

    def _methods(self) -> dict[str, Callable[[], Scores]]:
        space = self.workspace
        abstracts, (queries, _) = space.abstracts, space.asked
        plain: dict[str, Method] = {"BM25+": BM25PlusSentences(), "Random-Target": RandomTarget(), "Random": Random()}
        methods: dict[str, Callable[[], Scores]] = {
            name: partial(_alone, method, abstracts, queries) for name, method in plain.items()
        }
        methods["EMBED"] = partial(Embed(space.checkpoints[-1:], space.encoder).sweep, abstracts, queries)
        for moments in (False, True):
            name = "TracIn, second moments" if moments else "TracIn"
            tracin = TracIn(space.checkpoints, space.encoder, use_second_moments=moments, dim=space.args.tracin_dim)
            methods[name] = partial(_swept, tracin, abstracts, queries)
        for features in space.args.trak_features:
            methods[f"TRAK, {features}"] = partial(trak_scores, space, features)
        return methods

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npz"

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """All that was computed, by method.

        Raises:
            FileNotFoundError: If some was not.
        """
        found: dict[str, Scores] = {}
        if missing := [name for name in self._methods() if not self._path(name).exists()]:
            raise FileNotFoundError(f"{self.folder} lacks {'; '.join(missing)}. Do the stage `rank`, all shards of it.")
        for name in self._methods():
            with np.load(self._path(name)) as file:
                found.setdefault(name.split(",")[0], {}).update({_label(name, variant): file[variant] for variant in file})
        return found

    @cached_property
    def chosen(self) -> dict[str, Chosen]:
        """By method, the scores of the variants that rank the other half of the queries best; TracIn + EMBED among them."""
        parts = halves(self.workspace.asked[0], seed=self.workspace.args.seed)
        choices = {name: partial(self._best, name) for name in self.scores} | {_BOTH: self._best_sum}
        return {name: cross_fit(choose, parts) for name, choose in choices.items()}

    def _best(self, method: str, chosen_on: Half) -> Chosen:
        variant = best_variant(self.variant_measures[method], chosen_on)
        return Chosen(variant, self.scores[method][variant])

    def _best_sum(self, chosen_on: Half) -> Chosen:
        """TracIn + EMBED: the best sum of TracIn's cosines, which have one scale, and the best EMBED."""
        embed = self._best("EMBED", chosen_on).scores
        cosines = {name: scores for name, scores in self.scores["TracIn"].items() if not name.startswith("dot")}
        sums = {name: scores / max(np.abs(scores).max(), 1e-12) + embed for name, scores in cosines.items()}
        variant = best_variant({name: self.measures(scores) for name, scores in sums.items()}, chosen_on)
        return Chosen(variant, sums[variant])

    @cached_property
    def variant_measures(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        """The measures of every asked query, by method and variant."""
        return {
            method: {name: self.measures(scores) for name, scores in variants.items()}
            for method, variants in self.scores.items()
        }

    def measures(self, scores: np.ndarray, level: Level = "sentence") -> dict[str, np.ndarray]:
        """Return the measures of every asked query."""
        _, candidates = self.workspace.asked
        return measure(pick(scores, candidates), candidates, self._sentences, level=level)

    @cached_property
    def _sentences(self) -> np.ndarray:
        return sentence_numbers(self.workspace.abstracts)


def _alone(method: Method, abstracts: Dataset, queries: Dataset) -> Scores:
    return {"": method(abstracts, queries)}


def _swept(tracin: TracIn, abstracts: Dataset, queries: Dataset) -> Scores:
    variants = [Variant(similarity, layers) for similarity in SIMILARITIES for layers in LAYERS]
    return {str(variant): scores for variant, scores in tracin.sweep(abstracts, queries, variants).items()}


def _label(name: str, variant: str) -> str:
    suffix = name.partition(", ")[2]
    return f"{variant}, {suffix}" if suffix else variant


def _write_scores(scores: Scores, path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, **scores)  # type: ignore[arg-type]
