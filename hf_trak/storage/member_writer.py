"""Writing one member's rows: shard by shard, by one process or several, each shard recorded when it is whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jaxtyping import Bool, Float64
from safetensors.torch import load_file, save
from torch import Tensor

from hf_trak.hashing import hash_file
from hf_trak.storage.columns import Shard, read_shard, to_table
from hf_trak.storage.differences import list_differences
from hf_trak.storage.files import (
    TEMPORARY,
    discard,
    file_size,
    file_sizes,
    read_json,
    read_jsons,
    remove_folder,
    remove_leftovers,
    write_atomically,
    write_folder,
    write_json,
    write_json_once,
    write_once,
)
from hf_trak.storage.layout import BANK_NAME, ENGINE_NAME, IDENTITY_NAME, KERNEL_NAME, MASK_NAME, MEMBER_NAME, PROGRESS
from hf_trak.storage.object_store import local_copy

_ROW_GROUP_BYTES = 12 << 20
_DESCRIPTION = "description.json"


class MemberWriter:
    """Writes the shards of one member; finds on opening which are already whole.

    Args:
        folder (`Path`): The member's folder.
        identity (`dict`): Everything that decides the rows; a folder begun with another identity is refused.
        shard_rows (`int`): Rows per shard. The grid does not depend on who computes a shard, or when.
        overwrite (`bool`): Discard what the folder holds if it is another member's.
        shared (`bool`): Other processes may be writing to the folder, or beginning it, at this moment.

    Raises:
        ValueError: If the folder holds, or was begun as, something else; the message lists the differences.
    """

    def __init__(
        self,
        folder: Path,
        *,
        identity: dict[str, Any],
        n_rows: int,
        shard_rows: int,
        overwrite: bool = False,
        shared: bool = False,
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
        found = self._found_identity()
        if found is not None and found != self.identity:
            if not overwrite:
                raise self._other_features(found)
            discard(folder)
        if not self.is_finished:
            self._begin(shared)
        elif not shared:
            remove_folder(self.progress)  # killed just after `member.json` was written

    @classmethod
    def begun(cls, folder: Path) -> MemberWriter:
        """Return the writer of a folder that others began.

        Raises:
            FileNotFoundError: If nobody did.
        """
        path = folder / PROGRESS / IDENTITY_NAME
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no unfinished member: {path} is not there.")
        identity = read_json(path)
        grid = {name: identity.pop(name) for name in ("n_rows", "shard_rows")}
        return cls(folder, identity=identity, **grid, shared=True)

    def _begin(self, shared: bool) -> None:
        write_folder(self.progress)
        for folder in (self.folder, self.progress):
            remove_leftovers(folder, shared=shared)
        if not write_json_once(self.progress / IDENTITY_NAME, self.identity):
            found = read_json(self.progress / IDENTITY_NAME)
            if found != self.identity:
                raise self._other_features(found)

    def _other_features(self, found: dict[str, Any]) -> ValueError:
        return ValueError(
            f"{self.folder} holds other features than these:\n"
            + "\n".join(f"  {line}" for line in list_differences(found, self.identity))
            + "\nChoose another folder, or pass overwrite=True (--overwrite) to replace them."
        )

    def _found_identity(self) -> dict[str, Any] | None:
        for path, key in ((self.folder / MEMBER_NAME, "identity"), (self.progress / IDENTITY_NAME, None)):
            if path.exists():
                content = read_json(path)
                return content[key] if key else content
        # Killed before its identity was written, a member's folder holds an empty `.progress` and temporary files at most.
        if self.folder.exists() and any(
            path.name != PROGRESS and not path.name.endswith(TEMPORARY) for path in self.folder.iterdir()
        ):
            raise ValueError(f"{self.folder} is not empty and holds no features of hf_trak; choose another folder.")
        return None

    @property
    def is_finished(self) -> bool:
        return (self.folder / MEMBER_NAME).exists()

    def rows(self, shard: int) -> range:
        """Return the dataset's rows that belong to a shard."""
        return range(shard * self.shard_rows, min(self.n_rows, (shard + 1) * self.shard_rows))

    def path(self, shard: int) -> Path:
        return self.folder / f"train-{shard:05d}-of-{self.n_shards:05d}.parquet"

    def missing(self) -> list[int]:
        """Return the shards that are not whole yet."""
        if self.is_finished:
            return []
        sizes, records = file_sizes(self.folder), self._records()
        written = {record["file"]: record["bytes"] for record in records.values()}
        names = [self.path(shard).name for shard in range(self.n_shards)]
        return [shard for shard, name in enumerate(names) if sizes.get(name, -1) != written.get(name)]

    def _record(self, shard: int) -> Path:
        return self.progress / f"{shard:05d}.json"

    def lacks(self, shard: int) -> bool:
        """Return whether a shard is not whole yet."""
        record, size = self._record(shard), file_size(self.path(shard))
        is_whole = size is not None and record.exists() and read_json(record)["bytes"] == size
        return not (is_whole or self.is_finished)

    def _records(self) -> dict[str, dict[str, Any]]:
        """Return what was recorded of the shards that are whole, in their order."""
        return read_jsons(self.progress, [self._record(shard).name for shard in range(self.n_shards)])

    def write(self, shard: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write one whole shard, then record it."""
        table = to_table({"example_id": np.asarray(self.rows(shard), dtype=np.int64), **columns})
        group_rows = max(1, _ROW_GROUP_BYTES // max(1, table.nbytes // table.num_rows))
        path, record = self.path(shard), {"file": self.path(shard).name, "rows": table.num_rows}

        def write(temporary: Path) -> None:
            # Gradients do not compress; a checksum per page lets a reader find a flipped bit.
            options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
            pq.write_table(table, temporary, row_group_size=group_rows, **options)
            record.update(bytes=temporary.stat().st_size, sha256=hash_file(temporary))

        write_atomically(path, write)
        write_json(self._record(shard), record)

    def read(self, shard: int) -> Shard:
        with self._local(shard) as file:
            return read_shard(file)

    @contextmanager
    def _local(self, shard: int) -> Iterator[Path]:
        """Give a shard's file, or a copy of one that lies elsewhere: checked, since it has been on its way."""
        path = self.path(shard)
        with local_copy(path) as file:
            if file != path:
                self._check(shard, file)
            yield file

    def verify(self, shard: int) -> None:
        """Hash a shard that was recorded as whole.

        Raises:
            ValueError: If it is not what was written.
        """
        with local_copy(self.path(shard)) as file:
            self._check(shard, file)

    def _check(self, shard: int, file: Path) -> None:
        if hash_file(file) != read_json(self._record(shard))["sha256"]:
            raise ValueError(
                f"{self.path(shard)} has changed since it was written. Restore it from a copy, or delete it and make it again."
            )

    def write_bank(self, tensors: Mapping[str, Tensor]) -> None:
        """Write what examples are held against, before the first shard, unless another process has."""
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_once(self.folder / BANK_NAME, lambda temporary: temporary.write_bytes(save(whole)))

    def bank(self) -> dict[str, Tensor] | None:
        """Return what [`~MemberWriter.write_bank`] wrote, if it did."""
        path = self.folder / BANK_NAME
        if not path.exists():
            return None
        with local_copy(path) as file:
            return load_file(file)

    def write_engine(self, engine: dict[str, Any]) -> None:
        """Write which engine makes the gradients, before the first shard, unless another process has."""
        write_json_once(self.progress / ENGINE_NAME, engine)

    def engine(self) -> dict[str, Any] | None:
        """Return what [`~MemberWriter.write_engine`] wrote, if it did."""
        path = self.progress / ENGINE_NAME
        return read_json(path) if path.exists() else None

    def describe(self, description: dict[str, Any], mask: Bool[Tensor, " rows"] | None = None) -> None:
        """Keep what [`~MemberWriter.finish`] is to be given, for a process that does not know it; the first to do so is believed."""
        if mask is not None:
            self._write_tensor(MASK_NAME, mask)
        write_json_once(self.progress / _DESCRIPTION, description)

    def described(self) -> dict[str, Any]:
        """Return what [`~MemberWriter.describe`] kept."""
        return read_json(self.progress / _DESCRIPTION)

    def mask(self) -> Bool[Tensor, " rows"] | None:
        """Return the mask that [`~MemberWriter.describe`] kept, if there was one."""
        path = self.folder / MASK_NAME
        if not path.exists():
            return None
        with local_copy(path) as file:
            return load_file(file)[_key(MASK_NAME)]

    def finish(
        self,
        kernel: Float64[Tensor, "proj_dim proj_dim"],
        description: dict[str, Any],
        mask: Bool[Tensor, " rows"] | None = None,
    ) -> None:
        """Write the kernel, the rows the checkpoint was trained on if not all, and, last, `member.json`."""
        records = self._records()
        if len(records) < self.n_shards:
            raise FileNotFoundError(
                f"{self.progress} has lost records of shards: {len(records)} of {self.n_shards} are there. Has another process finished "
                "this member, or deleted it? Run again to see."
            )
        files = list(records.values())
        for name, tensor in ((KERNEL_NAME, kernel), (MASK_NAME, mask)):
            if tensor is not None:
                files.append(self._write_tensor(name, tensor))
        if (self.folder / BANK_NAME).exists():
            with local_copy(self.folder / BANK_NAME) as file:
                files.append(_describe_file(BANK_NAME, file))
        remove_leftovers(self.folder, shared=False)
        write_json(self.folder / MEMBER_NAME, {"identity": self.identity, **description, "files": files})
        remove_folder(self.progress)

    def _write_tensor(self, name: str, tensor: Tensor) -> dict[str, Any]:
        record: dict[str, Any] = {}

        def write(temporary: Path) -> None:
            # Not `save_file`, whose own temporary file would outlive a killed process under a name that nobody knows.
            temporary.write_bytes(save({_key(name): tensor.contiguous()}))
            record.update(_describe_file(name, temporary))

        write_atomically(self.folder / name, write)
        return record


def _key(name: str) -> str:
    return name.split(".")[0]


def _describe_file(name: str, path: Path) -> dict[str, Any]:
    return {"file": name, "bytes": path.stat().st_size, "sha256": hash_file(path)}
