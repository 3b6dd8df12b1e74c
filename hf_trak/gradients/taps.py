"""Taps: where the layerwise engine catches the inputs and output gradients of modules, and of calls to their weights.

A tap is an identity function between a module and the operations that use its outputs. Hooks on the outputs have three faults. A hook
that refers to its tensor keeps the whole graph in memory. A view that is modified in place loses its hooks. An output that the module
itself uses again is counted twice.

The size of one tensor does not tell which axis is that of the examples: a table of eight rows looks like four examples of two rows
each. So the model runs on batches of several sizes and one width. An axis that grows with all of them is that of the examples, or of
consecutive parts of examples.
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
    """The taps of one batch. [`~Taps.close`] frees everything that they hold, even if the batch's graph stays in memory."""

    def __init__(self) -> None:
        self._open: list[_Holder] = []

    def tap(self, outputs: Sequence[Tensor], catch: Catch) -> list[Tensor]:
        """Return tensors to use in place of `outputs`. They are part of a graph even if the outputs are not.

        Args:
            catch (`Callable`): Called once with the gradients of all outputs, when all are known. Unused outputs have zeros.
        """
        holder = _Holder(catch)
        self._open.append(holder)
        # With a leaf that requires a gradient, autograd records the tap even if no output requires one.
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
        # For autograd these are not views, so they may be modified in place. They still share memory.
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        catch, ctx.holder.catch = ctx.holder.catch, None
        if catch is not None:
            catch(list(grads))
        return (None, None, *grads)


Axis = Literal["examples", "parts", "shared"]


class SharedPlan(NamedTuple):
    """The operations on tensors that the examples share and that depend on parameters: see `shared.py`."""

    modules: frozenset[nn.Module]
    """Modules whose parameters are stand-ins all the time."""
    steps: tuple[Any, ...]


class Call(NamedTuple):
    """The first axis of each value in a call's arguments and output; None for values that are not tensors."""

    inputs: tuple[Axis | None, ...]
    outputs: tuple[Axis | None, ...]
    is_single: bool = False  # the first argument has one row, whatever the size of the batch


class CallPlan:
    """The calls of each module, in their order."""

    def __init__(self, calls: Mapping[nn.Module, Sequence[Call]], shared: SharedPlan | None = None) -> None:
        self._calls = calls
        self.shared = shared

    def with_shared(self, shared: SharedPlan) -> CallPlan:
        """Return a copy of this plan with another plan for shared tensors."""
        return CallPlan(self._calls, shared)

    def call(self, module: nn.Module, number: int) -> Call | None:
        """Return the record of a module's call. A call that was not seen has that of the others if these are all equal, else None."""
        calls = self._calls.get(module, ())
        if number < len(calls):
            return calls[number]
        return calls[0] if calls and all(call == calls[0] for call in calls) else None

    def is_shared(self, module: nn.Module, number: int) -> bool:
        """Return whether a call of a module returns a tensor that the examples of a batch share."""
        call = self.call(module, number)
        if call is None or (call.is_single and isinstance(module, nn.Embedding)):  # its ids are expanded instead
            return False
        return "shared" in call.outputs and not {"examples", "parts"} & set(call.outputs)

    def sees_shared(self, module: nn.Module) -> bool:
        """Return whether any call of a module returns a tensor that the examples of a batch share."""
        return any(self.is_shared(module, number) for number in range(len(self._calls.get(module, ()))))

    def is_called(self, module: nn.Module) -> bool:
        """Return whether a module is called. The parameters of a module can be used even if it is never called."""
        return module in self._calls


def watch_calls(
    model: nn.Module, batches: Sequence[Mapping[str, Any]], modules: Sequence[nn.Module], output_function: OutputFunction
) -> CallPlan:
    """Run a model forward on batches of different sizes and one width, and return how it calls `modules`."""
    seen: dict[nn.Module, list[list[tuple[int, _Sizes, _Sizes]]]] = {}  # per module and call, one entry per batch

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
    """Return the kind of an axis from its sizes in batches of `batch_sizes` examples; None if it is not a tensor's."""
    if None in sizes:
        return None
    per_example = {size / batch_size for size, batch_size in zip(sizes, batch_sizes, strict=True) if size is not None}
    if per_example == {1.0}:
        return "examples"
    if len(per_example) == 1 and (parts := per_example.pop()) > 1 and parts.is_integer():
        return "parts"
    return "shared"
