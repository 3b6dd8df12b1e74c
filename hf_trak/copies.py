"""Copies of an index, in another folder or on the Hub, each with a card that fits where it lies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hf_trak.cards import CURVE_NAME, render_index_card
from hf_trak.config import CARD_NAME, CONFIG_NAME, TrakConfig
from hf_trak.damping import DAMPING_NAME, DampingChoice
from hf_trak.store import MEMBER_NAME, MemberReader, write_atomically, write_json


def copy_index(folder: Path, target: Path, config: TrakConfig, members: Sequence[MemberReader], *, overwrite: bool) -> None:
    """Copy the index in `folder` to `target`; files appear under their names only when whole.

    Raises:
        ValueError: If `target` is not empty and `overwrite` is not set.
    """
    if target.resolve() == folder.resolve():
        return
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(f"{target} is not empty; choose another folder, or pass overwrite=True.")
        shutil.rmtree(target)
    chosen = [path for name in (DAMPING_NAME, CURVE_NAME) if (path := folder / name).exists()]
    for source in [folder / CONFIG_NAME, *chosen, *(member.folder for member in members)]:
        for path in [source] if source.is_file() else sorted(source.iterdir()):
            copy = target / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(copy, partial(shutil.copyfile, path))
    write_card(target, card_for(folder, config, members, name=target.name))
    for member in members:  # a checkpoint's path is as seen from the index
        checkpoint = member.info["checkpoint"]
        if checkpoint["path"] is not None:
            moved = {**checkpoint, "path": os.path.relpath(folder / checkpoint["path"], target)}
            write_json(target / member.folder.name / MEMBER_NAME, {**member.info, "checkpoint": moved})


def card_for(folder: Path, config: TrakConfig, members: Sequence[MemberReader], *, name: str) -> str:
    """Return the card for a copy called `name`: the one in `folder` if somebody wrote it, else with snippets that fit."""
    readme = folder / CARD_NAME
    if readme.exists() and readme.read_text() != render_card(folder, config, members, name=folder.name):
        return readme.read_text()
    return render_card(folder, config, members, name=name)


def render_card(folder: Path, config: TrakConfig, members: Sequence[MemberReader], *, name: str) -> str:
    """Return the card of the index in `folder`, calling it `name`."""
    return render_index_card(
        config,
        [member.info for member in members],
        name=name,
        choice=DampingChoice.load(folder, members),
        has_curve=(folder / CURVE_NAME).exists(),
    )


def write_card(folder: Path, card: str) -> None:
    """Write the card of the index in `folder`."""
    write_atomically(folder / CARD_NAME, lambda temporary: temporary.write_text(card))
