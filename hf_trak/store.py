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
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Float64, Int64
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_trak.hashing import hash_file
from hf_trak.object_store import ObjectPath

MEMBER_NAME = "member.json"
KERNEL_NAME = "kernel.safetensors"
MASK_NAME = "mask.safetensors"
BANK_NAME = "bank.safetensors"
PROGRESS = ".progress"
IDENTITY_NAME = "identity.json"  # in `.progress`: what the member will be of
TEMPORARY = ".tmp"  # ends the names of files that are not whole


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
    return _parse_json(path, path.read_text())


def _parse_json(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. Delete it, or restore it from a copy.") from error


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def write_json_once(path: Path, value: dict[str, Any]) -> bool:
    """Write a JSON file as [`write_once`] does, and return whether it was written here."""
    return write_once(path, lambda temporary: temporary.write_text(json.dumps(value, indent=2) + "\n"))


def read_jsons(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read the JSON files in a folder that are there, of these names.

    Raises:
        ValueError: If one is damaged.
    """
    if not isinstance(folder, ObjectPath):
        return {name: read_json(folder / name) for name in names if (folder / name).exists()}
    found = folder.read_all(names)
    return {name: _parse_json(folder / name, found[name]) for name in names if name in found}


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file in a folder; of none if it is not there."""
    if isinstance(folder, ObjectPath):
        return folder.sizes()
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}
    return {}


def file_size(path: Path) -> int | None:
    """Return the bytes of a file; None if there is none."""
    if isinstance(path, ObjectPath):
        return path.size()
    return path.stat().st_size if path.exists() else None


def write_folder(path: Path) -> None:
    """Make a folder and those above it, unless it is there; an object store has none.

    Raises:
        OSError: With advice, as [`write_atomically`] has it.
    """
    if isinstance(path, ObjectPath):
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        advice = _advice(error, path)
        if advice is None:
            raise
        raise OSError(error.errno, advice) from error


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have `write` fill a temporary file beside `path`, flush it to disk, and give it its name; or put it there in one go.

    Raises:
        OSError: With advice, if the disk is full, the folder read-only or gone; the temporary file is removed and nothing else is
            touched.
    """
    if isinstance(path, ObjectPath):
        path.put(write)
    else:
        _write(path, write, os.replace)


def write_once(path: Path, write: Callable[[Path], Any]) -> bool:
    """Write a file as [`write_atomically`] does, unless there is one; of several processes at once, one succeeds.

    Returns:
        `bool`: Whether it was written here.
    """
    if isinstance(path, ObjectPath):
        return path.put_once(write)
    try:
        _write(path, write, _link)
    except FileExistsError:
        return False
    return True


def _write(path: Path, write: Callable[[Path], Any], name: Callable[[Path, Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{_host()}.{os.getpid()}{TEMPORARY}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        name(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except FileExistsError:
        raise
    except OSError as error:
        advice = _advice(error, path)
        if advice is None:
            raise
        raise OSError(error.errno, advice) from error
    finally:
        with suppress(OSError):  # what is wrong has been said above
            temporary.unlink(missing_ok=True)


def _host() -> str:
    """Return this machine's name, part of those of temporary files: processes of several machines may share a folder."""
    return socket.gethostname().replace(".", "-")


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name, unless the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV):
            raise
        # A file system without hard links: between these two lines another process may write the same.
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(temporary, path)


_ADVICE = {
    (
        errno.ENOSPC,
        errno.EDQUOT,
    ): "The disk is full: {path} was not written. What was finished is kept; free some space and run again.",
    (
        errno.EFBIG,
    ): "{path} is larger than this system lets a file be (`ulimit -f`), and was not written. What was finished is kept; "
    "raise the limit, or take a smaller shard_rows.",
    (errno.EROFS, errno.EACCES, errno.EPERM): "{path} may not be written: {reason}. What was finished is kept; make {folder} "
    "writable, or copy it to where you may write, and run again.",
    (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ENODEV,
        errno.EIO,
    ): "{path} was not written: {folder} is gone or out "
    "of reach ({reason}). Was it deleted, or has its mount vanished? What was finished is kept there; bring it back and run again.",
}


def _advice(error: OSError, path: Path) -> str | None:
    if error.errno == errno.ENOENT and path.parent.is_dir():
        return None  # it is something else that is not there
    for codes, text in _ADVICE.items():
        if error.errno in codes:
            return text.format(path=path, folder=path.parent, reason=os.strerror(error.errno))
    return None


def discard(folder: Path) -> None:
    """Delete a member in such a way that it is never taken for whole when it is not, even if this process is killed."""
    if isinstance(folder, ObjectPath):
        _discard_objects(folder)
        return
    condemned = folder.with_name(f".{folder.name}{TEMPORARY}")
    shutil.rmtree(condemned, ignore_errors=True)
    folder.rename(condemned)
    shutil.rmtree(condemned)


def _discard_objects(folder: ObjectPath) -> None:
    """Make a member an unfinished one of the same identity first, which lacks one shard after another, and then none."""
    identity = folder / PROGRESS / IDENTITY_NAME
    if (folder / MEMBER_NAME).exists():
        write_json(identity, read_json(folder / MEMBER_NAME)["identity"])
        (folder / MEMBER_NAME).unlink()
    folder.remove_below(but=identity)
    identity.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder of which nothing is needed any more, if it is there; killed meanwhile, some of it may be left."""
    if isinstance(folder, ObjectPath):
        folder.remove_below()
    elif folder.exists():
        shutil.rmtree(folder)


def remove_leftovers(folder: Path, *, shared: bool) -> None:
    """Remove temporary files of processes that were killed while writing.

    Args:
        shared (`bool`): Other processes may be writing here: what may be theirs is left alone.
    """
    if isinstance(folder, ObjectPath):
        return  # what is not whole has no name there
    for temporary in folder.glob(f".*{TEMPORARY}"):
        _, host, process, _ = ("", "", "", *temporary.name.rsplit(".", 3))[-4:]
        is_written = is_running(int(process)) if host == _host() and process.isdecimal() else shared
        if temporary.is_file() and not is_written:
            temporary.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Return whether a process of this machine, not this one, is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


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
