"""Small datasets with known contents, and saved tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from datasets import Dataset
from models import N_CLASSES, VOCAB_SIZE, make_model
from transformers import PreTrainedModel


def token_rows(n_rows: int, *, seed: int = 0, longest: int = 12) -> Dataset:
    """Tokenized rows of different lengths, unpadded, with labels."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(3, VOCAB_SIZE, size=generator.integers(2, longest)).tolist() for _ in range(n_rows)]
    return Dataset.from_dict({"input_ids": ids, "label": generator.integers(0, N_CLASSES, n_rows).tolist()})


def image_rows(n_rows: int, *, seed: int = 0) -> Dataset:
    generator = np.random.default_rng(seed)
    pixels = generator.normal(size=(n_rows, 3, 8, 8)).astype(np.float32)
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "label": generator.integers(0, N_CLASSES, n_rows).tolist()})


def save_model(folder: Path, name: str = "bert", *, seed: int = 0) -> Path:
    model = make_model(name, seed=seed)
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(folder)
    return folder
