"""A lean training run: a recipe, rows in memory or decoded as they are needed, and one loop.

Thousands of short runs are compared, so that what a run costs besides its steps, and whatever is not decided by its seed, matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader

from hf_trak.hashing import fingerprint_of, hash_tensors
from hf_trak.storage.snapshots import write_snapshot

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_trak.tasks import Task

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    optimizer: str = field(default="sgd", metadata={"help": "sgd or adamw.", "choices": ["sgd", "adamw"]})
    learning_rate: float = field(default=0.4, metadata={"help": "Peak learning rate."})
    momentum: float = field(default=0.9, metadata={"help": "Momentum of sgd."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay of every parameter."})
    epochs: int = field(default=24, metadata={"help": "Passes over the subset."})
    batch_size: int = field(default=512, metadata={"help": "Examples per step."})
    peak_epoch: float = field(
        default=5.0,
        metadata={"help": "Epoch at which the learning rate peaks; it rises to it from 0 and falls to 0, in lines."},
    )
    label_smoothing: float = field(default=0.0, metadata={"help": "Label smoothing of the cross-entropy."})
    flip: bool = field(default=False, metadata={"help": "Mirror each image with probability one half."})
    translate: int = field(default=0, metadata={"help": "Move each image by up to so many pixels, filling with zeros."})
    mixed_precision: str = field(default="no", metadata={"help": "no or bf16 (autocast).", "choices": ["no", "bf16"]})

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"`optimizer` must be 'sgd' or 'adamw', but is {self.optimizer!r}.")
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"`epochs` and `batch_size` must be at least 1, but are {self.epochs} and {self.batch_size}.")
        if not 0 <= self.peak_epoch <= self.epochs:
            raise ValueError(f"`peak_epoch` must lie in 0 to {self.epochs}, the epochs, but is {self.peak_epoch}.")

    def learning_rate_at(self, epoch: float) -> float:
        """Return the learning rate after `epoch` epochs, whole or not."""
        if epoch < self.peak_epoch:
            return self.learning_rate * epoch / self.peak_epoch
        return self.learning_rate * (self.epochs - epoch) / max(self.epochs - self.peak_epoch, 1e-9)


class Rows(Protocol):
    """A dataset's rows as batches of tensors."""

    def __len__(self) -> int: ...

    def batches(self, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Yield one batch per list of row numbers, `labels` among its tensors."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of what the rows are."""
        ...


class RowsInMemory:
    """All rows collated once. A batch is no wider than its longest text.

    Args:
        tensors (`dict[str, Tensor]`): Of one length, as the task collates them; `labels` among them.
    """

    def __init__(self, tensors: Batch) -> None:
        self.tensors = tensors

    @classmethod
    def of(cls, dataset: Dataset, task: Task, processing_class: Any = None, *, device: str = "cpu") -> RowsInMemory:
        """Collate `dataset`, after checking its columns and labels."""
        task = task.reading(dataset)
        task.check(dataset, processing_class)
        return cls({key: values.to(device) for key, values in task.collate(dataset[:], processing_class).items()})

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def fingerprint(self) -> str:
        return hash_tensors(self.tensors)

    def batches(self, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        for rows in order:
            batch = {key: values[list(rows)] for key, values in self.tensors.items()}
            if "attention_mask" in batch:
                whole, width = batch["attention_mask"].shape[1], int(batch["attention_mask"].sum(1).max())
                batch = {
                    key: values[:, :width] if values.ndim > 1 and values.shape[1] == whole else values
                    for key, values in batch.items()
                }
            yield batch


class RowsOnDemand:
    """Rows collated as they are needed, in worker processes: for images too many to hold.

    Args:
        transform (`Callable`, *optional*): Applied to a slice of the dataset's columns before it is collated, such as a crop.
    """

    def __init__(
        self,
        dataset: Dataset,
        task: Task,
        processing_class: Any = None,
        *,
        transform: Callable[[dict[str, list[Any]]], dict[str, list[Any]]] | None = None,
        n_workers: int = 0,
        device: str = "cpu",
    ) -> None:
        self.dataset = dataset
        # What a transform makes of the columns is read by its names, which are known only then.
        self.task = task if transform is not None else task.reading(dataset)
        self.processing_class = processing_class
        self.transform = transform
        self.n_workers = n_workers
        self.device = device

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> str:
        return fingerprint_of(self.dataset)

    def __getitem__(self, rows: Sequence[int]) -> Batch:
        columns = self.dataset[list(rows)]
        return self.task.collate(self.transform(columns) if self.transform else columns, self.processing_class)

    def batches(self, order: Sequence[Sequence[int]]) -> Iterator[Batch]:
        loader: Iterable[Batch] = DataLoader(self, sampler=order, batch_size=None, num_workers=self.n_workers)  # type: ignore[arg-type]
        for batch in loader:
            yield {key: values.to(self.device) for key, values in batch.items()}


def train(
    model: PreTrainedModel,
    rows: Rows,
    subset: Sequence[int],
    recipe: Recipe,
    *,
    seed: int,
    on_epoch_end: Callable[[int], Any] = lambda epoch: None,
) -> None:
    """Train `model` in place on some rows; the same seed on the same kind of device gives the same weights.

    Args:
        subset (`Sequence[int]`): The rows to train on; no other is read.
        seed (`int`): Decides their order and their augmentation. Dropout follows torch's own generator: seed it first.
        on_epoch_end (`Callable`): Called with the number of epochs done, from 1.

    Raises:
        FloatingPointError: If the loss is not finite at the end of an epoch.
    """
    if len(subset) == 0:
        raise ValueError("The subset is empty: there is nothing to train on.")
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, recipe)
    model.train()
    n_steps = -(-len(subset) // recipe.batch_size)
    for epoch in range(recipe.epochs):
        order = torch.as_tensor(subset)[torch.randperm(len(subset), generator=generator)].split(recipe.batch_size)
        for step, batch in enumerate(rows.batches([rows_of_batch.tolist() for rows_of_batch in order])):
            for group in optimizer.param_groups:
                # Of the step's middle: a rise from 0 would otherwise waste the first step, a fall to 0 the one after the last.
                group["lr"] = recipe.learning_rate_at(epoch + (step + 0.5) / n_steps)
            loss = _loss(model, augment(batch, recipe, generator), recipe)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if not loss.isfinite():
            raise FloatingPointError(
                f"The loss is {loss.item()} after epoch {epoch + 1} of {recipe.epochs}; try a lower learning rate than "
                f"{recipe.learning_rate}."
            )
        on_epoch_end(epoch + 1)


def _optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)
    options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    return torch.optim.SGD(parameters, lr=recipe.learning_rate, fused=True, **options)  # type: ignore[arg-type]


def _loss(model: PreTrainedModel, batch: Batch, recipe: Recipe) -> Tensor:
    labels = batch.pop("labels")
    with autocast(recipe, labels.device):
        logits = model(**batch).logits.float()
    if labels.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), labels)
    if labels.ndim == 2:  # of a causal language model: each position predicts the next token
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[None]:
    """Return the context in which a recipe's forward passes run."""
    return torch.autocast(device.type, torch.bfloat16) if recipe.mixed_precision == "bf16" else nullcontext()


def augment(batch: Batch, recipe: Recipe, generator: torch.Generator) -> Batch:
    """Mirror and move the images of a batch as the recipe says."""
    if "pixel_values" not in batch or not (recipe.flip or recipe.translate):
        return batch
    pixels = batch["pixel_values"]
    if recipe.flip:
        mirrored = torch.rand(len(pixels), generator=generator).to(pixels.device) < 0.5
        pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    if recipe.translate:
        pixels = _translate(pixels, recipe.translate, generator)
    return {**batch, "pixel_values": pixels}


def _translate(
    pixels: Float[Tensor, "batch channels height width"], reach: int, generator: torch.Generator
) -> Float[Tensor, "batch channels height width"]:
    height, width = pixels.shape[2:]
    down, right = torch.randint(0, 2 * reach + 1, (2, len(pixels)), generator=generator).to(pixels.device)
    padded = F.pad(pixels, (reach, reach, reach, reach)).permute(0, 2, 3, 1)
    rows = down[:, None, None] + torch.arange(height, device=pixels.device)[None, :, None]
    columns = right[:, None, None] + torch.arange(width, device=pixels.device)[None, None, :]
    examples = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    return padded[examples, rows, columns].permute(0, 3, 1, 2)


@torch.no_grad()
def outputs_on(model: PreTrainedModel, rows: Rows, task: Task, *, batch_size: int = 256) -> Float[np.ndarray, " n_query"]:
    """Return the task's output f of every row, in eval mode."""
    model.eval()
    order = [range(begin, min(begin + batch_size, len(rows))) for begin in range(0, len(rows), batch_size)]
    return torch.cat([task.output_function(model, batch)[0].float().cpu() for batch in rows.batches(order)]).numpy()


def save_checkpoint(folder: Path, model: PreTrainedModel, processing_class: Any = None) -> None:
    """Save a model so that the folder is either whole or not there."""

    def save(temporary: Path) -> None:
        model.save_pretrained(temporary)
        if processing_class is not None:
            processing_class.save_pretrained(temporary)

    write_snapshot(folder, save)
