"""`AttributionTrainer`: an ordinary Trainer that keeps what attribution needs, and then attributes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import TrainOutput

from hf_trak.config import TrakConfig
from hf_trak.hub.cards import render_model_section
from hf_trak.index import AttributionIndex
from hf_trak.tasks import AutoTask, PairCollator, TaskCollator, is_dual_encoder, is_language_model
from hf_trak.training.callback import AttributionCallback
from hf_trak.training.model_upload import INDEX_FOLDER, MEMBERS_FOLDER, without_indexes
from hf_trak.training.more_runs import MoreRuns
from hf_trak.training.runs import RunRecord, describe_run, load_masks
from hf_trak.training_args import AttributionArguments

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_trak.tasks import Task

_TAGS = ("trak", "data-attribution")
_SNAPSHOTS = {"final": "final", "epoch": "epoch-*", "steps": "step-*", "runs": "run-*", "subsets": "subset-*"}


class AttributionTrainer(Trainer):
    """A `Trainer` whose model can be asked which training examples made it do what it does.

    ```python
    trainer = AttributionTrainer(model=model, args=AttributionArguments("out", members="epoch:3"), train_dataset=train)
    trainer.train()
    trainer.featurize()
    hits = trainer.attribute(validation, top_k=10)
    ```

    Whatever `members` are, `train()` leaves the ordinary model of the whole training set, trained bit for bit as `Trainer` does.
    The further runs of `members="runs:M"` and `"subsets:M"` follow it, from the same initial weights (or `model_init`), with other
    seeds. A process that was killed goes on when the same command is run again: finished runs are not repeated, an unfinished one
    resumes from its last checkpoint if `save_strategy` writes any, and starts again otherwise.

    A dual encoder such as CLIP is trained with its own contrastive loss, on images and captions as they are: see [`PairCollator`].
    A language model is trained on conversations, prompts with completions, texts or tokens as they are, with the loss of the very
    tokens that are attributed: see [`CausalInputs`] and its kin. Both hold where no `data_collator` is given.

    Args:
        task (`Task`, *optional*): What to attribute, for models no task serves; by default, by the model's architecture.
        args, kwargs: As `Trainer` has them. `args` are [`AttributionArguments`].
    """

    args: AttributionArguments

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: AttributionArguments | None = None,
        *,
        task: Task | None = None,
        **kwargs: Any,
    ) -> None:
        args = args or AttributionArguments()
        if not isinstance(args, AttributionArguments):
            raise ValueError(
                f"`args` must be AttributionArguments, but is {type(args).__name__}; they take the same arguments."
            )
        if model is not None and is_dual_encoder(model) and kwargs.get("data_collator") is None:
            kwargs["data_collator"] = PairCollator(model, args.trak_config(), kwargs.get("processing_class"))
            args.remove_unused_columns = False  # images and captions become what the model takes in the collator
        elif model is not None and task is None and is_language_model(model) and kwargs.get("data_collator") is None:
            kwargs["data_collator"] = TaskCollator(
                AutoTask.from_model(model, args.trak_config()), kwargs.get("processing_class")
            )
            args.remove_unused_columns = False  # so do conversations and texts
        super().__init__(model=model, args=args, **kwargs)
        self.task = task
        self.index: AttributionIndex | None = None
        self.members = args.parsed_members()
        self._more_runs = None if self.members.is_single_run else MoreRuns(self, self.members, self._train_once)
        if self.members.is_single_run:
            self.add_callback(AttributionCallback(args.members))

    @property
    def _members_folder(self) -> Path:
        return Path(self.args.output_dir) / MEMBERS_FOLDER

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as `Trainer.train` does, and then the further runs that `members` asks for, if any.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): As `Trainer` has it. By default, a run of the same settings that was
                killed goes on from its last checkpoint; False starts it again.
        """
        if trial is not None:  # a search for hyper-parameters, whose models are thrown away
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self._more_runs is not None:
            return self._more_runs.train(resume_from_checkpoint, ignore_keys_for_eval)
        settings = describe_run(self.args, self.model, self.train_dataset)
        record = RunRecord(self._members_folder, Path(self.args.output_dir), settings)
        return self._train_once(record, resume_from_checkpoint, ignore_keys_for_eval)

    def _train_once(
        self, record: RunRecord, resume_from_checkpoint: str | bool | None, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        """Run `Trainer.train` under a record, from the recorded run's last checkpoint where there is one to go on from."""
        last = record.checkpoint() if resume_from_checkpoint is None else None
        self.accelerator.wait_for_everyone()  # all have looked before the record is written
        if last is None and self.is_world_process_zero():
            record.begin()
        output = super().train(str(last) if last else resume_from_checkpoint, None, ignore_keys_for_eval)
        if self.members.is_single_run and self.is_world_process_zero():
            record.finish(output._asdict())
        return output

    def member_checkpoints(self) -> list[Path]:
        """Return the snapshots that training kept, oldest first.

        Raises:
            FileNotFoundError: If some are missing: `train()` has not run to its end in this `output_dir`.
        """
        found = sorted(self._members_folder.glob(_SNAPSHOTS[self.members.kind]))
        wanted = 1 if self.members.kind == "epoch" else self.members.count
        if len(found) < wanted:
            raise FileNotFoundError(
                f"{self._members_folder} holds {len(found) or 'no'} snapshots for members={self.args.members!r}; call `train()` "
                "first, with the same `output_dir` and `members`."
            )
        return found if self.members.is_single_run else found[:wanted]

    def featurize(self, dataset: Dataset | None = None, *, overwrite: bool = False) -> AttributionIndex:
        """Featurize the training set under every member and return the index, which lies in `<output_dir>/index`.

        Stopped at any moment, calling it again goes on where it stopped. Under a launcher, all processes call it and share the work.

        Args:
            dataset (`Dataset`, *optional*): By default, the training set.
            overwrite (`bool`): Replace an index of other features.
        """
        given = dataset
        dataset = self.train_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("There is no training set to featurize; give one to the trainer, or as `dataset`.")
        self.accelerator.wait_for_everyone()  # the first process has written the snapshots
        with_masks = self.members.kind == "subsets" and (given is None or given is self.train_dataset)
        self.index = AttributionIndex.build(
            Path(self.args.output_dir) / INDEX_FOLDER,
            models=list(self.member_checkpoints()),
            dataset=dataset,
            config=self._trak_config(),
            processing_class=self.processing_class,
            task=self.task,
            **self.args.member_counts(),
            masks=load_masks(self._members_folder)[: self.members.count] if with_masks else None,
            batch_size=self.args.rows_at_a_time(),
            shard_rows=self.args.shard_rows,
            overwrite=overwrite,
            progress=not self.args.disable_tqdm,
        )
        return self.index

    def _trak_config(self) -> TrakConfig:
        """The arguments' configuration; parameters that were frozen in training, which snapshots do not tell, are named."""
        config = self.args.trak_config()
        parameters = dict(self.model.named_parameters())
        trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
        if config.parameters is None and len(trained) < len(parameters):
            config = replace(config, parameters=tuple(f"^{re.escape(name)}$" for name in trained))
        return config

    def attribute(self, queries: Dataset | None = None, top_k: int = 10, **options: Any) -> Dataset:
        """Return each query's strongest proponents and opponents among the training set; see [`AttributionIndex.attribute`].

        Args:
            queries (`Dataset`, *optional*): By default, the evaluation set.
            options: Of [`AttributionIndex.attribute`].
        """
        queries = self.eval_dataset if queries is None else queries
        if queries is None:
            raise ValueError("There are no queries; give an `eval_dataset` to the trainer, or `queries`.")
        index = self.index or self.featurize()
        defaults = {"batch_size": self.args.rows_at_a_time(), "progress": not self.args.disable_tqdm}
        return index.attribute(queries, top_k, **{**defaults, **options})

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the model and its members as `Trainer.push_to_hub` does; indexes stay here.

        Features are a dataset, with the licence of the training data: push them with `trainer.index.push_to_hub(...)`.
        """
        with without_indexes():
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with without_indexes():
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args: Any, tags: str | list[str] | None = None, **kwargs: Any) -> None:
        """Write the card that `Trainer` writes, with a section on how to ask the model for its training examples."""
        given = [tags] if isinstance(tags, str) else list(tags or [])
        super().create_model_card(*args, tags=[*given, *(tag for tag in _TAGS if tag not in given)], **kwargs)
        if self.is_world_process_zero():
            card = Path(self.args.output_dir) / "README.md"
            card.write_text(card.read_text() + render_model_section(self.args.members), encoding="utf-8")
