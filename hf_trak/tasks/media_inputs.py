"""Rows of language models that also read images, sounds or videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_trak.config import TrakConfig
from hf_trak.messages import MissingProcessor
from hf_trak.tasks.image_inputs import ImageInputs
from hf_trak.tasks.language_inputs import CausalInputs
from hf_trak.tasks.outputs import APART
from hf_trak.tasks.padding import as_numbers
from hf_trak.tasks.pictures import find_image_columns, open_picture, to_mode
from hf_trak.tasks.token_inputs import Example, text_of
from hf_trak.tasks.token_outputs import IGNORED

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class VideoInputs(ImageInputs):
    """Rows with `pixel_values`, or `pixel_values_videos` where the model takes these: (frames, channels, height, width)."""

    def check(self, features: Features, processing_class: Any) -> None:
        if not self._has_pixels(features):
            raise ValueError(
                f"Expected {self.main!r}, prepared with the model's processor, but the dataset has {', '.join(features)}. Videos are not decoded "
                "here: which frames are read would depend on the decoder."
            )


_IMAGES = ("images", "image")
_OTHER_MEDIA = ("videos", "video", "audios", "audio")
_ALONG = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids", "labels")
# The axes that a column has in a batch of one. A row may hold it with or without the first.
_AXES = {
    "image_grid_thw": 2,
    "video_grid_thw": 2,
    "image_sizes": 2,
    "spatial_shapes": 2,
    "pixel_attention_mask": 4,
    "aspect_ratio_ids": 2,
    "aspect_ratio_mask": 3,
    "cross_attention_mask": 4,
    "input_features": 3,
    "feature_attention_mask": 2,
    "input_features_mask": 2,
}
_PIXEL_AXES = {
    # several pictures of each image, or images of each text
    **dict.fromkeys(
        ("llava_next", "llava_onevision", "idefics", "idefics2", "idefics3", "smolvlm", "lfm3", "granite4_vision"), 5
    ),
    "mllama": 6,
}
_PLACEHOLDERS = (
    "image_token_id", "image_token_index", "video_token_id", "video_token_index", "audio_token_id", "audio_token_index",
    "image_start_token_id", "image_end_token_id", "vision_start_token_id", "vision_end_token_id", "boi_token_index", "eoi_token_index",
    "boi_token_id", "eoi_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class MediaInputs(CausalInputs):
    """Rows of text, as [`CausalInputs`] has them, and what the model reads with them.

    - `input_ids` and what else the processor makes of one row (`pixel_values`, `image_grid_thw`, …), with `labels`. Columns that are not along the
      tokens may be as for a batch of one, or without its first axis.
    - `messages`, or `prompt` and `completion`, with `image` or `images`, through the processor and its chat template. Parts of a message may be
      `{"type": "image"}`; of messages that are plain texts, the images stand before the first of the user.
    - The same without images.

    Placeholders of images are not scored, but where `labels` say so. Rows whose images differ in number or size are computed apart.
    """

    task_name = "image-text-to-text"

    model_type: str = ""
    placeholders: tuple[int, ...] = field(default=())

    @classmethod
    def for_model(cls, model: PreTrainedModel, config: TrakConfig) -> MediaInputs:
        found = super().for_model(model, config)
        assert isinstance(found, MediaInputs)
        ids = [getattr(model.config, name, None) for name in _PLACEHOLDERS]
        return replace(
            found,
            accepted=found.accepted - {"labels", "use_cache"},
            model_type=model.config.model_type,
            placeholders=tuple(dict.fromkeys(value for value in ids if isinstance(value, int))),
        )

    # Columns.

    def _images_column(self, columns: Mapping[str, Any]) -> str | None:
        return next((name for name in _IMAGES if name in columns), None)

    def check(self, features: Features, processing_class: Any) -> None:
        if not self._is_tokenized(features):
            other = [name for name in _OTHER_MEDIA if name in features]
            if other:
                raise ValueError(
                    f"The dataset has {other[0]!r}, which the rows of {self.task_name} are not read with. Prepare the rows with the model's processor, "
                    f"so that they have 'input_ids' and what belongs to them, or remove {other[0]!r}."
                )
            if self._images_column(features) is None and (images := find_image_columns(features)):
                raise ValueError(
                    f"The images are in {', '.join(map(repr, images))}; expected 'image' or 'images'. "
                    f"`dataset.rename_column({images[0]!r}, 'image')`."
                )
            if self._images_column(features) is not None:
                self._check_with_images(features, processing_class)
                return
        super().check(features, processing_class)

    def _check_with_images(self, features: Features, processing_class: Any) -> None:
        if self._kind(features) not in ("messages", "completion"):
            raise ValueError(
                "Rows with images need 'messages', or 'prompt' and 'completion', or prepared 'input_ids' and 'labels', but the dataset has "
                f"{', '.join(features)}. Rename the question to 'prompt' and its answer to 'completion'."
            )
        if self.loss_on == "assistant":
            raise ValueError(
                "loss_on='assistant' is not served for rows with images. Split each conversation into 'prompt' and 'completion', or prepare the rows "
                "with 'labels'."
            )
        if processing_class is None or not hasattr(processing_class, "tokenizer"):
            raise MissingProcessor("Rows with images need the model's processor: pass it as `processing_class`.")

    def columns_read(self, features: Features) -> dict[str, Any]:
        found = super().columns_read(features)
        images = None if self._is_tokenized(features) else self._images_column(features)
        return {**found, "images": images} if images is not None else found

    # Rows.

    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        if self._is_tokenized(row):
            return self._with_media(row)
        column = self._images_column(row)
        if column is None or row[column] is None or (isinstance(row[column], (list, tuple)) and not len(row[column])):
            return super()._encode(row, tokenizer_of_processor(processing_class))
        return self._with_images(row, column, processing_class)

    def _with_media(self, row: Mapping[str, Any]) -> Example:
        """Return a prepared row; its media have the axes of a batch of one."""
        n_tokens = len(row["input_ids"]) if row["input_ids"] is not None else 0
        media = {
            name: _batched(name, as_numbers(name, value), self._axes(name))
            for name, value in row.items()
            if name in self.accepted and name not in _ALONG and value is not None and not _is_along(value, n_tokens)
        }
        example = super()._encode({name: value for name, value in row.items() if name not in media}, None)
        labels = example.labels
        if (self.label_column or "labels") not in row:
            labels = np.where(np.isin(example.ids, self.placeholders), IGNORED, labels)
        return example._replace(labels=labels, media=media)

    def _axes(self, name: str) -> int | None:
        if name == "pixel_values":
            return _PIXEL_AXES.get(self.model_type)
        return _AXES.get(name)

    def type_of_answers(self, name: str) -> int:
        """Return what a column along the tokens of a prompt, such as `token_type_ids`, holds for those of an answer."""
        return int(name == "token_type_ids" and self.model_type.startswith("paligemma"))

    def _with_images(self, row: Mapping[str, Any], column: str, processor: Any) -> Example:
        cells = row[column] if isinstance(row[column], (list, tuple)) else [row[column]]
        images = _open(cells, column)
        if self._kind(row) == "messages":
            encoded = _call(processor, _chat(processor, row["messages"], len(images)), images)
            ids = encoded["input_ids"][0]
            scored = np.ones(len(ids), dtype=bool)
        else:
            encoded, scored = self._completion_with_images(row, images, processor)
            ids = encoded["input_ids"][0]
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"it has {len(ids)} tokens, more than max_length={self.max_length}, and cannot be cut, since its images might be"
            )
        labels = np.where(scored & ~np.isin(ids, self.placeholders), ids, IGNORED)
        further, media = self._inputs_of(encoded)
        return Example(np.asarray(ids, dtype=np.int64), labels.astype(np.int64), further, media=media)

    def _inputs_of(self, encoded: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return what a processor made of a row besides its ids: along the tokens, and with the axes of a batch of one."""
        n_tokens = len(encoded["input_ids"][0])
        further: dict[str, np.ndarray] = {}
        media: dict[str, np.ndarray] = {}
        for name, value in encoded.items():
            if name not in self.accepted or name in ("input_ids", "attention_mask", "labels"):
                continue
            array = as_numbers(name, value)
            if array.shape == (1, n_tokens):
                further[name] = array[0]
            else:
                media[name] = array
        return further, media

    def _completion_with_images(self, row: Mapping[str, Any], images: list[Any], processor: Any) -> tuple[Any, np.ndarray]:
        """Return the processor's result for a prompt with its completion, and which tokens are of the completion."""
        if isinstance(row["prompt"], str):
            prompt, completion = text_of(row, "prompt"), text_of(row, "completion")
            if type(processor).__name__ == "PaliGemmaProcessor":
                encoded = _call(processor, prompt, images, suffix=completion)
                return encoded, np.asarray(encoded["labels"][0]) != IGNORED
            eos = getattr(processor.tokenizer, "eos_token", None)
            whole = prompt + completion
            whole = whole if eos is None or whole.endswith(eos) else whole + eos
            before = _call(processor, prompt, images)
        else:
            prompt = _chat(processor, row["prompt"], len(images), add_generation_prompt=True)
            whole = _chat(processor, [*row["prompt"], *row["completion"]], len(images))
            before = _call(processor, prompt, images)
        encoded = _call(processor, whole, images)
        ids, first = np.asarray(encoded["input_ids"][0]), np.asarray(before["input_ids"][0])
        length = min(len(ids), len(first))
        differs = np.flatnonzero(ids[:length] != first[:length])
        shared = int(differs[0]) if len(differs) else length
        scored = np.ones(len(ids), dtype=bool) if self.loss_on == "all" else np.arange(len(ids)) >= shared
        return encoded, scored

    def _pad(self, examples: list[Example]) -> dict[str, Tensor]:
        batch: dict[str, Any] = super()._pad(examples)
        media = [example.media or {} for example in examples]
        shapes = [{name: array.shape for name, array in row.items()} for row in media]
        if any(row != shapes[0] for row in shapes):
            # Of a batch that is not computed, the media are left out.
            return {**batch, APART: "their images differ in number or size, or some have none"}
        for name in media[0]:
            batch[name] = torch.from_numpy(np.concatenate([row[name] for row in media]))
        return batch


@dataclass(frozen=True)
class AudioTextInputs(MediaInputs):
    """Rows of a language model that reads sounds among its tokens: prepared, or text alone."""

    task_name = "audio-text-to-text"


class _TextOf:
    """A processor's tokenizer, with the chat template of the processor."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._processor.tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor.tokenizer, name)

    @property
    def chat_template(self) -> Any:
        return self._processor.chat_template

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        return self._processor.tokenizer.apply_chat_template(
            *args, **{"chat_template": self._processor.chat_template, **kwargs}
        )


def _open(cells: Sequence[Any], column: str) -> list[Any]:
    try:
        return [to_mode(open_picture(cell), "RGB") for cell in cells]
    except ValueError as error:
        raise ValueError(f"an image in its {column!r} cannot serve: {error}") from error


def encode_prompt(inputs: MediaInputs, processor: Any, prompt: Any, cells: Sequence[Any]) -> dict[str, np.ndarray]:
    """Return what a model reads of a prompt, a text or a conversation, and its pictures, before it answers.

    Raises:
        ValueError: If a picture cannot be opened, or the prompt has places for others.
    """
    text = prompt if isinstance(prompt, str) else _chat(processor, prompt, len(cells), add_generation_prompt=True)
    encoded = _call(processor, text, _open(cells, "images"))
    further, media = inputs._inputs_of(encoded)
    return {"input_ids": np.asarray(encoded["input_ids"][0], dtype=np.int64), **further, **media}


def picture_marks(processor: Any) -> str | None:
    """Return what stands for a picture in a text; None where the processor puts it there itself, or nothing says."""
    if type(processor).__name__ == "PaliGemmaProcessor":
        return None
    mark = getattr(processor, "image_token", None)
    return mark if isinstance(mark, str) else None


def tokenizer_of_processor(processing_class: Any) -> Any:
    """Return a processor's tokenizer, which has the processor's chat template if it has none."""
    tokenizer = getattr(processing_class, "tokenizer", None)
    if tokenizer is None:
        return processing_class
    template = getattr(processing_class, "chat_template", None)
    return (
        _TextOf(processing_class) if template is not None and getattr(tokenizer, "chat_template", None) is None else tokenizer
    )


def _batched(name: str, array: np.ndarray, axes: int | None) -> np.ndarray:
    """Return a column of one row with the axes of a batch of one."""
    if axes is None:
        # (channels, height, width) is an image without its batch; (patches, numbers) and more axes are as the processor makes them.
        axes = array.ndim + 1 if array.ndim in (1, 3) else array.ndim
    if array.ndim == axes - 1:
        return array[None]
    if array.ndim == axes:
        return array
    raise ValueError(
        f"its {name!r} has the shape {array.shape}, but the model takes {axes} axes for a batch of one; prepare the row with the processor"
    )


def _is_along(value: Any, n_tokens: int) -> bool:
    try:
        array = np.asarray(value)
    except ValueError:
        return False
    return array.ndim == 1 and len(array) == n_tokens


def _call(processor: Any, text: str, images: Sequence[Any], **options: Any) -> Any:
    if type(processor).__name__ == "PaliGemmaProcessor" and (mark := processor.image_token) not in text:
        text = mark * len(images) + text  # where the processor puts them itself, and warns of each row
    return processor(text=[text], images=[list(images)], return_tensors="np", **options)


def _chat(processor: Any, messages: Any, n_images: int, **options: Any) -> str:
    """Return a conversation as text; images that no part of it stands for come before the first text of the user."""
    if not isinstance(messages, (list, tuple)) or not all(isinstance(turn, Mapping) and "role" in turn for turn in messages):
        raise ValueError(f"its messages must be a list with 'role' and 'content', but are {str(messages)[:60]}")
    turns, marked = [], 0
    for turn in messages:
        content = turn["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part) for part in content or ()]
        marked += sum(part["type"] == "image" for part in parts)
        turns.append({**turn, "content": parts})
    if marked == 0:
        user = next((turn for turn in turns if turn["role"] == "user"), None)
        if user is None:
            raise ValueError("it has images, and no message of the user that they belong to")
        user["content"] = [{"type": "image"}] * n_images + user["content"]
    elif marked != n_images:
        raise ValueError(f"its messages have places for {marked} images, but it has {n_images}")
    return processor.apply_chat_template(turns, tokenize=False, **options)


def _part(part: Any) -> dict[str, Any]:
    """Return a part of a message without the empty fields that a dataset adds."""
    if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
        raise ValueError(f"a part of its messages is {str(part)[:60]}; expected a 'type' of 'text' or 'image'")
    if part["type"] == "image":
        if any(part.get(name) is not None for name in ("image", "url", "path")):
            raise ValueError(
                "an image is inside its messages; give the images in a column 'images', and {'type': 'image'} in their places"
            )
        return {"type": "image"}
    return {"type": "text", "text": part["text"]}
