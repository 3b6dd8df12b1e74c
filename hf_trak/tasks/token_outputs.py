r"""Model output functions of language models: log-odds of tokens, reduced to one number per example.

With scored tokens t of an example, $f_t = \text{logit}_{y_t} - \text{logsumexp}_{v \ne y_t}\,\text{logit}_v = \log\frac{p_t}{1 - p_t}$ and

    reduction="mean"   f = (1/T) Σ_t f_t
    reduction="sum"    f = Σ_t f_t
    out_to_loss        Q = (1/T) Σ_t (1 − p_t), for either

The loss of an example is $L = -\sum_t \log p_t$ (or its mean), and $-\partial L/\partial f_t = 1 - p_t$. So $-\nabla L = \sum_t (1 - p_t) \nabla f_t$,
of which Q ∇f is what is left when every token is given the mean of the weights: exact where p_t is the same for all tokens.

With `token_out_to_loss="exact"`, for reduction="sum", training examples have

    feature            ∇ Σ_t sg(1 − p_t) f_t = −∇L, where sg stops the gradient
    out_to_loss        1

and queries f = Σ_t f_t and its gradient, as ever. The kernel is then that of −∇L, and `output` is Σ_t f_t on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.tasks.calls import call_model

IGNORED = -100
"""The label of a token that is not scored."""

# Logits copied at one time: what fits the cache; a GPU is kept busy with more.
_PIECE, _PIECE_ON_CUDA = 1 << 18, 1 << 26


def _pieces(values: Tensor, *, like: Tensor) -> tuple[Tensor, ...]:
    """Cut the rows that belong to the rows of some logits into pieces, at least one."""
    piece = _PIECE_ON_CUDA if like.is_cuda else _PIECE
    return values.split(max(1, piece // like.shape[-1]))


def _logsumexp_of_others(logits: Float[Tensor, "rows vocabulary"], index: Int64[Tensor, "rows 1"]) -> Float[Tensor, " rows"]:
    masked = logits.scatter(-1, index, float("-inf"))
    most = masked.amax(-1, keepdim=True)
    return masked.sub_(most).exp_().sum(-1).log() + most.squeeze(-1)


class _LogOdds(torch.autograd.Function):
    """The log-odds of one entry of the last axis. Of the vocabulary's size, it keeps nothing but the logits themselves.

    Plain operations would keep a masked copy and its softmax beside the logits, for a vocabulary of 250,000 tokens the larger part of
    a batch's memory.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        index = labels.unsqueeze(-1)
        pieces = zip(*(_pieces(values.reshape(-1, values.shape[-1]), like=logits) for values in (logits, index)), strict=True)
        others = torch.cat([_logsumexp_of_others(*piece) for piece in pieces]).view(labels.shape)
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
    margins: Float[Tensor, "batch tokens"], scored: Tensor, reduction: str, *, exact: bool = False
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return the output and out-to-loss of each example from its own scored tokens; both are 0 where there is none.

    Args:
        exact (`bool`): Weigh each token's gradient by its 1 − p, so that out-to-loss is 1; the output's value is that of the sum.
    """
    counts = scored.sum(1)
    zero = margins.new_zeros(())
    total = torch.where(scored, margins, zero).sum(1)
    wrong = torch.where(scored, torch.sigmoid(-margins.detach()), zero)  # 1 − p = σ(−margin)
    if exact:
        weighted = (wrong * torch.where(scored, margins, zero)).sum(1)
        return total.detach() + (weighted - weighted.detach()), (counts > 0).to(total.dtype)
    counts = counts.clamp(min=1)
    return (total / counts if reduction == "mean" else total), wrong.sum(1) / counts


@dataclass(frozen=True)
class _Reduced:
    """What outputs over several tokens have in common.

    Args:
        reduction (`str`): "mean" or "sum" over an example's scored tokens.
        exact (`bool`): Whether gradients are those of training examples with `token_out_to_loss="exact"`.
    """

    reduction: str = "mean"
    exact: bool = False

    def for_queries(self) -> _Reduced:
        """Return the output that queries have."""
        return replace(self, exact=False)


@dataclass(frozen=True)
class TokenOutput(_Reduced):
    """Log-odds of the tokens in `labels`.

    Args:
        reduction (`str`): "mean" or "sum" over an example's scored tokens.
        exact (`bool`): Whether gradients are those of training examples with `token_out_to_loss="exact"`.
        shifted (`bool`): Whether a position's logits are about the next token, as a causal language model's are.
        decodes (`bool`): Whether the model may keep a cache of keys and values, for which there is no use here.
        n_virtual_tokens (`int`): Positions of a learned prompt in front of a row's own, which have logits and no labels.
    """

    shifted: bool = False
    decodes: bool = False
    n_virtual_tokens: int = 0

    def __call__(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return f and Q of every example."""
        logits = call_model(model, batch, **({"use_cache": False} if self.decodes else {})).logits
        labels = batch["labels"]
        if logits.shape[0] != labels.shape[0] or logits.shape[1] != labels.shape[1] + self.n_virtual_tokens:
            raise ValueError(
                f"The model returns logits of shape {tuple(logits.shape)} for labels of shape {tuple(labels.shape)}"
                f"{f' behind {self.n_virtual_tokens} virtual tokens' * bool(self.n_virtual_tokens)}, so that positions and labels cannot be "
                "matched. Make a task with `Task.custom`."
            )
        if self.n_virtual_tokens:
            logits = logits[:, self.n_virtual_tokens :]
        if self.shifted:  # labels move, not logits, which would be copied
            labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
        scored = labels != IGNORED
        return reduce_tokens(token_margins(logits, labels.where(scored, 0)), scored, self.reduction, exact=self.exact)


@dataclass(frozen=True)
class SpanOutput(_Reduced):
    """Log-odds of an answer's first and of its last token among the example's own tokens: their mean, or sum.

    Differs from transformers' loss, whose softmax also runs over padding, so that it depends on the batch.
    """

    def __call__(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return f and Q of every example."""
        result = call_model(model, batch)
        logits = torch.stack([result.start_logits, result.end_logits], 1)  # (batch, 2, tokens)
        if "attention_mask" in batch:
            logits = logits.masked_fill(~batch["attention_mask"].bool().unsqueeze(1), float("-inf"))
        positions = torch.stack([batch["start_positions"], batch["end_positions"]], 1)
        scored = positions != IGNORED
        return reduce_tokens(token_margins(logits, positions.where(scored, 0)), scored, self.reduction, exact=self.exact)
