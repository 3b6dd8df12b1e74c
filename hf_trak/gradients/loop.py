"""Per-example gradients one example at a time, by plain autograd: correct for any model, but slow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_trak.gradients.batch import (
    BatchFeatures,
    OutputFunction,
    check_outputs,
    compiled_calls,
    evaluation_mode,
    forget_caches,
    working_dtype,
)
from hf_trak.gradients.rules import Rows, embedding, find_rule
from hf_trak.projectors import Projector

_FEW = 4  # sketch a table's gradient by rows if at most one row in this many is nonzero
_SAMPLE = 64  # rows of a table that are tested first
_LARGE = 1 << 16  # entries of a gradient that is sketched at once; for smaller ones, a hook costs more than it saves


def loop_features(
    model: nn.Module,
    batch: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    output_function: OutputFunction,
    parameters: Mapping[str, nn.Parameter],
    projector: Projector,
) -> BatchFeatures:
    """Return the features of examples, from one forward and backward pass per example.

    The gradient of each large parameter is sketched as soon as it is complete, while it is still in the processor's cache, and then
    freed. So the gradients of all parameters are never in memory at once.

    Args:
        batch (`Mapping` or a sequence): A batch, which is cut into rows that keep their padding; or a sequence of batches of one
            row, which the model sees unchanged.
        parameters (`Mapping[str, nn.Parameter]`): From [`select_parameters`]; nothing else is differentiated.
    """
    rows = rows_of(batch) if isinstance(batch, Mapping) else batch
    outputs, out_to_losses, features = [], [], []
    with evaluation_mode(model), torch.enable_grad(), _lookups(model, parameters) as found:
        large = {name for name, parameter in parameters.items() if parameter.numel() >= _LARGE}
        sketch = _SketchWhenComplete(projector, parameters, large)
        try:
            for row in rows:
                found.clear()
                forget_caches(model)
                with _refusals_named(model):
                    output, out_to_loss = output_function(model, row)
                check_outputs(output, out_to_loss, 1)
                accumulator = projector.start(1, dtype=working_dtype(output.dtype), device=output.device)
                if output.requires_grad:
                    leaves = [*parameters.values(), *(lookup.leaf for lookup in found)]
                    with _refusals_named(model), sketch.into(accumulator):
                        grads = torch.autograd.grad(output.sum(), leaves, allow_unused=True)
                    with torch.no_grad():
                        named = zip(parameters, grads, strict=False)
                        small = {name: grad for name, grad in named if name not in large and grad is not None}
                        add_gradients(projector, accumulator, small)
                        for lookup, grad in zip(found, grads[len(parameters) :], strict=True):
                            if grad is not None:
                                _add_lookup(projector, accumulator, lookup, grad)
                outputs.append(output.detach())
                out_to_losses.append(out_to_loss.detach())
                features.append(projector.finish(accumulator))
        finally:
            sketch.remove()
    return BatchFeatures(torch.cat(outputs), torch.cat(out_to_losses), torch.cat(features))


class _SketchWhenComplete:
    """Hooks on parameters that sketch each gradient and give autograd zeros, which take no memory, in its place.

    Args:
        parameters (`Mapping[str, nn.Parameter]`): They are set to require gradients.
        names (`Set[str]`): The parameters that get a hook.
    """

    def __init__(self, projector: Projector, parameters: Mapping[str, nn.Parameter], names: Set[str]) -> None:
        self.projector = projector
        self.accumulator: Tensor | None = None
        self.handles = []
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            if name in names:
                self.handles.append(parameter.register_hook(partial(self._sketch, name)))

    @contextmanager
    def into(self, accumulator: Tensor) -> Iterator[None]:
        """Sketch the gradients of the block's backward pass into `accumulator`. Without such a block, the hooks change nothing."""
        self.accumulator = accumulator
        try:
            yield
        finally:
            self.accumulator = None

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _sketch(self, name: str, grad: Tensor) -> Tensor:
        if self.accumulator is None:
            return grad
        add_gradients(self.projector, self.accumulator, {name: grad})
        return grad.new_zeros(()).expand_as(grad)


@contextmanager
def _refusals_named(model: nn.Module) -> Iterator[None]:
    """Turn errors of models that support no gradients in evaluation mode into one that names the model.

    Raises:
        ValueError: With the model's own message.
    """
    try:
        yield
    except (AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"{type(model).__name__} itself refuses gradients in evaluation mode, where features are computed: {error}"
        ) from error


def rows_of(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a batch's rows as batches of one row. Each gets all values that are not tensors."""
    n_rows = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    return [
        {key: value[row : row + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}
        for row in range(n_rows)
    ]


class _Lookup(NamedTuple):
    """One call of an embedding. Its output is a leaf of the graph, whose gradient is computed instead of the table's."""

    module: nn.Embedding
    name: str
    ids: Tensor
    leaf: Tensor


@contextmanager
def _lookups(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[list[_Lookup]]:
    """Collect the calls of the model's embeddings within the block, so that the mostly zero gradient of a table is never formed.

    If a table has another use, such as a tied output layer, the gradient of that use is added.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    modules = list(model.modules())
    is_compiled = bool(compiled_calls(model)) or any(isinstance(module, torch._dynamo.OptimizedModule) for module in modules)
    tables = [
        module
        for module in modules
        if type(module) is nn.Embedding and find_rule(module) is embedding and id(module.weight) in names
        if "forward" not in module.__dict__ and not is_compiled
    ]
    found: list[_Lookup] = []
    for table in tables:
        table.forward = partial(_look_up, table, names[id(table.weight)], found)  # type: ignore[method-assign]
    try:
        yield found
    finally:
        for table in tables:
            del table.forward


def _look_up(module: nn.Embedding, name: str, found: list[_Lookup], input: Tensor) -> Tensor:
    leaf = F.embedding(input, module.weight.detach(), module.padding_idx)
    if not torch.is_grad_enabled():
        return leaf
    found.append(_Lookup(module, name, input, leaf.requires_grad_()))
    return leaf.clone()  # which may be written to in place


def _add_lookup(projector: Projector, accumulator: Tensor, lookup: _Lookup, grad: Tensor) -> None:
    """Sketch the gradient of one row's call of an embedding. The ids may have any shape."""
    contribution = embedding(
        lookup.module, lookup.ids.reshape(1, -1), grad.to(accumulator.dtype).reshape(1, -1, grad.shape[-1])
    )
    rows = contribution["weight"]
    assert isinstance(rows, Rows)
    shape = (lookup.module.num_embeddings, lookup.module.embedding_dim)
    projector.add_rows(accumulator, lookup.name, shape, rows.rows, rows.values)


def add_gradients(projector: Projector, accumulator: Tensor, grads: Mapping[str, Tensor]) -> None:
    """Sketch the complete gradients of one example, given by parameter name."""
    for name, grad in grads.items():
        grad = grad.to(accumulator.dtype)
        rows = _touched_rows(grad)
        if rows is None:
            projector.add(accumulator, name, grad.unsqueeze(0))
        else:
            projector.add_rows(accumulator, name, (grad.shape[0], grad.shape[1]), rows.unsqueeze(0), grad[rows].unsqueeze(0))


def _touched_rows(grad: Tensor) -> Tensor | None:
    """Return the nonzero rows of a table's gradient if they are few; None if they may be many, or if it is not a matrix."""
    if grad.ndim != 2 or grad.shape[0] <= _SAMPLE * _FEW:
        return None
    sample = grad[:: grad.shape[0] // _SAMPLE]
    if int(sample.any(1).sum()) * _FEW > len(sample):
        return None
    rows = (grad.amax(1).ne(0) | grad.amin(1).ne(0)).nonzero().flatten()  # as fast as memory; `any` is not
    return rows if len(rows) * _FEW <= grad.shape[0] else None
