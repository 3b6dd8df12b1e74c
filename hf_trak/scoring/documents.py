"""Scores of documents from those of their chunks: of its strongest chunk, or of all together, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

WAYS = ("max", "sum")


def check_way(documents: str) -> None:
    """Refuse what is no way to make one score of several."""
    if documents not in WAYS:
        raise ValueError(f"`documents` must be 'max', 'sum' or left out, but is {documents!r}.")


class DocumentBlock(NamedTuple):
    """Some documents, all of whose chunks have been seen.

    Args:
        documents: Their numbers.
        highest, lowest: Of each query, the score that ranks proponents and the one that ranks opponents; of sums, with that of the strongest
            chunk behind it.
        highest_row, lowest_row: The training rows (chunks) that raise and lower most.
    """

    documents: Int64[Tensor, " n"]
    highest: Float[Tensor, "n n_query parts"]
    lowest: Float[Tensor, "n n_query parts"]
    highest_row: Int64[Tensor, "n n_query"]
    lowest_row: Int64[Tensor, "n n_query"]


class DocumentTopK(NamedTuple):
    """The extreme documents of each query, and the chunk of each that is the most extreme."""

    documents: Int64[Tensor, "n_query top_k"]
    scores: Float[Tensor, "n_query top_k"]
    rows: Int64[Tensor, "n_query top_k"]


def document_blocks(
    blocks: Iterator[Float[Tensor, "_ n_query"]], document_of: Int64[np.ndarray, " n_rows"], way: str
) -> Iterator[DocumentBlock]:
    """Yield the scores of documents, each once all its chunks have been seen.

    With "max", a document's score is the largest of its chunks', and, among opponents, the smallest. With "sum", it is their sum, in
    float64.

    Args:
        blocks (`Iterator`): The scores of all training rows, in their order.
        document_of (`np.ndarray`): The document of each row.

    Raises:
        ValueError: If the chunks of a document do not follow one another.
    """
    if len(document_of) and len(np.unique(document_of)) != 1 + int((np.diff(document_of) != 0).sum()):
        raise ValueError(
            "`documents` needs the chunks of a document one after another, but the training rows were shuffled after they were cut. Ask for the "
            "scores of chunks."
        )
    owners, row = torch.from_numpy(np.ascontiguousarray(document_of)), 0
    held: DocumentBlock | None = None
    for block in blocks:
        found = _reduce(block, owners[row : row + len(block)], row, way)
        row += len(block)
        if held is not None:
            found = _join(held, found, way)
        done = DocumentBlock(*(part[:-1] for part in found))
        held = DocumentBlock(*(part[-1:] for part in found))
        if len(done.documents):
            yield done
    if held is not None:
        yield held


def _reduce(scores: Tensor, owners: Tensor, first_row: int, way: str) -> DocumentBlock:
    """Return the documents of one block."""
    documents, places = owners.unique_consecutive(return_inverse=True)
    index = places.unsqueeze(1).expand_as(scores)
    shape = (len(documents), scores.shape[1])
    rows = torch.arange(first_row, first_row + len(scores)).unsqueeze(1).expand_as(scores)

    def extreme(how: str) -> tuple[Tensor, Tensor]:
        best = scores.new_zeros(shape).scatter_reduce(0, index, scores, how, include_self=False)
        at = torch.where(scores == best[places], rows, torch.iinfo(torch.int64).max)
        return best, torch.zeros(shape, dtype=torch.int64).scatter_reduce(0, index, at, "amin", include_self=False)

    highest, highest_row = extreme("amax")
    lowest, lowest_row = extreme("amin")
    if way == "sum":
        # The rows that raise and lower most are told by their own scores, which are kept beside the sums.
        total = torch.zeros(shape, dtype=torch.float64).index_add(0, places, scores.double())
        highest, lowest = torch.stack([total, highest.double()], -1), torch.stack([total, lowest.double()], -1)
    else:
        highest, lowest = highest.unsqueeze(-1), lowest.unsqueeze(-1)
    return DocumentBlock(documents, highest, lowest, highest_row, lowest_row)


def _join(held: DocumentBlock, found: DocumentBlock, way: str) -> DocumentBlock:
    """Return the documents of a block behind the last of the block before, of which it may begin with further chunks."""
    if held.documents[0] != found.documents[0]:
        return DocumentBlock(*(torch.cat(pair) for pair in zip(held, found, strict=True)))
    parts = {}
    for name, is_better in (("highest", torch.gt), ("lowest", torch.lt)):
        one, other = getattr(held, name)[0], getattr(found, name)[0]
        better = is_better(other[..., -1], one[..., -1])
        merged = torch.where(better.unsqueeze(-1), other, one)
        if way == "sum":
            merged[..., 0] = one[..., 0] + other[..., 0]
        parts[name] = torch.cat([merged.unsqueeze(0), getattr(found, name)[1:]])
        row = torch.where(better, getattr(found, f"{name}_row")[0], getattr(held, f"{name}_row")[0])
        parts[f"{name}_row"] = torch.cat([row.unsqueeze(0), getattr(found, f"{name}_row")[1:]])
    return DocumentBlock(found.documents, **parts)


def document_scores(
    blocks: Iterator[Float[Tensor, "_ n_query"]], document_of: Int64[np.ndarray, " n_rows"], way: str, n_query: int
) -> Float[np.ndarray, "n_documents n_query"]:
    """Return the score of every document for every query; of one that has no chunk, 0."""
    scores = np.zeros((int(document_of.max()) + 1, n_query), dtype=np.float32)
    for block in document_blocks(blocks, document_of, way):
        scores[block.documents.numpy()] = block.highest[..., 0].numpy()
    return scores


def top_documents(
    blocks: Iterator[Float[Tensor, "_ n_query"]], document_of: Int64[np.ndarray, " n_rows"], way: str, k: int
) -> tuple[DocumentTopK, DocumentTopK]:
    """Return the `k` documents of the largest and smallest scores of each query, the most extreme first; ties keep their order.

    Raises:
        ValueError: If a score is not finite.
    """
    sides: list[DocumentTopK | None] = [None, None]
    for block in document_blocks(blocks, document_of, way):
        if not block.highest.isfinite().all() or not block.lowest.isfinite().all():
            raise ValueError(
                "Scores of training rows are not finite. Look for NaN in the features of these rows and of the queries."
            )
        for side, (scores, rows) in enumerate(((block.highest, block.highest_row), (block.lowest, block.lowest_row))):
            mine = scores[..., 0].T
            found = DocumentTopK(block.documents.expand(len(mine), -1), mine, rows.T)
            if (before := sides[side]) is not None:
                found = DocumentTopK(*(torch.cat(pair, 1) for pair in zip(before, found, strict=True)))
            order = found.scores.sort(dim=1, descending=side == 0, stable=True).indices[:, :k]
            sides[side] = DocumentTopK(*(part.gather(1, order) for part in found))
    assert sides[0] is not None
    assert sides[1] is not None
    return sides[0], sides[1]
