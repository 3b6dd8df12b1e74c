"""Which engine makes the gradients of a run: decided once, from the model and the first rows of its data set."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_trak.gradients import (
    CallPlan,
    CheckFailed,
    Collate,
    OutputFunction,
    TooFewExamples,
    check_gradients,
    evaluation_mode,
    loop_features,
)
from hf_trak.projectors import Projector

if TYPE_CHECKING:
    from datasets import Dataset

_LOOKED_AT = 64  # rows at the beginning, and as many over the whole data set


@dataclass(frozen=True)
class EngineChoice:
    """An engine, and why it was taken.

    Args:
        name (`str`): layerwise, functional or loop.
        reason (`str`, *optional*): What the check of `layerwise` found, if "auto" goes by `loop` for that.
    """

    name: str
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def rows_to_check(dataset: Dataset, lengths: Callable[[Dataset], Sequence[int] | None]) -> list[int]:
    """Return two or three rows of a data set: a longer one, the shortest, and one of another length, or the first where all are alike.

    They are a function of the data set alone, so that every process of a run finds the same.
    """
    n_rows = len(dataset)
    step = max(1, n_rows // _LOOKED_AT)
    candidates = sorted({*range(min(n_rows, _LOOKED_AT)), *range(0, n_rows, step)})
    found = lengths(dataset.select(candidates)) if n_rows > 1 else None
    if found is None:
        return list(range(min(3, n_rows)))
    order = sorted(range(len(candidates)), key=lambda place: (found[place], place))
    shortest = order[0]
    # Twice as long shows what padding does; the longest of all would cost more.
    longer = next((place for place in order if found[place] >= 2 * found[shortest]), order[-1])
    others = [place for place in order if place not in (shortest, longer)]
    between = next(
        (place for place in others if found[shortest] < found[place] < found[longer]), others[-1] if others else None
    )
    return [candidates[place] for place in (longer, shortest, between) if place is not None]


def decide(
    model: nn.Module,
    collate: Collate,
    n_examples: int,
    *,
    setting: str,
    output_function: OutputFunction,
    parameters: Mapping[str, nn.Parameter],
) -> tuple[EngineChoice, CallPlan | None]:
    """Check the engine of a setting, or, for "auto", take `layerwise` where the check passes and `loop` where it does not.

    Args:
        setting (`str`): auto, layerwise, functional or loop.

    Raises:
        CheckFailed: If the engine that the setting names is not right for the model.
        TooFewExamples: If there is one example, which shows nothing.
    """
    if setting == "loop":
        return EngineChoice("loop"), None
    name = "layerwise" if setting == "auto" else setting
    try:
        plan = check_gradients(
            model,
            collate,
            n_examples,
            output_function=output_function,
            parameters=parameters,
            engine=name,  # type: ignore[arg-type]
        )
    except (TooFewExamples, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever an engine meets in a model that it cannot serve
        if setting == "auto":
            return EngineChoice("loop", reason=_first_sentence(error)), None
        if isinstance(error, CheckFailed):
            raise
        raise CheckFailed(
            f"gradients={setting!r} cannot serve {type(model).__name__}: {error} Use gradients='loop', which serves any model, or 'auto', "
            "which takes it where it must."
        ) from error
    return EngineChoice(name), plan


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if not isinstance(error, ValueError) else text.split(". ")[0].rstrip(".")


def cost_of_loop(
    model: nn.Module,
    collate: Collate,
    n_examples: int,
    *,
    output_function: OutputFunction,
    parameters: Mapping[str, nn.Parameter],
    projector: Projector,
) -> float:
    """Measure the loop over some examples, as a multiple of a plain forward and backward pass over all of them together."""
    alone = [collate([number]) for number in range(n_examples)]
    batches = [collate(range(n_examples))]
    try:
        with evaluation_mode(model), torch.no_grad():
            output_function(model, batches[0])
    except ValueError:  # rows that cannot share a batch are passed alone
        batches = alone

    def plain() -> None:
        with evaluation_mode(model), torch.enable_grad():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            for batch in batches:
                output = output_function(model, batch)[0].sum()
                if output.requires_grad:
                    torch.autograd.grad(output, list(parameters.values()), allow_unused=True)

    def loop() -> None:
        loop_features(model, alone, output_function=output_function, parameters=parameters, projector=projector)

    return _seconds(loop) / _seconds(plain)


def _seconds(run: Callable[[], None]) -> float:
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
