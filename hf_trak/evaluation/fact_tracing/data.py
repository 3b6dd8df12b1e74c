"""FTRACE-TREx: sentences of Wikipedia with a span masked, and questions about the facts they state.

Rows keep the columns of `ekinakyurek/ftrace`: an abstract (a sentence, despite the name) has `inputs_pretokenized` with
`<extra_id_0>` in place of a span, `targets_pretokenized` with what stood there, and `facts`; a query is a template of LAMA with its
object masked.

Sources: Akyürek et al. (2022), [Towards tracing factual knowledge in language models back to the training
data](https://huggingface.co/papers/2205.11482); Elsahar et al. (2018), T-REx; Petroni et al. (2019), LAMA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

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
