"""Modules that scale and shift: outputs that are affine in each of their parameters, entry by entry.

RMSNorm has a class of its own in every family of transformers, under many names, with a weight that multiplies (Llama, Qwen, Mistral,
T5) or is added to one first (Gemma), with a gate or without, over the hidden state or over each head. So have layer scales and norms
without a bias. All of them compute `rest + Σ factor ⊙ parameter` along their last axes, whatever the rest and the factors are. A module is
known by that, which is tried once on what it is given, and not by its name; the factors are what the module itself computes with a
parameter of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Run = Callable[[dict[str, Tensor]], Tensor]
"""The module's output as a function of its own parameters, all else as it was given."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # many of these modules round to float32 inside
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def may_be_affine(module: nn.Module, own: Mapping[str, Tensor], output: Tensor) -> bool:
    """Return whether a module's parameters all lie along the last axes of its only output, and are all it has."""
    if len(own) != sum(1 for _ in module.parameters()):
        return False
    return all(0 < p.ndim < output.ndim and p.shape == output.shape[output.ndim - p.ndim :] for p in own.values())


def is_affine(module: nn.Module, own: Mapping[str, Tensor], run: Run) -> bool:
    """Return whether a module is affine in its parameters, tried once with other values for them."""
    if module not in _known:
        values = {name: _probe(parameter, shift) for shift, (name, parameter) in enumerate(own.items())}
        output = run(values)
        expected = _rest(own, run)
        for name, factor in factors(own, run).items():
            expected = expected + factor * values[name]
        difference = (output - expected).norm()
        _known[module] = bool(difference <= _TOLERANCE[output.dtype] * output.norm())
    return _known[module]


def factors(own: Mapping[str, Tensor], run: Run) -> dict[str, Tensor]:
    """Return what each parameter is multiplied by, shaped as the module's output."""
    rest, zeros = _rest(own, run), {name: torch.zeros_like(parameter) for name, parameter in own.items()}
    return {name: run(zeros | {name: torch.ones_like(parameter)}) - rest for name, parameter in own.items()}


def _rest(own: Mapping[str, Tensor], run: Run) -> Tensor:
    return run({name: torch.zeros_like(parameter) for name, parameter in own.items()})


def _probe(parameter: Tensor, shift: int) -> Tensor:
    """Values of both signs, small and large, that are not drawn: a run's random numbers stay what they were."""
    count = torch.arange(1, parameter.numel() + 1, device=parameter.device, dtype=parameter.dtype)
    return (3 * torch.sin(1.7 * count + shift)).reshape(parameter.shape)
