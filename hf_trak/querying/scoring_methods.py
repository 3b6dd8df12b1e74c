"""What one asks of an index: scores, each query's strongest training rows, and which rows stand alone."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from hf_trak.config import TrakConfig
from hf_trak.linalg import damped, default_damping
from hf_trak.members import Pass
from hf_trak.querying.label_errors import check_budget, given_labels, label_error_rows
from hf_trak.querying.queries import QuerySide
from hf_trak.querying.questions import Question, Side, mean_output, read_query_features
from hf_trak.querying.training_rows import KeptRows
from hf_trak.scoring.damping import DampingChoice, choose_damping
from hf_trak.scoring.documents import check_way, document_scores, top_documents
from hf_trak.scoring.ensemble import (
    COMBINATIONS,
    ScoreOptions,
    ScoreShortcuts,
    SolvedQueries,
    check_residuals,
    default_power_of,
    self_influence,
    solve_all,
    stream_scores,
)
from hf_trak.scoring.label_errors import LabelEvidence, check_labels_task, label_suspicion
from hf_trak.scoring.scorer import Scorer, check_top_k, to_hits
from hf_trak.scoring.search_index import SearchIndex, describe
from hf_trak.sources.streams import read_stream
from hf_trak.storage.passes import columns_of
from hf_trak.storage.reader import MemberReader
from hf_trak.tasks.chunks import DOCUMENT
from hf_trak.tasks.rows import check_is_dataset, name_rows

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from typing_extensions import Unpack

_HASHED_BEFORE_QUERIES = 1 << 30  # bytes; half a second of hashing, which is not done again when they are read


class ScoringMethods:
    """The half of [`AttributionIndex`] that answers; the other half makes, loads and keeps what is asked."""

    folder: Path
    config: TrakConfig
    members: list[MemberReader]
    passes: Sequence[Pass]
    n_checkpoints: int
    search_index: SearchIndex | None = None
    _queries: QuerySide
    _choice: DampingChoice | None = None

    @property
    def n_rows(self) -> int:
        """Training examples.

        ```python
        >>> index.n_rows
        40
        ```
        """
        return self.members[0].n_rows

    def score(
        self,
        queries: Dataset | IterableDataset,
        *,
        target: str | int = "label",
        contrast: tuple[str | int, str | int] | None = None,
        aggregate: str | None = None,
        direction: str = "pair",
        documents: str | None = None,
        options: ScoreOptions | None = None,
        batch_size: int | str = "auto",
        output_file: str | Path | None = None,
        max_memory: int | str | None = None,
        progress: bool = True,
        **shortcuts: Unpack[ScoreShortcuts],
    ) -> np.ndarray:
        """Return the score of every training example for every query, (n_train, n_query) in float32.

        Positive scores mark proponents: training on the example raises the query's output.

        ```python
        >>> scores = index.score(validation, progress=False)
        >>> scores.shape
        (40, 8)
        >>> index.score(validation, target="prediction", aggregate="mean", progress=False).shape
        (40, 1)
        ```

        Args:
            queries (`Dataset` or `IterableDataset`): With the columns of the training set; by default, labels say which output is meant. A
                stream is read to its end first: give `stream.take(n)` of a long one.
            target (`str` or `int`): Of classifiers, which output: "label", the query's own; "prediction", the class that the model predicts
                (of several checkpoints, the last one; of points of a path, the final model); or a class, by its name, or by its number in the
                training set. Other than with "label", queries need no label column. Of regressions, "prediction".
            contrast (`tuple`, *optional*): Two targets: the score is that of the difference of their outputs, from the difference of their
                features: what made the model say the first and not the second. Of tasks without classes, `target` and `contrast` may name
                columns of the queries that hold other answers (or captions) in place of the answer: `contrast=("chosen", "rejected")`.
            aggregate (`str`, *optional*): Take many queries as one: "mean" or "sum" of their features; or "nearest": of each training row,
                the largest score over the queries. Scores then have one column.
            direction (`str`): For image-caption pairs, what of a query is attributed: "pair"; "image", how the image tells its caption
                from those of the bank; or "caption", how the caption tells its image.
            documents (`str`, *optional*): Of an index of chunks (`chunk_overlap`), return the scores of documents, (n_documents, n_query): "max",
                that of a document's strongest chunk, or "sum", of all its chunks together.
            options ([`ScoreOptions`], *optional*): How features become scores; by default [`AttributionIndex.score_options`].
            output_file (`str` or `Path`, *optional*): A `.npy` file to memory-map the result to. Room for it is reserved before work
                begins, and it appears under its name when it is whole. Stopped at any moment, the same call goes on where it stopped
                (of one process). Without it, results above 1 GiB, or
                above what `max_memory` leaves, are mapped to a temporary file that vanishes with the array. Several processes fill
                one file together; without a file, each computes all.
            max_memory (`int` or `str`, *optional*): Bytes that solving and scoring may take, such as "2GB", beside the model and
                what is loaded already; by default 2 GB, or what it takes. It does not change a bit of the scores.
            shortcuts: Fields of [`ScoreOptions`], which win over those of `options`: `damping`, `residual_weighting`, `leverage`,
                `soft_threshold`, `out_to_loss_power`, `combination`, `reference_rescale`. See [`AttributionIndex.score_options`].
        """
        queries = read_stream(queries)
        check_is_dataset(queries, "`queries`")
        question = Question(target, contrast, direction, aggregate)
        options = self.score_options(options, **shortcuts)
        document_of = self._documents(documents, options)
        if document_of is not None and output_file is not None:
            raise ValueError("`output_file` is for the scores of chunks: leave it out, and save what `documents` returns.")
        scorer = self._scorer(len(queries), question, options, 0, max_memory, progress)

        def solve() -> Sequence[SolvedQueries]:
            sides = self._sides(queries, question, options, batch_size, progress)
            features, _ = self._featurize(sides, batch_size, progress, direction)
            return self._solve(features, question, options)

        if documents is not None and document_of is not None:
            return document_scores(scorer.stream(solve()), document_of, documents, scorer.n_query)
        return scorer.matrix(solve, output_file)

    def attribute(
        self,
        queries: Dataset | IterableDataset,
        top_k: int = 10,
        *,
        target: str | int = "label",
        contrast: tuple[str | int, str | int] | None = None,
        aggregate: str | None = None,
        direction: str = "pair",
        documents: str | None = None,
        options: ScoreOptions | None = None,
        batch_size: int | str = "auto",
        max_memory: int | str | None = None,
        exact: bool = True,
        progress: bool = True,
        **shortcuts: Unpack[ScoreShortcuts],
    ) -> Dataset:
        """Return each query's strongest proponents and opponents, never holding more than a row group's scores.

        Of several processes of one group (`accelerate launch`, `torchrun`) each ranks a part of the training set, and all return the
        same: all have to call it.

        ```python
        >>> hits = index.attribute(validation, top_k=3, progress=False)
        >>> len(hits), len(hits[0]["proponent_text"])
        (8, 3)
        ```

        Args:
            top_k (`int`): How many of each; at most the number of training examples are returned.
            target, contrast, aggregate, direction, options, max_memory, shortcuts (*optional*): As in [`AttributionIndex.score`].
            documents (`str`, *optional*): Of an index of chunks, rank documents, as in [`AttributionIndex.score`]; of "max", opponents are
                ranked by their lowest chunk. `proponents` and `opponents` are then documents, rows of the dataset that was given to `build`, and
                `proponent_rows` and `opponent_rows` the chunk of each that raises or lowers most, whose kept columns are returned.
            exact (`bool`): Score every training row, the default; False asks the index of [`AttributionIndex.add_search_index`].

        Returns:
            `Dataset`: One row per query: `query_id`, `query_output` (the mean over models; of points of a path, what the final model says,
            which takes a forward pass; of a contrast, the difference; of many queries as one, their sum or mean), `proponents` and
            `opponents` (rows of the training set, the strongest first), `proponent_scores` and `opponent_scores`; where columns were kept
            (`keep_columns`), also `proponent_<column>` and `opponent_<column>`, lists in the same order.
        """
        queries = read_stream(queries)
        check_is_dataset(queries, "`queries`")
        question = Question(target, contrast, direction, aggregate)
        options = self.score_options(options, **shortcuts)
        scorer = self._scorer(len(queries), question, options, check_top_k(top_k), max_memory, progress)
        rank = self._ranker(scorer, exact, documents)
        sides = self._sides(queries, question, options, batch_size, progress)
        features, output = self._featurize(sides, batch_size, progress, direction, shown=True)
        return self._hits(rank(self._solve(features, question, options)), output, question)

    def attribute_features(
        self,
        features: Any,
        top_k: int = 10,
        *,
        aggregate: str | None = None,
        options: ScoreOptions | None = None,
        max_memory: int | str | None = None,
        exact: bool = True,
        progress: bool = True,
        **shortcuts: Unpack[ScoreShortcuts],
    ) -> Dataset:
        """Return what [`AttributionIndex.attribute`] does for queries whose features were made elsewhere, with no model at hand.

        Nothing can tell whether they are of the index's checkpoint and sketch: make them with
        `queries.map(index.featurizer(), batched=True)`, on any machine.

        ```python
        >>> features = index.featurize_queries(validation, progress=False)["trak_features"]
        >>> hits = index.attribute_features(features, top_k=3)
        >>> hits.num_rows
        8
        ```

        Args:
            features: An array of shape (n_query, proj_dim), or a Dataset with the column `trak_features`; for several members, a list
                with one for each. See [`read_query_features`].
            top_k, aggregate, options, max_memory, exact, shortcuts (*optional*): As in [`AttributionIndex.attribute`].

        Returns:
            `Dataset`: As [`AttributionIndex.attribute`]; `query_output` only where the features come with `trak_output`, whose mean it is.
        """
        question = Question(aggregate=aggregate)
        options = self.score_options(options, **shortcuts)
        found = self._read_features(features)
        scorer = self._scorer(len(found[0]), question, options, check_top_k(top_k), max_memory, progress)
        rank = self._ranker(scorer, exact)
        return self._hits(rank(self._solve(found, question, options)), mean_output(features), question)

    def _scorer(
        self, n_query: int, question: Question, options: ScoreOptions, top_k: int, max_memory: int | str | None, progress: bool
    ) -> Scorer:
        nearest = n_query if question.aggregate == "nearest" else 0
        return Scorer(self.members, options, question.n_columns(n_query), top_k, max_memory, progress, nearest)

    def _solve(
        self, features: list[Float[Tensor, "n_query proj_dim"]], question: Question, options: ScoreOptions
    ) -> list[SolvedQueries]:
        features[:] = map(question.join, features)
        return solve_all(self.members, features, options)

    def _hits(self, best: Any, output: np.ndarray | None, question: Question) -> Dataset:
        shown = None if output is None else question.join(torch.from_numpy(output), linear=False).numpy()
        return self._with_kept(to_hits(best, shown))

    def scores_of_rows(
        self, rows: Sequence[int], solved: Sequence[SolvedQueries], options: ScoreOptions
    ) -> Float[np.ndarray, "rows n_query"]:
        """Return the scores of some training rows alone, before any soft threshold."""
        shard_rows = self.members[0].identity["shard_rows"]
        found: dict[int, np.ndarray] = {}
        for shard in sorted({row // shard_rows for row in rows}):
            blocks = stream_scores(
                self.members,
                solved,
                out_to_loss_power=options.out_to_loss_power,
                combination=options.combination,
                shards=range(shard, shard + 1),
            )
            scores = torch.cat(list(blocks)).numpy()
            found.update({row: scores[row % shard_rows] for row in rows if row // shard_rows == shard})
        return np.stack([found[row] for row in rows])

    def _with_kept(self, hits: Dataset) -> Dataset:
        return KeptRows(self.members[0]).beside(hits)

    def add_search_index(
        self,
        string_factory: str = "Flat",
        *,
        out_to_loss_power: float | None = None,
        combination: str | None = None,
        file: str | Path | None = None,
        train_rows: int = 65_536,
        progress: bool = True,
    ) -> SearchIndex:
        """Build a FAISS index of the training rows through Datasets' `add_faiss_index`, for `attribute(..., exact=False)`.

        It holds each row's features under all members, side by side and weighted, so that its maximum inner product with a solved
        query is the score; damping is still chosen at every call. FAISS keeps it in memory: 4 · n_members · proj_dim bytes a row
        unless `string_factory` compresses them. While it is built, the vectors lie in a temporary file of that size. docs/evidence/scaling.md
        has what different kinds find of the exact best, and how large they are. Needs `pip install 'hf-trak[search]'`.

        Args:
            string_factory (`str`): In the words of FAISS's index factory: "Flat" compares with every row, "IVF1024,Flat" with those of
                some of 1,024 cells, "IVF1024,PQ256" keeps 256 bytes of each row.
            out_to_loss_power, combination (*optional*): As in [`AttributionIndex.score`]; fixed for this search index.
            file (`str` or `Path`, *optional*): Where it is kept; if it is there already, it is read.
            train_rows (`int`): Rows, drawn at random, that cells and codes are fitted to.

        Returns:
            `SearchIndex`: The index now in use; `.index.faiss_index` is FAISS's own, to set `nprobe` and the like.

        Raises:
            ImportError: Without FAISS.
            ValueError: If FAISS knows no such index, there are too few rows to train it, or `file` holds another.
        """
        options = self.score_options(out_to_loss_power=out_to_loss_power, combination=combination)
        kind: dict[str, Any] = {
            "string_factory": string_factory,
            "out_to_loss_power": options.out_to_loss_power,
            "combination": options.combination,
        }
        if file is not None and Path(file).exists():
            self.search_index = SearchIndex.load(file, describe(self.members, **kind))
        else:
            self.search_index = SearchIndex.build(self.members, **kind, train_rows=train_rows, progress=progress)
            if file is not None:
                self.search_index.save(file)
        return self.search_index

    def _documents(self, documents: str | None, options: ScoreOptions) -> Int64[np.ndarray, " n_train"] | None:
        """Return the document of each training row, where documents are asked for.

        Raises:
            ValueError: If the index is not of chunks, or scores of rows are thresholded.
        """
        if documents is None:
            return None
        check_way(documents)
        kept = KeptRows(self.members[0])
        if DOCUMENT not in kept.column_names:
            raise ValueError(
                f"`documents` (--documents) is for indexes of chunks, but {self.folder} has whole rows. Leave it out, or build the index with "
                "`chunk_overlap` (--chunk_overlap)."
            )
        if options.soft_threshold is not None:
            raise ValueError("`soft_threshold` counts training rows, which are chunks: leave it out with `documents`.")
        return np.asarray(kept.take(range(self.n_rows), columns=[DOCUMENT]).with_format("numpy")[DOCUMENT][:], dtype=np.int64)

    def _ranker(
        self, scorer: Scorer, exact: bool, documents: str | None = None
    ) -> Callable[[Sequence[SolvedQueries]], tuple[Any, Any]]:
        """Return what ranks solved queries; what it cannot answer is refused before queries cost anything."""
        if documents is not None and (document_of := self._documents(documents, scorer.options)) is not None:
            if not exact:
                raise ValueError("`documents` needs the scores of all rows: leave out exact=False.")
            return lambda solved: top_documents(scorer.stream(solved), document_of, documents, scorer.top_k)
        if exact:
            return scorer.best
        if self.search_index is None:
            raise ValueError("exact=False asks a search index, but there is none: call `index.add_search_index()` first.")
        self.search_index.check(scorer.options)
        if scorer.nearest:
            raise ValueError("aggregate='nearest' needs the scores of all rows: leave out exact=False.")
        return functools.partial(self.search_index.best, top_k=scorer.top_k)

    def self_influence(self, *, damping: float | str | None = None) -> Float64[np.ndarray, " n_train"]:
        r"""Return the size of every training example's score for itself: $\phi^\top(K + \lambda\bar\mu I)^{-1}\phi \cdot |Q|$.

        Examples that stand alone and whose outputs the model has not learned score high. Both factors are means over members, as in
        [`AttributionIndex.score`]. To find wrong labels, use [`AttributionIndex.label_errors`].

        ```python
        >>> index.self_influence().shape
        (40,)
        ```
        """
        return self_influence(self.members, damping=self.resolve_damping(damping)).numpy()

    def label_errors(
        self,
        validation: Dataset | None = None,
        *,
        train: Dataset | None = None,
        budget: int | float | None = None,
        damping: float | str | None = None,
        batch_size: int | str = "auto",
        progress: bool = True,
    ) -> Dataset:
        """Return the training rows whose labels look wrong, the most suspicious first; for classifiers.

        A label is suspicious if the rows that it resembles oppose it, in the training set and in `validation`, and if the model doubts it.
        docs/evidence/label_errors.md has the formula, and how many planted errors it finds.

        ```python
        >>> suspects = index.label_errors(validation, budget=5, progress=False)
        >>> suspects["rank"][:]
        [1, 2, 3, 4, 5]
        ```

        Args:
            validation (`Dataset`, *optional*): Held-out rows with the columns of the training set, whose labels can be trusted. A few
                hundred help most where many training labels are wrong.
            train (`Dataset`, *optional*): The training set, in any order; see [`AttributionIndex.align`]. Labels are suggested and its columns
                are returned. By default, the columns that the index kept (`keep_columns`) stand for it.
            budget (`int` or `float`, *optional*): Rows to return, or their share; by default all.
            damping (`float` or `"auto"`, *optional*): By default, the configuration's.

        Returns:
            `Dataset`: `rank`, `row` (of the training set), `score` (above 0 and at most 1), `evidence` (positive where other rows support the
            label) and `doubt` (the model's 1 − p of the label). With `train`, or a label column that was kept, also `given_label` and
            `suggested_label` (of the other classes, the one whose rows oppose the given label most: where the given one is wrong, the likeliest
            right one); and the other columns of `train`, or those that were kept.

        Raises:
            ValueError: If the task has no class labels, `validation` has no labels or other columns, `train` is not the training set, or
                all its rows have the same label; before anything is computed.
        """
        check_labels_task(self.members[0].identity["task"], self.members[0].identity["out_to_loss_kind"])
        n_reported = check_budget(budget, self.n_rows)
        given = given_labels(train, self.members[0], label_column=self.config.label_column, index=self.folder)
        kept = KeptRows(self.members[0]) if train is None else None
        options = self.score_options(damping=damping)
        features = None
        if validation is not None:
            validation = read_stream(validation)
            check_is_dataset(validation, "`validation`")
            if len(validation) == 0:
                raise ValueError("`validation` has no rows. Leave it out if there are no held-out rows.")
            sides = self._sides(validation, Question(), options, batch_size, progress)
            features, _ = self._featurize(sides, batch_size, progress)
        evidence = LabelEvidence(self.members, damping=options.damping)
        suspicion = label_suspicion(evidence, features)
        return label_error_rows(evidence, suspicion, given, n_reported, kept)

    def resolve_damping(self, damping: float | str | None = None) -> float:
        """Return λ as a number: the one given, else the configuration's. "auto" is chosen by the members' subset masks where they are
        recorded; otherwise it is 3 below ten checkpoints and 1 from there on.

        ```python
        >>> index.resolve_damping()
        3.0
        ```
        """
        chosen = self.config.damping if damping is None else damping
        if chosen != "auto":
            return float(chosen)
        choice = self.damping_choice()
        return default_damping(self.n_checkpoints) if choice is None else choice.damping

    @property
    def _default_power(self) -> float:
        chosen = self.config.out_to_loss_power
        return default_power_of(self.members) if chosen is None else float(chosen)

    def score_options(self, options: ScoreOptions | None = None, **shortcuts: Unpack[ScoreShortcuts]) -> ScoreOptions:
        """Return how features become scores: what the configuration says, unless changed.

        ```python
        >>> options = index.score_options(damping=1.0, leverage=True)
        >>> scores = index.score(validation, options=options, progress=False)
        ```

        Args:
            options ([`ScoreOptions`], *optional*): In place of the index's own.
            shortcuts: Fields of [`ScoreOptions`]; None stands for the index's own. `damping` may be "auto". `out_to_loss_power` is by default
                the configuration's, else 1/2, and 1 where `trak_out_to_loss` is no 1 − p or all members are points of a path before its end.
                The paper's TRAK is [`TrakConfig.published`]: `damping=0, out_to_loss_power=1, combination="means"`.

        Raises:
            ValueError: If a value cannot serve.
        """
        given: dict[str, Any] = {name: value for name, value in shortcuts.items() if value is not None}
        if unknown := sorted(set(given) - {field.name for field in fields(ScoreOptions)}):
            raise TypeError(
                f"There is no option {', '.join(map(repr, unknown))}. Known are {', '.join(field.name for field in fields(ScoreOptions))}."
            )
        if options is None or given.get("damping") == "auto":
            given["damping"] = self.resolve_damping(given.get("damping"))
        if options is None:
            given = {"out_to_loss_power": self._default_power, "combination": self.config.combination, **given}
            options = ScoreOptions(given["damping"])
        given.update({name: float(given[name]) for name in ("damping", "out_to_loss_power") if name in given})
        options = replace(options, **given)
        if options.residual_weighting:
            check_residuals(self.members[0])
        if not 0 <= options.out_to_loss_power <= 1:
            raise ValueError(f"`out_to_loss_power` must lie in 0 to 1, but is {options.out_to_loss_power}.")
        if options.combination not in COMBINATIONS:
            raise ValueError(f"`combination` must be {' or '.join(map(repr, COMBINATIONS))}, but is {options.combination!r}.")
        return options

    def damping_choice(self) -> DampingChoice | None:
        """Return the λ that ranks the members' own outputs best, and its curve; None where no subset masks tell.

        It is read from the index, or computed once.

        ```python
        >>> index.damping_choice() is None  # of one model, no random subsets tell
        True
        ```
        """
        if self._choice is None:
            self._choice = DampingChoice.load(self.folder, self.members) or choose_damping(
                self.members,
                [plan.checkpoint if plan.model is None else plan.model for plan in self.passes for _ in plan.members],
                out_to_loss_power=self._default_power,
            )
        return self._choice

    def _sides(
        self, queries: Dataset, question: Question, options: ScoreOptions, batch_size: int | str, progress: bool
    ) -> list[Side]:
        """Return queries with what is asked of them; what cannot be answered is refused before they cost anything."""
        asked = self._queries.asked(queries, question)
        self._check_gram(options)
        return self._queries.sides(asked, batch_size, progress)

    def _check_gram(self, options: ScoreOptions) -> None:
        """Refuse a singular Gram matrix and damaged shards before queries cost anything; of a large index, the rest when it is read."""
        kept = self.members[0].in_memory
        if kept is not None and (options.damping, options.residual_weighting) in kept.factors:
            return  # it was factored
        damped(self.members[0].gram(), n_rows=self.n_rows, damping=options.damping)
        left = _HASHED_BEFORE_QUERIES
        for member in self.members:
            left = member.hash_shards(left)

    def _featurize(
        self, sides: Sequence[Side], batch_size: int | str, progress: bool, direction: str = "pair", *, shown: bool = False
    ) -> tuple[list[Float[Tensor, "n_query proj_dim"]], Float[np.ndarray, " n_query"]]:
        """Return the queries' features under every member, and their mean output; of several sides, their sums with the sides' signs.

        Args:
            shown (`bool`): The output is to be shown: of points of a path, take that of the final model.
        """
        features, outputs = [], []
        final: dict[int | None, np.ndarray | None] = {}
        for number, plan in enumerate(self.passes):
            description = f"Queries {number + 1}/{len(self.passes)}"
            featurizer = self._queries.featurizer(plan, direction=direction)
            task, found = featurizer.task, []
            for side in sides:
                featurizer.use_task(side.task(task))
                found.append(self._queries.featurize(featurizer, side, batch_size, progress, description))
            if shown and plan.model not in final:
                final[plan.model] = self._queries.final_output(plan, sides, batch_size, progress)
            if len(sides) > 1 and number == 0:
                _tell_equal_sides([columns_of(columns, plan.seeds[0], plan.seeds)["trak_features"] for columns in found])
            for seed in plan.seeds:
                mine = [columns_of(columns, seed, plan.seeds) for columns in found]
                features.append(torch.from_numpy(_signed(sides, [columns["trak_features"] for columns in mine])))
                last = final.get(plan.model)
                outputs.append(_signed(sides, [columns["trak_output"] for columns in mine]) if last is None else last)
        return features, np.mean(outputs, axis=0)

    def _read_features(self, features: Any) -> list[Float[Tensor, "n_query proj_dim"]]:
        return read_query_features(features, n_members=len(self.members), proj_dim=self.config.proj_dim)


def _tell_equal_sides(features: Sequence[np.ndarray]) -> None:
    """Say how many queries have the same output on both sides of a contrast."""
    same = np.flatnonzero((features[0] == features[1]).all(1))
    if len(same):
        logger.warning(
            "Both sides of the contrast are the same output for %d of %d queries, whose scores are 0: %s.",
            len(same),
            len(features[0]),
            name_rows(same),
        )


def _signed(sides: Sequence[Side], values: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sum of the sides' values with their signs; of one side, its values as they are."""
    if len(sides) == 1:
        return values[0]
    return sum(side.sign * one.astype(np.float64) for side, one in zip(sides, values, strict=True)).astype(np.float32)  # type: ignore[union-attr]
