"""Writing one member's rows: shard by shard, by one process or several, each shard recorded when it is whole."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
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
    read_json,
    remove_leftovers,
    write_atomically,
    write_folder,
    write_json,
    write_json_once,
    write_once,
)
from hf_trak.storage.layout import BANK_NAME, KERNEL_NAME, MASK_NAME, MEMBER_NAME, PROGRESS

_ROW_GROUP_BYTES = 12 << 20
_IDENTITY = "identity.json"
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
            shutil.rmtree(self.progress, ignore_errors=True)  # killed just after `member.json` was written

    @classmethod
    def begun(cls, folder: Path) -> MemberWriter:
        """Return the writer of a folder that others began.

        Raises:
            FileNotFoundError: If nobody did.
        """
        path = folder / PROGRESS / _IDENTITY
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no unfinished member: {path} is not there.")
        identity = read_json(path)
        grid = {name: identity.pop(name) for name in ("n_rows", "shard_rows")}
        return cls(folder, identity=identity, **grid, shared=True)

    def _begin(self, shared: bool) -> None:
        write_folder(self.progress)
        for folder in (self.folder, self.progress):
            remove_leftovers(folder, shared=shared)
        if not write_json_once(self.progress / _IDENTITY, self.identity):
            found = read_json(self.progress / _IDENTITY)
            if found != self.identity:
                raise self._other_features(found)

    def _other_features(self, found: dict[str, Any]) -> ValueError:
        return ValueError(
            f"{self.folder} holds other features than these:\n"
            + "\n".join(f"  {line}" for line in list_differences(found, self.identity))
            + "\nChoose another folder, or pass overwrite=True (--overwrite) to replace them."
        )

    def _found_identity(self) -> dict[str, Any] | None:
        for path, key in ((self.folder / MEMBER_NAME, "identity"), (self.progress / _IDENTITY, None)):
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
        return [shard for shard in range(self.n_shards) if self.lacks(shard)]

    def _record(self, shard: int) -> Path:
        return self.progress / f"{shard:05d}.json"

    def lacks(self, shard: int) -> bool:
        """Return whether a shard is not whole yet."""
        record, path = self._record(shard), self.path(shard)
        is_whole = record.exists() and path.exists() and read_json(record)["bytes"] == path.stat().st_size
        return not (self.is_finished or is_whole)

    def write(self, shard: int, columns: Mapping[str, np.ndarray]) -> None:
        """Write one whole shard, then record it."""
        table = to_table({"example_id": np.asarray(self.rows(shard), dtype=np.int64), **columns})
        group_rows = max(1, _ROW_GROUP_BYTES // max(1, table.nbytes // table.num_rows))
        path = self.path(shard)
        # Gradients do not compress; a checksum per page lets a reader find a flipped bit.
        write_atomically(
            path,
            lambda temporary: pq.write_table(
                table, temporary, row_group_size=group_rows, compression="none", use_dictionary=False, write_page_checksum=True
            ),
        )
        record = {"file": path.name, "rows": table.num_rows, "bytes": path.stat().st_size, "sha256": hash_file(path)}
        write_json(self._record(shard), record)

    def read(self, shard: int) -> Shard:
        return read_shard(self.path(shard))

    def verify(self, shard: int) -> None:
        """Hash a shard that was recorded as whole.

        Raises:
            ValueError: If it is not what was written.
        """
        if hash_file(self.path(shard)) != read_json(self._record(shard))["sha256"]:
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
        return load_file(path) if path.exists() else None

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
        return load_file(path)[_key(MASK_NAME)] if path.exists() else None

    def finish(
        self,
        kernel: Float64[Tensor, "proj_dim proj_dim"],
        description: dict[str, Any],
        mask: Bool[Tensor, " rows"] | None = None,
    ) -> None:
        """Write the kernel, the rows the checkpoint was trained on if not all, and, last, `member.json`."""
        files = [read_json(self._record(shard)) for shard in range(self.n_shards)]
        for name, tensor in ((KERNEL_NAME, kernel), (MASK_NAME, mask)):
            if tensor is not None:
                files.append(self._write_tensor(name, tensor))
        if (self.folder / BANK_NAME).exists():
            files.append(_describe_file(self.folder / BANK_NAME))
        remove_leftovers(self.folder, shared=False)
        write_json(self.folder / MEMBER_NAME, {"identity": self.identity, **description, "files": files})
        shutil.rmtree(self.progress)

    def _write_tensor(self, name: str, tensor: Tensor) -> dict[str, Any]:
        path = self.folder / name
        # Not `save_file`, whose own temporary file would outlive a killed process under a name that nobody knows.
        write_atomically(path, lambda temporary: temporary.write_bytes(save({_key(name): tensor.contiguous()})))
        return _describe_file(path)


def _key(name: str) -> str:
    return name.split(".")[0]


def _describe_file(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)}
