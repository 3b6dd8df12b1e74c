r"""Speech with its transcript: recognisers by CTC, and encoder-decoders that read sound or an image and write text.

For CTC, with $p$ the probability of the transcript, the sum over all its alignments, and $L = -\log p$ its loss,

$$f = \log\frac{p}{1 - p} = -L - \log(1 - e^{-L})$$

and out-to-loss is $1 - p$: a transcript counts as one label, as a class does. $\log(1 - e^{-L})$ is computed without cancellation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_trak.messages import MissingProcessor
from hf_trak.tasks.image_inputs import ImageInputs
from hf_trak.tasks.inputs import Rows
from hf_trak.tasks.outputs import call_model
from hf_trak.tasks.rows import Faults, is_transformed
from hf_trak.tasks.sound import SoundInputs, each
from hf_trak.tasks.token_outputs import IGNORED, DecoderInputs

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

    from hf_trak.config import TrakConfig

_TEXTS = ("text", "sentence", "transcription", "transcript", "normalized_text", "caption", "target")
_AT_ONCE = 1000


@dataclass(frozen=True)
class TranscriptInputs:
    """A sound or an image, and its text: `labels`, or a column of texts that the tokenizer encodes.

    Args:
        media ([`SoundInputs`] or [`ImageInputs`]): What the encoder reads.
        n_labels (`int`): Of the vocabulary.
        ignored (`tuple[int, ...]`): Labels that are taken off, since the loss ignores them: -100, and CTC's blank.
        decoder ([`DecoderInputs`], *optional*): What a decoder reads; None for CTC.
        start (`int`, *optional*): The decoder's first token. It is taken off labels that begin with it, as transformers' speech examples do.
    """

    media: SoundInputs | ImageInputs
    text_columns: tuple[str, ...] | None
    label_column: str | None
    max_length: int | None
    n_labels: int
    ignored: tuple[int, ...] = (IGNORED,)
    decoder: DecoderInputs | None = None
    start: int | None = None

    @classmethod
    def for_ctc(cls, model: PreTrainedModel, config: TrakConfig) -> TranscriptInputs:
        """Return the inputs of a recogniser by CTC."""
        blank = model.config.pad_token_id
        return cls(
            SoundInputs.for_model(model, config), config.text_columns, config.label_column, config.max_length, vocabulary_of(model),
            (IGNORED, blank),
        )  # fmt: skip

    @classmethod
    def for_decoder(cls, model: PreTrainedModel, config: TrakConfig) -> TranscriptInputs:
        """Return the inputs of an encoder-decoder that writes text."""
        accepted = inspect.signature(model.forward).parameters
        sound = any(name in accepted for name in ("input_values", "input_features"))
        media: SoundInputs | ImageInputs
        media = SoundInputs.for_model(model, config) if sound else ImageInputs.for_model(model, config.image_column)
        decoder = DecoderInputs.for_model(model)
        starts = (getattr(model.config, "decoder_start_token_id", None), decoder.start)
        return cls(
            media, config.text_columns, config.label_column, config.max_length, vocabulary_of(model), decoder=decoder,
            start=next((value for value in starts if value is not None), None),
        )  # fmt: skip

    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError that names the columns if a dataset cannot serve."""
        self.media.check(features, _part(processing_class, "feature_extractor", "image_processor"))
        if isinstance(self.media, ImageInputs):
            if "input_ids" in self.media.accepted and not self.media._has_pixels(features):
                raise ValueError(
                    f"The model reads a text beside the image. Prepare the rows with its processor ('input_ids', {self.media.main!r} and 'labels')."
                )
            if "decoder_input_ids" in features:
                raise ValueError("The column 'decoder_input_ids' is made of the labels, and not read. Remove it.")
        column, is_text = self._target(features)
        if is_text and not hasattr(_tokenizer(processing_class), "convert_tokens_to_ids"):
            raise MissingProcessor(
                f"The texts in {column!r} need a tokenizer: pass the model's processor as `processing_class`."
            )

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> TranscriptInputs:
        return replace(self, media=self.media.reading(features, dataset, label_column))

    def columns_read(self, features: Features) -> dict[str, Any]:
        return {**self.media.columns_read(features), "label": self._target(features)[0]}

    def _target(self, columns: Mapping[str, Any]) -> tuple[str, bool]:
        """Return the column of labels, and whether they are texts."""
        if self.label_column is not None or self.text_columns is not None:
            column = self.label_column or self.text_columns[0]  # type: ignore[index]
            if column not in columns:
                raise ValueError(
                    f"The dataset has no column {column!r}; it has {', '.join(columns)}. Set `label_column` (--label_column)."
                )
            value = columns[column]
            return column, isinstance(value, str) or getattr(value, "dtype", None) in ("string", "large_string")
        if "labels" in columns:
            return "labels", False
        found = [name for name in _TEXTS if name in columns]
        if not found:
            raise ValueError(
                f"Expected 'labels' (the transcript's tokens) or a column of transcripts ({', '.join(_TEXTS)}), but the dataset has "
                f"{', '.join(columns)}. Set `label_column` (--label_column)."
            )
        return found[0], True

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Check the media, and every row's transcript.

        Raises:
            ValueError: Naming the rows that cannot serve.
        """
        self.media.check_rows(dataset, _part(processing_class, "feature_extractor", "image_processor"))
        if is_transformed(dataset):
            return
        column, is_text = self._target(dataset.features)
        faults = Faults(len(dataset))
        values = dataset.select_columns([column])
        for start in range(0, len(dataset), _AT_ONCE):
            for place, value in enumerate(values[start : min(start + _AT_ONCE, len(dataset))][column]):
                try:
                    self._labels(value, column, is_text, processing_class)
                except ValueError as error:
                    faults.cannot_serve(start + place, str(error))
        faults.raise_for_rows()

    def _labels(self, value: Any, column: str, is_text: bool, processing_class: Any) -> np.ndarray:
        if value is None:
            raise ValueError(f"its {column!r} is None; filter it out")
        if is_text:
            if not isinstance(value, str):
                raise ValueError(f"its {column!r} is {str(value)[:40]}, not a text")
            value = _tokenizer(processing_class)(value)["input_ids"]
        labels = np.asarray(value, dtype=np.int64)
        if labels.ndim != 1:
            raise ValueError(f"its {column!r} have the shape {labels.shape}; expected one list of tokens")
        labels = labels[~np.isin(labels, self.ignored)] if self.decoder is None else _without_ends(labels)
        if self.start is not None and len(labels) and labels[0] == self.start:
            labels = labels[1:]
        scored = labels[labels != IGNORED]
        if not len(scored):
            raise ValueError(f"its {column!r} has no token")
        if (scored < 0).any() or (scored >= self.n_labels).any():
            raise ValueError(
                f"its labels must lie in 0 to {self.n_labels - 1}, what the model can predict, but one is "
                f"{scored[(scored < 0) | (scored >= self.n_labels)][0]}"
            )
        if self.max_length is not None and len(labels) > self.max_length:
            raise ValueError(f"its {column!r} has {len(labels)} tokens, more than max_length={self.max_length}")
        return labels

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return a batch with `labels`, -100 where a row has no more, and what the decoder reads."""
        labels = []
        for place, row in enumerate(each(rows)):
            column, is_text = self._target(row)
            try:
                labels.append(self._labels(row[column], column, is_text, processing_class))
            except ValueError as error:
                raise ValueError(f"Row {place} of this batch cannot serve: {error}.") from error
        column = self._target({name: values[0] for name, values in rows.items()})[0]
        media = {name: values for name, values in rows.items() if name != column}
        batch = self.media.collate(media, _part(processing_class, "feature_extractor", "image_processor"))
        if self.decoder is not None:
            batch["decoder_input_ids"] = _stack([self.decoder(row) for row in labels], self.decoder.pad_token_id)
        return {**batch, "labels": _stack(labels, IGNORED)}

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        return self.media.lengths(dataset, processing_class)


@dataclass(frozen=True)
class CtcOutput:
    """The log-odds of a transcript, and one minus its probability.

    Args:
        blank (`int`): The label of no token.
    """

    blank: int

    def __call__(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        logits = call_model(model, batch).logits
        labels = batch["labels"]
        counts = (labels != IGNORED).sum(1)
        log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).transpose(0, 1)
        frames = _frames(model, batch, logits)
        with torch.backends.cudnn.flags(enabled=False):
            loss = F.ctc_loss(log_p, labels.clamp_min(0), frames, counts, blank=self.blank, reduction="none")
        if loss.isinf().any():
            worst = int(loss.isinf().nonzero()[0])
            raise ValueError(
                f"A transcript of {int(counts[worst])} tokens has no alignment with the {int(frames[worst])} frames of its sound: it has more "
                "tokens (counting a blank between equal ones) than frames. Filter such rows."
            )
        return log_odds_of_loss(loss), -torch.expm1(-loss.detach())


def log_odds_of_loss(loss: Tensor) -> Tensor:
    r"""Return $\log(p / (1 - p))$ for $p = e^{-\text{loss}}$."""
    loss = loss.clamp_min(torch.finfo(loss.dtype).tiny)
    near = loss.clamp_max(math.log(2))  # each branch sees what it is right for, so that neither's gradient is NaN
    far = loss.clamp_min(math.log(2))
    return -loss - torch.where(loss > math.log(2), torch.log1p(-torch.exp(-far)), torch.log(-torch.expm1(-near)))


def _frames(model: Any, batch: Mapping[str, Any], logits: Tensor) -> Tensor:
    """Return how many frames of the logits each row has."""
    mask = batch.get("attention_mask")
    whole = torch.full((len(logits),), logits.shape[1], dtype=torch.int64, device=logits.device)
    if mask is None or bool((mask != 0).all()):
        return whole
    if hasattr(model, "_get_output_attention_mask"):  # Parakeet, LASR
        return model._get_output_attention_mask(mask, target_length=logits.shape[1]).sum(-1).long()
    if not hasattr(model, "_get_feat_extract_output_lengths"):
        raise ValueError(f"{type(model).__name__} does not say how many frames of a padded batch belong to each row.")
    return model._get_feat_extract_output_lengths(mask.sum(-1)).long()


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return how many tokens a model can predict."""
    config = model.config
    for part in (config, getattr(config, "decoder", None), getattr(config, "text_config", None)):
        for name in ("tgt_vocab_size", "decoder_vocab_size", "vocab_size"):
            if isinstance(value := getattr(part, name, None), int):
                return value
    return int(config.get_text_config(decoder=True).vocab_size)


def _without_ends(labels: np.ndarray) -> np.ndarray:
    """Return labels without -100 at their end, which are padding."""
    scored = (labels != IGNORED).nonzero()[0]
    return labels[: scored[-1] + 1] if len(scored) else labels[:0]


def _part(processing_class: Any, *names: str) -> Any:
    return next((part for name in names if (part := getattr(processing_class, name, None)) is not None), processing_class)


def _tokenizer(processing_class: Any) -> Any:
    return getattr(processing_class, "tokenizer", processing_class)


def _stack(values: list[np.ndarray], fill: int) -> Tensor:
    result = torch.full((len(values), max(map(len, values))), fill, dtype=torch.int64)
    for row, value in zip(result, values, strict=True):
        row[: len(value)] = torch.from_numpy(value)
    return result
