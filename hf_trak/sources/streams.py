"""Streaming datasets as rows with numbers: read once, in bounded memory, to a file that lasts as long as the process."""

from __future__ import annotations

import atexit
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

_PREFIX = "hf_trak-stream-"
_NAME = re.compile(re.escape(_PREFIX) + r"(\d+)-")
_AT_ONCE = 1000


def is_stream(dataset: Any) -> bool:
    """Return whether a dataset is a streaming one of datasets."""
    from datasets import IterableDataset

    return isinstance(dataset, IterableDataset)


def read_stream(dataset: Any, n_rows: int | None = None) -> Any:
    """Return a streaming dataset as a `Dataset`, whose rows are numbered as they come; anything else as it is.

    The rows lie in a file in the cache of datasets, which is removed when the process ends: of images and texts, about what they take as
    files. A build that goes on after it was stopped reads the stream again, and compares what it gives.

    Args:
        n_rows (`int`, *optional*): How many rows to read; by default, all until the stream ends.

    Raises:
        ValueError: If `n_rows` is given for a dataset that is no stream, or the stream has fewer rows, or none; or if a row has other
            columns or types than the rows before.
        OSError: If the disk has no room.
    """
    if not is_stream(dataset):
        if n_rows is not None:
            raise ValueError(
                "`n_rows` is for streaming datasets. Of others, give the first rows: `dataset.select(range(n_rows))`."
            )
        return dataset
    if n_rows is not None and (isinstance(n_rows, bool) or not isinstance(n_rows, int) or n_rows < 1):
        raise ValueError(f"`n_rows` must be a whole number of at least 1, but is {n_rows!r}.")
    folder = _make_folder()
    try:
        return _store(dataset, folder / "rows.arrow", n_rows)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                errno.ENOSPC,
                f"The disk of {folder.parent} has no room for the rows of the stream. Read fewer with `n_rows` (--max_rows), or set HF_DATASETS_CACHE "
                "to a folder on another disk",
            ) from error
        raise


def _store(stream: Any, path: Path, n_rows: int | None) -> Dataset:
    from datasets import Dataset, NamedSplit
    from datasets.arrow_writer import ArrowWriter

    count = 0
    features = stream.features
    # Without declared features, they are those of the first rows, as `Dataset.from_generator` has it.
    with ArrowWriter(path=str(path), features=features, writer_batch_size=_AT_ONCE, update_features=False) as writer:
        names: set[str] | None = None if features is None else set(features)
        for row in islice(_rows(stream, n_rows), n_rows):
            names = set(row) if names is None else names
            if set(row) != names:
                raise ValueError(
                    f"Row {count} of the stream has the columns {', '.join(row)}, but the rows before it {', '.join(sorted(names))}. Bring them to the "
                    "same with `stream.map`, or select some with `stream.select_columns`."
                )
            try:
                writer.write(row if features is None else features.encode_example(row))
            except (TypeError, ValueError, ArithmeticError) as error:
                raise _mixed(count, error) from error
            count += 1
        if n_rows is not None and count < n_rows:
            raise ValueError(
                f"n_rows={n_rows} were to be read, but the stream ends after {count}. Leave `n_rows` out to read them all."
            )
        if count == 0:
            raise ValueError("The stream has no rows: there is nothing to featurize.")
        try:
            writer.finalize()
        except (TypeError, ValueError, ArithmeticError) as error:
            raise _mixed(count - 1, error) from error
    split = stream.split
    result: Dataset = Dataset.from_file(
        str(path), info=stream.info.copy(), split=None if split is None else NamedSplit(str(split))
    )
    mixed = [name for name, kind in result.features.items() if features is None and type(kind).__name__ == "Json"]
    if mixed:  # what datasets makes of values of several types
        raise _mixed(count - 1, TypeError(f"the column {mixed[0]!r} has values of several types"))
    return result


def _rows(stream: Any, n_rows: int | None) -> Iterator[dict[str, Any]]:
    """Yield rows as Python objects; images and sound are not decoded."""
    plain = stream.with_format(None)
    plain = plain if stream.features is None else plain.decode(False)
    yield from plain if n_rows is None else plain.take(n_rows)


def _mixed(row: int, error: Exception) -> ValueError:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"One of the rows up to row {row} of the stream has other types than the rows before it: {said}. State the types with "
        "`stream.cast(features)`."
    )


def _make_folder() -> Path:
    """Return a new folder in the cache of datasets, removed when this process ends; those of processes that were killed are removed now."""
    from datasets import config

    root = Path(config.HF_DATASETS_CACHE)
    root.mkdir(parents=True, exist_ok=True)
    for path in root.glob(f"{_PREFIX}*"):
        found = _NAME.match(path.name)
        if found is not None and not _is_alive(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # a forked process leaves it to its parent
        with suppress(OSError):
            shutil.rmtree(folder)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True
