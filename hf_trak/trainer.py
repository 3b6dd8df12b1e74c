"""`AttributionTrainer`, a Trainer that attributes; and `attribution`, which makes one of any class of Trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from hf_trak.building.checks import as_chunks
from hf_trak.sources.checkpoints import load_model
from hf_trak.sources.processors import load_processing_class
from hf_trak.tasks import AutoTask, PairCollator, TaskCollator, is_dual_encoder, is_language_model
from hf_trak.tasks.chunks import is_chunked, with_text_column
from hf_trak.trainer_mixin import AttributionMixin, as_attribution_arguments
from hf_trak.training.checks import is_transformed
from hf_trak.training.snapshots import is_plain

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_trak.tasks import Task

_PREPARED = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features")  # columns that models take


class AttributionTrainer(AttributionMixin, Trainer):
    """A `Trainer` whose model can be asked which training examples made it do what it does.

    ```python
    >>> args = AttributionArguments(
    ...     "my-run", max_steps=2, members="epoch:1", proj_dim=64, report_to="none", disable_tqdm=True, use_cpu=True
    ... )
    >>> trainer = AttributionTrainer("my-bert", args, train_dataset=train, eval_dataset=validation)
    >>> output = trainer.train()
    {'train_runtime': ...}
    >>> index = trainer.featurize()
    >>> hits = trainer.attribute(top_k=3)
    >>> len(hits)
    8
    ```

    Where no `data_collator` is given, rows are trained on as they are: texts, images and labels by a classifier, images and captions by a
    dual encoder such as CLIP with its own contrastive loss, conversations, prompts with completions or texts by a language model with the
    loss of the tokens that are attributed. The `processing_class` reads them. Rows that are tokenized or hold pixels already are collated
    as `Trainer` does. See [`AttributionMixin`] for what is checked and kept.

    With `chunk_overlap`, the texts of a language model's training set are cut into chunks of `max_length` tokens, and `train_dataset` becomes
    those: they are what is trained on and attributed to. Evaluation sets with the same column of texts are cut to be evaluated; as queries,
    `attribute()` takes their documents.

    Args:
        model (`PreTrainedModel`, `nn.Module` or `str`, *optional*): The model, or the folder or repository of one: it is loaded by the class
            that the checkpoint names, with its own `processing_class` if none is given.
        args (`TrainingArguments`, *optional*): [`AttributionArguments`], or others, which are taken over with the defaults of an attribution
            and stay as they are.
        data_collator, train_dataset, eval_dataset, processing_class, model_init, compute_loss_func, compute_metrics, callbacks, optimizers,
            optimizer_cls_and_kwargs, preprocess_logits_for_metrics (*optional*): As `Trainer` has them.
        task (`Task`, *optional*): What to attribute, for models no task serves; by default, by the model's architecture.
        attribution_dataset (`Dataset`, *optional*): The rows of `train_dataset` in the same order as attribution shall read them, where
            training reads them otherwise.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | Path | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        *,
        task: Task | None = None,
        attribution_dataset: Dataset | None = None,
    ) -> None:
        args = as_attribution_arguments(args)
        if isinstance(model, (str, Path)):
            name = str(model)
            processing_class = load_processing_class(name) if processing_class is None else processing_class
            model = load_model(name)
        documents = eval_dataset
        if args.chunk_overlap is not None and _has_documents(train_dataset):
            if model is None or is_plain(model) or data_collator is not None or task is not None:
                raise ValueError(
                    "`chunk_overlap` cuts the texts of a transformers `model`, and collates the chunks so that no token is trained on twice: leave out "
                    "`model_init`, `data_collator` and `task`."
                )
            args, train_dataset, eval_dataset = _in_chunks(model, args, train_dataset, eval_dataset, processing_class)
        if data_collator is None and model is not None and not is_plain(model):
            data_collator = _collator_of_rows(model, args, train_dataset, processing_class, task)
            if data_collator is not None:
                args = _with_all_columns(args)  # texts and images become what the model takes in the collator
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            task=task,
            attribution_dataset=attribution_dataset,
        )
        self._evaluation_documents = documents


def attribution(trainer: type[Trainer]) -> type[Trainer]:
    """Return a class of Trainer that also attributes, such as `attribution(SFTTrainer)`; see [`AttributionMixin`].

    ```python
    >>> trainer_class = attribution(Trainer)
    >>> trainer_class.__name__
    'AttributionTrainer'
    ```
    """
    return type(f"Attribution{trainer.__name__}", (AttributionMixin, trainer), {"__doc__": trainer.__doc__})


def _collator_of_rows(model: Any, args: Any, train: Any, processing_class: Any, task: Task | None) -> Any:
    """Return what makes batches of rows that no one has tokenized or made pixels of; None where `Trainer` collates them."""
    if is_dual_encoder(model):
        return PairCollator(model, args.trak_config(), processing_class)
    if task is not None:
        return None
    if is_language_model(model):
        return TaskCollator(AutoTask.from_model(model, args.trak_config()), processing_class)
    names = getattr(train, "column_names", None)
    if names is None or is_transformed(train) or {model.main_input_name, *_PREPARED} & set(names):
        return None
    try:
        found = AutoTask.from_model(model, args.trak_config()).reading(train)
    except ValueError:  # no task serves this model, or it finds no columns: `train` says so, with the way out
        return None
    return TaskCollator(found, processing_class)


def _has_documents(train: Any) -> bool:
    """Return whether a training set is of rows that may be cut; a stream, or what is no dataset, is refused elsewhere."""
    from datasets import Dataset

    return isinstance(train, Dataset) and len(train) > 0 and not is_chunked(train.column_names)


def _in_chunks(model: Any, args: Any, train: Dataset, evaluation: Any, processing_class: Any) -> tuple[Any, Dataset, Any]:
    """Return arguments that name the column of texts, and the training and evaluation sets as chunks of their texts.

    Raises:
        ValueError: If there are no texts to be cut, or a document cannot serve.
    """
    config = with_text_column(args.trak_config(), train)
    inputs = AutoTask.from_model(model, config).inputs
    (column,) = config.text_columns or ()
    args = copy.copy(args)
    args.text_columns = [column]

    def cut(rows: Any, keep_columns: tuple[str, ...] = ()) -> Any:
        if isinstance(rows, Mapping):
            return {name: cut(some) for name, some in rows.items()}
        if not _has_documents(rows) or column not in rows.column_names:
            return rows
        return as_chunks(config, inputs, processing_class, rows, keep_columns, progress=not args.disable_tqdm)[0]

    with args.main_process_first(desc="cutting documents"):  # the others read what the first one wrote
        return args, cut(train, args.kept_columns()), cut(evaluation)


def _with_all_columns(args: Any) -> Any:
    """Return arguments under which the collator sees every column; the caller's own stay as they are."""
    if not args.remove_unused_columns:
        return args
    args = copy.copy(args)
    args.remove_unused_columns = False
    return args
