"""Indexes of given features, written through the real store: no model made them, so they answer for features alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hf_trak import AttributionIndex, TrakConfig
from hf_trak.linalg import accumulate_gram
from hf_trak.storage.columns import encode_columns
from hf_trak.storage.writer import MemberWriter


def draw(n_rows: int, proj_dim: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return features, of very different size by row, and out-to-loss."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(n_rows, proj_dim)) * np.exp(generator.normal(size=(n_rows, 1)))
    return features.astype(np.float32), generator.uniform(0.01, 1, size=n_rows).astype(np.float32)


def store_index(
    folder: Path, members: Sequence[tuple[np.ndarray, np.ndarray]], *, shard_rows: int, dtype: str = "float32"
) -> AttributionIndex:
    """Write members' features and out-to-loss."""
    n_rows, proj_dim = members[0][0].shape
    config = TrakConfig(task="text-classification", proj_dim=proj_dim, features_dtype=dtype)
    config.save_pretrained(folder)
    drawn = hashlib.sha256(b"".join(part.tobytes() for member in members for part in member)).hexdigest()
    for number, (features, out_to_loss) in enumerate(members):
        identity = {
            "task": config.task,
            "out_to_loss_kind": "one_minus_p",
            "seed": number,
            "dropout_seed": None,
            "model_class": "Model",
            "parameters": {},
            "model_sha256": str(number),
            "dataset": {"sha256": drawn, "columns": {}, "label_names": None},
            "config": config.identity(),
        }
        writer = MemberWriter(folder / f"member_{number}", identity=identity, n_rows=n_rows, shard_rows=shard_rows)
        for shard in range(writer.n_shards):
            rows = list(writer.rows(shard))
            phi, q = torch.from_numpy(features[rows]), torch.from_numpy(out_to_loss[rows])
            writer.write(shard, encode_columns(phi, torch.zeros_like(q), q, dtype=dtype))
        gram = accumulate_gram(torch.zeros(proj_dim, proj_dim, dtype=torch.float64), torch.from_numpy(features).double())
        description = {
            "checkpoint": {"path": None, "repository": None, "revision": None},
            "checkpoint_number": number,
            "training_set": {"name": None, "config": None, "split": None, "columns": []},
            "coverage": 1.0,
            "grad_dim": proj_dim,
            "versions": {"hf_trak": "0", "torch": "0", "transformers": "0", "datasets": "0", "python": "3"},
            "hardware": "x86_64",
        }
        writer.finish(gram, description)
    return AttributionIndex.from_pretrained(folder)
