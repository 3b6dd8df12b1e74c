"""How a model calls its modules: which of the tensors that a module sees have the examples of a batch along their first axis.

A size says little by itself: a table of eight rows looks like four examples of two rows each. So the model runs on batches of
several sizes, of the same width. What grows with all of them has an axis of examples, or of parts of examples in succession.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from hf_trak.gradients.batch import OutputFunction, evaluation_mode

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
