"""Rows that cannot serve, collected over a whole dataset and told at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

_SHOWN = 10
_VARIES = re.compile(r"-?\d+(\.\d+)?|'[^']*'")


class Faults:
    """Collects what is wrong with rows, by reason.

    Args:
        n_rows (`int`): Of the dataset.
    """

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self._wrong: dict[str, list[tuple[int, str]]] = {}
        self._unscored: dict[str, list[int]] = {}
        self._cut: list[int] = []

    def cannot_serve(self, row: int, reason: str) -> None:
        """Remember a row that cannot serve; reasons that differ in numbers and names alone are one."""
        self._wrong.setdefault(_VARIES.sub("#", reason), []).append((row, reason))

    def no_scored_token(self, row: int, reason: str) -> None:
        """Remember a row without a scored token."""
        self._unscored.setdefault(reason, []).append(row)

    def cut(self, row: int) -> None:
        """Remember a row of which tokens are cut off."""
        self._cut.append(row)

    def raise_for_rows(self) -> None:
        """Raise a ValueError if a row cannot serve, with every reason and its rows."""
        groups = list(self._wrong.values())
        count = sum(map(len, groups))
        if count == 1:
            raise ValueError(f"Row {groups[0][0][0]} cannot serve: {groups[0][0][1]}.")
        if groups:
            parts = [
                f"{_rows([row for row, _ in group])} ({_count(group)}){', for example row ' + str(group[0][0]) if len(group) > 1 else ''}: "
                f"{group[0][1]}."
                for group in groups
            ]
            raise ValueError(f"{count} of {self.n_rows} rows cannot serve. " + " ".join(parts))

    def raise_for_unscored(self, *, skip: bool) -> None:
        """Raise a ValueError if rows have no scored token, unless they are skipped or there is no other row."""
        count = sum(map(len, self._unscored.values()))
        if count == 0 or (skip and count < self.n_rows):
            return
        rows = "the only row has" if self.n_rows == 1 else f"{count} of {self.n_rows} rows have"
        parts = ". ".join(f"{_rows(found)} cannot serve: {reason} ({_count(found)})" for reason, found in self._unscored.items())
        way = (
            "There is nothing to attribute."
            if count == self.n_rows
            else "Nothing was learned from them. Filter them out, or set skip_unscored=True (--skip_unscored) to keep them in place with a "
            "gradient and scores of zero."
        )
        raise ValueError(f"{rows[0].upper()}{rows[1:]} no scored token. {parts}. {way}")

    def notes(self, limit: str, *, skip: bool) -> Iterator[str]:
        """Yield a line on rows that are cut, and one on rows that are skipped."""
        if self._cut:
            yield f"{len(self._cut)} of {self.n_rows} rows are cut at {limit}, the first of them row {self._cut[0]}."
        count = sum(map(len, self._unscored.values()))
        if skip and count:
            yield (
                f"{count} of {self.n_rows} rows have no scored token and get features and scores of zero: "
                + "; ".join(f"{_rows(found)}, {reason} ({_count(found)})" for reason, found in self._unscored.items())
                + "."
            )


def _rows(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return f"{'Row' if len(numbers) == 1 else 'Rows'} {shown}{', …' if len(numbers) > _SHOWN else ''}"


def _count(found: Sequence[Any]) -> str:
    return f"{len(found)} row{'s' * (len(found) > 1)}"
