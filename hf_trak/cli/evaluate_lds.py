"""`hf-trak evaluate lds`: how well scores order the outputs of models trained on parts of the training set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from hf_trak import __version__
from hf_trak.cli.data import load_rows
from hf_trak.cli.parsing import Collect, LoadingArguments, make_parser, parse, rows_at_a_time
from hf_trak.evaluation import GroundTruth, ground_truth_from
from hf_trak.evaluation.baselines import Checkpoints, make_baseline
from hf_trak.featurizing.identity import recorded_processor
from hf_trak.index import AttributionIndex
from hf_trak.messages import say
from hf_trak.storage.replacing import refuse_target

if TYPE_CHECKING:
    from hf_trak.evaluation import LDS, GroundTruth, Reliability


def load_ground_truth(args: LDSArguments) -> GroundTruth:
    """Load subsets and outputs; of a folder that train_subsets.py made, its collected file."""
    name = args.ground_truth
    if (Path(name) / "job.json").is_file():
        collected = Path(name) / f"{Path(name).resolve().name}.parquet"
        if not collected.exists():
            raise FileNotFoundError(f"The job in {name} is not finished: run the same train_subsets.py command again to go on.")
        name = str(collected)
    rows = load_rows(name, split=args.ground_truth_split, config=args.ground_truth_config)
    try:
        truth = ground_truth_from(rows)
    except ValueError as error:
        raise ValueError(f"--ground_truth {args.ground_truth}: {error}") from error
    if len(truth.masks) < 2:
        raise ValueError(f"--ground_truth {args.ground_truth} holds one subset; a correlation needs at least two.")
    return truth


@dataclass
class Inputs:
    """What is scored: an index and its queries, files of scores, and baselines."""

    args: LDSArguments
    truth: GroundTruth
    index: AttributionIndex | None
    queries: Dataset | None
    train: Dataset | None
    checkpoints: Checkpoints | None = None  # shared by the baselines, which keep gradients in it

    @property
    def case(self) -> str:
        """Return what is measured, as results files name it."""
        n_train, n_query = self.truth.masks.shape[1], self.truth.outputs.shape[2]
        sizes = f"{n_train:,} training rows, {n_query:,} queries"
        if self.index is None:
            return f"{Path(self.args.ground_truth).name}: {sizes}"
        model, n_members = self.index.members[0].identity["model_class"], len(self.index.members)
        return f"{self.index.folder.name}: {model}, {sizes}, proj_dim {self.index.config.proj_dim}, {n_members} members"

    def methods(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield names and scores, one after another, so that one matrix at a time is in memory."""
        if self.index is not None:
            yield from self._of_index(self.index)
        for path in self.args.scores or []:
            yield path, read_scores(Path(path), self.truth)
        for name in self.args.baselines or []:
            yield name, self._baseline(name)

    def _of_index(self, index: AttributionIndex) -> Iterator[tuple[str, np.ndarray]]:
        ways = {name: value for name in ("out_to_loss_power", "combination") if (value := getattr(self.args, name)) is not None}
        said = "".join(f", {name} {value}" for name, value in ways.items())
        dampings: list[str | None] = [*self.args.damping] if self.args.damping else [None]
        for damping in dampings:
            given = index.config.damping if damping is None else replace(index.config, damping=damping).damping  # type: ignore[arg-type]
            value = index.resolve_damping(given)
            auto = " (auto)" if given == "auto" else ""
            scores = index.score(self.queries, damping=value, batch_size=_rows_at_a_time(self.args), **ways)
            yield f"hf_trak {__version__}, damping {value:g}{auto}{said}", scores

    def _baseline(self, name: str) -> np.ndarray:
        if name == "random":  # of any rows, as many as there are
            train, queries = (
                Dataset.from_dict({"row": range(n)}) for n in (self.truth.masks.shape[1], self.truth.outputs.shape[2])
            )
            return make_baseline(name)(train, queries)
        assert self.index is not None
        if self.checkpoints is None:
            models = checkpoints_of(self.index)
            self.checkpoints = Checkpoints(
                models,
                self.index.config,
                processing_class=self.args.processor or recorded_processor(self.index.folder, self.index.members[0].info),
                task=self.index.task,
                batch_size=_rows_at_a_time(self.args),
            )
        return make_baseline(name, self.checkpoints)(self.train, self.queries)


def checkpoints_of(index: AttributionIndex) -> list[Any]:
    """Return the checkpoints an index was made of, in order, as baselines take them."""
    found = {}
    for plan in index.passes:
        if plan.checkpoint not in found:
            featurizer = index.featurizer(plan.members[0])  # refuses weights that are not those recorded
            by_name = featurizer.source is not None and featurizer.checkpoint.revision is None and featurizer.point is None
            found[plan.checkpoint] = featurizer.source if by_name else featurizer.model
    return list(found.values())


def _rows_at_a_time(args: LDSArguments) -> int | str:
    return rows_at_a_time(args.batch_size, "--batch_size")


def read_scores(path: Path, truth: GroundTruth) -> np.ndarray:
    """Map a `.npy` file of scores to memory.

    Raises:
        ValueError: If it is no such file, or is not of the ground truth's rows and queries.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--scores: there is no file {path}.")
    try:
        scores = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"--scores: {path} is not an array of numbers that numpy.save wrote: {error}") from error
    expected = truth.masks.shape[1], truth.outputs.shape[2]
    if not isinstance(scores, np.ndarray) or scores.shape != expected:
        shape = getattr(scores, "shape", "of several arrays")
        hint = " They look transposed." if shape == expected[::-1] else ""
        raise ValueError(
            f"--scores: {path} must hold (n_train, n_query) = {expected} numbers, as the ground truth has them, but is {shape}.{hint}"
        )
    return scores


def load_inputs(args: LDSArguments, truth: GroundTruth) -> Inputs:
    """Load what is to be scored, and check that it is what the ground truth is of."""
    n_train, n_query = truth.masks.shape[1], truth.outputs.shape[2]
    index = None if args.index is None else args.load(args.index)
    if index is not None:
        _check_rows("--index", index.n_rows, n_train, "training rows")
    queries = None if args.queries is None else load_rows(args.queries, split=args.split, config=args.queries_config)
    train = None if args.train is None else load_rows(args.train, split=args.train_split, config=args.train_config)
    if queries is not None:
        _check_rows("--queries", len(queries), n_query, "queries")
    if train is not None:
        _check_rows("--train", len(train), n_train, "training rows")
        if index is not None:
            train = index.align(train)
    return Inputs(args, truth, index, queries, train)


def _check_rows(flag: str, found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ValueError(
            f"{flag} has {found:,} rows, but the ground truth is of {expected:,} {what}. They must be the same rows, in the same order: "
            "train_subsets.py leaves those it used in OUTPUT/data."
        )


_USAGE = "--ground_truth DATASET (--index INDEX --queries DATASET | --scores FILE.npy) [options]"
_DESCRIPTION = """\
The linear datamodeling score (LDS) of an index, or of scores computed elsewhere. The ground truth holds, for random subsets of the
training set, the outputs that models trained on them gave the queries; scripts/train_subsets.py makes it. Scores predict a subset's
output by their sum over the subset. The LDS is the rank correlation of predictions and outputs over subsets, averaged over queries:
0 for random scores, and at most the ceiling that the ground truth's own noise leaves, which is printed beside it.

Training rows and queries must be those of the ground truth, in its order: train_subsets.py leaves them in OUTPUT/data.

examples:
  hf-trak evaluate lds --index my-index --queries out/data/queries.parquet --ground_truth out/ground_truth/ground_truth.parquet
  hf-trak evaluate lds --index my-index --queries out/data/queries.parquet --ground_truth me/sst2-subsets --damping auto 0.1 1 \\
      --train out/data/train.parquet --baselines random gradient_cosine --output lds.json
  hf-trak evaluate lds --scores mine.npy --ground_truth me/sst2-subsets
"""
_SUBSET_FITS = "Fits to subsets, such as datamodels, need scores per fold: hf_trak.evaluation.baselines.cross_fit in Python."


@dataclass(kw_only=True)
class LDSArguments(LoadingArguments):
    """Whose scores, against which ground truth."""

    ground_truth: str = field(
        metadata={"help": "Subsets and outputs: a Parquet file, a folder of save_to_disk, or a dataset of the Hub."}
    )
    index: str | None = field(default=None, metadata={"help": "Folder, dataset repository or object store URL of an index."})
    queries: str | None = field(
        default=None,
        metadata={"help": "The ground truth's queries: a Parquet, CSV or JSON file, a folder, or a dataset of the Hub."},
    )
    scores: list[str] | None = field(
        default=None,
        metadata={
            "help": "Scores computed elsewhere, (n_train, n_query) as NumPy's .npy; positive raises the output.",
            "action": Collect,
        },
    )
    damping: list[str] | None = field(
        default=None,
        metadata={"help": "Numbers or auto, in place of the index's damping; one score for each.", "action": Collect},
    )
    out_to_loss_power: float | None = field(
        default=None, metadata={"help": "What 1 - p is raised to, 0 to 1, in place of the index's; 1 is the paper's."}
    )
    combination: str | None = field(
        default=None,
        metadata={
            "help": "How members are combined, in place of the index's way: scaled, or means (the paper's).",
            "choices": ["scaled", "means"],
        },
    )
    baselines: list[str] | None = field(
        default=None,
        metadata={
            "help": "Baselines beside it, by their names in hf_trak.evaluation.baselines.BASELINES, such as random or gradient_cosine. "
            "They look at the index's checkpoints; all but random need --train.",
            "action": Collect,
        },
    )
    train: str | None = field(default=None, metadata={"help": "The training set, for --baselines."})
    ground_truth_config: str | None = field(default=None, metadata={"help": "Configuration of the ground truth's dataset."})
    ground_truth_split: str = field(default="train", metadata={"help": "Split of the ground truth."})
    queries_config: str | None = field(default=None, metadata={"help": "Configuration of the queries' dataset."})
    split: str = field(default="validation", metadata={"help": "Split of the queries."})
    train_config: str | None = field(default=None, metadata={"help": "Configuration of the training set."})
    train_split: str = field(default="train", metadata={"help": "Split of the training set."})
    resample: str = field(
        default="subsets",
        metadata={
            "help": "What the bootstrap draws again: subsets (as in the paper) or queries.",
            "choices": ["subsets", "queries"],
        },
    )
    n_bootstrap: int = field(default=1000, metadata={"help": "Draws of the bootstrap; 0 for no interval."})
    confidence: float = field(default=0.95, metadata={"help": "Share of the draws inside the interval."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap."})
    batch_size: str = field(default="auto", metadata={"help": "Queries at a time; auto halves when memory runs out."})
    output: str | None = field(default=None, metadata={"help": "File for the results, .json."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output file."})


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse and run."""
    parser = make_parser([LDSArguments], command="evaluate lds", usage=_USAGE, description=_DESCRIPTION)
    (args,) = parse(parser, arguments)
    return {"rows": run(args, arguments), "results": args.output}


def run(args: LDSArguments, arguments: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Evaluate, print, and return the rows of results."""
    _check(args)

    from hf_trak.cli.main import quiet_libraries
    from hf_trak.evaluation import lds

    quiet_libraries()
    truth = load_ground_truth(args)
    say(f"{describe(truth)}\n{describe_reliability(truth, reliability := reliability_of(truth, args))}\n")
    inputs = load_inputs(args, truth)
    say(f"Linear datamodeling score{_describe_interval(args)}")
    options: dict[str, Any] = {key: getattr(args, key) for key in ("resample", "n_bootstrap", "confidence", "seed")}
    found = {}
    for method, scores in inputs.methods():
        found[method] = lds(scores, *truth, **options)
        say(line_of(method, found[method]))
    rows = rows_of(inputs.case, found, truth, reliability)
    if args.output is not None:
        _write(args, arguments, rows)
    return rows


def _check(args: LDSArguments) -> None:
    """Refuse before anything is computed."""
    if args.index is None and not args.scores:
        raise ValueError("Whose score? Give --index and --queries, or --scores.")
    if args.index is not None and args.queries is None:
        raise ValueError("--index needs --queries: the rows whose outputs the ground truth holds, in its order.")
    of_index = ("damping", "out_to_loss_power", "combination", "model", "base", "processor", "task")
    if args.index is None and (given := [name for name in of_index if getattr(args, name) is not None]):
        raise ValueError(f"{', '.join(f'--{name}' for name in given)}: how an index scores, but there is no --index.")
    rows_at_a_time(args.batch_size, "--batch_size")
    if args.n_bootstrap < 0 or not 0 < args.confidence < 1:
        raise ValueError(
            f"--n_bootstrap must be at least 0, and --confidence between 0 and 1, but they are {args.n_bootstrap} and {args.confidence}."
        )
    if args.output is not None and Path(args.output).suffix != ".json":
        raise ValueError(f"--output must end in .json, but is {args.output}.")
    if args.output is not None:
        names = ("ground_truth", "queries", "scores", "train", "model")
        refuse_target(Path(args.output), {f"--{name}": getattr(args, name) for name in names})
    if args.output is not None and Path(args.output).exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists. Choose another place, or pass --overwrite.")
    _check_baselines(args)


def _check_baselines(args: LDSArguments) -> None:
    if not args.baselines:
        return
    from hf_trak.evaluation.baselines import BASELINES

    unknown = [name for name in args.baselines if name not in BASELINES]
    if unknown:
        raise ValueError(f"--baselines: {', '.join(unknown)} is none of {', '.join(BASELINES)}. {_SUBSET_FITS}")
    missing = [flag for flag in ("index", "queries", "train") if getattr(args, flag) is None]
    if missing and set(args.baselines) != {"random"}:
        raise ValueError(f"--baselines other than random need {', '.join(f'--{flag}' for flag in missing)}, too.")


def reliability_of(truth: GroundTruth, args: LDSArguments) -> Reliability | None:
    """Return how much of the ground truth is signal; None if one seed cannot tell."""
    from hf_trak.evaluation import ground_truth_reliability

    if len(truth.outputs) < 2:
        return None
    return ground_truth_reliability(truth.outputs, confidence=args.confidence, seed=args.seed)


def describe(truth: GroundTruth) -> str:
    """Return the ground truth's sizes as a line."""
    n_seeds, n_subsets, n_query = truth.outputs.shape
    n_train, size = truth.masks.shape[1], truth.masks.sum(1).mean()
    return (
        f"Ground truth: {n_subsets:,} subsets of {size:,.0f} of {n_train:,} training rows, {n_seeds} seed{'s' * (n_seeds > 1)} each, "
        f"{n_query:,} quer{'ies' if n_query > 1 else 'y'}"
    )


def describe_reliability(truth: GroundTruth, found: Reliability | None) -> str:
    """Return reliability and ceiling as a line, or why there is none."""
    if found is None:
        return (
            "  reliability and ceiling unknown: there is one seed per subset, so signal cannot be told from chance. Train with "
            "--n_seeds 2 or more."
        )
    low, high = found.interval
    return f"  reliability {found.reliability:.3f}, ceiling of the LDS {found.ceiling:.3f} [{low:.3f}, {high:.3f}]"


def _describe_interval(args: LDSArguments) -> str:
    return f" [{args.confidence:.0%} bootstrap interval over {args.resample}]" if args.n_bootstrap else ""


def line_of(method: str, found: LDS) -> str:
    """Return one method's score as a line."""
    low, high = found.interval
    interval = f"  [{low:+.3f}, {high:+.3f}]" if low == low else ""
    value = f"{found.value:+.3f}" if found.value == found.value else "undefined"
    left_out = f"  {found.n_undefined:,} of {len(found.per_query):,} queries left out"
    why = f"{left_out}: all predictions, or all outputs, are the same" if found.n_undefined else ""
    return f"  {method:<42}{value:>9}{interval}{why}"


def rows_of(case: str, found: dict[str, LDS], truth: GroundTruth, reliability: Reliability | None) -> list[dict[str, Any]]:
    """Return the rows of a results file."""
    n_seeds, n_subsets, n_query = truth.outputs.shape
    shared = {"n_subsets": n_subsets, "n_seeds": n_seeds, "n_queries": n_query}
    rows = [
        {"case": case, "method": method, "metric": "lds", "value": one.value, "unit": "Spearman", "interval": list(one.interval),
         "n_undefined": one.n_undefined, **shared}
        for method, one in found.items()
    ]  # fmt: skip
    if reliability is not None:
        method = f"{n_subsets} subsets, mean of {n_seeds} seeds"
        values = {
            "ground_truth_reliability": (reliability.reliability, None),
            "lds_ceiling": (reliability.ceiling, list(reliability.interval)),
        }
        rows += [
            {"case": case, "method": method, "metric": metric, "value": value, "unit": "share", "interval": interval, **shared}
            for metric, (value, interval) in values.items()
        ]
    return rows


def _write(args: LDSArguments, arguments: Sequence[str], rows: list[dict[str, Any]]) -> None:
    import torch

    from hf_trak.cli.results import results_of, write_results
    from hf_trak.featurizing.identity import hardware_name, library_versions

    assert args.output is not None
    hardware = hardware_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    command = ["evaluate", "lds", *arguments]
    write_results(results_of("lds", command, rows, versions=library_versions(), hardware=hardware), Path(args.output))
    say(f"\nNumbers: {args.output}")
