"""Labels that look wrong: they are gone through one by one, and the training set is saved with what was decided."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.explorer.views import Explorer, link_html, link_to, shown
from hf_trak.querying.examples import Example, Hit
from hf_trak.querying.label_errors import given_labels
from hf_trak.querying.report_page import card
from hf_trak.scoring.label_errors import check_labels_task

if TYPE_CHECKING:
    from datasets import Dataset

KEEP, FIX, DROP = "keep", "fix", "drop"
_SUSPECTS = 200


@dataclass(frozen=True)
class Suspect:
    """A training row whose label looks wrong: its given and its suggested label, by name."""

    example: Example
    given: str
    suggested: str
    score: float
    doubt: float


class LabelDesk:
    """The training rows of an explorer whose labels look wrong. Decisions are the caller's, by row: a label, or None to drop the row.

    Args:
        explorer ([`Explorer`]): Its validation set's labels, if it has any, are taken to be right.
    """

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self._suspects: list[Suspect] | None = None

    @property
    def why_no_suspects(self) -> str:
        """Why no labels can be doubted; empty where they can."""
        identity = self.explorer.index.members[0].identity
        try:
            check_labels_task(identity["task"], identity["out_to_loss_kind"])
            if self._given() is None:
                return "The labels of the training set are not at hand. Start the explorer with --train FILE."
        except ValueError as error:
            return str(error)
        return ""

    def _given(self) -> Any:
        config, member = self.explorer.index.config, self.explorer.index.members[0]
        return given_labels(self.explorer.train, member, label_column=config.label_column, index=self.explorer.index.folder)

    def suspects(self) -> list[Suspect]:
        """Return the rows whose labels look wrong, the most suspicious first; they are found once.

        Raises:
            ValueError: If labels cannot be doubted: the task has none, or they are not at hand.
        """
        if reason := self.why_no_suspects:
            raise ValueError(reason)
        with self.explorer.lock:
            if self._suspects is None:
                trusted = self.explorer.validation
                if trusted is not None and self.explorer.columns.get("label") not in trusted.column_names:
                    trusted = None
                budget = min(_SUSPECTS, self.explorer.index.n_rows)
                found = self.explorer.index.label_errors(trusted, train=self.explorer.train, budget=budget, progress=False)
                names = getattr(found.features["given_label"], "names", None)
                self._suspects = [
                    Suspect(
                        self.explorer.train_reader[row["row"]],
                        _name(row["given_label"], names),
                        _name(row["suggested_label"], names),
                        row["score"],
                        row["doubt"],
                    )
                    for row in found.select_columns(["row", "given_label", "suggested_label", "score", "doubt"])
                ]
        return self._suspects

    def choices(self) -> list[str]:
        """Return the names of the labels that the training set has or declares."""
        given = self._given()
        return getattr(given.train.features[given.column], "names", None) or [str(value) for value in given.classes.tolist()]

    def suspect_html(self, place: int, decisions: Mapping[int, str | None]) -> str:
        """Return one suspicious row, and what was decided about it."""
        suspect = self.suspects()[place]
        decided = _decision(decisions.get(suspect.example.row, ""), suspect.given)
        words = (
            f'<p>{place + 1} of {len(self.suspects()):,} · label <span class="label">{shown(suspect.given)}</span>, suggested '
            f'<span class="label">{shown(suspect.suggested)}</span> · suspicion {suspect.score:.3f}, the model\'s doubt {suspect.doubt:.3f}'
            f'</p><p class="decision">{decided}</p>'
        )
        link = link_html(link_to("labels", place=place + 1))
        return f'<div class="hf-trak">{card(Hit(suspect.example, suspect.score), "")}{words}{link}</div>'

    def decide(self, decisions: Mapping[int, str | None], row: int, label: str | None) -> dict[int, str | None]:
        """Return decisions with one more: a label to keep or to set, or None to drop the row.

        Raises:
            ValueError: If there is no such label.
        """
        if label is not None and label not in self.choices():
            raise ValueError(f"{label!r} is none of the labels {', '.join(self.choices())}.")
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

    def decisions_html(self, decisions: Mapping[int, str | None]) -> str:
        """Return decisions as JSON to copy, where nothing can be written.

        Raises:
            ValueError: If nothing was decided.
        """
        if not decisions:
            raise ValueError("Nothing was decided yet: keep, fix or drop a row first.")
        lines = json.dumps(self.decisions_rows(decisions), indent=1, ensure_ascii=True)
        return f'<div class="hf-trak"><pre tabindex="0">{escape(lines)}</pre></div>'

    def fixed(self, decisions: Mapping[int, str | None]) -> Dataset:
        """Return the training set with the decisions applied: labels fixed, dropped rows left out, the others as they are."""
        given = self._given()
        source = (
            self.explorer.train.with_format(None)
            if self.explorer.train is not None
            else self.explorer.index.kept_rows.take(range(self.explorer.index.n_rows))
        )
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
        with self.explorer.lock:
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


def _name(value: Any, names: Sequence[str] | None) -> str:
    return names[value] if names and isinstance(value, int) else str(value)


def _decision(label: str | None, given: str) -> str:
    if label is None:
        return "decided: drop the row"
    if not label:
        return "not decided"
    return f"decided: keep the label {shown(label)}" if label == given else f"decided: the label is {shown(label)}"
