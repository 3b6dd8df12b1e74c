"""Changes to layers while features are computed: seeded dropout, and faster products of frozen layers.

A member with dropout is a separate model: the network without some of its units. So its mask is drawn once from the seed, not for
every row or batch. The features of a row then depend on that row only, and training rows and queries use the same model. Otherwise
the inner products of their gradients would mean little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hf_trak import matmul as products
from hf_trak.gradients.rules import is_conv1d_of_transformers
from hf_trak.hashing import random_bits, stream_key

_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_AXIS = 1 << 20  # counters reserved along one axis: whether a unit is dropped does not depend on the number of units


@contextmanager
def dropout_mask(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Drop the units that `seed` selects, within the block; with None, drop nothing.

    Only `nn.Dropout` and `nn.Dropout1d` to `3d` drop units, each with its own probability. All other modules compute as in
    evaluation mode. Dropout that is not a module, such as that inside fused attention, stays off. A module that is called several
    times drops the same units each time.

    Raises:
        ValueError: If the model has no dropout.
    """
    if seed is None:
        yield
        return
    kinds = (nn.Dropout, *_CHANNELS)
    dropping = {name: module for name, module in model.named_modules() if isinstance(module, kinds) and module.p > 0}
    if not dropping:
        raise ValueError(
            f"{type(model).__name__} has no dropout module with a probability above 0, so members with dropout would all be the "
            "same. Leave out `dropout_seeds`."
        )
    with ExitStack() as stack:
        for name, module in dropping.items():
            stack.callback(module.register_forward_hook(_Mask(stream_key(seed, name, "dropout"), module.p)).remove)
        yield


class _Mask:
    """A hook that multiplies the output of a dropout module in eval mode by the mask."""

    def __init__(self, key: int, drop: float) -> None:
        self.key = key
        self.drop = drop
        self.drawn: tuple[tuple[int, ...], Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        shape = _units(module, output)
        if self.drawn is None or self.drawn[0] != shape or self.drawn[1].device != output.device:
            self.drawn = shape, draw_mask(self.key, shape, drop=self.drop, device=output.device)
        return output * self.drawn[1].to(output.dtype)


def _units(module: nn.Module, output: Tensor) -> tuple[int, ...]:
    """Return the shape of a mask for one example.

    A hidden state has one unit per entry of its last axis, for all tokens together: weights are shared between tokens, so a
    network without a unit lacks it at every token. Tensors of four or more axes (attention weights, images) have one unit per entry.
    """
    if isinstance(module, _CHANNELS):
        return (output.shape[1], *[1] * (output.ndim - 2))
    return tuple(output.shape[-1:]) if output.ndim <= 3 else tuple(output.shape[1:])


def draw_mask(key: int, shape: tuple[int, ...], *, drop: float, device: torch.device) -> Float[Tensor, "..."]:
    """Return a mask whose entries are 0 with probability `drop`, and 1 / (1 − drop) otherwise."""
    counter = torch.zeros(shape, dtype=torch.int64, device=device)
    for axis, length in enumerate(shape):
        place = torch.arange(length, device=device).reshape(-1, *[1] * (len(shape) - axis - 1))
        counter = counter * _AXIS + place
    uniform = ((random_bits(key, counter) >> 11) & ((1 << 53) - 1)).double() / 2**53
    return (uniform >= drop).float() / (1 - drop)


@contextmanager
def frozen_layers(model: nn.Module, *, unless: Callable[[], bool]) -> Iterator[None]:
    """Compute the model's frozen linear layers by `hf_trak.matmul` within the block, except for calls during which `unless()` is true."""
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
    # Some weights are computed from other parameters that are being differentiated.
    grows = any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in (weight, bias))
    if grows or unless() or torch.is_autocast_enabled("cpu"):
        return type(layer).forward(layer, *args, **kwargs)
    (inputs,) = [*args, *kwargs.values()]
    return products.frozen_linear(inputs, weight.T if is_conv1d_of_transformers(layer) else weight, bias)  # type: ignore[arg-type]
