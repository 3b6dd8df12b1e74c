"""Approximate search: one FAISS index of the features of all members, built through Datasets. Its inner products are the scores:

    τ(z_i, z) = ⟨ [q_i1 φ_1(z_i), ..., q_iM φ_M(z_i)] / M,  [(K_1 + λ)⁻¹φ_1(z), ..., (K_M + λ)⁻¹φ_M(z)] ⟩

where q_im is the Q of member m, or the mean of all members' Q, to its power, and K_m is the Gram matrix of member m. So a training row is
one vector of M · proj_dim numbers that depends neither on the query nor on the damping. The largest inner product with a solved query is
the highest score, and the largest with the negative query is the lowest score.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from hf_trak.hashing import hash_json
from hf_trak.messages import list_differences
from hf_trak.runtime import Bar
from hf_trak.scoring.ensemble import ScoreOptions, SolvedQueries
from hf_trak.scoring.score import MemberBlock, member_weights
from hf_trak.scoring.top_k import TopK
from hf_trak.storage.files import read_json, write_atomically, write_json
from hf_trak.storage.reader import MemberReader, aligned_blocks

if TYPE_CHECKING:
    from datasets import Dataset
    from datasets.search import FaissIndex

_COLUMN = "trak_vector"
_TRAINED_ON = 65_536


class SearchIndex:
    """A FAISS index over a training set's weighted features.

    Args:
        index (`datasets.search.FaissIndex`): From `Dataset.add_faiss_index`. Its `faiss_index` is the FAISS object, whose search
            parameters, such as `nprobe`, can be set.
        identity (`dict`): Everything that determines the vectors.
    """

    def __init__(self, index: FaissIndex, identity: dict[str, Any]) -> None:
        self.index = index
        self.identity = identity

    @classmethod
    def build(
        cls,
        members: Sequence[MemberReader],
        *,
        string_factory: str,
        out_to_loss_power: float,
        combination: str,
        train_rows: int = _TRAINED_ON,
        seed: int = 0,
        progress: bool = True,
    ) -> SearchIndex:
        """Build a search index; see [`AttributionIndex.add_search_index`]."""
        faiss = import_faiss()
        identity = describe(
            members, string_factory=string_factory, out_to_loss_power=out_to_loss_power, combination=combination
        )
        proj_dim, n_rows = members[0].gram().shape[0], members[0].n_rows
        try:
            custom = faiss.index_factory(len(members) * proj_dim, string_factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ValueError(
                f"FAISS knows no index {string_factory!r} of {len(members) * proj_dim:,} numbers: {_reason(error)}. See "
                "https://github.com/facebookresearch/faiss/wiki/The-index-factory."
            ) from error
        with tempfile.TemporaryDirectory(prefix="hf_trak-search-") as folder:
            vectors = write_vectors(members, Path(folder) / "vectors.arrow", out_to_loss_power, combination, progress)
            if not custom.is_trained:
                # Not the first rows, which `train_size` would use, because datasets can be sorted.
                chosen = np.sort(np.random.default_rng(seed).permutation(n_rows)[:train_rows])
                _train(custom, vectors.with_format("numpy", dtype=np.float32)[chosen][_COLUMN], string_factory)
            vectors.add_faiss_index(_COLUMN, custom_index=custom)
            return cls(vectors.get_index(_COLUMN), identity)

    def save(self, file: str | Path) -> None:
        """Write the FAISS index to a file, and its identity to a second file beside it."""
        write_atomically(Path(file), lambda temporary: self.index.save(str(temporary)))
        write_json(_description(Path(file)), self.identity)

    @classmethod
    def load(cls, file: str | Path, expected: dict[str, Any]) -> SearchIndex:
        """Read what [`~SearchIndex.save`] wrote.

        Raises:
            FileNotFoundError: If there is no search index.
            ValueError: If it was built from other features or is of another kind. The message lists the differences.
        """
        path = Path(file)
        if not path.exists() or not _description(path).exists():
            raise FileNotFoundError(
                f"There is no search index at {path}, or {_description(path).name} is missing beside it. Delete what is there, and build "
                "it again."
            )
        if lines := list_differences(read_json(_description(path)), expected):
            raise ValueError(
                f"{path} is a different search index:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nChoose another file, or delete it and build it again."
            )
        import_faiss()
        from datasets.search import FaissIndex

        return cls(FaissIndex.load(str(path)), expected)

    def check(self, options: ScoreOptions) -> None:
        """Refuse options that the vectors do not support.

        Raises:
            ValueError: Naming the option.
        """
        power = self.identity["out_to_loss_power"]
        if options.out_to_loss_power != power:
            raise ValueError(
                f"The search index was built with out_to_loss_power {power}, but {options.out_to_loss_power} is requested. Add one with that "
                "power, or leave out exact=False."
            )
        if options.combination != self.identity["combination"]:
            raise ValueError(
                f"The search index was built with combination {self.identity['combination']!r}, but {options.combination!r} is requested. Add one "
                "with that, or leave out exact=False."
            )
        for name, value in (("leverage", options.leverage), ("soft_threshold", options.soft_threshold)):
            if value:
                raise ValueError(f"`{name}` needs the scores of all rows: leave it out, or leave out exact=False.")

    def best(self, solved: Sequence[SolvedQueries], top_k: int) -> tuple[TopK, TopK]:
        """Return each query's proponents and opponents as the FAISS index ranks them. Row −1 means that none was found."""
        queries = torch.cat([one.preconditioned for one in solved], dim=1).numpy()
        return self._search(queries, top_k), self._search(-queries, top_k, sign=-1)

    def _search(self, queries: Float32[np.ndarray, "n_query width"], top_k: int, sign: int = 1) -> TopK:
        k = min(top_k, self.identity["n_rows"])
        scores, rows = self.index.search_batch(queries, k=k)
        return TopK(torch.from_numpy(np.asarray(rows, dtype=np.int64)), sign * torch.from_numpy(np.asarray(scores)))


def describe(
    members: Sequence[MemberReader], *, string_factory: str, out_to_loss_power: float, combination: str
) -> dict[str, Any]:
    """Return the identity of a search index: everything that determines its vectors and kind."""
    return {
        "members_sha256": hash_json([member.info["files"] for member in members]),
        "n_rows": members[0].n_rows,
        "string_factory": string_factory,
        "out_to_loss_power": out_to_loss_power,
        "combination": combination,
    }


def write_vectors(members: Sequence[MemberReader], path: Path, power: float, combination: str, progress: bool) -> Dataset:
    """Write the vectors to an Arrow file, and return a Dataset that is memory-mapped to it."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=str(path)) as writer:
        for block in Bar(weighted_blocks(members, power, combination), unit="blocks", desc="Vectors", disable=not progress):
            flat = pa.array(block.numpy().reshape(-1))
            writer.write_table(pa.table({_COLUMN: pa.FixedSizeListArray.from_arrays(flat, block.shape[1])}))
        writer.finalize()
    return Dataset.from_file(str(path))


def weighted_blocks(members: Sequence[MemberReader], power: float, combination: str) -> Iterator[Float[Tensor, "rows width"]]:
    """Yield the vectors of the rows, one row group at a time."""
    for blocks in aligned_blocks(members):
        weights = member_weights([MemberBlock(block.features, block.out_to_loss) for block in blocks], power, combination)
        yield torch.cat(
            [block.features * weight.float().unsqueeze(1) for block, weight in zip(blocks, weights, strict=True)], dim=1
        )


def import_faiss() -> Any:
    """Return the faiss module.

    Raises:
        ImportError: If it is not installed. The message says what to install.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "Approximate search needs FAISS: pip install 'hf-trak[search]'. `index.attribute` ranks exactly and needs nothing more."
        ) from error
    return faiss


def _train(index: Any, vectors: Float32[np.ndarray, "rows width"], string_factory: str) -> None:
    try:
        index.train(vectors)
    except RuntimeError as error:
        raise ValueError(
            f"FAISS cannot train {string_factory!r} on {len(vectors):,} rows: {_reason(error)}. Ask for fewer cells or codes, or give "
            "more `train_rows`."
        ) from error


def _description(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _reason(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1].split("Error: ")[-1][:200]
