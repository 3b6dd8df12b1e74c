"""What the rows of a dataset give: through a transform, the same each time, and with all faulty rows listed at once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset


_SHOWN = 10
_VARIES = re.compile(r"-?\d+(\.\d+)?|'[^']*'")


class Faults:
    """Collects what is wrong with rows, by reason.

    Args:
        n_rows (`int`): Of the dataset.
    """

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self._wrong: _Groups = {}
        self._unscored: _Groups = {}
        self._cut: list[int] = []

    def cannot_serve(self, row: int, reason: str) -> None:
        """Remember a row that cannot serve; reasons that differ in numbers and names alone are one."""
        self._wrong.setdefault(_VARIES.sub("#", reason), []).append((row, reason))

    def no_scored_token(self, row: int, reason: str) -> None:
        """Remember a row without a scored token."""
        self._unscored.setdefault(_VARIES.sub("#", reason), []).append((row, reason))

    def cut(self, row: int) -> None:
        """Remember a row of which tokens are cut off."""
        self._cut.append(row)

    def raise_for_rows(self) -> None:
        """Raise a ValueError if a row cannot serve, with every reason and its rows."""
        if self._wrong:
            count = sum(map(len, self._wrong.values()))
            raise ValueError((f"{count} of {self.n_rows} rows cannot serve. " if count > 1 else "") + f"{_list(self._wrong)}.")

    def raise_for_unscored(self, *, skip: bool) -> None:
        """Raise a ValueError if rows have no scored token, unless they are skipped and there are others."""
        count = sum(map(len, self._unscored.values()))
        if count == 0 or (skip and count < self.n_rows):
            return
        many = "them" if count > 1 else "it"
        way = (
            "No row of the dataset has a scored token, so there is nothing to attribute"
            if count == self.n_rows
            else f"Nothing was learned from {many}: filter {many} out, or set skip_unscored=True (--skip_unscored) to keep {many} in place "
            "with features and scores of zero"
        )
        start = f"{count} of {self.n_rows} rows {'have' if count > 1 else 'has'} no scored token. "
        raise ValueError(f"{start}{_list(self._unscored)}. {way}.")

    def notes(self, limit: str, *, skip: bool) -> Iterator[str]:
        """Yield a line on rows that are cut, and one on rows that are skipped."""
        if self._cut:
            yield f"{len(self._cut)} of {self.n_rows} rows are cut at {limit}, the first of them row {self._cut[0]}."
        if skip and self._unscored:
            count = sum(map(len, self._unscored.values()))
            have = "have" if count > 1 else "has"
            reasons = _list(self._unscored, "")
            yield f"{count} of {self.n_rows} rows {have} no scored token and so features and scores of zero. {reasons}."


_Groups = dict[str, list[tuple[int, str]]]


def _list(groups: _Groups, verdict: str = " cannot serve") -> str:
    """Return the rows of each reason, with the reason of the first."""
    return ". ".join(
        f"{_rows([row for row, _ in group])}{verdict}: {group[0][1]}"
        + (f" (row {group[0][0]}; {len(group)} rows in all)" if len(group) > 1 else "")
        for group in groups.values()
    )


def _rows(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return f"{'Row' if len(numbers) == 1 else 'Rows'} {shown}{', …' if len(numbers) > _SHOWN else ''}"


_ROWS_READ_AGAIN = 16
_MORE_ROWS_READ_AGAIN, _SECONDS_FOR_MORE = 512, 1.0


def name_rows(rows: Sequence[int] | np.ndarray) -> str:
    """Return `row 3` or `rows 3, 8, ...`: the first few of some rows."""
    some = ", ".join(map(str, list(rows[:_SHOWN])))
    return f"row{'s' * (len(rows) > 1)} {some}{', ...' if len(rows) > _SHOWN else ''}"


def check_is_dataset(dataset: Any, name: str) -> None:
    """Check that rows are given as what has a number for each of them.

    Args:
        name (`str`): Of the argument, for the message.

    Raises:
        ValueError: With how to make a `datasets.Dataset` of what was given.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name} must be a `datasets.Dataset`, whose rows have numbers to be attributed to, but is {describe_kind(dataset)}. "
            f"{how_to_make(dataset)}"
        )


def describe_kind(dataset: Any) -> str:
    """Return what was given in place of a dataset, with an article."""
    from datasets import IterableDataset

    if isinstance(dataset, Mapping):
        return f"a {type(dataset).__name__} of {', '.join(map(str, list(dataset)[:5]))}"
    streaming = isinstance(dataset, (IterableDataset, torch.utils.data.IterableDataset))
    article = "an" if type(dataset).__name__[:1] in "AEIOU" else "a"
    return "None" if dataset is None else f"{article} {type(dataset).__name__}{', which is streaming' * streaming}"


def how_to_make(dataset: Any) -> str:
    """Return how a `datasets.Dataset` is made of what was given."""
    from datasets import Dataset, IterableDataset

    name, module = type(dataset).__name__, type(dataset).__module__.partition(".")[0]
    if dataset is None:
        return "Give the rows."
    if isinstance(dataset, (IterableDataset, torch.utils.data.IterableDataset)):
        return "Load it without `streaming=True`, or keep what you need of it: `Dataset.from_list(list(stream.take(n)))`."
    if isinstance(dataset, Mapping) and all(isinstance(one, Dataset) for one in dataset.values()):
        return f"Give one of its splits, such as `dataset[{next(iter(dataset), 'train')!r}]`."
    if isinstance(dataset, Mapping):
        return "Make one of columns with `Dataset.from_dict(columns)`."
    if isinstance(dataset, (list, tuple)):
        return "Make one of rows that are dictionaries with `Dataset.from_list(rows)`."
    if name in ("DataFrame", "LazyFrame"):
        return f"Make one with `Dataset.from_{'polars' if module == 'polars' else 'pandas'}(frame)`."
    if isinstance(dataset, str):
        return "Load it with `load_dataset(...)`."
    if isinstance(dataset, torch.utils.data.Dataset):
        return "Make one of its rows, as dictionaries, with `Dataset.from_list([...])` or `Dataset.from_generator(...)`."
    return "Make one with `Dataset.from_list`, `Dataset.from_dict` or `load_dataset`."


def is_transformed(dataset: Dataset) -> bool:
    """Return whether rows pass through a function when they are read: `with_transform` or `set_transform`."""
    return dataset.format["type"] == "custom"


def as_stored(dataset: Dataset) -> Dataset:
    """Return a dataset whose rows are Python objects: without the format of `with_format`, but with a transform, which makes the rows.

    Of a format that shows some columns alone, the others are dropped.
    """
    if dataset.format["type"] in (None, "custom"):
        return dataset
    shown = set(dataset.format["columns"])
    plain = dataset.with_format(None)
    columns = [name for name in plain.column_names if name in shown]
    return plain if columns == plain.column_names else plain.select_columns(columns)


def with_column(dataset: Dataset, name: str, values: Sequence[Any]) -> Dataset:
    """Return a dataset with a column in place of any of that name; of a dataset with a transform, its rows with the column beside."""
    stored = dataset.with_format(None)
    added = stored.remove_columns([name] if name in stored.column_names else []).add_column(name, list(values))
    if not is_transformed(dataset):
        return added
    transform = dataset.format["format_kwargs"]["transform"]
    shown = list(dataset.format["columns"])

    def read(rows: Mapping[str, Any]) -> dict[str, Any]:
        return {**transform({column: rows[column] for column in shown if column in rows}), name: rows[name]}

    result: Dataset = added.with_transform(read)
    return result


def features_of(dataset: Dataset) -> dict[str, Any]:
    """Return the type of each column that rows really have.

    Of a dataset with a transform, that is told by its first row: a column keeps its declared type where the transform leaves its first
    value as it is, and has the type of the value otherwise.
    """
    if not is_transformed(dataset) or len(dataset) == 0:
        return dict(dataset.features)
    from datasets import Image, List, Value

    first = dataset[[0]]
    stored = dataset.with_format(None)[0]
    found: dict[str, Any] = {}
    for name, values in first.items():
        value = values[0]
        if name in dataset.features and name in stored and _same(value, stored[name]):
            found[name] = dataset.features[name]
        elif hasattr(value, "convert"):
            found[name] = Image()
        elif isinstance(value, str):
            found[name] = Value("string")
        elif isinstance(value, (list, tuple, np.ndarray, Tensor)) and np.ndim(value) > 0:
            found[name] = List(Value("string" if len(value) and isinstance(value[0], str) else "float64"))
        else:
            found[name] = Value("int64" if isinstance(value, (int, np.integer)) else "float64")
    return found


def column_names(dataset: Dataset) -> list[str]:
    """Return the names of the columns that rows really have."""
    return list(features_of(dataset))


def values_of(dataset: Dataset, column: str) -> list[Any]:
    """Return all values of a column as rows give them. With a transform, every row passes through it."""
    return list(dataset[:][column]) if is_transformed(dataset) else dataset.select_columns([column])[:][column]


def missing_rows(dataset: Dataset, column: str) -> np.ndarray:
    """Return the rows of a stored column that hold nothing."""
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return np.flatnonzero(table[column].is_null().to_numpy(zero_copy_only=False))


def check_repeatable(dataset: Dataset, collate: Callable[[Mapping[str, Sequence[Any]]], Mapping[str, Any]]) -> None:
    """Read some rows several times, in different company, and check that each gives the same batch.

    A feature is the gradient of one fixed input. Rows that a random transform draws anew have none: two builds of an index would differ,
    and so would a row and its query. Sixteen rows are read four times, so that a flip of one image in ten is missed once in a thousand:
    together, backwards, one by one, and by halves, so that what depends on the rows of a batch shows too. For a second at most, up to 512
    other rows are then read twice, so that a change of two rows in a hundred is missed once in ten thousand where reading is fast.

    Args:
        collate (`Callable`): Columns of rows to a batch.

    Raises:
        ValueError: Naming the rows and what of them changed.
    """
    chosen = sorted(set(np.linspace(0, len(dataset) - 1, min(_ROWS_READ_AGAIN, len(dataset))).astype(int).tolist()))
    first: dict[int, Mapping[str, Any]] = {}
    changed: dict[int, str] = {}

    def read(order: list[int]) -> None:
        rows = dataset[order]
        for place, row in enumerate(order):
            batch = collate({name: values[place : place + 1] for name, values in rows.items()})
            name = _first_difference(first.setdefault(row, batch), batch)
            if name is not None:
                changed.setdefault(row, name)

    half = (len(chosen) + 1) // 2
    for order in (chosen, chosen[::-1], *([row] for row in chosen), chosen[:half], chosen[half:]):
        if order:
            read(order)
    others = np.setdiff1d(np.arange(len(dataset)), chosen)
    others = np.random.default_rng(0).permutation(others)[:_MORE_ROWS_READ_AGAIN]
    started, n_read = time.perf_counter(), len(chosen)
    for begin in range(0, len(others), _ROWS_READ_AGAIN):
        if changed or time.perf_counter() - started > _SECONDS_FOR_MORE:
            break
        some = others[begin : begin + _ROWS_READ_AGAIN].tolist()
        read(some)
        read(some[::-1])
        n_read += len(some)
        for row in some:
            del first[row]
    if changed:
        row, name = min(changed.items())
        raise ValueError(
            f"Rows of this dataset are not the same twice: of {n_read} rows that were read again, {len(changed)} changed, such as row {row} "
            f"in {name!r}. A random transform (augmentation, masking), or one that depends on the rows read with it "
            "(padding without an 'attention_mask'), makes a new input at each reading, and features of it mean nothing. Give the dataset "
            "without it: `dataset.with_transform(evaluation_transform)`, `dataset.with_format(None)`, or draw once and keep the result with "
            "`dataset.map`. An AttributionTrainer trains on random rows where it is given the others as `attribution_dataset`."
        )


def _first_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    for name in {**first, **second}:
        if name not in first or name not in second or not _same(first[name], second[name], tolerance=1e-3):
            return name
    return None


def _same(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Return whether two values are equal; floating ones up to a share of the greatest, the round-off of a batched transform."""
    if isinstance(one, (Tensor, np.ndarray)) or isinstance(other, (Tensor, np.ndarray)):
        a, b = torch.as_tensor(one), torch.as_tensor(other)
        if a.shape != b.shape:
            return False
        if not (a.is_floating_point() or b.is_floating_point()):
            return bool(torch.equal(a, b))
        a, b = a.double(), b.double()
        return bool(
            torch.allclose(a, b, rtol=0.0, atol=tolerance * max(1e-6, float(a.abs().nan_to_num().max())), equal_nan=True)
        )
    if type(one) is not type(other):
        return False
    if hasattr(one, "convert"):
        return one.mode == other.mode and one.size == other.size and one.tobytes() == other.tobytes()
    return bool(one == other)
