"""Taps: where the layerwise engine catches the inputs and output gradients of modules, and of calls to their weights.

A tap is an identity function between a module and those that use its outputs. Hooks on the outputs themselves would do otherwise:
a hook that refers to the tensor it is registered on keeps its whole graph alive, an output that is a view loses its hooks when it is
written to in place, and an output that the module itself uses again is counted twice.

A size says little by itself: a table of eight rows looks like four examples of two rows each. So the model runs on batches of
several sizes, of the same width. What grows with all of them has an axis of examples, or of parts of examples in succession.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_flatten

from hf_trak.gradients.batch import OutputFunction, evaluation_mode

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


Axis = Literal["examples", "parts", "shared"]


class SharedPlan(NamedTuple):
    """What happens to tensors that the examples share and that are made of parameters: see `shared.py`."""

    modules: frozenset[nn.Module]
    """Those that have stand-ins for their parameters all the time."""
    steps: tuple[Any, ...]


class Call(NamedTuple):
    """The first axis of each leaf of a call's arguments and of its output; None for what is no tensor."""

    inputs: tuple[Axis | None, ...]
    outputs: tuple[Axis | None, ...]
    is_single: bool = False  # the first argument has one row, whatever the size of the batch


class CallPlan:
    """The calls of each module, in their order."""

    def __init__(self, calls: Mapping[nn.Module, Sequence[Call]], shared: SharedPlan | None = None) -> None:
        self._calls = calls
        self.shared = shared

    def with_shared(self, shared: SharedPlan) -> CallPlan:
        """Return this plan with another of what the examples share."""
        return CallPlan(self._calls, shared)

    def call(self, module: nn.Module, number: int) -> Call | None:
        """Return what is known of a module's call; None for one that was not seen, and is not like all that were."""
        calls = self._calls.get(module, ())
        if number < len(calls):
            return calls[number]
        return calls[0] if calls and all(call == calls[0] for call in calls) else None

    def is_shared(self, module: nn.Module, number: int) -> bool:
        """Return whether a call of a module makes something that the examples of a batch share."""
        call = self.call(module, number)
        if call is None or (call.is_single and isinstance(module, nn.Embedding)):  # its ids are expanded instead
            return False
        return "shared" in call.outputs and not {"examples", "parts"} & set(call.outputs)

    def sees_shared(self, module: nn.Module) -> bool:
        """Return whether any call of a module makes something that the examples of a batch share."""
        return any(self.is_shared(module, number) for number in range(len(self._calls.get(module, ()))))

    def is_called(self, module: nn.Module) -> bool:
        """Return whether a module is called at all; the parameters of one that is not may be used all the same."""
        return module in self._calls


def watch_calls(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], modules: Sequence[nn.Module], output_function: OutputFunction
) -> CallPlan:
    """Run a model forward on batches of different sizes and one width, and return how it calls `modules`."""
    seen: dict[nn.Module, list[list[tuple[int, _Sizes, _Sizes]]]] = {}  # per module and call, one entry a batch

    with ExitStack() as stack, evaluation_mode(model), torch.no_grad():
        numbers: dict[nn.Module, int] = {}
        batch_size = 0

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            number = numbers[module] = numbers.get(module, -1) + 1
            calls = seen.setdefault(module, [])
            if number == len(calls):
                calls.append([])
            calls[number].append((batch_size, _sizes((args, kwargs)), _sizes(output)))

        for module in modules:
            stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        for batch in batches:
            numbers.clear()
            batch_size = next(len(value) for value in batch.values() if isinstance(value, Tensor))
            output_function(model, batch)
    return CallPlan({module: [_summary(call) for call in calls] for module, calls in seen.items()})


_Sizes = tuple[int | None, ...]


def _sizes(values: Any) -> _Sizes:
    leaves = tree_flatten(values)[0]
    return tuple((leaf.shape[0] if leaf.ndim else 0) if isinstance(leaf, Tensor) else None for leaf in leaves)


def _summary(call: Sequence[tuple[int, _Sizes, _Sizes]]) -> Call:
    batch_sizes = [batch_size for batch_size, _, _ in call]
    inputs, outputs = [inputs for _, inputs, _ in call], [outputs for _, _, outputs in call]
    return Call(_axes(batch_sizes, inputs), _axes(batch_sizes, outputs), all(sizes[:1] == (1,) for sizes in inputs))


def _axes(batch_sizes: Sequence[int], sizes: Sequence[_Sizes]) -> tuple[Axis | None, ...]:
    if len({len(of_batch) for of_batch in sizes}) > 1:
        return ()
    return tuple(axis_of_sizes(batch_sizes, leaf) for leaf in zip(*sizes, strict=True))


def axis_of_sizes(batch_sizes: Sequence[int], sizes: Sequence[int | None]) -> Axis | None:
    """Return what an axis of these sizes is, in batches of these sizes; None for what is no tensor."""
    if None in sizes:
        return None
    per_example = {size / batch_size for size, batch_size in zip(sizes, batch_sizes, strict=True) if size is not None}
    if per_example == {1.0}:
        return "examples"
    if len(per_example) == 1 and (parts := per_example.pop()) > 1 and parts.is_integer():
        return "parts"
    return "shared"
