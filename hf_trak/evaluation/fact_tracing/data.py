"""FTRACE-TREx: masked sentences, questions about the facts they state, which sentences are proponents, and what is ranked.

Rows keep the columns of `ekinakyurek/ftrace`: an abstract (a sentence, despite the name) has `inputs_pretokenized` with
`<extra_id_0>` in place of a span, `targets_pretokenized` with what stood there, and `facts`; a query is a template of LAMA with its
object masked.

Sources: Akyürek et al. (2022), [Towards tracing factual knowledge in language models back to the training
data](https://huggingface.co/papers/2205.11482); Elsahar et al. (2018), T-REx; Petroni et al. (2019), LAMA.

Whole corpora are too large for gradient methods, so that Akyürek et al. rank candidates. A rank among candidates is a lower bound of the
rank in the corpus; for BM25+ the two first hundred agree.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int64

from hf_trak.hashing import stream_key
from hf_trak.storage.files import write_atomically

if TYPE_CHECKING:
    from datasets import Dataset


HUB_DATASET = "ekinakyurek/ftrace"
_PARQUET_BRANCH = "refs/convert/parquet"  # `main` holds a loading script, which datasets ≥ 4 refuses

MASK = "<extra_id_0>"
_END = "<extra_id_1>"
_COLUMNS = {
    "abstracts": ("inputs_pretokenized", "targets_pretokenized", "facts", "id"),
    "queries": ("inputs_pretokenized", "targets_pretokenized", "predicate_id", "obj_uri", "sub_uri", "uuid"),
}


@dataclass(frozen=True)
class FTrace:
    """Abstracts and queries, in the order of their files."""

    abstracts: Dataset
    queries: Dataset


def load_ftrace(source: str | Path = HUB_DATASET, *, revision: str = _PARQUET_BRANCH) -> FTrace:
    """Load abstracts and queries.

    Args:
        source (`str` or `Path`): A folder with Parquet files `abstracts*` and `queries*`, or folders `abstracts/` and `queries/` of
            such; or a repository of the Hub.
        revision (`str`): Branch of the repository that holds Parquet files.

    Raises:
        FileNotFoundError: If a part is neither in the folder nor within reach on the Hub.
        ValueError: If a column is missing or an id occurs twice.
    """
    abstracts, queries = (_load(source, part, revision) for part in ("abstracts", "queries"))
    return FTrace(_with_unique(abstracts, "id", "abstracts"), _with_unique(queries, "uuid", "queries"))


def _load(source: str | Path, part: str, revision: str) -> Dataset:
    from datasets import load_dataset

    folder = Path(source)
    if folder.is_dir():
        files = sorted([*folder.glob(f"{part}*.parquet"), *(folder / part).glob("**/*.parquet")])
        if not files:
            raise FileNotFoundError(
                f"{folder} has neither {part}*.parquet nor {part}/**/*.parquet, which hold FTRACE's {part}."
            )
        pattern: str | list[str] = [str(file) for file in files]
    elif len(folder.parts) != 2 or folder.is_absolute() or folder.parts[0] in (".", ".."):
        raise FileNotFoundError(
            f"{source} is no folder here, and no repository of the Hub, which is an owner's name and one of theirs, such as {HUB_DATASET}."
        )
    else:
        # The converter has named its files in more than one way, so all of a folder's are taken.
        pattern = f"hf://datasets/{source}@{revision.replace('/', '%2F')}/{part}/**/*.parquet"
    try:
        rows = load_dataset("parquet", data_files={"train": pattern}, split="train")
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source} is no folder here, and its {part} cannot be had from the Hub ({str(error).splitlines()[0]}). Download the "
            "Parquet files and pass their folder."
        ) from error
    if absent := [column for column in _COLUMNS[part] if column not in rows.column_names]:
        raise ValueError(f"The {part} of {source} lack {', '.join(absent)}; they have {', '.join(rows.column_names)}.")
    return rows


def _with_unique(rows: Dataset, column: str, part: str) -> Dataset:
    """Return `rows` with `column` as strings, each there once."""
    from datasets import Value

    if rows.features[column].dtype != "string":  # the card prints ids as numbers, and declares them strings
        rows = rows.cast_column(column, Value("string"))
    names = rows.with_format("numpy")[column][:]
    if len(np.unique(names)) != len(names):
        raise ValueError(f"{len(names) - len(np.unique(names))} of {len(names)} {part} have a `{column}` that another has too.")
    return rows


def answer_of(target: str) -> str:
    """Return the text of a target or of what a model wrote: what follows `<extra_id_0>`, up to `<extra_id_1>`."""
    return target.split(_END)[0].replace(MASK, "").strip()


def restore(inputs: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return the sentences that inputs were made of, by putting the answers back."""
    return [text.replace(MASK, answer_of(target)) for text, target in zip(inputs, targets, strict=True)]


def restored(rows: Dataset) -> list[str]:
    """Return the restored sentence of every row."""
    return restore(rows["inputs_pretokenized"][:], rows["targets_pretokenized"][:])


def sentence_numbers(rows: Dataset) -> Int64[np.ndarray, " n"]:
    """Return a number per row, the same for all maskings of one sentence; sentences are counted in order of first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(sentence, len(numbers)) for sentence in restored(rows)], dtype=np.int64)


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
