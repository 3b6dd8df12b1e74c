"""Indexes for the explorer: of texts, some of them hostile; of pictures; of pairs; and of prompts."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from models import make_model
from pairs_for_tests import pair_rows, save_dual_encoder
from PIL import Image as Pictures
from tokenizers_for_tests import word_tokenizer
from transformers import ViTImageProcessor

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


def save_picture_index(folder):
    """Save a model and an index of 12 pictures without kept columns; return the index's folder, and the training set."""
    rng = np.random.default_rng(0)
    make_model("vit").save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "model")
    pictures = [Pictures.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(12)]
    rows = {"image": pictures, "label": rng.integers(0, 3, 12).tolist()}
    train = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))
    AttributionIndex.build(folder / "index", models=folder / "model", dataset=train, config=CONFIG, progress=False)
    return folder / "index", train


def save_pairs_index(folder):
    """Save a dual encoder and an index of 12 pictures with captions that keeps them; return the index's folder, and the pairs."""
    rows = pair_rows(12)
    AttributionIndex.build(
        folder / "index", models=save_dual_encoder(folder / "model"), dataset=rows, config=CONFIG,
        keep_columns=["image", "caption"], progress=False,
    )  # fmt: skip
    return folder / "index", rows


def language_rows():
    rng = np.random.default_rng(0)
    texts = [{"prompt": " ".join(rng.choice(list("abcdefghij"), 3)) + " ", "completion": "a b", "url": "u"} for _ in range(12)]
    return Dataset.from_list(texts)


def save_language_index(folder):
    """Save a causal language model and an index of its prompts with their answers, which it keeps; return the index's folder."""
    make_model("gpt2 lm").save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    AttributionIndex.build(
        folder / "index", models=folder / "model", dataset=language_rows(), config=CONFIG,
        keep_columns=["prompt", "completion", "url"], progress=False,
    )  # fmt: skip
    return folder / "index"
