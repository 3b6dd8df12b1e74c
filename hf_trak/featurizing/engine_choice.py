"""The gradient engine of a run: chosen on the first rows, checked and recorded."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_trak.featurizing.batching import read_rows, to_device
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
from hf_trak.tasks.padding import PACKING_COLUMNS, check_documents, is_packed, packed_positions
from hf_trak.tasks.rows import is_transformed
from hf_trak.tasks.token_inputs import TokenInputs
from hf_trak.tasks.token_outputs import IGNORED, SpanOutput, TokenOutput

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_trak.featurizing.featurizer import Featurizer


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


logger = logging.getLogger(__name__)

_ROWS = 8  # among which one with a scored token is looked for
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # relative; of a mean over tokens


def check_first_rows(featurizer: Featurizer, dataset: Dataset) -> str | None:
    """Check a language model on one row of a data set; return a line on its own loss if that is not the one that attribution assumes.

    Raises:
        ValueError: If rows are packed and the model does not keep documents apart.
    """
    if not isinstance(featurizer.task.inputs, TokenInputs):
        return None
    packed = next(_packed_rows(dataset), None)
    if packed is not None:
        check_documents(featurizer.model, to_device(featurizer.collate(read_rows(dataset, [packed])), featurizer.device))
    for row in range(min(_ROWS, len(dataset))):
        batch = to_device(featurizer.collate(read_rows(dataset, [row])), featurizer.device)
        found = compare_losses(featurizer.model, featurizer.task.output_function, batch)
        if found is not None:
            own, assumed = found
            tolerance = _TOLERANCE.get(next(featurizer.model.parameters()).dtype, 3e-2)
            if abs(own - assumed) <= tolerance * max(1.0, abs(assumed)):
                return None
            return (
                f"The loss that {type(featurizer.model).__name__} itself computes for row {row} is {own:.6g}, but the mean of −log p over the "
                f"scored tokens is {assumed:.6g}, which attribution takes for the loss. The model adds something to it, such as the "
                "load-balancing loss of a mixture of experts (`output_router_logits`), or weighs or shifts tokens in another way. If it was "
                "trained with its own loss, state that as `task=Task.custom(...)`: docs/guides/custom_tasks.md."
            )
    return None


@torch.no_grad()
def compare_losses(model: nn.Module, output_function: Any, batch: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return a model's own loss of a batch, and the mean of −log p over its scored tokens; None where there is no such loss or token.

    Args:
        output_function (`Callable`): The task's, which knows how labels belong to logits.
    """
    accepted = inspect.signature(model.forward).parameters
    spans = isinstance(output_function, SpanOutput)
    names = ("start_positions", "end_positions") if spans else ("labels",)
    if not isinstance(output_function, (TokenOutput, SpanOutput)) or not set(names) <= set(accepted) or set(names) - set(batch):
        return None
    pairs = _scored_labels(output_function, batch, names)
    if not all(bool((labels != IGNORED).any()) for labels in pairs):
        return None
    try:
        with evaluation_mode(model), _without_advice():
            result = model(**batch)
    except Exception as error:  # whatever the model's code raises; features need no loss of its own
        logger.info("%s computes no loss of its own to compare with: %s", type(model).__name__, error)
        return None
    if not isinstance(own := getattr(result, "loss", None), Tensor) or own.numel() != 1:
        return None
    n_prompt = getattr(output_function, "n_virtual_tokens", 0)  # of a learned prompt, whose logits have no labels
    logits = [result.start_logits, result.end_logits] if spans else [result.logits[:, n_prompt:]]
    losses = [
        F.cross_entropy(values.double().flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        for values, labels in zip(logits, pairs, strict=True)
    ]
    return float(own), float(torch.stack(losses).mean())


@contextmanager
def _without_advice() -> Iterator[None]:
    """Hush what transformers says of choosing a loss: which one it is shows in the number."""
    theirs = logging.getLogger("transformers.modeling_utils")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


def _scored_labels(output_function: TokenOutput | SpanOutput, batch: Mapping[str, Any], names: Sequence[str]) -> list[Tensor]:
    if isinstance(output_function, SpanOutput):
        return [batch[name] for name in names]
    labels = batch["labels"]
    if output_function.shifted:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
    return [labels]


def _packed_rows(dataset: Dataset) -> Iterator[int]:
    """Yield the rows of several documents; of a dataset with a transform, none, since each is looked at when it is read."""
    names = [name for name in (*PACKING_COLUMNS, "position_ids") if name in dataset.column_names]
    if not names or "input_ids" not in dataset.column_names or is_transformed(dataset):
        return
    for number, row in enumerate(dataset.select_columns(["input_ids", *names])):
        columns = {name: row[name] for name in names if row[name] is not None}
        if columns and is_packed(packed_positions(columns, len(row["input_ids"]))):
            yield number
