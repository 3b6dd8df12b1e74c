r"""Points on the straight line from a base checkpoint to a final one, made in memory: $\theta = \theta_0 + \alpha(\theta_1 - \theta_0)$.

A parameter that the base lacks, such as a new head, starts from its initial value if that is known, and from 0 otherwise. A
normalisation layer or an embedding that the base lacks keeps its final value, because it does not work near 0.

The running statistics of BatchNorm are measured at the point, on training rows. Interpolated statistics are not those of the activations
(docs/evidence/decisions.md has measurements).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from hf_trak.hashing import random_bits, stream_key

logger = logging.getLogger(__name__)

_LEAST_SHARED = 0.5  # share of the parameters outside embeddings; a base that shares fewer belongs to another model
LEAST_COSINE = 0.1  # between base and final matrices; independently trained models have less
# Initialisations of LoRA that do not change the base model; the others subtract their product from its weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva")
STATISTICS_ROWS, STATISTICS_BATCH = 512, 64  # training rows on which running statistics are measured, in total and per batch
_OTHER_KINDS = (".lora_magnitude_vector", ".ia3_", ".prompt_encoder", ".vera_", ".hada_", ".lokr_")


@dataclass(frozen=True)
class PointReport:
    """How a point was computed: names of parameters by the start of their line.

    Args:
        from_base (`tuple[str, ...]`): From the base's value.
        from_initial (`tuple[str, ...]`): From a given initial value.
        from_zero (`tuple[str, ...]`): From 0, such as new heads.
        kept (`tuple[str, ...]`): At the final value.
        measured (`tuple[str, ...]`): Modules whose running statistics changed in training, so they have to be measured at the point.
        rows (`dict[str, int]`): For parameters with another number of rows than the base's, the number of leading rows that start
            from the base. The other rows keep their final values.
        distance (`float`): $\\|\theta_1 - \theta_0\\| / \\|\theta_0\\|$ over the parameters that start from the base.
        cosine (`float`): Between the base's and the final matrices. It is near 0 for independently trained models.
    """

    from_base: tuple[str, ...] = field(default_factory=tuple)
    from_initial: tuple[str, ...] = field(default_factory=tuple)
    from_zero: tuple[str, ...] = field(default_factory=tuple)
    kept: tuple[str, ...] = field(default_factory=tuple)
    measured: tuple[str, ...] = field(default_factory=tuple)
    rows: dict[str, int] = field(default_factory=dict)
    distance: float = 0.0
    cosine: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the record for an index: counts, and the names of all parameters that do not start from the base."""
        return {**self.identity(), "distance": round(self.distance, 6), "cosine": round(self.cosine, 6)}

    def identity(self) -> dict[str, Any]:
        """Return the part of [`~PointReport.to_dict`] that does not depend on the machine."""
        return {
            "from_base": len(self.from_base),
            "from_initial": list(self.from_initial),
            "from_zero": list(self.from_zero),
            "kept": list(self.kept),
            **({"rows": dict(self.rows)} if self.rows else {}),
            **({"statistics": {**_RECIPE, "modules": len(self.measured)}} if self.measured else {}),
        }


_RECIPE = {"rows": STATISTICS_ROWS, "rows_at_a_time": STATISTICS_BATCH}


def move_to_point(
    model: nn.Module, base: Mapping[str, Tensor], alpha: float, *, initial: Mapping[str, Tensor] | None = None
) -> PointReport:
    r"""Replace a final model's weights by those of the point `alpha` of the line from `base`, in place.

    Args:
        model (`nn.Module`): The model with the final weights.
        base (`Mapping[str, Tensor]`): The base's weights and buffers by the model's names. Names may be missing. Parameters with a row
            per token of the vocabulary may have another number of rows: rows that both have are moved, and the others do not change.
        alpha (`float`): 0 is the base, 1 the final model.
        initial (`Mapping[str, Tensor]`, *optional*): Initial values of parameters that the base lacks.

    Running statistics that differ between the two ends are interpolated until they are measured; see [`measure_statistics`].

    Raises:
        ValueError: If `alpha` is out of range, if the base shares too few parameters with the model, equals it or has another
            vocabulary, or if weights are quantized.
    """
    _check_alpha(alpha)
    check_unquantized(model)
    initial = initial or {}
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    tokens = _tokens(model, base)
    start: dict[str, list[str]] = {"from_base": [], "from_initial": [], "from_zero": [], "kept": []}
    some_rows: dict[str, int] = {}
    sums, shared, total = _Sums(), 0, 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_embedding = isinstance(owners[id(parameter)], nn.Embedding)
            total += 0 if is_embedding else parameter.numel()
            found = base.get(name)
            if found is not None and parameter.ndim == 0 and found.ndim == 0:
                sums.add(found, parameter)
                parameter.copy_(_lerp(found, parameter, alpha))
                start["from_base"].append(name)
                shared += 1
            elif found is not None and (rows := _shared_rows(parameter, found, tokens)):
                cosine = sums.add(found[:rows], parameter[:rows])
                if found.shape != parameter.shape:
                    some_rows[name] = rows
                    if parameter.ndim > 1 and cosine < LEAST_COSINE:
                        raise ValueError(
                            f"{name} has {len(parameter):,} rows in the final model and {len(found):,} in the base, and those that both "
                            "have are of other tokens: their vocabularies differ in more than tokens added at the end. Give the base "
                            "that the final model was trained from."
                        )
                parameter[:rows] = _lerp(found[:rows], parameter[:rows], alpha)
                start["from_base"].append(name)
                shared += 0 if is_embedding else parameter.numel()
            elif name in initial and initial[name].shape == parameter.shape:
                parameter.copy_(_lerp(initial[name], parameter, alpha))
                start["from_initial"].append(name)
            elif is_embedding or _is_norm(owners[id(parameter)]):
                start["kept"].append(name)
            else:
                parameter.mul_(alpha)
                start["from_zero"].append(name)
        if shared < _LEAST_SHARED * total:
            raise ValueError(
                f"The base shares {shared:,} of the {total:,} parameters outside embeddings with the final model, by name and shape, so "
                "it is not what the final model was trained from. Give that checkpoint as `base` (--base)."
            )
        if sums.moved == 0:
            raise ValueError(
                "The base has the weights of the final model, so there is no path between them. Give another `base`."
            )
        measured = [
            name
            for name, module in running_norms(model).items()
            if not all(_is_same(base.get(key), value) for key, value in _statistics_of(name, module).items())
        ]
        own = {name.rpartition(".")[0] for name, _ in model.named_buffers() if name.endswith(".running_mean")} - running_norms(
            model
        ).keys()
        for name, buffer in model.named_buffers():
            found = base.get(name)
            if found is not None and name.rpartition(".")[0] in own and not _is_same(found, buffer):
                logger.warning(
                    "%s is not a BatchNorm of PyTorch, so its statistics are interpolated and not measured at the point.", name
                )
            if found is not None and found.shape == buffer.shape and buffer.is_floating_point():
                buffer.copy_(_lerp(found, buffer, alpha))
    names = {kind: tuple(found) for kind, found in start.items()} | {"measured": tuple(measured)}
    return replace(PointReport(**names), rows=some_rows, distance=sums.distance, cosine=sums.cosine)  # type: ignore[arg-type]


def check_unquantized(model: nn.Module) -> None:
    """Check that no weights are quantized, because quantized weights cannot be interpolated.

    Raises:
        ValueError: If some are quantized.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} is of {parameter.dtype}, and quantized weights cannot be interpolated. Load the model unquantized, or leave "
                "`base` out."
            )


class _Sums:
    """Distance and cosine between base and final parameters, summed in float64."""

    def __init__(self) -> None:
        self.moved = self.length = self.inner = self.base_length = self.final_length = 0.0

    def add(self, base: Tensor, final: Tensor) -> float:
        """Add a parameter, and return the cosine between its base and final values."""
        start, end = base.detach().to(final.device).double(), final.detach().double()
        length = start.square().sum().item()
        self.moved += (end - start).square().sum().item()
        self.length += length
        inner, final_length = (start * end).sum().item(), end.square().sum().item()
        if final.ndim > 1:
            self.inner, self.base_length = self.inner + inner, self.base_length + length
            self.final_length += final_length
        return inner / max((length * final_length) ** 0.5, 1e-300)

    @property
    def distance(self) -> float:
        return (self.moved / max(self.length, 1e-300)) ** 0.5

    @property
    def cosine(self) -> float:
        return self.inner / max((self.base_length * self.final_length) ** 0.5, 1e-300)


def scale_adapter(model: nn.Module, alpha: float, *, base_rows: Mapping[str, int] | None = None) -> PointReport:
    """Move a PEFT LoRA adapter towards its base model in place: the update B A of every layer is multiplied by `alpha`.

    Modules that were trained completely beside the adapter (`modules_to_save`) start from the copy of the original that PEFT keeps. Running
    statistics of the base model do not change, because an adapter is saved without them.

    Args:
        base_rows (`Mapping[str, int]`, *optional*): For parameters of the base model, by its own names: the number of leading rows that
            come from the base; 0 for those that the base lacks, such as a new head, which starts from 0.

    Raises:
        ValueError: If `alpha` is out of range, or if this kind of adapter cannot be scaled by a factor.
    """
    _check_alpha(alpha)
    base_rows = base_rows or {}
    named = dict(model.named_parameters())
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    scaled = check_scalable(model)
    start: dict[str, list[str]] = {"from_base": [], "from_zero": list(scaled), "kept": []}
    some_rows: dict[str, int] = {}
    with torch.no_grad():
        for name in scaled:
            named[name].mul_(alpha)
        for name, parameter in named.items():
            if ".modules_to_save." not in name:
                continue
            before, _, after = name.partition(".modules_to_save.")
            inside = after.partition(".")[2]
            original = named.get(f"{before}.original_module.{inside}")
            plain = re.sub(r"^base_model\.(model\.)?", "", f"{before}.{inside}")
            rows = base_rows.get(plain, len(parameter) if parameter.ndim else 1)
            if original is not None and original.shape == parameter.shape and rows:
                if parameter.ndim and rows < len(parameter):
                    some_rows[name] = rows
                part = parameter[:rows] if parameter.ndim else parameter
                part.copy_(_lerp(original[:rows] if parameter.ndim else original, part, alpha))
                start["from_base"].append(name)
            elif isinstance(owners[id(parameter)], nn.Embedding) or _is_norm(owners[id(parameter)]):
                start["kept"].append(name)
            else:
                parameter.mul_(alpha)
                start["from_zero"].append(name)
    buffers = dict(model.named_buffers())
    measured = []
    for name, module in running_norms(model).items():
        if ".modules_to_save." in f".{name}.":
            where, _, after = name.partition(".modules_to_save.")
            origin = ".".join(part for part in (f"{where}.original_module", after.partition(".")[2]) if part)
            ends = zip(_statistics_of(origin, module), _statistics_of(name, module).values(), strict=True)
            if not all(_is_same(buffers.get(key), value) for key, value in ends):
                measured.append(name)
    start["measured"] = measured
    return replace(PointReport(**{kind: tuple(names) for kind, names in start.items()}), rows=some_rows)  # type: ignore[arg-type]


def running_norms(model: nn.Module) -> dict[str, _NormBase]:
    """Return the modules that use running statistics in eval mode, by name: BatchNorm of every kind, and InstanceNorm with
    running statistics."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None and ".original_module" not in f".{name}"
    }


def _statistics_of(name: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{kind}": getattr(module, kind) for kind in ("running_mean", "running_var")}


def statistics_rows(n_rows: int) -> list[list[int]]:
    """Return the training rows on which running statistics are measured, in batches: a fixed random draw, equal on every machine.

    The draw is random because evenly spaced rows of a sorted or alternating training set can have few classes.
    """
    order = random_bits(stream_key(0, "statistics"), torch.arange(n_rows)).argsort()[:STATISTICS_ROWS]
    return [part.tolist() for part in order.tensor_split(-(-len(order) // STATISTICS_BATCH))]  # no batch of one row


@torch.no_grad()
def measure_statistics(
    model: nn.Module, names: Sequence[str], batches: Iterable[Any], forward: Callable[[Any], Any]
) -> dict[str, Tensor]:
    """Replace running statistics by those of some batches with the model's weights, in place, and return them by name.

    The result is the mean over batches of each batch's mean and unbiased variance, as with `momentum=None`. Meanwhile these modules normalise
    by their batch, and dropout is off. Processes do not exchange statistics.

    Args:
        names (`Sequence[str]`): Names of the modules.
        forward (`Callable`): Runs the model on a batch.

    Raises:
        ValueError: If a batch has one value per channel, or a statistic is not finite.
    """
    norms: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    with _normalising_by_batch(list(norms.values())) as sums:
        for batch in batches:
            forward(batch)
    norm: Any
    for norm in sums:
        norm.running_mean.copy_(sums[norm].mean / sums[norm].calls)
        norm.running_var.copy_(sums[norm].variance / sums[norm].calls)
    if unseen := [name for name, norm in norms.items() if norm not in sums]:
        logger.warning(
            "%d modules, such as %s, saw none of the training rows that running statistics are measured on, so that theirs stay on the line "
            "between base and final model.",
            len(unseen),
            unseen[0],
        )
    found = {key: value.clone() for name, norm in norms.items() for key, value in _statistics_of(name, norm).items()}
    if bad := [key for key, value in found.items() if not bool(value.isfinite().all())]:
        raise ValueError(
            f"At this point of the path, {bad[0]} is not finite when it is measured on training rows: the activations overflow there. "
            "Give another `alpha`."
        )
    return found


def set_statistics(model: nn.Module, names: Sequence[str], statistics: Mapping[str, Tensor]) -> None:
    """Set the running statistics of a point to those that [`measure_statistics`] returned.

    Raises:
        ValueError: If they belong to other modules.
    """
    places = {key: value for name in names for key, value in _statistics_of(name, model.get_submodule(name)).items()}
    shapes, given = ({key: tuple(value.shape) for key, value in some.items()} for some in (places, statistics))
    if shapes != given:
        other = sorted(set(shapes.items()) ^ set(given.items()))[0][0]
        raise ValueError(
            f"These running statistics do not belong to this point: {other} is {given.get(other, 'missing')} among them and "
            f"{shapes.get(other, 'missing')} in the model. Use those that were measured for it."
        )
    for key, place in places.items():
        place.copy_(statistics[key])


@dataclass
class _Sum:
    """Sum of a module's statistics over its calls, in float64."""

    mean: Any = 0.0
    variance: Any = 0.0
    calls: int = 0


@contextmanager
def _normalising_by_batch(norms: Sequence[Any]) -> Iterator[dict[nn.Module, _Sum]]:
    """Let modules normalise by the statistics of their inputs, and sum these statistics.

    BatchNorm stays in eval mode and gets the statistics of its batch as running statistics, because in training mode SyncBatchNorm would wait
    for other processes. InstanceNorm has statistics per example and is put into training mode.
    """
    sums: dict[nn.Module, _Sum] = {}
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(setattr, norm, "training", norm.training)
            norm.training = not isinstance(norm, _BatchNorm)
            stack.callback(norm.register_forward_pre_hook(partial(_before, sums), with_kwargs=True).remove)
        yield sums


def _before(sums: dict[nn.Module, _Sum], norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compute the statistics of a module's input before its forward pass."""
    inputs = args[0] if args else next(iter(kwargs.values()))
    by_batch = isinstance(norm, _BatchNorm)
    batch = (inputs if by_batch or inputs.ndim > norm._get_no_batch_dim() else inputs.unsqueeze(0)).double()
    places = tuple(range(2, batch.ndim)) if not by_batch else (0, *range(2, batch.ndim))
    if (count := math.prod(batch.shape[place] for place in places)) < 2:
        raise ValueError(
            f"The running statistics of {type(norm).__name__} are measured on training rows at the point of the path, and a batch of them has "
            f"one value per channel, which has no variance: its shape is {tuple(inputs.shape)}. Give more training rows, or no `base`."
        )
    variance, mean = torch.var_mean(batch, dim=places)
    if by_batch:
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance * (count - 1) / count)
    else:
        variance, mean = variance.mean(0), mean.mean(0)
    total = sums.setdefault(norm, _Sum())
    total.mean, total.variance, total.calls = total.mean + mean, total.variance + variance, total.calls + 1


def _is_same(found: Tensor | None, value: Tensor) -> bool:
    return found is not None and torch.equal(found.to(value), value)


def check_scalable(model: nn.Module) -> list[str]:
    """Return the names of an adapter's parameters that are scaled to move it towards the base model.

    Raises:
        ValueError: If the adapter cannot be scaled; the message says why.
    """
    named = dict(model.named_parameters())
    scaled = [name for name in named if ".lora_B." in name or ".lora_embedding_B" in name]
    others = [name for name in named if any(part in name for part in _OTHER_KINDS)]
    if not scaled or others:
        what = f"{others[0]}" if others else "no LoRA matrices"
        raise ValueError(f"Points of a path are supported for LoRA adapters only, but this adapter has {what}.")
    whole = [
        name
        for name, parameter in named.items()
        if parameter.requires_grad and ".lora_" not in name and ".modules_to_save." not in name
    ]
    if whole:
        raise ValueError(
            f"Points of a path are supported for LoRA matrices and modules_to_save only, but this adapter also trains {whole[0]} in the "
            "base model itself, whose initial value is unknown."
        )
    for config in getattr(model, "peft_config", {}).values():
        kind = getattr(config, "init_lora_weights", True)
        if kind not in _PLAIN_STARTS:
            raise ValueError(
                f"This adapter began with init_lora_weights={kind!r}, which changes the weights of the base model, so that a factor does "
                "not lead to it. Merge the adapter into the model (`merge_and_unload`), and give the base model as `base`."
            )
    return scaled


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must lie between 0 (the base) and 1 (the final weights), but is {alpha:g}.")


def _tokens(model: nn.Module, base: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the number of rows of the input embedding in the final model and in the base; zeros if unknown."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except NotImplementedError:  # image models, and others without tokens
        embedding = None
    weight = getattr(embedding, "weight", None)
    name = next((name for name, parameter in model.named_parameters() if parameter is weight), None)
    if not isinstance(embedding, nn.Embedding) or name is None or name not in base:
        return 0, 0
    return len(embedding.weight), len(base[name])


def _shared_rows(final: Tensor, base: Tensor, tokens: tuple[int, int]) -> int:
    """Return the number of leading rows that two parameters share: all, or those of the smaller vocabulary; 0 if shapes do not fit."""
    if final.ndim == 0 or final.ndim != base.ndim or final.shape[1:] != base.shape[1:]:
        return 0
    return min(len(final), len(base)) if len(final) == len(base) or (len(final), len(base)) == tokens else 0


def _lerp(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """Interpolate in float64, so that half-precision weights are rounded once."""
    return torch.lerp(start.detach().to(end.device, torch.float64), end.detach().double(), alpha).to(end.dtype)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
