"""Rows of language models as a reader sees them: a text, and after an arrow what was to come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hf_trak.tasks.language_inputs import find_texts
from hf_trak.tasks.token_inputs import without_padding

LANGUAGE_TASKS = ("causal-lm", "masked-lm", "seq2seq", "question-answering", "token-classification")
_ARROW = "  →  "
_SCORED_BY = ("assistant_masks", "completion_mask")
_TAGS = ("ner_tags", "pos_tags", "chunk_tags", "tags")


class LanguageRows:
    """Makes a row's text: texts as they are, conversations with their roles, and tokens read by the tokenizer.

    Args:
        task (`str`): One of `LANGUAGE_TASKS`.
        tokenizer (*optional*): Without it, tokens are numbers.
        text_columns, label_column (*optional*): As in `TrakConfig`.
    """

    def __init__(
        self, task: str, tokenizer: Any = None, *, text_columns: Sequence[str] | None = None, label_column: str | None = None
    ) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.text_columns = text_columns
        self.label_column = label_column

    def __call__(self, row: Mapping[str, Any], features: Mapping[str, Any]) -> str:
        """Return the text of a row.

        Args:
            features (`Mapping`): Of the dataset; they know the names of classes.
        """
        if "input_ids" in row and self.text_columns is None:
            return self._of_tokens(row)
        if self.task == "question-answering":
            answers = row.get(self.label_column or "answers") or {"text": []}
            return _join(*(row[name] for name in self.text_columns or ("question", "context")), "  /  ".join(answers["text"]))
        if self.task == "token-classification":
            return self._of_words(row, features)
        if self.task == "causal-lm" and self.text_columns is None and "messages" in row:
            return _conversation(row["messages"])
        if self.task == "causal-lm" and self.text_columns is None and {"prompt", "completion"} <= set(row):
            return _join(_conversation(row["prompt"]), _conversation(row["completion"]))
        strings = [name for name, value in row.items() if isinstance(value, str)]
        if self.task == "causal-lm":
            return row[(self.text_columns or strings)[0]]
        source, target = find_texts(strings, text_columns=self.text_columns, label_column=self.label_column)
        return _join(*(str(row[name]) for name in (source, target) if name is not None))

    def _of_tokens(self, row: Mapping[str, Any]) -> str:
        ids, kept = without_padding(row)
        if self.task == "question-answering":
            first, last = (np.asarray(row[name]).item() for name in ("start_positions", "end_positions"))
            return _join(self._read(ids), self._read(np.asarray(row["input_ids"])[first : last + 1]))
        mask = next((name for name in _SCORED_BY if name in row), None)
        column = self.label_column or "labels"
        if column not in row and mask is not None:
            labels = np.where(np.asarray(row[mask]).astype(bool), row["input_ids"], -100)
        else:
            labels = np.asarray(row.get(column, row["input_ids"]))
        if self.task == "causal-lm":
            first = int((labels[kept] >= 0).argmax())
            return _join(self._read(ids[:first]), self._read(ids[first:]))
        labels = labels[labels >= 0]
        return _join(self._read(ids), self._read(labels) if self.task != "token-classification" else " ".join(map(str, labels)))

    def _of_words(self, row: Mapping[str, Any], features: Mapping[str, Any]) -> str:
        column = self.label_column or next(name for name in _TAGS if name in row)
        names = getattr(getattr(features[column], "feature", None), "names", None)
        tags = [names[tag] if names and 0 <= tag < len(names) else str(tag) for tag in row[column]]
        words = row[self.text_columns[0] if self.text_columns else "tokens"]
        return " ".join(word if tag in ("O", "-100") else f"{word}/{tag}" for word, tag in zip(words, tags, strict=False))

    def _read(self, ids: np.ndarray) -> str:
        if len(ids) == 0:
            return ""
        return self.tokenizer.decode(ids.tolist()) if self.tokenizer is not None else "tokens " + " ".join(map(str, ids))


def _join(*parts: str) -> str:
    """Return a text and its target; what comes before the last is the text."""
    *before, target = [stripped for part in parts if (stripped := part.strip())] or [""]
    return _ARROW.join(filter(None, ["  |  ".join(before), target]))


def _conversation(messages: Any) -> str:
    """Return `user: ...  /  assistant: ...`; a text as it is."""
    if isinstance(messages, str):
        return messages
    return "  /  ".join(f"{message['role']}: {_content(message.get('content'))}" for message in messages)


def _content(content: Any) -> str:
    """Return a message's text, which may be in parts."""
    if isinstance(content, list):
        return " ".join(str(part.get("text") or f"[{part.get('type')}]") for part in content)
    return str(content or "")
