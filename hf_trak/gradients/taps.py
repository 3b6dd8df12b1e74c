"""Taps on a module's outputs: what a backward pass brings back to them, caught once and let go of.

A tap is an identity function between a module and those that use its outputs. Hooks on the outputs themselves would do otherwise:
a hook that refers to the tensor it is registered on keeps its whole graph alive, an output that is a view loses its hooks when it is
written to in place, and an output that the module itself uses again is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Catch = Callable[[list[Tensor]], None]


class Taps:
    """The taps of one batch. Nothing they hold outlives [`~Taps.close`], whatever else keeps the batch's graph alive."""

    def __init__(self) -> None:
        self._open: list[_Holder] = []

    def tap(self, outputs: Sequence[Tensor], catch: Catch) -> list[Tensor]:
        """Return what is to be used in place of `outputs`, which begins a graph where none of them belongs to one.

        Args:
            catch (`Callable`): Called once, with a gradient per output as soon as all of them are known; zeros for what is not used.
        """
        holder = _Holder(catch)
        self._open.append(holder)
        # A leaf that requires a gradient makes autograd record the tap, even if no output depends on anything that does.
        leaf = torch.zeros((), requires_grad=True)
        return list(_Tap.apply(holder, leaf, *outputs))

    def close(self) -> None:
        for holder in self._open:
            holder.catch = None
        self._open.clear()


class _Holder:
    def __init__(self, catch: Catch) -> None:
        self.catch: Catch | None = catch


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, holder: _Holder, leaf: Tensor, *outputs: Tensor) -> tuple[Tensor, ...]:
        ctx.holder = holder  # type: ignore[attr-defined]
        # No views, for autograd: they may be written to in place, and share memory all the same.
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        catch, ctx.holder.catch = ctx.holder.catch, None
        if catch is not None:
            catch(list(grads))
        return (None, None, *grads)
