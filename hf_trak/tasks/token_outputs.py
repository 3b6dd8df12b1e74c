r"""Model output functions of language models: log-odds of tokens, reduced to one number per example.

With scored tokens t of an example, $f_t = \text{logit}_{y_t} - \text{logsumexp}_{v \ne y_t}\,\text{logit}_v = \log\frac{p_t}{1 - p_t}$ and

    reduction="mean"   f = (1/T) Σ_t f_t
    reduction="sum"    f = Σ_t f_t
    out_to_loss        Q = (1/T) Σ_t (1 − p_t), for either

The loss of an example is $-\sum_t \log p_t$ (or its mean), and $-\partial L/\partial f_t = 1 - p_t$. So its gradient is Σ_t (1 − p_t) ∇f_t,
of which Q ∇f is what is left when every token is given the mean of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

IGNORED = -100
"""The label of a token that is not scored."""

_NOT_INPUTS = ("labels", "start_positions", "end_positions")


class _LogOdds(torch.autograd.Function):
    """The log-odds of one entry of the last axis. Of the vocabulary's size, it keeps nothing but the logits themselves.

    Plain operations would keep a masked copy and its softmax beside the logits, for a vocabulary of 250,000 tokens the larger part of
    a batch's memory.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        index = labels.unsqueeze(-1)
        masked = logits.scatter(-1, index, float("-inf"))
        most = masked.amax(-1, keepdim=True)
        others = masked.sub_(most).exp_().sum(-1).log() + most.squeeze(-1)
        return logits.gather(-1, index).squeeze(-1) - others, others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grads: Tensor, _: Any) -> tuple[Tensor, None]:
        logits, labels, others = ctx.saved_tensors
        index, grads = labels.unsqueeze(-1), grads.unsqueeze(-1)
        # onehot − softmax over the others
        result = logits.scatter(-1, index, float("-inf")).sub_(others.unsqueeze(-1)).exp_().mul_(-grads)
        return result.scatter_(-1, index, grads), None


def token_margins(logits: Float[Tensor, "*batch vocabulary"], labels: Int64[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""Return the log-odds $\log\frac{p_t}{1 - p_t}$ of every label, in at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _LogOdds.apply(logits, labels)[0]


def reduce_tokens(
    margins: Float[Tensor, "batch tokens"], scored: Tensor, reduction: str
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return the output and out-to-loss of each example from its own scored tokens."""
    counts = scored.sum(1)
    zero = margins.new_zeros(())
    total = torch.where(scored, margins, zero).sum(1)
    wrong = torch.where(scored, torch.sigmoid(-margins.detach()), zero).sum(1) / counts  # 1 − p = σ(−margin)
    return (total / counts if reduction == "mean" else total), wrong


@dataclass(frozen=True)
class TokenOutput:
    """Log-odds of the tokens in `labels`.

    Args:
        reduction (`str`): "mean" or "sum" over an example's scored tokens.
        shifted (`bool`): Whether a position's logits are about the next token, as a causal language model's are.
        decodes (`bool`): Whether the model may keep a cache of keys and values, for which there is no use here.
    """

    reduction: str = "mean"
    shifted: bool = False
    decodes: bool = False

    def __call__(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return f and Q of every example."""
        logits = _run(model, batch, **({"use_cache": False} if self.decodes else {})).logits
        labels = batch["labels"]
        if self.shifted:  # labels move, not logits, which would be copied
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
        scored = labels != IGNORED
        return reduce_tokens(token_margins(logits, labels.where(scored, 0)), scored, self.reduction)


@dataclass(frozen=True)
class SpanOutput:
    """Log-odds of an answer's first and of its last token among the example's own tokens: their mean, or sum.

    Differs from transformers' loss, whose softmax also runs over padding, so that it depends on the batch.
    """

    reduction: str = "mean"

    def __call__(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return f and Q of every example."""
        result = _run(model, batch)
        logits = torch.stack([result.start_logits, result.end_logits], 1)  # (batch, 2, tokens)
        if "attention_mask" in batch:
            logits = logits.masked_fill(~batch["attention_mask"].bool().unsqueeze(1), float("-inf"))
        positions = torch.stack([batch["start_positions"], batch["end_positions"]], 1)
        return reduce_tokens(token_margins(logits, positions), torch.ones_like(positions, dtype=torch.bool), self.reduction)


def _run(model: Callable[..., Any], batch: Mapping[str, Any], **options: Any) -> Any:
    return model(**{key: value for key, value in batch.items() if key not in _NOT_INPUTS}, **options)
