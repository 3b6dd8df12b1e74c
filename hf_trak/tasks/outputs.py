"""Model output functions: f(z; θ) and out-to-loss of each example, from the model's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.tasks.calls import call_model, logits_of


def margin(logits: Float[Tensor, "batch classes"], labels: Int64[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    r"""Return $\text{logit}_y - \text{logsumexp}_{c \ne y}\,\text{logit}_c = \log\frac{p_y}{1 - p_y}$ of each example.

    Source: Park et al. (2023), [TRAK](https://huggingface.co/papers/2303.14186), section 3.3.
    """
    correct = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), float("-inf")).logsumexp(1)
    return correct - others


def classification_margin(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The margin, and 1 − p of the label, in at least float32."""
    output = margin(logits_of(call_model(model, batch)), batch["labels"])
    return output, torch.sigmoid(-output.detach())  # 1 − p = σ(−margin), exact where p rounds to 1


def regression_prediction(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The prediction ŷ, and y − ŷ."""
    output = logits_of(call_model(model, batch)).squeeze(-1)
    return output, batch["labels"].to(output.dtype) - output.detach()


def sum_of_log_odds(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    r"""The sum over labels of the log-odds of each being as the row has it, and the mean of their 1 − p; for several labels per example.

    With $y_j$ of 0 or 1, $f = \sum_j (2 y_j - 1)\,\text{logit}_j$. A label that does not apply counts as one that does: its log-odds are
    those of its absence. The training loss is $\sum_j \log(1 + e^{-f_j})$, or its mean.
    """
    logits = logits_of(call_model(model, batch))
    each = (2 * batch["labels"].to(logits.dtype) - 1) * logits
    return each.sum(-1), torch.sigmoid(-each.detach()).mean(-1)
