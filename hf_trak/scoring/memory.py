"""The memory that scoring needs, compared with the limit that was given."""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT_MEMORY = 2 * 10**9
_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_memory(value: int | str | None) -> int | None:
    """Return a number of bytes: 2000000000, "2GB", "512 MiB"; None stays None.

    Raises:
        ValueError: If it is none of these.
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
    if (
        isinstance(value, bool)
        or not match
        or match[2] not in _UNITS
        or not (amount := int(float(match[1]) * _UNITS[match[2]]))
    ):
        raise ValueError(
            f"`max_memory` must be a number of bytes, or one with a unit such as '2GB' or '512MiB', but is {value!r}."
        )
    return amount


@dataclass(frozen=True)
class ScoringMemory:
    """The memory that scoring needs beyond what the process already uses: a sum of parts in bytes.

    Args:
        block_rows, block_bytes (`int`): Rows of a row group, and its bytes in the file.
        top_k (`int`): Number of scores kept per query, for proponents and for opponents; 0 for the whole matrix.
        leverage (`bool`): Whether the leverage of each row is computed and kept.
    """

    block_rows: int
    block_bytes: int
    proj_dim: int
    n_members: int
    n_rows: int
    n_query: int
    top_k: int = 0
    leverage: bool = False

    @property
    def solving(self) -> int:
        """The Gram matrix, its damped copy and factor, and 1,024 solved queries, in float64. The inverse is never formed."""
        return 8 * self.proj_dim * (3 * self.proj_dim + 3 * min(self.n_query, 1024))

    @property
    def queries(self) -> int:
        """Features of all queries under every member in float32, three times for the member that is being solved."""
        return 4 * self.n_query * self.proj_dim * (self.n_members + 2)

    @property
    def block(self) -> int:
        """A row group of every member as float32, and one row group as read from the file, encoded and decoded."""
        rows = 4 * self.block_rows * self.proj_dim * (self.n_members + 4 * self.leverage)
        return rows + 2 * self.block_bytes + 8 * self.n_rows * self.n_members * self.leverage

    @property
    def scores(self) -> int:
        """A block of scores, a second block for one member or the transpose, and the memory to sort the candidates of 256 queries."""
        return self.block_rows * (8 * self.n_query + 64 * min(self.n_query, 256))

    @property
    def hits(self) -> int:
        """Per query, the scores and rows that are kept and as many that wait to be sorted, for proponents and opponents."""
        return 80 * self.n_query * self.top_k

    @property
    def least(self) -> int:
        """The smallest amount that works."""
        return self.queries + max(self.solving, self.streaming)

    @property
    def streaming(self) -> int:
        return self.block + self.scores + self.hits

    def fit(self, given: int | None) -> int:
        """Return the number of bytes that may be used: `given`, or the default if it is enough, else the smallest amount that works.

        Raises:
            ValueError: If `given` is below the smallest amount that works.
        """
        if given is None:
            return max(DEFAULT_MEMORY, self.least)
        if given < self.least:
            raise ValueError(
                f"max_memory is {show(given)}, but scoring takes at least {show(self.least)}: {show(self.queries)} for the features of "
                f"{self.n_query:,} queries; then {show(self.solving)} to solve at proj_dim {self.proj_dim:,}, or, while rows are scored, "
                f"{show(self.block)} for {self.block_rows:,} of them, {show(self.scores)} for their scores and {show(self.hits)} for the "
                f"best {self.top_k:,}. Give more, or ask fewer queries at a time."
            )
        return given


def show(amount: int) -> str:
    """Format a number of bytes for messages, rounded up."""
    for unit in ("GB", "MB"):
        if amount >= _UNITS[unit.lower()]:
            return f"{-(-amount * 10 // _UNITS[unit.lower()]) / 10:.1f} {unit}"
    return f"{amount:,} bytes"
