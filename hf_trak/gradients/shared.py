"""Gradients of parameters that enter the forward pass through tensors without an axis of examples, such as relative position biases.

DeBERTa normalizes and projects its table of positions once per batch. Swin and BEiT look up a bias for each pair of positions, T5 and
MPNet for each pair of tokens. Here these results are called *shared*.

A stand-in (a tensor subclass) replaces such a parameter during the forward pass. Results that depend only on stand-ins and constants
are stand-ins too, and have a graph of their own. The first operation that combines a stand-in with a tensor that has an axis of
examples expands the stand-in along this axis. The gradient for each example is caught there, and then goes back through the small graph
of the stand-ins.

Batches of several sizes show which operation is the first to meet the examples; `taps.py` learns the calls of modules in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from hf_trak.gradients.batch import BatchRefused, OutputFunction, evaluation_mode, versions_of
from hf_trak.gradients.taps import Axis, CallPlan, SharedPlan, Taps, axis_of_sizes

_MOST = 1 << 27  # entries of a parameter's gradients that are kept for all examples of a batch
_LOST = "Parameters that the examples share are used in a way that loses the examples' axis"
# Operations whose result does not change if an operand is repeated along a new first axis, or along a first axis of size 1.
_BROADCASTS = {
    *(
        "add",
        "sub",
        "mul",
        "div",
        "true_divide",
        "where",
        "matmul",
        "scaled_dot_product_attention",
        "maximum",
        "minimum",
        "rsub",
    ),
    *("__matmul__", "__radd__", "__rsub__", "__rmul__", "__add__", "__sub__", "__mul__", "__truediv__", "__iadd__", "__isub__"),
    *("__rtruediv__", "__imul__", "add_", "sub_", "mul_", "div_"),
}


class _Step(NamedTuple):
    """An operation on stand-ins. `laid` says of each tensor operand whether it repeats a shared tensor for each example."""

    name: str
    meets_examples: bool
    operands: tuple[bool, ...]  # whether each is a stand-in
    laid: tuple[bool, ...]
    sliced: tuple[bool, ...]  # whether each has an axis of examples


class StandIn(Tensor):
    """A tensor that depends only on parameters and constants."""

    on_call: Callable[[Any, list[Any], Any], Any]
    token: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, structure = tree_flatten((args, kwargs or {}))
        first = next((leaf for leaf in leaves if isinstance(leaf, StandIn) and hasattr(leaf, "on_call")), None)
        with torch._C.DisableTorchFunctionSubclass():
            if first is None:
                args, kwargs = tree_unflatten(leaves, structure)
                return func(*args, **kwargs)
            return first.on_call(func, leaves, structure)


def plain(tensor: Tensor) -> Tensor:
    """Return a tensor or stand-in as a plain, detached tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


def _stand_in(tensor: Tensor, on_call: Callable[[Any, list[Any], Any], Any], token: int) -> StandIn:
    result = tensor if isinstance(tensor, StandIn) else tensor.as_subclass(StandIn)
    result.on_call, result.token = on_call, token
    return cast(StandIn, result)


class StandIns:
    """Replaces parameters by stand-ins: for the modules in `always` all the time, for others during calls without an axis of examples."""

    def __init__(
        self,
        owned: Mapping[nn.Module, Mapping[str, str]],
        parameters: Mapping[str, nn.Parameter],
        plan: CallPlan,
        always: frozenset[nn.Module],
        on_call: Callable[[Any, list[Any], Any], Any],
        unless: Callable[[], bool] = lambda: False,
    ) -> None:
        self.unless = unless
        self.owned = owned
        self.parameters = parameters
        self.plan = plan
        self.always = always
        self.on_call = on_call
        self.leaves: dict[str, Tensor] = {}
        self._standing: dict[str, StandIn] = {}
        self._put: dict[nn.Module, dict[tuple[nn.Module, str], nn.Parameter]] = {}
        self._numbers: dict[nn.Module, int] = {}

    def __enter__(self) -> StandIns:
        self.stack = ExitStack()
        for module in self.owned:
            if module in self.always:
                self.put(module)
            elif self.plan.sees_shared(module):
                self.stack.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        for module in list(self._put):
            self.take_away(module)
        self.stack.close()

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.unless():
            return
        number = self._numbers[module] = self._numbers.get(module, -1) + 1
        if self.plan.is_shared(module, number):
            self.put(module)

    def has(self, module: nn.Module) -> bool:
        """Return whether a module has stand-ins at the moment."""
        return module in self._put

    def put(self, module: nn.Module) -> None:
        places = self._put.setdefault(module, {})
        for own, name in self.owned[module].items():
            place, _, leaf = own.rpartition(".")
            child = module.get_submodule(place)
            parameter = child._parameters[leaf]
            assert parameter is not None
            places[child, leaf] = parameter
            child._parameters[leaf] = self._of(name)  # type: ignore[assignment]

    def take_away(self, module: nn.Module) -> None:
        for (child, leaf), parameter in self._put.pop(module).items():
            child._parameters[leaf] = parameter

    def _of(self, name: str) -> StandIn:
        if name not in self._standing:
            leaf = self.leaves[name] = self.parameters[name].detach().requires_grad_(torch.is_grad_enabled())
            self._standing[name] = _stand_in(leaf.view_as(leaf), self.on_call, -1 - len(self._standing))
        return self._standing[name]


class _Operation(NamedTuple):
    name: str
    tokens: tuple[int | None, ...]
    shapes: tuple[tuple[int, ...], ...]
    results: tuple[int, ...]
    result_shapes: tuple[tuple[int, ...], ...]


class _Recorder:
    """Records the operations on stand-ins and on results that depend on them."""

    def __init__(self) -> None:
        self.operations: list[_Operation] = []
        self.count = 0

    def __call__(self, func: Any, leaves: list[Any], structure: Any) -> Any:
        operands = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        tokens = tuple(getattr(leaf, "token", None) for leaf in operands)
        shapes = tuple(tuple(leaf.shape) for leaf in operands)
        args, kwargs = tree_unflatten(leaves, structure)
        results, result_structure = tree_flatten(func(*args, **kwargs))
        found = []
        for place, result in enumerate(results):
            if isinstance(result, Tensor):
                results[place] = _stand_in(result, self, self.count)
                found.append(results[place])
                self.count += 1
        if found:
            made, made_shapes = tuple(result.token for result in found), tuple(tuple(result.shape) for result in found)
            self.operations.append(_Operation(func.__name__, tokens, shapes, made, made_shapes))
        return tree_unflatten(results, result_structure)


def watch_shared(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    *,
    owned: Mapping[nn.Module, Mapping[str, str]],
    parameters: Mapping[str, nn.Parameter],
    plan: CallPlan,
    always: frozenset[nn.Module],
    output_function: OutputFunction,
) -> SharedPlan:
    """Run a model forward on batches of different sizes and one width, and return the operations on shared tensors.

    Raises:
        BatchRefused: If the operations differ between the batches, or if the axis of examples is not the first axis.
    """
    if not always and not any(plan.sees_shared(module) for module in owned):
        return SharedPlan(always, ())
    records, batch_sizes = [], []
    for batch in batches:
        recorder = _Recorder()
        with ExitStack() as stack, evaluation_mode(model), torch.no_grad():
            standing = stack.enter_context(StandIns(owned, parameters, plan, always, recorder))
            for module in owned:
                stack.callback(module.register_forward_hook(_take_away_from(standing)).remove)
            output_function(model, batch)
        records.append(recorder.operations)
        batch_sizes.append(next(len(value) for value in batch.values() if isinstance(value, Tensor)))
    return SharedPlan(always, tuple(_steps(records, batch_sizes)))


def _take_away_from(standing: StandIns) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if standing.has(module) and module not in standing.always:
            standing.take_away(module)

    return hook


def _steps(records: Sequence[Sequence[_Operation]], batch_sizes: Sequence[int]) -> list[_Step]:
    """Follow the stand-ins through each record until they meet the examples."""
    shared: list[set[int]] = [
        {token for op in record for token in op.tokens if token is not None and token < 0} for record in records
    ]
    places = [0] * len(records)
    steps: list[_Step] = []
    while True:
        now = []
        for number, record in enumerate(records):
            while places[number] < len(record) and not shared[number].intersection(record[places[number]].tokens):
                places[number] += 1
            if places[number] < len(record):
                now.append(record[places[number]])
                places[number] += 1
        if not now:
            return steps
        kinds = {(op.name, tuple(token in shared[i] for token in op.tokens), len(op.results)) for i, op in enumerate(now)}
        if len(now) < len(records) or len(kinds) > 1:
            raise BatchRefused(f"{_LOST}: differently in batches of different sizes.")
        name, operands, _ = kinds.pop()
        axes = _first_axes(batch_sizes, [op.shapes for op in now], name)
        meets = any(axis != "shared" and not stands for axis, stands in zip(axes, operands, strict=True))
        if not meets:
            _first_axes(batch_sizes, [op.result_shapes for op in now], name)
        for number, op in enumerate(now):
            shared[number] -= set(op.results)
            if not meets:
                shared[number] |= set(op.results)
        laid = tuple(stands and axis != "shared" for axis, stands in zip(axes, operands, strict=True))
        alone = any(stands and not lies for stands, lies in zip(operands, laid, strict=True))
        sliced = tuple(axis != "shared" for axis in axes)
        if meets and alone and name not in _BROADCASTS:
            results = _first_axes(batch_sizes, [op.result_shapes for op in now], name)
            if any(laid) or len(results) > 1 or results[0] == "shared" or name.endswith("_"):
                raise BatchRefused(f"{_LOST}, by `{name}` with shapes {now[0].shapes}.")
        steps.append(_Step(name, meets, operands, laid, sliced))


def _first_axes(batch_sizes: Sequence[int], shapes: Sequence[Sequence[tuple[int, ...]]], name: str) -> list[Axis]:
    """Return the kind of the first axis of each tensor, from the shapes in batches of different sizes."""
    axes: list[Axis] = []
    for of_tensor in zip(*shapes, strict=True):
        if len({len(shape) for shape in of_tensor}) > 1:
            raise BatchRefused(f"{_LOST}: `{name}` sees tensors of {of_tensor}.")
        found = [axis_of_sizes(batch_sizes, sizes) for sizes in zip(*of_tensor, strict=True)]
        if any(len(set(sizes)) > 1 for sizes in list(zip(*of_tensor, strict=True))[1:]):
            raise BatchRefused(f"{_LOST}: `{name}` has the examples along another axis than the first.")
        if found and found[0] == "shared" and len({shape[0] for shape in of_tensor}) > 1:
            raise BatchRefused(f"{_LOST}: `{name}` sees tensors of {of_tensor}.")
        axes.append(cast(Axis, found[0]) if found else "shared")
    return axes


class SharedGradients:
    """Catches the gradients of shared tensors in one forward and backward pass of a batch."""

    def __init__(self, plan: SharedPlan, taps: Taps, batch_size: int) -> None:
        self.steps = plan.steps
        self.taps = taps
        self.batch_size = batch_size
        self.place = 0
        self._caught: dict[int, tuple[Tensor, bool, Tensor]] = {}  # by stand-in: itself, whether it is laid, its gradients

    def __call__(self, func: Any, leaves: list[Any], structure: Any) -> Any:
        at = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        step = self.steps[self.place] if self.place < len(self.steps) else None
        operands = tuple(isinstance(leaves[place], StandIn) for place in at)
        # A tensor that requires a gradient and is not a stand-in depends on the examples.
        mixed = any(leaves[place].requires_grad and not stands for place, stands in zip(at, operands, strict=True))
        is_expected = step is not None and (func.__name__, operands) == (step.name, step.operands)
        is_expected = is_expected and step is not None and (step.meets_examples or not mixed)
        if not (is_expected and step is not None and step.meets_examples):
            args, kwargs = tree_unflatten(leaves, structure)
            results, result_structure = tree_flatten(func(*args, **kwargs))
            if any(isinstance(result, Tensor) for result in results):
                self._next(is_expected, func)
                results = [_stand_in(result, self, 0) if isinstance(result, Tensor) else result for result in results]
            return tree_unflatten(results, result_structure)
        assert step is not None
        self._next(is_expected, func)
        alone = any(stands and not lies for stands, lies in zip(step.operands, step.laid, strict=True))
        if alone and step.name not in _BROADCASTS:
            return self._run_each(func, leaves, structure, at, step)
        sizes = [
            leaves[place].shape for place, stands in zip(at, step.operands, strict=True) if not stands and leaves[place].ndim
        ]
        like_shape = max(sizes, key=lambda shape: (len(shape), shape[0]))
        for place, stands, laid in zip(at, step.operands, step.laid, strict=True):
            if stands:
                leaves[place] = self._tap(leaves[place], laid, like_shape)
        args, kwargs = tree_unflatten(leaves, structure)
        return func(*args, **kwargs)

    def _run_each(self, func: Any, leaves: list[Any], structure: Any, at: list[int], step: _Step) -> Tensor:
        """For an operation that uses a stand-in as a weight, such as a convolution: compute and differentiate it again, example by example."""
        standing = {place: leaves[place] for place, stands in zip(at, step.operands, strict=True) if stands}
        sliced = [place for place, slices in zip(at, step.sliced, strict=True) if slices]
        self._check_size(standing.values())
        for place in standing:
            leaves[place] = plain(leaves[place])
        args, kwargs = tree_unflatten(leaves, structure)
        output = func(*args, **kwargs)
        values = [plain(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        versions = versions_of(values[place] for place in sliced)
        device = output.device.type
        precision: dict[str, Any] = {"enabled": torch.is_autocast_enabled(device), "dtype": torch.get_autocast_dtype(device)}

        def catch(grads: list[Tensor]) -> None:
            if versions_of(values[place] for place in sliced) != versions:
                raise BatchRefused(f"An operand of `{step.name}` is written to in place after its use.")
            by_example = grads[0].unflatten(0, (self.batch_size, -1))
            found = []
            for example in range(self.batch_size):
                weights = {place: values[place].detach().requires_grad_() for place, s in standing.items() if s.requires_grad}
                filled = [weights.get(place, value) for place, value in enumerate(values)]
                for place in sliced:
                    filled[place] = values[place].unflatten(0, (self.batch_size, -1))[example]
                args, kwargs = tree_unflatten(filled, structure)
                with torch.enable_grad(), torch.autocast(device, **precision):
                    again = func(*args, **kwargs)
                found.append(torch.autograd.grad(again, list(weights.values()), by_example[example]))
            for place, of_place in zip(weights, zip(*found, strict=True), strict=True):
                self._catch(standing[place], False, torch.stack(of_place))

        return self.taps.tap([output], catch)[0]

    def _check_size(self, standing: Iterable[Tensor]) -> None:
        entries = max(tensor.numel() for tensor in standing) * self.batch_size
        if entries > _MOST:
            raise BatchRefused(f"{_LOST}, unless {entries:,} numbers are kept, which would not fit in memory.")

    def _catch(self, standing: Tensor, laid: bool, found: Tensor) -> None:
        before = self._caught.get(id(standing))
        self._caught[id(standing)] = (standing, laid, found if before is None else before[2] + found)

    def _next(self, is_expected: bool, func: Any) -> None:
        if not is_expected:
            raise BatchRefused(f"{_LOST}, and differently than in the batches that were checked (by `{func.__name__}`).")
        self.place += 1

    def _tap(self, standing: Tensor, laid: bool, like: torch.Size) -> Tensor:
        values = plain(standing)
        if not values.is_floating_point() or not standing.requires_grad:
            return values
        if not laid:
            self._check_size([values])
            missing = len(like) - values.ndim
            if missing < 0 or (missing == 0 and values.shape[0] != 1) or like[0] % self.batch_size:
                raise BatchRefused(f"{_LOST}: a tensor of shape {tuple(values.shape)} meets one of {tuple(like)}.")
            values = values.reshape(*[1] * missing, *values.shape)
            values = values.expand(like[0], *values.shape[1:])

        def catch(grads: list[Tensor]) -> None:
            found = grads[0]
            if not laid:
                # (batch · parts, 1, ..., *shape) -> (batch, *shape)
                found = found.unflatten(0, (self.batch_size, -1)).sum(1).reshape(self.batch_size, *standing.shape)
            self._catch(standing, laid, found)

        return self.taps.tap([values], catch)[0]

    def per_example(self, leaves: Mapping[str, Tensor], use: Callable[[int, dict[str, Tensor]], None]) -> None:
        """Call `use` for each example with its number and its gradients by parameter name."""
        if self.place != len(self.steps):
            raise BatchRefused(f"{_LOST}, and differently than in the batches that were checked ({self.place} operations).")
        if not self._caught:
            return
        caught = list(self._caught.values())
        outputs = [standing.as_subclass(Tensor) for standing, _, _ in caught]
        for example in range(self.batch_size):
            grads = []
            for standing, laid, found in caught:
                if laid:
                    part = torch.zeros_like(found)
                    parts = found.unflatten(0, (self.batch_size, -1))
                    part.unflatten(0, (self.batch_size, -1))[example] = parts[example]
                else:
                    part = found[example]
                grads.append(part.to(standing.dtype))
            values = torch.autograd.grad(outputs, list(leaves.values()), grads, retain_graph=True, allow_unused=True)
            use(example, {name: value for name, value in zip(leaves, values, strict=True) if value is not None})
        self._caught.clear()
