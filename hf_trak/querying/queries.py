"""Features of queries: computed by the recorded featurizers, or given as columns and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from hf_trak.config import TrakConfig
from hf_trak.featurizing.batching import check_finite
from hf_trak.featurizing.engine_choice import EngineChoice
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.featurizing.identity import (
    describe_featurizer,
    describe_task_code,
    library_minors,
    recorded_base,
    recorded_checkpoint,
    recorded_processor,
    warn_of_libraries,
)
from hf_trak.featurizing.loop import featurize_rows
from hf_trak.gradients import BatchFeatures
from hf_trak.members import Pass
from hf_trak.messages import list_differences
from hf_trak.querying.questions import Question, Side
from hf_trak.runtime import Bar
from hf_trak.sources.processors import tokenizer_of
from hf_trak.sources.row_digests import describe_columns, in_order, label_names, names_read
from hf_trak.sources.transforms import hash_callable
from hf_trak.storage.format import BANK_NAME, STATISTICS_NAME
from hf_trak.storage.passes import encode_pass
from hf_trak.storage.reader import MemberReader
from hf_trak.tasks import TARGET_COLUMN, TASKS, Bank, Task, TaskMaker, in_direction
from hf_trak.tasks.chunks import ChunkedQueries, cut_queries
from hf_trak.tasks.inputs import CustomInputs
from hf_trak.tasks.rows import as_stored, check_is_dataset, features_of, is_transformed, with_column

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


class QuerySide:
    """Makes the featurizers that queries need.

    Args:
        folder (`Path`): Of the index.
        models (`Sequence`, *optional*): One per checkpoint, or one per member, in place of the recorded ones. Of points of a path, the final
            models.
        base (`str` or `Path`, *optional*): Of the paths, in place of the recorded ones.

    Raises:
        ValueError: If there are not as many models as checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        config: TrakConfig,
        members: Sequence[MemberReader],
        passes: Sequence[Pass],
        models: Sequence[PreTrainedModel | str | Path] | None,
        processing_class: Any,
        task: Task | TaskMaker | None,
        trust_remote_code: bool = False,
        base: str | Path | None = None,
    ) -> None:
        self.folder = folder
        self.config = config
        self.members = members
        self.passes = passes
        self.n_checkpoints = len({plan.checkpoint for plan in passes})
        # Several points of a path have one final model.
        self.n_models = len({(plan.model is None, plan.checkpoint if plan.model is None else plan.model) for plan in passes})
        if models is not None and len(models) not in (self.n_models, self.n_checkpoints, len(members)):
            counts = f"{self.n_checkpoints} checkpoints" + (
                f" of {self.n_models} models" if self.n_models < self.n_checkpoints else ""
            )
            raise ValueError(
                f"{folder} has {counts} and {len(members)} members, but {len(models)} models were given. "
                f"Give one per {'model' if self.n_models < self.n_checkpoints else 'checkpoint'}."
            )
        if base is not None and not any("point" in member.identity for member in members):
            raise ValueError(
                f"`base` is given, but {folder} is of checkpoints themselves, and not of points of a path to them."
            )
        self.models = models
        self.base = base
        self.processing_class = processing_class
        self.task = task
        self.trust_remote_code = trust_remote_code
        self._kept: dict[tuple[Pass, str, bool], tuple[Featurizer, Task]] | None = None

    def keep_in_memory(self, passes: Sequence[Pass]) -> None:
        """Load the models of all passes, and keep every featurizer from its first use on."""
        self._kept = {} if self._kept is None else self._kept
        for plan in passes:
            self.featurizer(plan)

    def featurizer(self, plan: Pass, *, direction: str = "pair", final: bool = False) -> Featurizer:
        """Return the featurizer of a pass.

        Args:
            final (`bool`): Of a point of a path, that of the final model in its place, without dropout.
            direction (`str`): For image-caption pairs: pair, image or caption; see [`AttributionIndex.score`].

        Raises:
            ValueError: If the model, task or parameters are not those recorded; the message lists what differs.
        """
        if self._kept is None:
            return self._featurizer(plan, direction, final)
        key = (plan, direction, final and self._differs_from_final(plan))
        if key not in self._kept:
            made = self._featurizer(plan, direction, final)
            self._kept[key] = made, made.task
        featurizer, task = self._kept[key]
        featurizer.use_task(task)  # the last question may have left another
        return featurizer

    def _differs_from_final(self, plan: Pass) -> bool:
        """Whether the featurizer of a pass is another than that of its final model."""
        member = self.members[plan.members[0]]
        return (
            plan.dropout_seed is not None
            or "point" in member.identity
            or bool({STATISTICS_NAME, BANK_NAME} & set(member.records))
        )

    def _featurizer(self, plan: Pass, direction: str, final: bool) -> Featurizer:
        first = plan.members[0]
        self.check_task()
        place, given = self.members[first].info["checkpoint"], self._model(plan)
        featurizer = Featurizer(
            recorded_checkpoint(self.folder, place) if given is None else given,
            self.config,
            self.processing_class
            if self.processing_class is not None
            else recorded_processor(self.folder, self.members[first].info),
            task=self.task,
            seed=plan.seeds,
            dropout_seed=None if final else plan.dropout_seed,
            revision=place["revision"] if given is None else None,
            **({} if final else self._path(self.members[first])),
            trust_remote_code=self.trust_remote_code,
        )
        if lines := self._differences(first, featurizer):
            raise ValueError(
                f"This is not what member_{first} of {self.folder} was featurized with:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nGive the recorded checkpoint as `models`, with its tokenizer or image processor as `processing_class` if it is not saved "
                "beside it, or featurize the training set again."
            )
        if not final and (statistics := self.members[first].tensors(STATISTICS_NAME)) is not None:
            featurizer.checkpoint.use_statistics(statistics)
        if not final and (bank := self.members[first].tensors(BANK_NAME)) is not None:
            featurizer.use_bank(Bank.from_tensors(bank))
        if (engine := self.members[first].info.get("engine")) is not None:
            featurizer.use_engine(EngineChoice(**engine))
        featurizer.use_task(in_direction(featurizer.task.for_queries(), direction))
        return featurizer

    def asked(self, queries: Dataset, question: Question) -> list[tuple[float, Dataset, str | int]]:
        """Return the queries of each output that is asked about, with its sign and target, checked before a model is loaded.

        Of tasks without classes, a target other than "label" names the column of another answer, which takes the place of the answer.

        Raises:
            ValueError: If the queries cannot serve; see [`QuerySide.check`].
        """
        result = []
        for sign, target in question.targets:
            rows = queries
            if target != "label" and not self.has_classes:
                rows, target = self._with_answer(queries, target, question), "label"
            self.check(rows, reads=None if target == "label" else "target")
            result.append((sign, rows, target))
        return result

    @property
    def has_classes(self) -> bool:
        """Whether labels are classes or numbers in one column, or the task is not ours, of which nothing is known."""
        kind, _, rest = self.members[0].identity["task"].partition("-")
        return (
            self.members[0].identity["task"] not in TASKS
            or rest == "sentence-prediction"
            or (kind in ("text", "image", "audio", "video") and rest in ("classification", "multi-label", "regression"))
        )

    def _with_answer(self, queries: Dataset, target: str | int, question: Question) -> Dataset:
        """Return queries with another column in place of the answer."""
        from datasets import concatenate_datasets

        read, task = self._recorded["columns"], self.members[0].identity["task"]
        texts = read.get("text", [])
        found = [read.get(name) for name in ("completion", "label", "messages")] + ([*texts] if len(texts) == 1 else [])
        answer = next((name for name in found if isinstance(name, str)), None)
        if "tokens" in read or answer is None or target not in queries.column_names or is_transformed(queries):
            raise ValueError(
                f"{target!r} is no output of this index of {task}, which has no classes. "
                + (
                    f"`target` and `contrast` may name columns of the queries that hold another answer in place of {answer!r}; these "
                    f"queries have {', '.join(queries.column_names)}. "
                    if answer is not None and "tokens" not in read
                    else "Leave out `target` and `contrast`. "
                )
                + "For what a language model answers itself, ask `index.explain(prompt=...)` (hf-trak explain)."
            )
        asked = {name for _, name in question.targets if name in queries.column_names}
        values = queries.select_columns([str(target)])
        values = values if target == answer else values.rename_column(str(target), answer)
        rest = queries.remove_columns([name for name in queries.column_names if name in asked or name == answer])
        return concatenate_datasets([rest, values], axis=1)

    def sides(self, asked: Sequence[tuple[float, Dataset, str | int]], batch_size: int | str, progress: bool) -> list[Side]:
        """Return the queries with what is asked of each: classes are looked up, and the model is asked for predictions.

        These are the final model's, whatever checkpoints the index is of, so that all members attribute the same output.

        Raises:
            ValueError: If the task has no classes, or there is no such class.
        """
        if all(target == "label" for _, _, target in asked):
            return [Side(queries, sign, self._reads(queries)) for sign, queries, _ in asked]
        featurizer = self.final_featurizer()
        task, sides = featurizer.task.for_targets(), []
        for sign, queries, target in asked:
            stored = as_stored(queries)
            if target == "label":
                sides.append(Side(queries, sign))
                continue
            if target == "prediction":
                featurizer.use_task(task)
                featurizer.check(stored)
                with Bar(total=len(queries), unit="rows", desc="Predictions", disable=not progress) as bar:
                    found = featurize_rows(
                        _Outputs(featurizer, featurizer.predictions), stored, range(len(queries)), batch_size=batch_size,
                        on_batch=bar.update,
                    ).features  # fmt: skip
                values: Any = found if task.several_labels else found.squeeze(1)
                values = (values if task.several_labels or task.n_classes is None else values.long()).tolist()
            else:
                values = [task.label_of(task.read_class(target, self._recorded["label_names"]))] * len(queries)
            names = task.class_names(self._recorded["label_names"])
            sides.append(Side(with_column(stored, TARGET_COLUMN, values), sign, "target", names))
        return sides

    def _reads(self, queries: Dataset) -> str:
        """Return how queries with labels are read; see [`Side`]."""
        of_chunks = self.config.chunk_overlap is not None and "input_ids" not in queries.column_names
        return "document" if of_chunks else "label"

    def final_featurizer(self) -> Featurizer:
        """Return the featurizer of the last checkpoint; of points of a path, that of the final model."""
        return self.featurizer(self.passes[-1], final=True)

    def check(self, queries: Dataset, *, reads: str | None = None) -> None:
        """Check, before a model is loaded, that queries have the columns that were read of the training set, and its label names.

        Args:
            reads (`str`, *optional*): As of a [`Side`]; by default with their labels.

        Raises:
            ValueError: Naming what is missing or different.
        """
        check_is_dataset(queries, "Queries")
        self.check_task()
        reads = self._reads(queries) if reads is None else reads
        if reads == "document":
            self._check_texts(queries)
            return
        read, names = self._recorded["columns"], self._recorded["label_names"]
        if reads == "target":
            read, names = {key: value for key, value in read.items() if key != "label"}, None
        found: Any = features_of(queries)
        if missing := [name for name in names_read(read) if name not in found]:
            raise ValueError(
                f"The queries lack {', '.join(map(repr, missing))}, which {self.folder} reads ({describe_columns(read)}); they have "
                f"{', '.join(found)}. Rename a column with `queries.rename_column`, or add what is missing."
                + (
                    " To attribute what the model predicts, `score` and `attribute` need no label: target='prediction' (--target prediction)."
                    if missing == [read.get("label")] and self.has_classes
                    else ""
                )
            )
        given = label_names(found, read)
        by_id = self.config.label_mapping != "by_name"  # which goes by the names and the model
        if by_id and names is not None and given is not None and given != names:
            raise ValueError(
                f"The labels of the queries mean something else than those of the training set of {self.folder}:\n  training set: "
                f"{', '.join(names)}\n  queries: {', '.join(given)}\nBring them to the training set's with `queries.cast_column("
                f"{read['label']!r}, ClassLabel(names=[...]))` after mapping each label by its name."
            )

    def _check_texts(self, queries: Dataset) -> None:
        column = (self.config.text_columns or ("text",))[0]
        if not any(names <= set(queries.column_names) for names in ({column}, {"prompt", "completion"}, {"messages"})):
            raise ValueError(
                f"{self.folder} is of the chunks of texts, and the queries have {', '.join(queries.column_names)}. Give texts in {column!r}, "
                "'prompt' and 'completion', or 'messages'."
            )

    def check_read(self, featurizer: Featurizer, queries: Dataset, *, reads: str = "label") -> None:
        """Check that the task reads of queries what it read of the training set, but for labels that are not read.

        Raises:
            ValueError: If it takes other columns, or takes them for something else.
        """
        read = self._recorded["columns"]
        if reads == "target":
            read = {key: value for key, value in read.items() if key != "label"}
        features: Any = features_of(queries)
        found = in_order(featurizer.task.columns_read(features)) if read else read
        if found != read:
            raise ValueError(
                f"Of the queries other columns would be read than {self.folder} was made of:\n  training set: {describe_columns(read)}\n"
                f"  queries: {describe_columns(found)}\nGive the queries the columns of the training set, and no others that may be "
                "taken for them (`queries.select_columns`)."
            )

    def featurize(
        self, featurizer: Featurizer, side: Side, batch_size: int | str, progress: bool, description: str
    ) -> dict[str, np.ndarray]:
        """Return the trak_* columns of queries, checked to be read as the training set was; see [`featurize_queries`]."""
        if len(side.queries) and side.reads not in ("answer", "document"):
            self.check_read(featurizer, side.queries, reads=side.reads)
        chunks = self._cut(featurizer, side)
        if chunks is None:
            return featurize_queries(featurizer, side.queries, batch_size, progress, description)
        found = featurize_queries(featurizer, chunks.rows, batch_size, progress, description)
        return {name: chunks.join(values) for name, values in found.items()}

    def _cut(self, featurizer: Featurizer, side: Side) -> ChunkedQueries | None:
        """Return texts as chunks, of an index of chunks; None for queries that are featurized as they are."""
        if side.reads != "document" or len(side.queries) == 0:
            return None
        return cut_queries(as_stored(side.queries), featurizer.task, tokenizer_of(featurizer.processing_class), self.config)

    def final_output(
        self, plan: Pass, sides: Sequence[Side], batch_size: int | str, progress: bool
    ) -> Float32[np.ndarray, " n_query"] | None:
        """Return what the final model says of queries, by forward passes alone, where a pass is of a point before it; None for other passes,
        and for dual encoders, whose outputs need a bank of that model."""
        first = self.members[plan.members[0]]
        if "point" not in first.identity or first.tensors(BANK_NAME) is not None:
            return None
        featurizer = self.featurizer(plan, final=True)
        task, total = featurizer.task, np.zeros(len(sides[0].queries), dtype=np.float32)
        for side in sides:
            featurizer.use_task(side.task(task))
            chunks = self._cut(featurizer, side)
            queries = as_stored(side.queries) if chunks is None else chunks.rows
            featurizer.check(queries)
            with Bar(total=len(queries), unit="rows", desc="Outputs", disable=not progress) as bar:
                found = featurize_rows(
                    _Outputs(featurizer, featurizer.outputs), queries, range(len(queries)), batch_size=batch_size,
                    on_batch=bar.update,
                )  # fmt: skip
            check_finite(found)
            output = found.output.numpy()
            total += side.sign * (output if chunks is None else chunks.join(output))
        return total

    def check_task(self) -> None:
        """Check that a task of the user's own was given again: an index does not hold its code, and nothing is imported that it names.

        Raises:
            ValueError: If it was not, or comes from another place than the recorded one.
        """
        recorded = self.members[0].info.get("task_import_path")
        place = recorded if isinstance(recorded, str) else None
        if self.task is None and self.config.task not in TASKS:
            flag = "module:name" if place is None else place
            raise ValueError(
                f"{self.folder} was made with a task of your own, {self.config.task!r}, whose code an index does not hold. Give it again: "
                f"`task=...` in Python, --task {flag} on the command line."
            )
        given = getattr(self.task, "import_path", None)
        if place is not None and given is not None and given != place:
            raise ValueError(
                f"{self.folder} was made with the task {place!r}, but {given!r} is given. Give the recorded one; if it has moved and its "
                "code is the same, load the index in Python with `task=...`."
            )

    def _task_code(self, featurizer: Featurizer) -> str | None:
        """Return a hash of the code of a task of the user's own; None where none was recorded, or by another version of Python."""
        recorded, task = self._recorded.get("task_code"), featurizer.task
        if recorded is None or not isinstance(task.inputs, CustomInputs):
            return None
        found = hash_callable(task.output_function, task.inputs.collator)
        return found if found.split(" ", 1)[1:] == str(recorded).split(" ", 1)[1:] else None

    @property
    def _recorded(self) -> dict[str, Any]:
        """What was read of the training set."""
        return {"columns": {}, "label_names": None, **self.members[0].identity["dataset"]}

    def _differences(self, member: int, featurizer: Featurizer) -> list[str]:
        """Return what sets a featurizer apart from what a member was featurized with."""
        recorded = self.members[member].identity
        found = describe_featurizer(featurizer, self._recorded["columns"])
        is_same_library = recorded.get("libraries") == library_minors()
        wanted: dict[str, Any] = {key: recorded.get(key) for key in found}
        if (code := self._task_code(featurizer)) is not None:
            wanted["task_code"], found["task_code"] = self._recorded["task_code"], code
        # Another version of transformers may name more settings, or fewer.
        for key in ("model_config", "processing"):
            if key in found and wanted[key] is not None and not is_same_library:
                wanted[key], found[key] = _common(wanted[key], found[key])
        if "processing" in recorded and "processing" in found:
            wanted["max_length"], found["max_length"] = recorded.get("max_length"), found.get("max_length")
        else:  # rows that were tokens or pixels before, or queries without a tokenizer, which are refused when they are read
            for description in (wanted, found):
                for key in ("processing", "max_length"):
                    description.pop(key, None)
        if not is_same_library:
            warn_of_libraries(self.members[member].folder, recorded.get("libraries"))
            for description in (wanted, found):  # a tokenizer's content is written differently by another version
                description.get("processing", {}).get("tokenizer", {}).pop("sha256", None)
        code, here = self._recorded.get("task_code"), describe_task_code(featurizer.task).get("task_code")
        # Bytecode is another one under another version of Python, which the hash names at its end.
        if code is not None and here is not None and code.partition(" ")[2] == here.partition(" ")[2]:
            wanted["task_code"], found["task_code"] = code, here
        return list_differences(wanted, found)

    def _model(self, plan: Pass) -> PreTrainedModel | str | Path | None:
        """Return the model given for a pass, if any."""
        if self.models is None:
            return None
        if len(self.models) == self.n_checkpoints:
            return self.models[plan.checkpoint]
        if len(self.models) == self.n_models and plan.model is not None:
            return self.models[plan.model]
        return self.models[plan.members[0]]

    def _path(self, member: MemberReader) -> dict[str, Any]:
        """Return which point of a path a member is of, as [`Featurizer`] takes it; nothing for a checkpoint itself."""
        if self.base is None or "point" not in member.identity:
            return recorded_base(self.folder, member.info)
        return {"base": self.base, "alpha": member.identity["point"]["alpha"]}


class _Outputs:
    """A featurizer of which outputs or predictions alone are wanted."""

    def __init__(self, featurizer: Featurizer, compute: Callable[[Any], BatchFeatures]) -> None:
        self.budget, self.lengths, self.collate = featurizer.budget, featurizer.lengths, featurizer.collate
        self._featurizer = featurizer
        self._compute = compute

    def compute(self, batch: Any, ids: Sequence[int] | None = None) -> BatchFeatures:
        return self._compute(batch)

    def encode(self, features: BatchFeatures) -> dict[str, np.ndarray]:
        return self._featurizer.encode(features)


def featurize_queries(
    featurizer: Featurizer, queries: Dataset, batch_size: int | str, progress: bool, description: str
) -> dict[str, np.ndarray]:
    """Return the trak_* columns of queries, in float32; those of several sketches as [`encode_pass`] names them."""
    if len(queries) == 0:
        raise ValueError("There are no queries: the dataset is empty.")
    queries = as_stored(queries)
    featurizer.check(queries)
    with Bar(total=len(queries), unit="rows", desc=description, disable=not progress) as bar:
        found = featurize_rows(featurizer, queries, range(len(queries)), batch_size=batch_size, on_batch=bar.update)
    return encode_pass(found.features, found.output, found.out_to_loss, seeds=featurizer.seeds, dtype="float32")


def _common(first: dict[str, Any], second: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return two nested dictionaries with the keys that both have."""
    pairs = {
        key: _common(first[key], second[key])
        if isinstance(first[key], dict) and isinstance(second[key], dict)
        else (first[key], second[key])
        for key in first
        if key in second
    }
    return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}
