"""Copies of an index, in another folder or on the Hub, each with a card that fits where it lies."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_trak.config import CARD_NAME, CONFIG_NAME, TrakConfig
from hf_trak.hub.cards import CURVE_NAME, merge_card, render_index_card
from hf_trak.hub.upload import Upload, repository_exists
from hf_trak.scoring.damping import DAMPING_NAME, DampingChoice
from hf_trak.sources.training_sets import licence_in, licence_of_source
from hf_trak.storage.files import remove_folder, write_atomically, write_folder, write_json
from hf_trak.storage.layout import MEMBER_NAME
from hf_trak.storage.member_reader import MemberReader
from hf_trak.storage.object_store import ObjectPath, seen_from


def copy_index(folder: Path, target: Path, config: TrakConfig, members: Sequence[MemberReader], *, overwrite: bool) -> None:
    """Copy the index in `folder` to `target`; files appear under their names only when whole.

    Raises:
        ValueError: If `target` is not empty and `overwrite` is not set.
    """
    if not isinstance(target, ObjectPath) and target.resolve() == folder.resolve():
        return
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise ValueError(f"{target} is not empty; choose another folder, or pass overwrite=True.")
        remove_folder(target)
    write_folder(target)
    for name in _extras(folder):
        _copy(folder / name, target / name)
    write_card(target, card_for(folder, config, members, name=target.name))
    for member in members:
        for name in member.records:
            _copy(member.path(name), target / member.folder.name / name)
        write_json(target / member.folder.name / MEMBER_NAME, _moved(member, folder, target))
    _copy(folder / CONFIG_NAME, target / CONFIG_NAME)  # last: without it, nobody takes a part of the members for all


def _copy(source: Path, copy: Path) -> None:
    write_folder(copy.parent)
    write_atomically(copy, partial(shutil.copyfile, source))


def _moved(member: MemberReader, folder: Path, target: Path) -> dict[str, Any]:
    """Return a member's `member.json` for another folder: paths of its checkpoint and processor are as seen from the index."""
    moved = dict(member.info)
    for key in ("checkpoint", "processor"):
        if (known := moved.get(key)) is not None and known["path"] is not None:
            moved[key] = {**known, "path": seen_from(target, folder / known["path"])}
    return moved


def _extras(folder: Path) -> list[str]:
    """Return which of the files that an index may have it has."""
    return [name for name in (DAMPING_NAME, CURVE_NAME) if (folder / name).is_file()]


def push_index(
    folder: Path,
    config: TrakConfig,
    members: Sequence[MemberReader],
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    license: str | None,
    message: str,
) -> str:
    """Upload the index in `folder` to a dataset repository, and return the URL; see [`AttributionIndex.push_to_hub`].

    Raises:
        ValueError: If no licence is given, and none is known.
    """
    known = {"license": license} if license else find_licence(folder, members, None)
    if not known and not repository_exists(repo_id):
        raise _no_licence(repo_id)
    upload = Upload.begin(repo_id, private=private, revision=revision, create_pr=create_pr)
    files = {name: partial(_in, folder, name) for name in (CONFIG_NAME, *_extras(folder))}
    hashes = {}
    for member in members:
        files[f"{member.folder.name}/{MEMBER_NAME}"] = partial(_in, member.folder, MEMBER_NAME)
        for name, record in member.records.items():
            files[f"{member.folder.name}/{name}"] = partial(member.path, name)
            hashes[f"{member.folder.name}/{name}"] = record["sha256"]

    def card(existing: str | None) -> str:
        """Return the card, given the repository's."""
        licence = {"license": license} if license else find_licence(folder, members, existing)
        if not licence:
            raise _no_licence(repo_id)
        return card_for(folder, config, members, name=upload.repo_id, existing=existing, license=licence)

    return upload.run(files, hashes, card, message)


def _no_licence(repo_id: str) -> ValueError:
    return ValueError(
        f"The licence of these features is not known, and nothing was pushed to {repo_id}. They derive from the training data, so say what "
        "holds for that: push_to_hub(..., license='cc-by-4.0') or --license, 'other' for one that is not in the Hub's list, 'unknown' "
        "if nobody knows."
    )


def _in(folder: Path, name: str) -> Path:
    return folder / name


def find_licence(folder: Path, members: Sequence[MemberReader], existing: str | None) -> dict[str, Any]:
    """Return the licence stated in the card in `folder`, in the `existing` card of a repository, or for the training set, in that order."""
    own = (folder / CARD_NAME).read_text(encoding="utf-8") if (folder / CARD_NAME).exists() else ""
    return licence_in(own) or licence_in(existing or "") or licence_of_source(members[0].info.get("source", {}))


def card_for(
    folder: Path,
    config: TrakConfig,
    members: Sequence[MemberReader],
    *,
    name: str,
    existing: str | None = None,
    license: Mapping[str, Any] | None = None,
) -> str:
    """Return the card for a copy called `name`. What somebody wrote of their own into the card in `folder`, or else into the
    `existing` card of the copy, stays."""
    card = render_card(folder, config, members, name=name, license=license)
    readme = folder / CARD_NAME
    if readme.exists():
        mine, written = render_card(folder, config, members, name=folder.name), readme.read_text(encoding="utf-8")
        if merge_card(mine, written).strip() != mine.strip():
            return merge_card(card, written)
    return card if existing is None else merge_card(card, existing)


def render_card(
    folder: Path,
    config: TrakConfig,
    members: Sequence[MemberReader],
    *,
    name: str,
    license: Mapping[str, Any] | None = None,
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Return the card of the index in `folder`, calling it `name`."""
    return render_index_card(
        config,
        [member.info for member in members],
        name=name,
        choice=DampingChoice.load(folder, members),
        has_curve=(folder / CURVE_NAME).exists(),
        license=license,
        results=results,
    )


def write_card(folder: Path, card: str) -> None:
    """Write the card of the index in `folder`; what its owner wrote into the one that is there stays."""
    path = folder / CARD_NAME
    text = merge_card(card, path.read_text(encoding="utf-8")) if path.exists() else card
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
