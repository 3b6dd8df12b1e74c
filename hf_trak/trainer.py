"""`AttributionTrainer`: an ordinary Trainer that keeps what attribution needs, and then attributes."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_trak.config import TrakConfig
from hf_trak.index import AttributionIndex
from hf_trak.training_args import AttributionArguments

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_trak.tasks import Task

MEMBERS_FOLDER = "members"
INDEX_FOLDER = "index"


class AttributionCallback(TrainerCallback):
    """Keeps snapshots of the weights for attribution; works with a stock `Trainer`.

    Snapshots are ordinary `save_pretrained` folders under `<output_dir>/members`. Taking them draws no random number: training is
    the same with and without.

    Args:
        epochs (`int`, *optional*): Keep those of the last `epochs` epochs; by default only the final weights.
    """

    def __init__(self, epochs: int | None = None) -> None:
        self.epochs = epochs

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.epochs is None or not state.is_world_process_zero:
            return
        _save(kwargs, Path(args.output_dir) / MEMBERS_FOLDER / f"epoch-{math.ceil((state.epoch or 0) - 1e-6):04d}")
        kept = sorted((Path(args.output_dir) / MEMBERS_FOLDER).glob("epoch-*"))
        for folder in kept[: -self.epochs]:
            shutil.rmtree(folder)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.epochs is None and state.is_world_process_zero:
            _save(kwargs, Path(args.output_dir) / MEMBERS_FOLDER / "final")


def _save(kwargs: dict[str, Any], folder: Path) -> None:
    """Save the weights, and what turns rows into inputs beside them; the folder appears under its name when it is whole."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    kwargs["model"].save_pretrained(temporary)
    if kwargs.get("processing_class") is not None:
        kwargs["processing_class"].save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


class AttributionTrainer(Trainer):
    """A `Trainer` whose model can be asked which training examples made it do what it does.

    ```python
    trainer = AttributionTrainer(model=model, args=AttributionArguments("out", members="epoch:3"), train_dataset=train)
    trainer.train()
    trainer.featurize()
    hits = trainer.attribute(validation, top_k=10)
    ```

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
        super().__init__(model=model, args=args, **kwargs)
        self.task = task
        self.index: AttributionIndex | None = None
        self.add_callback(AttributionCallback(args.n_epoch_members()))

    def member_checkpoints(self) -> list[Path]:
        """Return the snapshots that training kept, oldest first.

        Raises:
            FileNotFoundError: If there are none: `train()` has not run in this `output_dir`.
        """
        folder = Path(self.args.output_dir) / MEMBERS_FOLDER
        pattern = "final" if self.args.n_epoch_members() is None else "epoch-*"
        found = sorted(folder.glob(pattern))
        if not found:
            raise FileNotFoundError(
                f"{folder} holds no snapshots for members={self.args.members!r}; call `train()` first, with the same "
                "`output_dir` and `members`."
            )
        return found

    def featurize(self, dataset: Dataset | None = None, *, overwrite: bool = False) -> AttributionIndex:
        """Featurize the training set under every member and return the index, which lies in `<output_dir>/index`.

        Stopped at any moment, calling it again goes on where it stopped.

        Args:
            dataset (`Dataset`, *optional*): By default, the training set.
            overwrite (`bool`): Replace an index of other features.
        """
        dataset = self.train_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("There is no training set to featurize; give one to the trainer, or as `dataset`.")
        self.index = AttributionIndex.build(
            Path(self.args.output_dir) / INDEX_FOLDER,
            models=list(self.member_checkpoints()),
            dataset=dataset,
            config=self._trak_config(),
            processing_class=self.processing_class,
            task=self.task,
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

    def attribute(self, queries: Dataset | None = None, top_k: int = 10) -> Dataset:
        """Return each query's strongest proponents and opponents among the training set; see [`AttributionIndex.attribute`].

        Args:
            queries (`Dataset`, *optional*): By default, the evaluation set.
        """
        queries = self.eval_dataset if queries is None else queries
        if queries is None:
            raise ValueError("There are no queries; give an `eval_dataset` to the trainer, or `queries`.")
        index = self.index or self.featurize()
        return index.attribute(queries, top_k, batch_size=self.args.rows_at_a_time(), progress=not self.args.disable_tqdm)
