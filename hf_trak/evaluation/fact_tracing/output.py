r"""The model output of fact tracing: the log-odds of the answer's tokens, as TRAK has it, or minus the loss, as TracIn has it.

The log-odds of token t are $\text{logit}_t - \text{logsumexp}_{c \ne t}\,\text{logit}_c = \log\frac{p_t}{1 - p_t}$; of an example, their
mean over the scored tokens. Source: `NLPModelOutput` in the early history of MadryLab/trak.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.evaluation.fact_tracing.encoding import IGNORED, Encoder
from hf_trak.tasks import Task, token_margins

if TYPE_CHECKING:
    from datasets import Dataset, Features

OUTPUTS = ("log_odds", "log_probability")


def fact_task(encoder: Encoder, *, output: str = "log_odds", reduction: str = "mean") -> Task:
    """Return the task whose output is about a masked sentence's answer.

    Args:
        encoder (`Encoder`): Says which tokens are scored.
        output (`"log_odds"` or `"log_probability"`): The latter is minus the loss, and its `out_to_loss` is 1.
        reduction (`"mean"` or `"sum"`): Over the scored tokens.

    Raises:
        ValueError: If an option is none of these.
    """
    if output not in OUTPUTS:
        raise ValueError(f"`output` must be one of {', '.join(OUTPUTS)}, but is {output!r}.")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"`reduction` must be 'mean' or 'sum', but is {reduction!r}.")

    def output_function(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return answer_output(model(**inputs, use_cache=False).logits, batch["labels"], output=output, reduction=reduction)

    scored = f"{'+sentinel' * encoder.score_sentinel}{'+eos' * encoder.score_eos}"
    name = f"fact-tracing:{reduction} {output} of answer{scored}"
    kind = "mean_one_minus_p" if output == "log_odds" else "one"
    return Task(name, FactInputs(encoder), output_function, needs_labels=False, out_to_loss_kind=kind)


def answer_output(
    logits: Float[Tensor, "batch tokens vocabulary"], labels: Int64[Tensor, "batch tokens"], *, output: str, reduction: str
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return the output and `out_to_loss` of each example; tokens whose label is -100 are not scored."""
    scored = labels != IGNORED
    margins = token_margins(logits, labels.masked_fill(~scored, 0))
    wrong = torch.sigmoid(-margins.detach())  # 1 - p
    # log p = log sigmoid(margin), so that one function of the logits serves both
    values, out_to_loss = (margins, wrong) if output == "log_odds" else (F.logsigmoid(margins), torch.ones_like(margins))
    weights = scored.to(values.dtype)
    mean_weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
    output_weights = weights if reduction == "sum" else mean_weights
    return (values * output_weights).sum(1), (out_to_loss * mean_weights).sum(1).detach()


def token_loss(logits: Float[Tensor, "batch tokens vocabulary"], labels: Int64[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
    """Return the mean cross-entropy over all scored tokens of a batch: what is trained on."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


_COLUMNS = ("inputs_pretokenized", "targets_pretokenized")


@dataclass(frozen=True)
class FactInputs:
    """The columns of FTRACE, through a tokenizer; how [`Task`] sees an [`Encoder`]."""

    encoder: Encoder

    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError if a text column is missing."""
        if absent := [column for column in _COLUMNS if column not in features]:
            raise ValueError(f"Fact tracing needs {', '.join(absent)}, but the dataset has {', '.join(features)}.")

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Sentences and their answers are made by the protocol, which checks them."""

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> FactInputs:
        """The columns are known."""
        return self

    def columns_read(self, features: Features) -> dict[str, Any]:
        """Return the columns of texts."""
        return {"text": list(_COLUMNS)}

    def collate(self, rows: Mapping[str, Any], processing_class: Any) -> dict[str, Tensor]:
        """Return the batch of some rows."""
        return self.encoder.batch(*self.encoder.tokens(rows))

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        """Return each row's tokens, of input and target together."""
        inputs, targets = self.encoder.tokens(dataset)
        return [len(row) + len(target) for row, target in zip(inputs, targets, strict=True)]
