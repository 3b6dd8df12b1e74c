"""Ground truth of fact tracing: which abstracts state the fact that a query asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int64

if TYPE_CHECKING:
    from datasets import Dataset


class Fact(NamedTuple):
    """A triple, in the order in which FTRACE writes it: the object comes second."""

    predicate: str
    object: str
    subject: str


def parse_facts(joined: str) -> list[Fact]:
    """Split an abstract's `facts`: `predicate,object,subject`, joined by `;`.

    Raises:
        ValueError: If a part is not three names.
    """
    facts = []
    for part in filter(None, joined.split(";")):
        names = part.split(",")
        if len(names) != 3:
            raise ValueError(f"A fact is `predicate,object,subject`, but one of {joined!r} is {part!r}.")
        facts.append(Fact(*names))
    return facts


def asked_facts(queries: Dataset) -> list[Fact]:
    """Return the fact that each query asks for."""
    columns = (queries[name][:] for name in ("predicate_id", "obj_uri", "sub_uri"))
    return [Fact(*names) for names in zip(*columns, strict=True)]


def find_proponents(abstracts: Dataset, queries: Dataset) -> list[Int64[np.ndarray, " n_proponents"]]:
    """Return, per query, the rows of the abstracts that state its fact, in order.

    Facts are compared whole: `P10,Q1,Q2` is not in `P101,Q1,Q2`, nor `P17,Q3,Q1` in `P17,Q3,Q12`.
    """
    asked = asked_facts(queries)
    return _rows_of(asked, abstracts["facts"][:])


def _rows_of(asked: list[Fact], joined: Iterable[str]) -> list[np.ndarray]:
    rows: dict[Fact, list[int]] = {fact: [] for fact in asked}
    for row, facts in enumerate(joined):
        for fact in dict.fromkeys(parse_facts(facts)):
            if fact in rows:
                rows[fact].append(row)
    return [np.array(rows[fact], dtype=np.int64) for fact in asked]
