"""What is ranked for each query: its proponents among distractors that are hard, of the same answer, or random.

Whole corpora are too large for gradient methods, so that Akyürek et al. rank candidates. A rank among candidates is a lower bound of the
rank in the corpus; for BM25+ the two first hundred agree.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from hf_trak.hashing import stream_key
from hf_trak.storage.files import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Candidates:
    """Rows of the abstracts to be ranked for one query, by why they are there. A row may be there for several reasons."""

    proponents: list[int]
    bm25: list[int]
    same_target: list[int]
    random: list[int]

    @property
    def rows(self) -> Int64[np.ndarray, " n_candidates"]:
        """All of them, each once, in the order of the abstracts."""
        return np.unique(np.array(self.proponents + self.bm25 + self.same_target + self.random, dtype=np.int64))


def draw_candidates(
    abstracts: Dataset,
    queries: Dataset,
    proponents: Sequence[Int64[np.ndarray, " n_proponents"]],
    nearest: Callable[[int], Int64[np.ndarray, " n_nearest"]],
    *,
    n_same_target: int = 100,
    n_random: int = 100,
    seed: int = 0,
) -> list[Candidates]:
    """Return the candidates of each query: they depend on the seed, the query and the abstracts, not on which queries are asked.

    Args:
        proponents (`Sequence`): Rows per query, from [`find_proponents`].
        nearest (`Callable`): `(query number) -> rows`, the best of BM25+ first.
        n_same_target, n_random (`int`): How many abstracts with the query's very target, and how many of all, are drawn.
    """
    targets = abstracts["targets_pretokenized"][:]
    wanted = set(queries["targets_pretokenized"][:])
    same: dict[str, list[int]] = {target: [] for target in wanted}
    for row, target in enumerate(targets):
        if target in wanted:
            same[target].append(row)
    drawn = []
    for number, (target, uuid) in enumerate(zip(queries["targets_pretokenized"][:], queries["uuid"][:], strict=True)):
        generator = np.random.default_rng(stream_key("candidates", seed, uuid) % 2**63)
        drawn.append(
            Candidates(
                proponents[number].tolist(),
                nearest(number).tolist(),
                _draw(generator, np.array(same[target], dtype=np.int64), n_same_target),
                _draw(generator, np.arange(len(targets)), n_random),
            )
        )
    return drawn


def _draw(generator: np.random.Generator, rows: np.ndarray, count: int) -> list[int]:
    return sorted(generator.choice(rows, size=min(count, len(rows)), replace=False).tolist()) if len(rows) else []


def save_candidates(path: Path, candidates: Sequence[Candidates], abstracts: Dataset, queries: Dataset) -> None:
    """Write candidates as gzipped JSON: by query uuid, the ids of abstracts by reason."""
    ids, uuids = abstracts["id"][:], queries["uuid"][:]
    content = {
        uuid: {reason: [ids[row] for row in rows] for reason, rows in asdict(of_query).items()}
        for uuid, of_query in zip(uuids, candidates, strict=True)
    }
    text = gzip.compress(json.dumps(content).encode(), mtime=0)
    write_atomically(path, lambda temporary: temporary.write_bytes(text))


def load_candidates(path: Path, abstracts: Dataset, queries: Dataset) -> tuple[Dataset, list[Candidates]]:
    """Read candidates, and return the queries that have some, in the file's order, with theirs.

    Raises:
        ValueError: If the file names a query or abstract that is not there.
    """
    read = gzip.open if path.suffix == ".gz" else open
    with read(path, "rt") as file:
        content: dict[str, dict[str, list[object]]] = json.load(file)
    row_of = {identity: row for row, identity in enumerate(abstracts["id"][:])}
    query_of = {uuid: number for number, uuid in enumerate(queries["uuid"][:])}
    if unknown := [uuid for uuid in content if uuid not in query_of]:
        raise ValueError(f"{path} has candidates for {len(unknown)} queries that are not there, such as {unknown[0]}.")
    named = {str(identity) for groups in content.values() for rows in groups.values() for identity in rows}
    if strangers := sorted(named - row_of.keys()):
        raise ValueError(
            f"{path} names {len(strangers)} abstracts that are not there, such as {strangers[0]}. It belongs to other data."
        )
    candidates = [
        Candidates(**{reason: [row_of[str(identity)] for identity in rows] for reason, rows in groups.items()})
        for groups in content.values()
    ]
    return queries.select([query_of[uuid] for uuid in content]), candidates
