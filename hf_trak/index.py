"""`AttributionIndex`: a folder of features, and the questions one asks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from hf_trak.building.build import Order, Source, build_members
from hf_trak.building.estimate import Estimate, estimate_build
from hf_trak.building.jobs import Job, merge_members, remove_job_records
from hf_trak.building.passes import DEFAULT_SHARD_ROWS, Writing
from hf_trak.config import CONFIG_NAME, TrakConfig
from hf_trak.distributed import current_processes, launched_processes
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.featurizing.identity import recorded_passes
from hf_trak.hub.cards import CURVE_NAME, draw_damping_curve
from hf_trak.hub.copies import render_card, write_card
from hf_trak.hub.download import HubIndex
from hf_trak.hub.mixin import HubMixin
from hf_trak.hub.object_index import ObjectIndex
from hf_trak.members import Ensemble
from hf_trak.messages import list_differences
from hf_trak.querying.explanations import ExplainingMethods
from hf_trak.querying.queries import QuerySide
from hf_trak.querying.questions import Question
from hf_trak.querying.select import SelectMethods
from hf_trak.querying.training_rows import KeptRows, align_rows
from hf_trak.runtime import terminable
from hf_trak.scoring.damping import DAMPING_NAME, DampingChoice
from hf_trak.scoring.ensemble import solve_all
from hf_trak.scoring.memory import parse_memory
from hf_trak.sources.streams import read_stream
from hf_trak.storage.files import remove_file
from hf_trak.storage.format import differences_from, member_folders, member_numbers
from hf_trak.storage.object_store import ObjectPath, place
from hf_trak.storage.reader import MemberReader
from hf_trak.storage.replacing import finish_replacement
from hf_trak.tasks import Task, TaskMaker

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedModel


class AttributionIndex(ExplainingMethods, SelectMethods, HubMixin):
    """Features of a training set under one or more members, on disk.

    Make one with [`AttributionIndex.build`] or `AttributionTrainer.featurize`, load one with
    [`AttributionIndex.from_pretrained`].

    ```python
    >>> index = AttributionIndex.from_pretrained("my-index")
    >>> index
    AttributionIndex('my-index', task='text-classification', n_rows=40, n_members=1, n_checkpoints=1, proj_dim=64)
    ```

    Args:
        folder (`str` or `Path`): Holds `trak_config.json` and `member_0`, `member_1`, ...; or the URL of an object store, such as
            `s3://bucket/my-index`, of which files come to a local cache when they are used.
        models (`Sequence`, *optional*): One model, folder or repository per checkpoint, in place of the recorded ones.
        processing_class (*optional*): In place of the one saved beside the recorded checkpoint.
        task (`Task` or a function, *optional*): Needed again for an index made with a task of your own; or `(model, config) -> Task`.
        base (`str` or `Path`, *optional*): Of an index of points of a path: the base, in place of the recorded one.
        trust_remote_code (`bool`): Run code that recorded checkpoints bring along. Without it, such checkpoints are refused.
        repository (`HubIndex`, *optional*): What `folder` is the cache of; files that are not in it are fetched when they are used.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        models: Sequence[PreTrainedModel | str | Path] | None = None,
        processing_class: Any = None,
        task: Task | TaskMaker | None = None,
        base: str | Path | None = None,
        trust_remote_code: bool = False,
        repository: HubIndex | ObjectIndex | None = None,
    ) -> None:
        self.home = place(folder)
        if isinstance(self.home, ObjectPath):
            repository = ObjectIndex.open(self.home)
        elif repository is None:
            finish_replacement(self.home)
        self._repository = repository
        self.folder = repository.folder if isinstance(repository, ObjectIndex) else self.home
        self.config = TrakConfig.from_pretrained(self.folder)
        self.task = task
        self.members = [
            MemberReader(path, None if repository is None else repository.fetcher(path.name))
            for path in member_folders(self.folder)
        ]
        if not self.members:
            raise FileNotFoundError(f"{self.folder} holds no finished member; featurize a training set first.")
        if missing := sorted(set(range(len(self.members))) ^ set(member_numbers(self.folder))):
            raise ValueError(
                f"{self.folder} holds member_{missing[-1]} but not all members below it. Restore the missing ones from a copy, or run the "
                "command that made the index again."
            )
        self._check_members()
        self.passes = recorded_passes(self.members)
        self.n_checkpoints = len({plan.checkpoint for plan in self.passes})
        self._queries = QuerySide(
            self.folder, self.config, self.members, self.passes, models, processing_class, task, trust_remote_code, base
        )

    def __repr__(self) -> str:
        n_points = len({plan.checkpoint for plan in self.passes if "point" in self.members[plan.members[0]].identity})
        points = f" ({n_points} points of a path)" if n_points else ""
        return (
            f"{type(self).__name__}({str(self.home)!r}, task={self.config.task!r}, n_rows={self.n_rows}, n_members={len(self.members)}, "
            f"n_checkpoints={self.n_checkpoints}{points}, proj_dim={self.config.proj_dim})"
        )

    def _check_members(self) -> None:
        """All members must be of the same rows and the same configuration, or their mean means nothing."""
        expected = self._shared(self.members[0])
        for number, member in enumerate(self.members):
            lines = differences_from(member.identity, self.config)
            lines += list_differences(self._shared(member), expected)
            if lines:
                raise ValueError(
                    f"member_{number} of {self.folder} does not belong to this index:\n"
                    + "\n".join(f"  {line}" for line in lines)
                    + f"\nIf {CONFIG_NAME} was edited, restore it from a copy, or run the command that made the index again, which writes it."
                )

    @staticmethod
    def _shared(member: MemberReader) -> dict[str, Any]:
        return {key: member.identity.get(key) for key in ("task", "n_rows", "shard_rows", "dataset")}

    @classmethod
    def build(
        cls,
        folder: str | Path,
        *,
        models: PreTrainedModel | str | Path | Sequence[PreTrainedModel | str | Path] | Ensemble,
        dataset: Dataset | IterableDataset,
        n_rows: int | None = None,
        config: TrakConfig | None = None,
        processing_class: Any = None,
        task: Task | TaskMaker | None = None,
        base: str | Path | Sequence[str | Path | None] | None = None,
        alpha: float | Sequence[float] | None = None,
        revision: str | None = None,
        base_revision: str | None = None,
        trust_remote_code: bool = False,
        sketch_seeds_per_checkpoint: int = 1,
        dropout_seeds: int = 0,
        masks: Bool[Tensor, "n_models n_train"] | None = None,
        batch_size: int | str = "auto",
        shard_rows: int = DEFAULT_SHARD_ROWS,
        keep_columns: Sequence[str] = (),
        overwrite: bool = False,
        progress: bool = True,
    ) -> AttributionIndex:
        """Featurize a training set under each checkpoint, and return the index.

        Stopped at any moment, the same call goes on where it stopped; called again when all is done, it only loads. Processes of a
        launcher divide the rows among them, and each returns the index: docs/guides/processes.md.

        ```python
        >>> index = AttributionIndex.build(
        ...     "another-index", models="my-bert", dataset=train, config=TrakConfig(proj_dim=64), keep_columns=["text"], progress=False
        ... )
        >>> index.n_rows
        40
        ```

        Args:
            folder (`str` or `Path`): Where the index goes; an empty or new folder, or one this call began. Or the URL of an object
                store, such as `s3://bucket/my-index`: docs/guides/processes.md.
            models (`PreTrainedModel`, `str`, a sequence or [`Ensemble`]): One or more checkpoints. Queries are later featurized with the
                same: a folder or repository is recorded and found again, a model in memory has to be given again. An `Ensemble` holds
                `base`, `alpha`, `revision`, `base_revision`, `sketch_seeds_per_checkpoint`, `dropout_seeds` and `masks`, too.
            dataset (`Dataset` or `IterableDataset`): The training set; its row order is the index's. A streaming one is read to a file in the
                cache of datasets first, which is removed when the process ends, and is read again where a build goes on.
            n_rows (`int`, *optional*): Of a streaming dataset, how many rows to read; all by default.
            base (`str`, `Path` or a sequence, *optional*): The checkpoint that `models` were trained from: a folder or repository;
                "adapter", the base model under a LoRA adapter; or "auto", that, or the `base_model` that the model's card names. Features
                are then of points of the line from it to the model: docs/concepts/halfway.md. Several are one per model, None for the model itself.
            alpha (`float` or a sequence, *optional*): Which points base + alpha (model − base), each a checkpoint that costs a pass of
                gradients, at least 0 and below 1; by default 0.2, 0.5 and 0.8.
            revision, base_revision (`str`, *optional*): Of the repositories in `models` and `base`; the commits they stand for are recorded.
            trust_remote_code (`bool`): Run code that `models` bring along. Without it, such models are refused.
            sketch_seeds_per_checkpoint (`int`): Members that share a checkpoint's gradients, each with a sketch of its own. Each
                further one costs disk, and the time of one more sketch: about a third of a pass.
            dropout_seeds (`int`): Thinned networks per checkpoint, in place of the whole one; each costs a pass of gradients.
            masks (`torch.Tensor`, *optional*): Which rows each model was trained on, where those were random subsets. They are
                recorded, and `damping="auto"` is chosen by them.
            batch_size (`int` or `"auto"`): Rows at a time; `"auto"` halves when memory runs out.
            shard_rows (`int`): Rows per file, and what a killed process loses at most.
            keep_columns (`Sequence[str]`): Columns of `dataset` that are stored with the features of the first member, typed as they are, so
                that [`AttributionIndex.attribute`] shows the rows it names without the training set, from the Hub too. Images are
                stored as their files.
            overwrite (`bool`): Replace another index in `folder` once this one is whole. Files that no index wrote stay, and a folder
                that holds no index is refused.

        Raises:
            ValueError: If `folder` holds another index, or the data or model cannot be featurized; nothing is overwritten.
            ValueError: If a launcher started several processes that do not know of each other.
            ProcessEnded: If another process of the same run has ended before it was done.
        """
        ensemble = Ensemble.of(
            models,
            revision=revision,
            base=base,
            alpha=alpha,
            base_revision=base_revision,
            sketch_seeds_per_checkpoint=sketch_seeds_per_checkpoint,
            dropout_seeds=dropout_seeds,
            masks=masks,
        )
        source = Source(dataset, processing_class, task, keep_columns, trust_remote_code, n_rows)
        order = Order(ensemble, source, config or TrakConfig(), Writing(batch_size, shard_rows, overwrite, progress))
        folder = place(folder)
        with terminable(), current_processes() as processes:
            build_members(folder, order, processes)
            index = cls(
                folder,
                models=ensemble.models,
                processing_class=processing_class,
                task=task,
                trust_remote_code=trust_remote_code,
            )
            if processes.is_first:
                index._complete()
        return index

    @classmethod
    def estimate(
        cls,
        *,
        models: PreTrainedModel | str | Path | Sequence[PreTrainedModel | str | Path] | Ensemble,
        dataset: Dataset | IterableDataset,
        config: TrakConfig | None = None,
        **options: Any,
    ) -> Estimate:
        """Return what [`AttributionIndex.build`] would take: time, disk and memory, from some rows of the first checkpoint.

        ```python
        >>> estimate = AttributionIndex.estimate(models="my-bert", dataset=train, config=TrakConfig(proj_dim=64))
        >>> estimate.n_rows, estimate.engine
        (40, 'layerwise')
        ```

        Nothing is written. A model or rows that a build would refuse are refused here.

        Args:
            models, dataset, config: As in [`AttributionIndex.build`].
            options: The other arguments of [`AttributionIndex.build`].

        Returns:
            `Estimate`: `seconds`, `disk_bytes`, `memory_bytes`, `engine`, `columns` and the numbers of rows, members and passes.
        """
        return estimate_build(Order.of(models, dataset, config, **options))

    @classmethod
    def build_shards(
        cls,
        folder: str | Path,
        *,
        shard_index: int,
        num_shards: int,
        models: PreTrainedModel | str | Path | Sequence[PreTrainedModel | str | Path] | Ensemble,
        dataset: Dataset | IterableDataset,
        config: TrakConfig | None = None,
        command: Sequence[str] | None = None,
        **options: Any,
    ) -> None:
        """Make one of `num_shards` parts of an index, in a job that knows nothing of the others: see [`AttributionIndex.merge`].

        The jobs share `folder`, and nothing else. They may run in any order or at once, be killed, and be started again; each makes
        what is missing of its part, a stretch of the files of `shard_rows` rows, of every member.

        ```python
        >>> config = TrakConfig(proj_dim=64)
        >>> for job in range(2):  # each in a process of its own, on any machine that sees the folder
        ...     AttributionIndex.build_shards(
        ...         "index-of-jobs", shard_index=job, num_shards=2, models="my-bert", dataset=train, config=config, progress=False
        ...     )
        >>> AttributionIndex.merge("index-of-jobs").n_rows
        40
        ```

        Args:
            shard_index, num_shards (`int`): Which part, from 0, and of how many.
            models, dataset, config: As in [`AttributionIndex.build`], and the same for all jobs.
            command (`Sequence[str]`, *optional*): What starts such a job, but for its part; [`AttributionIndex.merge`] tells it to
                whoever lacks one.
            options: The other arguments of [`AttributionIndex.build`] but `overwrite`, and the same for all jobs.

        Raises:
            ValueError: As [`AttributionIndex.build`]; also if the job was started by a launcher of several processes.
        """
        job, order = Job(shard_index, num_shards, command), Order.of(models, dataset, config, **options)
        if order.writing.overwrite:
            raise ValueError(
                "With `shard_index`, overwrite=True would delete what other jobs have made. Delete the folder first."
            )
        if launched_processes() > 1:
            raise ValueError(
                "`shard_index` is for jobs of one process each; a launcher's processes divide the work by themselves."
            )
        with terminable():
            build_members(place(folder), order, job)

    @classmethod
    def merge(cls, folder: str | Path, **loading: Any) -> AttributionIndex:
        """Finish an index whose parts were made by [`AttributionIndex.build_shards`], and return it.

        The result is, byte for byte, what [`AttributionIndex.build`] would have made.

        Args:
            loading: Of [`AttributionIndex`].

        Raises:
            FileNotFoundError: If no such parts are there.
            ValueError: If some are missing (the message says which, and how to make them), or a shard is not what was written.
        """
        folder = place(folder)
        merge_members(folder)
        index = cls(folder, **loading)
        index._complete()
        remove_job_records(folder)
        return index

    def _complete(self) -> None:
        """Choose λ, and write the card."""
        self._record_damping()
        write_card(self.folder, render_card(self.folder, self.config, self.members, name=self.folder.name))
        if isinstance(self._repository, ObjectIndex):
            self._repository.publish()

    def _record_damping(self) -> None:
        """Choose λ where it is to be chosen, and keep the choice and its curve with the index."""
        stored = self.folder / DAMPING_NAME
        try:
            DampingChoice.load(self.folder, self.members)
        except ValueError:
            remove_file(stored)  # damaged: it is computed again
        choice = self.damping_choice() if self.config.damping == "auto" else None
        if choice is None:
            for path in (stored, self.folder / CURVE_NAME):
                if path.exists():
                    remove_file(path)
        elif DampingChoice.load(self.folder, self.members) is None:
            choice.save(self.folder)
            draw_damping_curve(choice, self.folder)

    def keep_in_memory(self, max_memory: int | str = "8GB") -> bool:
        """Load models and features, and keep them in memory for many questions one after another. Answers stay the same.

        ```python
        >>> index.keep_in_memory("1GB")
        True
        ```

        Args:
            max_memory (`int` or `str`): Features that would take more are read from disk at each question, as without this call.

        Returns:
            `bool`: Whether features are kept.
        """
        self._queries.keep_in_memory(self.passes)
        width = self.members[0].gram().shape[0]
        n_bytes = len(self.members) * (4 * self.n_rows * width + 2 * 8 * width**2)  # float32; the Gram matrix and its factor
        if n_bytes > (parse_memory(max_memory) or 0):
            return False
        for member in self.members:
            member.keep_in_memory()
        solve_all(
            self.members, [torch.zeros(1, width) for _ in self.members], self.score_options()
        )  # factors the Gram matrices
        return True

    def features(self, member: int = 0) -> Dataset:
        """Return a member's columns as a Dataset.

        ```python
        >>> columns = index.features()
        >>> len(columns), len(columns[0]["trak_features"])
        (40, 64)
        ```
        """
        from datasets import Dataset

        return Dataset.from_parquet([str(path) for path in self.members[member].shard_paths])

    def featurizer(self, member: int = 0) -> Featurizer:
        """Return the featurizer of a member's checkpoint, task and sketch.

        ```python
        >>> columns = validation.map(index.featurizer(), batched=True)
        >>> hits = index.attribute_features(columns, top_k=3)
        ```

        Raises:
            ValueError: If the model, task or parameters are not those recorded; the message lists what differs.
        """
        plan = next(plan for plan in self.passes if member in plan.members)
        return self._queries.featurizer(replace(plan, members=(member,), seeds=(self.members[member].identity["seed"],)))

    def featurize_queries(
        self,
        queries: Dataset | IterableDataset,
        member: int = 0,
        *,
        batch_size: int | str = "auto",
        progress: bool = True,
    ) -> dict[str, np.ndarray]:
        """Return the trak_* columns of queries under one member, in float32.

        ```python
        >>> index.featurize_queries(validation, progress=False)["trak_features"].shape
        (8, 64)
        ```
        """
        ((_, rows, _),) = self._queries.asked(read_stream(queries), Question())
        (side,) = self._queries.sides([(1.0, rows, "label")], batch_size, progress)
        featurizer = self.featurizer(member)
        featurizer.use_task(side.task(featurizer.task))
        return self._queries.featurize(featurizer, side, batch_size, progress, f"Queries {member + 1}/{len(self.members)}")

    def align(self, train: Dataset) -> Dataset:
        """Return the training rows of this index, in its order, from a dataset that has them: row i of the result is row i of the index.

        Rows are found by the content of the columns that were read, so that `train` may be another file, in another order, or have more
        rows. Of rows with the same content any may stand for any.

        ```python
        >>> shuffled = train.shuffle(seed=0)
        >>> index.align(shuffled)["text"][0] == train["text"][0]
        True
        ```

        Raises:
            ValueError: If `train` lacks some of the rows, or a column that they are compared by; the message says which.
        """
        return align_rows(train, self.members[0], index=self.folder)

    @property
    def kept_rows(self) -> KeptRows:
        """The columns of the training set that were stored with the features (`keep_columns`), by row.

        ```python
        >>> index.kept_rows.column_names
        ['text', 'label']
        ```
        """
        return KeptRows(self.members[0])
