"""Choosing data: the training rows that raise a target set's outputs most, or lower them, as a Dataset with a card."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64, Int64

from hf_trak.config import TrakConfig
from hf_trak.distributed import rank_and_size
from hf_trak.featurizing.identity import recorded_checkpoint
from hf_trak.members import Pass
from hf_trak.querying.less import Checkpoint, checkpoint_weights, find_optimizers, less_scores, parts_of
from hf_trak.querying.queries import QuerySide
from hf_trak.querying.questions import Question
from hf_trak.querying.subsets import check_output, describe_subset, write_subset
from hf_trak.querying.training_rows import KeptRows, align_rows
from hf_trak.runtime import dataset_bars
from hf_trak.scoring.ensemble import ScoreOptions, solve_all, stream_scores
from hf_trak.scoring.selection import first_rows, group_means, shares, spread_out
from hf_trak.sources.row_digests import names_read
from hf_trak.sources.streams import read_stream
from hf_trak.storage.reader import MemberReader, member_blocks
from hf_trak.tasks import TASKS
from hf_trak.tasks.chunks import is_chunked
from hf_trak.tasks.rows import check_is_dataset, column_names, name_rows, values_of

if TYPE_CHECKING:
    from datasets import Dataset

METHODS = ("trak", "less")
ROW, SCORE = "trak_row", "trak_score"
_CANDIDATES = 10  # times the budget: how many rows the diversity term chooses among
_DIRECTIONS_BYTES = 4 << 30


class SelectMethods:
    """`index.select`."""

    folder: Path
    config: TrakConfig
    members: list[MemberReader]
    passes: Sequence[Pass]
    _queries: QuerySide
    score_options: Any
    _sides: Any
    _featurize: Any

    def select(
        self,
        target: Dataset,
        budget: int | float,
        *,
        method: str = "trak",
        train: Dataset | None = None,
        aggregate: str | None = None,
        group_by: str | None = None,
        balance: str | None = None,
        diversity: float = 0.0,
        drop: bool = False,
        lower_output: bool | None = None,
        damping: float | str | None = None,
        out_to_loss_power: float | None = None,
        combination: str | None = None,
        optimizer: str | Path | Sequence[str | Path] = "auto",
        learning_rates: Sequence[float] | None = None,
        output: str | Path | None = None,
        overwrite: bool = False,
        batch_size: int | str = "auto",
        progress: bool = True,
    ) -> Dataset:
        """Return the training rows to train on for a target, the best first; or, with `drop`, those that hurt it most, the worst first.

        What is held in memory is the target's features, one number per training row, and some rows at a time. docs/evidence/choosing_data.md has
        what each choice finds.

        ```python
        >>> chosen = index.select(validation, budget=10, progress=False)
        >>> len(chosen)
        10
        ```

        Args:
            target (`Dataset`): Rows of what the model should become good at, with the columns of the training set and right labels.
            budget (`int` or `float`): How many rows, or which share of them, above 0 and below 1.
            method (`str`): "trak", the scores of [`AttributionIndex.score`]; or "less", cosines of Adam's steps with the gradients of the
                target's loss, summed over checkpoints by their learning rates. The latter computes the gradients of all training rows
                again, so that it takes `train`, or an index that kept the columns that were read, and a pass per checkpoint.
            train (`Dataset`, *optional*): The training set, in any order; see [`AttributionIndex.align`]. Its columns are returned beside the
                scores. By default, the columns that the index kept (`keep_columns`).
            aggregate (`str`, *optional*): A row's score for the target is the mean of its scores for the target's rows ("mean"), or the largest
                one ("max"); with `group_by`, the largest of the means over groups, as in LESS ("max", the default then).
            group_by (`str`, *optional*): A column of `target` that names the group, such as the task, of each row.
            balance (`str`, *optional*): A column of the training set. Each of its values gets the same share of the budget; what a value
                with few rows cannot take goes to the others.
            diversity (`float`): From 0 to below 1. Above 0, rows are chosen one after another among those with the best scores, ten times the
                budget, and rows whose features are like those of a chosen row lose: see [`spread_out`].
            drop (`bool`): Return the rows with the lowest scores.
            lower_output (`bool`, *optional*): Prefer rows that lower the target's outputs. It has to be said for a task of your own whose
                `out_to_loss` is "one", since its output may be a loss.
            damping, out_to_loss_power, combination (*optional*): Of "trak"; as in [`AttributionIndex.score`].
            optimizer (`str`, `Path` or a sequence): Of "less": "auto", the `optimizer.pt` that `Trainer` wrote beside each checkpoint; one file
                for each checkpoint; or "none", to compare gradients in place of Adam's steps.
            learning_rates (`Sequence[float]`, *optional*): Of "less": the weight of each checkpoint. By default, the mean of those that `Trainer`
                logged.
            output (`str` or `Path`, *optional*): A folder to write the rows to, with a card, for `load_dataset`.
            overwrite (`bool`): Replace an earlier subset in `output`. A folder that holds anything else is refused.

        Returns:
            `Dataset`: `trak_row` (of the training set), `trak_score` (above 0 where the row is good for the target), and the columns of `train`, or those that were kept. Equal scores keep the
            training set's order.

        Raises:
            ValueError: If the budget is no number of rows of the index, the target is empty or lacks columns, or an option is of another method.
        """
        given = {"damping": damping, "out_to_loss_power": out_to_loss_power, "combination": combination}
        _check_method(method, given, optimizer, learning_rates)
        n_rows = self.members[0].n_rows
        n_chosen = check_rows(budget, n_rows)
        aggregate = _check_aggregate(aggregate, group_by, method)
        if not 0 <= diversity < 1 or (drop and diversity):
            raise ValueError(
                f"`diversity` must be at least 0 and below 1, and 0 with `drop`, but is {diversity!r}: rows to be left out need not differ."
            )
        target = read_stream(target)
        check_is_dataset(target, "`target`")
        if len(target) == 0:
            raise ValueError(
                "`target` has no rows. Give some of what the model should become good at; a few hundred are enough."
            )
        self._check_direction(lower_output, method)
        target, codes, groups = self._groups(target, group_by, aggregate)
        self._queries.check(target)
        place = None if output is None else check_output(Path(output), overwrite=overwrite)
        rows = TrainingRows(self.members[0], train, self.folder)
        balanced = rows.codes(balance)
        how: dict[str, Any] = {"method": method, "aggregate": aggregate, "groups of the target": groups or None}
        if method == "trak":
            options = self.score_options(damping=damping, out_to_loss_power=out_to_loss_power, combination=combination)
            scores = self._trak_scores(target, codes, options, bool(lower_output), batch_size, progress)
            how |= {name: getattr(options, name) for name in given}
        else:
            scores, more = self._less_scores(target, codes, rows, optimizer, learning_rates, batch_size, progress)
            how |= more
        wanted = -scores if drop else scores
        counts = shares(np.bincount(balanced).tolist(), n_chosen)
        if diversity:
            candidates = first_rows(
                wanted, balanced, shares(np.bincount(balanced).tolist(), min(n_rows, _CANDIDATES * n_chosen))
            )
            chosen = self._spread(wanted, np.sort(candidates), balanced, counts, diversity)
        else:
            chosen = first_rows(wanted, balanced, counts)
        _warn_of_signs(scores[chosen], drop=drop)
        found = rows.beside(chosen, scores[chosen])
        how |= {
            "diversity": diversity or None,
            "balanced over": balance,
            "rows that hurt": drop or None,
            "outputs": "lowered" if lower_output else None,
        }
        found.info.description = json.dumps(
            describe_subset(self.folder, self.members, target, group_by, len(found), how), default=str
        )
        if place is not None and rank_and_size()[0] == 0:
            write_subset(found, place, progress=progress)
        return found

    def _check_direction(self, lower_output: bool | None, method: str) -> None:
        """Refuse to guess whether outputs are to be raised."""
        is_own = self.config.task not in TASKS
        is_loss = self.members[0].identity["out_to_loss_kind"] == "one" and is_own
        if is_loss and lower_output is None:
            raise ValueError(
                f"The output of {self.config.task!r} may be a loss, which good rows lower: say lower_output=True (--lower_output) if it is, and "
                "lower_output=False if it is minus a loss."
            )
        if method == "less" and (is_loss or lower_output):
            raise ValueError(
                "method='less' lowers the target's loss, which for this task or with `lower_output` is not known. Use method='trak'."
            )

    def _groups(
        self, target: Dataset, group_by: str | None, aggregate: str
    ) -> tuple[Dataset, Int64[np.ndarray, " n_target"], list[str]]:
        """Return the target without the column of groups, unless it is read too; each row's group, and the groups' names."""
        if group_by is None:
            codes = np.arange(len(target)) if aggregate == "max" else np.zeros(len(target), dtype=np.int64)
            return target, codes, []
        if group_by not in (there := column_names(target)):
            raise ValueError(f"`target` has no column {group_by!r} to group by; it has {', '.join(there)}.")
        codes, names = encode_groups(values_of(target, group_by), f"column {group_by!r} of `target`")
        read = names_read(self.members[0].identity["dataset"].get("columns", {}))
        return target if group_by in read else target.remove_columns(group_by), codes, names

    def _trak_scores(
        self,
        target: Dataset,
        codes: Int64[np.ndarray, " n_target"],
        options: ScoreOptions,
        lower: bool,
        batch_size: int | str,
        progress: bool,
    ) -> Float64[np.ndarray, " n_train"]:
        sides = self._sides(target, Question(), options, batch_size, progress)
        features, _ = self._featurize(sides, batch_size, progress)
        n_groups, sign = int(codes.max()) + 1, -1.0 if lower else 1.0
        solved = [
            one._replace(preconditioned=(sign * group_means(one.preconditioned, codes, n_groups)).float(), influence_rms=None)
            for one in solve_all(self.members, features, options)
        ]
        how: dict[str, Any] = {"out_to_loss_power": options.out_to_loss_power, "combination": options.combination}
        best = [block.amax(1).double() for block in stream_scores(self.members, solved, **how)]
        return torch.cat(best).numpy()

    def _less_scores(
        self,
        target: Dataset,
        codes: Int64[np.ndarray, " n_target"],
        rows: TrainingRows,
        optimizer: str | Path | Sequence[str | Path],
        learning_rates: Sequence[float] | None,
        batch_size: int | str,
        progress: bool,
    ) -> tuple[Float64[np.ndarray, " n_train"], dict[str, Any]]:
        read = rows.check_read()
        first = {plan.checkpoint: plan for plan in reversed(self.passes)}
        plans = [first[number] for number in sorted(first)]
        folders = [self._checkpoint_folder(plan) for plan in plans]
        if optimizer == "auto" and any("point" in self.members[plan.members[0]].identity for plan in plans):
            raise ValueError(
                "Points of a path have no optimizer's state, which LESS takes: make the index of checkpoints, or compare gradients as they "
                "are with optimizer='none' (--optimizer none)."
            )
        files, about = find_optimizers(folders, optimizer)
        weights, source = checkpoint_weights(folders, learning_rates)
        checkpoints = [Checkpoint(partial(self._featurizer_of, plan), file) for plan, file in zip(plans, files, strict=True)]
        n_rows = self.members[0].n_rows
        scores = less_scores(
            checkpoints,
            weights,
            target,
            codes,
            int(codes.max()) + 1,
            lambda: parts_of(read, n_rows),
            n_rows,
            batch_size=batch_size,
            progress=progress,
        )
        shown = ", ".join(f"{weight:.3g}" for weight in weights)
        return scores.max(1), {"optimizer": about, "weights of checkpoints": f"{shown} ({source})"}

    def _checkpoint_folder(self, plan: Pass) -> Path | None:
        """Return where a checkpoint lies; None for one of the Hub or in memory."""
        given = self._queries._model(plan)
        if given is None:
            info = self.members[plan.members[0]].info["checkpoint"]
            given = recorded_checkpoint(self.folder, info) if info["path"] is not None else None
        return Path(given) if isinstance(given, (str, Path)) and Path(given).is_dir() else None

    def _featurizer_of(self, plan: Pass) -> Any:
        """Return the featurizer of a checkpoint with its first sketch."""
        return self._queries.featurizer(replace(plan, members=plan.members[:1], seeds=plan.seeds[:1]))

    def _spread(
        self,
        scores: Float64[np.ndarray, " n_train"],
        candidates: Int64[np.ndarray, " n"],
        codes: Int64[np.ndarray, " n_train"],
        counts: Sequence[int],
        diversity: float,
    ) -> Int64[np.ndarray, " n_chosen"]:
        n_bytes = 4 * len(candidates) * len(self.members) * self.config.proj_dim
        if n_bytes > _DIRECTIONS_BYTES:
            raise ValueError(
                f"`diversity` compares the features of {len(candidates):,} rows with each other, which takes {n_bytes / 1e9:.1f} GB: more than "
                f"{_DIRECTIONS_BYTES / 1e9:.1f}. Choose fewer rows, or leave it out."
            )
        directions = np.zeros((len(candidates), len(self.members), self.config.proj_dim), dtype=np.float32)
        for number, member in enumerate(self.members):
            for block in member_blocks(member):
                ids = block.example_id.numpy()
                mine = np.flatnonzero(np.isin(candidates, ids))
                if len(mine):
                    some = block.features[candidates[mine] - ids[0]]
                    norms = torch.linalg.vector_norm(some, dim=1, keepdim=True)
                    directions[mine, number] = (some / norms.where(norms > 0, 1.0)).numpy()
        flat = directions.reshape(len(candidates), -1) / math.sqrt(len(self.members))  # so that products are mean cosines
        return candidates[spread_out(scores[candidates], flat, codes[candidates], counts, diversity=diversity)]


class TrainingRows:
    """The training rows of an index with their columns: from the training set, or as far as the index kept them.

    Args:
        train (`Dataset`, *optional*): The training set, in any order.

    Raises:
        ValueError: As [`align_rows`]; or if the result's own columns are among those of the training set.
    """

    def __init__(self, member: MemberReader, train: Dataset | None, index: Path) -> None:
        self._member = member
        self._index = index
        self._train = None if train is None else align_rows(train, member, index=index)
        self._kept = KeptRows(member)
        if taken := [name for name in (ROW, SCORE) if name in self.column_names]:
            raise ValueError(
                f"The training set has a column {taken[0]!r}, the name of one of the result's. Rename it with `train.rename_column`, or give "
                "`train` without it."
            )

    @property
    def column_names(self) -> list[str]:
        return self._kept.column_names if self._train is None else list(self._train.column_names)

    def codes(self, column: str | None) -> Int64[np.ndarray, " n_train"]:
        """Return the group of each row by a column; one group without any.

        Raises:
            ValueError: If there is no such column, or it lacks values.
        """
        if column is None:
            return np.zeros(self._member.n_rows, dtype=np.int64)
        if column not in self.column_names:
            where = "The index kept" if self._train is None else "`train` has"
            raise ValueError(
                f"{where} no column {column!r} to balance over, but {', '.join(self.column_names) or 'none'}. Give the training set that has it "
                "as `train` (--train)."
            )
        if self._train is None:
            values = self._kept.take(range(self._member.n_rows), columns=[column])[column][:]
        else:
            values = values_of(self._train, column)
        return encode_groups(values, f"column {column!r} of the training set")[0]

    def check_read(self) -> Any:
        """Return what reads some rows whole, as they were featurized.

        Raises:
            ValueError: If there is no training set, and the index did not keep all columns that were read.
        """
        if is_chunked(self.column_names):
            raise ValueError("method='less' is not for an index of chunks (`chunk_overlap`): choose by method='trak'.")
        if (train := self._train) is not None:
            return lambda some: train.select(some)
        read = names_read(self._member.identity["dataset"].get("columns", {}))
        if not read or not set(read) <= set(self._kept.column_names):
            raise ValueError(
                f"method='less' computes the gradients of the training rows again, which takes the rows themselves: give them as `train` "
                f"(--train), or build the index with keep_columns={list(read)}."
            )
        return lambda some: self._kept.take(some, columns=list(read))

    def beside(self, rows: Int64[np.ndarray, " n"], scores: Float64[np.ndarray, " n"]) -> Dataset:
        """Return a Dataset of rows and scores, and the columns of these rows."""
        from datasets import Dataset, concatenate_datasets

        found = Dataset.from_dict({ROW: rows, SCORE: scores})
        if not self.column_names:
            return found
        if self._train is None:
            columns = self._kept.take(rows.tolist())
        else:
            with dataset_bars(shown=False):
                columns = self._train.with_format(None).select(rows).flatten_indices()
        return concatenate_datasets([found, columns], axis=1)


def encode_groups(values: Sequence[Any], where: str) -> tuple[Int64[np.ndarray, " n"], list[str]]:
    """Return the group of each value, numbered as they first occur, and the groups' names.

    Raises:
        ValueError: If a value is missing, or is no name.
    """
    if missing := [row for row, value in enumerate(values) if value is None]:
        raise ValueError(
            f"{len(missing)} values of {where} are missing, {name_rows(missing)}. Fill them, or leave these rows out."
        )
    if other := [value for value in values if not isinstance(value, (str, int))]:
        raise ValueError(f"{where} must hold names or whole numbers, but has {other[0]!r:.60}.")
    numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
    return np.array([numbers[value] for value in values], dtype=np.int64), [str(value) for value in numbers]


def check_rows(budget: int | float, n_rows: int) -> int:
    """Return how many rows a budget is.

    Raises:
        ValueError: If it is neither a whole number from 1 to `n_rows`, nor a share above 0 and below 1.
    """
    is_whole = isinstance(budget, int) and not isinstance(budget, bool)
    if is_whole and 1 <= budget <= n_rows:
        return int(budget)
    if isinstance(budget, float) and 0 < budget < 1:
        return max(1, round(budget * n_rows))
    raise ValueError(
        f"`budget` must be a number of rows, from 1 to the index's {n_rows:,}, or a share of them above 0 and below 1 (such as 0.05 or, on the "
        f"command line, 5%), but is {budget!r}."
    )


def _check_method(method: str, of_trak: dict[str, Any], optimizer: Any, learning_rates: Any) -> None:
    if method not in METHODS:
        raise ValueError(f"`method` must be {' or '.join(map(repr, METHODS))}, but is {method!r}.")
    of_less = {
        "optimizer": None if isinstance(optimizer, str) and optimizer == "auto" else optimizer,
        "learning_rates": learning_rates,
    }
    strange = [name for name, value in (of_trak if method == "less" else of_less).items() if value is not None]
    if strange:
        other = "trak" if method == "less" else "less"
        raise ValueError(
            f"{' and '.join(f'`{name}`' for name in strange)} is of method={other!r}, but `method` is {method!r}. Leave it out."
        )


def _check_aggregate(aggregate: str | None, group_by: str | None, method: str) -> str:
    found = aggregate or ("mean" if group_by is None else "max")
    if found not in ("mean", "max"):
        raise ValueError(f"`aggregate` must be 'mean' or 'max', but is {found!r}.")
    if found == "mean" and group_by is not None:
        raise ValueError("`group_by` takes the largest of the groups' means; for the mean over all rows, leave `group_by` out.")
    if found == "max" and group_by is None and method == "less":
        raise ValueError(
            "method='less' takes the largest mean over groups of the target: name their column with `group_by` (--group_by)."
        )
    return found


def _warn_of_signs(scores: Float64[np.ndarray, " n"], *, drop: bool) -> None:
    """Tell of chosen rows that do the opposite of what they are chosen for."""
    if n_wrong := int(((scores > 0) if drop else (scores < 0)).sum()):
        does = (
            "have a score above 0, so that they help the target"
            if drop
            else "have a score below 0, so that they hurt the target"
        )
        warnings.warn(
            f"{n_wrong:,} of the {len(scores):,} chosen rows {does}. A smaller budget has fewer of them.",
            UserWarning,
            stacklevel=3,
        )
