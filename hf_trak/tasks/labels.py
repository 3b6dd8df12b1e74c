"""Labels of rows as the model numbers them: class names compared, strings looked up, and what is missing named by its row."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_trak.tasks.rows import name_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_SHOWN = 10
_BESIDE = ("{}_text", "{}_name", "{}_str", "label_text", "label_name")
_WAYS_OUT = (
    'label_mapping="by_name" (--label_mapping by_name) translates the dataset\'s numbers by these names, label_mapping="by_id" '
    "(--label_mapping by_id) takes the numbers as they are"
)


@dataclass(frozen=True)
class Labels:
    """How the values of a label column become a model's labels.

    Args:
        task (`str`): The task's name, for messages.
        n_classes (`int`, *optional*): None for numbers to predict.
        several (`bool`): Whether a row has a list of `n_classes` zeros and ones.
        label2id (`tuple`): The model's names of its classes, with their ids; empty where it has none but `LABEL_0` and the like.
        mapping (`str`): "auto": the numbers of a dataset are ids of the model, whose names must not contradict the dataset's. "by_id":
            the names are not compared. "by_name": the numbers are translated by the names.
        translation (`tuple[int, ...]`, *optional*): The model's id of each class of the dataset, once [`Labels.of`] has found it.
    """

    task: str
    n_classes: int | None
    several: bool = False
    label2id: tuple[tuple[str, int], ...] = ()
    mapping: str = "auto"
    translation: tuple[int, ...] | None = None

    def of(self, kind: Any, column: str) -> Labels:
        """Return these labels for a dataset whose label column has a type; [`datasets.ClassLabel`] has names.

        Raises:
            ValueError: If the names contradict the model's, or there are more or fewer classes.
        """
        names = getattr(kind, "names", None)
        if self.n_classes is None or self.several:
            return self
        if not names or not is_informative(names):
            return self._of_numbers(names, kind, column)
        if self.mapping == "by_id":
            return self
        own = dict(self.label2id)
        if not own or not is_informative(own):
            if self.mapping == "by_name":
                raise ValueError(
                    f'label_mapping="by_name" needs a model with names of its classes, but it has none but {_listed(list(self._own_names()))}. '
                    f"Set `model.config.id2label` and `label2id`, or leave it out. The dataset's names in {column!r} are {_listed(names)}."
                )
            if len(names) != self.n_classes:
                raise self._wrong_count(names, column)
            return self
        found = match_names(names, own)
        if self.mapping == "by_name":
            if found is None:
                raise ValueError(f'label_mapping="by_name" cannot match the names: {self._both(names, column)}.')
            return replace(self, translation=found)
        if found is None:
            raise ValueError(
                f"The label names of dataset and model differ: {self._both(names, column)}. If they mean the same classes in the same order, "
                'set label_mapping="by_id" (--label_mapping by_id). Otherwise the model was trained on other labels: give its own dataset, '
                "or `dataset.cast_column` the column to a `ClassLabel` with the model's names."
            )
        if found != tuple(range(len(names))):
            raise self._another_order(names, found, column)
        return self

    def of_dataset(self, dataset: Dataset, kind: Any, column: str) -> Labels:
        """Return these labels for a dataset, whose names may stand in a column beside the numbers, such as `label_text`."""
        if getattr(kind, "names", None) or self.n_classes is None or self.several or self.mapping == "by_id":
            return self.of(kind, column)
        names = find_names_beside(dataset, column)
        if names is None or len(names) != self.n_classes or not is_informative(names):
            return self.of(kind, column)
        if match_names(names, self._own_names()) is None:  # another wording says nothing for sure
            return self.of(kind, column)
        return self.of(SimpleNamespace(names=names), column)

    def _of_numbers(self, names: Sequence[str] | None, kind: Any, column: str) -> Labels:
        """Return these labels for a dataset whose names, if any, are numbers or `LABEL_0` and the like: a number may name another class."""
        found = None if not names else match_numbers(names, self._own_names())
        if self.mapping == "by_name":
            if found is None and not _is_string(kind):
                raise ValueError(
                    f'label_mapping="by_name" needs a label column with names (a `ClassLabel` or strings), but {column!r} holds {kind}. Leave '
                    "it out, or `dataset.cast_column` the column to a `ClassLabel` with the names the dataset was made with."
                )
            return self if found is None else replace(self, translation=found)
        if names and self.mapping == "auto":
            if found is not None and found != tuple(range(len(names))):
                raise self._another_order(names, found, column)
            if len(names) != self.n_classes:
                raise self._wrong_count(names, column)
        return self

    def _own_names(self) -> dict[str, int]:
        """Return the model's names of its classes, those that transformers makes up included."""
        return dict(self.label2id) or {f"LABEL_{id}": id for id in range(self.n_classes or 0)}

    def _another_order(self, names: Sequence[str], found: Sequence[int], column: str) -> ValueError:
        mend = ", ".join(f"{number} ({name!r}) -> {id}" for number, (name, id) in enumerate(zip(names, found, strict=True)))
        return ValueError(
            f"The label names of dataset and model are in another order: {self._both(names, column)}. The mapping from the dataset's "
            f"numbers to the model's would be {mend}. {_WAYS_OUT}."
        )

    def _both(self, names: Sequence[str], column: str) -> str:
        mine = ", ".join(f"{id}: {name!r}" for name, id in sorted(self._own_names().items(), key=lambda pair: pair[1]))
        theirs = ", ".join(f"{number}: {name!r}" for number, name in enumerate(names))
        return f"the dataset's {column!r} has {{{theirs}}}, the model's label2id {{{mine}}}"

    def _wrong_count(self, names: Sequence[str], column: str) -> ValueError:
        return ValueError(
            f"The dataset's {column!r} has {len(names)} classes ({_listed(names)}), but the model has {self.n_classes}. Give the dataset that "
            'the model was trained on, or, if its numbers are the model\'s ids all the same, set label_mapping="by_id" (--label_mapping by_id).'
        )

    def read(self, values: Sequence[Any], *, first: int = 0) -> Tensor:
        """Return labels as a tensor: int64 class ids, float32 numbers, or a float32 row of zeros and ones for each example.

        Args:
            first (`int`): The row of the first value, for messages.

        Raises:
            ValueError: Naming the rows whose label is missing or cannot be one.
        """
        if len(values) == 0:
            return torch.zeros(0, dtype=torch.int64)
        plain = [value.item() if hasattr(value, "item") and np.ndim(value) == 0 else value for value in values]
        empty = [
            first + row for row, value in enumerate(plain) if value is None or (isinstance(value, float) and value != value)
        ]
        if empty:
            raise ValueError(
                f"{len(empty)} of {len(plain)} rows have no label (None or NaN): {name_rows(empty)}. Filter these rows, or label them."
            )
        if self.several:
            return self._read_several(plain, first)
        if any(isinstance(value, str) for value in plain):
            return self._look_up(plain, first)
        try:
            labels = np.asarray(plain)
        except ValueError:  # ragged
            labels = np.empty((len(plain), 0), dtype=object)
        if labels.ndim != 1 or labels.dtype == object:
            raise self._wrong_kind(plain[0])
        return torch.from_numpy(self._numbers(labels, first) if self.n_classes is None else self._classes(labels, first))

    def _wrong_kind(self, value: Any) -> ValueError:
        needs = "one number" if self.n_classes is None else "one class index"
        way_out = (
            "" if self.n_classes is None
            else " For numbers to predict, use a model with num_labels=1; for several labels per example, one with "
            'problem_type="multi_label_classification".'
        )  # fmt: skip
        return ValueError(f"{self.task} needs {needs} per example, but the first label is {value!r}.{way_out}")

    def _numbers(self, labels: np.ndarray, first: int) -> np.ndarray:
        numbers = labels.astype(np.float32)
        wrong = np.flatnonzero(~np.isfinite(numbers))
        if len(wrong):
            raise ValueError(
                f"{len(wrong)} of {len(labels)} labels are not finite: {name_rows(wrong + first)}. Filter these rows."
            )
        return numbers

    def _classes(self, labels: np.ndarray, first: int) -> np.ndarray:
        assert self.n_classes is not None
        if np.issubdtype(labels.dtype, np.floating):
            broken = np.flatnonzero(labels != np.floor(labels))
            if len(broken):
                raise ValueError(
                    f"{self.task} needs one class index per example, but {len(broken)} of {len(labels)} labels are not whole: "
                    f"{labels[broken[0]]} in {name_rows(broken + first)}. For numbers to predict, use a model with num_labels=1."
                )
        if self.mapping == "by_name" and self.translation is None:
            raise ValueError(
                'label_mapping="by_name" translates numbers by the names of a dataset, and this task has not seen the dataset. Call '
                "`featurizer.read_from(dataset)` first, or build an index, which does."
            )
        ids = labels.astype(np.int64)
        count = self.n_classes if self.translation is None else len(self.translation)
        wrong = np.flatnonzero((ids < 0) | (ids >= count))
        if len(wrong):
            value = ids[wrong[0]]
            what = f"the model's {self.n_classes} classes" if self.translation is None else f"the dataset's {count} classes"
            raise ValueError(
                f"Labels must lie in 0 to {count - 1}, {what}, but {len(wrong)} of {len(ids)} do not: {value} in "
                f"{name_rows(wrong + first)}{' (-1 marks an unlabelled test split)' if value == -1 else ''}. Filter these rows."
            )
        return ids if self.translation is None else np.asarray(self.translation, dtype=np.int64)[ids]

    def _look_up(self, values: Sequence[Any], first: int) -> Tensor:
        """Return the ids of labels that are strings."""
        if self.n_classes is None:
            raise ValueError(f"{self.task} needs one number per example, but {values[0]!r} in row {first} is a string.")
        ids = self._own_names()
        if not self.label2id and not set(values) <= set(ids):
            raise ValueError(
                f"Labels are strings, such as {values[0]!r}, and the model has no names of its classes to look them up in (only LABEL_0 to "
                f"LABEL_{self.n_classes - 1}). Set `model.config.label2id` to the mapping it was trained with, or give the numbers that it was "
                "trained on. No mapping can be guessed from the dataset."
            )
        folded: dict[str, list[str]] = {}
        for name in ids:
            folded.setdefault(name.casefold(), []).append(name)
        unknown: dict[Any, list[int]] = {}
        spelled: dict[str, str] = {}
        found = []
        for row, value in enumerate(values):
            name = value
            if name not in ids and isinstance(value, str) and len(alike := folded.get(value.casefold(), [])) == 1:
                name = spelled.setdefault(value, alike[0])
            if isinstance(name, str) and name in ids:
                found.append(ids[name])
            else:
                unknown.setdefault(value, []).append(first + row)
        if unknown:
            rows = sorted(row for some in unknown.values() for row in some)
            raise ValueError(
                f"{len(rows)} of {len(values)} labels are no class of the model: {_listed(list(unknown))} in {name_rows(rows)}. The model's "
                f"label2id has {_listed(list(ids))}. Rename the labels, or filter these rows."
            )
        if spelled:
            pairs = ", ".join(f"{mine!r} as {theirs!r}" for mine, theirs in sorted(spelled.items())[:_SHOWN])
            logger.warning("Labels and the model's label2id differ in case; taken as the same: %s.", pairs)
        return torch.tensor(found, dtype=torch.int64)

    def look_up(self, names: Sequence[Any]) -> list[int]:
        """Return the ids of one row's labels that are strings.

        Raises:
            ValueError: If one is no class of the model; the message begins with "its".
        """
        ids = self._own_names()
        if unknown := [name for name in names if name not in ids]:
            raise ValueError(
                f"its label {unknown[0]!r} is no class of the model, whose label2id has {_listed(list(ids))}; rename the labels, or set "
                "`model.config.label2id` to the mapping that the model was trained with"
            )
        return [ids[name] for name in names]

    def _read_several(self, values: Sequence[Any], first: int) -> Tensor:
        wrong = []
        rows = np.zeros((len(values), self.n_classes or 0), dtype=np.float32)
        for row, value in enumerate(values):
            try:
                found = np.asarray(value, dtype=np.float64)
            except (TypeError, ValueError):
                found = np.empty(0)
            if found.shape != rows.shape[1:] or not np.isin(found, (0.0, 1.0)).all():
                wrong.append(row)
            else:
                rows[row] = found
        if wrong:
            raise ValueError(
                f"{self.task} needs a list of {self.n_classes} zeros and ones per example, one for each label of the model, but "
                f"{len(wrong)} of {len(values)} are not: {_short(values[wrong[0]])} in {name_rows([first + row for row in wrong])}. Lists of "
                "the ids that apply become such rows with sklearn's `MultiLabelBinarizer`, or `dataset.map`."
            )
        return torch.from_numpy(rows)


def labels_of_model(model: PreTrainedModel) -> tuple[tuple[str, int], ...]:
    """Return a classifier's names of its classes with their ids, in order; nothing where they are LABEL_0, LABEL_1, ... in this order.

    Raises:
        ValueError: If `id2label` and `label2id` contradict each other.
    """
    config = model.config
    id2label = {int(id): str(name) for id, name in (getattr(config, "id2label", None) or {}).items()}
    label2id = {str(name): int(id) for name, id in (getattr(config, "label2id", None) or {}).items()}
    known = [names for names in (label2id, {name: id for id, name in id2label.items()}) if names and not _is_default(names)]
    known = [names for names in known if is_informative(names)] or known
    if not known:
        return ()
    if len(known) == 2 and known[0] != known[1]:
        raise ValueError(
            f"The model's configuration contradicts itself: id2label is {id2label}, and label2id is {label2id}. Correct the one that is not "
            "what the model was trained with, in `model.config` or its config.json."
        )
    return tuple(sorted(known[0].items(), key=lambda pair: pair[1]))


def is_informative(names: Sequence[str] | Mapping[str, int]) -> bool:
    """Return whether names say what classes are; `LABEL_0`, `class 0`, `0` and the like say nothing."""
    return not all(map(_is_number, names))


def match_names(names: Sequence[str], label2id: Mapping[str, int]) -> tuple[int, ...] | None:
    """Return the model's id of each name of a dataset; None if one has no class, or two share one.

    Names are the same but for case and what separates words. Where no name is the same, the beginning of one serves: `neg` is
    `NEGATIVE` if no other begins so.
    """
    known = {_folded(name): id for name, id in label2id.items()}
    if len(known) < len(label2id):
        known = dict(label2id)
        folded = list(names)
    else:
        folded = [_folded(name) for name in names]
    found: list[int] = []
    for name in folded:
        near = [known[name]] if name in known else [id for other, id in known.items() if _begins(name, other)]
        if len(near) != 1:
            return None
        found.append(near[0])
    return tuple(found) if len(set(found)) == len(found) else None


def match_numbers(names: Sequence[str], label2id: Mapping[str, int]) -> tuple[int, ...] | None:
    """Return the model's id of each name of a dataset where both are numbers, `LABEL_0` and the like; None if the numbers are others.

    `class_encode_column` sorts numbers as texts: 0, 1, 10, 11, 2.
    """
    if not all(map(_is_number, (*names, *label2id))):
        return None
    known = {_number(name): id for name, id in label2id.items()}
    numbers = [_number(name) for name in names]
    if set(numbers) != set(known) or len(numbers) != len(label2id) or len(known) != len(label2id):
        return None
    return tuple(known[number] for number in numbers)


def find_names_beside(dataset: Dataset, column: str) -> list[str] | None:
    """Return the names of a dataset's classes from a column of texts with one value for each number; None where there is no such column.

    The numbers must be 0, 1, ... without a gap.
    """
    if getattr(dataset.features.get(column), "dtype", None) in (None, "string", "large_string"):
        return None
    for beside in dict.fromkeys(name.format(column) for name in _BESIDE):
        if getattr(dataset.features.get(beside), "dtype", None) not in ("string", "large_string"):
            continue
        table = dataset.select_columns([column, beside]).with_format("arrow")[:]
        pairs = table.group_by([column, beside]).aggregate([]).to_pylist()
        if any(value is None for pair in pairs for value in pair.values()):
            continue
        names = {pair[column]: pair[beside] for pair in pairs}
        if len(names) == len(pairs) == len(set(names.values())) and set(names) == set(range(len(names))):
            return [names[number] for number in range(len(names))]
    return None


def _is_default(label2id: Mapping[str, int]) -> bool:
    return all(name == f"LABEL_{id}" for name, id in label2id.items())


def _is_number(name: Any) -> bool:
    return re.fullmatch(r"(?:(?:label|class)[\W_]*)?\d+(?:\.0)?", str(name).strip(), re.IGNORECASE) is not None


def _number(name: Any) -> int:
    return int(re.findall(r"\d+", str(name))[0])


def _begins(one: str, other: str) -> bool:
    return min(len(one), len(other)) >= 3 and (one.startswith(other) or other.startswith(one))


def _folded(name: str) -> str:
    return re.sub(r"[\W_]+", "", str(name)).casefold() or str(name)


def _is_string(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string") and not hasattr(kind, "names")


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(map(_short, list(names)[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")


def _short(value: Any) -> str:
    text = repr(value.tolist() if hasattr(value, "tolist") else value)
    return text if len(text) <= 60 else text[:57] + "..."
