"""Rows of causal, masked and sequence-to-sequence language models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_trak.tasks.chat import encode_chat
from hf_trak.tasks.token_inputs import Example, TokenInputs, labels_like, without_padding
from hf_trak.tasks.token_outputs import IGNORED

if TYPE_CHECKING:
    from datasets import Features

_SOURCES = ("inputs", "input", "inputs_pretokenized", "source", "prompt", "question", "document", "text")
_TARGETS = ("targets", "target", "targets_pretokenized", "labels", "label", "completion", "output", "answer", "summary")
_SCORED_BY = ("assistant_masks", "completion_mask")


class CausalInputs(TokenInputs):
    """Rows of a causal language model.

    They hold, as TRL's and transformers' users have them, the first of these that is found:

    - `input_ids`, with `labels` (or TRL's `assistant_masks` or `completion_mask`); without, every token is scored;
    - `messages`: a conversation, of which the assistant's messages are scored;
    - `prompt` and `completion`, both texts or both conversations: the completion is scored, and the EOS token after a text;
    - one text column: every token is scored. The first token of a row is never scored, since nothing predicts it.
    """

    def check(self, features: Features, processing_class: Any) -> None:
        if self._is_tokenized(features):
            return
        if self.text_columns is None and ("messages" in features or {"prompt", "completion"} <= set(features)):
            self._need_tokenizer(processing_class)
            return
        columns = self.text_columns or self._string_columns(features)
        if len(columns) != 1:
            raise ValueError(
                "Expected tokenized rows ('input_ids'), 'messages', 'prompt' and 'completion', or one text column, but the dataset has "
                f"{', '.join(features)}. Set `text_columns`."
            )
        self._need(features, columns, "The text")
        self._need_tokenizer(processing_class)

    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        if self._is_tokenized(row):
            ids, kept, types = without_padding(row)
            return Example(ids, self._labels(row, ids, kept), types)
        if self.text_columns is None and "messages" in row:
            return self._cut(*encode_chat(row["messages"], processing_class), processing_class)
        if self.text_columns is None and "completion" in row:
            return self._cut(*self._completion(row["prompt"], row["completion"], processing_class), processing_class)
        column = (
            self.text_columns[0] if self.text_columns else next(key for key, value in row.items() if isinstance(value, str))
        )
        found = list(processing_class(row[column])["input_ids"])
        return self._cut(found, [True] * len(found), processing_class)

    def _labels(self, row: Mapping[str, Any], ids: np.ndarray, kept: np.ndarray) -> np.ndarray:
        column = self.label_column or "labels"
        if column in row:
            return labels_like(row, column, kept)
        if self.label_column is not None:
            raise ValueError(f"it has no column {column!r}")
        for mask in _SCORED_BY:
            if mask in row:
                return np.where(labels_like(row, mask, kept).astype(bool), ids, IGNORED)
        return ids

    @staticmethod
    def _completion(prompt: Any, completion: Any, tokenizer: Any) -> tuple[list[int], list[bool]]:
        if not isinstance(prompt, str):
            return encode_chat([*prompt, *completion], tokenizer, prompt=len(prompt))
        before = list(tokenizer(prompt)["input_ids"])
        ids = list(tokenizer(prompt + completion)["input_ids"])
        if tokenizer.eos_token_id is not None:
            if before and before[-1] == tokenizer.eos_token_id:  # tokenizers that add it themselves
                before = before[:-1]
            if ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
        # A token across the border belongs to the completion.
        shared = next(
            (i for i, pair in enumerate(zip(before, ids, strict=False)) if pair[0] != pair[1]), min(len(before), len(ids))
        )
        return ids, [i >= shared for i in range(len(ids))]

    def _cut(self, ids: Sequence[int], mask: Sequence[bool], tokenizer: Any) -> Example:
        limit = self._limit(tokenizer).get("max_length")
        tokens = np.asarray(ids[:limit], dtype=np.int64)
        return Example(tokens, np.where(np.asarray(mask[:limit], dtype=bool), tokens, IGNORED))

    def _check_scored(self, example: Example) -> None:
        super()._check_scored(example._replace(labels=example.labels[1:]))


class MaskedInputs(TokenInputs):
    """Rows of a masked language model: `input_ids` with some tokens masked, and `labels`, -100 for the others.

    Texts are refused, since which tokens are masked is part of what an example is: mask once, with
    `DataCollatorForLanguageModeling(..., seed=0)`, and keep the result as the dataset.
    """

    def check(self, features: Features, processing_class: Any) -> None:
        column = self.label_column or "labels"
        if not (self._is_tokenized(features) and column in features):
            raise ValueError(
                f"masked-lm needs the columns 'input_ids', with tokens masked, and {column!r}, -100 where they are not, but the "
                f"dataset has {', '.join(features)}. Mask it once, with transformers' DataCollatorForLanguageModeling(tokenizer, seed=0), "
                "and keep what it returns: which tokens are masked must be the same whenever a row is featurized."
            )

    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        ids, kept, types = without_padding(row)
        return Example(ids, labels_like(row, self.label_column or "labels", kept), types)


class Seq2SeqInputs(TokenInputs):
    """Rows of an encoder and a decoder: `input_ids` and `labels`, or a text and a target text.

    Labels of -100 at either end are padding and are taken off. The decoder reads the labels, one to the right, as transformers
    shifts them, -100 inside becoming padding; or `decoder_input_ids`, where a tokenized row has them.
    """

    def check(self, features: Features, processing_class: Any) -> None:
        if self._is_tokenized(features):
            self._need(features, ["input_ids", self.label_column or "labels"], "Tokenized rows of seq2seq")
            return
        self._texts(features, self._string_columns(features))
        self._need_tokenizer(processing_class)

    def _texts(self, columns: Any, strings: Sequence[str]) -> tuple[str, str]:
        """Return the names of the text and of its target."""
        target = self.label_column or next((name for name in _TARGETS if name in strings), None)
        rest = [name for name in strings if name != target]
        source = self.text_columns[0] if self.text_columns else None
        source = source or next((name for name in _SOURCES if name in rest), rest[0] if len(rest) == 1 else None)
        if source not in strings or target not in strings or len(self.text_columns or "1") != 1:
            raise ValueError(
                "seq2seq needs tokenized rows ('input_ids' and 'labels'), or a text and a target text, but the dataset has "
                f"{', '.join(columns)}. Set `text_columns` to the text's column and `label_column` to the target's."
            )
        return source, target  # type: ignore[return-value]

    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        if self._is_tokenized(row):
            ids, _, types = without_padding(row)
            labels = np.asarray(row[self.label_column or "labels"], dtype=np.int64)
            if row.get("decoder_input_ids") is not None:
                return self._with_decoder(row, ids, labels)
        else:
            source, target = self._texts(row, [key for key, value in row.items() if isinstance(value, str)])
            options = self._limit(processing_class)
            types = None
            ids = np.asarray(processing_class(row[source], **options)["input_ids"], dtype=np.int64)
            labels = np.asarray(processing_class(text_target=row[target], **options)["input_ids"], dtype=np.int64)
        ends = (labels != IGNORED).nonzero()[0]
        labels = labels[ends[0] : ends[-1] + 1] if len(ends) else labels[:0]
        before = np.where(labels[:-1] == IGNORED, self.pad_token_id, labels[:-1])
        start = self.pad_token_id if self.decoder_start is None else self.decoder_start
        return Example(ids, labels, types, np.concatenate([[start], before]).astype(np.int64)[: len(labels)])

    @staticmethod
    def _with_decoder(row: Mapping[str, Any], ids: np.ndarray, labels: np.ndarray) -> Example:
        mask = row.get("decoder_attention_mask")
        kept = np.ones(len(labels), dtype=bool) if mask is None else np.asarray(mask).astype(bool)
        decoder_ids = np.asarray(row["decoder_input_ids"], dtype=np.int64)
        if not len(decoder_ids) == len(kept) == len(labels):
            raise ValueError(
                f"it has {len(decoder_ids)} tokens in 'decoder_input_ids' and {len(labels)} labels; there must be one each"
            )
        return Example(ids, labels[kept], None, decoder_ids[kept])
