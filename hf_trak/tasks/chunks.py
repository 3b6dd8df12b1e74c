"""Documents cut into chunks of tokens: each token is scored in one chunk, and read as context in the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from hf_trak.runtime import dataset_bars
from hf_trak.tasks.columns import is_string
from hf_trak.tasks.inputs import need_tokenizer
from hf_trak.tasks.language_inputs import CausalInputs, with_eos
from hf_trak.tasks.rows import is_transformed, missing_rows, name_rows
from hf_trak.tasks.token_inputs import text_of
from hf_trak.tasks.token_outputs import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_trak.config import TrakConfig
    from hf_trak.tasks.base import Task

DOCUMENT, CHUNK, START, STOP, DIGEST = "document_id", "chunk_id", "chunk_start", "chunk_stop", "document_digest"
CHUNK_COLUMNS = (DOCUMENT, CHUNK, START, STOP, DIGEST)
TOKENS = ("input_ids", "labels")


def is_chunked(columns: Any) -> bool:
    """Return whether rows with some columns are chunks of documents."""
    return DOCUMENT in columns and CHUNK in columns


class Chunk(NamedTuple):
    """A part of a document."""

    ids: Int64[np.ndarray, " tokens"]
    labels: Int64[np.ndarray, " tokens"]
    """-100 for the tokens that the chunk before has scored."""
    start: int
    """Where the text of its own tokens begins in the document: that of all chunks, one after another, is the document."""
    stop: int


@dataclass(frozen=True)
class Chunker:
    """Cuts texts into chunks.

    Args:
        limit (`int`): Tokens of a chunk.
        overlap (`int`): How many of them repeat the end of the chunk before, as context that is not scored again. Without any, nothing
            predicts the first token of a chunk, which is then not scored.

    Raises:
        ValueError: If chunks would have no tokens of their own, or the tokenizer does not know where its tokens are in the text.
    """

    tokenizer: Any
    limit: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.limit or self.limit < 2:
            raise ValueError(
                f"`chunk_overlap` (--chunk_overlap) must be smaller than the {self.limit} tokens of a chunk, of which at least 2 are needed, but is "
                f"{self.overlap}. Set `max_length` (--max_length) to the tokens of a chunk."
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                "`chunk_overlap` needs a fast tokenizer, which knows where its tokens are in a text, but this is a "
                f"{type(self.tokenizer).__name__}. Load it with `AutoTokenizer.from_pretrained(..., use_fast=True)`."
            )

    @classmethod
    def of(cls, inputs: Any, tokenizer: Any, overlap: int) -> Chunker:
        """Return what cuts the texts that a task reads.

        Raises:
            ValueError: If it is not that of a causal language model's texts, or nothing says how long a chunk is.
        """
        if type(inputs) is not CausalInputs:
            raise ValueError("`chunk_overlap` (--chunk_overlap) is for causal language models of texts: leave it out.")
        if inputs.loss_on in ("assistant", "completion"):
            raise ValueError(
                f"`chunk_overlap` cuts whole texts, of which all tokens are scored, but `loss_on` is {inputs.loss_on!r}. Leave one of them out."
            )
        need_tokenizer(tokenizer)
        limit = inputs.text_limit(tokenizer)
        if limit is None:
            raise ValueError(
                "Nothing says how many tokens a chunk has: the model has no limit. Set `max_length` (--max_length)."
            )
        return cls(tokenizer, limit, overlap)

    def cut(self, text: str) -> list[Chunk]:
        """Return the chunks of a text; of an empty one, one chunk in which nothing is scored."""
        found = self.tokenizer(with_eos(text, self.tokenizer), return_offsets_mapping=True, verbose=False)
        ids = np.asarray(found["input_ids"], dtype=np.int64)
        offsets = np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        begins = np.minimum(np.maximum.accumulate(offsets[:, 0]), len(text)) if len(ids) else np.zeros(0, dtype=np.int64)
        firsts = [0]
        while firsts[-1] + self.limit < len(ids):
            firsts.append(firsts[-1] + self.limit - self.overlap)
        if self.overlap == 0 and len(firsts) > 1 and firsts[-1] == len(ids) - 1:
            firsts.pop()  # one token, which nothing predicts
        borders = [0, *(int(begins[first + self.overlap]) for first in firsts[1:]), len(text)]
        chunks = []
        for number, first in enumerate(firsts):
            mine = ids[first : first + self.limit]
            labels = np.where(np.arange(len(mine)) < (self.overlap if number else 0), IGNORED, mine)
            chunks.append(Chunk(mine, labels, borders[number], borders[number + 1]))
        return chunks


def with_text_column(config: TrakConfig, dataset: Dataset) -> TrakConfig:
    """Return the configuration of an index of chunks with the name of the column of texts; any other as it is.

    Raises:
        ValueError: If the dataset has no texts to be cut, or several columns may be meant.
    """
    if config.chunk_overlap is None or is_chunked(dataset.column_names):
        return config
    if is_transformed(dataset):
        raise ValueError(
            "`chunk_overlap` cuts texts that are stored, but a transform makes the rows of this dataset. Keep what it makes: "
            "`dataset.map(transform, batched=True)`."
        )
    if config.row_format != "auto":
        raise ValueError(f"`chunk_overlap` cuts texts, and row_format={config.row_format!r} has none. Leave one of them out.")
    features = dict(dataset.features)
    if config.text_columns is None and (other := [name for name in ("input_ids", "messages", "prompt") if name in features]):
        raise ValueError(
            f"`chunk_overlap` (--chunk_overlap) cuts texts, but the dataset has {', '.join(features)}. Leave it out for rows of {other[0]!r}, or "
            "name the column of texts with `text_columns` (--text_columns)."
        )
    strings = [name for name, kind in features.items() if is_string(kind)]
    (name,) = (CausalInputs.text_column_of(features, strings, config.text_columns),)
    if name not in strings:
        raise ValueError(f"`chunk_overlap` cuts texts, but the column {name!r} holds {features[name]}.")
    return replace(config, text_columns=(name,))


def cut_documents(
    dataset: Dataset,
    chunker: Chunker,
    column: str,
    *,
    digests: Sequence[str],
    keep: Sequence[str] = (),
    skip_unscored: bool = False,
    fingerprint: str,
    progress: bool = True,
) -> Dataset:
    """Return a dataset with a row per chunk: its tokens, the numbers of its document and of the chunk in it, and where its text is.

    It is written to the cache of datasets, a batch of documents at a time, where `dataset` is on disk.

    Args:
        column (`str`): The texts. If it is among `keep`, it becomes the text of the chunk's own tokens.
        digests (`Sequence[str]`): Of each document's text.
        keep (`Sequence[str]`): Columns of the documents that their chunks have, too.
        fingerprint (`str`): A hash of all that decides the result.

    Raises:
        ValueError: If a text is missing, a document has no scored token, or a column to be kept has the name of one of the result's.
    """
    from datasets import Features, List, Value

    if taken := sorted({*CHUNK_COLUMNS, *TOKENS} & set(keep)):
        raise ValueError(
            f"`keep_columns` (--keep_columns) names {taken[0]!r}, the name of a column of the chunks. Rename it: "
            f"`dataset.rename_column({taken[0]!r}, ...)`."
        )
    if len(missing := missing_rows(dataset, column)):
        raise ValueError(
            f"{len(missing)} of {len(dataset)} documents have no text in {column!r} (None), {name_rows(missing)}; filter them out."
        )
    others = [name for name in keep if name != column]

    def cut(rows: Mapping[str, Sequence[Any]], numbers: Sequence[int]) -> dict[str, list[Any]]:
        result: dict[str, list[Any]] = {name: [] for name in features}
        for place, number in enumerate(numbers):
            text = rows[column][place]
            for chunk_number, chunk in enumerate(chunker.cut(text)):
                cells = (chunk.ids, chunk.labels, number, chunk_number, chunk.start, chunk.stop, digests[number])
                for name, value in zip((*TOKENS, *CHUNK_COLUMNS), cells, strict=True):
                    result[name].append(value)
                for name in others:
                    result[name].append(rows[name][place])
                if column in keep:
                    result[column].append(text[chunk.start : chunk.stop])
        return result

    features = Features(
        {
            **dict.fromkeys(TOKENS, List(Value("int32"))),
            **dict.fromkeys((DOCUMENT, CHUNK, START, STOP), Value("int64")),
            DIGEST: Value("string"),
            **{name: dataset.features[name] for name in keep},
        }
    )
    read = list(dict.fromkeys([column, *others]))
    with dataset_bars(progress):
        chunks = dataset.select_columns(read).map(
            cut,
            with_indices=True,
            batched=True,
            batch_size=100,
            remove_columns=read,
            features=features,
            new_fingerprint=fingerprint,
            desc="Cutting documents",
        )
    if not skip_unscored and (empty := _unscored(chunks)):
        raise ValueError(
            f"{len(empty)} of {len(dataset)} documents have no scored token, {name_rows(empty)}: an empty text, or a single token, which nothing "
            "predicts. Filter them out, or set skip_unscored=True (--skip_unscored), which keeps them with scores of 0."
        )
    return chunks


def _unscored(chunks: Dataset) -> list[int]:
    """Return the documents of at most one token."""
    import pyarrow.compute as pc

    found: list[int] = []
    raw = chunks.select_columns(["input_ids", DOCUMENT]).with_format("arrow")
    for start in range(0, len(chunks), 1000):
        table = raw[start : start + 1000]
        short = pc.less(pc.list_value_length(table["input_ids"]), 2)
        found += table[DOCUMENT].filter(short).to_pylist()
    return found


class ChunkedQueries(NamedTuple):
    """Queries of which long texts are several rows."""

    rows: Dataset
    first: Int64[np.ndarray, " n_query"]
    """The first row of each query."""
    weights: np.ndarray
    """What each row's output counts in its query's: its share of the scored tokens, or 1 where outputs are sums."""

    def join(self, values: np.ndarray) -> np.ndarray:
        """Return features or outputs of queries from those of their chunks."""
        weighted = values.astype(np.float64) * self.weights.reshape(-1, *[1] * (values.ndim - 1))
        return np.add.reduceat(weighted, self.first, axis=0).astype(values.dtype)


def cut_queries(queries: Dataset, task: Task, tokenizer: Any, config: TrakConfig) -> ChunkedQueries | None:
    """Return queries as the chunks of their texts; None where they are no texts, which are read whole as they are.

    Raises:
        ValueError: If a query has no text, or no scored token.
    """
    from datasets import Dataset

    assert config.chunk_overlap is not None
    inputs: Any = task.inputs
    chunker = Chunker.of(inputs, tokenizer, config.chunk_overlap)
    if config.text_columns is None or config.text_columns[0] not in queries.column_names:
        return None
    rows: list[dict[str, Any]] = []
    first, counts = [], []
    for number, row in enumerate(queries.select_columns([config.text_columns[0]])):
        try:
            chunks = chunker.cut(text_of(row, config.text_columns[0]))
        except ValueError as error:
            raise ValueError(f"Query {number} cannot serve: {error}.") from error
        first.append(len(rows))
        for place, chunk in enumerate(chunks):
            scored = int((inputs._score(chunk.labels, tokenizer)[1:] != IGNORED).sum())
            if scored:
                rows.append({"input_ids": chunk.ids.tolist(), "labels": chunk.labels.tolist(), DOCUMENT: number, CHUNK: place})
                counts.append(scored)
        if len(rows) == first[-1]:
            raise ValueError(f"Query {number} has no scored token: {row[config.text_columns[0]]!r:.60}. Filter it out.")
    shares = np.asarray(counts, dtype=np.float64)
    totals = np.add.reduceat(shares, first)
    lengths = np.diff([*first, len(rows)])
    weights = shares / np.repeat(totals, lengths) if config.token_reduction == "mean" else np.ones(len(rows))
    return ChunkedQueries(Dataset.from_list(rows), np.asarray(first, dtype=np.int64), weights)
