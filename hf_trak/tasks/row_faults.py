"""Rows that cannot serve, collected over a whole dataset and told at once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

_SHOWN = 10
_VARIES = re.compile(r"-?\d+(\.\d+)?|'[^']*'")


class Faults:
    """Collects what is wrong with rows, by reason.

    Args:
        n_rows (`int`): Of the dataset.
    """

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self._wrong: _Groups = {}
        self._unscored: _Groups = {}
        self._cut: list[int] = []

    def cannot_serve(self, row: int, reason: str) -> None:
        """Remember a row that cannot serve; reasons that differ in numbers and names alone are one."""
        self._wrong.setdefault(_VARIES.sub("#", reason), []).append((row, reason))

    def no_scored_token(self, row: int, reason: str) -> None:
        """Remember a row without a scored token."""
        self._unscored.setdefault(_VARIES.sub("#", reason), []).append((row, reason))

    def cut(self, row: int) -> None:
        """Remember a row of which tokens are cut off."""
        self._cut.append(row)

    def raise_for_rows(self) -> None:
        """Raise a ValueError if a row cannot serve, with every reason and its rows."""
        if self._wrong:
            count = sum(map(len, self._wrong.values()))
            raise ValueError((f"{count} of {self.n_rows} rows cannot serve. " if count > 1 else "") + f"{_list(self._wrong)}.")

    def raise_for_unscored(self, *, skip: bool) -> None:
        """Raise a ValueError if rows have no scored token, unless they are skipped and there are others."""
        count = sum(map(len, self._unscored.values()))
        if count == 0 or (skip and count < self.n_rows):
            return
        many = "them" if count > 1 else "it"
        way = (
            "No row of the dataset has a scored token, so there is nothing to attribute"
            if count == self.n_rows
            else f"Nothing was learned from {many}: filter {many} out, or set skip_unscored=True (--skip_unscored) to keep {many} in place "
            "with features and scores of zero"
        )
        start = f"{count} of {self.n_rows} rows {'have' if count > 1 else 'has'} no scored token. "
        raise ValueError(f"{start}{_list(self._unscored)}. {way}.")

    def notes(self, limit: str, *, skip: bool) -> Iterator[str]:
        """Yield a line on rows that are cut, and one on rows that are skipped."""
        if self._cut:
            yield f"{len(self._cut)} of {self.n_rows} rows are cut at {limit}, the first of them row {self._cut[0]}."
        if skip and self._unscored:
            count = sum(map(len, self._unscored.values()))
            yield f"{count} of {self.n_rows} rows have no scored token; their features and scores are zero. {_list(self._unscored)}."


_Groups = dict[str, list[tuple[int, str]]]


def _list(groups: _Groups) -> str:
    """Return the rows of each reason, with the reason of the first."""
    return ". ".join(
        f"{_rows([row for row, _ in group])} cannot serve: {group[0][1]}"
        + (f" (row {group[0][0]}; {len(group)} rows in all)" if len(group) > 1 else "")
        for group in groups.values()
    )


def _rows(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return f"{'Row' if len(numbers) == 1 else 'Rows'} {shown}{', …' if len(numbers) > _SHOWN else ''}"
