"""Copies of an index to another folder or to the Hub. The card of a copy is adapted to its location."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_trak.config import CARD_NAME, CONFIG_NAME, TrakConfig
from hf_trak.hub.cards import CURVE_NAME, merge_card, render_index_card
from hf_trak.hub.upload import Upload, repository_exists
from hf_trak.scoring.damping import DAMPING_NAME, DampingChoice
from hf_trak.sources.repositories import licence_in, licence_of_source
from hf_trak.storage.files import write_atomically, write_folder, write_json
from hf_trak.storage.format import MEMBER_NAME, member_number
from hf_trak.storage.object_store import ObjectPath, seen_from
from hf_trak.storage.reader import MemberReader
from hf_trak.storage.replacing import (
    begin_replacement,
    commit_replacement,
    drop_replacement,
    finish_replacement,
    foreign_names,
    holds_index,
    refuse_foreign,
    refuse_overlap,
    written_files,
)


def copy_index(
    folder: Path,
    target: Path,
    config: TrakConfig,
    members: Sequence[MemberReader],
    *,
    overwrite: bool,
    home: Path | None = None,
) -> None:
    """Copy the index in `folder` to `target`. The copy appears there when it is complete.

    Args:
        overwrite (`bool`): Replace the index in `target`. Files that hf_trak did not write stay.
        home (`Path`, *optional*): The location of the index, if `folder` is a cache of it.

    Raises:
        ValueError: If `target` is the index, is inside it or contains it; if it is not empty and `overwrite` is not set; or if it is not
            empty and has no index.
    """
    for source in {folder, home or folder}:
        refuse_overlap(source, target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, where an index needs a folder; choose another name.")
    finish_replacement(target)
    if taken := foreign_names(target):
        if not overwrite:
            raise ValueError(f"{target} is not empty; choose another folder, or pass overwrite=True to replace an index there.")
        if not holds_index(target):
            raise ValueError(
                f"{target} holds {', '.join(taken[:3])}{', ...' if len(taken) > 3 else ''} and no index. Only an index is replaced: choose "
                "another folder. Nothing was changed."
            )
    names = [CONFIG_NAME, *_extras(folder)]
    names += [f"{member.folder.name}/{name}" for member in members for name in (MEMBER_NAME, *member.records)]
    old = written_files(target)
    refuse_foreign(target, names, old)
    drop_replacement(target)
    copy = begin_replacement(target, config.to_dict())
    for name in _extras(folder):
        _copy(folder / name, copy / name)
    card = card_for(folder, config, members, name=target.name)
    write_card(copy, merge_card(card, _own_card(target)) if _own_card(target) else card)
    for member in members:
        for name in member.records:
            _copy(member.path(name), copy / member.folder.name / name)
        write_json(copy / member.folder.name / MEMBER_NAME, _moved(member, folder, target))
    commit_replacement(target, old)


def _copy(source: Path, copy: Path) -> None:
    write_folder(copy.parent)
    write_atomically(copy, partial(shutil.copyfile, source))


def _own_card(folder: Path) -> str:
    """Return the card in a folder; an empty text if there is none, or if it is a link to another file."""
    path = folder / CARD_NAME
    is_link = not isinstance(path, ObjectPath) and path.is_symlink() and not is_in_hub_cache(path)
    return path.read_text(encoding="utf-8") if path.is_file() and not is_link else ""


def _moved(member: MemberReader, folder: Path, target: Path) -> dict[str, Any]:
    """Return a member's `member.json` for another folder. Paths of its checkpoint, base and processor are relative to the index."""
    moved = dict(member.info)
    for key in ("checkpoint", "base", "processor"):
        if (known := moved.get(key)) is not None and known["path"] is not None:
            moved[key] = {**known, "path": seen_from(target, folder / known["path"])}
    return moved


def _extras(folder: Path) -> list[str]:
    """Return the optional files that an index has."""
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
    token: str | bool | None = None,
) -> str:
    """Upload the index in `folder` to a dataset repository, and return the URL; see [`AttributionIndex.push_to_hub`].

    Raises:
        ValueError: If no licence is given or known.
    """
    known = {"license": license} if license else find_licence(folder, members, None)
    if not known and not repository_exists(repo_id, token=token):
        raise _no_licence(repo_id)
    _refuse_links(folder, members)
    upload = Upload.begin(repo_id, private=private, revision=revision, create_pr=create_pr, token=token)
    files = {name: partial(_regular, folder / name) for name in (CONFIG_NAME, *_extras(folder))}
    hashes = {}
    for member in members:
        files[f"{member.folder.name}/{MEMBER_NAME}"] = partial(_regular, member.folder / MEMBER_NAME)
        for name, record in member.records.items():
            files[f"{member.folder.name}/{name}"] = partial(_file_of, member, name)
            hashes[f"{member.folder.name}/{name}"] = record["sha256"]

    def card(existing: str | None) -> str:
        """Return the card to upload, given that of the repository."""
        licence = {"license": license} if license else find_licence(folder, members, existing)
        if not licence:
            raise _no_licence(repo_id)
        return card_for(folder, config, members, name=upload.repo_id, existing=existing, license=licence)

    return upload.run(files, hashes, card, message)


def _no_licence(repo_id: str) -> ValueError:
    return ValueError(
        f"The licence of these features is not known, and nothing was pushed to {repo_id}. They derive from the training data, so give "
        "its licence: push_to_hub(..., license='cc-by-4.0') or --license, 'other' for one that is not in the Hub's list, 'unknown' "
        "if nobody knows."
    )


def _file_of(member: MemberReader, name: str) -> Path:
    return _regular(member.path(name))


def _refuse_links(folder: Path, members: Sequence[MemberReader]) -> None:
    """Refuse to upload an index with files that are links, before anything is uploaded."""
    if (folder / CARD_NAME).is_symlink():
        _regular(folder / CARD_NAME)
    for name in (CONFIG_NAME, *_extras(folder)):
        _regular(folder / name)
    for member in members:
        for name in (MEMBER_NAME, *member.records):
            if (member.folder / name).is_symlink() or member.folder.is_symlink():
                _regular(member.folder / name)


def _regular(path: Path) -> Path:
    """Return a path of an index if neither it nor its folder is a link.

    Raises:
        ValueError: If it is a link.
    """
    link = next((one for one in (path, path.parent) if one.is_symlink()), None)
    is_member = member_number(path.parent) is not None  # the index's own folder may be a link
    if link is None or (link == path.parent and not is_member) or is_in_hub_cache(path):
        return path
    raise ValueError(
        f"{link} is a link to {os.path.realpath(link)}, and links are not followed when an index is uploaded: that file may not be meant to "
        "be published. Put a copy of it in the link's place, or remove the link. Nothing was sent."
    )


def is_in_hub_cache(path: Path) -> bool:
    """Return whether a file is in the Hub's cache, where each file is a link to a blob of the same repository."""
    for folder in path.parents:
        if folder.parent.name == "snapshots":
            blobs = folder.parent.parent / "blobs"
            return path.is_symlink() and path.resolve().parent == blobs.resolve() and not path.parent.is_symlink()
    return False


def find_licence(folder: Path, members: Sequence[MemberReader], existing: str | None) -> dict[str, Any]:
    """Return the licence from the card in `folder`, from the `existing` card of a repository, or of the training set, in that order."""
    return licence_in(_own_card(folder)) or licence_in(existing or "") or licence_of_source(members[0].info.get("source", {}))


def card_for(
    folder: Path,
    config: TrakConfig,
    members: Sequence[MemberReader],
    *,
    name: str,
    existing: str | None = None,
    license: Mapping[str, Any] | None = None,
) -> str:
    """Return the card for a copy called `name`. The owner's own text stays: that of the card in `folder`, or else that of the
    copy's `existing` card."""
    card = render_card(folder, config, members, name=name, license=license)
    if written := _own_card(folder):
        mine = render_card(folder, config, members, name=folder.name)
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
    """Return the card of the index in `folder`, with the name `name`."""
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
    """Write the card of the index in `folder`. The owner's own text in an existing card stays."""
    path = folder / CARD_NAME
    if not isinstance(path, ObjectPath) and path.is_symlink():
        return  # it points to a file of the owner's
    existing = _own_card(folder)
    text = merge_card(card, existing) if existing else card
    if text != existing:
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
