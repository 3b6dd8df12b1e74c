"""Tiny random models of the zoo."""

from __future__ import annotations

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from tests.zoo.configs import N_LABELS, tiny_config

NO_GRADIENT_IN_EVALUATION = ("rwkv", "reformer")
"""Model types whose own code forbids, or breaks, a backward pass in evaluation mode: the reference runs in training mode, without dropout."""


def build_model(task: str, model_type: str, class_name: str) -> PreTrainedModel:
    """Return a model whose every parameter is random: none hides a wrong gradient behind the value it starts from."""
    torch.manual_seed(0)
    config = tiny_config(model_type, task)
    cls = getattr(transformers, class_name)
    if cls.config_class is not None and type(config) is not cls.config_class:
        text = config.get_text_config()  # some mappings name the class of a composite's text model
        if isinstance(text, cls.config_class):
            text.num_labels = N_LABELS
            config = text
    model = cls(config)
    model.train(model_type in NO_GRADIENT_IN_EVALUATION)
    if model.training:
        _without_dropout(model)
    _perturb(model)
    return model


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_probs_dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and module.weight.requires_grad:
            module.weight[module.padding_idx] = 0  # as its gradient is
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
        if name.endswith("running_var"):
            buffer.mul_(1 + 0.2 * torch.rand(buffer.shape, generator=generator))
