"""Which of several processes this is, and what they tell each other while they score; alone, there is one and it has everything."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_and_size() -> tuple[int, int]:
    """Return this process's number and how many there are, by torch's process group."""
    group = torch.distributed
    return (group.get_rank(), group.get_world_size()) if group.is_available() and group.is_initialized() else (0, 1)


def share_of(n_items: int) -> range:
    """Return this process's share of so many items: as even as can be, one after another, empty where there are too few."""
    rank, size = rank_and_size()
    return range(n_items * rank // size, n_items * (rank + 1) // size)


def gather(tensor: Tensor) -> list[Tensor]:
    """Return every process's tensor, by rank; they have one shape. All processes must call it."""
    size = rank_and_size()[1]
    if size == 1:
        return [tensor]
    device = _device()
    found = [torch.empty_like(tensor, device=device) for _ in range(size)]
    torch.distributed.all_gather(found, tensor.to(device).contiguous())
    return [part.to(tensor.device) for part in found]


def wait_for_all() -> None:
    """Return when every process has come here."""
    if rank_and_size()[1] > 1:
        gather(torch.zeros(1))


def _device() -> torch.device:
    """Return where the group's backend wants tensors."""
    if torch.distributed.get_backend() == "gloo":
        return torch.device("cpu")
    from accelerate import PartialState

    return PartialState().device
