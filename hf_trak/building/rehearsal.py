"""A rehearsal of featurizing: every check of the rows, and the features of two of them, before a checkpoint is trained for them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_trak.config import TrakConfig
from hf_trak.featurizing.batching import read_rows
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.featurizing.placement import check_whole
from hf_trak.tasks import draw_rows, needs_bank
from hf_trak.tasks.rows import as_stored

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from hf_trak.tasks import Task, TaskMaker

logger = logging.getLogger(__name__)

_ROWS = 2


def rehearse(
    model: nn.Module | Path,
    dataset: Dataset,
    config: TrakConfig,
    *,
    processing_class: Any,
    task: Task | TaskMaker | None,
    dropout_seed: int | None,
    device: torch.device,
) -> Featurizer:
    """Check that a training set can be featurized under a model or snapshot, and return what would do it.

    Raises:
        ValueError: Whatever `featurize()` would raise: no task, no processor, rows that cannot serve, gradients that are not found.
    """
    featurizer = Featurizer(
        model,
        config,
        processing_class,
        task=task,
        dropout_seed=dropout_seed,
        device=device,
    )
    check_whole(featurizer.model)
    dataset = as_stored(dataset)
    featurizer.read_from(dataset)
    featurizer.task.check(dataset, featurizer.processing_class)
    if needs_bank(featurizer.task):
        draw_rows(len(dataset), config.bank_size, config.bank_seed)  # raises for a bank that is larger than the training set
        return featurizer
    rows = list(range(min(_ROWS, len(dataset))))
    try:
        featurizer.check_first_rows(dataset)
        featurizer.lengths(dataset.select(rows))
        featurizer.compute(featurizer.collate(read_rows(dataset, rows)), rows)
    except torch.OutOfMemoryError:
        logger.warning(
            "There is no memory on %s to featurize two rows before training; whether it can be done is not known.", device
        )
    except (ValueError, OSError):
        raise
    except Exception as error:  # of the user's task or collator, or of the model's code
        raise ValueError(
            f"Featurizing failed for rows {', '.join(map(str, rows))} of the training set, so it would fail after training, too: "
            f"{type(error).__name__}: {error}. Check the `task` and its collator, and that they take the training set's rows "
            f"({', '.join(dataset.column_names)})."
        ) from error
    return featurizer
