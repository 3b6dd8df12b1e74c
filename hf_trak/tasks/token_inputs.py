"""Rows to batches where the labels are tokens, or lie on tokens: one class per kind of language model."""

from __future__ import annotations

import abc
import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_trak.config import TrakConfig
from hf_trak.tasks.columns import refuse_unserved
from hf_trak.tasks.inputs import Rows
from hf_trak.tasks.padding import (
    PACKING_COLUMNS,
    as_numbers,
    further_inputs,
    is_along,
    is_packed,
    packed_positions,
    pad_inputs,
    pad_positions,
    position_limit,
    refuse_packed,
    refuse_texts_without_boxes,
    tokenizer_limit,
    vocabulary_size,
)
from hf_trak.tasks.rows import Faults
from hf_trak.tasks.token_outputs import IGNORED, DecoderInputs

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_ROWS_CHECKED_AT_ONCE = 1000
_SENTINEL = re.compile(r"<extra_id_\d+>")
_LOGITS_OF_A_TOKEN = 1 << 15  # a larger vocabulary's tokens count for several, so that a batch's logits stay within memory
_NO_LIMIT = 10**9
# What `_tokens_of` and the subclasses read themselves, and so no further inputs.
_HANDLED = frozenset(
    ("input_ids", "attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask", "start_positions", "end_positions")
)


class Example(NamedTuple):
    """One row as token ids."""

    ids: np.ndarray
    labels: np.ndarray
    """Of the tokens, -100 where none is scored; of a decoder's, if there is one; for a span, its first and last token."""
    further: Mapping[str, np.ndarray] | None = None
    """The model's other inputs: along the tokens, or of one shape in every row."""
    decoder_ids: np.ndarray | None = None
    positions: np.ndarray | None = None
    """Of a packed row's tokens, each in its document."""
    n_cut: int = 0
    """Tokens cut off by the limit on length."""
    unscored: str | None = None
    """Why no token is scored, where it is not that all labels are -100."""
    media: Mapping[str, np.ndarray] | None = None
    """Images and what belongs to them, with the axes of a batch of one."""


@dataclass(frozen=True)
class TokenInputs(abc.ABC):
    """What language models' inputs have in common.

    Padding is taken off and put back on the right, no wider than a batch needs: features depend on neither its side nor its width.
    Every column of a tokenized row that the model's `forward` takes reaches the model.

    Args:
        accepted (`frozenset[str]`): Names the model's `forward` takes.
        pad_token_id (`int`): The model's.
        n_labels (`int`): Of the vocabulary, or of the classes of a token.
        positions (`int`, *optional*): Tokens the model has positions for.
        score_tokens (`str`): "all", or "content": neither special tokens, such as EOS, nor sentinels, such as `<extra_id_0>`.
        loss_on (`str`): "auto", "assistant", "completion" or "all": which tokens of a causal language model's row are scored.
        row_format (`str`): "auto", "alpaca" or "sharegpt": how a causal language model's rows are read.
        in_chunks (`bool`): Whether long texts are cut into chunks (`chunk_overlap`) before they come here.
        skip_unscored (`bool`): Keep rows without any scored token, with a gradient of zero.
        chat_template_kwargs (`dict`, *optional*): Of the chat template.
        decoder (`DecoderInputs`, *optional*): What a decoder reads.
        vocabulary (`int`, *optional*): Token ids that the model has an embedding for.
        vmapped (`bool`): Whether gradients are taken under `vmap`, where packed rows cannot be served.
    """

    task_name: ClassVar[str]

    text_columns: tuple[str, ...] | None
    label_column: str | None
    max_length: int | None
    accepted: frozenset[str]
    pad_token_id: int
    n_labels: int
    positions: int | None = None
    score_tokens: str = "all"
    loss_on: str = "auto"
    row_format: str = "auto"
    in_chunks: bool = False
    skip_unscored: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = field(default=None, compare=False)
    decoder: DecoderInputs | None = field(default=None, compare=False)
    vmapped: bool = False
    vocabulary: int | None = None

    @classmethod
    def for_model(cls, model: PreTrainedModel, config: TrakConfig) -> TokenInputs:
        """Read what is needed off a model and a configuration."""
        text = model.config.get_text_config()
        return cls(
            text_columns=config.text_columns,
            label_column=config.label_column,
            max_length=config.max_length,
            accepted=frozenset(inspect.signature(model.forward).parameters),
            pad_token_id=getattr(text, "pad_token_id", None) or 0,
            n_labels=cls._count_labels(model),
            positions=position_limit(model),
            score_tokens=config.score_tokens,
            loss_on=config.loss_on,
            row_format=cls._format(config),
            in_chunks=config.chunk_overlap is not None,
            skip_unscored=config.skip_unscored,
            chat_template_kwargs=json.loads(config.chat_template_kwargs) if config.chat_template_kwargs else None,
            decoder=cls._decoder(model),
            vmapped=config.gradients == "functional",
            vocabulary=vocabulary_size(model),
        )

    @classmethod
    def _format(cls, config: TrakConfig) -> str:
        if config.row_format != "auto":
            raise ValueError(
                f"row_format={config.row_format!r} (--row_format) is for causal language models of texts: leave it out."
            )
        return config.row_format

    @staticmethod
    def _count_labels(model: PreTrainedModel) -> int:
        return model.config.get_text_config().vocab_size

    @staticmethod
    def _decoder(model: PreTrainedModel) -> DecoderInputs | None:
        return None

    # A dataset's columns.

    def check(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError that names the columns if a dataset cannot serve."""
        if not self._is_tokenized(features):
            refuse_texts_without_boxes(self.accepted)
            self._refuse_formats(features)
            for name, kind in features.items():
                if name in self.accepted and name not in _HANDLED and name != self.label_column and _holds_numbers(kind):
                    raise ValueError(
                        f"The model's `forward` takes {name!r}, which the dataset has, but its rows are texts, so that {name!r} cannot be laid "
                        "along their tokens. Tokenize the dataset first (a column 'input_ids', and the others along it), or remove the column."
                    )
        self._check_columns(features, processing_class)

    @abc.abstractmethod
    def _check_columns(self, features: Features, processing_class: Any) -> None:
        """Raise a ValueError that names the columns if a dataset cannot serve."""

    @abc.abstractmethod
    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        """Return one row's tokens; raise a ValueError that says what is wrong with it."""

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> TokenInputs:
        """Return these inputs: which columns they read is decided by names alone."""
        return self

    def columns_read(self, features: Features) -> dict[str, Any]:
        """Return which columns are read and as what, JSON-able: `{"tokens": [...], "label": ...}`, or `{"text": [...]}` and others."""
        if self._is_tokenized(features):
            tokens = [name for name in features if self._reads(name)]
            label = self._label_of_tokens(features)
            return {"tokens": tokens, "label": label} if label else {"tokens": tokens}
        return self._texts_read(features)

    def _reads(self, name: str) -> bool:
        """Whether a column of tokenized rows is an input."""
        labels = ("labels", "start_positions", "end_positions", self.label_column)
        others = ("input_ids", "attention_mask", "seq_lengths", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
        return (name in self.accepted and name not in labels) or name in others

    def _label_of_tokens(self, features: Features) -> Any:
        label = self.label_column or "labels"
        return label if label in features else None

    @abc.abstractmethod
    def _texts_read(self, features: Features) -> dict[str, Any]:
        """Return which columns are read of rows that are not tokenized."""

    def _refuse_formats(self, features: Features) -> None:
        if self.text_columns is None:
            refuse_unserved(features, self.task_name)

    def _need(self, features: Features, columns: Sequence[str], purpose: str) -> None:
        need_columns(features, columns, purpose)

    def _is_tokenized(self, columns: Sequence[str] | Rows | Features) -> bool:
        return "input_ids" in columns and self.text_columns is None

    # Rows.

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """Encode every row once, before anything is computed, and say how many rows are cut or have no scored token.

        Raises:
            ValueError: Naming all rows that cannot serve, with the reasons, or all that have no scored token.
        """
        faults = Faults(len(dataset))
        further: dict[
            str, tuple[set[Any], set[Any]]
        ] = {}  # of each column, what follows the tokens (False: not along them); whole shapes
        for start in range(0, len(dataset), _ROWS_CHECKED_AT_ONCE):
            rows = dataset[start : min(start + _ROWS_CHECKED_AT_ONCE, len(dataset))]
            for place, row in enumerate(_each(rows)):
                try:
                    example = self._example(row, processing_class)
                except ValueError as error:
                    faults.cannot_serve(start + place, str(error))
                    continue
                if example.n_cut:
                    faults.cut(start + place)
                if (reason := self._unscored(example)) is not None:
                    faults.no_scored_token(start + place, reason)
                for name, array in (example.further or {}).items():
                    along, shapes = further.setdefault(name, (set(), set()))
                    along.add(is_along(array, len(example.ids)) and array.shape[1:])
                    shapes.add(array.shape)
        faults.raise_for_rows()
        for name, (along, shapes) in further.items():
            if len(shapes) > 1 and (len(along) > 1 or False in along):
                first, second, *_ = sorted(shapes)
                raise ValueError(
                    f"The column {name!r}, which the model's `forward` takes, has neither one entry per token in every row nor one shape, but "
                    f"for example {first} in one row and {second} in another. Bring it to one shape in the dataset, or remove the column."
                )
        faults.raise_for_unscored(skip=self.skip_unscored)
        for line in faults.notes(self._describe_limit(processing_class), skip=self.skip_unscored):
            logger.warning(line)

    def collate(self, rows: Rows, processing_class: Any) -> dict[str, Tensor]:
        """Return a batch."""
        return self._pad(list(self._examples(rows, processing_class)))

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int]:
        """Return what a row costs: its tokens, those with logits over a large vocabulary counted as several."""
        times = max(1, self.n_labels // _LOGITS_OF_A_TOKEN)
        return [
            len(example.ids) + len(example.labels) * times if example.decoder_ids is not None else len(example.ids) * times
            for example in self._examples(dataset[:], processing_class)
        ]

    def _examples(self, rows: Rows, processing_class: Any) -> Iterator[Example]:
        for place, row in enumerate(_each(rows)):
            try:
                example = self._example(row, processing_class)
                if (reason := self._unscored(example)) is not None and not self.skip_unscored:
                    raise ValueError(f"{reason}; filter it out, or set skip_unscored=True (--skip_unscored)")
            except ValueError as error:
                raise ValueError(f"Row {place} cannot serve: {error}.") from error
            yield example

    def _example(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        """Return one row's tokens, scored as configured and checked."""
        example = self._encode(row, processing_class)
        if example.unscored is None:
            example = example._replace(labels=self._score(example.labels, processing_class))
        if len(example.ids) == 0:  # without any token it is one of padding, so that it can be part of a batch
            example = Example(
                np.asarray([self.pad_token_id]),
                np.asarray([IGNORED]),
                None
                if example.further is None
                else {name: np.zeros((1, *v.shape[1:]), v.dtype) for name, v in example.further.items()},
                example.decoder_ids,
                unscored=example.unscored or "it has no token",
            )
        if example.decoder_ids is not None and len(example.decoder_ids) == 0:
            example = example._replace(labels=np.asarray([IGNORED]), decoder_ids=np.asarray([self.pad_token_id]))
        self._check(example)
        return example

    def _score(self, labels: np.ndarray, processing_class: Any) -> np.ndarray:
        """Leave out what `score_tokens` does not count."""
        if self.score_tokens == "all":
            return labels
        if processing_class is None:
            raise ValueError(
                'score_tokens="content" needs a tokenizer that knows the special tokens: pass it as `processing_class`'
            )
        special = set(processing_class.all_special_ids)
        kept = [
            value >= 0
            and value not in special
            # mT5's tokenizer does not list its sentinels among the special tokens.
            and not _SENTINEL.search(str(processing_class.convert_ids_to_tokens(int(value))))
            for value in labels.tolist()
        ]
        return np.where(kept, labels, IGNORED)

    def _check(self, example: Example) -> None:
        if self.vocabulary is not None and len(wrong := example.ids[(example.ids < 0) | (example.ids >= self.vocabulary)]):
            raise ValueError(
                f"its input_ids must lie in 0 to {self.vocabulary - 1}, the model's vocabulary, but one is {wrong[0]}; tokenize with the "
                "model's own tokenizer"
            )
        for name, values in (("inputs", example.ids), ("labels", example.labels)):
            if self.positions is not None and len(values) > self.positions and not is_packed(example.positions):
                raise ValueError(
                    f"its {name} are {len(values)} tokens, more than the model's {self.positions} positions; tokenize again with "
                    "`truncation=True`"
                )
            if self.max_length is not None and len(values) > self.max_length:
                raise ValueError(
                    f"its {name} are {len(values)} tokens, more than max_length={self.max_length}; tokenize again with "
                    "`truncation=True`, or leave out `max_length`"
                )
        if is_packed(example.positions) and self.positions is not None and example.positions.max() >= self.positions:  # type: ignore[union-attr]
            raise ValueError(f"one of its documents is longer than the model's {self.positions} positions; pack shorter ones")
        self._check_labels(example)

    def _check_labels(self, example: Example) -> None:
        labels = example.labels
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= self.n_labels))]
        if len(wrong):
            raise ValueError(
                f"its labels must be -100 or lie in 0 to {self.n_labels - 1}, what the model can predict, but one is {wrong[0]}"
            )

    def _unscored(self, example: Example) -> str | None:
        """Return why an example has no scored token; None if it has one."""
        if self._scores(example):
            return None
        return example.unscored or (
            "no token of it is scored: all its labels are -100"
            + (' or left out by score_tokens="content"' if self.score_tokens != "all" else "")
        )

    def _scores(self, example: Example) -> bool:
        return bool((example.labels != IGNORED).any())

    def _pad(self, examples: list[Example]) -> dict[str, Tensor]:
        batch = {"input_ids": _stack([example.ids for example in examples], self.pad_token_id)}
        lengths, width = [len(example.ids) for example in examples], batch["input_ids"].shape[1]
        further = [example.further or {} for example in examples]
        if any(example.positions is not None for example in examples):
            positions = [_positions(example) for example in examples]
            batch["position_ids"] = pad_positions(positions, width)
            further = [{name: values for name, values in row.items() if name != "position_ids"} for row in further]
        elif "attention_mask" in self.accepted:
            batch["attention_mask"] = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
        batch.update(pad_inputs(further, lengths, width))
        decoder_ids = [example.decoder_ids for example in examples if example.decoder_ids is not None]
        if decoder_ids:
            batch["decoder_input_ids"] = _stack(decoder_ids, self.pad_token_id)
            if "decoder_attention_mask" in self.accepted and any((ids[1:] == self.pad_token_id).any() for ids in decoder_ids):
                # In training, a decoder attends to the padding tokens that it reads for labels of -100. Without a cache of keys and
                # values, some models (T5Gemma) would leave them out by default.
                batch["decoder_attention_mask"] = _stack([np.ones_like(ids) for ids in decoder_ids], 0)
        batch["labels"] = _stack([example.labels for example in examples], IGNORED)
        return batch

    # Tokens.

    def _tokens_of(self, row: Mapping[str, Any]) -> tuple[Example, np.ndarray]:
        """Return a tokenized row without labels, and which of its tokens are no padding."""
        ids, kept = without_padding(row)
        skipped = {*_HANDLED, *PACKING_COLUMNS} | ({self.label_column} if self.label_column else set())
        positions = self._documents(row, kept)
        if positions is not None:
            skipped.add("position_ids")
        return Example(ids, ids, further_inputs(row, self.accepted, kept, skipped), positions=positions), kept

    def _documents(self, row: Mapping[str, Any], kept: np.ndarray) -> np.ndarray | None:
        """Return the positions of a packed row's tokens in their documents; None for a row of one document."""
        columns = {name: row[name] for name in PACKING_COLUMNS if row.get(name) is not None}
        if row.get("position_ids") is not None:
            given = as_numbers("position_ids", row["position_ids"])
            columns["position_ids"] = given[kept] if given.shape == kept.shape else given
        if not columns or len(kept) == 0:
            return None
        positions = packed_positions(columns, int(kept.sum()))
        if not is_packed(positions):
            return None
        self._check_packed()
        return positions

    def _check_packed(self) -> None:
        """Raise a ValueError if the task cannot serve packed rows."""
        raise refuse_packed("the model would let attend to one another")

    def _tokenize(self, processing_class: Any, *texts: Any, **options: Any) -> tuple[Any, int]:
        """Return what the tokenizer makes of a text, cut at the limit, and how many tokens were cut off."""
        limit = self._limit(processing_class)
        truncation = options.pop("truncation", True)
        if limit == _NO_LIMIT:
            return processing_class(*texts, **options), 0
        try:
            found = processing_class(*texts, **options, truncation=truncation, max_length=limit)
        except Exception as error:  # tokenizers raises nothing more special
            if "runcation" not in str(error):
                raise
            raise ValueError(
                f"its first text leaves no room for the second within {self._describe_limit(processing_class)}; shorten it, or filter it out"
            ) from error
        if len(found["input_ids"]) < limit:
            return found, 0
        whole = processing_class(*texts, **options, verbose=False)
        return found, len(whole["input_ids"]) - len(found["input_ids"])

    def _further_of(self, found: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return what a tokenizer made of a text besides the ids, as far as the model takes it."""
        return {
            name: np.asarray(values, dtype=np.int64)
            for name, values in found.items()
            if name in self.accepted and name not in _HANDLED
        }

    def text_limit(self, tokenizer: Any) -> int | None:
        """Return how many tokens of a text are kept; None for all."""
        limit = self._limit(tokenizer)
        return limit if limit < _NO_LIMIT else None

    def _limit(self, processing_class: Any) -> int:
        """Return how many tokens of a text are kept."""
        return min(self.max_length or _NO_LIMIT, self.positions or _NO_LIMIT, tokenizer_limit(processing_class) or _NO_LIMIT)

    def _describe_limit(self, processing_class: Any) -> str:
        """Say how many tokens of a text are kept, and why."""
        limit = self._limit(processing_class)
        if limit == self.max_length:
            return f"max_length={limit}"
        return f"the model's {limit} positions" if limit == self.positions else f"the tokenizer's model_max_length={limit}"

    def _string_columns(self, features: Features) -> list[str]:
        return [name for name, kind in features.items() if getattr(kind, "dtype", None) in ("string", "large_string")]


def need_columns(features: Any, columns: Sequence[str], purpose: str) -> None:
    """Raise a ValueError if a column is not there."""
    missing = [column for column in columns if column not in features]
    if missing:
        raise ValueError(
            f"{purpose} need{'' if ' and ' in purpose else 's'} the columns {', '.join(map(repr, columns))}, but the dataset has "
            f"{', '.join(features)}. Set `text_columns` and `label_column`."
        )


def text_of(row: Mapping[str, Any], column: str) -> str:
    """Return the text in a column of a row; raise a ValueError if there is none."""
    if column not in row:
        raise ValueError(f"it has no column {column!r}")
    if not isinstance(row[column], str):
        raise ValueError(f"its {column!r} is {str(row[column])[:40]!s}, not a text; filter it out, or fill it in")
    return row[column]


def without_padding(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return a tokenized row's ids without padding, and which tokens were kept."""
    if row["input_ids"] is None:
        raise ValueError("its 'input_ids' are None; filter it out")
    given = np.asarray(row["input_ids"])
    if given.size and given.dtype.kind not in "iu":
        raise ValueError(f"its 'input_ids' hold {given.dtype}, where whole numbers are expected, the ids of tokens")
    ids = given.astype(np.int64)
    if ids.ndim != 1:
        raise ValueError(
            f"its 'input_ids' have the shape {ids.shape}; a row is one list of tokens, without the batch axis of a collator"
        )
    mask = row.get("attention_mask")
    kept = np.ones(len(ids), dtype=bool) if mask is None else np.asarray(mask).astype(bool)
    if kept.shape != ids.shape:
        raise ValueError(
            f"it has {len(ids)} tokens in 'input_ids' and an 'attention_mask' of shape {kept.shape}; there must be one each"
        )
    return ids[kept], kept


def labels_like(row: Mapping[str, Any], column: str, kept: np.ndarray) -> np.ndarray:
    """Return a tokenized row's labels without padding; there must be one per token."""
    if row[column] is None:
        raise ValueError(f"its {column!r} are None; filter it out")
    labels = np.asarray(row[column], dtype=np.int64)
    if labels.shape != kept.shape:
        raise ValueError(
            f"it has {len(kept)} tokens in 'input_ids' and {labels.size} labels in {column!r}; there must be one each"
        )
    return labels[kept]


def _positions(example: Example) -> np.ndarray:
    """Return the positions of a row's tokens: in their documents, those that it gives, or from 0 on."""
    if example.positions is not None:
        return example.positions
    return (example.further or {}).get("position_ids", np.arange(len(example.ids)))


def _each(rows: Rows) -> Iterator[dict[str, Any]]:
    names = list(rows)
    for values in zip(*rows.values(), strict=True):
        yield dict(zip(names, values, strict=True))


def _holds_numbers(kind: Any) -> bool:
    """Whether a column's cells are numbers, or lists of them."""
    while hasattr(kind, "feature"):
        kind = kind.feature
    return str(getattr(kind, "dtype", "")).startswith(("int", "uint", "float", "bool"))


def _stack(values: Sequence[np.ndarray], fill: int) -> Tensor:
    result = torch.full((len(values), max(map(len, values))), fill, dtype=torch.int64)
    for row, value in zip(result, values, strict=True):
        row[: len(value)] = torch.from_numpy(value)
    return result
