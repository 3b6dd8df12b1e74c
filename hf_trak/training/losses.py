"""Losses that a trainer was given and that attribution, which takes the model's own, does not know."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from hf_trak.tasks.token_outputs import IGNORED
from hf_trak.training.run_identity import method_of
from hf_trak.training.snapshots import is_adapter

_KNOWN = ("hf_trak", "transformers", "trl")
_ADVICE = (
    "State what you train with as `task=Task.custom(...)`, whose output and weight per example are yours; docs/custom_tasks.md has an "
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


def list_unknown_losses_of_run(args: TrainingArguments, model: Any) -> list[str]:
    """Return what of a run's arguments and model makes its loss another than that of transformers' class, a phrase each."""
    found = []
    if args.label_smoothing_factor:
        found.append(f"`label_smoothing_factor={args.label_smoothing_factor:g}`")
    if getattr(args, "neftune_noise_alpha", None):
        found.append(f"`neftune_noise_alpha={args.neftune_noise_alpha:g}`, noise on the embeddings")
    loss_type = next((field for field in fields(args) if field.name == "loss_type"), None)
    if loss_type is not None and loss_type.default != getattr(args, "loss_type", loss_type.default):
        found.append(f"`loss_type={args.loss_type!r}`")
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
