"""`AttributionArguments`: a Trainer's arguments, and what to attribute with."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from transformers import TrainingArguments

from hf_trak.feature_args import FeatureArguments
from hf_trak.members import Members


@dataclass
class AttributionArguments(FeatureArguments, TrainingArguments):
    """Arguments of an [`AttributionTrainer`]: all of `TrainingArguments`, those of features, and which members to keep."""

    members: str = field(
        default="final",
        metadata={
            "help": "Checkpoints to attribute with: 'final'; 'epoch:K', those of the last K epochs; 'steps:[100,200]', those after "
            "these steps; 'path:K', those after 1/4, 1/8, ... of the steps, early ones of the path; 'runs:M', the final ones of M independent runs; 'subsets:M', those of M runs on random subsets of the "
            "rows, beside the run on all of them. Subsets are the best per unit of compute, and let damping='auto' be chosen by them."
        },
    )
    subset_alpha: float = field(default=0.5, metadata={"help": "Share of the rows that each of the runs of 'subsets:M' sees."})

    def __post_init__(self) -> None:
        self.parsed_members()
        self._read_numbers()
        if not 0 < self.subset_alpha < 1:
            raise ValueError(f"`subset_alpha` must lie between 0 and 1, but is {self.subset_alpha}.")
        self.member_counts()
        self.trak_config()
        self.alpha = [self.alpha] if isinstance(self.alpha, (int, float)) else self.alpha
        self.base = None if self.base is None else str(self.base)
        self.path()
        super().__post_init__()

    def parsed_members(self) -> Members:
        """Return what `members` means.

        Raises:
            ValueError: If it means nothing.
        """
        return Members.parse(self.members)

    def _read_numbers(self) -> None:
        """Take numbers written as strings: YAML 1.1 reads 1e-4 as one."""
        for argument in fields(self):
            value = getattr(self, argument.name)
            if argument.type in ("float", float) and isinstance(value, str):
                setattr(self, argument.name, float(value))
