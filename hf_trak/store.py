"""One member's rows on disk: Parquet shards of a fixed grid of rows, each written atomically and recorded when it is whole.

member_0/train-00000-of-00004.parquet     example_id and the trak_* columns
member_0/kernel.safetensors
member_0/bank.safetensors                 only for contrastive tasks: what their examples are held against; written first
member_0/mask.safetensors                 only where the checkpoint was trained on some of the rows: which
member_0/member.json                      what these rows are; written last: a folder without it is unfinished
member_0/.progress/                       while unfinished: what is being computed, and which shards are whole
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Float64, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_trak.hashing import hash_file

MEMBER_NAME = "member.json"
KERNEL_NAME = "kernel.safetensors"
MASK_NAME = "mask.safetensors"
BANK_NAME = "bank.safetensors"
_PROGRESS = ".progress"
TEMPORARY = ".tmp"  # ends the names of files that are not whole
_ROW_GROUP_BYTES = 12 << 20


class Shard(NamedTuple):
    """Rows of one shard, in the training set's order."""

    example_id: Int64[Tensor, " rows"]
    features: Float[Tensor, "rows proj_dim"]
    out_to_loss: Float[Tensor, " rows"]
    output: Float[Tensor, " rows"]


def encode_columns(
    features: Float[Tensor, "rows proj_dim"],
    output: Float[Tensor, " rows"],
    out_to_loss: Float[Tensor, " rows"],
    *,
    dtype: str,
) -> dict[str, np.ndarray]:
    """Return the trak_* columns of some rows, given on the CPU.

    In float16, a row is divided by `trak_scale`, the power of two above its largest entry, so that no row under- or overflows
    whatever its size; float32 rows have no such column.
    """
    # Differs from the reference: MadryLab/trak stores float16 unscaled, and rows of gradients below about 0.1 become zero.
    columns = {"trak_features": features.float().numpy()}
    if dtype == "float16":
        largest = features.abs().amax(dim=1).double().clamp_min(torch.finfo(torch.float32).tiny)
        scale = torch.exp2(largest.log2().floor() + 1)
        columns["trak_features"] = (features.double() / scale.unsqueeze(1)).half().numpy()
        columns["trak_scale"] = scale.float().numpy()
    columns["trak_out_to_loss"] = out_to_loss.float().numpy()
    columns["trak_output"] = output.float().numpy()
    columns["trak_grad_norm"] = torch.linalg.vector_norm(features.double(), dim=1).float().numpy()
    return columns


def to_table(columns: Mapping[str, np.ndarray]) -> pa.Table:
    """Return an Arrow table; a matrix becomes a column of lists of fixed length."""
    arrays = {}
    for name, values in columns.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.table(arrays)


class MemberWriter:
    """Writes the shards of one member; finds on opening which are already whole.

    Args:
        folder (`Path`): The member's folder.
        identity (`dict`): Everything that decides the rows; a folder begun with another identity is refused.
        shard_rows (`int`): Rows per shard. The grid does not depend on who computes a shard, or when.
        overwrite (`bool`): Discard what the folder holds if it is another member's.

    Raises:
        ValueError: If the folder holds, or was begun as, something else; the message lists the differences.
    """

    def __init__(
        self, folder: Path, *, identity: dict[str, Any], n_rows: int, shard_rows: int, overwrite: bool = False
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
        found = self._found_identity()
        if found is not None and found != self.identity:
            if not overwrite:
                raise ValueError(
                    f"{folder} holds other features than these:\n"
                    + "\n".join(f"  {line}" for line in list_differences(found, self.identity))
                    + "\nChoose another folder, or pass overwrite=True (--overwrite) to replace them."
                )
            discard(folder)
        if self.is_finished:
            shutil.rmtree(folder / _PROGRESS, ignore_errors=True)  # killed just after `member.json` was written
        else:
            (folder / _PROGRESS).mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
            write_json(folder / _PROGRESS / "identity.json", self.identity)

    def _found_identity(self) -> dict[str, Any] | None:
        for path, key in ((self.folder / MEMBER_NAME, "identity"), (self.folder / _PROGRESS / "identity.json", None)):
            if path.exists():
                content = read_json(path)
                return content[key] if key else content
        # Killed before its identity was written, a member's folder holds an empty `.progress` and temporary files at most.
        if self.folder.exists() and any(
            path.name != _PROGRESS and not path.name.endswith(TEMPORARY) for path in self.folder.iterdir()
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

    def lacks(self, shard: int) -> bool:
        """Return whether a shard is not whole yet."""
        record, path = self.folder / _PROGRESS / f"{shard:05d}.json", self.path(shard)
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
        write_json(self.folder / _PROGRESS / f"{shard:05d}.json", record)

    def read(self, shard: int) -> Shard:
        return read_shard(self.path(shard))

    def write_bank(self, tensors: Mapping[str, Tensor]) -> None:
        """Write what examples are held against, before the first shard."""
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_atomically(self.folder / BANK_NAME, lambda temporary: save_file(whole, temporary))

    def bank(self) -> dict[str, Tensor] | None:
        """Return what [`~MemberWriter.write_bank`] wrote, if it did."""
        path = self.folder / BANK_NAME
        return load_file(path) if path.exists() else None

    def finish(
        self,
        kernel: Float64[Tensor, "proj_dim proj_dim"],
        description: dict[str, Any],
        mask: Bool[Tensor, " rows"] | None = None,
    ) -> None:
        """Write the kernel, the rows the checkpoint was trained on if not all, and, last, `member.json`."""
        files = [read_json(self.folder / _PROGRESS / f"{shard:05d}.json") for shard in range(self.n_shards)]
        for name, tensor in ((KERNEL_NAME, kernel), (MASK_NAME, mask)):
            if tensor is not None:
                files.append(self._write_tensor(name, tensor))
        if (self.folder / BANK_NAME).exists():
            files.append(_record(self.folder / BANK_NAME))
        write_json(self.folder / MEMBER_NAME, {"identity": self.identity, **description, "files": files})
        shutil.rmtree(self.folder / _PROGRESS)

    def _write_tensor(self, name: str, tensor: Tensor) -> dict[str, Any]:
        path = self.folder / name
        key = name.split(".")[0]
        write_atomically(path, lambda temporary: save_file({key: tensor.contiguous()}, temporary))
        return _record(path)


def _record(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path)}


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
            begun = (folder / _PROGRESS).exists()
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
        size = path.stat().st_size if path.exists() else None
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


def read_shard(path: Path) -> Shard:
    """Read one Parquet shard, checking the checksum of every page.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        length = table.schema.field("trak_features").type.list_size
        flat = table.column("trak_features").combine_chunks()
        features = torch.from_numpy(np.array(flat.flatten().to_numpy(zero_copy_only=False))).reshape(-1, length)
        if "trak_scale" in table.column_names:
            features = features.float() * _tensor(table, "trak_scale").unsqueeze(1)
        return Shard(_tensor(table, "example_id"), features, _tensor(table, "trak_out_to_loss"), _tensor(table, "trak_output"))
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}. Restore it from a copy, or featurize again.") from error


def _tensor(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(np.array(table.column(name).to_numpy()))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Delete it, or restore it from a copy.") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a temporary file beside `path`, flush it to disk, and give it its name.

    Raises:
        OSError: With advice, if the disk is full; the temporary file is removed and nothing else is touched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"The disk is full: {path} was not written. What was finished is kept; free some space and run again."
            raise OSError(error.errno, advice) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def discard(folder: Path) -> None:
    """Delete a folder in such a way that it is either whole or gone, even if this process is killed."""
    condemned = folder.with_name(f".{folder.name}{TEMPORARY}")
    shutil.rmtree(condemned, ignore_errors=True)
    folder.rename(condemned)
    shutil.rmtree(condemned)


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of a process that was killed while writing."""
    for temporary in (*folder.glob(".*.tmp"), *(folder / _PROGRESS).glob(".*.tmp")):
        temporary.unlink(missing_ok=True)


def list_differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Return one line per leaf in which two JSON values differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [*found, *(key for key in wanted if key not in found)]
        return [
            line
            for key in keys
            for line in list_differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if found == wanted else [f"{name}: {_short(found)} there, {_short(wanted)} here"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
