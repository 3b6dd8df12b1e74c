"""What lies in a member's folder, and which folders of an index are members.

member_0/train-00000-of-00004.parquet     example_id and the trak_* columns
member_0/kernel.safetensors
member_0/bank.safetensors                 only for contrastive tasks: what their examples are held against; written first
member_0/mask.safetensors                 only where the checkpoint was trained on some of the rows: which
member_0/member.json                      what these rows are; written last: a folder without it is unfinished
member_0/.progress/                       while unfinished: what is being computed, and which shards are whole
"""

from __future__ import annotations

import re
from pathlib import Path

from hf_trak.config import CONFIG_NAME
from hf_trak.storage.files import file_sizes

MEMBER_NAME = "member.json"
KERNEL_NAME = "kernel.safetensors"
MASK_NAME = "mask.safetensors"
BANK_NAME = "bank.safetensors"
PROGRESS = ".progress"
ENGINE_NAME = "engine.json"  # in `.progress`: which engine makes the gradients, of all processes and calls
IDENTITY_NAME = "identity.json"  # in `.progress`: what the member will be of
DESCRIPTION_NAME = "description.json"  # in `.progress`: what a job of an array tells of the member
PARTS_NAME = ".parts.json"  # in the index, while an array of jobs makes it
DAMPING_NAME = "damping.json"
CURVE_NAME = "damping.png"

_SHARD = re.compile(r"train-\d{5,}-of-\d{5,}\.parquet")
_PROGRESS_FILE = re.compile(r"identity\.json|engine\.json|description\.json|\d{5,}\.json|kernel-\d{5,}\.safetensors")
_MEMBER = re.compile(r"member_(0|[1-9]\d*)")


def member_folders(folder: Path) -> list[Path]:
    """Return member_0, member_1, ... as far as they go."""
    numbers = member_numbers(folder)
    return [folder / f"member_{number}" for number, found in enumerate(numbers) if number == found]


def member_numbers(folder: Path) -> list[int]:
    """Return the numbers of the folders that hold files of a member, in order."""
    numbers = sorted(number for name in file_sizes(folder) if (number := member_number(folder / name)) is not None)
    return [number for number in numbers if _holds_member(folder / f"member_{number}")]


def _holds_member(folder: Path) -> bool:
    return any(name == PROGRESS or is_member_name(name) for name in file_sizes(folder))


def member_number(folder: Path) -> int | None:
    """Return the number in the name of a member's folder; None for another name."""
    found = _MEMBER.fullmatch(folder.name)
    return None if found is None else int(found[1])


def is_shard_name(name: str) -> bool:
    """Return whether a file of this name may be a shard."""
    return _SHARD.fullmatch(name) is not None


def is_member_name(name: str) -> bool:
    """Return whether a member's folder may hold a file of this name; one in `.progress` is `.progress/NAME`."""
    inside = name.removeprefix(f"{PROGRESS}/")
    if inside != name:
        return _PROGRESS_FILE.fullmatch(inside) is not None
    return name in (MEMBER_NAME, KERNEL_NAME, MASK_NAME, BANK_NAME) or is_shard_name(name)


def is_index_name(name: str) -> bool:
    """Return whether an index may have written a file of this name, given as seen from the index's folder. The card, which its owner
    writes into, is not among them."""
    folder, separator, inside = name.partition("/")
    if separator:
        return _MEMBER.fullmatch(folder) is not None and is_member_name(inside)
    return name in (CONFIG_NAME, DAMPING_NAME, CURVE_NAME, PARTS_NAME)
