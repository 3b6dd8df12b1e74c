r"""Every method's scores of all abstracts for the asked queries, TRAK's variants among them.

The Gram matrix $\Phi^\top\Phi$ is of the whole training set: made of the candidates alone, it would know only of what the query's own
neighbours have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float

from hf_trak.config import TrakConfig
from hf_trak.evaluation.fact_tracing.data import sentence_numbers
from hf_trak.evaluation.fact_tracing.methods import (
    SIMILARITIES,
    BM25PlusSentences,
    Embed,
    Method,
    Random,
    RandomTarget,
    TracIn,
    Variant,
)
from hf_trak.evaluation.fact_tracing.ranking import Chosen, Half, Level, best_variant, cross_fit, halves, measure, pick
from hf_trak.evaluation.fact_tracing.settings import TRAK_FEATURES
from hf_trak.evaluation.fact_tracing.task import fact_task
from hf_trak.evaluation.fact_tracing.workspace import Workspace, timed
from hf_trak.index import AttributionIndex
from hf_trak.scoring.ensemble import default_power
from hf_trak.storage.files import write_atomically


@dataclass
class Trak:
    """TRAK scores of any index over the abstracts.

    Args:
        index (`AttributionIndex`): Of all abstracts, in their order, under one or more members.
        options (`dict`): For [`AttributionIndex.score`], such as `{"damping": 0.0}`; by default λ is chosen.
    """

    index: AttributionIndex
    options: dict[str, Any] = field(default_factory=dict)

    whole_corpus = True

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        if len(train) != self.index.n_rows:
            raise ValueError(
                f"The index is of {self.index.n_rows} abstracts, but {len(train)} are to be scored. TRAK needs them all, since its "
                "Gram matrix is of the whole training set; rank the candidates among its scores."
            )
        return self.index.score(queries, progress=False, **self.options)


@dataclass(frozen=True)
class Features:
    """What an index is made of.

    Args:
        parameters (`tuple[str, ...]`, *optional*): Regular expressions of what is differentiated; by default all.
        reduction (`str`): mean or sum over scored tokens.
        answer_only (`bool`): Score neither `<extra_id_0>` nor the end of the sequence.
    """

    parameters: tuple[str, ...] | None = None
    reduction: str = "mean"
    answer_only: bool = False


FEATURES = dict(
    zip(
        TRAK_FEATURES,
        (
            Features(),
            Features(parameters=(r"^shared",)),
            Features(parameters=(r"^(?!shared|lm_head)",)),
            Features(answer_only=True),
            Features(parameters=(r"^shared",), answer_only=True),
            Features(parameters=(r"^encoder\.",), answer_only=True),
            Features(parameters=(r"^decoder\.",), answer_only=True),
            Features(reduction="sum"),
        ),
        strict=True,
    )
)
DAMPINGS: tuple[float | str, ...] = ("auto", 0.03, 0.3)
GROUPS = {"halves": ("halves",), "checkpoints": ("checkpoints",), "both": ("halves", "checkpoints")}
"""Which indexes a choice of members takes; TRAK averages over all members of all of them."""
_POWER = default_power("mean_one_minus_p")  # the kind of `fact_task`


def trak_scores(space: Workspace, name: str) -> dict[str, np.ndarray]:
    """Return the scores of some features under all choices of members by every variant's name, (n_train, n_query) each."""
    queries, _ = space.asked
    groups = dict.fromkeys(group for members in space.args.trak_members for group in GROUPS[members])
    indexes = {group: trak_index(space, name, group) for group in groups}
    columns = {group: member_columns(index) for group, index in indexes.items()}
    scores: dict[str, np.ndarray] = {}
    for damping in DAMPINGS:
        options = {"damping": damping, "out_to_loss_power": 0.0, "combination": "means"}
        influence = {group: Trak(index, options)(space.abstracts, queries) for group, index in indexes.items()}
        for members in space.args.trak_members:
            parts = GROUPS[members]
            n_members = [columns[group].shape[1] for group in parts]
            mean = np.average([influence[group] for group in parts], axis=0, weights=n_members).astype(np.float32)
            out_to_loss, lengths = np.concatenate([columns[group] for group in parts], axis=1).mean(axis=1)[..., None]
            scores[f"damping {damping}, {members}"] = mean * out_to_loss**_POWER
            scores[f"damping {damping}, no out_to_loss, {members}"] = mean
            scores[f"damping {damping}, unit rows, {members}"] = mean / np.maximum(lengths, 1e-12)
    return scores


def trak_index(space: Workspace, name: str, members: str) -> AttributionIndex:
    """Return an index of all abstracts under runs on halves, or under the full run's checkpoints, built once."""
    features = FEATURES[name]
    encoder = replace(space.encoder, score_sentinel=not features.answer_only, score_eos=not features.answer_only)
    halves = members == "halves"
    folder = "".join(letter if letter.isalnum() else "-" for letter in f"{name} {members}")
    return AttributionIndex.build(
        space.folder / "index" / folder,
        models=[space.member_checkpoint(m) for m in range(space.args.n_members)] if halves else space.checkpoints,
        dataset=space.abstracts,
        config=TrakConfig(proj_dim=space.args.proj_dim, parameters=features.parameters),
        processing_class=space.encoder.tokenizer,
        task=fact_task(encoder, reduction=features.reduction),
        masks=torch.from_numpy(space.masks) if halves else None,
        sketch_seeds_per_checkpoint=space.args.sketch_seeds,
    )


def member_columns(index: AttributionIndex) -> np.ndarray:
    """Return each member's `out_to_loss` and gradient norms, (2, n_members, n_train)."""
    rows = [index.features(member).with_format("numpy") for member in range(len(index.members))]
    names = ("trak_out_to_loss", "trak_grad_norm")
    return np.array([[of_member[name][:] for of_member in rows] for name in names], dtype=np.float32)


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
