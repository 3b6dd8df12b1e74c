"""Tokenizers and image processors: loading them from files, and describing what they do."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_trak.hashing import hash_file, hash_json
from hf_trak.sources.repositories import Listing, look_up, reached

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_TEXT = "Naïve QUEENS paid 1,024.50 dollars, didn't they? 東京 🙂 https://example.org/a_b"
# Settings of an image processor that depend on the library version and do not change the pixels.
_IGNORED = ("_processor_class", "processor_class", "transformers_version", "image_processor_type", "feature_extractor_type")


def describe_processing(
    processing_class: Any, *, tokenizer: bool = True, pixels: bool = True, padded: bool = False, chats: bool = False
) -> dict[str, Any]:
    """Return a JSON-able description of how rows become model inputs; empty if there is no tokenizer or processor.

    A tokenizer is described by a hash of its content (vocabulary, merges, normalization, template, added tokens) and by its special tokens.
    Library versions can write the same content differently, so `vocabulary` and `tokens` (the tokens of a fixed text) describe it roughly.
    Its maximum length is left out, because only the length that is used matters. An image processor or feature extractor is described by
    its settings, and by the pixels of a fixed image to two digits, on which backends agree.

    Args:
        tokenizer, pixels (`bool`): Whether texts pass through a tokenizer, and images or audio through a processor.
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
    """Return whether a processor consists of several parts, which are described separately."""
    from transformers import ProcessorMixin

    return isinstance(part, ProcessorMixin)


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
    """Return a hash of a tokenizer's content, without the padding and truncation settings of its last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # written in Python
        content = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "files": _vocabulary_files(tokenizer),
        }
        return hash_json(content)
    content = backend.to_str()
    # Padding and truncation come first in the text. Parsing a large vocabulary only to remove them would take a second.
    start = content.find('"added_tokens"')
    return hashlib.sha256(content[max(0, start) :].encode()).hexdigest()


def _vocabulary_files(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        return {Path(name).name: hash_file(Path(name)) for name in tokenizer.save_vocabulary(folder) or ()}


def _describe_pixels(image_processor: Any) -> dict[str, Any]:
    """Return the shape of the pixels of a fixed image, and their mean and standard deviation to two digits."""
    across, down = np.meshgrid(np.linspace(0, 255, 48), np.linspace(0, 255, 40))
    image = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    try:
        pixels = np.asarray(image_processor(image, return_tensors="np")["pixel_values"])
    except (ValueError, KeyError, RuntimeError, TypeError):  # not for colour images
        return {}
    return {
        "pixels": list(pixels.shape[1:]),
        "pixel_mean": round(float(pixels.mean()), 2),
        "pixel_std": round(float(pixels.std()), 2),
    }


def hash_processing_class(processing_class: Any) -> str | None:
    """Return a hash of the files that a tokenizer or image processor saves; None if there is none."""
    if processing_class is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        processing_class.save_pretrained(folder)
        return hash_json({path.name: hash_file(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()})


logger = logging.getLogger(__name__)

_TOKENIZER = re.compile(
    r"tokenizer.*\.json|vocab.*|merges\.txt|.*\.(spm|tiktoken)|tekken\.json|bpe\.codes|(spiece|tokenizer|sentencepiece.*)\.model"
    r"|special_tokens_map\.json|added_tokens\.json"
)
_PIXELS = re.compile(r"(pre)?processor_config\.json")
_SMALLEST_SHARE = 0.1  # share of the model's vocabulary; a smaller tokenizer belongs to another model, or is a placeholder
_CODE_POINTS = 0x10FFFF  # Unicode code points as ids, which the model hashes
WAY_OUT = (
    "Pass the fine-tuned model's own: --processor FOLDER_OR_REPO, or `processing_class=` in Python, which takes a folder, a repository "
    "or the loaded object"
)


def load_processing_class(source: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer, image processor or both of a checkpoint; None if it has no files of either.

    For most model types, transformers creates an empty tokenizer if its files are missing. This function requires the files. An
    adapter without such files uses those of its base model.

    Raises:
        FileNotFoundError: If there is no such folder or repository.
        ValueError: If files are missing or damaged, or if they need remote code that is not trusted.
    """
    listing = look_up(source, revision)
    if not _has(listing, _TOKENIZER) and not _has(listing, _PIXELS):
        return _of_base_model(source, listing, trust_remote_code=trust_remote_code)
    with reached(listing):
        found = _load(source, listing, revision=listing.commit or revision, trust_remote_code=trust_remote_code)
    if (tokenizer := tokenizer_of(found)) is not None:
        _check_files(source, listing, tokenizer)
        _check_content(tokenizer, f"The tokenizer of {source}")
    return found


def find_processing_class(given: Any, source: str | None, revision: str | None, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer or image processor to use: the given one, loaded if it is a name, else that of the checkpoint, if any.

    Args:
        given (*optional*): A tokenizer or processor, or its folder or repository.
        source (`str`, *optional*): The checkpoint; None for a model in memory.

    Raises:
        ValueError: If the given folder or repository has no tokenizer or processor.
    """
    if is_name(given):
        found = load_processing_class(str(given), trust_remote_code=trust_remote_code)
        if found is None:
            raise ValueError(
                f"{given}, given as `processing_class` (--processor), holds no tokenizer and no image processor: none of tokenizer.json, "
                "a vocabulary, preprocessor_config.json. Name another folder or repository."
            )
        return found
    if given is None and source is not None:
        return load_processing_class(source, revision, trust_remote_code=trust_remote_code)
    if (tokenizer := tokenizer_of(given)) is not None:
        _check_content(tokenizer, "The tokenizer in `processing_class`")
    return given


def _way_out() -> str:
    return WAY_OUT[0].lower() + WAY_OUT[1:]


def is_name(processing_class: Any) -> bool:
    """Return whether a tokenizer or processor is given by its folder or repository."""
    from os import PathLike

    return isinstance(processing_class, (str, PathLike))


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that a processing class is or contains; None if there is none."""
    from transformers import PreTrainedTokenizerBase

    for part in (processing_class, getattr(processing_class, "tokenizer", None)):
        if isinstance(part, PreTrainedTokenizerBase):
            return part
    return None


def describe_absence(source: str | None, given: Any, reason: str) -> str:
    """Return the error message for raw rows without a tokenizer or processor.

    Args:
        source (`str`, *optional*): The checkpoint; None for a model in memory.
        given (*optional*): The `processing_class` that was given.
        reason (`str`): What the task needs.
    """
    reason = f"{reason.split(':')[0].rstrip('.')}."
    if given is not None:
        where = str(given) if is_name(given) else f"the {type(given).__name__} given as `processing_class`"
        return f"{reason} There is none in {where}. {WAY_OUT}; rows that are tokenized (input_ids) or pixels (pixel_values) need none."
    if source is None:
        return f"{reason} {WAY_OUT}; rows that are tokenized (input_ids) or pixels (pixel_values) need none."
    return (
        f"{source} holds no tokenizer or image processor that reads these rows, and hf_trak does not make one up. {reason} {WAY_OUT}; rows that are "
        "tokenized (input_ids) or pixels (pixel_values) need none."
    )


def check_vocabulary(processing_class: Any, model: PreTrainedModel) -> None:
    """Check that a tokenizer's ids fit a model's embedding.

    Raises:
        ValueError: If ids exceed the embedding's rows, or the vocabulary is a small part of the model's.
    """
    tokenizer, n_rows = tokenizer_of(processing_class), _embedding_rows(model)
    if tokenizer is None or n_rows is None or (not type(tokenizer).vocab_files_names and tokenizer.vocab_size >= _CODE_POINTS):
        return
    name = f"The tokenizer {tokenizer.name_or_path!r}" if tokenizer.name_or_path else "The tokenizer"
    ids = tokenizer.get_vocab()
    # The pad token may be new: batches are padded with the model's own.
    highest = max((number for number in ids.values() if number != tokenizer.pad_token_id), default=-1)
    if highest >= n_rows:
        raise ValueError(
            f"{name} makes ids up to {highest:,}, but the embedding of {type(model).__name__} has {n_rows:,} rows: it is another model's. "
            f"{WAY_OUT}."
        )
    if len(ids) < _SMALLEST_SHARE * n_rows:
        raise ValueError(
            f"{name} knows {len(ids):,} tokens, where the embedding of {type(model).__name__} has {n_rows:,} rows: it is a placeholder or "
            f"another model's. {WAY_OUT}."
        )


def _embedding_rows(model: Any) -> int | None:
    """Return the number of rows of a model's token embedding; None if ids are not rows of one matrix."""
    import torch

    model = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
    for module in (model, getattr(model, "text_model", None)):
        try:
            embedding = module.get_input_embeddings()  # type: ignore[union-attr]
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(embedding, torch.nn.Embedding):
            return embedding.num_embeddings
    return None


def _has(listing: Listing, names: re.Pattern[str]) -> bool:
    return any(names.fullmatch(name) for name in listing.files)


def _load(source: str, listing: Listing, *, revision: str | None, trust_remote_code: bool) -> Any:
    """Load the tokenizer, the image processor or both, depending on the files."""
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

    _check_settings(source, listing, revision)
    reads_text, reads_pixels = _has(listing, _TOKENIZER), _has(listing, _PIXELS)
    kinds = (
        [AutoProcessor]
        if reads_text and reads_pixels
        else [AutoTokenizer]
        if reads_text
        else [AutoImageProcessor, AutoFeatureExtractor, AutoProcessor]  # for audio, AutoProcessor creates an empty tokenizer
    )
    reason = ""
    for kind in kinds:
        try:
            return kind.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        except (MemoryError, ImportError):
            raise
        except Exception as error:  # tokenizers raises plain Exceptions for damaged files, transformers the errors of json.load
            if not trust_remote_code and "trust_remote_code" in str(error):
                raise ValueError(
                    f"The tokenizer or image processor of {source} needs code from its repository: if you trust it, pass trust_remote_code=True "
                    f"(--trust_remote_code). Or {_way_out()}."
                ) from error
            reason, cause = reason or _first_line(error), error
    files = sorted(name for name in listing.files if _TOKENIZER.fullmatch(name) or _PIXELS.fullmatch(name))
    raise ValueError(
        f"The tokenizer or image processor of {source} cannot be loaded from {', '.join(files)}: {reason}. A file may be damaged, missing "
        f"or of another version. Restore it. Or {_way_out()}."
    ) from cause


def _check_settings(source: str, listing: Listing, revision: str | None) -> None:
    """Refuse an image processor's file without settings, because transformers would use the defaults of the model type."""
    from transformers.utils import cached_file

    for name in sorted({"preprocessor_config.json", "processor_config.json"} & listing.files):
        path = cached_file(source, name, revision=revision)
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} of {source} is damaged: {_first_line(error)}. Restore it. Or {_way_out()}.") from error
        if not isinstance(values, dict) or not set(values) - {"processor_class", "auto_map"}:
            if name == "processor_config.json" and isinstance(values, dict) and "preprocessor_config.json" in listing.files:
                continue
            raise ValueError(
                f"{name} of {source} holds no settings of a processor, but {str(values)[:80]}. Restore it. Or {_way_out()}."
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].split(". ")[0].rstrip(".")[:200] if lines else ""
    return text if isinstance(error, (ValueError, OSError)) and text else f"{type(error).__name__} {text}".strip()


def _check_files(source: str, listing: Listing, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the vocabulary of a tokenizer was loaded from files. Its settings alone give an empty tokenizer.

    Raises:
        ValueError: Naming the files that are missing.
    """
    expected = {key: name for key, name in type(tokenizer).vocab_files_names.items() if isinstance(name, str)}
    if "tokenizer.json" in listing.files or not expected:  # for example byte-level tokenizers, which need no file
        return
    missing = [expected[key] for key in ("vocab_file", "merges_file") if key in expected and expected[key] not in listing.files]
    if not missing and set(expected.values()) & listing.files:
        return
    present = sorted(name for name in listing.files if _TOKENIZER.fullmatch(name))
    raise ValueError(
        f"{source} lacks {' and '.join(missing) or 'a vocabulary'} of its tokenizer, a {type(tokenizer).__name__}, and has no tokenizer.json; "
        f"it holds {', '.join(present)}. Restore the files. Or {_way_out()}."
    )


def _check_content(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse an empty tokenizer.

    Raises:
        ValueError: If its vocabulary has only special tokens.
    """
    if not type(tokenizer).vocab_files_names and not tokenizer.is_fast:  # bytes or code points, without a list of tokens
        return
    tokens: Iterable[str] = tokenizer.get_vocab()
    words = set(tokens) - set(tokenizer.all_special_tokens) - {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if len(words - {"▁", ""}) == 0:
        raise ValueError(
            f"{name} is empty: its {len(list(tokens)):,} tokens are special ones, so all texts would look the same. transformers creates "
            f"such a tokenizer if a checkpoint has none. {WAY_OUT}."
        )


def _of_base_model(source: str, listing: Listing, *, trust_remote_code: bool) -> Any:
    """Return the tokenizer or processor of an adapter's base model; None for other checkpoints."""
    if "adapter_config.json" not in listing.files:
        return None
    from hf_trak.sources.adapters import base_of

    base, revision = base_of(source, listing.commit)
    if base is None:
        return None
    found = load_processing_class(base, revision, trust_remote_code=trust_remote_code)
    if found is not None:
        logger.warning("%s is an adapter without a tokenizer or processor: its base model's is used, %s.", source, base)
    return found
