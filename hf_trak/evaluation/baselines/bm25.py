r"""Baselines that see no model: BM25 over texts, and random scores.

$\tau(z_i, z) = \sum_{w \in z} \mathrm{idf}(w)\, \frac{tf(w, z_i)}{tf(w, z_i) + k_1\,(1 - b + b\,|z_i| / \overline{|z|})}$, over the
words $w$ of the query, each as often as it occurs there. Labels play no part. The strongest lexical baseline of fact tracing.

Sources: Robertson and Zaragoza (2009), The probabilistic relevance framework: BM25 and beyond; as computed by `bm25s`, Lù (2024),
[BM25S](https://huggingface.co/papers/2407.03618), with Lucene's idf. For attribution: Akyürek et al. (2022), [Towards tracing
factual knowledge in language models back to the training data](https://huggingface.co/papers/2205.11482).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Float64, Int64

from hf_trak.evaluation.baselines.base import Checkpoints, check_scores
from hf_trak.sources.row_digests import names_read
from hf_trak.tasks.columns import find_text_columns, is_string


@dataclass(frozen=True)
class BM25:
    """BM25 scores of training texts for query texts, through `bm25s`.

    The texts are the columns that the model reads, joined: those named in `config.text_columns`, or those that its task reads of the training
    set. Without `checkpoints`, they are found as a text classifier finds them. Rows that are only tokenized are compared by their token
    ids.

    Args:
        checkpoints (`Checkpoints`, *optional*): Tells which columns are read; the model computes nothing.
        k1, b (`float`): Saturation of a word's count, and how far long texts are held back.
        stopwords (`str`, *optional*): A language code for words not counted, such as `"en"`; none by default.
    """

    checkpoints: Checkpoints | None = None
    k1: float = 1.5
    b: float = 0.75
    stopwords: str | None = None

    def __call__(self, train: Dataset, queries: Dataset) -> Float64[np.ndarray, "n_train n_query"]:
        bm25s = _bm25s()
        if len(train) == 0 or len(queries) == 0:
            raise ValueError("There is nothing to score: a dataset is empty.")
        columns = self._columns(train)
        words, query_words = (self._words(bm25s, dataset, columns) for dataset in (train, queries))
        if not any(words):
            raise ValueError("No training text has a word to compare: the texts are empty, or all their words are stop words.")
        retriever = bm25s.BM25(method="lucene", k1=self.k1, b=self.b, dtype="float64")
        retriever.index(words, show_progress=False)
        scores = np.zeros((len(train), len(queries)))
        for column, found in enumerate(query_words):
            known = [word for word in found if word in retriever.vocab_dict]
            if known:
                scores[:, column] = retriever.get_scores(known)
        return check_scores(scores, train, queries)

    def _columns(self, train: Dataset) -> tuple[str, ...]:
        if self.checkpoints is None:
            return _text_columns(train)
        if self.checkpoints.config.text_columns:
            return self.checkpoints.config.text_columns
        featurizer = self.checkpoints.featurizer(0, sketched=False)
        featurizer.read_from(train)
        read: dict[str, Any] = featurizer.task.columns_read(train.features)
        no_texts = (
            "image",
            "tokens",
            *(("label",) if featurizer.task.needs_labels else ()),
        )  # others' label may be a target text
        names = names_read({kind: columns for kind, columns in read.items() if kind not in no_texts})
        texts = tuple(name for name in names if is_string(train.features[name]))
        return texts or (("input_ids",) if "tokens" in read else _text_columns(train))

    def _words(self, bm25s: Any, dataset: Dataset, columns: tuple[str, ...]) -> list[list[str]]:
        missing = [column for column in columns if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"A dataset has no column {', '.join(map(repr, missing))}; it has {', '.join(dataset.column_names)}. Set "
                "`text_columns` in the configuration."
            )
        if columns == ("input_ids",):
            return [list(map(str, row)) for row in _token_ids(dataset)]
        texts = [" ".join(parts) for parts in zip(*(dataset[column][:] for column in columns), strict=True)]
        return bm25s.tokenize(texts, stopwords=self.stopwords, return_ids=False, show_progress=False)


class BM25PlusIndex:
    r"""BM25+ over many short texts, as a sparse matrix of words.

    $\sum_{w \in z} \log\frac{n + 1}{n_w} \left(\delta + \frac{(k_1 + 1)\, tf(w, z_i)}{tf(w, z_i) + k_1\,(1 - b + b\,|z_i| /
    \overline{|z|})}\right)$: what `rank_bm25.BM25Plus` computes, where $\delta$ counts for texts without the word too, and so changes
    no rank. Words are what stands between single spaces, as they are written.

    Source: Lv and Zhai (2011), Lower-bounding term frequency normalization.

    Args:
        texts (`Sequence[str]`): What is searched.
        k1, b, delta (`float`): As above; the defaults are those of `rank_bm25`.
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 1.5, b: float = 0.75, delta: float = 1.0) -> None:
        if len(texts) == 0:
            raise ValueError("There is nothing to search: no text was given.")
        self.delta = delta
        self.vocabulary: dict[str, int] = {}
        for text in texts:
            for word in text.split(" "):
                self.vocabulary.setdefault(word, len(self.vocabulary))
        counts = self._count(texts)
        lengths = np.array([text.count(" ") + 1 for text in texts], dtype=np.float64)
        n_with = np.bincount(counts.indices, minlength=len(self.vocabulary))
        self.idf = np.log((len(texts) + 1) / n_with)
        held_back = np.repeat(k1 * (1 - b + b * lengths / lengths.mean()), np.diff(counts.indptr))
        counts.data = (k1 + 1) * counts.data / (held_back + counts.data) * self.idf[counts.indices]
        self._weights = counts

    def _count(self, texts: Sequence[str]) -> Any:
        """Counts of known words, one sparse row per text."""
        from scipy.sparse import csr_matrix

        words: list[int] = []
        starts = [0]
        for text in texts:
            words += [self.vocabulary[word] for word in text.split(" ") if word in self.vocabulary]
            starts.append(len(words))
        counts = csr_matrix((np.ones(len(words)), words, starts), shape=(len(texts), len(self.vocabulary)))
        counts.sum_duplicates()
        return counts

    def score(self, queries: Sequence[str]) -> Float64[np.ndarray, "n_texts n_query"]:
        """Return the score of every text for every query."""
        counts = self._count(queries)
        return (self._weights @ counts.T).toarray() + self.delta * (counts @ self.idf)

    def nearest(self, query: str, k: int) -> Int64[np.ndarray, " k"]:
        """Return the `k` best texts, the best first; ties in the texts' order."""
        scores = self.score([query])[:, 0]
        k = min(k, len(scores))
        worst = np.partition(scores, len(scores) - k)[len(scores) - k]
        rows = np.flatnonzero(scores >= worst)
        return rows[np.argsort(-scores[rows], kind="stable")][:k]


def _text_columns(dataset: Dataset) -> tuple[str, ...]:
    """Return the columns of texts by their names and contents: never identifiers or labels."""
    is_tokenized = "input_ids" in dataset.column_names
    if not is_tokenized and not any(map(is_string, dataset.features.values())):
        raise ValueError(f"BM25 compares texts, but the dataset has none: its columns are {', '.join(dataset.column_names)}.")
    label = next((name for name in ("labels", "label") if name in dataset.column_names), None)
    try:
        return find_text_columns(dataset.features, label_column=label, dataset=dataset)
    except ValueError:
        if is_tokenized:
            return ("input_ids",)
        raise


def _token_ids(dataset: Dataset) -> list[list[int]]:
    rows = dataset["input_ids"][:]
    if "attention_mask" not in dataset.column_names:
        return rows
    masks = dataset["attention_mask"][:]
    return [[i for i, keep in zip(row, mask, strict=True) if keep] for row, mask in zip(rows, masks, strict=True)]


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise ImportError("BM25 needs the bm25s library: pip install 'hf-trak[baselines]'.") from error
    return bm25s


@dataclass(frozen=True)
class RandomScores:
    """Independent standard normal scores.

    Args:
        checkpoints (`Checkpoints`, *optional*): Not looked at; taken so that all baselines are built alike.
        seed (`int`): The scores depend on it and on the two lengths alone.
    """

    checkpoints: Checkpoints | None = None
    seed: int = 0

    def __call__(self, train: Dataset, queries: Dataset) -> Float64[np.ndarray, "n_train n_query"]:
        return np.random.default_rng(self.seed).standard_normal((len(train), len(queries)))
