"""Writing a member: shard by shard, by one process or several. Each shard is recorded when it is complete."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float64
from safetensors.torch import load_file, save
from torch import Tensor

from hf_trak.hashing import hash_file
from hf_trak.messages import list_differences
from hf_trak.storage.columns import Shard, check_place, check_shard, join_columns, read_shard, to_table
from hf_trak.storage.files import (
    field_of,
    file_size,
    file_sizes,
    name_of_temporary,
    read_json,
    read_jsons,
    remove_file,
    remove_leftovers,
    write_atomically,
    write_folder,
    write_json,
    write_json_once,
    write_once,
)
from hf_trak.storage.format import (
    DESCRIPTION_NAME,
    ENGINE_NAME,
    GRAM_NAME,
    IDENTITY_NAME,
    MASK_NAME,
    MEMBER_NAME,
    PROGRESS,
    WRITTEN_FIRST,
    Origin,
    is_member_name,
    member_number,
    origin_of,
    read_member_info,
)
from hf_trak.storage.object_store import ObjectPath, local_copy
from hf_trak.storage.replacing import (
    begin_replacement,
    commit_replacement,
    holds_index,
    is_member_file,
    refuse_foreign,
    remove_files,
    staging_folder,
    written_files,
)
from hf_trak.storage.verify import is_as_written, remember_written

_ROW_GROUP_BYTES = 12 << 20


class MemberWriter:
    """Writes the shards of one member. The constructor finds the shards that are already complete.

    Args:
        folder (`Path`): The member's folder.
        identity (`dict`): Everything that determines the rows. A folder that was begun with another identity is refused.
        shard_rows (`int`): Rows per shard. Shards do not depend on which process computes them, or when.
        shared (`bool`): Whether other processes may be writing to the folder, or creating it, at the same time.
        beside (`Callable`, *optional*): Given a range of rows, return a table of further columns to store. Its schema's metadata is kept.

    Raises:
        ValueError: If the folder contains something else, or was begun with another identity. The message lists the differences.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: dict[str, Any],
        n_rows: int,
        shard_rows: int,
        shared: bool = False,
        beside: Callable[[range], pa.Table] | None = None,
    ) -> None:
        if n_rows < 1:
            raise ValueError("The dataset is empty: there is nothing to featurize.")
        if shard_rows < 1:
            raise ValueError(f"`shard_rows` must be at least 1, but is {shard_rows}.")
        self.folder = folder
        self.identity = {**identity, "n_rows": n_rows, "shard_rows": shard_rows}
        self.n_rows = n_rows
        self.shard_rows = shard_rows
        self.n_shards = math.ceil(n_rows / shard_rows)
        self.progress = folder / PROGRESS
        self._beside = beside
        if not shared:
            self._recover_list()
        found = self._found_identity()
        if found is not None and found != self.identity:
            raise self._other_features(found)
        if self.is_finished and not shared:
            with suppress(OSError):  # the process was killed just after it wrote `member.json`; harmless
                forget_progress(self.folder)
            self._reopen_if_damaged()
        if not self.is_finished:
            self._begin(shared)

    @classmethod
    def of_index(
        cls,
        folder: Path,
        number: int,
        config: dict[str, Any],
        *,
        identity: dict[str, Any],
        n_rows: int,
        shard_rows: int,
        overwrite: bool = False,
        shared: bool = False,
        beside: Callable[[range], pa.Table] | None = None,
    ) -> MemberWriter:
        """Return the writer of a member of the index in `folder`.

        Args:
            config (`dict`): Configuration of the index, as in its file.
            overwrite (`bool`): Replace an existing member. The new one is written to a separate folder until
                [`replace_members`] moves it.

        Raises:
            ValueError: As in [`MemberWriter`].
        """
        options: dict[str, Any] = {
            "identity": identity,
            "n_rows": n_rows,
            "shard_rows": shard_rows,
            "shared": shared,
            "beside": beside,
        }
        home, staged = folder / f"member_{number}", staging_folder(folder) / f"member_{number}"
        if not overwrite:
            return cls(home, **options)
        wanted = {**identity, "n_rows": n_rows, "shard_rows": shard_rows}
        found, is_apart = recorded_identity(home), True
        if found == wanted or (found is None and not holds_index(staging_folder(folder))):
            is_apart = False
        else:
            begin_replacement(folder, config)
            names = [
                f"train-{shard:05d}-of-{math.ceil(n_rows / max(1, shard_rows)):05d}.parquet"
                for shard in range(n_rows // max(1, shard_rows) + 1)
            ]
            new = [f"{home.name}/{name}" for name in (*names, GRAM_NAME, MASK_NAME, *WRITTEN_FIRST, MEMBER_NAME)]
            refuse_foreign(folder, new, written_files(folder))
        if not shared and recorded_identity(staged) not in ((wanted, None) if is_apart else (None,)):
            remove_files(staged, _names_of(staged))  # of another run that was to replace this index
        return cls(staged if is_apart else home, **options)

    @classmethod
    def begun(cls, folder: Path) -> MemberWriter:
        """Return the writer of a folder that another process created.

        Raises:
            FileNotFoundError: If no process did.
        """
        path = folder / PROGRESS / IDENTITY_NAME
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no unfinished member: {path} is not there.")
        identity = read_json(path)
        grid: dict[str, Any] = {name: field_of(path, identity, name, int) for name in ("n_rows", "shard_rows")}
        identity = {key: value for key, value in identity.items() if key not in grid}
        return cls(folder, identity=identity, **grid, shared=True)

    def _begin(self, shared: bool) -> None:
        write_folder(self.progress)
        self._remove_leftovers(shared)
        if not write_json_once(self.progress / IDENTITY_NAME, self.identity):
            found = read_json(self.progress / IDENTITY_NAME)
            if found != self.identity:
                raise self._other_features(found)

    def _remove_leftovers(self, shared: bool) -> None:
        remove_leftovers(self.folder, is_member_name, shared=shared)
        remove_leftovers(self.progress, lambda name: is_member_name(f"{PROGRESS}/{name}"), shared=shared)

    def _other_features(self, found: dict[str, Any]) -> ValueError:
        return ValueError(
            f"{self.folder} holds other features than these:\n"
            + "\n".join(f"  {line}" for line in list_differences(found, self.identity))
            + "\nChoose another folder, or pass overwrite=True (--overwrite) to replace them."
        )

    def _found_identity(self) -> dict[str, Any] | None:
        found = recorded_identity(self.folder)
        # If the process was killed before it wrote the identity, the folder has only an empty `.progress` and temporary files.
        if found is None and any(
            name != PROGRESS and not is_member_name(name_of_temporary(name) or "") for name in file_sizes(self.folder)
        ):
            raise ValueError(f"{self.folder} is not empty and holds no features of hf_trak; choose another folder.")
        return found

    def _recover_list(self) -> None:
        """Turn a member whose `member.json` is damaged or lost into an unfinished one with the shards that are complete. Each shard records
        its identity and a checksum per page. Without such a shard, nothing changes."""
        there = {} if isinstance(self.folder, ObjectPath) else file_sizes(self.folder)
        begun = MEMBER_NAME not in there and (self.progress / IDENTITY_NAME).exists()
        if begun or any(name in there for name in WRITTEN_FIRST):
            return  # it is unfinished anyway; or nothing shows whether the files on which rows depend are complete
        if MEMBER_NAME in there:
            with suppress(ValueError):
                read_member_info(self.folder)
                return
        whole = [shard for shard in range(self.n_shards) if self.path(shard).name in there and self._is_whole(shard)]
        if not whole:
            return
        write_folder(self.progress)
        write_json(self.progress / IDENTITY_NAME, self.identity)
        for shard in whole:
            path = self.path(shard)
            described = _describe_file(path.name, path)
            write_json(self._record(shard), {"file": path.name, "rows": len(self.rows(shard)), **described})
        remove_file(self.folder / MEMBER_NAME)

    def _is_whole(self, shard: int) -> bool:
        try:
            check_shard(self.path(shard), self._origin(shard), n_rows=len(self.rows(shard)))
        except (ValueError, KeyError, OSError, pa.ArrowException):
            return False
        return True

    def _reopen_if_damaged(self) -> None:
        """Turn a finished member with damaged or missing files into an unfinished one that lacks only these files."""
        info = read_member_info(self.folder)
        damaged = self._damaged(info["files"])
        if not damaged:
            return
        write_folder(self.progress)
        write_json(self.progress / IDENTITY_NAME, self.identity)
        names = [self.path(shard).name for shard in range(self.n_shards)]
        for entry in info["files"]:
            if "rows" in entry and entry["file"] in names and entry["file"] not in damaged:
                write_json(self._record(names.index(entry["file"])), entry)
        # Other damaged files are replaced when the new ones are complete. These are removed now, because they are read before they are written.
        if lost := [name for name in WRITTEN_FIRST if name in damaged]:
            remove_files(self.folder, lost)
        (self.folder / MEMBER_NAME).unlink()

    def _damaged(self, files: Sequence[Mapping[str, Any]]) -> set[str]:
        """Return the files of a finished member that have changed since they were written, or belong elsewhere."""
        if isinstance(self.folder, ObjectPath):
            sizes = file_sizes(self.folder)
            return {entry["file"] for entry in files if sizes.get(entry["file"]) != entry["bytes"]}
        damaged = {entry["file"] for entry in files if not is_as_written(self.folder / entry["file"], entry)}
        for shard in range(self.n_shards):
            path = self.path(shard)
            if path.name not in damaged:
                try:
                    check_place(path, self._origin(shard))
                except ValueError:
                    damaged.add(path.name)
        return damaged

    @property
    def is_finished(self) -> bool:
        return (self.folder / MEMBER_NAME).exists()

    def rows(self, shard: int) -> range:
        """Return the dataset's rows that belong to a shard."""
        return range(shard * self.shard_rows, min(self.n_rows, (shard + 1) * self.shard_rows))

    def path(self, shard: int) -> Path:
        return self.folder / f"train-{shard:05d}-of-{self.n_shards:05d}.parquet"

    def missing(self) -> list[int]:
        """Return the shards that are not complete yet."""
        if self.is_finished:
            return []
        sizes, records = file_sizes(self.folder), self._records()
        written = {record["file"]: record["bytes"] for record in records.values()}
        names = [self.path(shard).name for shard in range(self.n_shards)]
        return [shard for shard, name in enumerate(names) if sizes.get(name, -1) != written.get(name)]

    def _record(self, shard: int) -> Path:
        return self.progress / f"{shard:05d}.json"

    def lacks(self, shard: int) -> bool:
        """Return whether a shard is not complete yet."""
        record, size = self._record(shard), file_size(self.path(shard))
        is_whole = size is not None and record.exists() and _check_record(record, read_json(record))["bytes"] == size
        return not (is_whole or self.is_finished)

    def _records(self) -> dict[str, dict[str, Any]]:
        """Return the records of the complete shards, in order."""
        found = read_jsons(self.progress, [self._record(shard).name for shard in range(self.n_shards)])
        return {name: _check_record(self.progress / name, record) for name, record in found.items()}

    def write(self, shard: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write one complete shard, then record it."""
        table = to_table({"example_id": np.asarray(self.rows(shard), dtype=np.int64), **columns}, self._origin(shard))
        if self._beside is not None:
            table = join_columns(table, self._beside(self.rows(shard)))
        group_rows = max(1, _ROW_GROUP_BYTES // max(1, table.nbytes // table.num_rows))
        path, record = self.path(shard), {"file": self.path(shard).name, "rows": table.num_rows}

        def write(temporary: Path) -> None:
            # Gradients do not compress. With a checksum per page, a reader finds a flipped bit.
            options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
            pq.write_table(table, temporary, row_group_size=group_rows, **options)
            record.update(bytes=temporary.stat().st_size, sha256=hash_file(temporary))

        write_atomically(path, write)
        self._remember(path, record)
        write_json(self._record(shard), record)

    def _origin(self, shard: int) -> Origin:
        return origin_of(self.folder, self.identity, shard, n_shards=self.n_shards)

    def read(self, shard: int) -> Shard:
        """Read a shard of an unfinished member. If it is damaged or belongs elsewhere, the next run computes it again."""
        with self._local(shard) as file:
            try:
                return read_shard(file, self._origin(shard))
            except ValueError:
                self._record(shard).unlink(missing_ok=True)
                raise

    @contextmanager
    def _local(self, shard: int) -> Iterator[Path]:
        """Yield a shard's file, or a checked local copy if it is on an object store."""
        path = self.path(shard)
        with local_copy(path) as file:
            if file != path:
                self._check(shard, file)
            yield file

    def verify(self, shard: int) -> None:
        """Hash a shard that was recorded as complete.

        Raises:
            ValueError: If it has changed since it was written.
        """
        with local_copy(self.path(shard)) as file:
            self._check(shard, file)

    def _check(self, shard: int, file: Path) -> None:
        if hash_file(file) != _check_record(self._record(shard), read_json(self._record(shard)))["sha256"]:
            raise ValueError(
                f"{self.path(shard)} has changed since it was written. Restore it from a copy, or delete it and make it again."
            )

    def write_tensors(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors on which every row depends (a bank or running statistics) before the first shard, unless they exist."""
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_once(self.folder / file, lambda temporary: temporary.write_bytes(save(whole)))

    def tensors(self, file: str) -> dict[str, Tensor] | None:
        """Return the tensors that [`~MemberWriter.write_tensors`] wrote, or None."""
        path = self.folder / file
        if not path.exists():
            return None
        with local_copy(path) as local:
            return load_file(local)

    def write_engine(self, engine: dict[str, Any]) -> None:
        """Record the gradient engine before the first shard, unless another process has."""
        write_json_once(self.progress / ENGINE_NAME, engine)

    def engine(self) -> dict[str, Any] | None:
        """Return the record of [`~MemberWriter.write_engine`], or None."""
        path = self.progress / ENGINE_NAME
        return read_json(path) if path.exists() else None

    def describe(self, description: dict[str, Any], mask: Bool[Tensor, " rows"] | None = None) -> None:
        """Store the arguments of [`~MemberWriter.finish`], for a process that does not know them. The first write wins."""
        if mask is not None:
            self._write_tensor(MASK_NAME, mask)
        write_json_once(self.progress / DESCRIPTION_NAME, description)

    def described(self) -> dict[str, Any]:
        """Return the description that [`~MemberWriter.describe`] stored."""
        return read_json(self.progress / DESCRIPTION_NAME)

    def mask(self) -> Bool[Tensor, " rows"] | None:
        """Return the mask that [`~MemberWriter.describe`] stored, or None."""
        path = self.folder / MASK_NAME
        if not path.exists():
            return None
        with local_copy(path) as file:
            return load_file(file)[_key(MASK_NAME)]

    def finish(
        self,
        gram: Float64[Tensor, "proj_dim proj_dim"],
        description: dict[str, Any],
        mask: Bool[Tensor, " rows"] | None = None,
    ) -> None:
        """Write the Gram matrix, the mask if the checkpoint was trained on a subset, and, last, `member.json`."""
        records = self._records()
        if len(records) < self.n_shards:
            raise FileNotFoundError(
                f"{self.progress} has lost records of shards: {len(records)} of {self.n_shards} are there. Has another process finished "
                "this member, or deleted it? Run again to see."
            )
        files = list(records.values())
        for name, tensor in ((GRAM_NAME, gram), (MASK_NAME, mask)):
            if tensor is not None:
                files.append(self._write_tensor(name, tensor))
        for name in WRITTEN_FIRST:
            if (self.folder / name).exists():
                with local_copy(self.folder / name) as file:
                    files.append(_describe_file(name, file))
        self._remove_leftovers(shared=False)
        write_json(self.folder / MEMBER_NAME, {"identity": self.identity, **description, "files": files})
        forget_progress(self.folder)

    def _write_tensor(self, name: str, tensor: Tensor) -> dict[str, Any]:
        record: dict[str, Any] = {}

        def write(temporary: Path) -> None:
            # Not `save_file`: if the process is killed, its own temporary file would stay under an unknown name.
            temporary.write_bytes(save({_key(name): tensor.contiguous()}))
            record.update(_describe_file(name, temporary))

        write_atomically(self.folder / name, write)
        self._remember(self.folder / name, record)
        return record

    def _remember(self, path: Path, record: Mapping[str, Any]) -> None:
        if not isinstance(self.folder, ObjectPath):
            remember_written(path, record)


def forget_progress(folder: Path) -> None:
    """Remove `.progress` of a finished member."""
    names = [f"{PROGRESS}/{name}" for name in file_sizes(folder / PROGRESS)]
    remove_files(folder, [name for name in names if is_member_file(name)])
    if not isinstance(folder, ObjectPath):
        with suppress(OSError):  # it is not there, or holds something else
            (folder / PROGRESS).rmdir()


def replace_members(folder: Path, n_members: int) -> None:
    """Replace members by those that [`MemberWriter.of_index`] wrote to a separate folder, all at once."""
    staging = staging_folder(folder)
    if not holds_index(staging):
        return
    new = {number for name in file_sizes(staging) if (number := member_number(staging / name)) is not None}
    for number in [one for one in new if one >= n_members]:  # of another run that was to replace this index
        remove_files(staging / f"member_{number}", _names_of(staging / f"member_{number}"))
        new.remove(number)
    assert all((staging / f"member_{number}" / MEMBER_NAME).exists() for number in new), "a member is not finished"
    commit_replacement(folder, written_files(folder, lambda number: number in new or number >= n_members))


def recorded_identity(folder: Path) -> dict[str, Any] | None:
    """Return the identity of the member in a folder, finished or not; None if there is no member."""
    if (folder / MEMBER_NAME).exists():
        return field_of(folder / MEMBER_NAME, read_json(folder / MEMBER_NAME), "identity", dict)
    path = folder / PROGRESS / IDENTITY_NAME
    return read_json(path) if path.exists() else None


def _names_of(folder: Path) -> list[str]:
    names = [*file_sizes(folder), *(f"{PROGRESS}/{name}" for name in file_sizes(folder / PROGRESS))]
    return [name for name in names if is_member_file(name)]


def _check_record(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    field_of(path, record, "file", str)
    field_of(path, record, "bytes", int)
    field_of(path, record, "sha256", str)
    return record


def _key(name: str) -> str:
    return name.split(".")[0]


def _describe_file(name: str, path: Path) -> dict[str, Any]:
    return {"file": name, "bytes": path.stat().st_size, "sha256": hash_file(path)}
