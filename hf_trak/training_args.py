"""`AttributionArguments`: a Trainer's arguments, and what to attribute with."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from hf_trak.feature_args import FeatureArguments
from hf_trak.members import Ensemble


@dataclass
class AttributionFields(FeatureArguments):
    """What an attribution adds to a Trainer's arguments: what features are made of, and which members to keep."""

    members: str = field(
        default="final",
        metadata={
            "help": "Checkpoints to attribute with: 'final'; 'epoch:K', those of the last K epochs; 'steps:[100,200]', those after "
            "these steps; 'path:K', those after 1/4, 1/8, ... of the steps, early ones of the path; 'runs:M', the final ones of M independent runs; 'subsets:M', those of M runs on random subsets of the "
            "rows, beside the run on all of them. Subsets are the best per unit of compute, and let damping='auto' be chosen by them."
        },
    )
    subset_alpha: float = field(default=0.5, metadata={"help": "Share of the rows that each of the runs of 'subsets:M' sees."})
    keep_optimizer: bool = field(
        default=False,
        metadata={
            "help": "Keep the optimizer's state with each snapshot of a single run, for index.select(method='less'). Of Adam, it is twice as "
            "large as the trained weights."
        },
    )

    n_rows: int | None = field(
        default=None,
        metadata={
            "help": "Of a streaming training set, attribute to its first rows, this many. By default, to all rows that training reads."
        },
    )

    def check_attribution(self) -> None:
        """Check the values, and bring them into one form.

        Raises:
            ValueError: If one is impossible.
        """
        self.alpha = [self.alpha] if isinstance(self.alpha, (int, float)) else self.alpha
        self.base = None if self.base is None else str(self.base)
        members = self.ensemble().members
        if self.keep_optimizer and not members.is_single_run:
            raise ValueError(
                f"`keep_optimizer` is for the snapshots of a single run, but members={self.members!r} are of several. Leave it out."
            )
        if not 0 < self.subset_alpha < 1:
            raise ValueError(f"`subset_alpha` must lie between 0 and 1, but is {self.subset_alpha}.")
        self.trak_config()

    def ensemble(self, models: Any = (), **given: Any) -> Ensemble:
        """Return what members are made of, and which weights of its runs training keeps for them.

        Raises:
            ValueError: If `members` means nothing, a count or `alpha` is out of range, or there is no base.
        """
        return super().ensemble(models, kept=self.members, **given)


@dataclass
class AttributionArguments(AttributionFields, TrainingArguments):
    """Arguments of an [`AttributionTrainer`]: all of `TrainingArguments`, the fields of [`TrakConfig`], and which members to keep.

    ```python
    >>> args = AttributionArguments("out", num_train_epochs=3, members="epoch:3", proj_dim=64)
    >>> args.trak_config().proj_dim
    64
    ```

    `TrainingArguments` that exist already, or those of another Trainer such as TRL's `SFTConfig`, are taken over by
    [`~AttributionArguments.from_training_arguments`].
    """

    def __post_init__(self) -> None:
        self._read_numbers()
        self.check_attribution()
        super().__post_init__()

    @staticmethod
    def from_training_arguments(args: TrainingArguments, **options: Any) -> AttributionFields:
        """Return arguments with all values of `args`, which stay as they are, and with the fields of an attribution.

        ```python
        >>> args = AttributionArguments.from_training_arguments(TrainingArguments("out"), members="epoch:2")
        >>> args.members
        'epoch:2'
        ```

        Args:
            args (`TrainingArguments`): Of any Trainer. A field that it shares with an attribution, such as the `max_length` of TRL's
                `SFTConfig`, is one field with the value that it has.
            options: Fields of an attribution.

        Returns:
            An instance of the class of `args` and of `AttributionFields`; of [`AttributionArguments`] for plain `TrainingArguments`.

        Raises:
            ValueError: If an option is no field of an attribution, or has an impossible value.
        """
        known = {one.name for one in fields(AttributionFields)}
        if unknown := sorted(set(options) - known):
            raise ValueError(
                f"These are no fields of an attribution: {', '.join(unknown)}. Known are {', '.join(sorted(known))}."
            )
        found = copy.copy(args) if isinstance(args, AttributionFields) else _restore(type(args), dict(args.__dict__))
        for name, value in options.items():
            setattr(found, name, value)
        found.check_attribution()
        return found

    def _read_numbers(self) -> None:
        """Take numbers written as strings: YAML 1.1 reads 1e-4 as one."""
        for argument in fields(self):
            value = getattr(self, argument.name)
            if argument.type in ("float", float) and isinstance(value, str):
                setattr(self, argument.name, float(value))


@functools.cache
def _combined(kind: Any) -> type[AttributionFields]:
    """Return a class that is both `kind` and [`AttributionFields`]."""
    if kind is TrainingArguments:
        return AttributionArguments

    def reduce(self: Any) -> Any:  # the class has no name to be imported by
        return _restore, (kind, dict(self.__dict__))

    made = type(f"Attribution{kind.__name__}", (AttributionFields, kind), {"__reduce__": reduce, "__doc__": kind.__doc__})
    return dataclass(made)


def _restore(kind: Any, state: dict[str, Any]) -> AttributionFields:
    """Return arguments of `kind` and of an attribution with the given attributes, and defaults for what they lack."""
    combined = _combined(kind)
    found = object.__new__(combined)
    defaults = {one.name: one.default for one in fields(AttributionFields)}
    found.__dict__.update({**defaults, **state})
    return found
