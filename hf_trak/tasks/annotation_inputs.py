"""Rows whose labels lie on the tokens of a text: a class per token, or an answer's first and last token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_trak.tasks.token_inputs import Example, TokenInputs, labels_like, without_padding
from hf_trak.tasks.token_outputs import IGNORED

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedModel

_TAGS = ("labels", "ner_tags", "pos_tags", "chunk_tags", "tags")


@dataclass(frozen=True)
class TokenLabelInputs(TokenInputs):
    """Rows of a token classifier: `input_ids` and `labels`, or `tokens`, which are words, and `ner_tags`, a class of each.

    The first token of a word has the word's label and the others -100, as in transformers' examples.
    """

    @staticmethod
    def _count_labels(model: PreTrainedModel) -> int:
        return model.config.num_labels

    def check(self, features: Features, processing_class: Any) -> None:
        if self._is_tokenized(features):
            self._need(features, ["input_ids", self.label_column or "labels"], "Tokenized rows of token-classification")
            return
        self._need(features, [self._words(), self._tags(features)], "Words and their labels")
        if not getattr(processing_class, "is_fast", False):
            raise ValueError("Words need a fast tokenizer, which knows their tokens: pass it as `processing_class`.")

    def _words(self) -> str:
        return self.text_columns[0] if self.text_columns else "tokens"

    def _tags(self, columns: Any) -> str:
        return self.label_column or next((name for name in _TAGS if name in columns), "ner_tags")

    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        if self._is_tokenized(row):
            ids, kept, types = without_padding(row)
            return Example(ids, labels_like(row, self.label_column or "labels", kept), types)
        words, tags = list(row[self._words()]), list(row[self._tags(row)])
        if len(words) != len(tags):
            raise ValueError(f"it has {len(words)} words and {len(tags)} labels; there must be one each")
        found = processing_class(words, is_split_into_words=True, **self._limit(processing_class))
        places = found.word_ids()
        labels = [IGNORED if word is None or (i and places[i - 1] == word) else tags[word] for i, word in enumerate(places)]
        types = np.asarray(found["token_type_ids"]) if "token_type_ids" in found else None
        return Example(np.asarray(found["input_ids"]), np.asarray(labels, dtype=np.int64), types)


@dataclass(frozen=True)
class SpanInputs(TokenInputs):
    """Rows of an extractive question answerer: `input_ids`, `start_positions` and `end_positions`; or SQuAD's columns.

    `question`, `context` and `answers` become one sequence, cut in the context. A question without an answer points to the first
    token, as in transformers' examples; one whose answer is cut off is refused.
    """

    @staticmethod
    def _count_labels(model: PreTrainedModel) -> int:
        return 10**9  # positions, which `_check_scored` looks at

    def check(self, features: Features, processing_class: Any) -> None:
        if self._is_tokenized(features):
            self._need(features, ["input_ids", "start_positions", "end_positions"], "Tokenized rows of question-answering")
            return
        self._need(features, [*self._texts(), self.label_column or "answers"], "question-answering")
        if not getattr(processing_class, "is_fast", False):
            raise ValueError("Answers need a fast tokenizer, which knows where tokens lie: pass it as `processing_class`.")

    def _texts(self) -> tuple[str, ...]:
        return self.text_columns or ("question", "context")

    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        if self._is_tokenized(row):
            ids, kept, types = without_padding(row)
            places = np.asarray([row["start_positions"], row["end_positions"]], dtype=np.int64).reshape(-1)
            if len(places) != 2 or (places < 0).any() or (places >= len(kept)).any() or not kept[places].all():
                raise ValueError(
                    f"its answer, tokens {places.tolist()}, does not lie on its {len(ids)} tokens (transformers leaves such rows out of "
                    "its loss); filter it out"
                )
            return Example(ids, np.cumsum(kept)[places] - 1, types)
        return self._encode_texts(row, processing_class)

    def _encode_texts(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        question, context = (row[column] for column in self._texts())
        options = self._limit(processing_class)
        if options:
            options["truncation"] = "only_second"
        found = processing_class(question, context, return_offsets_mapping=True, **options)
        answers = row[self.label_column or "answers"]
        labels = np.zeros(2, dtype=np.int64)
        if answers["text"]:
            first, text = answers["answer_start"][0], answers["text"][0]
            inside = [
                i
                for i, (part, (start, stop)) in enumerate(zip(found.sequence_ids(), found["offset_mapping"], strict=True))
                if part == 1 and start < first + len(text) and stop > first
            ]
            if context[first : first + len(text)] != text:
                raise ValueError(f"its answer {text!r} is not in the context at character {first}")
            if not inside or found["offset_mapping"][inside[-1]][1] < first + len(text.rstrip()):
                raise ValueError(f"its answer {text!r} is cut off at {len(found['input_ids'])} tokens; filter it out")
            labels[:] = inside[0], inside[-1]
        types = np.asarray(found["token_type_ids"]) if "token_type_ids" in found else None
        return Example(np.asarray(found["input_ids"]), labels, types)

    def _check_scored(self, example: Example) -> None:
        if example.labels[0] > example.labels[1]:
            raise ValueError(f"its answer begins at token {example.labels[0]} and ends before, at {example.labels[1]}")

    def _score(self, labels: np.ndarray, processing_class: Any) -> np.ndarray:
        return labels

    def _pad(self, examples: list[Example]) -> dict[str, Tensor]:
        batch = super()._pad(examples)
        labels: Tensor = batch.pop("labels")
        return {**batch, "start_positions": labels[:, 0], "end_positions": torch.clone(labels[:, 1])}
