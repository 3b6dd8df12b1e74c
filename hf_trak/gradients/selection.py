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
    """Selected share of the trainable parameters."""

    @property
    def shapes(self) -> dict[str, list[int]]:
        return {name: list(parameter.shape) for name, parameter in self.parameters.items()}

    @property
    def grad_dim(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())


def select_parameters(model: nn.Module, patterns: Sequence[str] | None = None) -> ParameterSelection:
    """Select the trainable parameters whose name matches any of `patterns`, or all of them.

    Args:
        patterns (`Sequence[str]`, *optional*): Regular expressions, searched anywhere in a parameter's name.

    Raises:
        ValueError: If the model has no trainable parameter, a pattern is not a regular expression, or one matches nothing.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
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
            matches = {name for name in trainable if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(f"`parameters` takes regular expressions, but {pattern!r} is not one: {error}.") from error
        if not matches:
            examples = ", ".join(list(trainable)[:3] + list(trainable)[-1:])
            raise ValueError(
                f"The parameter pattern {pattern!r} matches none of the {len(trainable)} trainable parameters, such as {examples}."
            )
        chosen |= matches
    selected = {name: parameter for name, parameter in trainable.items() if name in chosen}
    total = sum(parameter.numel() for parameter in trainable.values())
    return ParameterSelection(selected, sum(parameter.numel() for parameter in selected.values()) / total)
