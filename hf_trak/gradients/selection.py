"""Which parameters features are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class ParameterSelection:
    """Selected parameters by name, in the model's order; tied weights appear once, under their first name."""

    parameters: dict[str, nn.Parameter]
    coverage: float
    """Selected share of the parameters that are trainable or selected."""

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self.parameters.items()}

    @property
    def grad_dim(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())


def select_parameters(model: nn.Module, patterns: Sequence[str] | None = None) -> ParameterSelection:
    """Select the trainable parameters whose name matches any of `patterns`, or all of them.

    Args:
        patterns (`Sequence[str]`, *optional*): Regular expressions, searched anywhere in a parameter's name. One that matches no
            trainable parameter selects the frozen ones it matches, such as `base_layer` for the base model under an adapter.

    Raises:
        ValueError: If the model has no trainable parameter, a pattern is not a regular expression, or one matches nothing, or
            parameters that are quantized.
    """
    named = dict(model.named_parameters())
    trainable = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not trainable and patterns is None:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: all have requires_grad=False. Call "
            "`requires_grad_(True)` on those whose influence you want."
        )
    if patterns is None:
        return ParameterSelection(trainable, 1.0)
    if not patterns:
        raise ValueError(
            "`parameters` is an empty list, which selects nothing; leave it out to select all trainable parameters."
        )
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in named if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(f"`parameters` takes regular expressions, but {pattern!r} is not one: {error}.") from error
        if not found:
            examples = ", ".join(list(named)[:3] + list(named)[-1:])
            raise ValueError(
                f"The parameter pattern {pattern!r} matches none of the {len(named)} parameters, such as {examples}."
            )
        chosen |= found & trainable.keys() or found
    selected = {name: parameter for name, parameter in named.items() if name in chosen}
    if quantized := [name for name, parameter in selected.items() if not parameter.is_floating_point()]:
        raise ValueError(
            f"{quantized[0]} is of {selected[quantized[0]].dtype}, and quantized weights have no gradients. Select the adapter's "
            "parameters, or load the model without quantization."
        )
    total = sum(parameter.numel() for parameter in (trainable | selected).values())
    return ParameterSelection(selected, sum(parameter.numel() for parameter in selected.values()) / total)
