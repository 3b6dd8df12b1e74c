"""The check at the start of a run: compare an engine's gradients with those of a loop over single examples.

The reference is the loop over examples, each alone and without padding. The engine must agree with it for the same examples in batches
of two and of three, where one example is longer than the others. The difference is measured for each parameter, relative to the
norm of its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_trak.gradients.batch import BatchFeatures, BatchRefused, OutputFunction, evaluation_mode
from hf_trak.gradients.functional import functional_features
from hf_trak.gradients.layerwise import layerwise_features, watched_modules
from hf_trak.gradients.loop import loop_features
from hf_trak.gradients.rules import find_rule
from hf_trak.gradients.shared import watch_shared
from hf_trak.gradients.taps import CallPlan, watch_calls
from hf_trak.projectors import BlockCountSketch, Projector

Collate = Callable[[Sequence[int]], Mapping[str, Any]]
"""Return a batch of the examples with these numbers, in this order. A single example has no padding."""

_PROJ_DIM = 1024  # of the sketches that are compared
_SIZES = (2, 3, 5)  # none divides another


class _Tolerance(NamedTuple):
    own: float  # relative to the parameter's gradient
    whole: float  # relative to the whole gradient: round-off where terms cancel


_TOLERANCE = {torch.float64: _Tolerance(1e-6, 1e-9), torch.float32: _Tolerance(1e-3, 1e-5)}
_WAY_OUT = "Use gradients='loop', which computes one example at a time, or 'auto', which uses it where necessary."
_COARSE = _Tolerance(0.15, 2e-2)  # half precision, and 8-bit weights, whose layers round activations too


class CheckFailed(ValueError):
    """An engine's gradients differ from those of the loop."""


class TooFewExamples(ValueError):
    """There is only one example, so examples in a batch cannot be compared with examples alone."""


def check_gradients(
    model: nn.Module,
    collate: Collate,
    n_examples: int,
    *,
    output_function: OutputFunction,
    parameters: Mapping[str, nn.Parameter],
    engine: Literal["layerwise", "functional"] = "layerwise",
) -> CallPlan | None:
    """Compare an engine with the loop over examples, each alone and without padding.

    Args:
        collate (`Callable`): Makes a batch of some of the examples.
        n_examples (`int`): Number of different examples, at least two. They have different lengths if the data has.

    Returns:
        How the model calls its modules, which `layerwise` needs for batches of other sizes.

    Raises:
        CheckFailed: If gradients differ. The message names the parameters or the examples.
        TooFewExamples: If there is only one example.
    """
    if n_examples < 2:
        raise TooFewExamples(
            "The check at the start compares examples alone and in a batch, so it needs at least two, but there is only one. Use "
            "gradients='loop' or 'auto', or give at least two rows."
        )
    batches = [[number % n_examples for number in range(size)] for size in _SIZES]
    sketch = _PerParameter(parameters)
    arguments: dict[str, Any] = {"output_function": output_function, "parameters": parameters, "projector": sketch}
    with _exact_products():
        alone, expected, chosen_among = [], [], []
        for number in range(min(n_examples, 3)):
            with _Choices() as choices:
                alone.append(loop_features(model, [collate([number])], **arguments))
            expected.append(sketch.take())
            chosen_among.append(choices.sizes)
        if any(sizes != chosen_among[0] for sizes in chosen_among):
            raise CheckFailed(
                f"{type(model).__name__} selects tokens of an example by `topk`, as sparse attention does. If several tokens have equal "
                f"values, the selection depends on padding, which differs between batches. {_WAY_OUT}"
            )

        def compare(compute: Callable[..., BatchFeatures]) -> None:
            for numbers in batches[:2]:
                numbers = [number % len(alone) for number in numbers]
                batch = collate(numbers)
                together = compute(model, batch, **arguments)
                found = sketch.take()
                wrong = _disagreements(model, numbers, together, found, alone, expected, parameters)
                if wrong:
                    raise CheckFailed(_explain(model, batch, engine, wrong, found, arguments, sketch, len(numbers)))

        if engine == "functional":
            compare(functional_features)
            return None
        whole = [collate(numbers) for numbers in batches]
        return _plan(model, whole, output_function, parameters, lambda plan: compare(_with_plan(plan)))


def _plan(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    output_function: OutputFunction,
    parameters: Mapping[str, nn.Parameter],
    compare: Callable[[CallPlan], None],
) -> CallPlan:
    """Return a plan of the model's calls that passes the check. Parameters of modules without a rule are tried as shared ones."""
    owned = watched_modules(model, parameters)
    plan = watch_calls(model, batches, list(owned), output_function)
    shared = frozenset(module for module in owned if module is not model and not plan.is_called(module))
    first: BatchRefused | None = None
    while True:
        try:
            plan = plan.with_shared(
                watch_shared(
                    model,
                    batches,
                    owned=owned,
                    parameters=parameters,
                    plan=plan,
                    always=shared,
                    output_function=output_function,
                )
            )
            compare(plan)
            return plan
        except BatchRefused as error:
            first = first or error
            kind = type(error.module)
            more = {module for module in owned if type(module) is kind and find_rule(module) is None and module is not model}
            if not more - shared:
                raise first from None
            shared |= more


class _Choices(TorchFunctionMode):
    """Records the number of values from which `topk` chooses. The number of experts is constant; that of tokens is not."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (torch.topk, Tensor.topk):
            values = args[0] if args else kwargs["input"]
            dim = args[2] if len(args) > 2 else kwargs.get("dim", -1)
            self.sizes.append(values.shape[dim])
        return function(*args, **kwargs)


def _with_plan(plan: CallPlan) -> Callable[..., BatchFeatures]:
    return lambda model, batch, **arguments: layerwise_features(model, batch, plan=plan, **arguments)


class _Disagreement(NamedTuple):
    place: int  # in the batch
    name: str | None  # of a parameter; None for the output
    share: float


def _disagreements(
    model: nn.Module,
    numbers: Sequence[int],
    together: BatchFeatures,
    found: Mapping[str, Tensor],
    alone: Sequence[BatchFeatures],
    expected: Sequence[Mapping[str, Tensor]],
    parameters: Mapping[str, nn.Parameter],
) -> list[_Disagreement]:
    tolerance = _tolerance(model, parameters)
    wrong = []
    for place, number in enumerate(numbers):
        for values, reference in ((together.output, alone[number].output), (together.out_to_loss, alone[number].out_to_loss)):
            difference, scale = (values[place] - reference[0]).abs().item(), reference[0].abs().item()
            if not difference <= tolerance.own * scale + 10 * tolerance.whole * max(1.0, scale):
                wrong.append(_Disagreement(place, None, difference / max(scale, 1e-12)))
        whole = torch.stack([values.norm() for values in expected[number].values()]).norm().item()
        for name, reference in expected[number].items():
            difference, own = (found[name][place] - reference[0]).norm().item(), reference.norm().item()
            if not difference <= tolerance.own * own + tolerance.whole * whole:
                wrong.append(_Disagreement(place, name, difference / max(own, 1e-12 * whole, 1e-30)))
    return wrong


def _tolerance(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> _Tolerance:
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        return _COARSE
    dtypes = {parameter.dtype for parameter in model.parameters()} | {parameter.dtype for parameter in parameters.values()}
    return max((_TOLERANCE.get(dtype, _COARSE) for dtype in dtypes), key=lambda tolerance: tolerance.own)


def _explain(
    model: nn.Module,
    batch: Mapping[str, Any],
    engine: str,
    wrong: Sequence[_Disagreement],
    found: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    sketch: _PerParameter,
    batch_size: int,
) -> str:
    """Explain whether the engine misses a part of a gradient, or whether other examples or padding change a gradient."""
    total = _total_gradients(model, batch, arguments["output_function"], arguments["parameters"], sketch)
    tolerance = _tolerance(model, arguments["parameters"])
    whole = torch.stack([values.norm() for values in total.values()]).norm()
    missing = [
        name
        for name, values in total.items()
        if (found[name].sum(0) - values[0]).norm() > tolerance.own * values.norm() + batch_size * tolerance.whole * whole
    ]
    missing = [name for name in missing if any(name == disagreement.name for disagreement in wrong)]
    if missing:
        return (
            f"`{engine}` does not find the whole gradient of {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}: the "
            "model uses them outside the modules that own them, or these modules see the whole batch at a time. "
            f"{_WAY_OUT} Or leave them out with `parameters`."
        )
    first = max(wrong, key=lambda disagreement: disagreement.share)
    what = "output" if first.name is None else f"gradient of {first.name}"
    return (
        f"The gradient of row {first.place} changes with the other examples of its batch, or with its padding: its {what} by "
        f"{first.share:.1%}. {type(model).__name__} mixes the examples of a batch, or reads padding. {_WAY_OUT}"
    )


def _total_gradients(
    model: nn.Module,
    batch: Mapping[str, Any],
    output_function: OutputFunction,
    parameters: Mapping[str, nn.Parameter],
    sketch: _PerParameter,
) -> dict[str, Tensor]:
    """Return the sketch of autograd's gradient of the sum of a batch's outputs."""
    with evaluation_mode(model), torch.enable_grad():
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        output = output_function(model, batch)[0].sum()
        accumulator = sketch.start(1, dtype=output.dtype, device=output.device)
        if output.requires_grad:
            grads = torch.autograd.grad(output, list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    sketch.add(accumulator, name, grad.unsqueeze(0).to(accumulator.dtype))
    return sketch.take()


class _PerParameter(Projector):
    """One small sketch for each parameter."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(proj_dim=1, seed=0)
        self._sketch = BlockCountSketch(proj_dim=_PROJ_DIM, seed=0)
        self._names = list(parameters)
        self._found: dict[str, Tensor] = {}

    def start(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch width"]:
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._found = {name: self._sketch.start(batch_size, dtype=dtype, device=device) for name in self._names}
        return torch.arange(batch_size, dtype=dtype, device=device).unsqueeze(1)  # row numbers, also in a slice

    def _rows(self, name: str, accumulator: Tensor) -> Tensor:
        first = int(accumulator[0, 0])
        return self._found[name][first : first + len(accumulator)]

    def add(self, accumulator: Tensor, name: str, grads: Tensor) -> None:
        self._sketch.add(self._rows(name, accumulator), name, grads)

    def add_outer(self, accumulator: Tensor, name: str, left: Tensor, right: Tensor) -> None:
        self._sketch.add_outer(self._rows(name, accumulator), name, left, right)

    def add_rows(self, accumulator: Tensor, name: str, shape: tuple[int, int], rows: Tensor, values: Tensor) -> None:
        self._sketch.add_rows(self._rows(name, accumulator), name, shape, rows, values)

    def take(self) -> dict[str, Tensor]:
        """Return the sketches of the last batch, by parameter."""
        return {name: self._sketch.finish(values) for name, values in self._found.items()}


@contextmanager
def _exact_products() -> Iterator[None]:
    """Turn off TF32 products on CUDA within the block, because their rounding would hide differences."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
