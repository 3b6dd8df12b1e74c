"""The one loader of datasets: a file, a folder, a saved dataset or a repository of the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_trak.sources.repositories import Listing, look_up_dataset, reached
from hf_trak.sources.streams import is_stream, read_stream

if TYPE_CHECKING:
    from datasets import Dataset

_KINDS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}


def load_rows(
    name_or_path: str,
    *,
    split: str,
    config: str | None = None,
    revision: str | None = None,
    max_rows: int | None = None,
    stream: bool = False,
) -> Dataset:
    """Load one split of a dataset.

    Args:
        name_or_path (`str`): A Parquet, CSV, JSON or JSON Lines file, a folder of `Dataset.save_to_disk`, another folder that
            `load_dataset` reads, or a repository of the Hub. A file is one split, whatever its name.
        max_rows (`int`, *optional*): Keep the first rows only.
        stream (`bool`): Read a file or repository row by row, and no further than `max_rows`.

    Raises:
        FileNotFoundError: If there is nothing of that name.
        ValueError: If there is no such split (the message lists those there are), or the file is of no known kind.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"The number of rows to keep must be at least 1, but is {max_rows}.")
    path = Path(name_or_path).expanduser()
    is_local = path.is_file() or (
        path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    )
    if is_local and (config is not None or revision is not None):
        given = f"configuration {config!r}" if config is not None else f"revision {revision!r}"
        raise ValueError(
            f"{path} is a file or saved dataset, which has no configuration or revision, but {given} was asked for."
        )
    is_saved = path.is_dir() and is_local
    if stream:
        if is_saved:
            raise ValueError(f"{path} is a saved dataset, which is read without a copy: leave out --stream.")
        if "[" in split:
            raise ValueError(f"A stream has whole splits, but the split is {split!r}. Use --max_rows for the first rows.")
    if path.is_file():
        dataset = _load_file(path, split, stream)
    elif is_saved:
        dataset = _load_saved(path, split)
    else:
        dataset = _load_repository(str(path) if path.is_dir() else name_or_path, config, split, revision, stream)
    if is_stream(dataset):
        return read_stream(dataset if max_rows is None else dataset.take(max_rows))
    return dataset if max_rows is None else dataset.select(range(min(max_rows, len(dataset))))


def _load_file(path: Path, split: str, stream: bool) -> Any:
    from datasets import load_dataset

    if path.suffix.lower() not in _KINDS:
        raise ValueError(f"{path} is of no known kind: its name should end in {', '.join(_KINDS)}.")
    if _KINDS[path.suffix.lower()] == "json" and _first_byte(path) not in b"{[":
        # Its reader ends the process at a file of nulls.
        raise ValueError(f"{path} cannot be read: a JSON file of rows holds a list of objects, or an object per line.")
    try:
        kind = _KINDS[path.suffix.lower()]
        return load_dataset(kind, data_files={split.split("[")[0]: str(path)}, split=split, streaming=stream)
    except Exception as error:
        said = _first_line(error.__cause__ or error)
        if "corresponds to no data" in said:
            raise ValueError(f"{path} holds no rows. Check that it was written to its end.") from error
        raise ValueError(f"{path} cannot be read: {said}") from error


def _first_byte(path: Path) -> bytes:
    """Return the first byte of a file that is no white space; `{` for an empty file, of which its reader has the better message."""
    with path.open("rb") as file:
        while chunk := file.read(1 << 16):
            if stripped := chunk.removeprefix(b"\xef\xbb\xbf").lstrip():
                return stripped[:1]
    return b"{"


def _load_saved(path: Path, split: str) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # of damaged files
        raise ValueError(
            f"{path} cannot be read as a saved dataset: {_first_line(error).rstrip('.')}. Save it again."
        ) from error
    if not isinstance(found, DatasetDict):
        return found
    if split not in found:
        raise _no_split(str(path), split, found)
    return found[split]


def _load_repository(name: str, config: str | None, split: str, revision: str | None, stream: bool) -> Any:
    from datasets import get_dataset_split_names, load_dataset

    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in _KINDS
    if looks_like_a_path and not Path(name).exists():
        raise FileNotFoundError(f"There is no file or folder {name}.")
    if Path(name).is_dir() and not any(Path(name).iterdir()):
        raise FileNotFoundError(f"The folder {name} is empty.")
    listing = None if Path(name).is_dir() else look_up_dataset(name, revision)
    try:
        # Without a connection, a cache is looked at once, and no request is repeated.
        with reached(listing or Listing(None, frozenset(), cached=not Path(name).is_dir())):
            return load_dataset(name, config, split=split, revision=revision, streaming=stream)
    except (FileNotFoundError, ConnectionError) as error:
        if Path(name).is_dir():
            raise ValueError(f"The folder {name} cannot be read as a dataset: {_first_line(error)}") from error
        said = _first_line(error)
        if listing is None:
            said = "the Hub cannot be reached, and the dataset is not in the cache. Check the network and the name"
        raise FileNotFoundError(
            f"{name!r} is neither a file or folder here nor a dataset of the Hub within reach: {said}"
        ) from error
    except ValueError as error:
        if "split" not in str(error).lower():
            raise
        raise _no_split(name, split, get_dataset_split_names(name, config, revision=revision)) from error
    except (MemoryError, ImportError, OSError):
        raise
    except Exception as error:  # of the reader of each kind of file
        raise ValueError(f"{name} cannot be read as a dataset: {_first_line(error.__cause__ or error)}") from error


def _no_split(name: str, split: str, found: Any) -> ValueError:
    return ValueError(f"{name} has no split {split!r}; it has {', '.join(map(str, found))}.")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
