"""Rows, single inputs and reference outputs of the tasks whose rows have pictures or sound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.zoo.configs import N_LABELS
from tests.zoo.kits import N_ROWS, TARGET_LENGTHS, Kit, Outputs, Row, mean_margins


class ImageClassification(Kit):
    def rows(self) -> list[Row]:
        return [{**self.picture(), "labels": self.integer(N_LABELS)} for _ in range(N_ROWS)]

    def outputs(self, result: Any, row: Row) -> Outputs:
        logits = result.logits if hasattr(result, "logits") else result.last_hidden_state  # PP-LCNet's name for them
        return mean_margins(logits, [row["labels"]])

    def picture(self) -> Row:
        if self.type == "imagegpt":  # pictures are sequences of colors
            return {"input_ids": self.ids(16)}
        if self.type == "siglip2":  # pictures are sequences of patches
            size = self.config.vision_config.patch_size
            return {
                "pixel_values": self.normal(16, 3 * size * size).tolist(),
                "pixel_attention_mask": [1] * 16,
                "spatial_shapes": [4, 4],
            }
        return {"pixel_values": self.normal(self.channels(), *self.size()).tolist()}

    def size(self) -> tuple[int, int]:
        if type(self.model).__name__ == "PerceiverForImageClassificationConvProcessing":
            return 64, 64
        size = self._of_vision("image_size", 64)
        return (size, size) if isinstance(size, int) else tuple(size)

    def channels(self) -> int:
        return self._of_vision("num_channels", 3)

    def _of_vision(self, name: str, default: Any) -> Any:
        for config in (self.config, getattr(self.config, "vision_config", None)):
            if (value := getattr(config, name, None)) is not None:
                return value
        return default


class SemanticSegmentation(ImageClassification):
    def rows(self) -> list[Row]:
        height, width = self.size()
        n_labels = self.config.num_labels
        return [{**self.picture(), "labels": [self.integers(n_labels, width) for _ in range(height)]} for _ in range(N_ROWS)]

    def outputs(self, result: Any, row: Row) -> Outputs:
        """Return the mean over pixels, of logits enlarged to the picture's size."""
        labels = torch.tensor(row["labels"]).flatten()[:, None]
        logits = torch.nn.functional.interpolate(result.logits, size=self.size(), mode="bilinear", align_corners=False)
        pixels = logits[0].flatten(1).T
        margin = pixels.gather(1, labels)[:, 0] - pixels.scatter(1, labels, float("-inf")).logsumexp(1)
        known = margin.detach()
        return Outputs(margin.mean(), torch.sigmoid(-known).mean(), -torch.nn.functional.logsigmoid(known).mean())


class Contrastive(ImageClassification):
    """Pictures and captions, each held against the captions and pictures of all rows, which are constants."""

    def rows(self) -> list[Row]:
        text = getattr(self.config, "text_config", self.config)
        end, rows = getattr(text, "eos_token_id", None), []
        for n in self.lengths():
            ids = self.ids(n)
            if isinstance(end, int) and end < text.vocab_size:
                ids[-1] = end
            rows.append({"input_ids": ids, "attention_mask": [1] * n, **self.picture()})
        return rows

    def reference_outputs(
        self, model: PreTrainedModel, rows: Sequence[Row], dtype: torch.dtype
    ) -> Iterator[tuple[Outputs, Tensor | None]]:
        with torch.no_grad():
            bank = [self._embed(model, row, dtype) for row in rows]
        for number, row in enumerate(rows):
            image, text = self._embed(model, row, dtype)
            scale = model.logit_scale.exp() if hasattr(model, "logit_scale") else 1 / model.temperature
            others = [pair for place, pair in enumerate(bank) if place != number]
            own = scale * (image @ text)
            captions = torch.stack([scale * (image @ other) for _, other in others])
            pictures = torch.stack([scale * (text @ other) for other, _ in others])
            if hasattr(model, "logit_bias"):
                yield _sigmoid_outputs(own, captions, pictures, model.logit_bias), None
            else:
                yield _softmax_outputs(own, captions, pictures), None

    def _embed(self, model: PreTrainedModel, row: Row, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        picture = {name: torch.tensor(row[name]).unsqueeze(0) for name in names if name in row}
        picture["pixel_values"] = picture["pixel_values"].to(dtype)
        ids, mask = row["input_ids"], row["attention_mask"]
        if hasattr(model, "logit_bias"):  # SigLIP: texts of one length, without a mask
            text = model.config.text_config
            padding = getattr(text, "pad_token_id", None) or 0
            caption = {"input_ids": torch.tensor([ids + [padding] * (text.max_position_embeddings - len(ids))])}
        else:
            caption = {"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([mask])}
        found = [model.get_image_features(**picture), model.get_text_features(**caption)]
        vectors = [value if isinstance(value, Tensor) else value.pooler_output for value in found]
        return vectors[0][0] / vectors[0][0].norm(), vectors[1][0] / vectors[1][0].norm()


def _softmax_outputs(own: Tensor, captions: Tensor, pictures: Tensor) -> Outputs:
    by_caption, by_picture = -torch.logsumexp(captions - own, 0), -torch.logsumexp(pictures - own, 0)
    probability = (torch.sigmoid(by_caption) + torch.sigmoid(by_picture)) / 2
    return Outputs(by_caption + by_picture, 1 - probability.detach())


def _sigmoid_outputs(own: Tensor, captions: Tensor, pictures: Tensor, bias: Tensor) -> Outputs:
    logsigmoid = torch.nn.functional.logsigmoid
    log_p = logsigmoid(own + bias) + logsigmoid(-(captions + bias)).sum() + logsigmoid(-(pictures + bias)).sum()
    log_p = log_p.reshape(())
    return Outputs(log_p - torch.log1p(-log_p.exp()), (1 - log_p.exp()).detach())


class AudioClassification(Kit):
    def rows(self) -> list[Row]:
        return [{**self.sound(number), "labels": self.integer(N_LABELS)} for number in range(N_ROWS)]

    def sound(self, number: int) -> Row:
        n_samples = (2000, 2600, 1600, 2300)[number]
        if self.type == "audio-spectrogram-transformer":
            return {"input_values": self.normal(self.config.max_length, self.config.num_mel_bins).tolist()}
        if self.type == "whisper":
            return {"input_features": self.normal(self.config.num_mel_bins, 2 * self.config.max_source_positions).tolist()}
        if "input_values" in self.accepted:
            return {"input_values": self.normal(n_samples).tolist()}
        width = getattr(self.config, "feature_projection_input_dim", None) or getattr(self.config, "num_mel_bins", 16)
        return {"input_features": self.normal(20 + 4 * number, width).tolist()}


class CTC(AudioClassification):
    def rows(self) -> list[Row]:
        rows = [{**self.sound(number), "labels": self.ids(2 + number % 2)} for number in range(N_ROWS)]
        if self.type.startswith(("lasr", "parakeet")):  # whose losses need a mask
            rows = [{**row, "attention_mask": [1] * len(row["input_features"])} for row in rows]
        return rows

    def outputs(self, result: Any, row: Row) -> Outputs:
        """Return log p / (1 - p) of the transcript, p being CTC's sum over alignments."""
        log_probabilities = torch.log_softmax(result.logits[0], dim=-1)
        nll = torch.nn.functional.ctc_loss(
            log_probabilities.unsqueeze(1),
            torch.tensor([row["labels"]]),
            torch.tensor([len(log_probabilities)]),
            torch.tensor([len(row["labels"])]),
            blank=self.config.pad_token_id,
            reduction="sum",
        )
        log_p = -nll
        return Outputs(log_p - torch.log1p(-log_p.exp()), (1 - log_p.exp()).detach(), nll.detach())


class SpeechToText(AudioClassification):
    def rows(self) -> list[Row]:
        return [{**self.sound(number), "labels": self.ids(n)} for number, n in enumerate(TARGET_LENGTHS)]

    def outputs(self, result: Any, row: Row) -> Outputs:
        return mean_margins(result.logits[0][-len(row["labels"]) :], row["labels"])
