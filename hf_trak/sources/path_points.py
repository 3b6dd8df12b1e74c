r"""Points on the straight line from a base checkpoint to a final one, made in memory: $\theta = \theta_0 + \alpha(\theta_1 - \theta_0)$.

A parameter that the base lacks, such as a new head, starts from its initial value where that is known and from 0 otherwise. A
normalisation layer or an embedding that the base lacks keeps its final value, because neither does anything sensible near 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_LEAST_SHARED = 0.5  # of the parameters outside embeddings; a base that shares fewer is another model's


@dataclass(frozen=True)
class PointReport:
    """What was done to make a point: names of parameters by where their line starts.

    Args:
        from_base (`tuple[str, ...]`): From the base's value.
        from_initial (`tuple[str, ...]`): From a given initial value.
        from_zero (`tuple[str, ...]`): From 0, as new heads are.
        kept (`tuple[str, ...]`): At the final value.
        distance (`float`): $\\|\theta_1 - \theta_0\\| / \\|\theta_0\\|$ over the parameters that start from the base.
    """

    from_base: tuple[str, ...] = field(default_factory=tuple)
    from_initial: tuple[str, ...] = field(default_factory=tuple)
    from_zero: tuple[str, ...] = field(default_factory=tuple)
    kept: tuple[str, ...] = field(default_factory=tuple)
    distance: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return what an index records: counts, and the names of all that does not start from the base."""
        return {
            "from_base": len(self.from_base),
            "from_initial": list(self.from_initial),
            "from_zero": list(self.from_zero),
            "kept": list(self.kept),
            "distance": round(self.distance, 6),
        }


def move_to_point(
    model: nn.Module, base: Mapping[str, Tensor], alpha: float, *, initial: Mapping[str, Tensor] | None = None
) -> PointReport:
    r"""Replace a final model's weights by those of the point `alpha` of the line from `base`, in place.

    Args:
        model (`nn.Module`): Has the final weights.
        base (`Mapping[str, Tensor]`): The base's weights and buffers by the model's names for them. Names may be missing. An embedding,
            or a layer over the vocabulary, may have another number of rows: rows that both have are moved, the others kept.
        alpha (`float`): 0 is the base, 1 the final model.
        initial (`Mapping[str, Tensor]`, *optional*): Initial values of parameters that the base lacks.

    Raises:
        ValueError: If `alpha` is out of range, the base shares too few parameters with the model, or it equals the final model.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must lie between 0 (the base) and 1 (the final weights), but is {alpha:g}.")
    initial = initial or {}
    owners = {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}
    start: dict[str, list[str]] = {"from_base": [], "from_initial": [], "from_zero": [], "kept": []}
    moved, length, shared, total = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_embedding = isinstance(owners[id(parameter)], nn.Embedding)
            total += 0 if is_embedding else parameter.numel()
            found = base.get(name)
            if found is not None and (rows := _shared_rows(parameter, found)):
                difference = (parameter[:rows] - found[:rows].to(parameter)).double()
                moved, length = moved + difference.square().sum().item(), length + found[:rows].double().square().sum().item()
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
        if moved == 0:
            raise ValueError(
                "The base has the weights of the final model, so there is no path between them. Give another `base`."
            )
        for name, buffer in model.named_buffers():
            found = base.get(name)
            if found is not None and found.shape == buffer.shape and buffer.is_floating_point():
                buffer.copy_(_lerp(found, buffer, alpha))
    return PointReport(**{kind: tuple(names) for kind, names in start.items()}, distance=(moved / max(length, 1e-300)) ** 0.5)


def scale_adapter(model: nn.Module, alpha: float) -> PointReport:
    """Move a PEFT LoRA adapter towards its base model in place: the update B A of every layer is multiplied by `alpha`.

    Modules that were trained whole beside the adapter (`modules_to_save`) start from the copy of the original that PEFT keeps.

    Raises:
        ValueError: If `alpha` is out of range, or the adapter is of a kind that a factor does not scale.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must lie between 0 (the base) and 1 (the final weights), but is {alpha:g}.")
    named = dict(model.named_parameters())
    scaled = [name for name in named if ".lora_B." in name or ".lora_embedding_B" in name]
    others = [
        name
        for name in named
        if any(part in name for part in (".lora_magnitude_vector", ".ia3_", ".prompt_encoder", ".vera_", ".hada_", ".lokr_"))
    ]
    if not scaled or others:
        what = f"{others[0]}" if others else "no LoRA matrices"
        raise ValueError(f"A path from the base model is known for LoRA adapters alone, but this adapter has {what}.")
    start: dict[str, list[str]] = {"from_base": [], "from_zero": []}
    with torch.no_grad():
        for name in scaled:
            named[name].mul_(alpha)
            start["from_zero"].append(name)
        for name, parameter in named.items():
            if ".modules_to_save." in name:
                before, _, after = name.partition(".modules_to_save.")
                original = named.get(f"{before}.original_module.{after.partition('.')[2]}")
                if original is not None and original.shape == parameter.shape:
                    parameter.copy_(_lerp(original, parameter, alpha))
                    start["from_base"].append(name)
    return PointReport(from_base=tuple(start["from_base"]), from_zero=tuple(start["from_zero"]))


def _shared_rows(final: Tensor, base: Tensor) -> int:
    """Return how many leading rows of two parameters lie on one line: all, or those of the smaller vocabulary; 0 if none do."""
    if final.shape == base.shape:
        return max(1, len(final)) if final.ndim else 0
    if final.ndim == 2 and base.ndim == 2 and final.shape[1] == base.shape[1] and min(len(final), len(base)) > 1000:
        return min(len(final), len(base))
    return 0


def _lerp(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """Interpolate in float64, so that half-precision weights are rounded once."""
    return torch.lerp(start.detach().to(end.device, torch.float64), end.detach().double(), alpha).to(end.dtype)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
