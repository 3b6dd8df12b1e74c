r"""Model output functions of language models: log-odds of tokens, what a decoder reads, and virtual tokens of PEFT.

With scored tokens t of an example, $f_t = \text{logit}_{y_t} - \text{logsumexp}_{v \ne y_t}\,\text{logit}_v = \log\frac{p_t}{1 - p_t}$ and

    reduction="mean"   f = (1/T) Σ_t f_t
    reduction="sum"    f = Σ_t f_t
    out_to_loss        Q = (1/T) Σ_t (1 − p_t), for either

The loss of an example is $L = -\sum_t \log p_t$ (or its mean), and $-\partial L/\partial f_t = 1 - p_t$. So $-\nabla L = \sum_t (1 - p_t) \nabla f_t$,
of which Q ∇f is what is left when every token is given the mean of the weights: exact where p_t is the same for all tokens.

With `token_out_to_loss="exact"`, for reduction="sum", training examples have

    feature            ∇ Σ_t sg(1 − p_t) f_t = −∇L, where sg stops the gradient
    out_to_loss        1

and queries f = Σ_t f_t and its gradient, as ever. The Gram matrix is then that of −∇L, and `output` is Σ_t f_t on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from hf_trak.tasks.base import Task
from hf_trak.tasks.outputs import call_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_AS_KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")  # these have no logits


def with_virtual_tokens(task: Task, model: Any) -> Task:
    """Return the task of a model with its learned prompt: rows are cut so that both fit, and the prompt's own logits are not scored.

    Raises:
        ValueError: If the task is question answering: PEFT does not move the answer's position behind the prompt.
    """
    config = getattr(model, "active_peft_config", None)
    if config is None or not getattr(config, "is_prompt_learning", False):
        return task
    n_tokens = int(config.num_virtual_tokens)
    inputs: Any = task.inputs
    limit = getattr(inputs, "positions", None)
    if limit is not None:
        if limit <= n_tokens:
            raise ValueError(
                f"The model has {limit} positions, which its {n_tokens} virtual tokens ({_name(config)}) fill: no row fits behind them."
            )
        inputs = replace(inputs, positions=limit - n_tokens)
    if _name(config) in _AS_KEYS_AND_VALUES:
        return replace(task, inputs=inputs)
    if task.name == "question-answering":
        raise ValueError(
            f"Question answering with a learned prompt ({_name(config)}) is not served: PEFT puts {n_tokens} virtual tokens in front of a row "
            "and leaves the answer's position where it was. State the positions that you trained on with `Task.custom`."
        )
    function = task.output_function
    # An encoder's prompt has no logits: those are of the decoder.
    if isinstance(function, TokenOutput) and task.name != "seq2seq":
        function = replace(function, n_virtual_tokens=n_tokens)
    return replace(task, inputs=inputs, output_function=function)


def _name(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


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
        exact (`bool`): Weigh each token's gradient by its 1 − p, so that out-to-loss is 1; the output's value stays the same.
    """
    counts = scored.sum(1)
    zero = margins.new_zeros(())
    total = torch.where(scored, margins, zero).sum(1)
    wrong = torch.where(scored, torch.sigmoid(-margins.detach()), zero)  # 1 − p = σ(−margin)
    if exact:
        weighted = (wrong * torch.where(scored, margins, zero)).sum(1)
        if reduction == "mean":
            total, weighted = total / counts.clamp(min=1), weighted / counts.clamp(min=1)
        return total.detach() + (weighted - weighted.detach()), (counts > 0).to(total.dtype)
    counts = counts.clamp(min=1)
    return (total / counts if reduction == "mean" else total), wrong.sum(1) / counts


@dataclass(frozen=True)
class Reduced:
    """What outputs over several tokens have in common.

    Args:
        reduction (`str`): "mean" or "sum" over an example's scored tokens.
        exact (`bool`): Whether gradients are those of training examples with `token_out_to_loss="exact"`.
    """

    reduction: str = "mean"
    exact: bool = False

    def for_queries(self) -> Reduced:
        """Return the output that queries have."""
        return replace(self, exact=False)


@dataclass(frozen=True)
class TokenOutput(Reduced):
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
        labels = self.targets(labels)
        scored = labels != IGNORED
        return reduce_tokens(token_margins(logits, labels.where(scored, 0)), scored, self.reduction, exact=self.exact)

    def targets(self, labels: Int64[Tensor, "batch tokens"]) -> Int64[Tensor, "batch tokens"]:
        """Return the label that each position's logits are about. Labels move, not logits, which would be copied."""
        return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1) if self.shifted else labels


@dataclass(frozen=True)
class SpanOutput(Reduced):
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
