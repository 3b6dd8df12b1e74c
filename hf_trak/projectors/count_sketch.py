"""The block count sketch: every gradient entry gets a sign and is added to one of proj_dim buckets.

To fold an axis, it is cut into blocks of `n_buckets` entries. Each entry gets a sign and each block a rotation, and the blocks are
added. This is an unbiased sketch of the axis. It reads the axis once, with contiguous additions and no gather.

A parameter is a matrix. If this makes a large outer product smaller, its longer side is first folded ([`Fold`]). The result is cut
into tiles. In a tile whose rows have `width` entries, entry (o, i) has

    sign    σ(o) τ(i)                                            one hashed sign per row, one per column
    bucket  offset + ((o · width + i) mod ring)   mod proj_dim    rows laid end to end around a ring

The ring length is an odd number a little below proj_dim that shares no factor with `width`. A hash chooses the length and the offset.
Signs that factor over rows and columns are applied to the *factors* of an outer product before it is formed. Because rows are laid end to
end, a chunk of rows is added with a few contiguous additions. Only the signs of small parameters are stored.

**Error.** The error of ⟨φ(x), φ(y)⟩ is the sum of σσ'ττ' x y' over pairs of entries that share a bucket. A tile has at most `ring` rows,
and the ring shares no factor with the width, so no two rows start in the same bucket. So two entries of a tile that share a bucket
differ in both row and column. The product σ(o)σ(o')τ(i)τ(i') then differs from that of every other colliding pair: the opposite corners
(o,i'), (o',i) could collide only if 2(i − i') ≡ 0 modulo the ring length, which is odd and larger than a row. Each tile has its own
signs. So the variance is that of independent signs, (‖x‖²‖y‖² + ⟨x,y⟩²) times the probability of a collision, about 1/proj_dim. A plain
block count sketch, whose ring length does not depend on the width, adds entries of one column to each other if proj_dim and the row length
share a factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.hashing import random_integers, random_signs, stream_key
from hf_trak.matmul import bmm, one_by_one
from hf_trak.projectors.base import Projector, as_matrix

_LAP = 1 << 15  # entries added by one operation: a short ring is repeated in memory up to this length


class Ring(NamedTuple):
    """Buckets `offset` to `offset + length` of an accumulator."""

    length: int
    offset: int


def longest_side(proj_dim: int) -> int:
    """Return the largest number of rows or columns of a tile. It is smaller than every ring length.

    From proj_dim 149 on, the top sixteenth of the numbers up to proj_dim contains a prime, which is a valid ring length. Below 149,
    the top half does.
    """
    return proj_dim - proj_dim // 16 - 1 if proj_dim >= 149 else max(1, proj_dim // 2)


def draw_ring(key: int, width: int, *, proj_dim: int) -> Ring:
    """Draw a ring. Its length is odd, at most proj_dim, above [`longest_side`], and shares no factor with `width`."""
    above = longest_side(proj_dim) if proj_dim > 2 else 0
    lengths = [length for length in range(above + 1, proj_dim + 1) if length % 2 and math.gcd(length, width) == 1]
    length = lengths[int(random_integers(key, 1, below=len(lengths)))]
    return Ring(length, int(random_integers(key, 1, below=proj_dim, start=1)))


class RingSum:
    """Adds a stream of entries around a ring, in long contiguous pieces."""

    def __init__(self, accumulator: Float[Tensor, "batch width"], ring: Ring, n_entries: int) -> None:
        self.ring = ring
        self.target = accumulator[:, ring.offset : ring.offset + ring.length]
        n_rings = max(1, min(_LAP, n_entries // 4) // ring.length)  # for few entries a longer ring costs more than it saves
        self.lap = self.target if n_rings == 1 else accumulator.new_zeros(accumulator.shape[0], n_rings * ring.length)
        self.place = 0

    def add(self, entries: Float[Tensor, "batch entries"], signs: Float[Tensor, " entries"] | None = None) -> None:
        """Add entries after the last ones, times `signs`."""

        length = self.lap.shape[1]
        done = 0
        while done < entries.shape[1]:
            piece = min(length - self.place, entries.shape[1] - done)
            target, values = self.lap[:, self.place : self.place + piece], entries[:, done : done + piece]
            if signs is None:
                target += values
            else:
                target.addcmul_(values, signs[done : done + piece])
            done += piece
            self.place = (self.place + piece) % length

    def close(self) -> None:
        """Add the buffered entries to the accumulator."""
        if self.lap is not self.target:
            self.target += self.lap.view(len(self.lap), -1, self.ring.length).sum(1)


class TritonRingSum:
    """[`RingSum`] with one kernel per call, on CUDA."""

    def __init__(self, accumulator: Float[Tensor, "batch width"], ring: Ring, kernels: Any) -> None:
        self.ring = ring
        self.target = accumulator[:, ring.offset : ring.offset + ring.length]
        self.kernels = kernels
        self.place = 0

    def add(self, entries: Float[Tensor, "batch entries"], signs: Float[Tensor, " entries"] | None = None) -> None:
        """Add entries from where the last ones ended, times `signs`."""
        self.kernels.add_stream(self.target, entries, start=self.place, signs=signs)
        self.place = (self.place + entries.shape[1]) % self.ring.length

    def close(self) -> None:
        """Do nothing: this class has no buffer."""


def kernels_for(device: torch.device) -> Any:
    """Return the Triton kernels if the device is CUDA and Triton is installed, else None."""
    return _load_kernels() if device.type == "cuda" else None


@cache
def _load_kernels() -> Any:
    if find_spec("triton") is None:
        return None
    from hf_trak.projectors import count_sketch_triton as ring_kernels

    return ring_kernels


def ring_sum(accumulator: Float[Tensor, "batch width"], ring: Ring, n_entries: int) -> RingSum | TritonRingSum:
    """Return a sum for a stream of `n_entries` entries around `ring`."""
    kernels = kernels_for(accumulator.device)
    return RingSum(accumulator, ring, n_entries) if kernels is None else TritonRingSum(accumulator, ring, kernels)


def add_rows_around(
    accumulator: Float[Tensor, "batch length"],
    values: Float[Tensor, "batch tokens width"],
    *,
    first: Int64[Tensor, "batch tokens"],
    ring: Int64[Tensor, "batch tokens"],
    offset: Int64[Tensor, "batch tokens"],
) -> None:
    """Add each token's row to its own ring, starting at position `first`; the ring begins at `offset` of the accumulator."""
    kernels = kernels_for(accumulator.device)
    if kernels is not None:
        kernels.add_rows(accumulator, values, first=first, ring=ring, offset=offset)
        return
    ring, place = ring.unsqueeze(-1), first.unsqueeze(-1) + torch.arange(values.shape[2], device=first.device)
    buckets = (torch.where(place < ring, place, place - ring) + offset.unsqueeze(-1)).flatten(1)
    if accumulator.device.type == "cpu":
        accumulator.scatter_add_(1, buckets, values.flatten(1))
    else:  # on CUDA, the order of additions in `scatter_add_` varies between runs; `index_put_` sorts first
        example = torch.arange(len(buckets), device=buckets.device).unsqueeze(1).expand_as(buckets)
        accumulator.index_put_((example, buckets), values.flatten(1), accumulate=True)


# A weight with fewer entries than this costs almost nothing; folding it would only add noise.
_SMALL = 1 << 16


def folded_shape(rows: int, columns: int, *, fold: int) -> tuple[int, int]:
    """Return the shape of a (rows, columns) weight whose longer side is folded.

    At most `fold` entries share a bucket. The folded side is at least as long as the shorter side, and the folded weight has at least
    `_SMALL` entries. So a square matrix does not change, the matrix of a feed-forward layer becomes square, and an embedding table
    keeps thousands of rows.
    """
    longer, shorter = max(rows, columns), min(rows, columns)
    kept = min(longer, max(shorter, math.ceil(longer / fold), math.ceil(_SMALL / shorter)))
    return (kept, columns) if rows >= columns else (rows, kept)


@dataclass(frozen=True)
class Fold:
    """A signed fold of one axis.

    Args:
        signs (`torch.Tensor`): One per entry of the axis.
        n_buckets (`int`): Entries after folding; as many as there are signs if the axis is not folded.
        rotations (`tuple[int, ...]`): One per block of `n_buckets` entries; 0 if there is one block.
    """

    signs: Float[Tensor, " length"]
    n_buckets: int
    rotations: tuple[int, ...]

    @classmethod
    def draw(cls, seed: int, name: str, axis: str, *, length: int, n_buckets: int, device: torch.device, tile: int = 0) -> Fold:
        """Draw the fold of one axis of parameter `name`; `tile` distinguishes folds of the same axis."""
        n_blocks = math.ceil(length / n_buckets)
        rotations = [0]
        if n_blocks > 1:
            rotations = random_integers(stream_key(seed, name, axis, "fold", tile), n_blocks, below=n_buckets).tolist()
        return cls(random_signs(stream_key(seed, name, axis, tile), length).to(device), n_buckets, tuple(rotations))

    @cached_property
    def is_folded(self) -> bool:
        """Whether entries share buckets."""
        return self.n_buckets < len(self.signs)

    @cached_property
    def buckets(self) -> Int64[Tensor, " length"]:
        """The bucket of every entry."""
        position = torch.arange(len(self.signs), device=self.signs.device)
        rotations = torch.tensor(self.rotations, device=self.signs.device)
        return (position + rotations[position // self.n_buckets]) % self.n_buckets

    def __call__(self, values: Float[Tensor, "*shape"], *, dim: int = -1) -> Float[Tensor, "*folded"]:
        """Fold one axis of `values`, by default the last."""
        signs = self.signs.to(values).reshape(-1, *[1] * (-1 - dim))
        if not self.is_folded:
            return values * signs
        shape = list(values.shape)
        shape[dim] = self.n_buckets
        result = values.new_empty(shape)
        for block, rotation in enumerate(self.rotations):
            start = block * self.n_buckets
            stop = min(start + self.n_buckets, len(signs))
            turn = min(start + self.n_buckets - rotation, stop)  # where the rotated block wraps around
            for first, end, to in ((start, turn, rotation), (turn, stop, 0)):
                place, piece = result.narrow(dim, to, end - first), values.narrow(dim, first, end - first)
                if block == 0:  # this fills the result
                    torch.mul(piece, signs[first:end], out=place)
                else:
                    place.addcmul_(piece, signs[first:end])
        return result


# Gradient entries that `add_outer` forms at once: few enough for the cache that cores share, and enough to keep a GPU busy.
_CHUNK, _CHUNK_ON_CUDA = 1 << 20, 1 << 26


@dataclass(frozen=True)
class _Tile:
    """A rectangle of a parameter that lies on one ring."""

    rows: slice  # of the folded parameter
    columns: Fold
    ring: Ring
    signs: tuple[Float[Tensor, "rows 1"], Float[Tensor, " columns"] | None]
    """The signs to apply after folding. A folded axis has its signs already; None means all ones."""


@dataclass(frozen=True)
class _TileColumn:
    """The tiles that share a range of columns, from the first row to the last. All but the last have the same number of rows."""

    columns: slice  # of the folded parameter
    rows: Fold
    tiles: list[_Tile]
    placement: Int64[Tensor, "3 tiles"]
    """Each tile's first row, and its ring's length and offset."""

    @property
    def width(self) -> int:
        return self.columns.stop - self.columns.start

    def fold_columns(
        self, values: Float[Tensor, "batch tokens columns"], tile: Int64[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Apply signs to the columns of single rows and fold them. Each row belongs to the tile given in `tile`."""
        if len(self.tiles) == 1:
            folded = self.tiles[0].columns(values)
        elif not self.tiles[0].columns.is_folded:
            folded = values * torch.stack([t.columns.signs for t in self.tiles])[tile].to(values)
        else:
            folded = sum(t.columns(values * (tile == i).unsqueeze(-1)) for i, t in enumerate(self.tiles))  # type: ignore[assignment]
        return folded[:, :, self.columns]


def _add_around(accumulator: Float[Tensor, "batch width"], entries: Float[Tensor, "batch entries"], ring: Ring) -> None:
    """Add entries around a ring, starting at its first bucket; they may go around several times."""
    target = accumulator[:, ring.offset : ring.offset + ring.length]
    whole = entries.shape[1] // ring.length * ring.length
    if whole:
        target += entries[:, :whole].view(len(entries), -1, ring.length).sum(1)
    if whole < entries.shape[1]:
        target[:, : entries.shape[1] - whole] += entries[:, whole:]


class _ShortTile:
    """Adds tiles of one shape and few entries around their rings, in a few large operations instead of one or two per row."""

    def __init__(self, like: Float[Tensor, "batch _ _"], n_rows: int, n_columns: int, proj_dim: int) -> None:
        self.batch, self.n_entries = len(like), n_rows * n_columns
        # Laps end to end; those behind the last entry stay zero. No ring is longer than proj_dim.
        self.laps = like.new_zeros(self.batch, self.n_entries + proj_dim)
        self.signed = self.laps.narrow(1, 0, self.n_entries).view(self.batch, n_rows, n_columns)

    def add(
        self,
        accumulator: Float[Tensor, "batch width"],
        entries: Float[Tensor, "batch rows columns"],
        signs: Float[Tensor, "rows _"],
        ring: Ring,
    ) -> None:
        """Add the entries times signs per entry or per row."""
        length, offset = ring
        n_laps = -(-self.n_entries // length)
        torch.mul(entries, signs, out=self.signed)
        laps = self.laps.narrow(1, 0, n_laps * length).view(self.batch, n_laps, length)
        accumulator.narrow(1, offset, length).add_(laps.sum(1))


class _Step(NamedTuple):
    """One tile as [`BlockCountSketch.add`] adds it, with all that does not depend on the gradients."""

    column: _TileColumn
    tile: _Tile
    rows: slice | None
    """None for all rows."""
    left: int
    shape: tuple[int, int]
    signs: tuple[Float[Tensor, "rows 1"], Float[Tensor, " columns"] | None]
    """In the dtype of the gradients."""


def _spans(length: int, most: int) -> list[slice]:
    """Cut `length` into the smallest number of ranges of similar size with at most `most` entries each."""
    size = math.ceil(length / math.ceil(length / most))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class BlockCountSketch(Projector):
    """The default projector: one signed bucket per gradient entry, in an order that allows contiguous additions.

    ```python
    >>> from hf_trak.projectors import BlockCountSketch
    >>> projector = BlockCountSketch(proj_dim=64, seed=0)
    >>> sketch = projector.start(2, dtype=torch.float32, device=torch.device("cpu"))
    >>> projector.add(sketch, "weight", torch.randn(2, 10, 20))
    >>> projector.finish(sketch).shape
    torch.Size([2, 64])
    ```

    Args:
        fold (`int`): Number of rows or columns of a weight's longer side that may share a bucket before the outer product is
            formed; 1 turns folding off.
    """

    def __init__(self, *, proj_dim: int, seed: int, fold: int = 1) -> None:
        super().__init__(proj_dim=proj_dim, seed=seed)
        if fold < 1:
            raise ValueError(f"`fold` must be at least 1, but is {fold}.")
        self.fold = fold
        self._layout = cache(self._draw_layout)
        self._small = cache(self._draw_small)
        self._steps = cache(self._draw_steps)

    def __getstate__(self) -> dict[str, int]:
        return {"proj_dim": self.proj_dim, "seed": self.seed, "fold": self.fold}  # tables are drawn again where they are needed

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _draw_layout(self, name: str, shape: tuple[int, int], device: torch.device) -> list[_TileColumn]:
        """Fold a parameter and cut it into tiles whose rows and columns fit the ring."""
        most = longest_side(self.proj_dim)
        n_rows, n_columns = folded_shape(*shape, fold=self.fold)
        result = []
        for columns in _spans(n_columns, most):
            width, left = columns.stop - columns.start, columns.start
            rows = Fold.draw(self.seed, name, "rows", length=shape[0], n_buckets=n_rows, device=device, tile=left)
            tiles = []
            for span in _spans(n_rows, most):
                key = stream_key(self.seed, name, "ring", span.start, left)
                fold = Fold.draw(
                    self.seed, name, "columns", length=shape[1], n_buckets=n_columns, device=device, tile=span.start
                )
                row_signs = torch.ones_like(rows.signs) if rows.is_folded else rows.signs
                signs = row_signs[span].unsqueeze(1), None if fold.is_folded else fold.signs[columns]
                tiles.append(_Tile(span, fold, draw_ring(key, width, proj_dim=self.proj_dim), signs))
            placement = torch.tensor([[t.rows.start, *t.ring] for t in tiles], device=device).T
            result.append(_TileColumn(columns, rows, tiles, placement))
        return result

    def start(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch width"]:
        # Twice as long as the features, so a ring at any offset is one slice; `finish` adds the second half to the first.
        return torch.zeros(batch_size, 2 * self.proj_dim, dtype=dtype, device=device)

    def finish(self, accumulator: Float[Tensor, "batch width"]) -> Float[Tensor, "batch proj_dim"]:
        return accumulator[:, : self.proj_dim] + accumulator[:, self.proj_dim :]

    def add(self, accumulator: Float[Tensor, "batch width"], name: str, grads: Float[Tensor, "batch *shape"]) -> None:
        shape = as_matrix(tuple(grads.shape[1:]))
        matrices = grads.reshape(grads.shape[0], *shape)
        if grads.device.type == "cpu" and math.prod(shape) <= _SMALL and (small := self._small(name, shape, grads.dtype)):
            ring, signs = small
            _add_around(accumulator, matrices.flatten(1) * signs, ring)
            return
        on_cpu = grads.device.type == "cpu"
        short: dict[tuple[int, int], _ShortTile] = {}
        folded: dict[int, Tensor] = {}  # by first row: tiles with the same rows fold their columns in the same way
        column, whole = None, matrices
        for step in self._steps(name, shape, grads.dtype, grads.device):
            if step.column is not column:
                column = step.column
                whole = column.rows(matrices, dim=-2) if column.rows.is_folded else matrices
            entries = whole if step.rows is None else whole[:, step.rows]
            if step.tile.columns.is_folded:
                first = step.tile.rows.start
                if first not in folded:
                    folded[first] = step.tile.columns(entries)
                entries = folded[first]
            n_rows, n_columns = step.shape
            row_signs, column_signs = step.signs
            signs = row_signs if column_signs is None else row_signs * column_signs
            entries = entries.narrow(2, step.left, n_columns)
            if on_cpu and n_rows * n_columns <= _SMALL:
                if step.shape not in short:
                    short[step.shape] = _ShortTile(entries, n_rows, n_columns, self.proj_dim)
                short[step.shape].add(accumulator, entries, signs, step.tile.ring)
            else:
                stream = ring_sum(accumulator, step.tile.ring, n_rows * n_columns)
                stream.add(entries.flatten(1), signs.expand(n_rows, n_columns).flatten())
                stream.close()

    def _draw_steps(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[_Step]:
        """Return the tiles of a parameter in their order."""
        return [
            _Step(
                column,
                tile,
                rows=None if len(column.tiles) == 1 else tile.rows,
                left=column.columns.start,
                shape=(tile.rows.stop - tile.rows.start, column.width),
                signs=(tile.signs[0].to(dtype), None if tile.signs[1] is None else tile.signs[1].to(dtype)),
            )
            for column in self._layout(name, shape, device)
            for tile in column.tiles
        ]

    def _draw_small(
        self, name: str, shape: tuple[int, int], dtype: torch.dtype
    ) -> tuple[Ring, Float[Tensor, " entries"]] | None:
        """Return the ring and the sign of each entry of a parameter with a single tile and no fold; None for other parameters."""
        columns = self._layout(name, shape, torch.device("cpu"))
        if len(columns) > 1 or len(columns[0].tiles) > 1 or columns[0].rows.is_folded or columns[0].tiles[0].columns.is_folded:
            return None
        (tile,) = columns[0].tiles
        return tile.ring, torch.outer(columns[0].rows.signs, tile.columns.signs).flatten().to(dtype)

    def add_outer(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        left: Float[Tensor, "batch tokens rows"],
        right: Float[Tensor, "batch tokens columns"],
    ) -> None:
        for column in self._layout(name, (left.shape[2], right.shape[2]), left.device):
            chunk = _CHUNK_ON_CUDA if left.is_cuda else _CHUNK
            folded_left = column.rows(left).transpose(1, 2)
            for tile in column.tiles:
                tile_left, tile_right = folded_left[:, tile.rows], tile.columns(right)[:, :, column.columns]
                n_at_once = 1 if one_by_one(tile_left, tile_right) else max(1, len(left))
                rows_at_once = max(1, chunk // (n_at_once * column.width))
                for first in range(0, len(left), n_at_once):
                    examples = slice(first, first + n_at_once)
                    laps = ring_sum(accumulator[examples], tile.ring, column.width * tile_left.shape[1])
                    # (batch, tokens, rows), (batch, tokens, columns) -> (batch, rows · columns), some rows at a time
                    for rows in tile_left[examples].split(rows_at_once, dim=1):
                        laps.add(bmm(rows, tile_right[examples]).flatten(1))
                    laps.close()

    def add_rows(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        shape: tuple[int, int],
        rows: Int64[Tensor, "batch tokens"],
        values: Float[Tensor, "batch tokens columns"],
    ) -> None:
        for column in self._layout(name, shape, values.device):
            place = column.rows.buckets[rows]
            tile = place // (column.tiles[0].rows.stop - column.tiles[0].rows.start)
            start, ring, offset = column.placement[:, tile]
            signed = column.fold_columns(values * column.rows.signs[rows].unsqueeze(-1).to(values), tile)
            add_rows_around(accumulator, signed, first=(place - start) * column.width % ring, ring=ring, offset=offset)
