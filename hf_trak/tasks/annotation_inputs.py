"""Rows whose labels lie on the tokens of a text: a class per token, or an answer's first and last token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from hf_trak.tasks.labels import Labels, labels_of_model
from hf_trak.tasks.token_inputs import Example, TokenInputs, labels_like, text_of
from hf_trak.tasks.token_outputs import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedModel

    from hf_trak.config import TrakConfig

_NOWHERE = np.asarray([IGNORED, IGNORED], dtype=np.int64)
_TAGS = ("labels", "ner_tags", "pos_tags", "chunk_tags", "tags")


@dataclass(frozen=True)
class TokenLabelInputs(TokenInputs):
    """Rows of a token classifier: `input_ids` and `labels`, or `tokens`, which are words, and `ner_tags`, a class of each.

    The first token of a word has the word's label and the others -100, as in transformers' examples. The names of the classes are compared
    with the model's, and words' labels that are strings are looked up in its `label2id`. Of several columns of tags, the one whose
    names are the model's is read.

    Args:
        classes ([`Labels`], *optional*): The model's classes, and how the dataset's become theirs.
    """

    task_name = "token-classification"

    classes: Labels | None = None

    @classmethod
    def for_model(cls, model: PreTrainedModel, config: TrakConfig) -> TokenLabelInputs:
        """Read what is needed off a model and a configuration."""
        inputs = super().for_model(model, config)
        assert isinstance(inputs, TokenLabelInputs)
        classes = Labels(cls.task_name, model.config.num_labels, label2id=labels_of_model(model), mapping=config.label_mapping)
        return replace(inputs, classes=classes)

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> TokenLabelInputs:
        """Return these inputs with the column of labels decided on, and the names of the classes compared with the model's."""
        if self.classes is None:
            return self
        if self._is_tokenized(features):
            column = self.label_column or "labels"
            return replace(self, classes=self._classes_of(features, column)) if column in features else self
        tags = (self.label_column,) if self.label_column else _TAGS
        found = [name for name in tags if name in features]
        if not found:
            return self  # refused by `check`, with the columns
        if len(found) == 1 or found[0] == "labels":
            return replace(self, classes=self._classes_of(features, found[0]))
        fitting: dict[str, Labels] = {}
        reasons = []
        for name in found:
            try:
                fitting[name] = self._classes_of(features, name)
            except ValueError as error:
                reasons.append(str(error))
        if len(fitting) == 1:
            [(name, classes)] = fitting.items()
            return replace(self, label_column=name, classes=classes)
        if reasons and not fitting:
            raise ValueError(reasons[0])
        raise ValueError(
            f"Which column holds the labels is ambiguous: {', '.join(map(repr, fitting))} may. Set `label_column` (--label_column) to the one "
            "that the model was trained on."
        )

    def _classes_of(self, features: Mapping[str, Any], column: str) -> Labels:
        assert self.classes is not None
        kind = features[column]
        return self.classes.of(getattr(kind, "feature", kind), column)

    def _to_ids(self, labels: Sequence[Any]) -> Sequence[int]:
        """Return labels of a row as ids of the model; -100 stays."""
        if self.classes is None:
            return labels
        if any(isinstance(label, str) for label in labels):
            return self.classes.look_up(labels)
        if self.classes.translation is None:
            return labels
        ids = self.classes.translation
        for label in labels:
            if label != IGNORED and not 0 <= label < len(ids):
                raise ValueError(
                    f"its labels must be -100 or lie in 0 to {len(ids) - 1}, the dataset's classes, but one is {label}"
                )
        return [label if label == IGNORED else ids[label] for label in labels]

    @staticmethod
    def _count_labels(model: PreTrainedModel) -> int:
        return model.config.num_labels

    def _texts_read(self, features: Features) -> dict[str, Any]:
        return {"text": [self._words()], "label": self._tags(features)}

    def _check_columns(self, features: Features, processing_class: Any) -> None:
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
            example, kept = self._tokens_of(row)
            labels = labels_like(row, self.label_column or "labels", kept)
            return example._replace(labels=np.asarray(self._to_ids(labels.tolist()), dtype=np.int64))
        for column in (self._words(), self._tags(row)):
            if row[column] is None:
                raise ValueError(f"its {column!r} are None; filter it out")
        words, tags = list(row[self._words()]), list(row[self._tags(row)])
        if None in words:
            raise ValueError(f"a word of its {self._words()!r} is None; filter it out")
        if len(words) != len(tags):
            raise ValueError(f"it has {len(words)} words and {len(tags)} labels; there must be one each")
        if None in tags:
            raise ValueError(f"a label of its {self._tags(row)!r} is None; filter it out")
        tags = list(self._to_ids(tags))
        found, n_cut = self._tokenize(processing_class, words, is_split_into_words=True)
        places = found.word_ids()
        marked = [IGNORED if word is None or (i and places[i - 1] == word) else tags[word] for i, word in enumerate(places)]
        ids = np.asarray(found["input_ids"], dtype=np.int64)
        return Example(ids, np.asarray(marked, dtype=np.int64), self._further_of(found), n_cut=n_cut)


@dataclass(frozen=True)
class SpanInputs(TokenInputs):
    """Rows of an extractive question answerer: `input_ids`, `start_positions` and `end_positions`; or SQuAD's columns.

    `question`, `context` and `answers` become one sequence, cut in the context. A question without an answer points to the first
    token, as in transformers' examples; one whose answer is cut off, or lies outside the tokens, has no scored token.
    """

    task_name = "question-answering"

    @staticmethod
    def _count_labels(model: PreTrainedModel) -> int:
        return 10**9  # positions, which `_check_labels` looks at

    def _check_columns(self, features: Features, processing_class: Any) -> None:
        if self._is_tokenized(features):
            self._need(features, ["input_ids", "start_positions", "end_positions"], "Tokenized rows of question-answering")
            return
        self._need(features, [*self._texts(), self.label_column or "answers"], "question-answering")
        if not getattr(processing_class, "is_fast", False):
            raise ValueError("Answers need a fast tokenizer, which knows where tokens lie: pass it as `processing_class`.")

    def _texts_read(self, features: Features) -> dict[str, Any]:
        return {"text": list(self._texts()), "label": self.label_column or "answers"}

    def _label_of_tokens(self, features: Features) -> Any:
        return [name for name in ("start_positions", "end_positions") if name in features]

    def _texts(self) -> tuple[str, ...]:
        return self.text_columns or ("question", "context")

    def _encode(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        if self._is_tokenized(row):
            example, kept = self._tokens_of(row)
            places = np.asarray([row["start_positions"], row["end_positions"]], dtype=np.int64).reshape(-1)
            if len(places) != 2 or (places < 0).any() or (places >= len(kept)).any() or not kept[places].all():
                why = (
                    f"its answer, tokens {places.tolist()}, does not lie on its {len(example.ids)} tokens (transformers leaves such rows out of "
                    "its loss)"
                )
                return example._replace(labels=_NOWHERE, unscored=why)
            return example._replace(labels=np.cumsum(kept)[places] - 1)
        return self._encode_texts(row, processing_class)

    def _encode_texts(self, row: Mapping[str, Any], processing_class: Any) -> Example:
        question, context = (text_of(row, column) for column in self._texts())
        found, n_cut = self._tokenize(
            processing_class, question, context, return_offsets_mapping=True, truncation="only_second"
        )
        answers = row[self.label_column or "answers"]
        if answers is None:
            raise ValueError(
                f"its {self.label_column or 'answers'!r} is None; give an empty list for a question without an answer"
            )
        answers = _as_columns(answers)
        example = Example(
            np.asarray(found["input_ids"], dtype=np.int64), np.zeros(2, dtype=np.int64), self._further_of(found), n_cut=n_cut
        )
        if not answers["text"]:
            return example
        first, text = answers["answer_start"][0], answers["text"][0]
        if context[first : first + len(text)] != text:
            raise ValueError(f"its answer {text!r} is not in the context at character {first}")
        inside = [
            i
            for i, (part, (start, stop)) in enumerate(zip(found.sequence_ids(), found["offset_mapping"], strict=True))
            if part == 1 and start < first + len(text) and stop > first
        ]
        if not inside or found["offset_mapping"][inside[-1]][1] < first + len(text.rstrip()):
            why = f"its answer {text!r} is cut off at {len(example.ids)} tokens ({self._describe_limit(processing_class)})"
            return example._replace(labels=_NOWHERE, unscored=why)
        return example._replace(labels=np.asarray([inside[0], inside[-1]], dtype=np.int64))

    def _check_labels(self, example: Example) -> None:
        if example.labels[0] > example.labels[-1]:
            raise ValueError(f"its answer begins at token {example.labels[0]} and ends before, at {example.labels[-1]}")

    def _score(self, labels: np.ndarray, processing_class: Any) -> np.ndarray:
        return labels

    def _pad(self, examples: list[Example]) -> dict[str, Tensor]:
        batch = super()._pad(examples)
        labels: Tensor = batch.pop("labels")
        return {**batch, "start_positions": labels[:, 0].clone(), "end_positions": labels[:, -1].clone()}


def _as_columns(answers: Any) -> Mapping[str, Sequence[Any]]:
    """Return a row's answers as SQuAD's two lists; they may also be a list of answers, as in SQuAD's own files."""
    if isinstance(answers, (list, tuple)) and all(isinstance(answer, Mapping) for answer in answers):
        answers = {name: [answer.get(name) for answer in answers] for name in ("text", "answer_start")}
    if (
        not isinstance(answers, Mapping)
        or not all(isinstance(answers.get(name), (list, tuple)) for name in ("text", "answer_start"))
        or len(answers["text"]) != len(answers["answer_start"])
        or (answers["text"] and not (isinstance(answers["text"][0], str) and isinstance(answers["answer_start"][0], int)))
    ):
        raise ValueError(
            "its answers must be lists 'text' and 'answer_start' (the character where the text begins in the context), but are "
            f"{str(answers)[:60]}"
        )
    return answers
