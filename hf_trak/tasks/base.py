"""`Task`: a modality's inputs, labels of a kind, and a model output function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_trak.tasks.image_inputs import ImageInputs
from hf_trak.tasks.inputs import CustomInputs, Inputs, Rows, TextInputs
from hf_trak.tasks.labels import Labels
from hf_trak.tasks.outputs import (
    APART,
    call_model,
    classification_margin,
    logits_of,
    regression_prediction,
    sum_of_log_odds,
)
from hf_trak.tasks.pairs import PairInputs
from hf_trak.tasks.rows import check_repeatable, features_of, is_transformed

if TYPE_CHECKING:
    from datasets import Dataset, Features

TARGET_COLUMN = "trak_target"
"""Holds what is asked about each query, in place of a label: as the model numbers its classes."""

_LABEL_COLUMNS = ("labels", "label")
BUILT_IN_TASKS = (
    "text-classification", "text-multi-label", "text-regression", "image-classification", "image-multi-label", "image-regression",
    "causal-lm", "masked-lm", "seq2seq", "question-answering", "token-classification", "contrastive",
    "audio-classification", "audio-multi-label", "audio-regression", "video-classification", "video-multi-label", "video-regression",
    "multiple-choice", "next-sentence-prediction", "ctc", "speech-to-text", "image-text-to-text", "audio-text-to-text",
    "semantic-segmentation", "preference",
)  # fmt: skip
OUT_TO_LOSS_KINDS = ("one_minus_p", "mean_one_minus_p", "residual", "one", "other")


@dataclass(frozen=True)
class Task:
    """What is attributed.

    ```python
    >>> task = AutoTask.from_model(model).reading(train)
    >>> batch = task.collate(train[:4], tokenizer)
    >>> output, out_to_loss = task.output_function(model, batch)
    >>> output.shape, out_to_loss.shape
    (torch.Size([4]), torch.Size([4]))
    ```

    Args:
        name (`str`): As in `TrakConfig.task`.
        output_function (`Callable`): `(model, batch) -> (output, out_to_loss)`, each of shape (batch,).
        n_classes (`int`, *optional*): For class labels; None for labels that are numbers.
        needs_labels (`bool`): False if labels, if any, are the collator's business.
        out_to_loss_kind (`str`): What `out_to_loss` is. "one_minus_p": 1 − p of one label, whose log-odds the output is.
            "mean_one_minus_p": a mean of several. "residual": label − prediction. "one": the output is the loss, or minus it. "other": any
            other. Scores are weighed by its root where it is 1 − p, and by itself elsewhere.
        several_labels (`bool`): Whether a row's label is a list of zeros and ones, one for each class.
        label2id (`tuple`): The model's names of its classes with their ids.
        label_mapping (`str`): How the numbers of a dataset become ids of the model; see [`TrakConfig`].
        import_path (`str`, *optional*): `module:name`, for a task that was imported by its name.
        has_targets (`bool`): Whether rows have [`TARGET_COLUMN`] in place of a label column; see [`Task.for_targets`].
    """

    name: str
    inputs: Inputs
    output_function: Callable[[Callable[..., Any], Mapping[str, Any]], tuple[Tensor, Tensor]]
    n_classes: int | None = None
    label_column: str | None = None
    needs_labels: bool = True
    out_to_loss_kind: str = "other"
    several_labels: bool = False
    label2id: tuple[tuple[str, int], ...] = ()
    label_mapping: str = "auto"
    translation: tuple[int, ...] | None = None
    import_path: str | None = None
    has_targets: bool = False

    @classmethod
    def custom(
        cls,
        output: Callable[[Callable[..., Any], Mapping[str, Any]], Tensor],
        *,
        collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        out_to_loss: Callable[[Callable[..., Any], Mapping[str, Any]], Tensor] | str = "one",
        out_to_loss_kind: str | None = None,
        name: str | None = None,
    ) -> Task:
        """Make a task of your own.

        ```python
        >>> def collate(rows):
        ...     batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        ...     return {**batch, "labels": torch.tensor([row["label"] for row in rows])}
        >>> def loss(model, batch):
        ...     logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        ...     return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        >>> featurizer = Featurizer(model, TrakConfig(proj_dim=64), task=Task.custom(loss, collator=collate))
        >>> columns = train.map(featurizer, batched=True)
        ```

        Args:
            output (`Callable`): `(model, batch) -> (batch,)`; row i may depend on example i alone.
            collator (`Callable`): A list of rows, as dictionaries, to a batch of tensors.
            out_to_loss (`Callable` or `"one"`): `(model, batch) -> (batch,)`; `"one"` where the output is the loss itself.
            out_to_loss_kind (`str`, *optional*): "one_minus_p", "mean_one_minus_p", "residual", "one" or "other"; see [`Task`]. By default
                "one" for `out_to_loss="one"`, and "other" for a callable, whose values then weigh scores as they are.
            name (`str`, *optional*): Recorded in the index, and of no other effect; by default the function's.

        Raises:
            ValueError: If `out_to_loss` is a string other than "one", its kind is unknown, or the name is that of another task.
        """
        if isinstance(out_to_loss, str) and out_to_loss != "one":
            raise ValueError(f"`out_to_loss` must be a callable or 'one', but is {out_to_loss!r}.")
        kind = out_to_loss_kind or ("one" if isinstance(out_to_loss, str) else "other")
        if kind not in OUT_TO_LOSS_KINDS:
            raise ValueError(f"`out_to_loss_kind` must be one of {', '.join(OUT_TO_LOSS_KINDS)}, but is {kind!r}.")
        if isinstance(out_to_loss, str) and kind != "one":
            raise ValueError(f"`out_to_loss='one'` is of the kind 'one', but `out_to_loss_kind` is {kind!r}. Leave it out.")
        if name in BUILT_IN_TASKS:
            raise ValueError(
                f"{name!r} is the name of a task of this library, whose rows are read and shown in its own way. Choose another."
            )

        def output_function(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
            values = output(model, batch)
            if isinstance(out_to_loss, str):
                return values, torch.ones_like(values).detach()
            with torch.no_grad():
                return values, out_to_loss(model, batch)

        named = name or f"custom:{getattr(output, '__qualname__', type(output).__name__)}"
        return cls(named, CustomInputs(collator), output_function, needs_labels=False, out_to_loss_kind=kind)

    def for_queries(self) -> Task:
        """Return the task of queries: this one, but where a training example's gradient is not that of its output alone."""
        make = getattr(self.output_function, "for_queries", None)
        return self if make is None else replace(self, output_function=make())

    def for_targets(self) -> Task:
        """Return the task of queries whose labels, if any, are not read: [`TARGET_COLUMN`] says which output is meant.

        Raises:
            ValueError: If the task is not that of a classifier or a regression.
        """
        if self.output_function not in (classification_margin, regression_prediction, sum_of_log_odds) or not self.needs_labels:
            raise ValueError(
                f"`target` and `contrast` choose a class of a classifier, but this index is of {self.name}. Leave them out, so that the "
                "queries' own labels or texts are attributed; for what a language model answers, ask `index.explain(prompt=...)` "
                "(hf-trak explain)."
            )
        return replace(self, has_targets=True)

    def predict(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        """Return what a model says of rows, as the labels of a batch: a class, a list of zeros and ones, or, of a number, zero: the output of
        a regression is its prediction, whatever the label."""
        logits = logits_of(call_model(model, batch))
        if self.several_labels:
            return (logits > 0).float()
        return logits.argmax(-1) if self.n_classes is not None else torch.zeros(len(logits))

    def read_class(self, value: str | int, names: list[str] | None) -> int:
        """Return the model's id of a class.

        Args:
            value (`str` or `int`): Its name, in the training set or in the model, or its number in the training set.
            names (`list[str]`, *optional*): Of the training set's classes, in the order of their numbers.

        Raises:
            ValueError: If there is no such class.
        """
        if self.n_classes is None:
            raise ValueError(
                f"{self.name} has no class to choose, but `target` or `contrast` names {value!r}. Use 'label' or 'prediction'."
            )
        labels = replace(self._labels(), several=False)
        if names is not None:
            labels = labels.of(SimpleNamespace(names=names), self.label_column or "label")
            alike = [name for name in names if isinstance(value, str) and value.casefold() == name.casefold()]
            value = names.index(value if value in names else alike[0]) if value in names or len(alike) == 1 else value
        if isinstance(value, str) and value.isdecimal() and value not in dict(self.label2id):
            value = int(value)
        try:
            return int(labels.read([value])[0])
        except ValueError as error:
            known = dict(enumerate(names)) if names is not None else {id: name for name, id in self.label2id}
            shown = f": {known}" if known else f", 0 to {self.n_classes - 1}"
            raise ValueError(
                f"{value!r} is neither 'label' nor 'prediction' nor a class of this index, which has {self.n_classes}{shown}. Name one of them."
            ) from error

    def label_of(self, id: int) -> int | list[float]:
        """Return a class as the label of a batch. Of several labels, those that are not asked about have a half, which adds no log-odds."""
        if not self.several_labels:
            return id
        return [1.0 if label == id else 0.5 for label in range(self.n_classes or 0)]

    def class_names(self, names: list[str] | None) -> list[str]:
        """Return the names of the model's classes, in the model's order: its own, else the training set's, else numbers."""
        own = {id: name for name, id in self.label2id}
        others = names if names is not None and len(names) == self.n_classes else list(map(str, range(self.n_classes or 0)))
        return [own.get(id, other) for id, other in enumerate(others)]

    def reading(self, dataset: Dataset) -> Task:
        """Return this task with the columns of a dataset decided on, and its labels' names compared with the model's.

        Columns that are already decided on stay. Labels are those of `dataset`: call it again for another one.

        Raises:
            ValueError: If no column can serve, several may be meant, or the label names contradict the model's.
        """
        features = features_of(dataset)
        label = self._find_label(dataset, features) if self._reads_labels else self.label_column
        inputs = self.inputs.reading(features, dataset, label)
        if not self._reads_labels:
            return replace(self, inputs=inputs)
        assert label is not None
        labels, kind = self._labels(), features[label]
        labels = labels.of(kind, label) if is_transformed(dataset) else labels.of_dataset(dataset, kind, label)
        translation = labels.translation
        return replace(self, inputs=inputs, label_column=label, translation=translation)

    def with_columns(self, *, text_columns: tuple[str, ...] | None, image_column: str | None, label_column: str | None) -> Task:
        """Return this task reading the columns given, where it has decided on none."""
        inputs = self.inputs
        if isinstance(inputs, PairInputs):
            texts, images = inputs.texts, inputs.images
            inputs = replace(
                inputs,
                texts=replace(texts, text_columns=texts.text_columns or text_columns),
                images=replace(images, image_column=images.image_column or image_column),
            )
        elif isinstance(inputs, TextInputs):
            inputs = replace(inputs, text_columns=inputs.text_columns or text_columns)
        elif isinstance(inputs, ImageInputs):
            inputs = replace(inputs, image_column=inputs.image_column or image_column)
        return replace(
            self, inputs=inputs, label_column=(self.label_column or label_column) if self.needs_labels else self.label_column
        )

    def columns(self) -> dict[str, Any]:
        """Return the columns decided on, as fields of a [`TrakConfig`]; nothing of what is not."""
        texts = getattr(self.inputs, "texts", self.inputs)
        images = getattr(self.inputs, "images", self.inputs)
        found = {
            "text_columns": getattr(texts, "text_columns", None),
            "image_column": getattr(images, "image_column", None),
            "label_column": self.label_column,
        }
        return {name: value for name, value in found.items() if value is not None}

    def check(self, dataset: Dataset, processing_class: Any) -> None:
        """Check columns and every label before anything is computed.

        Raises:
            ValueError: Naming the column or the rows that cannot serve.
        """
        task = self.reading(dataset)
        features: Any = features_of(dataset)
        task.inputs.check(features, processing_class)
        if is_transformed(dataset) or isinstance(task.inputs, CustomInputs):
            check_repeatable(dataset, lambda rows: task._compared(rows, processing_class))
        task.inputs.check_rows(dataset, processing_class)
        if task._reads_labels:
            task._check_labels(dataset)

    def _compared(self, rows: Rows, processing_class: Any) -> dict[str, Any]:
        """Return what must be the same whenever rows are read: the model's inputs, and the label as it is given."""
        batch: dict[str, Any] = dict(self.inputs.collate(rows, processing_class))
        return (
            {**batch, self.label_column: str(list(rows[self.label_column]))}
            if self._reads_labels and self.label_column
            else batch
        )

    def _check_labels(self, dataset: Dataset) -> None:
        """Check every label; of a dataset with a transform, those of its first, middle and last row, and the others when they are read."""
        assert self.label_column is not None
        if is_transformed(dataset):
            for row in sorted({0, len(dataset) // 2, len(dataset) - 1} if len(dataset) else set()):
                self._labels().read(dataset[[row]][self.label_column], first=row)
            return
        self._labels().read(dataset.select_columns([self.label_column])[:][self.label_column])

    def columns_read(self, features: Features) -> dict[str, Any]:
        """Return which columns of a dataset are read and as what: `{"text": ["premise", "hypothesis"], "label": "label"}`.

        It is JSON-able. A custom task returns nothing, since only its collator knows.

        Raises:
            ValueError: If no column can serve.
        """
        found = self.inputs.columns_read(features)
        return {**found, "label": self._find_label(None, features)} if self._reads_labels else found

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return a batch: the model's inputs, and `labels` if the task has them."""
        batch = self.inputs.collate(rows, processing_class)
        if self.has_targets:
            if TARGET_COLUMN in rows:  # none yet while the model is asked for its predictions
                targets = torch.as_tensor(np.asarray(rows[TARGET_COLUMN]))
                batch["labels"] = targets.long() if self.n_classes is not None and not self.several_labels else targets.float()
        elif self.needs_labels:
            batch["labels"] = self._labels().read(rows[self._find_label(None, rows)])
        return batch

    @property
    def _reads_labels(self) -> bool:
        """Whether labels are read from a label column."""
        return self.needs_labels and not self.has_targets

    def _find_label(self, dataset: Dataset | None, columns: Mapping[str, Any]) -> str:
        candidates = (self.label_column,) if self.label_column else _LABEL_COLUMNS
        found = [column for column in candidates if column in columns]
        if not found:
            raise ValueError(
                f"{self.name} needs a label column, {' or '.join(map(repr, candidates))}, but the dataset has "
                f"{', '.join(columns)}. "
                + (
                    "Of a reward model, set task='preference' (--task preference)."
                    if {"chosen", "rejected"} <= set(columns)
                    else "Set `label_column` (--label_column)."
                )
            )
        if len(found) > 1 and dataset is not None and not is_transformed(dataset):
            both = dataset.select_columns(found).with_format(None)[:]
            if both[found[0]] != both[found[1]]:
                raise ValueError(
                    f"The dataset has the label columns {' and '.join(map(repr, found))}, which differ. Set `label_column` (--label_column) to "
                    "the one that the model was trained on."
                )
        return found[0]

    def _labels(self) -> Labels:
        return Labels(self.name, self.n_classes, self.several_labels, self.label2id, self.label_mapping, self.translation)


@dataclass
class TaskCollator:
    """Batches for training, of the same rows that are featurized and collated as they are.

    Args:
        processing_class (*optional*): The tokenizer, if rows are texts.
    """

    task: Task
    processing_class: Any = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the model's inputs and `labels`."""
        batch = self.task.collate({key: [row[key] for row in rows] for key in rows[0]}, self.processing_class)
        for name in ("start_positions", "end_positions"):
            if (
                name in batch
            ):  # transformers leaves positions behind the last token out of its loss, and takes -100 for the first one
                batch[name] = batch[name].where(batch[name] >= 0, batch["input_ids"].shape[1])
        if APART in batch:
            raise ValueError(
                f"These rows cannot share a batch: {batch[APART]}. Train with per_device_train_batch_size=1, or pass a `data_collator` that joins "
                "them."
            )
        return batch
