"""`Task`: a modality's inputs, labels of a kind, and a model output function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_trak.tasks.inputs import CustomInputs, Inputs, Rows
from hf_trak.tasks.token_inputs import TokenInputs

if TYPE_CHECKING:
    from datasets import Dataset, Features

_LABEL_COLUMNS = ("labels", "label")


@dataclass(frozen=True)
class Task:
    """What is attributed.

    Args:
        name (`str`): As in `TrakConfig.task`.
        output_function (`Callable`): `(model, batch) -> (output, out_to_loss)`, each of shape (batch,).
        n_classes (`int`, *optional*): For class labels; None for labels that are numbers.
        needs_labels (`bool`): False if labels, if any, are the collator's business.
        check_rows (`Callable`, *optional*): Checks what the cells of a dataset hold, before anything is computed.
    """

    name: str
    inputs: Inputs
    output_function: Callable[[Callable[..., Any], Mapping[str, Any]], tuple[Tensor, Tensor]]
    n_classes: int | None = None
    label_column: str | None = None
    needs_labels: bool = True
    check_rows: Callable[[Dataset], None] | None = None

    @classmethod
    def custom(
        cls,
        output: Callable[[Callable[..., Any], Mapping[str, Any]], Tensor],
        *,
        collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
        out_to_loss: Callable[[Callable[..., Any], Mapping[str, Any]], Tensor] | str = "one",
        name: str | None = None,
    ) -> Task:
        """Make a task of your own.

        Args:
            output (`Callable`): `(model, batch) -> (batch,)`; row i may depend on example i alone.
            collator (`Callable`): A list of rows, as dictionaries, to a batch of tensors.
            out_to_loss (`Callable` or `"one"`): `(model, batch) -> (batch,)`; `"one"` where the output is the loss itself.
            name (`str`, *optional*): Recorded in the index; by default the function's.

        Raises:
            ValueError: If `out_to_loss` is a string other than "one".
        """
        if isinstance(out_to_loss, str) and out_to_loss != "one":
            raise ValueError(f"`out_to_loss` must be a callable or 'one', but is {out_to_loss!r}.")

        def output_function(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
            values = output(model, batch)
            if isinstance(out_to_loss, str):
                return values, torch.ones_like(values).detach()
            with torch.no_grad():
                return values, out_to_loss(model, batch)

        return cls(name or f"custom:{output.__qualname__}", CustomInputs(collator), output_function, needs_labels=False)

    def for_queries(self) -> Task:
        """Return the task of queries: this one, but where a training example's gradient is not that of its output alone."""
        make = getattr(self.output_function, "for_queries", None)
        return self if make is None else replace(self, output_function=make())

    def check(self, dataset: Dataset, processing_class: Any) -> None:
        """Check columns and every label before anything is computed.

        Raises:
            ValueError: Naming the column or the rows that cannot serve.
        """
        self.inputs.check(dataset.features, processing_class)
        if isinstance(self.inputs, TokenInputs):
            self.inputs.check_rows(dataset, processing_class)
        if self.check_rows is not None:
            self.check_rows(dataset)
        if self.needs_labels:
            self._labels(dataset[self._find_label(dataset.column_names)][:])

    def columns_read(self, features: Features) -> dict[str, Any]:
        """Return which columns of a dataset are read and as what: `{"text": ["premise", "hypothesis"], "label": "label"}`.

        It is JSON-able. A custom task returns nothing, since only its collator knows.

        Raises:
            ValueError: If no column can serve.
        """
        found = self.inputs.columns_read(features)
        return {**found, "label": self._find_label(list(features))} if self.needs_labels else found

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return a batch: the model's inputs, and `labels` if the task has them."""
        batch = self.inputs.collate(rows, processing_class)
        if self.needs_labels:
            batch["labels"] = self._labels(rows[self._find_label(list(rows))])
        return batch

    def _find_label(self, columns: Sequence[str]) -> str:
        candidates = (self.label_column,) if self.label_column else _LABEL_COLUMNS
        for column in candidates:
            if column in columns:
                return column
        raise ValueError(
            f"{self.name} needs a label column, {' or '.join(map(repr, candidates))}, but the dataset has "
            f"{', '.join(columns)}. Set `label_column`."
        )

    def _labels(self, values: Sequence[Any]) -> Tensor:
        if len(values) == 0:
            return torch.zeros(0, dtype=torch.int64)
        try:
            labels = torch.as_tensor(list(values))
        except (TypeError, ValueError, RuntimeError):
            kind = type(values[0]).__name__
            raise ValueError(
                f"Labels must be numbers, but the first is {values[0]!r} ({kind}). Try `class_encode_column`."
            ) from None
        if self.n_classes is None:
            if labels.ndim != 1:
                raise ValueError(f"{self.name} needs one number per example, but the first label is {values[0]!r}.")
            wrong = (~labels.isfinite()).nonzero().flatten().tolist()
            if wrong:
                raise ValueError(f"{len(wrong)} of {len(labels)} labels are not finite, the first at row {wrong[0]}.")
            return labels.to(torch.float32)
        if labels.is_floating_point() or labels.ndim != 1:
            raise ValueError(
                f"{self.name} needs one class index per example, but the first label is {values[0]!r}. For numbers to predict, "
                "use a model with num_labels=1."
            )
        wrong = ((labels < 0) | (labels >= self.n_classes)).nonzero().flatten().tolist()
        if wrong:
            raise ValueError(
                f"Labels must lie in 0 to {self.n_classes - 1}, the model's {self.n_classes} classes, but {len(wrong)} of "
                f"{len(labels)} do not: {labels[wrong[0]].item()} at row {wrong[0]}"
                f"{' (-1 marks an unlabelled test split)' if labels[wrong[0]] == -1 else ''}. Filter these rows."
            )
        return labels.long()


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
        return self.task.collate({key: [row[key] for row in rows] for key in rows[0]}, self.processing_class)
