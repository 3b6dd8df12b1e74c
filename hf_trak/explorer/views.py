"""What the explorer shows of an index: answers, suspicious labels and facts, as rows and as HTML in which every text is escaped."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

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
from hf_trak.querying.label_errors import given_labels
from hf_trak.querying.report import card, section
from hf_trak.scoring.label_errors import check_labels_task
from hf_trak.sources.row_digests import names_read
from hf_trak.tasks.answers import ANSWER_TASKS

if TYPE_CHECKING:
    from datasets import Dataset

SOURCES = ("training", "validation")
KEEP, FIX, DROP = "keep", "fix", "drop"
_SUSPECTS = 200
_SHOWN_MEMBERS = 20
_PIXELS = ("pixel_values", "pixel_values_videos", "input_ids")


@dataclass(frozen=True)
class Answer:
    """What was asked, and the training rows behind the model's answer; `link` names the view, if it is of a row of a dataset."""

    attribution: Attribution
    hits: Dataset
    link: str = ""

    def html(self) -> str:
        """Return the answer as a page shows it."""
        link = f'<p class="meta"><a href="?{escape(self.link)}">link to this view</a></p>' if self.link else ""
        return f'<div class="hf-trak">{section(self.attribution)}{link}</div>'


@dataclass(frozen=True)
class Suspect:
    """A training row whose label looks wrong: its given and its suggested label, by name."""

    example: Example
    given: str
    suggested: str
    score: float
    doubt: float


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
        self._lock = threading.Lock()
        self._suspects: list[Suspect] | None = None
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
        self._train_reader = train_reader(index.config, index.kept_rows, self.train, self.language)

    # Questions.

    @property
    def typed(self) -> str:
        """What can be asked about beside rows: "prompt", "text", "image" or nothing."""
        if self.task_name in ANSWER_TASKS:
            return "prompt"
        if not self.predicts:
            return ""
        if "text" in self.columns:
            return "text"
        return "image" if self.columns.get("image") not in (None, *_PIXELS) else ""

    @property
    def text_columns(self) -> list[str]:
        """The columns whose texts are typed; of a prompt, one."""
        return list(self.columns["text"]) if self.typed == "text" else ["prompt"]

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
        self, source: str, row: int, *, target: str = "prediction", against: str | None = None, top_k: int = 5
    ) -> Answer:
        """Return the training rows behind what the model says of a row of the training or validation set.

        Args:
            target, against (`str`): Of classifiers: "prediction", "label" or a class, and what it is held against. Of other tasks, the
                row's own answer is attributed.

        Raises:
            ValueError: If there is no such row, or the index cannot be asked this.
        """
        rows, one = self._rows(source, row)
        shown = row_reader(self.index.config, rows, self.language)[0 if source == "training" and self.train is None else row]
        shown = replace(shown, row=row)
        link = {"source": source, "row": row}
        if self.predicts:
            asked = {target, against} - {None}
            columns = self._read(label="label" in asked)
            if missing := [name for name in columns if name not in one.column_names]:
                raise ValueError(f"The {source} rows lack {', '.join(map(repr, missing))}, which this question needs.")
            question: dict[str, Any] = {"contrast": (target, against)} if against is not None else {"target": target}
            link |= {"target": target} | ({"against": against} if against is not None else {})
            with self._lock:
                found = self.index.explain(one.select_columns(columns), **question, top_k=top_k, progress=False)
            note = f"label: {shown.label}" if shown.label else ""
            answer = self._answer(replace(shown, label=found.answer, note=note), found.hits)
        else:
            columns = self._read() or one.column_names  # of a task of the user's own, nothing is known
            with self._lock:
                hits = self.index.attribute(one.select_columns(columns), top_k, progress=False)
            answer = self._answer(shown, hits)
        itself = row if source == "training" else -1
        return replace(answer, attribution=_noting(answer.attribution, itself), link=urlencode(link))

    def ask_texts(
        self, texts: Sequence[str], *, target: str = "prediction", against: str | None = None, top_k: int = 5
    ) -> Answer:
        """Return the training rows behind what the model says of a text, or of two; a language model answers a prompt."""
        question: dict[str, Any] = {"prompt": texts[0] if len(texts) == 1 else list(texts)}
        if self.typed == "text":
            question |= self._of_classes(target, against)
        elif self.typed != "prompt":
            raise ValueError(f"This index is of {self.task_name}, which reads no typed text. Ask about a row.")
        return self._explain(question, top_k)

    def ask_image(self, image: Any, *, target: str = "prediction", against: str | None = None, top_k: int = 5) -> Answer:
        """Return the training rows behind what the model says of a picture."""
        if self.typed != "image":
            raise ValueError(f"This index is of {self.task_name}, which reads no single picture. Ask about a row.")
        return self._explain({"image": image, **self._of_classes(target, against)}, top_k)

    def _of_classes(self, target: str, against: str | None) -> dict[str, Any]:
        if "label" in (target, against):
            raise ValueError("What is typed or uploaded has no label: choose the prediction or a class.")
        return {"contrast": (target, against)} if against is not None else {"target": target}

    def _explain(self, question: dict[str, Any], top_k: int) -> Answer:
        with self._lock:
            found = self.index.explain(**question, top_k=top_k, progress=False)
        if self.train is None:
            return Answer(found.attribution, found.hits)
        return self._answer(found.attribution.query, found.hits)

    def _answer(self, query: Example, hits: Dataset) -> Answer:
        return Answer(read_attributions(hits, [query], self._train_reader)[0], hits)

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

    # Label errors.

    @property
    def why_no_suspects(self) -> str:
        """Why no labels can be doubted; empty where they can."""
        identity = self.index.members[0].identity
        try:
            check_labels_task(identity["task"], identity["out_to_loss_kind"])
            if self._given() is None:
                return "The labels of the training set are not at hand. Start the explorer with --train FILE."
        except ValueError as error:
            return str(error)
        return ""

    def _given(self) -> Any:
        config, member = self.index.config, self.index.members[0]
        return given_labels(self.train, member, label_column=config.label_column, index=self.index.folder)

    def suspects(self) -> list[Suspect]:
        """Return the rows whose labels look wrong, the most suspicious first; they are found once.

        Raises:
            ValueError: If labels cannot be doubted: the task has none, or they are not at hand.
        """
        if reason := self.why_no_suspects:
            raise ValueError(reason)
        with self._lock:
            if self._suspects is None:
                trusted = self.validation
                if trusted is not None and self.columns.get("label") not in trusted.column_names:
                    trusted = None
                budget = min(_SUSPECTS, self.index.n_rows)
                found = self.index.label_errors(trusted, train=self.train, budget=budget, progress=False)
                names = getattr(found.features["given_label"], "names", None)
                self._suspects = [
                    Suspect(
                        self._train_reader[row["row"]],
                        _name(row["given_label"], names),
                        _name(row["suggested_label"], names),
                        row["score"],
                        row["doubt"],
                    )
                    for row in found.select_columns(["row", "given_label", "suggested_label", "score", "doubt"])
                ]
        return self._suspects

    def label_choices(self) -> list[str]:
        """Return the names of the labels that the training set has or declares."""
        given = self._given()
        return getattr(given.train.features[given.column], "names", None) or [str(value) for value in given.classes.tolist()]

    def suspect_html(self, place: int, decisions: Mapping[int, str | None]) -> str:
        """Return one suspicious row, and what was decided about it."""
        suspect = self.suspects()[place]
        decided = _decision(decisions.get(suspect.example.row, ""), suspect.given)
        words = (
            f'<p>{place + 1} of {len(self.suspects()):,} · label <span class="label">{_shown(suspect.given)}</span>, suggested '
            f'<span class="label">{_shown(suspect.suggested)}</span> · suspicion {suspect.score:.3f}, the model\'s doubt {suspect.doubt:.3f}'
            f'</p><p class="decision">{decided}</p>'
        )
        return f'<div class="hf-trak">{card(Hit(suspect.example, suspect.score), "")}{words}</div>'

    def decide(self, decisions: Mapping[int, str | None], row: int, label: str | None) -> dict[int, str | None]:
        """Return decisions with one more: a label to keep or to set, or None to drop the row.

        Raises:
            ValueError: If there is no such label.
        """
        if label is not None and label not in self.label_choices():
            raise ValueError(f"{label!r} is none of the labels {', '.join(self.label_choices())}.")
        return {**decisions, row: label}

    def decisions_rows(self, decisions: Mapping[int, str | None]) -> list[dict[str, Any]]:
        """Return decisions as rows: `row`, `decision` (keep, fix or drop), `given_label` and `label`, None of a dropped row."""
        given = self._given()
        names, codes = getattr(given.train.features[given.column], "names", None), given.codes.tolist()
        found = []
        for row in sorted(decisions):
            old = _name(given.classes[codes[row]].item(), names)
            label = decisions[row]
            kind = DROP if label is None else KEEP if label == old else FIX
            found.append({"row": row, "decision": kind, "given_label": old, "label": label})
        return found

    def fixed(self, decisions: Mapping[int, str | None]) -> Dataset:
        """Return the training set with the decisions applied: labels fixed, dropped rows left out, the others as they are."""
        given = self._given()
        source = self.train.with_format(None) if self.train is not None else self.index.kept_rows.take(range(self.index.n_rows))
        kind = source.features[given.column]
        names = getattr(kind, "names", None)
        values = list(source[given.column])
        known = {_name(value, names): value for value in given.classes.tolist()} | {
            name: number for number, name in enumerate(names or [])
        }
        for decided in self.decisions_rows(decisions):
            if decided["decision"] == FIX:
                values[decided["row"]] = known[decided["label"]]
        left = [row for row in range(len(source)) if decisions.get(row, "") is not None]
        rest = source.select(left).remove_columns([given.column])
        rest = rest.add_column(given.column, [values[row] for row in left], feature=kind)
        result: Dataset = rest.select_columns(source.column_names)
        return result

    def export(self, decisions: Mapping[int, str | None], folder: str | Path) -> Path:
        """Save the fixed training set, for `Dataset.load_from_disk`, and `decisions.json`, in a new folder of `folder`; nothing is replaced.

        Raises:
            ValueError: If nothing was decided.
        """
        if not decisions:
            raise ValueError("Nothing was decided yet: keep, fix or drop a row first.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".unfinished_{os.getpid()}"
        with self._lock:
            try:
                self.fixed(decisions).save_to_disk(str(unfinished))
                lines = json.dumps(self.decisions_rows(decisions), indent=1, ensure_ascii=False)
                (unfinished / "decisions.json").write_text(lines + "\n", encoding="utf-8")
                number = 1
                while (target := folder / f"fixed_{number}").exists():
                    number += 1
                os.rename(unfinished, target)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return target

    # About.

    def facts(self) -> dict[str, str]:
        """Return what the index is, in words."""
        index, first = self.index, self.index.members[0]
        with self._lock:
            damping = index.resolve_damping()
        how = "set"
        if index.config.damping == "auto":
            how = "the default" if index.damping_choice() is None else "chosen by the members' subsets"
        kept = ", ".join(index.kept_rows.column_names) or "none"
        return {
            "index": str(index.home),
            "task": self.task_name,
            "training rows": f"{index.n_rows:,}",
            "model": str(first.identity["model_class"]),
            "parameters covered": f"{first.info['coverage']:.1%} of the trainable ones",
            "members": f"{len(index.members)} of {index.n_checkpoints} checkpoints",
            "features per row": f"{index.config.proj_dim:,}",
            "damping": f"{damping:g} times the mean eigenvalue ({how})",
            "kept columns": kept,
            "features": "in memory" if self.in_memory else "read from disk at each question",
        }

    def about_html(self) -> str:
        """Return the facts, the members, and the curve that the damping was chosen by, if it was."""
        facts = "".join(f"<tr><th>{_shown(name)}</th><td>{_shown(value)}</td></tr>" for name, value in self.facts().items())
        members = "".join(
            f"<tr><td>{number}</td><td>{_shown(str(member.info['checkpoint'].get('repository') or 'a folder or a model in memory'))}</td>"
            f"<td>{_shown(str(member.identity['model_sha256'])[:12])}</td>"
            f"<td>{_shown(str(member.identity.get('point', {}).get('alpha', '')))}</td><td>{member.identity['seed']}</td></tr>"
            for number, member in enumerate(self.index.members[:_SHOWN_MEMBERS])
        )
        more = len(self.index.members) - _SHOWN_MEMBERS
        parts = [
            f"<table>{facts}</table><h3>Members</h3>",
            "<table><tr><th>member</th><th>checkpoint</th><th>weights</th><th>point of the path</th><th>sketch seed</th></tr>",
            f"{members}</table>",
            f"<p>and {more} more</p>" if more > 0 else "",
        ]
        if self.index.config.damping == "auto" and (choice := self.index.damping_choice()) is not None:
            rows = "".join(
                f"<tr><td>{damping:g}</td><td>{value:.3f}</td><td>{'chosen' if damping == choice.damping else ''}</td></tr>"
                for damping, value in zip(choice.grid, choice.curve, strict=True)
            )
            parts.append(f"<h3>Damping</h3><table><tr><th>damping</th><th>rank correlation</th><th></th></tr>{rows}</table>")
        return f'<div class="hf-trak">{"".join(parts)}</div>'


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


def _name(value: Any, names: Sequence[str] | None) -> str:
    return names[value] if names and isinstance(value, int) else str(value)


def _shown(text: str) -> str:
    return escape(visible(text))


def _decision(label: str | None, given: str) -> str:
    if label is None:
        return "decided: drop the row"
    if not label:
        return "not decided"
    return f"decided: keep the label {_shown(label)}" if label == given else f"decided: the label is {_shown(label)}"
