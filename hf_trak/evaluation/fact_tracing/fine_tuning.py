"""Fine-tuning on masked sentences, with checkpoints and second moments; and what a model answers afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_trak.evaluation.fact_tracing.data import answer_of
from hf_trak.evaluation.fact_tracing.task import EncodedRows, Encoder, token_loss
from hf_trak.evaluation.training import save_checkpoint
from hf_trak.runtime import Bar
from hf_trak.storage.files import write_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MOMENTS_NAME = "second_moments.safetensors"
_BATCHES_SORTED = 20  # rows of like length are sought among so many batches


@dataclass(frozen=True)
class FineTuning:
    """How a model is trained on masked sentences."""

    optimizer: str = field(default="adafactor", metadata={"help": "adafactor or adamw.", "choices": ["adafactor", "adamw"]})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay."})
    steps: int = field(default=60_000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=32, metadata={"help": "Rows per step."})
    warmup: float = field(default=0.02, metadata={"help": "Share of the steps in which the learning rate rises."})
    decay: bool = field(default=False, metadata={"help": "Whether the learning rate then falls to 0, in a line."})
    mixed_precision: str = field(default="no", metadata={"help": "no or bf16 (autocast).", "choices": ["no", "bf16"]})

    def __post_init__(self) -> None:
        if self.optimizer not in ("adafactor", "adamw"):
            raise ValueError(f"`optimizer` must be 'adafactor' or 'adamw', but is {self.optimizer!r}.")
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"`steps` and `batch_size` must be at least 1, but are {self.steps} and {self.batch_size}.")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rising = self.warmup * self.steps
        if step + 0.5 < rising:
            return self.learning_rate * (step + 0.5) / rising
        left = (self.steps - step - 0.5) / max(self.steps - rising, 1)
        return self.learning_rate * (left if self.decay else 1.0)


def fine_tune(
    model: PreTrainedModel,
    rows: EncodedRows,
    subset: Sequence[int],
    recipe: FineTuning,
    *,
    seed: int,
    on_step: Callable[[int, torch.optim.Optimizer], Any] = lambda step, optimizer: None,
    description: str | None = None,
) -> float:
    """Train `model` in place on some rows, and return the mean loss of the last tenth of the steps.

    Args:
        subset (`Sequence[int]`): The rows to train on; no other is read.
        seed (`int`): Of the order of rows, and of dropout, whose rate is the model's own.
        on_step (`Callable`): Called with the number of steps done and the optimizer.
        description (`str`, *optional*): Show a progress bar, and call it this.

    Raises:
        ValueError: If the subset is empty.
        FloatingPointError: If the loss is not finite.
    """
    if len(subset) == 0:
        raise ValueError("The subset is empty: there is nothing to train on.")
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, recipe)
    # In one tensor: a small one kept per step, amid the large ones that come and go, fragments the heap by megabytes a step.
    losses = torch.zeros(recipe.steps, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model.train()
        order = Bar(row_order(rows, subset, recipe, seed=seed), unit="step", desc=description, disable=description is None)
        for step, batch in enumerate(rows.batches(order, device)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(step)
            with torch.autocast(device.type, torch.bfloat16) if recipe.mixed_precision == "bf16" else nullcontext():
                labels = batch.pop("labels")
                loss = token_loss(model(**batch, use_cache=False).logits, labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[step] = loss.detach()
            on_step(step + 1, optimizer)
    last = losses[-max(1, len(losses) // 10) :].mean().item()
    if not np.isfinite(last):
        raise FloatingPointError(
            f"The loss is {last} after {recipe.steps} steps; try a learning rate below {recipe.learning_rate}."
        )
    return last


def row_order(rows: EncodedRows, subset: Sequence[int], recipe: FineTuning, *, seed: int) -> list[list[int]]:
    """Return the rows of every step: one shuffled pass over the subset after another, rows of like length together."""
    generator = np.random.default_rng(seed)
    chosen, size = np.asarray(subset), min(recipe.batch_size, len(subset))
    order: list[list[int]] = []
    while len(order) < recipe.steps:
        shuffled = generator.permutation(chosen)
        batches = []
        for start in range(0, len(shuffled), size * _BATCHES_SORTED):
            group = shuffled[start : start + size * _BATCHES_SORTED]
            group = group[np.argsort(rows.lengths[group], kind="stable")]
            batches += [group[i : i + size].tolist() for i in range(0, len(group), size)]
        order += [batches[i] for i in generator.permutation(len(batches))]
    return order[: recipe.steps]


def make_optimizer(model: PreTrainedModel, recipe: FineTuning) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe; its learning rate is set step by step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    # As T5 was trained: a step is relative to the size of the parameter.
    return torch.optim.Adafactor(parameters, **options)


def second_moments(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's running mean of squared gradients of each parameter it has seen, in full; Adafactor's is a product."""
    moments = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" in state:
            moments[name] = state["exp_avg_sq"]
        elif "variance" in state:
            moments[name] = state["variance"]
        elif "row_var" in state:
            row, column = state["row_var"], state["col_var"]
            moments[name] = row * column / row.mean(dim=-2, keepdim=True).clamp(min=1e-30)
    return {name: values.detach().float().cpu().contiguous() for name, values in moments.items()}


def save_with_moments(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, tokenizer: Any) -> None:
    """Save a checkpoint, and then its second moments beside the weights."""
    save_checkpoint(folder, model, tokenizer)
    write_atomically(folder / MOMENTS_NAME, partial(_save, second_moments(model, optimizer)))


def load_moments(folder: Path) -> dict[str, Tensor] | None:
    """Return the second moments beside a checkpoint; None if there are none."""
    path = folder / MOMENTS_NAME
    return load_file(path) if path.is_file() else None


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)


N_BEAMS = 3
_MAX_LENGTH = 20


def normalize(text: str) -> str:
    """Return an answer as it is compared: without mask tokens, a full stop at its end, or capitals."""
    return answer_of(text).removesuffix(".").strip().lower()


@torch.no_grad()
def beams(
    model: PreTrainedModel, encoder: Encoder, queries: Dataset, *, n_beams: int = N_BEAMS, batch_size: int = 128
) -> list[list[str]]:
    """Return each query's `n_beams` best answers, normalized, the best first."""
    rows = EncodedRows(queries, encoder)
    order = np.argsort(rows.lengths, kind="stable")
    model.eval()
    found: list[list[str]] = [[] for _ in order]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size].tolist()
        batch = rows.batch(chosen)
        texts = _generate(model, encoder.tokenizer, batch["input_ids"], batch["attention_mask"], n_beams)
        for place, row in enumerate(chosen):
            found[row] = [normalize(text) for text in texts[n_beams * place : n_beams * (place + 1)]]
    return found


def _generate(model: Any, tokenizer: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, n_beams: int) -> list[str]:
    written = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        num_beams=n_beams,
        num_return_sequences=n_beams,
        max_length=_MAX_LENGTH,
        do_sample=False,
    )
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    return tokenizer.batch_decode([[token for token in row if token not in special] for row in written.tolist()])


def is_right(answers: Sequence[Sequence[str]], queries: Dataset, *, among: int = 1) -> Bool[np.ndarray, " n_query"]:
    """Return whether the gold answer is among each query's first answers."""
    gold = [normalize(target) for target in queries["targets_pretokenized"][:]]
    return np.array([right in given[:among] for right, given in zip(gold, answers, strict=True)], dtype=bool)


def fine_tune_learned(
    before: Sequence[Sequence[str]], after: Sequence[Sequence[str]], queries: Dataset
) -> Bool[np.ndarray, " n_query"]:
    """Return which facts fine-tuning taught: the gold answer was not among the first three before, and is the first after."""
    return ~is_right(before, queries, among=N_BEAMS) & is_right(after, queries)
