"""Losses that a trainer was given and that attribution, which takes the model's own, does not know."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from transformers import Trainer

from hf_trak.training.run_identity import method_of
from hf_trak.training.snapshots import is_adapter

_KNOWN = ("hf_trak", "transformers", "trl")
_ADVICE = (
    "State what you train with as `task=Task.custom(...)`, whose output and weight per example are yours; docs/custom_tasks.md has an "
    "example with class weights."
)


def list_unknown_losses(trainer: Trainer) -> list[str]:
    """Return what makes a trainer's loss another than its model's own, a phrase each; nothing for `Trainer` and TRL's as they are."""
    args, found = trainer.args, []
    if trainer.compute_loss_func is not None:
        found.append(f"`compute_loss_func` ({_name(trainer.compute_loss_func)})")
    if trainer.label_smoother is not None:
        found.append(f"`label_smoothing_factor={args.label_smoothing_factor:g}`")
    for name in ("compute_loss", "training_step"):
        if not _is_known(method := method_of(trainer, name)):
            found.append(f"the overridden `{name}` ({_name(method)})")
    for name in ("_get_train_sampler", "get_train_dataloader"):
        if not _is_known(method := method_of(trainer, name)):
            found.append(f"the overridden `{name}` ({_name(method)}), which may show some rows more often than others")
    if getattr(args, "neftune_noise_alpha", None):
        found.append(f"`neftune_noise_alpha={args.neftune_noise_alpha:g}`, noise on the embeddings")
    loss_type = next((field for field in fields(args) if field.name == "loss_type"), None)
    if loss_type is not None and loss_type.default != args.loss_type:
        found.append(f"`loss_type={args.loss_type!r}`")
    return [*found, *_unknown_losses_of_model(trainer.model)]


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


def warning_of_losses(losses: list[str], task: str) -> str:
    """Return what to say of losses that are not known."""
    return (
        f"This run trains with {'; '.join(losses)}. Attribution does not know {'it' if len(losses) == 1 else 'them'}: scores will be those "
        f"of the model's own loss ({task}). {_ADVICE}"
    )


def _is_known(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").partition(".")[0] in _KNOWN


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or type(function).__qualname__
