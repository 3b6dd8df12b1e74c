"""Rules: the gradient of each kind of module, as a product of factors per example.

A rule never sums over examples. Where it can, it returns a sum over tokens as factors, so that a projector can sketch the gradient
without forming it.

Affine modules: every model family of transformers has its own RMSNorm class. The weight multiplies (Llama, Qwen, Mistral, T5), or one is
added to it first (Gemma); there may be a gate; the norm may be over the hidden state or over each head. Layer scales and norms without a
bias vary in the same way. All of them compute `rest + Σ factor ⊙ parameter` along their last axes. They are recognised by this
property, which is tested once on the module's input, and not by their names. The factors are the module's own output for a parameter of
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn


class Dense(NamedTuple):
    """Complete gradients, with the shape of the parameter."""

    grads: Float[Tensor, "batch *shape"]


class Outer(NamedTuple):
    """Gradients given as a sum over tokens of outer products."""

    left: Float[Tensor, "batch tokens rows"]
    right: Float[Tensor, "batch tokens columns"]


class Rows(NamedTuple):
    """Gradients that are zero except for `values`, which are added at `rows`."""

    rows: Int64[Tensor, "batch tokens"]
    values: Float[Tensor, "batch tokens columns"]


Contribution = Dense | Outer | Rows
Rule = Callable[[Any, Tensor, Tensor], dict[str, Contribution]]
"""`(module, its input, its output's gradient) -> {own name of a parameter: gradients}`."""


def linear(module: nn.Linear, inputs: Tensor, grads: Tensor) -> dict[str, Contribution]:
    inputs, grads = _tokens(inputs), _tokens(grads)
    return {"weight": Outer(grads, inputs), "bias": Dense(grads.sum(1))}


def _tokens(values: Float[Tensor, "batch *tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
    return values.reshape(values.shape[0], -1, values.shape[-1])


def conv1d_of_transformers(module: nn.Module, inputs: Tensor, grads: Tensor) -> dict[str, Contribution]:
    """GPT-2's `Conv1D`: a Linear whose weight is (d_in, d_out)."""
    inputs, grads = _tokens(inputs), _tokens(grads)
    return {"weight": Outer(inputs, grads), "bias": Dense(grads.sum(1))}


def conv2d(module: nn.Conv2d, inputs: Tensor, grads: Tensor) -> dict[str, Contribution]:
    patches = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    return _convolution(module, patches, grads)


def conv1d(module: nn.Conv1d, inputs: Tensor, grads: Tensor) -> dict[str, Contribution]:
    padding = int(module.padding[0])  # `find_rule` refuses padding given by name
    picture = inputs.unsqueeze(2)  # of height 1
    kernel, dilation, stride = (1, module.kernel_size[0]), (1, module.dilation[0]), (1, module.stride[0])
    return _convolution(module, F.unfold(picture, kernel, dilation, (0, padding), stride), grads)


def _convolution(module: nn.Conv1d | nn.Conv2d, patches: Tensor, grads: Tensor) -> dict[str, Contribution]:
    # (batch, d_in · kernel, places), (batch, d_out, ...) -> (batch, places, d_in · kernel), (batch, places, d_out)
    patches, grads = patches.transpose(1, 2), grads.flatten(2).transpose(1, 2)
    bias = Dense(grads.sum(1))
    if module.groups == 1:
        return {"weight": Outer(grads, patches), "bias": bias}
    # An output channel depends only on the inputs of its own group.
    per_group = torch.einsum(
        "bpgo,bpgi->bgoi", grads.unflatten(2, (module.groups, -1)), patches.unflatten(2, (module.groups, -1))
    )
    return {"weight": Dense(per_group.reshape(len(grads), *module.weight.shape)), "bias": bias}


def embedding(module: nn.Embedding, inputs: Tensor, grads: Tensor) -> dict[str, Contribution]:
    rows = inputs.reshape(inputs.shape[0], -1)
    values = grads.reshape(*rows.shape, -1)
    if module.padding_idx is not None:
        values = values * (rows != module.padding_idx).unsqueeze(-1)
    return {"weight": Rows(rows, values)}


def scaled_embedding(module: nn.Embedding, inputs: Tensor, grads: Tensor) -> dict[str, Contribution]:
    """BART's embedding, which multiplies the rows by a constant."""
    return embedding(module, inputs, grads * float(module.embed_scale))  # type: ignore[arg-type]


def layer_norm(module: nn.LayerNorm, inputs: Tensor, grads: Tensor) -> dict[str, Contribution]:
    return _affine(F.layer_norm(inputs, module.normalized_shape, eps=module.eps), grads, module.normalized_shape)


def rms_norm(module: nn.RMSNorm, inputs: Tensor, grads: Tensor) -> dict[str, Contribution]:
    return _affine(F.rms_norm(inputs, module.normalized_shape, eps=module.eps), grads, module.normalized_shape)


def _affine(normalized: Tensor, grads: Tensor, shape: tuple[int, ...]) -> dict[str, Contribution]:
    batch_size = grads.shape[0]
    weight = (grads * normalized).reshape(batch_size, -1, *shape).sum(1)
    return {"weight": Dense(weight), "bias": Dense(grads.reshape(batch_size, -1, *shape).sum(1))}


def group_norm(module: nn.GroupNorm, inputs: Tensor, grads: Tensor) -> dict[str, Contribution]:
    return _per_channel(F.group_norm(inputs, module.num_groups, eps=module.eps), grads)


def batch_norm(
    module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, inputs: Tensor, grads: Tensor
) -> dict[str, Contribution]:
    assert module.running_mean is not None  # `find_rule` made sure of this
    assert module.running_var is not None
    # In eval mode: its running statistics are constants.
    mean, variance = module.running_mean.to(inputs), module.running_var.to(inputs)
    return _per_channel(F.batch_norm(inputs, mean, variance, eps=module.eps), grads)


def _per_channel(normalized: Tensor, grads: Tensor) -> dict[str, Contribution]:
    weight = (grads * normalized).reshape(*grads.shape[:2], -1).sum(2)
    return {"weight": Dense(weight), "bias": Dense(grads.reshape(*grads.shape[:2], -1).sum(2))}


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: conv1d,
    nn.Conv2d: conv2d,
    nn.Embedding: embedding,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.GroupNorm: group_norm,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
}


# Class -> parameters of its children that it uses without calling the child, or for which only the class itself sees the axis of examples.
_ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
_OF_CHILDREN = {
    "MultiheadAttention": _ATTENTION[2:],
    "Siglip2VisionEmbeddings": ("position_embedding.weight",),
    "Siglip2MultiheadAttentionPoolingHead": tuple(f"attention.{name}" for name in _ATTENTION),  # its mask has a row per head
}

_LOOK_AT_VALUES = (
    "Siglip2VisionEmbeddings",
    "Siglip2MultiheadAttentionPoolingHead",
)  # image sizes, and whether a mask hides anything


def looks_at_values(module: nn.Module) -> bool:
    """Return whether a module is known not to work under `vmap`, but to be correct if it runs on one example after another."""
    return type(module).__name__ in _LOOK_AT_VALUES


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a module uses itself, by its own names for them."""
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    for name in _OF_CHILDREN.get(type(module).__name__, ()):
        place, _, leaf = name.rpartition(".")
        if isinstance(parameter := getattr(module.get_submodule(place), leaf, None), nn.Parameter):
            own[name] = parameter
    return own


def owners(model: nn.Module) -> dict[nn.Module, dict[str, nn.Parameter]]:
    """Return the parameters of each module that uses some itself. A parameter that a parent uses does not count for its child."""
    found: dict[nn.Module, dict[str, nn.Parameter]] = {}
    taken: set[tuple[nn.Module, str]] = set()
    for module in model.modules():  # parents first
        own = own_parameters(module)
        places = {name: (module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in own}
        if kept := {name: parameter for name, parameter in own.items() if places[name] not in taken}:
            found[module] = kept
        taken |= set(places.values())
    return found


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's `Conv1D`: a Linear whose weight is (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule for a module, or None if it has none and must be differentiated by `vmap`.

    A subclass has the rule of its parent only if it has the parent's forward pass.
    """
    if is_conv1d_of_transformers(module):
        return conv1d_of_transformers
    if isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding"):
        return scaled_embedding if hasattr(module, "embed_scale") else None
    if isinstance(module, (nn.Conv1d, nn.Conv2d)) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return None
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.max_norm is not None):
        return None
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) and module.running_mean is None:
        return None
    for kind, rule in RULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return rule
    return None


Run = Callable[[dict[str, Tensor]], Tensor]
"""The module's output as a function of its own parameters, with the same inputs."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}  # many of these modules round to float32 inside
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def may_be_affine(module: nn.Module, own: Mapping[str, Tensor], output: Tensor) -> bool:
    """Return whether `own` are all parameters of a module, and each has the shape of the last axes of its only output."""
    if len(own) != sum(1 for _ in module.parameters()):
        return False
    return all(0 < p.ndim < output.ndim and p.shape == output.shape[output.ndim - p.ndim :] for p in own.values())


def is_affine(module: nn.Module, own: Mapping[str, Tensor], run: Run) -> bool:
    """Return whether a module is affine in its parameters. This is tested once, with other values for them."""
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
    """Return the factor of each parameter, with the shape of the module's output."""
    rest, zeros = _rest(own, run), {name: torch.zeros_like(parameter) for name, parameter in own.items()}
    return {name: run(zeros | {name: torch.ones_like(parameter)}) - rest for name, parameter in own.items()}


def _rest(own: Mapping[str, Tensor], run: Run) -> Tensor:
    return run({name: torch.zeros_like(parameter) for name, parameter in own.items()})


def _probe(parameter: Tensor, shift: int) -> Tensor:
    """Return values of both signs, small and large. They are not random, so the state of the random generators does not change."""
    count = torch.arange(1, parameter.numel() + 1, device=parameter.device, dtype=parameter.dtype)
    return (3 * torch.sin(1.7 * count + shift)).reshape(parameter.shape)
