"""What lies in a member's folder, and which folders of an index are members.

member_0/train-00000-of-00004.parquet     example_id and the trak_* columns
member_0/kernel.safetensors
member_0/bank.safetensors                 only for contrastive tasks: what their examples are held against; written first
member_0/mask.safetensors                 only where the checkpoint was trained on some of the rows: which
member_0/member.json                      what these rows are; written last: a folder without it is unfinished
member_0/.progress/                       while unfinished: what is being computed, and which shards are whole
"""

from __future__ import annotations

from pathlib import Path

MEMBER_NAME = "member.json"
KERNEL_NAME = "kernel.safetensors"
MASK_NAME = "mask.safetensors"
BANK_NAME = "bank.safetensors"
PROGRESS = ".progress"
ENGINE_NAME = "engine.json"  # in `.progress`: which engine makes the gradients, of all processes and calls
IDENTITY_NAME = "identity.json"  # in `.progress`: what the member will be of


def member_folders(folder: Path) -> list[Path]:
    """Return member_0, member_1, ... as far as they go."""
    folders: list[Path] = []
    while (folder / f"member_{len(folders)}").exists():
        folders.append(folder / f"member_{len(folders)}")
    return folders
