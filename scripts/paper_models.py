"""Models of the paper's settings that transformers does not have: ResNet-9, and BERT with a linear pooler.

Whoever imports this file can load their checkpoints by name.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from hf_trak.sources.checkpoints import register_model_class


class ResNet9Config(PreTrainedConfig):
    """Configuration of [`ResNet9ForImageClassification`].

    Args:
        width (`int`): Channels of the first convolution; the others are two and four times as wide. The paper's is 64.
        num_channels (`int`): Of an image.
        logit_scale (`float`): Factor of the logits; below 1, it keeps an early network from being sure of itself.
    """

    model_type = "hf_trak_resnet9"

    def __init__(self, width: int = 64, num_channels: int = 3, logit_scale: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.num_channels = num_channels
        self.logit_scale = logit_scale


class _Block(nn.Module):
    """Convolution, batch normalization, ReLU."""

    def __init__(self, d_in: int, d_out: int, *, kernel_size: int = 3, stride: int = 1, padding: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(d_in, d_out, kernel_size, stride=stride, padding=padding, bias=False)
        self.normalization = nn.BatchNorm2d(d_out)

    def forward(self, hidden: Float[Tensor, "batch d_in height width"]) -> Float[Tensor, "batch d_out height2 width2"]:
        return self.normalization(self.convolution(hidden)).relu()


class _Residual(nn.Module):
    """Two blocks, added to their input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = _Block(dim, dim)
        self.second = _Block(dim, dim)

    def forward(self, hidden: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return hidden + self.second(self.first(hidden))


class ResNet9ForImageClassification(PreTrainedModel):
    """Eight convolutions and a linear layer, for images of about 32 × 32 pixels (12 × 12 at least)."""

    config_class = ResNet9Config
    config: ResNet9Config
    main_input_name = "pixel_values"

    def __init__(self, config: ResNet9Config) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        narrow, middle, wide = config.width, 2 * config.width, 4 * config.width
        self.stem = _Block(config.num_channels, narrow)
        self.down = _Block(narrow, middle, kernel_size=5, stride=2, padding=2)
        self.residual_1 = _Residual(middle)
        self.widen = _Block(middle, wide)
        self.residual_2 = _Residual(wide)
        self.narrow = _Block(wide, middle, padding=0)
        self.classifier = nn.Linear(middle, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        pixel_values: Float[Tensor, "batch channels height width"],
        labels: Int64[Tensor, " batch"] | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Tensor, ...]:
        """Return logits, and the mean cross-entropy if there are labels."""
        hidden = self.residual_1(self.down(self.stem(pixel_values)))
        hidden = self.residual_2(F.max_pool2d(self.widen(hidden), 2))
        pooled = self.narrow(hidden).amax((2, 3))
        logits = self.classifier(pooled) * self.config.logit_scale
        loss = F.cross_entropy(logits, labels) if labels is not None else None
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as torch does: uniform, with variance one third of the fan-in's inverse."""
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.reset_parameters()


AutoConfig.register(ResNet9Config.model_type, ResNet9Config)
AutoModelForImageClassification.register(ResNet9Config, ResNet9ForImageClassification)


class BertWithoutTanhForSequenceClassification(BertForSequenceClassification):
    """`BertForSequenceClassification` whose pooler has no tanh; it loads the same checkpoints.

    Source: Park et al. (2023), [TRAK](https://huggingface.co/papers/2303.14186), appendix on the models' architectures.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert.pooler.activation = nn.Identity()


register_model_class(ResNet9ForImageClassification)
register_model_class(BertWithoutTanhForSequenceClassification)
