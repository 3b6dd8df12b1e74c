"""`AttributionArguments`: a Trainer's arguments, and what to attribute with."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_trak.feature_args import FeatureArguments


@dataclass
class AttributionArguments(FeatureArguments, TrainingArguments):
    """Arguments of an [`AttributionTrainer`]: all of `TrainingArguments`, those of features, and which members to keep."""

    members: str = field(
        default="final",
        metadata={"help": "Checkpoints to attribute with: 'final', or 'epoch:K' for those of the last K epochs of the run."},
    )

    def __post_init__(self) -> None:
        self.n_epoch_members()
        self.trak_config()
        super().__post_init__()

    def n_epoch_members(self) -> int | None:
        """Return K of `members="epoch:K"`, None for "final".

        Raises:
            ValueError: If `members` is neither.
        """
        if self.members == "final":
            return None
        if match := re.fullmatch(r"epoch:([1-9]\d*)", self.members):
            return int(match[1])
        raise ValueError(f"`members` must be 'final' or 'epoch:K' with K of at least 1, but is {self.members!r}.")
