"""Rows of a dataset as a reader sees them: a picture or a text, and a label by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_trak.config import TrakConfig
from hf_trak.sources.row_digests import names_read
from hf_trak.tasks.chunks import CHUNK, CHUNK_COLUMNS, DIGEST, DOCUMENT, TOKENS, is_chunked
from hf_trak.tasks.columns import find_whole_text, is_string
from hf_trak.tasks.language_inputs import find_texts
from hf_trak.tasks.pairs import find_caption_column
from hf_trak.tasks.pictures import open_picture, side_by_side
from hf_trak.tasks.token_inputs import without_padding

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

    from hf_trak.querying.training_rows import KeptRows


LANGUAGE_TASKS = (
    "causal-lm",
    "masked-lm",
    "seq2seq",
    "question-answering",
    "token-classification",
    "image-text-to-text",
    "preference",
)
_DECODERS = ("causal-lm", "image-text-to-text")
_PICTURES = ("images", "image")  # of models that read them among their tokens
_SHAREGPT = ("conversations", "conversation")
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
        if self.task == "preference":
            return self._of_preference(row)
        if "input_ids" in row and self.text_columns is None:
            return self._of_tokens(row)
        if self.task == "question-answering":
            answers = row.get(self.label_column or "answers") or {"text": []}
            return _join(*(row[name] for name in self.text_columns or ("question", "context")), "  /  ".join(answers["text"]))
        if self.task == "token-classification":
            return self._of_words(row, features)
        if self.task in _DECODERS and self.text_columns is None and "messages" in row:
            return _conversation(row["messages"])
        if self.task in _DECODERS and self.text_columns is None and {"prompt", "completion"} <= set(row):
            return _join(_conversation(row["prompt"]), _conversation(row["completion"]))
        strings = [name for name, value in row.items() if isinstance(value, str)]
        if self.task == "causal-lm" and self.text_columns is None and "text" not in strings:
            if {"instruction", "output"} <= set(row):
                return _join(row["instruction"], row.get("input") or "", row["output"])
            if (turns := next((row[name] for name in _SHAREGPT if name in row), None)) is not None:
                return _conversation(turns)
        if self.task == "causal-lm":
            whole = "text" if "text" in strings else find_whole_text(strings) or strings[0]
            return row[self.text_columns[0] if self.text_columns else whole]
        source, target = find_texts(strings, text_columns=self.text_columns, label_column=self.label_column)
        return _join(*(str(row[name]) for name in (source, target) if name is not None))

    def _of_preference(self, row: Mapping[str, Any]) -> str:
        """Return a prompt, if it is told apart, and both answers: as they are, or their tokens."""
        parts = []
        for name in ("prompt", "chosen", "rejected"):
            found = row.get(name)
            if found is None and row.get(f"{name}_ids") is not None:
                found = self._read(np.asarray(row[f"{name}_ids"], dtype=np.int64))
            parts.append("" if found is None else _conversation(found))
        return _join(parts[0], f"chosen: {parts[1].strip()}  |  rejected: {parts[2].strip()}")

    def query(self, prompt: Any, answer: str) -> Example:
        """Return a prompt, a text or a conversation, with its answer."""
        return Example(0, text=_join(_conversation(prompt), answer))

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
        if self.task in _DECODERS and len(labels) == len(kept):
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
    parts = ((turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in messages)
    return "  /  ".join(f"{role}: {_content(content)}" for role, content in parts)


def _content(content: Any) -> str:
    """Return a message's text, which may be in parts."""
    if isinstance(content, list):
        return " ".join(str(part.get("text") or f"[{part.get('type')}]") for part in content)
    return str(content or "")


_LABEL_COLUMNS = ("labels", "label")


@dataclass(frozen=True)
class Example:
    """One row, to be shown. `note` is what only the report knows, such as a label that was flipped; of a chunk, `before` and `after` are the
    text around it in its document. `link` is its page on the Hub, if it is a row of a dataset there."""

    row: int
    label: str = ""
    text: str = ""
    image: Image | None = None
    note: str = ""
    before: str = ""
    after: str = ""
    link: str = ""


@dataclass(frozen=True)
class Hit:
    """A training example, and its score for a query; `heat` is what each piece of the answer adds to it."""

    example: Example
    score: float
    heat: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Control:
    """What a simpler ranking chooses for a query, with the scores of these rows."""

    heading: str
    hits: list[Hit]


@dataclass(frozen=True)
class Attribution:
    """A query, the training examples that raised and lowered its output most, strongest first, and the rows that simpler rankings choose."""

    query: Example
    output: float
    proponents: list[Hit] = field(default_factory=list)
    opponents: list[Hit] = field(default_factory=list)
    controls: list[Control] = field(default_factory=list)


class ExampleReader:
    """Reads examples from a dataset.

    Args:
        dataset (`Dataset` or `KeptRows`, *optional*): Without it, an example is its row number alone.
        text_columns, image_column, label_column (*optional*): Found by type and name otherwise.
        notes (`Mapping[int, str]`, *optional*): By row.
        language (`LanguageRows`, *optional*): Makes the text of a language model's rows, label included.
        captions (`bool`): Of several text columns, only the one that holds the images' captions is shown.
    """

    def __init__(
        self,
        dataset: Dataset | KeptRows | None,
        *,
        text_columns: tuple[str, ...] | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        notes: Mapping[int, str] | None = None,
        language: LanguageRows | None = None,
        captions: bool = False,
    ) -> None:
        self.dataset = dataset
        self.notes = notes or {}
        self.language = language
        kinds = dict(dataset.features) if dataset is not None else {}
        strings = tuple(name for name, kind in kinds.items() if getattr(kind, "dtype", None) in ("string", "large_string"))
        images = [name for name, kind in kinds.items() if type(kind).__name__ == "Image"]
        labels = [name for name in _LABEL_COLUMNS if name in kinds]
        self.label_column = label_column or (labels[0] if labels else None)
        self.image_column = image_column or (images[0] if images else None)
        self.text_columns = text_columns or tuple(name for name in strings if name != self.label_column)
        if captions and text_columns is None and dataset is not None and (column := find_caption_column(dataset.features)):
            self.text_columns, self.label_column = (column,), None

    def __getitem__(self, row: int) -> Example:
        if self.dataset is None:
            return Example(row, note=self.notes.get(row, ""))
        values = self.dataset[row]
        if self.language is not None:
            text, note = self.language(values, self.dataset.features), self.notes.get(row, "")
            return Example(row, text=text, image=self._pictures(values), note=note)
        text = "  |  ".join(_text_of(values[column]) for column in self.text_columns)
        if not text and self.image_column is None and "input_ids" in values:
            text = "tokens " + " ".join(map(str, values["input_ids"]))
        return Example(
            row,
            label=self._label(values[self.label_column]) if self.label_column is not None else "",
            text=text,
            image=self._image(values),
            note=self.notes.get(row, ""),
        )

    def _pictures(self, values: Mapping[str, Any]) -> Image | None:
        """Return the pictures among a language model's tokens, as one."""
        cells: Any = next((values[name] for name in _PICTURES if values.get(name) is not None), [])
        return side_by_side(cells if isinstance(cells, list) else [cells])

    def _image(self, values: Mapping[str, Any]) -> Image | None:
        cell = values[self.image_column] if self.image_column is not None else None
        return None if cell is None else open_picture(cell)

    def _label(self, value: Any) -> str:
        names = getattr(self.dataset.features[self.label_column], "names", None)  # type: ignore[union-attr]
        return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)


def _text_of(value: Any) -> str:
    return "  /  ".join(map(str, value)) if isinstance(value, list) else str(value)


class ChunkReader:
    """Reads chunks of documents, with the text around each: the end of the chunk before and the beginning of the one behind.

    Args:
        rows (`Dataset` or `KeptRows`): The chunks, in the index's order.
        text_column (`str`, *optional*): Of their texts; without it, a chunk is told by its numbers.
    """

    _AROUND = 300

    def __init__(self, rows: Dataset | KeptRows, text_column: str | None) -> None:
        self.dataset = rows
        self.text_column = text_column
        self._others = [name for name in rows.column_names if name not in (*CHUNK_COLUMNS, *TOKENS, text_column)]

    def __getitem__(self, row: int) -> Example:
        mine = self.dataset[row]
        before, after = (self._text(place, mine[DOCUMENT]) for place in (row - 1, row + 1))
        return Example(
            row,
            label=", ".join(str(mine[name]) for name in self._others)[:80],
            text="" if self.text_column is None else mine[self.text_column],
            note=f"document {mine[DOCUMENT]}, chunk {mine[CHUNK]}",
            before=before[-self._AROUND :],
            after=after[: self._AROUND],
        )

    def _text(self, row: int, document: int) -> str:
        """Return the text of a chunk, if it is of a document."""
        if self.text_column is None or not 0 <= row < len(self.dataset):
            return ""
        found = self.dataset[row]
        return str(found[self.text_column]) if found[DOCUMENT] == document else ""


def row_reader(
    config: TrakConfig,
    rows: Dataset | KeptRows,
    language: LanguageRows | None = None,
    *,
    notes: Mapping[int, str] | None = None,
) -> ExampleReader:
    """Return what shows rows with the columns of an index."""
    columns: dict[str, Any] = {name: getattr(config, name) for name in ("text_columns", "image_column", "label_column")}
    if columns["label_column"] not in rows.features:  # of queries that need none
        columns["label_column"] = None
    return ExampleReader(rows, **columns, language=language, captions=config.task == "contrastive", notes=notes)


def train_reader(
    config: TrakConfig, kept: KeptRows, train: Dataset | None, language: LanguageRows | None = None
) -> ExampleReader | ChunkReader:
    """Return what shows training rows: from the training set, in the index's order, or else from the columns that the index kept of it."""
    rows = kept if train is None else train
    if is_chunked(rows.column_names):
        texts = config.text_columns or tuple(
            name for name in rows.column_names if name != DIGEST and is_string(rows.features[name])
        )
        return ChunkReader(rows, next((name for name in texts if name in rows.column_names), None))
    if train is not None:
        return row_reader(config, train, language)
    if not kept.column_names:
        return ExampleReader(None)
    if set(names_read(config.columns_read or {})) <= set(kept.column_names):
        return row_reader(config, kept, language)
    return ExampleReader(kept)  # whatever there is


def read_attributions(
    hits: Dataset,
    queries: ExampleReader | Sequence[Example],
    train: ExampleReader | ChunkReader,
    *,
    rows: list[int] | None = None,
    top_k: int | None = None,
) -> list[Attribution]:
    """Join hits with the rows they are about.

    Args:
        hits (`Dataset`): As `AttributionIndex.attribute` returns them.
        rows (`list[int]`, *optional*): Which queries; all by default.
        top_k (`int`, *optional*): How many proponents and opponents; all there are by default.
    """

    def read(hit: dict[str, Any], kind: str) -> list[Hit]:
        found = hit.get(f"{kind}_rows", hit[f"{kind}s"])  # of documents, their strongest chunks
        pairs = zip(found[:top_k], hit[f"{kind}_scores"][:top_k], strict=True)
        return [Hit(train[row], score) for row, score in pairs]

    chosen = [hits[row] for row in (range(len(hits)) if rows is None else rows)]
    return [
        Attribution(queries[hit["query_id"]], hit["query_output"], read(hit, "proponent"), read(hit, "opponent"))
        for hit in chosen
    ]
