"""Rows of a dataset as a reader sees them: a picture or a text, and a label by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_trak.cli.language_rows import LanguageRows
from hf_trak.tasks.pairs import find_caption_column
from hf_trak.tasks.pictures import open_picture

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

_LABEL_COLUMNS = ("labels", "label")


@dataclass(frozen=True)
class Example:
    """One row, to be shown. `note` is what only the report knows, such as a label that was flipped."""

    row: int
    label: str = ""
    text: str = ""
    image: Image | None = None
    note: str = ""


@dataclass(frozen=True)
class Hit:
    """A training example, and its score for a query."""

    example: Example
    score: float


@dataclass(frozen=True)
class Attribution:
    """A query, and the training examples that raised and lowered its output most, the strongest first."""

    query: Example
    output: float
    proponents: list[Hit] = field(default_factory=list)
    opponents: list[Hit] = field(default_factory=list)


class ExampleReader:
    """Reads examples from a dataset.

    Args:
        dataset (`Dataset`, *optional*): Without it, an example is its row number alone.
        text_columns, image_column, label_column (*optional*): Found by type and name otherwise.
        notes (`Mapping[int, str]`, *optional*): By row.
        language (`LanguageRows`, *optional*): Makes the text of a language model's rows, label included.
        captions (`bool`): Of several text columns, only the one that holds the images' captions is shown.
    """

    def __init__(
        self,
        dataset: Dataset | None,
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
            return Example(row, text=self.language(values, self.dataset.features), note=self.notes.get(row, ""))
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

    def _image(self, values: Mapping[str, Any]) -> Image | None:
        cell = values[self.image_column] if self.image_column is not None else None
        return None if cell is None else open_picture(cell)

    def _label(self, value: Any) -> str:
        names = getattr(self.dataset.features[self.label_column], "names", None)  # type: ignore[union-attr]
        return names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)


def _text_of(value: Any) -> str:
    return "  /  ".join(map(str, value)) if isinstance(value, list) else str(value)


def read_attributions(
    hits: Dataset, queries: ExampleReader, train: ExampleReader, *, rows: list[int] | None = None, top_k: int | None = None
) -> list[Attribution]:
    """Join hits with the rows they are about.

    Args:
        hits (`Dataset`): As `AttributionIndex.attribute` returns them.
        rows (`list[int]`, *optional*): Which queries; all by default.
        top_k (`int`, *optional*): How many proponents and opponents; all there are by default.
    """

    def read(hit: dict[str, Any], kind: str) -> list[Hit]:
        pairs = zip(hit[f"{kind}s"][:top_k], hit[f"{kind}_scores"][:top_k], strict=True)
        return [Hit(train[row], score) for row, score in pairs]

    chosen = [hits[row] for row in (range(len(hits)) if rows is None else rows)]
    return [
        Attribution(queries[hit["query_id"]], hit["query_output"], read(hit, "proponent"), read(hit, "opponent"))
        for hit in chosen
    ]
