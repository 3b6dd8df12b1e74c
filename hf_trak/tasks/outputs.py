"""Model output functions: how a model is called, and f(z; θ) and out-to-loss of each example from its logits.

transformers 5 looks at the values of a 2-D attention mask to skip masking where it can; a value inside `vmap` cannot be looked at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn


_TRACEABLE = ("sdpa", "eager")
_ALWAYS = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


@contextmanager
def vmappable_attention(model: nn.Module) -> Iterator[None]:
    """Build masks whole and never inspect them, in plain or scaled-dot-product attention; restore what was there.

    The implementation keeps its name, by which some models decide what they compute. Of scaled-dot-product attention, the plain form is
    used, for which `vmap` has rules; the fused ones would run example by example. Other models of this process build their masks
    whole meanwhile, which changes no result.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import AttentionMaskInterface, PreTrainedModel

    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model, PreTrainedModel):
        yield
        return
    implementation = model.config._attn_implementation
    is_other = implementation is not None and implementation not in _TRACEABLE
    masks = AttentionMaskInterface()
    before = {name: masks[name] for name in _TRACEABLE}
    if is_other:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    for name, make in before.items():
        AttentionMaskInterface.register(name, _whole(make))
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for name, make in before.items():
            AttentionMaskInterface.register(name, make)
        if is_other:
            model.set_attn_implementation(implementation)


def _whole(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of masks that skips none."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **{**kwargs, **_ALWAYS})

    return mask


APART = "apart"
"""Key of a batch whose rows cannot be computed together; its value says why. Such rows go one at a time."""

NOT_INPUTS = ("labels", "start_positions", "end_positions", APART)


def call_model(model: Callable[..., Any], batch: Mapping[str, Any], **options: Any) -> Any:
    """Return a model's result for a batch, without labels and without a cache of keys and values.

    Raises:
        ValueError: If the rows of the batch cannot share one.
    """
    if APART in batch:
        raise ValueError(f"These rows cannot share a batch: {batch[APART]}. Use gradients='loop' or 'auto' (--gradients loop)")
    if takes(model, "use_cache"):
        options.setdefault("use_cache", False)
    return model(**{key: value for key, value in batch.items() if key not in NOT_INPUTS}, **options)


def takes(model: Any, name: str) -> bool:
    """Whether the `forward` of a model names an argument; False for a callable that is no model."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    forward = getattr(type(model), "forward", None) or getattr(getattr(model, "_model", None), "forward", None)
    return forward is not None and name in inspect.signature(forward).parameters


def logits_of(result: Any) -> Tensor:
    """Return a classifier's logits, in at least float32.

    PP-LCNet returns them as `last_hidden_state`, which is then of shape (batch, classes).

    Raises:
        ValueError: If the result has none.
    """
    logits = getattr(result, "logits", None)
    if logits is None:
        logits = getattr(result, "last_hidden_state", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = ", ".join(result) if isinstance(result, Mapping) else type(result).__name__
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise ValueError(
            f"Expected logits of shape (batch, classes), but the model returns {found}{shape}. Make a task with `Task.custom`."
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
    those of its absence. The training loss is $\sum_j \log(1 + e^{-f_j})$, or its mean. A label of ½ is not asked about: it adds nothing.
    """
    logits = logits_of(call_model(model, batch))
    signs = 2 * batch["labels"].to(logits.dtype) - 1
    each, asked = signs * logits, signs.ne(0)
    return each.sum(-1), (torch.sigmoid(-each.detach()) * asked).sum(-1) / asked.sum(-1)


def sum_of_log_p(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The sum over labels of log p of each being as the row has it, minus the training loss; and 1."""
    logits = logits_of(call_model(model, batch))
    each = torch.nn.functional.logsigmoid((2 * batch["labels"].to(logits.dtype) - 1) * logits)
    return each.sum(-1), each.new_ones(len(each))
