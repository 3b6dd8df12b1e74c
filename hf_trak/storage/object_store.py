"""Object stores (such as S3, through fsspec): paths with the operations that an index needs.

An object store has complete objects with fixed names. There is no renaming, no appending and no folders. So a file is written on the
local disk and then uploaded. A folder is a common prefix of names.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# For type checkers, an ObjectPath is a Path: code that only joins, lists and reads works with both.
if TYPE_CHECKING:
    _Base = Path
else:
    _Base = object

_HOW = "Featurize to a folder, on any disk or mount, and copy the finished index there with `index.save_pretrained` or other tools."
_REFUSED = {
    (
        "hf",
    ): "An index goes to the Hub with `index.push_to_hub(repo_id)` or `hf-trak push`, in one commit; featurize to a folder first.",
    ("http", "https"): f"Nothing can be written there. {_HOW}",
    ("ftp", "sftp", "ssh", "smb", "hdfs", "webhdfs", "arrow_hdfs"): (
        f"A file there is seen while it is half written, so that a killed run could leave one under its name. {_HOW}"
    ),
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True)
class ObjectPath(_Base):
    """An object, or a common prefix of several objects, on a store that fsspec supports.

    Credentials and endpoints come from the configuration of fsspec and of the store's own client: environment variables and files.

    Args:
        url (`str`): A URL such as `s3://bucket/my-index`.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: Any) -> ObjectPath:
        return ObjectPath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.url.rsplit("/", 1)[0])

    def exists(self) -> bool:
        return self._kind() is not None

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def iterdir(self) -> Generator[ObjectPath, None, None]:
        yield from [self / name for name in self.sizes()]

    def read_bytes(self) -> bytes:
        with self._store() as (store, key):
            return store.cat_file(key)

    def read_text(self, encoding: str | None = "utf-8", errors: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def unlink(self, missing_ok: bool = False) -> None:
        with self._store() as (store, key):
            try:
                store.rm_file(key)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    # Methods that pathlib does not have

    def sizes(self) -> dict[str, int]:
        """Return the names directly below this one with the size of each object; 0 for a prefix of others."""
        with self._store() as (store, key):
            try:
                found = store.ls(key, detail=True)
            except FileNotFoundError:
                return {}
            # Some tools store an empty object with the name of the folder.
            names = {entry["name"].rstrip("/"): entry["size"] or 0 for entry in found}
            return {name.rsplit("/", 1)[-1]: size for name, size in sorted(names.items()) if not name.endswith(key.strip("/"))}

    def size(self) -> int | None:
        """Return the size of the object in bytes; None if there is no object."""
        with self._store() as (store, key):
            try:
                found = store.info(key)
            except FileNotFoundError:
                return None
            return found["size"] if found["type"] == "file" else None

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """Return the content of small objects below this one. They are fetched in parallel if the store supports it; missing ones are left out."""
        with self._store() as (store, key):
            keys = {f"{key}/{name}": name for name in names}
            found = store.cat(list(keys), on_error="return") if keys else {}
            for content in found.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
            return {keys[key]: content for key, content in found.items() if isinstance(content, bytes)}

    def put(self, write: Callable[[Path], Any]) -> None:
        """Let `write` fill a file on the local disk and upload it. An existing object is replaced."""
        with _local_file(self.name) as file:
            write(file)
            with self._store(writing=True) as (store, key):
                store.put_file(str(file), key)

    def put_once(self, write: Callable[[Path], Any]) -> bool:
        """Upload a small file as [`~ObjectPath.put`] does, unless the object exists. Return whether it was uploaded.

        If several processes call this at once, one succeeds, provided that the store has conditional writes (S3, MinIO, R2, GCS and
        Azure do). On a store that ignores the condition, the last write wins.
        """
        if self.exists():
            return False
        with _local_file(self.name) as file:
            write(file)
            content = file.read_bytes()
        with self._store(writing=True) as (store, key):
            try:
                store.pipe_file(key, content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno != errno.ENOSYS:
                    raise
                store.pipe_file(key, content)  # a store that rejects conditional writes
        return True

    def get(self, file: Path) -> None:
        """Copy the object to a local file."""
        with self._store() as (store, key):
            store.get_file(key, str(file))

    def move_to(self, target: Path) -> None:
        """Rename the object in the same store, and replace an existing one. If the process is killed, both names may exist."""
        with self._store(writing=True) as (store, key):
            try:
                store.cp_file(key, store._strip_protocol(str(target)))
            except FileNotFoundError:
                if not target.is_file():  # unless another process moved it
                    raise
                return
            store.rm_file(key)

    def _kind(self) -> str | None:
        with self._store() as (store, key):
            try:
                return store.info(key)["type"]
            except FileNotFoundError:
                return None

    @contextmanager
    def _store(self, *, writing: bool = False) -> Iterator[tuple[Any, str]]:
        """Yield the file system and the name in it. Errors of the store are raised with advice.

        Raises:
            ImportError: If the package for this store is missing.
            PermissionError: If the store denies access.
            ConnectionError: If it cannot be reached.
            FileNotFoundError: If there is no such object, or no such bucket when writing.
        """
        from fsspec.core import url_to_fs

        try:
            # Listings are not cached, because other processes write too.
            opened = url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise ImportError(_what_to_install(self.url, error)) from error
        except Exception as error:
            raise _advise(self.url, error) from error
        try:
            yield opened
        except (FileExistsError, MemoryError):
            raise
        except FileNotFoundError as error:
            if not writing:
                raise
            raise FileNotFoundError(
                f"{self.url} was not written: {_reason(error)} Make the bucket first, or check its name."
            ) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSYS, *_NO_ROOM):  # the caller handles a missing object
                raise
            raise _advise(self.url, error) from error


def place(folder: str | Path) -> Path:
    """Return the location of an index: a local path, or an [`ObjectPath`] for the URL of an object store.

    Raises:
        ValueError: If the URL's file system cannot write atomically, or if the URL was given as a `Path`.
    """
    if isinstance(folder, ObjectPath):
        return folder
    if not isinstance(folder, str):
        if found := re.match(r"([a-z0-9]{2,}):/", str(folder)):
            raise ValueError(f"A Path drops a slash of a URL: give it as a string, '{found[1]}://...', in place of {folder!r}.")
        return folder
    protocol, separator, rest = folder.partition("://")
    if not separator:
        return Path(folder)
    if protocol in ("file", "local"):
        return Path(rest)
    for protocols, why in _REFUSED.items():
        if protocol in protocols:
            raise ValueError(f"An index cannot be kept at {folder}. {why}")
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", protocol) or not rest.strip("/"):
        raise ValueError(f"{folder!r} is not a URL on an object store, such as s3://bucket/my-index.")
    return ObjectPath(folder.rstrip("/"))


def seen_from(folder: Path, path: Path) -> str:
    """Return a local path relative to an index; for an index on an object store, the absolute path on this machine."""
    return os.path.abspath(path) if isinstance(folder, ObjectPath) else os.path.relpath(path, folder)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yield a local file with the content of `path`: the file itself, or a temporary copy."""
    if not isinstance(path, ObjectPath):
        yield path
        return
    with _local_file(path.name) as file:
        path.get(file)
        yield file


@contextmanager
def _local_file(name: str) -> Iterator[Path]:
    """Yield the name of an empty temporary file.

    Raises:
        OSError: With advice, if the local disk is full.
    """
    with tempfile.TemporaryDirectory(prefix="hf_trak-", ignore_cleanup_errors=True) as folder:
        try:
            yield Path(folder) / name
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            raise OSError(
                error.errno,
                f"There is not enough disk space for {name} in {folder}, which holds it during the transfer: {os.strerror(error.errno)}. "
                "Free some space or set TMPDIR to another disk, and run again.",
            ) from error


def _advise(url: str, error: Exception) -> OSError:
    """Return the error to raise instead of one from a store's client. Each client has its own error types."""
    kind = f"{type(error).__name__} {type(error.__cause__).__name__}"
    if isinstance(error, PermissionError) or re.search("Credential|Token|Auth|Forbidden|AccessDenied", kind):
        return PermissionError(
            f"The store denies access to {url}: {_reason(error)} Set credentials with access, as for the store's own tools (for S3: "
            "`aws configure`, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY). What was finished is kept; run again."
        )
    return ConnectionError(
        f"{url} cannot be reached: {_reason(error)} What was finished is kept. Check the network and the endpoint (for S3-compatible "
        "stores: AWS_ENDPOINT_URL), and run again."
    )


def _what_to_install(url: str, error: Exception) -> str:
    protocol = url.partition("://")[0]
    known = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
    package = f"pip install {known[protocol]}" if protocol in known else "install the package that serves it"
    return f"fsspec cannot open {url}: {_reason(error)} To read and write there, {package}."


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".") + "."
