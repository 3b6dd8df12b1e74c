"""The bank: pairs of the training set, embedded by one member, that every example of a contrastive task is held against."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from hf_trak.hashing import hash_tensors, random_bits, stream_key

DEFAULT_BANK_SIZE = 512


@dataclass(frozen=True)
class Bank:
    """Embeddings of unit length, frozen: no gradient reaches them.

    Args:
        images (`torch.Tensor`): Of shape (bank, dim).
        texts (`torch.Tensor`): Of shape (bank, dim); of a row with several captions, the first.
        keys (`torch.Tensor`): What each pair is made of, so that an example finds its own pair; see [`pair_keys`].
        rows (`torch.Tensor`): Rows of the training set, in ascending order.
    """

    images: Float[Tensor, "bank dim"]
    texts: Float[Tensor, "bank dim"]
    keys: Int64[Tensor, " bank"]
    rows: Int64[Tensor, " bank"]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Bank:
        """Make a bank of what [`~Bank.tensors`] returned."""
        return cls(**{name: tensors[name] for name in ("images", "texts", "keys", "rows")})

    @classmethod
    def join(cls, parts: Sequence[Bank]) -> Bank:
        """Return the bank of all the pairs of several."""
        return cls.from_tensors({name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()})

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name, as they are stored."""
        return {"images": self.images, "texts": self.texts, "keys": self.keys, "rows": self.rows}

    def to(self, device: torch.device) -> Bank:
        """Return the bank on a device."""
        return Bank(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def owned_by(self, keys: Int64[Tensor, " batch"]) -> Bool[Tensor, "batch bank"]:
        """Return which pairs of the bank are the examples' own."""
        return keys.unsqueeze(1) == self.keys

    @property
    def sha256(self) -> str:
        """Of all its tensors."""
        return hash_tensors(self.tensors())


def draw_rows(n_rows: int, size: int | None, seed: int) -> Int64[Tensor, " bank"]:
    """Return which rows of a training set make its bank: a uniform draw without replacement, the same on every machine.

    Args:
        size (`int`, *optional*): By default, 512 or all rows if there are fewer.

    Raises:
        ValueError: If there are fewer rows than `size`, or fewer than 2.
    """
    # Differs from the reference: MadryLab/trak draws with weights 0, 1, 2, ..., so that the first row is never in its bank.
    if size is not None and size > n_rows:
        raise ValueError(
            f"`bank_size` is {size:,}, but the training set has {n_rows:,} rows, and a bank holds each at most once. Leave it out, "
            f"or choose at most {n_rows:,}."
        )
    if n_rows < 2:
        raise ValueError("A contrastive task holds each pair against others, but the training set has only one row.")
    order = random_bits(stream_key(seed, "bank"), torch.arange(n_rows)).argsort()
    return order[: min(n_rows, DEFAULT_BANK_SIZE) if size is None else size].sort().values


def pair_keys(batch: Mapping[str, Tensor | Sequence[Tensor]], names: Sequence[str]) -> Int64[Tensor, " batch"]:
    """Return a hash per row of the tensors `names` of a batch.

    What a row is told by is its content, so that an example finds its own pair in the bank whether it comes as a row of the training
    set, as a query, or twice, and however its picture is stored, as long as no pixel changes. A picture that was compressed again, or
    that another version of the image processor resizes to other numbers, is another picture: its pair then counts among its negatives.
    """
    keys = []
    for row in range(len(batch[names[0]])):
        digest = hashlib.blake2b(digest_size=8)
        for name in names:
            values = batch[name][row].contiguous()
            digest.update(f"{name}|{values.dtype}|{tuple(values.shape)}|".encode())
            digest.update(values.numpy().tobytes())
        keys.append(int.from_bytes(digest.digest(), "little", signed=True))
    return torch.tensor(keys, dtype=torch.int64)
