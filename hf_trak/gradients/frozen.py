"""A model's linear layers while its parameters are frozen: their products need no gradient of a weight, and any library serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from hf_trak import products
from hf_trak.gradients.rules import is_conv1d_of_transformers


@contextmanager
def frozen_layers(model: nn.Module, *, unless: Callable[[], bool]) -> Iterator[None]:
    """Compute the model's linear layers by `hf_trak.products` within the block, but for calls during which `unless` is true."""
    layers = [module for module in model.modules() if _is_linear(module) and "forward" not in module.__dict__]
    if not products.onednn_is_faster():
        layers = []
    for layer in layers:
        layer.forward = partial(_forward, layer, unless)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward or is_conv1d_of_transformers(module)


def _forward(layer: nn.Module, unless: Callable[[], bool], *args: Tensor, **kwargs: Tensor) -> Tensor:
    weight, bias = layer.weight, layer.bias
    # Some weights are computed from others, which are being differentiated.
    grows = any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (weight, bias))
    if grows or unless() or torch.is_autocast_enabled("cpu"):
        return type(layer).forward(layer, *args, **kwargs)
    (inputs,) = [*args, *kwargs.values()]
    return products.frozen_linear(inputs, weight.T if is_conv1d_of_transformers(layer) else weight, bias)  # type: ignore[arg-type]
