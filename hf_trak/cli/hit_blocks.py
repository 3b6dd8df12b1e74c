"""Hits of many queries, block by block: each finished block is kept next to the output, so that a run that is stopped loses one at most."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_trak.distributed import gather, rank_and_size
from hf_trak.hashing import hash_json
from hf_trak.messages import visible
from hf_trak.sources.row_digests import columns_to_digest, digest_rows, file_columns, hash_digests
from hf_trak.storage.files import (
    file_sizes,
    name_of_temporary,
    read_json,
    remove_file,
    remove_leftovers,
    write_atomically,
    write_folder,
    write_json,
)
from hf_trak.storage.outputs import naming
from hf_trak.tasks.rows import features_of

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_trak.index import AttributionIndex

BLOCK_QUERIES = 10_000
_IDENTITY = "identity.json"
_NAME = re.compile(r"identity\.json|hits-\d{5,}\.parquet")


class HitBlocks:
    """The finished blocks of an output, in the folder `.NAME.blocks` next to it.

    Args:
        output (`Path`): The file that the hits of all queries go to.
        identity (`Mapping`): Everything that decides the hits, as JSON; blocks of something else are removed.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.folder = output.with_name(f".{output.name}.blocks")
        self._identity = {"sha256": hash_json(dict(identity))}

    def begin(self) -> None:
        """Keep the blocks that are there if they are of this output, and remove them if not."""
        found = None
        with suppress(ValueError, OSError):
            found = read_json(self.folder / _IDENTITY)
        if found != self._identity:
            self.remove()
            write_folder(self.folder)
            write_json(self.folder / _IDENTITY, self._identity)
        remove_leftovers(self.folder, lambda name: _NAME.fullmatch(name) is not None, shared=False)

    def path(self, block: int) -> Path:
        """Return where a block is kept."""
        return self.folder / f"hits-{block:05d}.parquet"

    def read(self, block: int) -> Dataset | None:
        """Return the hits of a block; None if they are not there."""
        from datasets import Dataset

        if not self.path(block).is_file():
            return None
        try:
            return Dataset.from_parquet(str(self.path(block)), keep_in_memory=True)
        except Exception:  # damaged, in whatever way its reader says so: it is made again
            remove_file(self.path(block))
            return None

    def write(self, block: int, hits: Dataset) -> None:
        """Keep the hits of a block, whole or not at all."""
        with naming(self.path(block)):
            write_atomically(self.path(block), lambda temporary: hits.to_parquet(str(temporary)))

    def remove(self) -> None:
        """Remove all blocks, and nothing else."""
        for name in file_sizes(self.folder):
            if _NAME.fullmatch(name_of_temporary(name) or name):
                with suppress(OSError):
                    (self.folder / name).unlink()
        with suppress(OSError):  # it is not there, or holds something else
            self.folder.rmdir()


def identity_of_hits(index: AttributionIndex, queries: Dataset, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the hits of some queries: the index's files, the content of the queries, and the options."""
    columns = index.config.columns_read or {}
    plain = options.get("target", "label") == "label" and options.get("contrast") is None
    digested = columns_to_digest(queries, columns if plain else {})  # a contrast may name any column
    features: Any = features_of(queries)
    files = file_columns(features, columns)
    return {
        "members": [member.info["files"] for member in index.members],
        "queries": hash_digests(digest_rows(queries, digested, file_columns=files)),
        "rows": len(queries),
        "block": BLOCK_QUERIES,
        "options": {name: str(value) for name, value in options.items()},
    }


def attribute_in_blocks(
    queries: Dataset, attribute: Callable[[Dataset], Dataset], blocks: HitBlocks, *, say: Callable[[str], None]
) -> Dataset:
    """Return the hits of all queries, which several processes may share; the first of them keeps the finished blocks.

    Args:
        attribute (`Callable`): Returns the hits of some queries, numbered from 0.
    """
    from datasets import concatenate_datasets

    starts, is_first = range(0, len(queries), BLOCK_QUERIES), rank_and_size()[0] == 0
    found: list[Dataset | None] = [None] * len(starts)
    if is_first:
        blocks.begin()
        found = [blocks.read(number) for number in range(len(starts))]
    # The first process's view: others may not see the folder.
    is_done = gather(torch.tensor([hits is not None for hits in found], dtype=torch.uint8))[0].bool().tolist()
    if any(is_done):
        say(f"{sum(is_done)} of {len(starts)} blocks of {BLOCK_QUERIES:,} queries are done: {visible(str(blocks.folder))}")
    for number, start in enumerate(starts):
        if is_done[number]:
            continue
        hits = attribute(queries.select(range(start, min(start + BLOCK_QUERIES, len(queries)))))
        numbers = [start + number for number in hits["query_id"]]
        hits = hits.remove_columns("query_id").add_column("query_id", numbers).select_columns(hits.column_names)
        if is_first:
            blocks.write(number, hits)
            found[number] = hits
    return concatenate_datasets([hits for hits in found if hits is not None]) if is_first else queries.select([])
