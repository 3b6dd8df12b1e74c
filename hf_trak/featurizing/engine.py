"""`Gradients`: the features of batches by the engine that is right for a model, decided on some rows and looked after on every batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from hf_trak.featurizing.batching import count_rows, has_padding, part_of, to_device
from hf_trak.featurizing.devices import in_bfloat16
from hf_trak.featurizing.engine_choice import EngineChoice, cost_of_loop, decide
from hf_trak.gradients import (
    BatchFeatures,
    CallPlan,
    TooFewExamples,
    dropout_mask,
    functional_features,
    layerwise_features,
    loop_features,
)
from hf_trak.projectors import Projector
from hf_trak.tasks import vmappable_attention
from hf_trak.tasks.padding import check_documents
from hf_trak.tasks.token_inputs import TokenInputs

if TYPE_CHECKING:
    from hf_trak.featurizing.featurizer import Featurizer

_CHECKED_ROWS = 3


class Gradients:
    """Makes the features of batches for a [`Featurizer`], which hands itself to every call: a model is freed with its featurizer.

    Attributes:
        engine ([`EngineChoice`], *optional*): None until it is decided.
    """

    def __init__(self) -> None:
        self.engine: EngineChoice | None = None
        self._plan: CallPlan | None = None
        self._saw_padding = False  # in the rows of the check
        self._documents_checked = False

    @property
    def is_loop(self) -> bool:
        """Whether examples go one by one."""
        return self.engine is not None and self.engine.name == "loop"

    def use(self, engine: EngineChoice) -> None:
        """Go on with the engine that others of a run have decided on."""
        if self.engine is None or self.engine.name != engine.name:
            self._plan = None
        self.engine = engine

    def decide(self, featurizer: Featurizer, batch: Mapping[str, Any], numbers: Sequence[int]) -> None:
        """Check the engine on some rows of a batch, the longest first; leave it open if there is one row."""
        featurizer.checkpoint.check_statistics()
        task, selection, projector, _ = featurizer.prepare()
        arguments: dict[str, Any] = {"output_function": task.output_function, "parameters": selection.parameters}

        def collate(chosen: Sequence[int]) -> Mapping[str, Any]:
            return to_device(part_of(batch, [numbers[place] for place in chosen]), featurizer.device)

        setting = featurizer.config.gradients
        # Not under autocast, whose round-off would hide what is looked for.
        with (
            featurizer.naming_columns(batch),
            dropout_mask(featurizer.model, featurizer.dropout_seed),
            self._attention(featurizer, setting),
        ):
            try:
                engine, plan = decide(featurizer.model, collate, len(numbers), setting=setting, **arguments)
            except TooFewExamples:
                return
            if engine.name == "loop" and setting == "auto":
                cost = cost_of_loop(featurizer.model, collate, len(numbers), projector=projector, **arguments)
                featurizer.say(
                    f"gradients='loop', one example at a time, since `layerwise` does not serve this model: {engine.reason}. "
                    f"Expect {cost:.1f} times the time of a plain forward and backward pass over batches, as measured on "
                    f"{len(numbers)} rows."
                )
            # Not before: rows that the loop cannot compute either say nothing of the engine.
            self.engine, self._plan = engine, plan
            self._saw_padding = has_padding(collate(range(len(numbers))))

    def _attention(self, featurizer: Featurizer, engine: str) -> AbstractContextManager[Any]:
        return vmappable_attention(featurizer.model) if engine == "functional" else nullcontext()

    def of(self, featurizer: Featurizer, batch: Mapping[str, Any], projector: Projector) -> BatchFeatures:
        """Return the features of a batch, on the device; `projector` may be another than the featurizer's."""
        n_rows = count_rows(batch)
        if not self._documents_checked and isinstance(featurizer.task.inputs, TokenInputs):
            self._documents_checked = check_documents(featurizer.model, to_device(batch, featurizer.device))
        if self.engine is None:
            self.decide(featurizer, batch, _longest_first(batch, n_rows))
        elif self.engine.name == "layerwise" and self._plan is None and n_rows > 1:
            self._recheck(featurizer, batch, n_rows)
        name = self.engine.name if self.engine is not None else "loop"
        # What the check has not seen goes one row at a time: it is right, and decided by the batch alone.
        if name == "loop" or n_rows == 1 or (has_padding(batch) and not self._saw_padding):
            return self.by_loop(featurizer, batch, projector, range(n_rows))
        engine: Callable[..., BatchFeatures] = functional_features
        arguments = self._arguments(featurizer, projector, vmapped=name == "functional")
        if name == "layerwise":
            engine, arguments["plan"] = layerwise_features, self._plan
        try:
            with self._attention(featurizer, name):
                return engine(featurizer.model, to_device(batch, featurizer.device), **arguments)
        except Exception as error:
            if isinstance(error, MemoryError) or should_reduce_batch_size(error):
                raise
            # A batch's composition must not decide whether a run succeeds. What is wrong with the rows themselves is raised again.
            features = self.by_loop(featurizer, batch, projector, range(n_rows))
            featurizer.say(f"Some batches are computed one row at a time, since `{name}` does not serve them: {error}")
            return features

    def _recheck(self, featurizer: Featurizer, batch: Mapping[str, Any], n_rows: int) -> None:
        """Learn how the model calls its modules, for an engine that others have decided on."""
        recorded = self.engine
        self.engine = None
        self.decide(featurizer, batch, _longest_first(batch, n_rows))
        if self.engine is None:
            self.engine = recorded

    def by_loop(
        self, featurizer: Featurizer, batch: Mapping[str, Any], projector: Projector, numbers: Sequence[int]
    ) -> BatchFeatures:
        """Return the features of some rows of a batch, one example at a time and without padding."""
        rows = [to_device(part_of(batch, [number]), featurizer.device) for number in numbers]
        return loop_features(featurizer.model, rows, **self._arguments(featurizer, projector))

    def _arguments(self, featurizer: Featurizer, projector: Projector, *, vmapped: bool = False) -> dict[str, Any]:
        task, selection, _, _ = featurizer.prepare()
        output_function = task.output_function
        if featurizer.config.compute_dtype == "bfloat16":
            output_function = in_bfloat16(output_function, device_type=featurizer.device.type, vmapped=vmapped)
        return {"parameters": selection.parameters, "projector": projector, "output_function": output_function}


def _longest_first(batch: Mapping[str, Any], n_rows: int) -> list[int]:
    """Return some rows of a batch: the longest, the shortest, and one of another length."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return list(range(min(_CHECKED_ROWS, n_rows)))
    lengths = mask.ne(0).sum(1).tolist()
    order = sorted(range(n_rows), key=lambda row: (-lengths[row], row))
    between = [row for row in order[1:-1] if lengths[order[-1]] < lengths[row] < lengths[order[0]]]
    return list(dict.fromkeys([order[0], order[-1], *between[:1], *order[1:-1]]))[:_CHECKED_ROWS]
