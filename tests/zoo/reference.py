"""The loop over rows alone and unpadded that every case is held against, and how far features are from it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.zoo.kits import Kit, Outputs, Row

ROW_TOLERANCE = 1e-3  # of a row's gradient, and of one parameter's own gradient
_SMALL_SHARE = 1e-5  # of the whole gradient, below which a parameter's own error is round-off
OUTPUT_TOLERANCE, ONE_MINUS_P_TOLERANCE = 1e-2, 1e-3


class Reference(NamedTuple):
    """What a loop over rows gives, and the parameters it is of."""

    grads: Float[Tensor, "rows grad_dim"]
    output: Float[Tensor, "rows"]
    one_minus_p: Float[Tensor, "rows"]
    loss_gap: float | None  # largest difference between -log p and the model's own loss, where it returns one
    names: list[str]
    sizes: list[int]
    dtype: torch.dtype


def make_reference(model: PreTrainedModel, kit: Kit, rows: Sequence[Row]) -> Reference:
    """Run the loop in float64, or in float32 for models whose kernels have no float64.

    Raises:
        RuntimeError: If the gradient is zero or not finite: such a case shows nothing.
    """
    try:
        reference = _loop(copy.deepcopy(model).double(), kit, rows, torch.float64)
        finite = bool(torch.isfinite(reference.grads).all())
    except Exception:  # what kernels raise for a dtype that they lack has many types
        finite = False
    if not finite:
        reference = _loop(copy.deepcopy(model), kit, rows, torch.float32)
    if not torch.isfinite(reference.grads).all() or not reference.grads.norm() > 0:
        raise RuntimeError("the gradient of the reference is zero or not finite")
    return reference


def _loop(model: PreTrainedModel, kit: Kit, rows: Sequence[Row], dtype: torch.dtype) -> Reference:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.forward = partial(_batch_norm, module)
    found: list[tuple[Tensor, Outputs]] = []
    gaps = []
    _forget_caches(model)
    for outputs, loss in kit.reference_outputs(model, rows, dtype):
        grads = torch.autograd.grad(outputs.output, list(trained.values()), allow_unused=True)
        flat = [
            (torch.zeros_like(parameter) if grad is None else grad).flatten()
            for parameter, grad in zip(trained.values(), grads, strict=True)
        ]
        found.append((torch.cat(flat).double(), outputs))
        if loss is not None and outputs.nll is not None:
            gaps.append(abs(float(loss.detach()) - float(outputs.nll)))
        _forget_caches(model)
    return Reference(
        torch.stack([grads for grads, _ in found]),
        torch.stack([outputs.output.detach().double() for _, outputs in found]),
        torch.stack([outputs.one_minus_p.double() for _, outputs in found]),
        max(gaps, default=None),
        list(trained),
        [parameter.numel() for parameter in trained.values()],
        dtype,
    )


def _batch_norm(module: nn.Module, inputs: Tensor) -> Tensor:
    """Normalize by the formula: torch's derivative on CPUs is wrong for a single example whose gradient arrives permuted."""
    places = (1, -1, *[1] * (inputs.ndim - 2))
    mean, variance, weight, bias = (
        values.reshape(places) for values in (module.running_mean, module.running_var, module.weight, module.bias)
    )
    return (inputs - mean) / (variance + module.eps).sqrt() * weight + bias


def _forget_caches(model: PreTrainedModel) -> None:
    """Drop what LeViT keeps of a forward pass in evaluation mode, its graph included."""
    for module in model.modules():
        if hasattr(module, "attention_bias_cache"):
            module.attention_bias_cache = {}


def distance(features: Float[Tensor, "rows grad_dim"], reference: Reference) -> tuple[float, list[str]]:
    """Return the largest relative error of a row, and the parameters whose own gradient is wrong."""
    features = features.double()
    norms = reference.grads.norm(dim=1).clamp_min(1e-30)
    error = ((features - reference.grads).norm(dim=1) / norms).max().item()
    wrong, at = [], 0
    for name, size in zip(reference.names, reference.sizes, strict=True):
        expected = reference.grads[:, at : at + size]
        difference = (features[:, at : at + size] - expected).norm(dim=1)
        at += size
        own = (difference / expected.norm(dim=1).clamp_min(1e-12 * norms.max().item() + 1e-30)).max().item()
        if (difference / norms).max().item() > _SMALL_SHARE and own > ROW_TOLERANCE:
            wrong.append(name)
    return error, wrong


def take(reference: Reference, numbers: Sequence[int]) -> Reference:
    """Return the reference of some of the rows."""
    kept = list(numbers)
    return reference._replace(
        grads=reference.grads[kept], output=reference.output[kept], one_minus_p=reference.one_minus_p[kept]
    )
