r"""The training loss as a function of the model output, for methods that need its second derivative.

A task knows its output $f$ and $Q = -\partial L/\partial f$. For a classifier $L = -\log p = \log(1 + e^{-f})$ exactly, since $f$ is
the log-odds of the label; for a regression $L = \frac12 (y - f)^2$.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hf_trak.tasks import Task
from hf_trak.tasks.outputs import classification_margin, regression_prediction


def classification_loss(output: Float[Tensor, " batch"], out_to_loss: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    r"""Return the cross-entropy of each example, $\log(1 + e^{-f})$."""
    return F.softplus(-output)


def regression_loss(output: Float[Tensor, " batch"], out_to_loss: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    r"""Return $\frac12(y - f)^2$ of each example."""
    labels = out_to_loss + output.detach()  # out_to_loss = y - f
    return (labels - output).square() / 2


LOSSES: dict[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]] = {
    classification_margin: classification_loss,
    regression_prediction: regression_loss,
}


def loss_of(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss of a task, as a function of its output and `out_to_loss`; its derivative in the output is -out_to_loss.

    Raises:
        ValueError: If the task's loss is not a function of its output.
    """
    if task.output_function not in LOSSES:
        raise ValueError(
            f"The loss of {task.name} is not known as a function of its output, and this baseline needs its second derivative. "
            "It serves classification and regression; gradient, TracIn, GAS and representation baselines serve any task."
        )
    return LOSSES[task.output_function]
