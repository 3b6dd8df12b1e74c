"""A finished member: its rows, its kernel, and what it is; every file is what was written, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from jaxtyping import Bool, Float64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_trak.hashing import hash_file
from hf_trak.storage.columns import Shard, read_shard
from hf_trak.storage.files import file_size, read_json
from hf_trak.storage.layout import BANK_NAME, KERNEL_NAME, MASK_NAME, MEMBER_NAME, PROGRESS


class MemberReader:
    """A finished member.

    Args:
        folder (`Path`): The member's folder.
        fetch (*optional*): Called with the name of a file before its first use, to bring it into `folder`. Files that come this way
            are hashed before they are used. By default, all files are there already.

    Raises:
        FileNotFoundError: If the folder is not a finished member.
        ValueError: If a file is missing, or is not as long as `member.json` says; of files to be fetched, this is found on their use.
    """

    def __init__(self, folder: Path, fetch: Callable[[str], Any] | None = None) -> None:
        self.folder = folder
        if not (folder / MEMBER_NAME).exists():
            begun = (folder / PROGRESS).exists()
            raise FileNotFoundError(
                f"{folder} is unfinished; run the command that began it again to continue."
                if begun
                else f"{folder} holds no {MEMBER_NAME}, so it is not a member of an attribution index."
            )
        self.info = read_json(folder / MEMBER_NAME)
        self.identity: dict[str, Any] = self.info["identity"]
        self.records: dict[str, dict[str, Any]] = {entry["file"]: entry for entry in self.info["files"]}
        if stray := [name for name in self.records if Path(name).name != name]:
            raise ValueError(
                f"{folder / MEMBER_NAME} lists {stray[0]!r}, which does not lie in its folder: it is no member of hf_trak's."
            )
        self._fetch = fetch
        self._fetched: set[str] = set()
        self.shard_paths: Sequence[Path] = _ShardPaths(self)
        if fetch is None:
            for name in self.records:
                self._check_size(name)

    def _check_size(self, name: str) -> None:
        path, expected = self.folder / name, self.records[name]["bytes"]
        size = file_size(path)
        if size != expected:
            state = "is missing" if size is None else f"has {size:,} bytes"
            raise ValueError(
                f"{path} {state}, where {expected:,} bytes were written. Restore it from a copy, or delete {self.folder} "
                "and featurize again."
            )

    def path(self, name: str) -> Path:
        """Return where a file lies; one that is elsewhere is fetched, and used only if it is what was written.

        Raises:
            ValueError: If what came is something else; it is dropped.
        """
        path = self.folder / name
        if self._fetch is None or name in self._fetched:
            return path
        self._fetch(name)
        if path.stat().st_size != self.records[name]["bytes"] or hash_file(path) != self.records[name]["sha256"]:
            for damaged in (path.resolve(), path):  # in a cache, a link and what it leads to
                damaged.unlink(missing_ok=True)
            raise ValueError(
                f"{path} is not what was written: its SHA-256 differs from the one in {MEMBER_NAME}. It was dropped, so that the next "
                "call fetches it anew. If it comes the same again, it is damaged where it comes from: ask for it to be pushed again."
            )
        self._fetched.add(name)
        return path

    @property
    def n_rows(self) -> int:
        return self.identity["n_rows"]

    def shards(self) -> Iterator[Shard]:
        """Yield the shards in order, one in memory at a time."""
        for path in self.shard_paths:
            yield read_shard(path)

    def kernel(self) -> Float64[Tensor, "proj_dim proj_dim"]:
        return self._read_tensor(KERNEL_NAME)

    def mask(self) -> Bool[Tensor, " rows"] | None:
        """Return which rows the checkpoint was trained on; None if that is not recorded."""
        return self._read_tensor(MASK_NAME) if MASK_NAME in self.records else None

    def bank(self) -> dict[str, Tensor] | None:
        """Return what examples were held against, by name; None for tasks that have no bank.

        Raises:
            ValueError: If it is not what was written: every score of the member depends on it.
        """
        if BANK_NAME not in self.records:
            return None
        path = self.path(BANK_NAME)
        if hash_file(path) != self.records[BANK_NAME]["sha256"]:
            raise ValueError(f"{path} has changed since it was written. Restore it from a copy, or featurize again.")
        return load_file(path)

    def _read_tensor(self, name: str) -> Tensor:
        path = self.path(name)
        try:
            return load_file(path)[name.split(".")[0]]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error}. Delete {self.folder} and featurize again.") from error

    def verify(self) -> None:
        """Hash every file.

        Raises:
            ValueError: Naming the first file whose content is not what was written.
        """
        for name, record in self.records.items():
            if hash_file(self.path(name)) != record["sha256"]:
                raise ValueError(f"{self.folder / name} has changed since it was written. Restore it from a copy.")


class _ShardPaths(Sequence[Path]):
    """A member's shards in order, each fetched when it is asked for."""

    def __init__(self, member: MemberReader) -> None:
        self._member = member
        self._names = [name for name, record in member.records.items() if "rows" in record]

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Path]: ...
    def __getitem__(self, index: int | slice) -> Path | Sequence[Path]:
        if isinstance(index, slice):
            return [self._member.path(name) for name in self._names[index]]
        return self._member.path(self._names[index])
