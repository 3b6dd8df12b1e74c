"""Pictures with captions, a tiny processor for them, and a slow float64 transcription of the contrastive outputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from models import VOCAB_SIZE, make_dual_encoder
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

WORDS = [f"w{number}" for number in range(4, VOCAB_SIZE)]


def make_processor() -> CLIPProcessor:
    """Words w4, w5, ... with `</s>` (3) at the end; pictures of 8 × 8."""
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2, "</s>": 3, **{word: 4 + i for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=10
    )
    size = {"shortest_edge": 8}
    pictures = CLIPImageProcessorPil(size=size, crop_size={"height": 8, "width": 8})
    return CLIPProcessor(pictures, words)


def picture(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, size=(9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def caption(seed: int) -> str:
    generator = np.random.default_rng(1000 + seed)
    return " ".join(generator.choice(WORDS, size=generator.integers(2, 7)))


def pair_rows(n_rows: int, *, start: int = 0, captions: int | None = None) -> Dataset:
    """Return rows of an image and a caption, or a list of 1 to `captions` captions."""
    rows = range(start, start + n_rows)
    texts: list[Any] = [caption(row) for row in rows]
    if captions is not None:
        texts = [[caption(row + 100 * number) for number in range(1 + row % captions)] for row in rows]
    return Dataset.from_dict(
        {"image": [picture(row) for row in rows], "caption": texts, "license": ["none"] * n_rows}
    ).cast_column("image", image_feature())


def image_feature() -> Any:
    from datasets import Image as ImageFeature

    return ImageFeature()


def save_dual_encoder(folder: Path, name: str = "clip", *, seed: int = 0) -> Path:
    make_dual_encoder(name, seed=seed).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def contrastive_loop(
    image: np.ndarray, text: np.ndarray, bank: list[tuple[np.ndarray, np.ndarray]], scale: float, bias: float | None
) -> tuple[float, float]:
    """Return output and out-to-loss of one pair of unit vectors against the pairs of a bank that are not its own, in float64."""
    image, text = image.astype(np.float64), text.astype(np.float64)
    own = scale * float(image @ text)
    rows = [scale * float(image @ other_text) for _, other_text in bank]
    columns = [scale * float(text @ other_image) for other_image, _ in bank]
    if bias is None:
        output = -math.log(sum(math.exp(x - own) for x in rows)) - math.log(sum(math.exp(x - own) for x in columns))
        softmaxes = [math.exp(own) / (math.exp(own) + sum(math.exp(x) for x in others)) for others in (rows, columns)]
        return output, 1 - sum(softmaxes) / 2
    right = 1 / (1 + math.exp(-(own + bias)))
    for x in rows + columns:
        right *= 1 / (1 + math.exp(x + bias))
    return math.log(right / (1 - right)), 1 - right
