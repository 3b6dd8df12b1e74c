"""Texts for the explorer, some of them hostile, and an index of them."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from models import make_model
from tokenizers_for_tests import word_tokenizer

from hf_trak import AttributionIndex, TrakConfig

HOSTILE = "<img src=x onerror=alert(1)> ${alert(2)} {{3*3}} a b\u202e"
NAMES = ["<b>low</b>", "high & dry", "'other'"]
CONFIG = TrakConfig(proj_dim=32)


def text_rows(n_rows, seed=0):
    rng = np.random.default_rng(seed)
    texts = [HOSTILE if row % 3 == 0 else " ".join(rng.choice(list("abcdefghij"), 4)) for row in range(n_rows)]
    features = Features({"text": Value("string"), "label": ClassLabel(names=NAMES)})
    return Dataset.from_dict({"text": texts, "label": rng.integers(0, 3, n_rows).tolist()}, features=features)


def save_text_index(folder):
    """Save two checkpoints, and an index of 24 rows that keeps its columns; return the index's folder."""
    for seed in range(2):
        make_model("bert", seed=seed).save_pretrained(folder / f"bert-{seed}")
        word_tokenizer().save_pretrained(folder / f"bert-{seed}")
    AttributionIndex.build(
        folder / "index", models=[folder / "bert-0", folder / "bert-1"], dataset=text_rows(24), config=CONFIG, shard_rows=10,
        keep_columns=["text", "label"], progress=False,
    )  # fmt: skip
    return folder / "index"
