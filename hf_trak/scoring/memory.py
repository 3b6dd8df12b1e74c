"""How much memory scoring takes, and whether that is more than one was given."""

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
    """What scoring takes beside what the process had before it: a sum of parts, each in bytes.

    Args:
        block_rows, block_bytes (`int`): Of a row group: rows, and bytes in its file.
        top_k (`int`): Scores kept of each query and side; 0 where the matrix is wanted.
        leverage (`bool`): Whether each row's leverage is found and kept.
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
        """The Gram matrix, damped and factored, and 1,024 queries solved, in float64; the inverse is never formed."""
        return 8 * self.proj_dim * (3 * self.proj_dim + 3 * min(self.n_query, 1024))

    @property
    def queries(self) -> int:
        """Features of all queries under every member, one member's three times while it is solved, in float32."""
        return 4 * self.n_query * self.proj_dim * (self.n_members + 2)

    @property
    def block(self) -> int:
        """A row group of every member as float32, and one as the file has it, read and decoded."""
        rows = 4 * self.block_rows * self.proj_dim * (self.n_members + 4 * self.leverage)
        return rows + 2 * self.block_bytes + 8 * self.n_rows * self.n_members * self.leverage

    @property
    def scores(self) -> int:
        """A block of scores, that of one member or its transpose beside it, and what sorting the candidates of 256 queries takes."""
        return self.block_rows * (8 * self.n_query + 64 * min(self.n_query, 256))

    @property
    def hits(self) -> int:
        """Of each query, as many scores and their rows as are kept and as wait, for proponents and opponents."""
        return 80 * self.n_query * self.top_k

    @property
    def least(self) -> int:
        """The least that works."""
        return self.queries + max(self.solving, self.streaming)

    @property
    def streaming(self) -> int:
        return self.block + self.scores + self.hits

    def fit(self, given: int | None) -> int:
        """Return how many bytes may be used: those given, or the default and at least the least.

        Raises:
            ValueError: If fewer were given than the least that works.
        """
        if given is None:
            return max(DEFAULT_MEMORY, self.least)
        if given < self.least:
            raise ValueError(
                f"max_memory is {show(given)}, but scoring takes at least {show(self.least)}: {show(self.queries)} for the features of "
                f"{self.n_query:,} queries; then {show(self.solving)} to solve at proj_dim {self.proj_dim:,}, or, while rows stream by, "
                f"{show(self.block)} for {self.block_rows:,} of them, {show(self.scores)} for their scores and {show(self.hits)} for the "
                f"best {self.top_k:,}. Give more, or ask fewer queries at a time."
            )
        return given


def show(amount: int) -> str:
    """Return bytes as one reads them, rounded up."""
    for unit in ("GB", "MB"):
        if amount >= _UNITS[unit.lower()]:
            return f"{-(-amount * 10 // _UNITS[unit.lower()]) / 10:.1f} {unit}"
    return f"{amount:,} bytes"
