"""What a tokenizer or image processor does: exactly, by its content, and by what it makes of a fixed text and a fixed image."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from hf_trak.hashing import hash_file, hash_json

_TEXT = "Naïve QUEENS paid 1,024.50 dollars, didn't they? 東京 🙂 https://example.org/a_b"
# Of an image processor's settings, those that change with the library and not with the pixels.
_IGNORED = ("_processor_class", "processor_class", "transformers_version", "image_processor_type", "feature_extractor_type")


def describe_processing(
    processing_class: Any, *, tokenizer: bool = True, pixels: bool = True, padded: bool = False, chats: bool = False
) -> dict[str, Any]:
    """Return what decides how rows become a model's inputs, JSON-able; nothing for what is no tokenizer or processor.

    A tokenizer is told by a hash of its content (vocabulary, merges, normalization, template, added tokens) and by its special tokens;
    `vocabulary` and `tokens`, what it makes of a fixed text, say the same roughly, for versions of a library that write the content
    differently. Its limit of length is not part of it, since only the one in force matters. An image processor or
    feature extractor is told by its settings, and by the pixels that it makes of a fixed image, to two digits, which backends agree in.

    Args:
        tokenizer, pixels (`bool`): Whether texts pass through a tokenizer, and images or sound through a processor.
        padded (`bool`): Whether the model reads padding, so that the pad token matters.
        chats (`bool`): Whether rows pass through the chat template.
    """
    from transformers import PreTrainedTokenizerBase

    found: dict[str, Any] = {}
    names = ("tokenizer", "image_processor", "feature_extractor")
    for part in (processing_class, *(getattr(processing_class, name, None) for name in names)):
        if isinstance(part, PreTrainedTokenizerBase):
            if tokenizer:
                found["tokenizer"] = _describe_tokenizer(part, padded=padded, chats=chats)
        elif pixels and part is not None and callable(getattr(part, "to_dict", None)) and not _is_processor(part):
            settings = json.loads(json.dumps(part.to_dict(), default=str))
            settings = {key: value for key, value in settings.items() if key not in _IGNORED}
            found["images" if hasattr(part, "image_mean") else "sound"] = {**settings, **_describe_pixels(part)}
    return found


def _is_processor(part: Any) -> bool:
    """Return whether it is made of others, which are told one by one."""
    from transformers import ProcessorMixin

    return isinstance(part, ProcessorMixin)


def tokenizer_of(processing_class: Any) -> Any:
    """Return a processor's tokenizer, or a tokenizer itself; None if there is none."""
    from transformers import PreTrainedTokenizerBase

    parts = (processing_class, getattr(processing_class, "tokenizer", None))
    return next((part for part in parts if isinstance(part, PreTrainedTokenizerBase)), None)


def _describe_tokenizer(tokenizer: Any, *, padded: bool, chats: bool) -> dict[str, Any]:
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if padded or key != "pad_token"}
    found = {
        "sha256": hash_tokenizer(tokenizer),
        "vocabulary": len(tokenizer),
        "tokens": tokenizer(_TEXT, verbose=False)["input_ids"],
        "special_tokens": json.loads(json.dumps(special, default=str)),
        "truncation_side": tokenizer.truncation_side,
    }
    if chats:
        template = json.dumps(tokenizer.chat_template, sort_keys=True)
        found["chat_template_sha256"] = hashlib.sha256(template.encode()).hexdigest()
    return found


def hash_tokenizer(tokenizer: Any) -> str:
    """Return a hash of what a tokenizer is made of, but for the padding and truncation that its last call left in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python
        content = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "files": _vocabulary_files(tokenizer),
        }
        return hash_json(content)
    content = backend.to_str()
    # The padding and truncation come first; parsing a large vocabulary to leave them out would take a second.
    start = content.find('"added_tokens"')
    return hashlib.sha256(content[max(0, start) :].encode()).hexdigest()


def _vocabulary_files(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        return {Path(name).name: hash_file(Path(name)) for name in tokenizer.save_vocabulary(folder) or ()}


def _describe_pixels(image_processor: Any) -> dict[str, Any]:
    """Return the shape of the pixels, and their mean and deviation to two digits."""
    across, down = np.meshgrid(np.linspace(0, 255, 48), np.linspace(0, 255, 40))
    image = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    try:
        pixels = np.asarray(image_processor(image, return_tensors="np")["pixel_values"])
    except (ValueError, KeyError, RuntimeError, TypeError):  # not of coloured images
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
