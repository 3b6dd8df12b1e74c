"""Per-example gradients of a whole batch from one forward and one backward pass, one layer at a time.

Every module that owns a selected parameter has hooks. They keep its input in the forward pass and catch the gradient of its output in
the backward pass. Together these give each example's gradient for that layer, which is sketched immediately. Autograd itself computes
only gradients of activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hf_trak.gradients.batch import (
    BatchFeatures,
    BatchRefused,
    OutputFunction,
    check_outputs,
    evaluation_mode,
    forget_caches,
    versions_of,
    working_dtype,
)
from hf_trak.gradients.layer_patches import frozen_layers
from hf_trak.gradients.loop import add_gradients
from hf_trak.gradients.rules import (
    Contribution,
    Dense,
    Outer,
    Rows,
    factors,
    find_rule,
    is_affine,
    looks_at_values,
    may_be_affine,
    own_parameters,
    owners,
)
from hf_trak.gradients.shared import SharedGradients, StandIns, plain
from hf_trak.gradients.taps import Axis, Call, CallPlan, Taps
from hf_trak.projectors import Projector

_WAY_OUT = "Use gradients='loop', or 'auto', which uses it where necessary, or leave these parameters out with `parameters`."


def layerwise_features(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    output_function: OutputFunction,
    parameters: Mapping[str, nn.Parameter],
    projector: Projector,
    plan: CallPlan | None = None,
) -> BatchFeatures:
    """Return the features of `batch` from one batched forward and backward pass of the sum of outputs.

    Peak memory is that of the activations plus the gradients of one layer, never (batch, grad_dim).

    Args:
        parameters (`Mapping[str, nn.Parameter]`): From [`select_parameters`]. The backward pass ends at the first of them.
        plan ([`CallPlan`], *optional*): How the model calls its modules, learned from other batches. Without it, sizes in this batch
            decide which axes are those of examples.

    Raises:
        BatchRefused: If a parameter is used in a way that loses the axis of examples. The message names the parameter.
    """
    batch_size = next(len(value) for value in batch.values() if isinstance(value, Tensor))
    with evaluation_mode(model), torch.enable_grad(), _Watch(model, parameters, projector, batch_size, plan) as watch:
        with watch.stand_ins():
            output, out_to_loss = output_function(model, batch)
        check_outputs(output, out_to_loss, batch_size)
        if output.requires_grad:
            output.sum().backward()
        features = watch.finish(output)
    return BatchFeatures(output.detach(), out_to_loss.detach(), features)


def watched_modules(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[nn.Module, dict[str, str]]:
    """Return, for each module that owns selected parameters, a mapping from its own names of them to the model's names.

    A tied weight has the same model name in every module.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        module: owned
        for module, used in owners(model).items()
        if (owned := {own: names[id(p)] for own, p in used.items() if id(p) in names})
    }


class _Watch:
    """Hooks on every module that owns a selected parameter, for one forward and backward pass."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        projector: Projector,
        batch_size: int,
        plan: CallPlan | None = None,
    ) -> None:
        self.plan = plan
        self.numbers: dict[nn.Module, int] = {}
        self.projector = projector
        self.batch_size = batch_size
        self.accumulator: Tensor | None = None
        self.recomputing = False
        self.expanded: dict[nn.Module, bool] = {}  # modules whose next ids are expanded to one row per example
        self.n_parts = 1  # rows of ids per example in the last embedding, such as the choices of a question
        self.model = model
        self.parameters = parameters
        self.owned = watched_modules(model, parameters)
        self.standing: StandIns | None = None
        self.shared: SharedGradients | None = None

    def __enter__(self) -> _Watch:
        self.stack = ExitStack()
        self.taps = Taps()
        self.stack.callback(self.taps.close)
        self.stack.enter_context(frozen_layers(self.model, unless=lambda: self.recomputing))
        for module in self.owned:
            rule = find_rule(module)
            if isinstance(module, nn.Embedding) and rule is not None:
                handle = module.register_forward_pre_hook(self._expand_shared_rows)
                self.stack.callback(handle.remove)
            hook = self._unless_shared(self._catch_functional if rule is None else self._catch(rule))
            self.stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        # An output function may read parameters itself, such as a temperature: see `OutputFunction`.
        self.model.__dict__["get_parameter"] = self._hand_out
        self.stack.callback(self.model.__dict__.pop, "get_parameter")
        return self

    def stand_ins(self) -> AbstractContextManager[Any]:
        """Put stand-ins in place of the parameters that the examples share, for the forward pass: see `shared.py`."""
        if self.plan is None or self.plan.shared is None or not (self.plan.shared.modules or self.plan.shared.steps):
            return nullcontext()
        self.shared = SharedGradients(self.plan.shared, self.taps, self.batch_size)
        self.standing = StandIns(
            self.owned,
            self.parameters,
            self.plan,
            self.plan.shared.modules,
            self.shared,
            unless=lambda: self.recomputing or not torch.is_grad_enabled(),
        )
        return self.standing

    def _unless_shared(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.standing is None or not self.standing.has(module):
                return hook(module, args, kwargs, output)
            if module not in self.standing.always:
                self._next_call(module)
                self.standing.take_away(module)
            return None

        return call

    def _tap(self, output: Tensor, catch: Callable[[Tensor], None]) -> Tensor:
        return self.taps.tap([output], lambda grads: catch(grads[0]))[0]

    def __exit__(self, *exception: object) -> None:
        self.stack.close()
        # Stand-ins refer to this object through `unless`. Without this, a batch's tensors would stay until garbage collection.
        self.standing = self.shared = None

    def finish(self, output: Tensor) -> Float[Tensor, "batch proj_dim"]:
        if self.accumulator is None:  # no selected parameter was reached: its gradient is zero
            self._start(output)
        accumulator = self.accumulator
        assert accumulator is not None
        if self.shared is not None and self.standing is not None:
            self.shared.per_example(
                self.standing.leaves, lambda row, grads: add_gradients(self.projector, accumulator[row : row + 1], grads)
            )
        return self.projector.finish(accumulator)

    def _hand_out(self, name: str) -> Tensor:
        """Return one copy of a parameter per example, so that each copy gets the gradient of its example."""
        parameter = type(self.model).get_parameter(self.model, name)
        chosen = next((own for own, selected in self.parameters.items() if selected is parameter), None)
        if chosen is None or not torch.is_grad_enabled():
            return parameter
        copies = parameter.detach().expand(self.batch_size, *parameter.shape).clone().requires_grad_()

        def catch(grads: Tensor) -> None:
            if self.accumulator is None:
                self._start(grads)
            assert self.accumulator is not None
            self.projector.add(self.accumulator, chosen, grads.detach().to(self.accumulator.dtype))

        copies.register_hook(catch)
        return copies

    def _start(self, like: Tensor) -> None:
        self.accumulator = self.projector.start(self.batch_size, dtype=working_dtype(like.dtype), device=like.device)

    def _expand_shared_rows(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Expand ids that are given once for the batch, such as position ids of shape (1, seq), to one row per example or part of it."""
        if self.recomputing or not args or (self.standing is not None and self.standing.has(module)):
            return None
        call = self.plan.call(module, self.numbers.get(module, -1) + 1) if self.plan is not None else None
        is_single = call.is_single if call is not None else True
        if is_single and args[0].ndim == 2 and args[0].shape[0] == 1 < self.batch_size:
            self.expanded[module] = True
            return (args[0].expand(self.batch_size * self.n_parts, -1), *args[1:])
        return None

    def _catch(self, rule: Callable[..., dict[str, Contribution]]) -> Callable[..., Tensor | None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            if self.recomputing or not torch.is_grad_enabled():
                return None
            call = self._next_call(module)
            inputs = plain(args[0] if args else next(iter(kwargs.values())))
            axis = _axis_of(call.inputs, 0) if call is not None else None
            if not self.expanded.pop(module, False):
                # Ids of shape (seq,) or (query, key) are the same for all examples. Do not mistake them for rows of examples.
                parts = not isinstance(module, nn.Embedding) or self.plan is not None
                self._require_examples(module, inputs, axis, parts=parts)
                if isinstance(module, nn.Embedding):
                    self.n_parts = len(inputs) // self.batch_size
            check_unchanged = self._unchanged(module, [inputs])

            def catch(grads: Tensor) -> None:
                if self.accumulator is None:
                    self._start(grads)
                check_unchanged()
                dtype = working_dtype(grads.dtype)
                floating = inputs.to(dtype) if inputs.is_floating_point() else inputs
                with torch.no_grad():
                    self._add(module, rule(module, floating, grads.detach().to(dtype)))

            return self._tap(output, catch)

        return hook

    def _catch_functional(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """For a module without a rule: run the module again by itself and differentiate it, example by example."""
        if self.recomputing or not torch.is_grad_enabled():
            return None
        call = self._next_call(module)
        leaves, structure = tree_flatten((args, kwargs))
        own = {name: parameter.detach() for name, parameter in own_parameters(module).items() if name in self.owned[module]}
        results, result_structure = tree_flatten(output)
        differentiable = [i for i, leaf in enumerate(results) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        outputs: list[Tensor] = [results[i] for i in differentiable]
        affine = self._catch_affine(module, leaves, structure, output, call)
        if affine is not None:
            return affine
        # Autocast may have given the module bfloat16. The second run is outside autocast and uses the dtype of its parameters.
        dtype = next(iter(own.values())).dtype
        leaves = [_as_dtype(plain(leaf), dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        axes = {i: _axis_of(call.outputs, i) if call is not None else None for i in differentiable}
        for i, tensor in zip(differentiable, outputs, strict=True):
            self._require_examples(module, tensor, axes[i], parts=self.plan is not None)
        if call is None:
            batched: dict[int, Axis] = {i: "examples" for i, leaf in enumerate(leaves) if _leads(leaf, self.batch_size)}
        else:
            batched = {i: axis for i, axis in enumerate(call.inputs) if axis in ("examples", "parts")}
            for i, axis in batched.items():
                self._require_examples(module, leaves[i], axis, parts=True)
        check_unchanged = self._unchanged(module, leaves)
        # (batch · parts, ...) -> (batch, parts, ...): the parts of an example go through the module together.
        examples_of = [leaves[i] if axis == "examples" else self._by_example(leaves[i]) for i, axis in batched.items()]

        def run(parameters: dict[str, Tensor], examples: list[Tensor]) -> list[Tensor]:
            filled = list(leaves)
            for (i, axis), example in zip(batched.items(), examples, strict=True):
                filled[i] = example.unsqueeze(0) if axis == "examples" else example
            args, kwargs = tree_unflatten(filled, structure)
            # Children keep their own parameters: a tied one is differentiated where the child uses it.
            forget_caches(module)
            result = functional_call(module, parameters, args, kwargs, tie_weights=False)
            found = tree_flatten(result)[0]
            return [found[i] if axis == "parts" else found[i][0] for i, axis in axes.items()]

        def grads_of_one(examples: list[Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
            return vjp(lambda parameters: run(parameters, examples), own)[1](grads)[0]

        def catch(grads: list[Tensor]) -> None:
            if self.accumulator is None:
                self._start(grads[0])
            check_unchanged()
            self.recomputing = True
            try:
                received = [
                    _as_dtype(grad if axis != "parts" else self._by_example(grad), dtype)
                    for grad, axis in zip(grads, axes.values(), strict=True)
                ]
                over = _over_examples if looks_at_values(module) else _vmapped
                values = over(grads_of_one, examples_of, received)
            except Exception as error:
                raise BatchRefused(
                    f"`layerwise` has no rule for {self._describe(module)}, and differentiating it on its own failed "
                    f"({type(error).__name__}: {error}). {_WAY_OUT}",
                    module,
                ) from error
            finally:
                self.recomputing = False
            self._add(module, {name: Dense(value) for name, value in values.items()})

        for i, watched in zip(differentiable, self.taps.tap(outputs, catch), strict=True):
            results[i] = watched
        return tree_unflatten(results, result_structure)

    def _catch_affine(
        self, module: nn.Module, leaves: list[Any], structure: TreeSpec, output: Any, call: Call | None
    ) -> Tensor | None:
        """For a module of any class that is affine in its parameters (see `rules.py`). Return None for other modules."""
        own = own_parameters(module)
        if not isinstance(output, Tensor) or not may_be_affine(module, own, output):
            return None
        dtype = working_dtype(output.dtype)
        leaves = [_as_dtype(plain(leaf), dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        like = {name: torch.empty_like(parameter, dtype=dtype) for name, parameter in own.items()}

        def run(parameters: dict[str, Tensor]) -> Tensor:
            args, kwargs = tree_unflatten(leaves, structure)
            self.recomputing, before = True, self.recomputing
            forget_caches(module)
            try:
                with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                    return functional_call(module, parameters, args, kwargs, tie_weights=False)
            finally:
                forget_caches(module)
                self.recomputing = before

        if not is_affine(module, like, run):
            return None
        self._require_examples(module, output, _axis_of(call.outputs, 0) if call is not None else None, parts=True)
        check_unchanged = self._unchanged(module, leaves)

        def catch(grads: Tensor) -> None:
            if self.accumulator is None:
                self._start(grads)
            check_unchanged()
            found: dict[str, Contribution] = {}
            with torch.no_grad():
                for name, factor in factors(like, run).items():
                    shape = own[name].shape
                    products = grads.to(dtype) * factor
                    found[name] = Dense(products.reshape(self.batch_size, -1, *shape).sum(1))
            self._add(module, found)

        return self._tap(output, catch)

    def _next_call(self, module: nn.Module) -> Call | None:
        """Return the plan's entry for this call of a module, or None if there is no plan."""
        number = self.numbers[module] = self.numbers.get(module, -1) + 1
        if self.plan is None:
            return None
        call = self.plan.call(module, number)
        if call is None:
            raise BatchRefused(
                f"{self._describe(module)} is called differently than in the batches that were checked, for example an expert that received "
                f"no token in them. {_WAY_OUT}"
            )
        return call

    def _require_examples(self, module: nn.Module, tensor: Tensor, axis: Axis | None, *, parts: bool = False) -> None:
        """Refuse a tensor whose first axis is not that of the examples. With `parts`, an example may be several consecutive rows.

        Args:
            axis (*optional*): The plan's entry for that axis. Without it, the size decides.
        """
        rows = tensor.shape[0] if tensor.ndim else 0
        whole = rows == self.batch_size and axis != "shared"
        in_parts = parts and rows > 0 and rows % self.batch_size == 0 and axis in (None, "parts")
        if not (whole or in_parts):
            self._refuse(module, tensor)

    def _refuse(self, module: nn.Module, tensor: Tensor) -> None:
        raise BatchRefused(
            f"{self._describe(module)} does not keep the examples of a batch apart: for a batch of {self.batch_size} it sees a "
            f"tensor of shape {tuple(tensor.shape)}. {_WAY_OUT}",
            module,
        )

    def _unchanged(self, module: nn.Module, inputs: list[Any]) -> Callable[[], None]:
        """Return a function that raises an error if a module's inputs were modified in place since this call."""
        watched = [value for value in inputs if isinstance(value, Tensor) and not value.is_inference()]
        versions = versions_of(watched)

        def check() -> None:
            if versions_of(watched) != versions:
                raise BatchRefused(
                    f"An input of {self._describe(module)} is modified in place after the module has used it, so its gradient would "
                    f"be wrong. {_WAY_OUT}"
                )

        return check

    def _by_example(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (self.batch_size, -1))

    def _describe(self, module: nn.Module) -> str:
        return f"{type(module).__name__} (parameters {', '.join(self.owned[module].values())})"

    def _add(self, module: nn.Module, contributions: dict[str, Contribution]) -> None:
        """Sketch the gradients that a rule returned, for the selected parameters only."""
        assert self.accumulator is not None
        for own, name in self.owned[module].items():
            match contributions[own]:
                case Outer(left, right):
                    self.projector.add_outer(self.accumulator, name, self._join(left), self._join(right))
                case Rows(rows, values):
                    shape = tuple(own_parameters(module)[own].shape)
                    rows = rows.reshape(self.batch_size, -1)
                    self.projector.add_rows(self.accumulator, name, shape, rows, self._join(values))  # type: ignore[arg-type]
                case Dense(grads):
                    if len(grads) != self.batch_size:
                        grads = grads.unflatten(0, (self.batch_size, -1)).sum(1)
                    self.projector.add(self.accumulator, name, grads.to(self.accumulator.dtype))

    def _join(self, factor: Tensor) -> Tensor:
        """(batch · windows, tokens, dim) -> (batch, windows · tokens, dim)"""
        return factor.reshape(self.batch_size, -1, factor.shape[-1])


def _over_examples(
    function: Callable[[list[Tensor], list[Tensor]], dict[str, Tensor]], examples: list[Tensor], grads: list[Tensor]
) -> dict[str, Tensor]:
    """Call a function example by example, for a module whose code depends on values, which `vmap` does not support."""
    rows = [function([x[row] for x in examples], [x[row] for x in grads]) for row in range(len(grads[0]))]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _vmapped(
    function: Callable[[list[Tensor], list[Tensor]], dict[str, Tensor]], examples: list[Tensor], grads: list[Tensor]
) -> dict[str, Tensor]:
    return vmap(function)(examples, grads)


def _axis_of(axes: tuple[Axis | None, ...], place: int) -> Axis | None:
    return axes[place] if place < len(axes) else "shared"


def _leads(leaf: Any, batch_size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.shape[:1] == (batch_size,)


def _as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
