"""What is trained: what both scales have in common, and the epochs whose weights are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool

from hf_trak.config import TrakConfig
from hf_trak.evaluation.contrastive.settings import ContrastiveArguments
from hf_trak.tasks import Task


class Trained(Protocol):
    """Rows, a task, and what makes models of them.

    What [`~Trained.train`] and [`~Trained.load`] return is what [`AttributionIndex.build`] takes: a model, or its folder.
    """

    case: str
    config: TrakConfig
    task: Task
    processing_class: Any
    train_rows: Dataset
    query_rows: Dataset

    def train(self, mask: Bool[np.ndarray, " n_train"], seed: int, *, keep: int = 1) -> list[Any]:
        """Train on the pairs where `mask` is True; return the models of `keep` evenly spaced epochs, the last among them."""
        ...

    def save(self, model: Any, path: Path) -> None:
        """Save a model so that it is either whole or not there."""
        ...

    def load(self, path: Path) -> Any:
        """Load what [`~Trained.save`] saved."""
        ...


def describe_case(args: ContrastiveArguments, model_name: str, n_train: int, n_query: int) -> str:
    """Say what model and data the results are of."""
    data = f"{n_train} pairs of {args.data_name or Path(args.data).name}, {n_query} held-out pairs"
    return f"{args.model_name or model_name}, {data}"


def make_optimizer(model: torch.nn.Module, args: ContrastiveArguments) -> torch.optim.Optimizer:
    """Return Adam, with decay apart from the gradient."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.momentum, 0.999),
        fused=True,
    )


def is_kept(epoch: int, *, epochs: int, keep: int) -> bool:
    """Return whether an epoch, counted from 1, is among `keep` evenly spaced ones."""
    return epoch * keep % epochs < keep
