"""What a tokenizer or image processor does, told by what it makes of a fixed text and a fixed image, or exactly, by its files."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_trak.hashing import hash_file, hash_json

_TEXT = "Naïve QUEENS paid 1,024.50 dollars, didn't they? 東京 🙂 https://example.org/a_b"


def describe_processing(processing_class: Any, columns: Sequence[str] = ()) -> dict[str, Any]:
    """Return `{"processing": {...}}` for an index to record; nothing for what is no tokenizer, image processor or both.

    It is small and readable, and does not depend on how a library's version spells a configuration. Two that make the same of it may
    still differ in what it does not touch, such as rare words.

    Args:
        columns (`Sequence[str]`): Of the dataset. Rows that were tokenized or made pixels before do not pass through it, so that nothing
            is said of it; transformers makes an empty tokenizer for a checkpoint that has none.
    """
    from transformers import PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

    if {"input_ids", "pixel_values"} & set(columns):
        return {}
    parts = [processing_class, *(getattr(processing_class, name, None) for name in ("tokenizer", "image_processor"))]
    found: dict[str, Any] = {}
    for part in parts:
        if isinstance(part, PreTrainedTokenizerBase):
            found |= {"vocabulary": len(part), "tokens": part(_TEXT, verbose=False)["input_ids"]}
        elif isinstance(part, BaseImageProcessor):
            found |= _describe_pixels(part)
    return {"processing": found} if found else {}


def _describe_pixels(image_processor: Any) -> dict[str, Any]:
    """Return the shape of the pixels, and their mean and deviation to two digits, which backends agree in."""
    across, down = np.meshgrid(np.linspace(0, 255, 48), np.linspace(0, 255, 40))
    image = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    try:
        pixels = np.asarray(image_processor(image, return_tensors="np")["pixel_values"])
    except (ValueError, KeyError, RuntimeError):  # not of coloured images
        return {}
    return {
        "pixels": list(pixels.shape[1:]),
        "pixel_mean": round(float(pixels.mean()), 2),
        "pixel_std": round(float(pixels.std()), 2),
    }


def hash_processing_class(processing_class: Any) -> str | None:
    """Return a hash of the files a tokenizer or image processor saves; None for none."""
    if processing_class is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        processing_class.save_pretrained(folder)
        return hash_json({path.name: hash_file(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()})
