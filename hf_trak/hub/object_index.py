"""Indexes on object stores: the configuration and descriptions of members are downloaded first, shards when a call reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_trak.config import CARD_NAME, CONFIG_NAME
from hf_trak.hashing import hash_file, hash_json
from hf_trak.hub.cards import CURVE_NAME
from hf_trak.scoring.damping import DAMPING_NAME
from hf_trak.storage.files import write_atomically, write_folder
from hf_trak.storage.format import MEMBER_NAME, PROGRESS, member_folders, read_member_info
from hf_trak.storage.object_store import ObjectPath
from hf_trak.storage.replacing import finish_replacement
from hf_trak.storage.verify import cache_folder

_EXTRAS = (CARD_NAME, DAMPING_NAME, CURVE_NAME)


@dataclass(frozen=True)
class ObjectIndex:
    """An index on an object store, and the local folder for its files.

    The name of the folder depends on the content of the index. If the URL later has another index, that index has another folder.

    Args:
        home (`ObjectPath`): The location of the index.
        folder (`Path`): A folder below `HF_TRAK_CACHE`, by default `hf_trak` beside the caches of the Hub.
        records (`Mapping`): By member and file name, the record of the file in `member.json`.
    """

    home: ObjectPath
    folder: Path
    records: Mapping[str, Mapping[str, Any]]

    @classmethod
    def open(cls, home: ObjectPath) -> ObjectIndex:
        """Download the configuration of the index and the description of each member.

        Raises:
            FileNotFoundError: If there is no index, or if it is unfinished.
        """
        finish_replacement(home)
        config = home.read_all([CONFIG_NAME]).get(CONFIG_NAME)
        if config is None:
            raise FileNotFoundError(f"{home} holds no {CONFIG_NAME}, so it is not an attribution index.")
        names = [f"{member.name}/{MEMBER_NAME}" for member in member_folders(home)]
        found = {CONFIG_NAME: config, **home.read_all(names)}
        for name in names:
            if name not in found:
                raise FileNotFoundError(_not_finished(home / name.split("/")[0]))
        identity = hash_json({name: hashlib.sha256(content).hexdigest() for name, content in found.items()})
        index = cls(home, cache_folder() / identity[:24] / home.name, {})
        index._keep(found)
        infos = {name: read_member_info((index.folder / name).parent) for name in names}
        records = {f"{Path(name).parent}/{one['file']}": one for name, info in infos.items() for one in info["files"]}
        index._keep(extras := home.read_all(_EXTRAS))
        for name in _EXTRAS:  # these files can appear, change and disappear after the members are finished
            if name not in extras:
                (index.folder / name).unlink(missing_ok=True)
        return cls(home, index.folder, records)

    def publish(self) -> None:
        """Upload the card and the choice of damping from the folder to the store."""
        there = self.home.read_all(_EXTRAS)
        for name in _EXTRAS:
            path = self.folder / name
            if not path.exists():
                (self.home / name).unlink(missing_ok=True)
            elif there.get(name) != (content := path.read_bytes()):
                write_atomically(self.home / name, partial(_write_bytes, content))

    def _keep(self, found: Mapping[str, bytes]) -> None:
        for name, content in found.items():
            path = self.folder / name
            if not path.exists() or path.read_bytes() != content:
                write_folder(path.parent)
                write_atomically(path, partial(_write_bytes, content))

    def fetcher(self, member: str) -> Callable[[str], None]:
        """Return a function that downloads a file of a member, given the file's name."""
        return lambda name: self.fetch(f"{member}/{name}")

    def fetch(self, name: str) -> None:
        """Download a file into the folder, unless it exists.

        Raises:
            ConnectionError: If the store cannot be reached.
            ValueError: If the store lacks the file, or if its content differs from the record.
        """
        if (self.folder / name).exists():
            return
        try:
            write_atomically(self.folder / name, lambda temporary: self._fetch(name, temporary))
        except FileNotFoundError as error:
            raise ValueError(
                f"{self.home / name} is missing, which {MEMBER_NAME} lists: the index is incomplete. Restore it from a copy, or featurize "
                "again."
            ) from error

    def _fetch(self, name: str, temporary: Path) -> None:
        (self.home / name).get(temporary)
        record, size = self.records[name], temporary.stat().st_size
        if size != record["bytes"] or hash_file(temporary) != record["sha256"]:
            state = f"has {size:,} bytes" if size != record["bytes"] else "has another SHA-256"
            raise ValueError(
                f"{self.home / name} is not what was written: it {state}, where {record['bytes']:,} bytes were written. Restore it from a "
                "copy, or featurize again to another place."
            )


def _not_finished(member: Path) -> str:
    if (member / PROGRESS).exists():
        return f"{member} is unfinished; run the command that began it again to continue, or `hf-trak merge` if jobs made it."
    return f"{member} holds no {MEMBER_NAME}, so it is not a member of an attribution index."


def _write_bytes(content: bytes, temporary: Path) -> None:
    temporary.write_bytes(content)
