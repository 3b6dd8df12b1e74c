"""Rows, single inputs and reference outputs of the tasks whose labels belong to tokens, texts or pictures."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.zoo.configs import N_LABELS, VOCABULARY

N_ROWS = 4
LENGTHS = (9, 14, 6, 11)
TARGET_LENGTHS = (5, 3, 8, 6)
Row = dict[str, Any]


class Outputs(NamedTuple):
    """What one row should give: the output, 1 - p, and -log p, which the model's own loss is where it returns one."""

    output: Tensor
    one_minus_p: Tensor
    nll: Tensor | None = None


def mean_margins(logits: Tensor, labels: Sequence[int]) -> Outputs:
    """Return the mean over labels, but for -100, of logit_y - logsumexp(others)."""
    margins = [
        row[label] - torch.logsumexp(torch.cat([row[:label], row[label + 1 :]]), 0)
        for row, label in zip(logits, labels, strict=True)
        if label != -100
    ]
    margin = torch.stack(margins)
    known = margin.detach()
    return Outputs(margin.mean(), torch.sigmoid(-known).mean(), -torch.nn.functional.logsigmoid(known).mean())


class Kit:
    """Rows of a task for one model, and what the model gives for each alone, without padding."""

    def __init__(self, model: PreTrainedModel, model_type: str) -> None:
        self.model, self.type, self.config = model, model_type, model.config
        self.accepted = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(7)
        self.vocabulary = self._vocabulary()
        reserved = _special_ids(model.config)
        usable = [token for token in range(4, min(self.vocabulary, 85)) if token not in reserved]
        self.usable = usable or list(range(1, self.vocabulary))

    def _vocabulary(self) -> int:
        try:
            size = getattr(self.config.get_text_config(), "vocab_size", None)
        except ValueError:  # several texts
            size = None
        return size if isinstance(size, int) and size > 1 else VOCABULARY

    def rows(self) -> list[Row]:
        raise NotImplementedError

    def inputs(self, row: Row) -> dict[str, Tensor]:
        """Return what the model is given for one row, labels included, so that its own loss comes along."""
        labels = {name: torch.tensor([row[name]]) for name in ("labels", "start_positions", "end_positions") if name in row}
        return {**self.single(row), **labels}

    def outputs(self, result: Any, row: Row) -> Outputs:
        return mean_margins(result.logits, [row["labels"]])

    def reference_outputs(
        self, model: PreTrainedModel, rows: Sequence[Row], dtype: torch.dtype
    ) -> Iterator[tuple[Outputs, Tensor | None]]:
        """Yield each row's outputs, and the model's own loss."""
        for row in rows:
            inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in self.inputs(row).items()}
            result = model(**inputs)
            yield self.outputs(result, row), getattr(result, "loss", None)

    def single(self, row: Row) -> dict[str, Tensor]:
        names = [name for name in row if name in self.accepted and name not in ("labels", "start_positions", "end_positions")]
        return {name: torch.as_tensor(row[name]).unsqueeze(0) for name in names}

    # Random material ----------------------------------------------------------------------------------------------------------

    def ids(self, n: int) -> list[int]:
        places = torch.randint(len(self.usable), (n,), generator=self.generator).tolist()
        return [self.usable[place] for place in places]

    def integer(self, high: int) -> int:
        return int(torch.randint(high, (1,), generator=self.generator))

    def integers(self, high: int, n: int) -> list[int]:
        return torch.randint(high, (n,), generator=self.generator).tolist()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def end_token(self) -> int | None:
        try:
            value = getattr(self.config.get_text_config(), "eos_token_id", None)
        except ValueError:
            return None
        return value if isinstance(value, int) and 0 <= value < self.vocabulary else None

    def lengths(self) -> tuple[int, ...]:
        if self.type == "reformer" or (self.type == "perceiver" and type(self.model).__name__.endswith("MaskedLM")):
            return (16,) * N_ROWS  # the only length they take
        if self.type == "xlstm":
            return (8, 16, 8, 16)  # whole chunks
        return LENGTHS

    def text(self, n: int) -> Row:
        ids = self.ids(n)
        if self.config.is_encoder_decoder and (end := self.end_token()) is not None:
            ids[-1] = end
        if self.type == "longformer":  # questions end with </s></s>, texts with </s>
            ids[2] = ids[3] = ids[n - 1] = 3
        return {"input_ids": ids, "attention_mask": [1] * n, **self._layout(n)}

    def _layout(self, n: int) -> Row:
        """Return the columns that models of documents and of tables read beside the tokens."""
        if self.type in ("layoutlm", "bros", "lilt", "layoutlmv3", "layoutlmv2", "udop"):
            boxes = torch.randint(1, 900, (n, 2, 2), generator=self.generator).sort(dim=1).values.reshape(n, 4)
            scale = {"bros": 1000, "udop": 1024}.get(self.type)  # UDOP rounds multiples of them, which are exact so
            return {"bbox": (boxes / scale if scale else boxes).tolist()}
        if self.type == "tapas":
            return {"token_type_ids": [[0] * 7 for _ in range(n)]}
        return {}


class TextClassification(Kit):
    def rows(self) -> list[Row]:
        return [{**self.text(n), "labels": self.integer(N_LABELS)} for n in self.lengths()]


class TokenClassification(Kit):
    def rows(self) -> list[Row]:
        rows = [{**self.text(n), "labels": self.integers(N_LABELS, n)} for n in self.lengths()]
        for row in rows:
            row["labels"][1] = -100
        return rows

    def outputs(self, result: Any, row: Row) -> Outputs:
        return mean_margins(result.logits[0], row["labels"])


class QuestionAnswering(Kit):
    def rows(self) -> list[Row]:
        rows = []
        for n in self.lengths():
            start, end = sorted(self.integers(n, 2))
            rows.append({**self.text(n), "start_positions": start, "end_positions": end})
        return rows

    def outputs(self, result: Any, row: Row) -> Outputs:
        ends = [
            mean_margins(result.start_logits, [row["start_positions"]]),
            mean_margins(result.end_logits, [row["end_positions"]]),
        ]
        return Outputs(*(torch.stack(values).mean() for values in zip(*ends, strict=True)))


class MaskedLM(Kit):
    def rows(self) -> list[Row]:
        rows = []
        for n in self.lengths():
            labels = [-100] * n
            for place in sorted({1, n - 3, self.integer(n)}):
                labels[place] = self.ids(1)[0]
            rows.append({**self.text(n), "labels": labels})
        return rows

    def outputs(self, result: Any, row: Row) -> Outputs:
        return mean_margins(result.logits[0], row["labels"])


class CausalLM(Kit):
    def rows(self) -> list[Row]:
        rows = []
        for n in self.lengths():
            row = self.text(n)
            labels = list(row["input_ids"])
            labels[2] = -100
            rows.append({**row, "labels": labels})
        return rows

    def outputs(self, result: Any, row: Row) -> Outputs:
        if self.type in ("xlm", "flaubert", "xlnet"):  # which do not shift their labels
            return mean_margins(result.logits[0], row["labels"])
        return mean_margins(result.logits[0, :-1], row["labels"][1:])


class Seq2Seq(CausalLM):
    """Pairs of texts; for models of sound, pictures and text that have one decoder alone, texts as of a causal language model."""

    def rows(self) -> list[Row]:
        if not self.config.is_encoder_decoder:
            return super().rows()
        rows = []
        for n, m in zip(LENGTHS, TARGET_LENGTHS, strict=True):
            labels = self.ids(m)
            if (end := self.end_token()) is not None:
                labels[-1] = end
            rows.append({**self.text(n), "labels": labels})
        return rows

    def inputs(self, row: Row) -> dict[str, Tensor]:
        inputs = super().inputs(row)
        if self.type == "fsmt":  # does not shift its labels
            inputs["decoder_input_ids"] = torch.tensor([[self.config.decoder_start_token_id, *row["labels"][:-1]]])
        return inputs

    def outputs(self, result: Any, row: Row) -> Outputs:
        if not self.config.is_encoder_decoder:
            return super().outputs(result, row)
        return mean_margins(result.logits[0][-len(row["labels"]) :], row["labels"])


class MultipleChoice(Kit):
    def rows(self) -> list[Row]:
        rows = []
        for n in self.lengths():
            texts = [self.text(n) for _ in range(3)]
            rows.append({**{name: [text[name] for text in texts] for name in texts[0]}, "labels": self.integer(3)})
        return rows


def _special_ids(config: PreTrainedConfig) -> set[int]:
    found: set[int] = set()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found |= _special_ids(value)
        elif re.search(r"(token_id|token_index|_id|token)s?$", name):
            values = value if isinstance(value, list | tuple) else [value]
            found |= {one for one in values if isinstance(one, int) and not isinstance(one, bool)}
    return found
