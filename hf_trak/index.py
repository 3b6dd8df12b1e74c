"""`AttributionIndex`: a folder of features, and the questions one asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from hf_trak.build import identity_of, member_folders, recorded_passes
from hf_trak.building import build_members, local_folder
from hf_trak.cards import CURVE_NAME, draw_damping_curve
from hf_trak.config import TrakConfig
from hf_trak.copies import card_for, copy_index, render_card, write_card
from hf_trak.damping import DAMPING_NAME, DampingChoice, choose_damping
from hf_trak.ensemble import ScoreOptions, SolvedQueries, check_residuals, default_power, solve_queries, stream_scores
from hf_trak.featurizer import Featurizer
from hf_trak.hub import download_index, upload_index
from hf_trak.launchers import current_processes, launched_processes
from hf_trak.linalg import damped, default_damping, factor, leverage
from hf_trak.parts import Part, forget_parts, merge_members
from hf_trak.passes import columns_of
from hf_trak.processes import Processes
from hf_trak.query_side import QuerySide, featurize_queries
from hf_trak.score_matrix import allocate, check_keep, soft_threshold_in_place
from hf_trak.scoring import soft_threshold_top_k, top_k
from hf_trak.stopping import terminable
from hf_trak.store import MemberReader, list_differences
from hf_trak.tasks import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

DEFAULT_SHARD_ROWS = 1024


class AttributionIndex:
    """Features of a training set under one or more members, on disk.

    Make one with [`AttributionIndex.build`] or `AttributionTrainer.featurize`, load one with
    [`AttributionIndex.from_pretrained`].

    Args:
        folder (`Path`): Holds `trak_config.json` and `member_0`, `member_1`, ...
        models (`Sequence`, *optional*): One model, folder or repository per checkpoint, in place of the recorded ones.
        processing_class (*optional*): In place of the one saved beside the recorded checkpoint.
        task (`Task`, *optional*): Needed again for an index made with a task of your own.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        models: Sequence[PreTrainedModel | str | Path] | None = None,
        processing_class: Any = None,
        task: Task | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.config = TrakConfig.from_pretrained(self.folder)
        self.members = [MemberReader(path) for path in member_folders(self.folder)]
        if not self.members:
            raise FileNotFoundError(f"{self.folder} holds no finished member; featurize a training set first.")
        self._check_members()
        self.passes = recorded_passes(self.members)
        self.n_checkpoints = len({plan.checkpoint for plan in self.passes})
        self._queries = QuerySide(self.folder, self.config, self.members, self.passes, models, processing_class, task)
        self._choice: DampingChoice | None = None

    def _check_members(self) -> None:
        """All members must be of the same rows and the same configuration, or their mean means nothing."""
        expected = {"config": identity_of(self.config), **self._shared(self.members[0])}
        for number, member in enumerate(self.members):
            lines = list_differences({"config": member.identity["config"], **self._shared(member)}, expected)
            if lines:
                raise ValueError(
                    f"member_{number} of {self.folder} does not belong to this index:\n"
                    + "\n".join(f"  {line}" for line in lines)
                )

    @staticmethod
    def _shared(member: MemberReader) -> dict[str, Any]:
        return {key: member.identity[key] for key in ("task", "n_rows", "shard_rows", "dataset")}

    @classmethod
    def build(
        cls,
        folder: str | Path,
        *,
        models: PreTrainedModel | str | Path | Sequence[PreTrainedModel | str | Path],
        dataset: Dataset,
        config: TrakConfig | None = None,
        processing_class: Any = None,
        task: Task | None = None,
        revision: str | None = None,
        sketch_seeds_per_checkpoint: int = 1,
        dropout_seeds: int = 0,
        masks: Bool[Tensor, "n_checkpoints n_train"] | None = None,
        batch_size: int | str = "auto",
        shard_rows: int = DEFAULT_SHARD_ROWS,
        overwrite: bool = False,
        progress: bool = True,
    ) -> AttributionIndex:
        """Featurize a training set under each checkpoint, and return the index.

        Stopped at any moment, the same call goes on where it stopped; called again when all is done, it only loads. Processes of a
        launcher divide the rows among them, and each returns the index: docs/processes.md.

        Args:
            folder (`str` or `Path`): Where the index goes; an empty or new folder, or one this call began.
            models (`PreTrainedModel`, `str` or a sequence): One or more checkpoints. Queries are later featurized with the same: a
                folder or repository is recorded and found again, a model in memory has to be given again.
            dataset (`Dataset`): The training set; its row order is the index's.
            revision (`str`, *optional*): Of the repositories in `models`.
            sketch_seeds_per_checkpoint (`int`): Members that share a checkpoint's gradients, each with a sketch of its own. Each
                further one costs disk, and the time of one more sketch: about a third of a pass.
            dropout_seeds (`int`): Thinned networks per checkpoint, in place of the whole one; each costs a pass of gradients.
            masks (`torch.Tensor`, *optional*): Which rows each checkpoint was trained on, where those were random subsets. They are
                recorded, and `damping="auto"` is chosen by them.
            batch_size (`int` or `"auto"`): Rows at a time; `"auto"` halves when memory runs out.
            shard_rows (`int`): Rows per file, and what a killed process loses at most.
            overwrite (`bool`): Replace another index in `folder`.

        Raises:
            ValueError: If `folder` holds another index, or the data or model cannot be featurized; nothing is overwritten.
            ValueError: If a launcher started several processes that do not know of each other.
            ProcessEnded: If another process of the same run has ended before it was done.
        """
        checkpoints = list(models) if isinstance(models, (list, tuple)) else [models]
        folder = local_folder(folder)
        with terminable(), current_processes() as processes:
            build_members(
                folder,
                checkpoints,
                dataset,
                config or TrakConfig(),
                processes=processes,
                processing_class=processing_class,
                task=task,
                revision=revision,
                sketch_seeds_per_checkpoint=sketch_seeds_per_checkpoint,
                dropout_seeds=dropout_seeds,
                masks=masks,
                batch_size=batch_size,
                shard_rows=shard_rows,
                overwrite=overwrite,
                progress=progress,
            )
            index = cls(folder, models=checkpoints, processing_class=processing_class, task=task)
            if processes.is_first:
                index._complete()
        return index

    @classmethod
    def build_part(
        cls,
        folder: str | Path,
        *,
        shard_index: int,
        num_shards: int,
        models: PreTrainedModel | str | Path | Sequence[PreTrainedModel | str | Path],
        dataset: Dataset,
        config: TrakConfig | None = None,
        processing_class: Any = None,
        task: Task | None = None,
        revision: str | None = None,
        sketch_seeds_per_checkpoint: int = 1,
        dropout_seeds: int = 0,
        masks: Bool[Tensor, "n_checkpoints n_train"] | None = None,
        batch_size: int | str = "auto",
        shard_rows: int = DEFAULT_SHARD_ROWS,
        progress: bool = True,
        command: Sequence[str] | None = None,
    ) -> None:
        """Make one of `num_shards` parts of an index, in a job that knows nothing of the others: see [`AttributionIndex.merge`].

        The jobs share `folder`, and nothing else. They may run in any order or at once, be killed, and be started again; each makes
        what is missing of its part, a stretch of the files of `shard_rows` rows, of every member.

        Args:
            shard_index, num_shards (`int`): Which part, from 0, and of how many.
            command (`Sequence[str]`, *optional*): What starts such a job, but for its part; [`AttributionIndex.merge`] tells it to
                whoever lacks one.
            models, dataset, ...: As in [`AttributionIndex.build`], and the same for all jobs.

        Raises:
            ValueError: As [`AttributionIndex.build`]; also if the job was started by a launcher of several processes.
        """
        folder, part = local_folder(folder), Part(shard_index, num_shards, command)
        if launched_processes() > 1:
            raise ValueError(
                "`shard_index` is for jobs of one process each; a launcher's processes divide the work by themselves."
            )
        checkpoints = list(models) if isinstance(models, (list, tuple)) else [models]
        with terminable():
            build_members(
                folder,
                checkpoints,
                dataset,
                config or TrakConfig(),
                processes=Processes(),
                part=part,
                processing_class=processing_class,
                task=task,
                revision=revision,
                sketch_seeds_per_checkpoint=sketch_seeds_per_checkpoint,
                dropout_seeds=dropout_seeds,
                masks=masks,
                batch_size=batch_size,
                shard_rows=shard_rows,
                overwrite=False,
                progress=progress,
            )

    @classmethod
    def merge(cls, folder: str | Path, **loading: Any) -> AttributionIndex:
        """Finish an index whose parts were made by [`AttributionIndex.build_part`], and return it.

        The result is, byte for byte, what [`AttributionIndex.build`] would have made.

        Args:
            loading: Of [`AttributionIndex`].

        Raises:
            FileNotFoundError: If no such parts are there.
            ValueError: If some are missing (the message says which, and how to make them), or a shard is not what was written.
        """
        folder = local_folder(folder)
        merge_members(folder)
        index = cls(folder, **loading)
        index._complete()
        forget_parts(folder)
        return index

    def _complete(self) -> None:
        """Choose λ, and write the card."""
        self._record_damping()
        write_card(self.folder, render_card(self.folder, self.config, self.members, name=self.folder.name))

    def _record_damping(self) -> None:
        """Choose λ where it is to be chosen, and keep the choice and its curve with the index."""
        stored = self.folder / DAMPING_NAME
        choice = self.damping_choice() if self.config.damping == "auto" else None
        if choice is None:
            stored.unlink(missing_ok=True)
            (self.folder / CURVE_NAME).unlink(missing_ok=True)
        elif DampingChoice.load(self.folder, self.members) is None:
            choice.save(self.folder)
            draw_damping_curve(choice, self.folder)

    def damping_choice(self) -> DampingChoice | None:
        """Return the λ that ranks the members' own outputs best, and its curve; None where no subset masks tell.

        It is read from the index, or computed once.
        """
        if self._choice is None:
            self._choice = DampingChoice.load(self.folder, self.members) or choose_damping(
                self.members,
                [plan.checkpoint for plan in self.passes for _ in plan.members],
                out_to_loss_power=self._default_power,
            )
        return self._choice

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        models: PreTrainedModel | str | Path | Sequence[PreTrainedModel | str | Path] | None = None,
        processing_class: Any = None,
        task: Task | None = None,
    ) -> AttributionIndex:
        """Load an index from a folder or a dataset repository of the Hub.

        Raises:
            FileNotFoundError: If there is no index there.
            ValueError: If a file is missing, truncated or of another format version; the message names it.
        """
        folder = Path(name_or_path)
        if not folder.exists():
            folder = download_index(str(name_or_path), revision)
        elif revision is not None:
            raise ValueError(f"`revision` is for repositories, but {folder} is a folder.")
        given = list(models) if isinstance(models, (list, tuple)) else models if models is None else [models]
        return cls(folder, models=given, processing_class=processing_class, task=task)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Copy the index to another folder; files of the copy appear under their names only when whole.

        Raises:
            ValueError: If `folder` is not empty and `overwrite` is not set.
        """
        copy_index(self.folder, Path(folder), self.config, self.members, overwrite=overwrite)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, revision: str | None = None, commit_message: str | None = None
    ) -> str:
        """Upload the index to a dataset repository in one commit; return its URL."""
        message = commit_message or f"TRAK features: {len(self.members)} members of {self.n_rows:,} rows"
        card = card_for(self.folder, self.config, self.members, name=repo_id)
        return upload_index(self.folder, repo_id, card=card, private=private, revision=revision, message=message)

    @property
    def n_rows(self) -> int:
        """Training examples."""
        return self.members[0].n_rows

    def features(self, member: int = 0) -> Dataset:
        """Return a member's columns as a Dataset."""
        from datasets import Dataset

        return Dataset.from_parquet([str(path) for path in self.members[member].shard_paths])

    def score(
        self,
        queries: Dataset,
        *,
        damping: float | str | None = None,
        residual_weighting: bool = False,
        leverage: bool = False,
        soft_threshold: int | None = None,
        out_to_loss_power: float | None = None,
        reference_rescale: bool = False,
        direction: str = "pair",
        batch_size: int | str = "auto",
        output_file: str | Path | None = None,
        progress: bool = True,
    ) -> np.ndarray:
        """Return the score of every training example for every query, (n_train, n_query) in float32.

        Positive scores mark proponents: training on the example raises the query's output.

        Args:
            queries (`Dataset`): With the columns of the training set; labels say which output is meant.
            damping (`float` or `"auto"`, *optional*): By default, the configuration's.
            residual_weighting (`bool`): Weigh the kernel's rows by p(1 − p); for class labels. See [`ScoreOptions`].
            leverage (`bool`): Divide each row's influence by 1 − its leverage. See [`ScoreOptions`].
            soft_threshold (`int`, *optional*): Scores per query to stay nonzero: all move towards 0 until no more are left. The
                paper's last step, which picks the number by cross-validation.
            out_to_loss_power (`float`, *optional*): What the mean of 1 − p over members is raised to; by default 1/2, and 1 where
                `trak_out_to_loss` is no 1 − p. The paper's TRAK is `damping=0, out_to_loss_power=1`.
            direction (`str`): For image-caption pairs, what of a query is attributed: "pair"; "image", how the image tells its caption
                from those of the bank; or "caption", how the caption tells its image.
            reference_rescale (`bool`): Only to reproduce MadryLab/trak's numbers, with `damping=0, out_to_loss_power=1`.
            output_file (`str` or `Path`, *optional*): A `.npy` file to memory-map the result to. Without it, results above 1 GiB
                are mapped to a temporary file that vanishes with the array.
        """
        options = self._options(damping, residual_weighting, leverage, out_to_loss_power, reference_rescale)
        check_keep(soft_threshold)
        solved, _ = self._solve(queries, options, batch_size, progress, direction)
        shape = (self.n_rows, len(queries))
        scores = allocate(shape, output_file)
        row = 0
        for block in self._scores(solved, options, progress):
            scores[row : row + len(block)] = block.float().numpy()
            row += len(block)
        if soft_threshold is not None:
            soft_threshold_in_place(scores, soft_threshold)
        if isinstance(scores, np.memmap):
            scores.flush()
        return scores

    def attribute(
        self,
        queries: Dataset,
        top_k: int = 10,
        *,
        damping: float | str | None = None,
        residual_weighting: bool = False,
        leverage: bool = False,
        soft_threshold: int | None = None,
        out_to_loss_power: float | None = None,
        direction: str = "pair",
        batch_size: int | str = "auto",
        progress: bool = True,
    ) -> Dataset:
        """Return each query's strongest proponents and opponents, never holding more than a shard's scores.

        Args:
            top_k (`int`): How many of each; at most the number of training examples are returned.
            damping, residual_weighting, leverage, soft_threshold, out_to_loss_power, direction (*optional*): As in
                [`AttributionIndex.score`].

        Returns:
            `Dataset`: One row per query: `query_id`, `query_output`, `proponents` and `opponents` (rows of the training set, the
            strongest first), `proponent_scores` and `opponent_scores`.
        """
        from datasets import Dataset

        if top_k < 1:
            raise ValueError(f"`top_k` must be at least 1, but is {top_k}.")
        options = self._options(damping, residual_weighting, leverage, out_to_loss_power)
        check_keep(soft_threshold)
        solved, output = self._solve(queries, options, batch_size, progress, direction)
        best = _top_k(self._scores(solved, options, progress), max(top_k, (soft_threshold or 0) + 1))
        keep = self.n_rows if soft_threshold is None else soft_threshold
        proponents, opponents = soft_threshold_top_k(best, keep, top_k)
        return Dataset.from_dict(
            {
                "query_id": np.arange(len(queries)),
                "query_output": output,
                "proponents": proponents.rows.numpy(),
                "proponent_scores": proponents.scores.float().numpy(),
                "opponents": opponents.rows.numpy(),
                "opponent_scores": opponents.scores.float().numpy(),
            }
        )

    def self_influence(self, *, damping: float | str | None = None) -> Float64[np.ndarray, " n_train"]:
        r"""Return the size of every training example's score for itself: $\phi^\top(K + \lambda\bar\mu I)^{-1}\phi \cdot |Q|$.

        Examples that stand alone and that the model does not believe score high: mislabeled ones first of all. Both factors are
        means over members, as in [`AttributionIndex.score`].
        """
        # Differs from the usual definition, which has no Q: far more wrong labels come first with it (docs/decisions.md).
        alone, out_to_loss = np.zeros(self.n_rows), np.zeros(self.n_rows)
        for member in self.members:
            cholesky = factor(member.kernel(), n_rows=self.n_rows, damping=self.resolve_damping(damping))
            shards = [(leverage(cholesky, shard.features), shard.out_to_loss.double()) for shard in member.shards()]
            alone += torch.cat([values for values, _ in shards]).numpy() / len(self.members)
            out_to_loss += torch.cat([values for _, values in shards]).numpy() / len(self.members)
        return alone * np.abs(out_to_loss)

    def resolve_damping(self, damping: float | str | None = None) -> float:
        """Return λ as a number: the one given, else the configuration's. "auto" is chosen by the members' subset masks where they are
        recorded; otherwise it is 3 below ten checkpoints and 1 from there on."""
        chosen = self.config.damping if damping is None else damping
        if chosen != "auto":
            return float(chosen)
        choice = self.damping_choice()
        return default_damping(self.n_checkpoints) if choice is None else choice.damping

    @property
    def _default_power(self) -> float:
        return default_power(self.members[0].identity["task"])

    def _options(
        self,
        damping: float | str | None,
        residual_weighting: bool,
        leverage: bool,
        out_to_loss_power: float | None,
        reference_rescale: bool = False,
    ) -> ScoreOptions:
        if residual_weighting:
            check_residuals(self.members[0])
        power = self._default_power if out_to_loss_power is None else float(out_to_loss_power)
        if not 0 <= power <= 1:
            raise ValueError(f"`out_to_loss_power` must lie in 0 to 1, but is {out_to_loss_power}.")
        return ScoreOptions(self.resolve_damping(damping), residual_weighting, leverage, reference_rescale, power)

    def featurizer(self, member: int = 0) -> Featurizer:
        """Return the featurizer of a member's checkpoint, task and sketch.

        Raises:
            ValueError: If the model, task or parameters are not those recorded; the message lists what differs.
        """
        plan = next(plan for plan in self.passes if member in plan.members)
        return self._queries.featurizer(replace(plan, members=(member,), seeds=(self.members[member].identity["seed"],)))

    def featurize_queries(
        self, queries: Dataset, member: int = 0, *, batch_size: int | str = "auto", progress: bool = True
    ) -> dict[str, np.ndarray]:
        """Return the trak_* columns of queries under one member, in float32."""
        description = f"Queries {member + 1}/{len(self.members)}"
        return featurize_queries(self.featurizer(member), queries, batch_size, progress, description)

    def _solve(
        self, queries: Dataset, options: ScoreOptions, batch_size: int | str, progress: bool, direction: str
    ) -> tuple[list[SolvedQueries], Float[np.ndarray, " n_query"]]:
        """Return the queries solved under every member, and their mean output."""
        solved, outputs = [], []
        # A singular kernel is refused before queries cost anything.
        damped(self.members[0].kernel(), n_rows=self.n_rows, damping=options.damping)
        for number, plan in enumerate(self.passes):
            description = f"Queries {number + 1}/{len(self.passes)}"
            columns = featurize_queries(
                self._queries.featurizer(plan, direction=direction), queries, batch_size, progress, description
            )
            for member, seed in zip(plan.members, plan.seeds, strict=True):
                mine = columns_of(columns, seed, plan.seeds)
                solved.append(solve_queries(self.members[member], torch.from_numpy(mine["trak_features"]), options))
                outputs.append(mine["trak_output"])
        return solved, np.mean(outputs, axis=0)

    def _scores(
        self, solved: Sequence[SolvedQueries], options: ScoreOptions, progress: bool
    ) -> Iterator[Float64[Tensor, "_ n_query"]]:
        """Yield the scores of one shard after another."""
        n_shards = len(self.members[0].shard_paths)
        scores = stream_scores(self.members, solved, out_to_loss_power=options.out_to_loss_power)
        yield from tqdm(scores, total=n_shards, unit="shards", desc="Scoring", disable=not progress)


_top_k: Callable[..., Any] = top_k  # the method's own argument has the name users expect
