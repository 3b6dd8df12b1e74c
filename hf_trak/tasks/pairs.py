"""Rows of images and captions to batches for a dual encoder, and the bank of training pairs that they are held against."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from hf_trak.hashing import hash_tensors, random_bits, stream_key
from hf_trak.messages import MissingProcessor
from hf_trak.tasks.image_inputs import ImageInputs, refuse_whole_numbers
from hf_trak.tasks.inputs import Rows, TextInputs
from hf_trak.tasks.pictures import check_pictures, open_pictures
from hf_trak.tasks.rows import is_transformed, name_rows

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

    from hf_trak.config import TrakConfig


DEFAULT_BANK_SIZE = 512


@dataclass(frozen=True)
class Bank:
    """Embeddings of unit length, frozen: no gradient reaches them.

    Args:
        images (`torch.Tensor`): Of shape (bank, dim).
        texts (`torch.Tensor`): Of shape (bank, dim); of a row with several captions, the first.
        keys (`torch.Tensor`): What each pair is made of, so that an example finds its own pair; see [`pair_keys`].
        rows (`torch.Tensor`): Rows of the training set, in ascending order.
    """

    images: Float[Tensor, "bank dim"]
    texts: Float[Tensor, "bank dim"]
    keys: Int64[Tensor, " bank"]
    rows: Int64[Tensor, " bank"]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Bank:
        """Make a bank of what [`~Bank.tensors`] returned."""
        return cls(**{name: tensors[name] for name in ("images", "texts", "keys", "rows")})

    @classmethod
    def join(cls, parts: Sequence[Bank]) -> Bank:
        """Return the bank of all the pairs of several."""
        return cls.from_tensors({name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()})

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name, as they are stored."""
        return {"images": self.images, "texts": self.texts, "keys": self.keys, "rows": self.rows}

    def to(self, device: torch.device) -> Bank:
        """Return the bank on a device."""
        return Bank(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def owned_by(self, keys: Int64[Tensor, " batch"]) -> Bool[Tensor, "batch bank"]:
        """Return which pairs of the bank are the examples' own."""
        return keys.unsqueeze(1) == self.keys

    @property
    def sha256(self) -> str:
        """Of all its tensors."""
        return hash_tensors(self.tensors())


def draw_rows(n_rows: int, size: int | None, seed: int) -> Int64[Tensor, " bank"]:
    """Return which rows of a training set make its bank: a uniform draw without replacement, the same on every machine.

    Args:
        size (`int`, *optional*): By default, 512 or all rows if there are fewer.

    Raises:
        ValueError: If there are fewer rows than `size`, or fewer than 2.
    """
    # Differs from the reference: MadryLab/trak draws with weights 0, 1, 2, ..., so that the first row is never in its bank.
    if size is not None and size > n_rows:
        raise ValueError(
            f"`bank_size` is {size:,}, but the training set has {n_rows:,} rows, and a bank holds each at most once. Leave it out, "
            f"or choose at most {n_rows:,}."
        )
    if n_rows < 2:
        raise ValueError("A contrastive task holds each pair against others, but the training set has only one row.")
    order = random_bits(stream_key(seed, "bank"), torch.arange(n_rows)).argsort()
    return order[: min(n_rows, DEFAULT_BANK_SIZE) if size is None else size].sort().values


def pair_keys(batch: Mapping[str, Tensor | Sequence[Tensor]], names: Sequence[str]) -> Int64[Tensor, " batch"]:
    """Return a hash per row of the tensors `names` of a batch.

    What a row is told by is its content, so that an example finds its own pair in the bank whether it comes as a row of the training
    set, as a query, or twice, and however its picture is stored, as long as no pixel changes. A picture that was compressed again, or
    that another version of the image processor resizes to other numbers, is another picture: its pair then counts among its negatives.
    """
    keys = []
    for row in range(len(batch[names[0]])):
        digest = hashlib.blake2b(digest_size=8)
        for name in names:
            values = batch[name][row].contiguous()
            digest.update(f"{name}|{values.dtype}|{tuple(values.shape)}|".encode())
            digest.update(values.numpy().tobytes())
        keys.append(int.from_bytes(digest.digest(), "little", signed=True))
    return torch.tensor(keys, dtype=torch.int64)


_CAPTION_COLUMNS = ("caption", "captions", "text", "texts")


@dataclass(frozen=True)
class PairInputs:
    """An image column and a caption column, or rows that already hold `pixel_values` or `input_ids`.

    A row may have one caption or a list of them. A batch has a slot for each: `input_ids` of shape (batch, slots, tokens), and
    `caption_weights` (batch, slots), which are one over the number of a row's captions; a slot that a row does not fill repeats its
    first caption with weight 0. `pair_keys` (batch,) says what each pair is made of.

    Args:
        image_names, text_names (`tuple[str, ...]`): What the towers take.
        fixed_length (`int`, *optional*): Pad every caption to so many tokens, and give no attention mask: SigLIP, which reads the
            last token, was trained so.
    """

    images: ImageInputs
    texts: TextInputs
    image_names: tuple[str, ...]
    text_names: tuple[str, ...]
    fixed_length: int | None = None

    @classmethod
    def for_model(cls, model: PreTrainedModel, config: TrakConfig, *, fixed_length: bool) -> PairInputs:
        text = model.config.text_config
        if config.text_columns is not None and len(config.text_columns) != 1:
            raise ValueError(
                f"A contrastive task has one caption column, but `text_columns` names {', '.join(config.text_columns)}. A row's "
                "several captions go into one column, as a list."
            )
        left_out = {"position_ids", *(("attention_mask",) if fixed_length else ())}
        accepted = frozenset(_arguments(model.get_text_features)) - left_out
        limit = getattr(text, "max_position_embeddings", None)
        pad_token_id = getattr(text, "pad_token_id", None) or 0
        return cls(
            ImageInputs(config.image_column, "RGB"),
            TextInputs(config.text_columns, config.max_length, accepted, pad_token_id, limit),
            tuple(name for name in _arguments(model.get_image_features) if name != "interpolate_pos_encoding"),
            tuple(sorted(accepted)),
            limit if fixed_length else None,
        )

    def check(self, features: Features, processing_class: Any) -> None:
        """Check the columns; [`~PairInputs.check_rows`] checks what they hold."""
        if not self._has_pixels(features):
            self.images._column(features)
            _needed(processing_class, "image_processor")
        if not self._has_ids(features):
            self.caption_column(features)
            _needed(processing_class, "tokenizer")

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> PairInputs:
        images, texts = self.images, self.texts
        if not self._has_pixels(features):
            images = replace(images, image_column=images._column(features))
        if not self._has_ids(features):
            texts = replace(texts, text_columns=(self.caption_column(features),))
        return replace(self, images=images, texts=texts)

    def check_rows(self, dataset: Dataset, processing_class: Any = None) -> None:
        """Check that every row has an image and at least one caption.

        Raises:
            ValueError: Naming the rows that do not.
        """
        if is_transformed(dataset):
            return
        if not self._has_pixels(dataset.features):
            check_pictures(dataset, self.images._column(dataset.features))
        if not self._has_ids(dataset.features):
            column = self.caption_column(dataset.features)
            bad = [row for row, captions in enumerate(dataset[column]) if not _all_words(captions)]
            if bad:
                raise ValueError(
                    f"{len(bad)} rows have no caption in {column!r}, or an empty one: {name_rows(bad)}. Filter these rows."
                )

    def columns_read(self, features: Features) -> dict[str, Any]:
        image = [name for name in self.image_names if name in features] if self._has_pixels(features) else None
        if self._has_ids(features):
            found: dict[str, Any] = {"tokens": [name for name in features if name in self.texts.accepted]}
        else:
            found = {"text": [self.caption_column(features)]}
        return {"image": self.images._column(features) if image is None else image, **found}

    def _has_pixels(self, columns: Mapping[str, Any]) -> bool:
        return "pixel_values" in columns and self.images.image_column is None

    def _has_ids(self, columns: Mapping[str, Any]) -> bool:
        return "input_ids" in columns and self.texts.text_columns is None

    def caption_column(self, features: Features) -> str:
        """Return the column of captions: the one configured, else the first of the usual names, else the only one of strings.

        Raises:
            ValueError: If there is none, or several of unusual names.
        """
        if self.texts.text_columns is None:
            if (found := find_caption_column(features)) is not None:
                return found
            raise ValueError(
                f"Expected a caption column ({', '.join(_CAPTION_COLUMNS)}) or 'input_ids', but the dataset has "
                f"{', '.join(features)}. Set `text_columns`."
            )
        column = self.texts.text_columns[0]
        if column not in features:
            raise ValueError(f"The dataset has no column {column!r}; it has {', '.join(features)}.")
        if column not in _text_columns(features):
            raise ValueError(f"The caption column {column!r} holds {features[column]}, not strings or lists of strings.")
        return column

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        batch = {**self._image_batch(rows, processing_class), **self._text_batch(rows, processing_class)}
        batch["pair_keys"] = pair_keys({**batch, "captions": _without_padding(batch)}, [*self._images_in(batch), "captions"])
        return batch

    def _images_in(self, batch: Mapping[str, Tensor]) -> list[str]:
        return [name for name in self.image_names if name in batch]

    def _image_batch(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        if self._has_pixels(rows):
            found = {name: torch.stack(list(map(torch.as_tensor, rows[name]))) for name in self.image_names if name in rows}
            refuse_whole_numbers("pixel_values", found["pixel_values"])
            return {name: value.float() if name == "pixel_values" else value for name, value in found.items()}
        column = self.images._column_of(rows)
        pictures = open_pictures(rows[column], "RGB", column)
        encoded = _needed(processing_class, "image_processor")(pictures, return_tensors="pt")
        return {name: encoded[name] for name in self.image_names if name in encoded}

    def _text_batch(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        if self._has_ids(rows):
            flat: Rows = {key: rows[key] for key in rows if key in self.texts.accepted}
            counts = [1] * len(rows["input_ids"])
        else:
            lists = [[value] if isinstance(value, str) else list(value) for value in rows[self._captions_of(rows)]]
            counts = [len(captions) for captions in lists]
            texts = [caption for captions in lists for caption in captions]
            flat = self.texts._tokenize([texts], _needed(processing_class, "tokenizer"))
            flat = {key: flat[key] for key in flat if key in self.texts.accepted}
        encoded = self._pad(flat, getattr(_part(processing_class, "tokenizer"), "pad_token_id", None))
        slots = _slots(counts)
        weights = torch.zeros(slots.shape)
        for row, count in enumerate(counts):
            weights[row, :count] = 1 / count
        return {**{key: values[slots] for key, values in encoded.items()}, "caption_weights": weights}

    def _pad(self, flat: Rows, tokenizers_pad: int | None) -> dict[str, Tensor]:
        """Pad token lists: with the model's pad token, or, where a tower reads padding, with the tokenizer's."""
        pad_token_id = self.texts.pad_token_id
        if self.fixed_length is not None and tokenizers_pad is not None:
            pad_token_id = tokenizers_pad
        encoded = TextInputs(None, None, self.texts.accepted, pad_token_id).collate(flat, None)
        if self.fixed_length is None:
            return encoded
        missing = self.fixed_length - encoded["input_ids"].shape[1]
        return {"input_ids": F.pad(encoded["input_ids"], (0, missing), value=pad_token_id)}

    def _captions_of(self, rows: Rows) -> str:
        if self.texts.text_columns is not None:
            return self.texts.text_columns[0]
        strings = [
            key for key, values in rows.items() if any(isinstance(value, str) or _is_list_of_words(value) for value in values)
        ]
        return next((name for name in _CAPTION_COLUMNS if name in strings), strings[0])

    def text_limit(self, tokenizer: Any) -> int | None:
        """Return how many tokens of a caption are kept; None for all."""
        return self.texts.text_limit(tokenizer)

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        """None: a row's cost is its image's, which are all alike."""
        return None


def find_caption_column(features: Features) -> str | None:
    """Return the first of the usual names (caption, captions, text, texts), else the only column of strings or of lists of strings."""
    found = _text_columns(features)
    named = [name for name in _CAPTION_COLUMNS if name in found]
    return named[0] if named else found[0] if len(found) == 1 else None


def _text_columns(features: Features) -> list[str]:
    return [name for name, kind in features.items() if _is_text(kind) or _is_text(getattr(kind, "feature", None))]


def _slots(counts: Sequence[int]) -> Tensor:
    """Return where each row's captions are in a flat list of all: (batch, slots); slots to spare hold the first."""
    starts = torch.tensor([0, *counts]).cumsum(0)[:-1].unsqueeze(1)
    slot = torch.arange(max(counts)).unsqueeze(0)
    return starts + slot.where(slot < torch.tensor(counts).unsqueeze(1), 0)


def _without_padding(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Return every row's tokens, caption after caption, each ended by −1: whatever else is in the batch, the same."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    end = torch.full((1,), -1)
    return [
        torch.cat([part for slot in weights.nonzero().flatten() for part in (row[slot][kept[slot]], end)])
        for row, kept, weights in zip(ids, mask, batch["caption_weights"], strict=True)
    ]


def _arguments(method: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in inspect.signature(method).parameters.items() if parameter.kind in kinds]


def _part(processing_class: Any, name: str) -> Any:
    """Return the tokenizer or image processor of a processor; or the thing itself, where it is that one alone."""
    if hasattr(processing_class, name):
        return getattr(processing_class, name)
    is_tokenizer = hasattr(processing_class, "convert_tokens_to_ids")
    return processing_class if processing_class is not None and is_tokenizer == (name == "tokenizer") else None


def _needed(processing_class: Any, name: str) -> Any:
    if (part := _part(processing_class, name)) is None:
        column, needs = ("An image", "an image processor") if name == "image_processor" else ("A caption", "a tokenizer")
        raise MissingProcessor(f"{column} column needs {needs}: pass the model's processor as `processing_class`.")
    return part


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _is_list_of_words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], str)


def _all_words(captions: Any) -> bool:
    if isinstance(captions, str):
        return bool(captions.strip())
    return bool(captions) and all(isinstance(caption, str) and caption.strip() for caption in captions)
