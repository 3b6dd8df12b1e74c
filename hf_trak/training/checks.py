"""Checks of what a trainer is given, before it trains: its dataset, and losses that attribution does not know."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments, default_data_collator

from hf_trak.tasks import TaskCollator
from hf_trak.tasks.rows import check_is_dataset, describe_kind, how_to_make
from hf_trak.tasks.token_outputs import IGNORED
from hf_trak.training.run_identity import method_of
from hf_trak.training.snapshots import is_adapter

if TYPE_CHECKING:
    from hf_trak.tasks import Task


_KNOWN = ("hf_trak", "transformers", "trl")
_ADVICE = (
    "State what you train with as `task=Task.custom(...)`, whose output and weight per example are yours; docs/guides/custom_tasks.md has an "
    "example with class weights."
)


def list_unknown_losses(trainer: Trainer) -> list[str]:
    """Return what makes a trainer's loss another than its model's own, a phrase each; nothing for `Trainer` and TRL's as they are."""
    found = []
    if trainer.compute_loss_func is not None:
        found.append(f"`compute_loss_func` ({_name(trainer.compute_loss_func)})")
    for name in ("compute_loss", "training_step"):
        if not _is_known(method := method_of(trainer, name)):
            found.append(f"the overridden `{name}` ({_name(method)})")
    for name in ("_get_train_sampler", "get_train_dataloader"):
        if not _is_known(method := method_of(trainer, name)):
            found.append(f"the overridden `{name}` ({_name(method)}), which may show some rows more often than others")
    return [*found, *list_unknown_losses_of_run(trainer.args, trainer.model)]


# Arguments of TRL's trainers that decide their loss.
_OF_A_LOSS = (
    "loss_type",
    "loss_weights",
    "f_divergence_type",
    "ld_alpha",
    "label_smoothing",
    "use_weighting",
    "sync_ref_model",
    "center_rewards_coefficient",
)


def list_unknown_losses_of_run(args: TrainingArguments, model: Any) -> list[str]:
    """Return what of a run's arguments and model makes its loss another than that of transformers' class, a phrase each."""
    found = []
    if args.label_smoothing_factor:
        found.append(f"`label_smoothing_factor={args.label_smoothing_factor:g}`")
    if getattr(args, "neftune_noise_alpha", None):
        found.append(f"`neftune_noise_alpha={args.neftune_noise_alpha:g}`, noise on the embeddings")
    for field in fields(args):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if field.name in _OF_A_LOSS and (value := getattr(args, field.name, default)) != default:
            found.append(f"`{field.name}={value!r}`")
    return [*found, *_unknown_losses_of_model(model)]


def _unknown_losses_of_model(model: Any) -> list[str]:
    base = model.get_base_model() if is_adapter(model) else model
    found = []
    if (own := getattr(base, "_loss_function", None)) is not None and not _is_known(own):
        found.append(f"the model's `loss_function` ({_name(own)})")
    if not _is_known(forward := type(base).forward) and "labels" in inspect.signature(forward).parameters:
        found.append(f"the loss that {_name(forward)} computes")
    if getattr(getattr(base, "config", None), "output_router_logits", False):
        found.append("`output_router_logits=True`, the load-balancing loss of a mixture of experts")
    return found


def warning_of_losses(losses: list[str], task: str | None = None) -> str:
    """Return what to say of losses that are not known; the task is left out where it is not known either."""
    return (
        f"This run trains with {'; '.join(losses)}. Attribution does not know {'it' if len(losses) == 1 else 'them'}: scores will be those "
        f"of the model's own loss{f' ({task})' if task else ''}. {_ADVICE}"
    )


def has_scored_token(batch: Mapping[str, Any], *, shifted: bool) -> bool:
    """Whether a batch has a label that is not -100; also where it has no labels, and the model makes its loss of something else.

    Args:
        shifted (`bool`): Whether the model shifts labels, so that the first of a row is never predicted.
    """
    if "start_positions" in batch and "input_ids" in batch:
        return bool((batch["start_positions"] < batch["input_ids"].shape[1]).any())
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return True
    return bool(((labels[:, 1:] if shifted and labels.ndim == 2 else labels) != IGNORED).any())


def sum_of_logits(outputs: Any) -> Tensor:
    """Return a sum over all logits, whose gradient reaches every parameter that a loss reaches."""
    names = [name for name in ("logits", "start_logits", "end_logits") if name in outputs]
    return torch.stack([outputs[name].float().sum() for name in names]).sum()


def _is_known(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] in _KNOWN


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def check_training_set(dataset: Any, name: str = "train_dataset") -> None:
    """Check that a training set can be attributed to.

    Args:
        name (`str`): Of the argument that it was given as.

    Raises:
        ValueError: With how to make a `datasets.Dataset` of it.
    """
    check_is_dataset(dataset, f"`{name}`")
    if len(dataset) == 0:
        raise ValueError("The training set is empty: there is nothing to train on or to attribute to.")


def check_same_rows(attributed: Dataset, trained: Any) -> None:
    """Check that two datasets may be the same rows, prepared for attribution and for training.

    Raises:
        ValueError: If one has more rows.
    """
    if hasattr(trained, "__len__") and len(trained) != len(attributed):
        raise ValueError(
            f"`attribution_dataset` must be the rows of `train_dataset` in the same order, prepared without randomness, but it has "
            f"{len(attributed):,} rows and `train_dataset` {len(trained):,}."
        )


def check_stream(args: Any) -> None:
    """Check that a run on a streaming training set can be attributed to.

    Raises:
        ValueError: If its rows are to be chosen or cut, or come in another order than that of the stream.
    """
    if not args.ensemble().members.is_single_run:
        raise ValueError(
            f"members={args.members!r} trains again on rows that have numbers, which those of a streaming `train_dataset` have not. Choose the "
            "members of a single run, such as 'final' or 'epoch:3', or keep the rows: `Dataset.from_generator(lambda: (yield from stream))`."
        )
    if args.chunk_overlap is not None:
        raise ValueError(
            "`chunk_overlap` cuts the texts of a `datasets.Dataset` before training, and not those of a stream. Keep its rows: "
            "`Dataset.from_generator(lambda: (yield from stream))`."
        )
    if args.dataloader_num_workers > 1:
        raise ValueError(
            f"dataloader_num_workers={args.dataloader_num_workers} reads the parts of a streaming `train_dataset` in turn, so that training would see other "
            "rows than the first ones of the stream. Set it to 0 or 1."
        )


def rows_of_a_run(args: Any) -> int | None:
    """Return how many rows of a stream training reads at most, by its steps; None where the stream alone decides."""
    if args.max_steps <= 0:
        return None
    return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps


def check_evaluation_set(dataset: Any) -> None:
    """Check that an evaluation set is one that `Trainer` can evaluate.

    Raises:
        ValueError: With how to make a `datasets.Dataset` of it.
    """
    if isinstance(dataset, Mapping):
        for one in dataset.values():
            check_evaluation_set(one)
    elif dataset is not None and not isinstance(
        dataset, (Dataset, IterableDataset, torch.utils.data.Dataset, list, tuple, str)
    ):
        raise ValueError(f"`eval_dataset` is {describe_kind(dataset)}, which `Trainer` cannot evaluate. {how_to_make(dataset)}")


def choose_queries(given: Any, evaluation: Any) -> Dataset:
    """Return the queries that are meant: those given, the evaluation set of a given name, or the only evaluation set.

    Raises:
        ValueError: If it is not clear which, or they are no `datasets.Dataset`.
    """
    if isinstance(given, str):
        if not isinstance(evaluation, Mapping) or given not in evaluation:
            names = ", ".join(evaluation) if isinstance(evaluation, Mapping) else "one without a name"
            raise ValueError(f"There is no evaluation set {given!r} in `eval_dataset`; it has {names}.")
        given = evaluation[given]
    queries = evaluation if given is None else given
    if queries is None:
        raise ValueError("There are no queries; give an `eval_dataset` to the trainer, or `queries`.")
    if (line := _describe_unfit_queries(queries)) is not None:
        raise ValueError(line)
    return queries


def describe_unfit_evaluation_set(evaluation: Any) -> str | None:
    """Return why `attribute()` cannot take an evaluation set as its queries, and what to do; None if it can, or there is none."""
    return None if evaluation is None else _describe_unfit_queries(evaluation)


def _describe_unfit_queries(queries: Any) -> str | None:
    if isinstance(queries, Mapping):
        first = next(iter(queries), "validation")
        return (
            f"`eval_dataset` holds several sets ({', '.join(queries)}), so `attribute()` does not know which are the queries: say "
            f"`attribute(queries={first!r})`."
        )
    if not isinstance(queries, (Dataset, IterableDataset)):
        return f"Queries must be a `datasets.Dataset`, but are {describe_kind(queries)}. {how_to_make(queries)}"
    return None


def columns_of_forward(trainer: Trainer) -> list[str]:
    """Return the columns that `Trainer` keeps: the arguments of `forward`, and labels. It has no public name for them."""
    trainer._set_signature_columns_if_needed()
    return trainer._signature_columns or []


def check_columns(trainer: Trainer, task: Task, dataset: Dataset) -> None:
    """Check that training reads the columns that are attributed.

    Args:
        dataset (`Dataset`): The training set; of a stream, the rows that are read of it.

    Raises:
        ValueError: Naming those that `Trainer` drops before rows are collated.
    """
    if not trainer.args.remove_unused_columns or is_transformed(dataset):
        return
    kept = columns_of_forward(trainer)
    read = list(dict.fromkeys(_names(task.columns_read(dataset.features))))
    dropped = [name for name in read if name in dataset.column_names and name not in kept]
    if dropped:
        raise ValueError(
            f"Attribution reads {', '.join(map(repr, read))}, but `Trainer` drops {', '.join(map(repr, dropped))} before it collates rows, "
            f"since {type(trainer.model).__name__}.forward does not take {'them' if len(dropped) > 1 else 'it'}: the model would be "
            "trained on other inputs than it is attributed on. Prepare the rows with `map` or `with_transform`, or set "
            "`remove_unused_columns=False` and give a `data_collator` that reads these columns."
        )


def check_labels(trainer: Trainer, task: Task, dataset: Dataset) -> None:
    """Check that training reads label numbers as attribution does.

    Args:
        task (`Task`): One that has read the training set.
        dataset (`Dataset`): As in [`check_columns`].

    Raises:
        ValueError: If attribution turns the dataset's labels into the model's by their names, and training takes them as they are.
    """
    kind = dataset.features.get(task.label_column)
    are_strings = task.needs_labels and getattr(kind, "dtype", None) in ("string", "large_string")
    collator = trainer.data_collator
    makes_tensors = collator is default_data_collator or isinstance(collator, DataCollatorWithPadding)
    if are_strings and makes_tensors and not is_transformed(dataset):
        raise ValueError(
            f"The labels in {task.label_column!r} are strings, of which the collator of `Trainer` makes no tensor. Map them to the model's "
            f"numbers, for example `dataset.map(lambda row: {{'label': model.config.label2id[row[{task.label_column!r}]]}})`."
        )
    changed = task.translation is not None and list(task.translation) != list(range(len(task.translation)))
    if changed and not isinstance(trainer.data_collator, TaskCollator):
        raise ValueError(
            f"The names of the labels in {task.label_column!r} say that the dataset's classes 0, 1, ... are the model's "
            f"{', '.join(map(str, task.translation or ()))}. Attribution would follow the names, and training would take the numbers as they "
            "are. Map the dataset's labels to the model's `label2id`, or give the model the dataset's names."
        )


def _names(columns: Any) -> Iterable[str]:
    if isinstance(columns, str):
        yield columns
    elif isinstance(columns, (Mapping, list, tuple)):
        for item in columns.values() if isinstance(columns, Mapping) else columns:
            yield from _names(item)


def is_transformed(dataset: Any) -> bool:
    """Return whether a dataset's rows are made by a function when they are read (`with_transform`)."""
    return isinstance(dataset, Dataset) and dataset.format["type"] == "custom"


class WithoutColumns:
    """A transform of rows, of which columns are dropped that it has only read.

    Args:
        transform (`Callable`): From columns to columns, as `Dataset.with_transform` takes it.
        dropped (`Iterable[str]`): Columns of the dataset beneath.
    """

    def __init__(self, transform: Any, dropped: Iterable[str]) -> None:
        self.transform = transform
        self.dropped = frozenset(dropped)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        return {name: values for name, values in self.transform(rows).items() if name not in self.dropped}
