"""What the explorer answers of an index: attributions of rows, texts and pictures, as rows and as HTML in which every text is escaped."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import numpy as np

from hf_trak.index import AttributionIndex
from hf_trak.messages import one_line, visible
from hf_trak.querying.examples import (
    LANGUAGE_TASKS,
    Attribution,
    Example,
    Hit,
    LanguageRows,
    read_attributions,
    row_reader,
    train_reader,
)
from hf_trak.querying.report_page import card, section
from hf_trak.sources.row_digests import names_read
from hf_trak.tasks import TASKS
from hf_trak.tasks.answers import ANSWER_TASKS

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_trak.querying.explanations import Explanation

SOURCES = ("training", "validation")
DIRECTIONS = ("pair", "image", "caption")
_LONGEST_LINK = 2000  # what proxies and browsers pass on
_MOST_SCORES = 50_000_000
_PIXELS = ("pixel_values", "pixel_values_videos", "input_ids")


@dataclass(frozen=True)
class Answer:
    """What was asked, and the training rows behind the model's answer; `link` opens the view again, and is empty of a picture."""

    attribution: Attribution
    hits: Dataset
    link: str = ""

    def html(self) -> str:
        """Return the answer as a page shows it."""
        return f'<div class="hf-trak"><h2>Answer</h2>{section(self.attribution)}{link_html(self.link)}</div>'


@dataclass(frozen=True)
class Influence:
    """The training rows that raised and lowered the outputs of a set of rows most, and those that did next to nothing."""

    n_queries: int
    source: str
    best: list[Hit]
    worst: list[Hit]
    useless: list[Hit]
    known_direction: bool
    link: str = ""

    def html(self) -> str:
        """Return three lists of rows as a page shows them."""
        words = ("Most helpful: ", "Most harmful: ") if self.known_direction else ("", "")
        groups = (
            ("pro", f"{words[0]}raised the outputs of these rows most", self.best),
            ("con", f"{words[1]}lowered the outputs of these rows most", self.worst),
            ("", "Useless: the smallest mean size of a score", self.useless),
        )
        most = max((abs(hit.score) for hit in (*self.best, *self.worst)), default=0.0)
        parts = [
            f'<h3 class="{kind}">{heading}</h3><div class="row">{"".join(card(hit, kind, most) for hit in hits)}</div>'
            for kind, heading, hits in groups
            if hits
        ]
        what = f"{self.n_queries:,} {self.source} rows, scores in their mean"
        if self.source == "training":
            what += ", without the score of a row for itself"
        return (
            f'<div class="hf-trak"><h2>Training rows</h2><p class="meta">{what}</p>{"".join(parts)}{link_html(self.link)}</div>'
        )


class Explorer:
    """An index that is asked many questions: models and features are loaded once, and one question is answered at a time.

    Args:
        index (`AttributionIndex`): To ask.
        train (`Dataset`, *optional*): The training set, in any order; by default the columns that the index kept stand for it.
        validation (`Dataset`, *optional*): Rows to ask about, with the columns of the training set. Its labels, if it has any, are
            trusted when labels of the training set are doubted.
        max_memory (`int` or `str`): As of [`AttributionIndex.keep_in_memory`].

    Raises:
        ValueError: If `train` is another training set, or the recorded checkpoints cannot be used.
    """

    def __init__(
        self,
        index: AttributionIndex,
        *,
        train: Dataset | None = None,
        validation: Dataset | None = None,
        max_memory: int | str = "8GB",
    ) -> None:
        self.index = index
        self.train = None if train is None else index.align(train)
        self.validation = validation
        self.in_memory = index.keep_in_memory(max_memory)
        self.lock = threading.Lock()
        described = index.members[0].identity["dataset"]
        self.task_name: str = index.members[0].identity["task"]
        self.columns: dict[str, Any] = described.get("columns") or {}
        featurizer = index.featurizer()
        self.language = None
        if self.task_name in LANGUAGE_TASKS:
            config = index.config
            self.language = LanguageRows(
                self.task_name, featurizer.processing_class, text_columns=config.text_columns, label_column=config.label_column
            )
        self.classes: list[str] = []  # to choose as a target
        self.predicts = True
        try:
            targets = featurizer.task.for_targets()
        except ValueError:  # the task says that its outputs are not to be chosen
            self.predicts = False
        else:
            if not targets.several_labels and targets.n_classes is not None:
                self.classes = targets.class_names(described.get("label_names"))
        self.train_reader = train_reader(index.config, index.kept_rows, self.train, self.language)

    # Questions.

    @property
    def typed(self) -> str:
        """What can be asked about beside rows: "prompt", "text", "image", "pair" (a picture and its caption) or nothing."""
        if self.task_name in ANSWER_TASKS:
            return "prompt"
        if self.pairs:
            return "pair" if self.columns.get("image") not in (None, *_PIXELS) and "text" in self.columns else ""
        if not self.predicts:
            return ""
        if "text" in self.columns:
            return "text"
        return "image" if self.columns.get("image") not in (None, *_PIXELS) else ""

    @property
    def pairs(self) -> bool:
        """Whether rows are pictures with captions, of which either side can be attributed alone."""
        return self.task_name == "contrastive"

    @property
    def text_columns(self) -> list[str]:
        """The columns whose texts are typed; of a prompt, one."""
        return list(self.columns["text"]) if self.typed in ("text", "pair") else ["prompt"] if self.typed == "prompt" else []

    def n_rows(self, source: str) -> int:
        """Return how many rows of a source can be asked about: none of a training set that is not at hand."""
        if source == "validation":
            return 0 if self.validation is None else len(self.validation)
        if self._of_chunks:
            return 0
        if self.train is not None:
            return len(self.train)
        kept = set(self.index.kept_rows.column_names)
        return self.index.n_rows if kept and set(self._read()) <= kept else 0

    def ask_row(
        self,
        source: str,
        row: int,
        *,
        target: str = "prediction",
        against: str | None = None,
        direction: str = "pair",
        top_k: int = 5,
    ) -> Answer:
        """Return the training rows behind what the model says of a row of the training or validation set.

        Args:
            target, against (`str`): Of classifiers: "prediction", "label" or a class, and what it is held against. Of other tasks, the
                row's own answer is attributed.
            direction (`str`): Of pictures with captions, as of [`AttributionIndex.score`].

        Raises:
            ValueError: If there is no such row, or the index cannot be asked this.
        """
        rows, one = self._rows(source, row)
        shown = row_reader(self.index.config, rows, self.language)[0 if source == "training" and self.train is None else row]
        shown = replace(shown, row=row)
        link: dict[str, Any] = {"source": source, "row": row}
        if self.predicts:
            asked = {target, against} - {None}
            one = self._asked_columns(source, one, label="label" in asked)
            question: dict[str, Any] = {"contrast": (target, against)} if against is not None else {"target": target}
            link |= {"target": target} | ({"against": against} if against is not None else {})
            with self.lock:
                found = self.index.explain(one, **question, top_k=top_k, progress=False)
            note = f"label: {shown.label}" if shown.label else ""
            answer = self._shown(found, replace(shown, label=found.answer, note=note))
        else:
            one = self._asked_columns(source, one)
            with self.lock:
                hits = self.index.attribute(one, top_k, direction=direction, progress=False)
            answer = self._answer(shown, hits)
            link |= {"direction": direction} if self.pairs else {}
        itself = row if source == "training" else -1
        return replace(answer, attribution=_noting(answer.attribution, itself), link=link_to("ask", **link, top_k=top_k))

    def ask_texts(
        self, texts: Sequence[str], *, target: str = "prediction", against: str | None = None, top_k: int = 5
    ) -> Answer:
        """Return the training rows behind what the model says of a text, or of two."""
        if self.typed != "text":
            raise ValueError(f"This index is of {self.task_name}, which reads no single text. Ask about a row.")
        question: dict[str, Any] = {"prompt": texts[0] if len(texts) == 1 else list(texts)}
        link = {"text" if i == 0 else f"text{i + 1}": text for i, text in enumerate(texts)} | {"target": target}
        link |= {"against": against} if against is not None else {}
        return self._explain(question | self._of_classes(target, against), top_k, source="text", **link)

    def ask_prompt(
        self, prompt: str, *, answer: str = "", span: str = "", against: str = "", heat: bool = False, top_k: int = 5
    ) -> Answer:
        """Return the training rows behind a language model's answer to a prompt.

        Args:
            answer (`str`): What the model is taken to answer; if empty, it generates its answer.
            span (`str`): Attribute this part of the answer alone.
            against (`str`): Another answer, that the first is held against.
            heat (`bool`): Show what each token of the answer adds to the scores.
        """
        if self.typed != "prompt":
            raise ValueError(f"This index is of {self.task_name}, which answers no prompt. Ask about a row.")
        if not prompt:
            raise ValueError("Type a prompt first.")
        texts = {"answer": answer, "span": span, "contrast": against}
        question: dict[str, Any] = {"prompt": prompt, "heat": heat} | {name: text for name, text in texts.items() if text}
        link = {name: text for name, text in {"answer": answer, "span": span, "against": against}.items() if text}
        return self._explain(question, top_k, source="prompt", text=prompt, heat=int(heat), **link)

    def ask_image(self, image: Any, *, target: str = "prediction", against: str | None = None, top_k: int = 5) -> Answer:
        """Return the training rows behind what the model says of a picture."""
        if self.typed != "image":
            raise ValueError(f"This index is of {self.task_name}, which reads no single picture. Ask about a row.")
        if image is None:
            raise ValueError("Upload a picture first.")
        return self._explain({"image": image, **self._of_classes(target, against)}, top_k)

    def ask_pair(self, image: Any, caption: str, *, direction: str = "pair", top_k: int = 5) -> Answer:
        """Return the training rows behind the match of a picture and a caption.

        Args:
            direction (`str`): "pair"; "image", how the picture tells its caption from others; or "caption", how the caption tells its picture.
        """
        from datasets import Dataset, Features, Image, Value

        if self.typed != "pair":
            raise ValueError(f"This index is of {self.task_name}, which reads no picture with a caption. Ask about a row.")
        if image is None or not caption:
            raise ValueError("Upload a picture and type its caption first.")
        (column,) = self.columns["text"]
        kinds = Features({self.columns["image"]: Image(), column: Value("string")})
        one = Dataset.from_dict({self.columns["image"]: [image], column: [caption]}, features=kinds)
        with self.lock:
            hits = self.index.attribute(one, top_k, direction=direction, progress=False)
        return self._answer(row_reader(self.index.config, one)[0], hits)

    def _of_classes(self, target: str, against: str | None) -> dict[str, Any]:
        if "label" in (target, against):
            raise ValueError("What is typed or uploaded has no label: choose the prediction or a class.")
        return {"contrast": (target, against)} if against is not None else {"target": target}

    def _explain(self, question: dict[str, Any], top_k: int, **link: Any) -> Answer:
        with self.lock:
            found = self.index.explain(**question, top_k=top_k, progress=False)
        answer = self._shown(found, found.attribution.query)
        return replace(answer, link=link_to("ask", **link, top_k=top_k) if link else "")

    def _shown(self, found: Explanation, query: Example) -> Answer:
        """Return an explanation as an answer; with a training set, its rows are shown, with the token highlights of the explanation."""
        shown = replace(found.attribution, query=query)
        if self.train is not None:
            given = (*shown.proponents, *shown.opponents)
            heats = {hit.example.row: hit.heat for hit in given}
            shown = read_attributions(found.hits, [query], self.train_reader)[0]
            sides = [
                [replace(hit, heat=heats[hit.example.row]) for hit in side] for side in (shown.proponents, shown.opponents)
            ]
            shown = replace(shown, proponents=sides[0], opponents=sides[1])
        return Answer(shown, found.hits)

    def _answer(self, query: Example, hits: Dataset) -> Answer:
        return Answer(read_attributions(hits, [query], self.train_reader)[0], hits)

    def _read(self, *, label: bool | None = None) -> list[str]:
        """Return the columns that a question reads, with the label where it is asked about."""
        if self._of_chunks:
            return list(self.index.config.text_columns or ())
        with_label = not self.predicts if label is None else label
        return names_read({key: value for key, value in self.columns.items() if with_label or key != "label"})

    @property
    def _of_chunks(self) -> bool:
        """Whether training rows are chunks of documents, which are read with the end of the chunk before."""
        return self.index.config.chunk_overlap is not None

    def _asked_columns(self, source: str, rows: Dataset, *, label: bool | None = None) -> Dataset:
        """Return rows with the columns that a question reads."""
        columns = self._read(label=label) or rows.column_names  # of a task of the user's own, nothing is known
        if missing := [name for name in columns if name not in rows.column_names]:
            raise ValueError(f"The {source} rows lack {', '.join(map(repr, missing))}, which this question needs.")
        return rows.select_columns(columns)

    def _rows(self, source: str, row: int) -> tuple[Dataset, Dataset]:
        """Return the rows of a source (of kept columns, the one row alone), and one of them."""
        if source not in SOURCES:
            raise ValueError(f"Rows are of {' or '.join(SOURCES)}, and not of {source!r}.")
        n_rows = self.n_rows(source)
        if n_rows == 0:
            if source == "training" and self._of_chunks:
                raise ValueError("Training rows are chunks of documents, which are no questions by themselves. Type a prompt.")
            flag = "--train FILE, or make the index with --keep_columns" if source == "training" else "--validation FILE"
            raise ValueError(f"There are no {source} rows to ask about. Start the explorer with {flag}.")
        if not 0 <= row < n_rows:
            raise ValueError(f"The {source} rows are 0 to {n_rows - 1:,}, but row {row} was asked for.")
        if source == "training" and self.train is None:
            one = self.index.kept_rows.take([row])
            return one, one
        rows = self.train if source == "training" else self.validation
        assert rows is not None
        return rows, rows.select([row])

    def influence(self, source: str, n_queries: int, *, target: str = "prediction", top_k: int = 5) -> Influence:
        """Return the training rows that helped and hurt the first rows of the training or validation set most, in the mean, and the useless ones.

        Args:
            target (`str`): Of classifiers: "prediction", "label" or a class.

        Raises:
            ValueError: If there are no such rows, or so many that the scores do not fit in memory.
        """
        rows, _ = self._rows(source, 0)  # refuses where there are none
        most = max(1, _MOST_SCORES // self.index.n_rows)
        if not 0 < n_queries <= most:
            raise ValueError(
                f"Ask about 1 to {most:,} rows at once, not {n_queries:,}: {self.index.n_rows:,} scores are kept of each."
            )
        n_queries = min(n_queries, self.n_rows(source))
        is_kept = source == "training" and self.train is None
        queries = self.index.kept_rows.take(range(n_queries)) if is_kept else rows.select(range(n_queries))
        queries = self._asked_columns(source, queries, label=target == "label" if self.predicts else None)
        asked: dict[str, Any] = {"target": target} if self.predicts else {}
        with self.lock:
            scores = np.asarray(self.index.score(queries, **asked, progress=False), dtype=np.float64)
        if source == "training":
            scores[np.arange(n_queries), np.arange(n_queries)] = 0.0
        mean, size = scores.mean(1), np.abs(scores).mean(1)
        order, least = np.argsort(-mean, kind="stable").tolist(), np.argsort(size, kind="stable").tolist()
        best = [self._hit(row, mean[row]) for row in order[:top_k] if mean[row] > 0]
        worst = [self._hit(row, mean[row]) for row in order[::-1][:top_k] if mean[row] < 0]
        useless = [self._hit(row, mean[row]) for row in least[:top_k]]
        known = self.index.config.task in TASKS
        link = link_to("rows", source=source, first=n_queries, **asked, top_k=top_k)
        return Influence(n_queries, source, best, worst, useless, known, link)

    def _hit(self, row: int, score: float) -> Hit:
        return Hit(self.train_reader[row], float(score))


def link_to(view: str, **what: Any) -> str:
    """Return the query string of a view; empty if it would be too long for browsers."""
    found = urlencode({"view": view, **what})
    return found if len(found) <= _LONGEST_LINK else ""


def link_html(link: str) -> str:
    """Return a link to a view as HTML; nothing without one."""
    return f'<p class="meta"><a href="?{escape(link)}">link to this view</a></p>' if link else ""


def error_html(error: Exception) -> str:
    """Return an error as one escaped line."""
    return f'<div class="hf-trak"><p class="error" role="alert">{escape(one_line(str(error)))}</p></div>'


def _noting(found: Attribution, itself: int) -> Attribution:
    """Return an attribution that says which training row is the query itself."""
    sides = [
        [
            replace(hit, example=replace(hit.example, note="the row itself")) if hit.example.row == itself else hit
            for hit in side
        ]
        for side in (found.proponents, found.opponents)
    ]
    return replace(found, proponents=sides[0], opponents=sides[1])


def shown(text: str) -> str:
    """Return a text as HTML shows it: escaped, and without characters that hide or act."""
    return escape(visible(text))
