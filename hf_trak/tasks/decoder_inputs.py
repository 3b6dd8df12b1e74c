"""What a decoder reads for some labels: the model's own rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_trak.tasks.token_outputs import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_METHODS = ("prepare_decoder_input_ids_from_labels", "_shift_right")


@dataclass(frozen=True)
class DecoderInputs:
    """Labels to the tokens a decoder reads, as the model makes them in training.

    It holds the model's class and configuration and none of its weights, so that it can be pickled.

    Args:
        model_class (`type`): It has the rule as a method, or has none and begins with `start`.
        start (`int`, *optional*): What the decoder reads first, where the class has no method.
        pad_token_id (`int`): What it reads in place of -100, where the class has no method.
    """

    model_class: type
    config: PreTrainedConfig
    start: int | None
    pad_token_id: int

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> DecoderInputs:
        """Read the rule off a model.

        Raises:
            ValueError: If the model's method gives something else without the model's weights, or there is neither a method nor a
                first token.
        """
        configs = (model.config, model.config.get_text_config(decoder=True))
        start, pad = (
            next((value for config in configs if (value := getattr(config, name, None)) is not None), None)
            for name in ("decoder_start_token_id", "pad_token_id")
        )
        result = cls(type(model), model.config, pad if start is None else start, pad or 0)
        name = result._method()
        if name is None:
            if result.start is None:
                raise ValueError(
                    f"{type(model).__name__} does not say what its decoder reads first. Set `config.decoder_start_token_id`, or give rows "
                    "with 'decoder_input_ids'."
                )
            return result
        probe = torch.tensor([[3, 4, 2], [5, IGNORED, 1]])
        try:
            same = torch.equal(result._shift(probe), getattr(model, name)(probe))
        except AttributeError:
            same = False
        if not same:
            raise ValueError(
                f"{type(model).__name__}.{name} needs more of the model than its configuration. Give rows with 'decoder_input_ids'."
            )
        return result

    def _method(self) -> str | None:
        return next((name for name in _METHODS if hasattr(self.model_class, name)), None)

    def _shift(self, labels: Tensor) -> Tensor:
        name = self._method()
        if name is None:
            before = torch.where(labels == IGNORED, self.pad_token_id, labels)[:, :-1]
            return torch.cat([torch.full_like(labels[:, :1], self.start), before], 1)  # type: ignore[arg-type]
        model: Any = object.__new__(self.model_class)
        nn.Module.__init__(model)
        model.config = self.config
        return getattr(model, name)(labels)

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """Return as many tokens as there are labels."""
        if len(labels) == 0:
            return np.zeros(0, dtype=np.int64)
        return self._shift(torch.from_numpy(labels).unsqueeze(0))[0].numpy()
