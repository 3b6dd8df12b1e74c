"""LDS on CIFAR-2 with ResNet-9 as published for TRAK, on a GPU: where on a run's path should gradients be taken, and with which damping?

    python benchmarks/gpu_cifar2.py --data ../shared/data/cifar2 --output results/gpu_cifar2.json
    python benchmarks/gpu_cifar2.py --data ../shared/data/cifar2 --output tiny.json --device cpu --scale tiny --seconds 60

Three runs on the whole training set keep their weights along the way; then as many runs on random halves as the time holds give the
outputs that scores are compared with. Scores are hf_trak's, of gradients at each kept epoch and on the line from a run's initial to its
final weights, of one run and of three together. Points come in the order of their interest, until the time is used.

Results are written as soon as they are known: OUTPUT holds the figures; .npz files of the same name hold the subsets' masks and outputs, and
each method's predictions. Intervals come from a bootstrap over subsets, with the same draws for every method.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from featurize import write
from resnet9_runs import Images, Runs, State, batch_size_for
from torch import Tensor, nn

from hf_trak import Featurizer, TrakConfig
from hf_trak.evaluation import Recipe, make_masks, predicted_outputs, spearman
from hf_trak.evaluation.lds import ground_truth_reliability, percentile_interval
from hf_trak.gradients import layerwise_features
from hf_trak.linalg import accumulate_gram, default_damping
from hf_trak.projectors import count_sketch as ring
from hf_trak.projectors import make_projector
from hf_trak.scoring.damping import spearman as spearman_on_device
from hf_trak.scoring.ensemble import SolvedQueries, bring_to_one_scale, default_power, influence_rms
from hf_trak.scoring.score import MemberBlock, precondition, score_blocks
from hf_trak.sources.path_points import move_to_point
from hf_trak.storage.files import write_atomically

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from paper_models import ResNet9Config, ResNet9ForImageClassification

Trajectory = dict[int, State]
"""Weights of a run on the whole training set, by epoch."""

TRAINING_SHARE = 0.65  # of the time, until runs on halves end
SCORING_SHARE = 0.95  # until points end
PUBLISHED = "TRAK as published: damping 0, out_to_loss_power 1"
REFERENCE = "MadryLab/trak's scores: damping 0, rescaled, out_to_loss_power 1"
KERNEL_TOLERANCE = 1e-3
DAMPINGS = (0.3, 1.0, 10.0)
"""Besides `damping="auto"`."""
LEAST = (1e-6, 1e-4, 1e-2)
"""Damping where 0 is impossible: the first that is not."""
SECOND_SEEDS = 8
"""Subsets that must have been trained twice for a ceiling."""


class Scale(NamedTuple):
    """Sizes of everything."""

    width: int
    recipe: Recipe
    kept_epochs: tuple[int, ...]
    epochs_of_interest: tuple[int, ...]
    line: tuple[float, ...]
    proj_dim: int
    n_subsets: int
    n_draws: int
    n_train: int | None = None
    n_query: int | None = None
    largest_batch: int = 512


# learning rate, momentum, weight decay, epochs and their peak as in the paper; see "Training recipes" in docs/evidence/paper_index.md.
_PAPERS = Recipe(epochs=100, peak_epoch=5, flip=True, translate=2, mixed_precision="bf16")
SCALES = {
    "real": Scale(64, _PAPERS, (0, 1, 2, 4, 8, 16, 32, 64, 100), (8, 16, 4, 32, 2, 64, 1), (0.5, 0.7, 0.3), 2048, 64, 500),
    "tiny": Scale(
        4,
        replace(_PAPERS, epochs=2, peak_epoch=1),
        (0, 1, 2),
        (1,),
        (0.5,),
        32,
        4,
        20,
        n_train=48,
        n_query=12,
        largest_batch=12,
    ),
}
N_FULL = 3
FULL_SEEDS, OTHER_SEEDS = 1_000_000, 10_000_000
"""First seed of the runs on everything, and what is added to that of a run that diverged."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of train.parquet and test.parquet: columns image and label"
    )
    parser.add_argument("--output", type=Path, default=Path("results/gpu_cifar2.json"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=list(SCALES), default="real")
    parser.add_argument("--seconds", type=float, default=230, help="how long everything may take")
    # Importing counts too.
    return parser.parse_args(namespace=argparse.Namespace(begun=psutil.Process().create_time()))


class Results:
    """What is known so far, on disk after every change."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.case = "CIFAR-2"
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.predictions: dict[str, np.ndarray] = {}
        self.begun = options.begun

    def used(self) -> float:
        """Return the share of the time that is used."""
        return (time.time() - self.begun) / self.options.seconds

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.notes.append(text)
        self.save()

    def add(self, method: str, metric: str, value: float, unit: str, interval: list[float] | None = None, **more: Any) -> None:
        row = {
            "case": self.case,
            "method": method,
            "metric": metric,
            "value": value,
            "unit": unit,
            "interval": interval,
            **more,
        }
        print(json.dumps(row), flush=True)
        self.rows.append(row)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a part of the whole."""
        start = time.perf_counter()
        yield
        if self.options.device != "cpu":
            torch.cuda.synchronize()
        self.add(name, "stage_s", time.perf_counter() - start, "s")
        self.save()

    def save(self) -> None:
        self.options.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.options.output, self._write)

    def _write(self, path: Path) -> None:
        command = f"python benchmarks/gpu_cifar2.py --scale {self.options.scale} --seconds {self.options.seconds:g}"
        write(argparse.Namespace(output=path, threads=torch.get_num_threads()), self.rows, command=command)
        cuda = self.options.device != "cpu"
        hardware = {
            "device": torch.cuda.get_device_name() if cuda else "no GPU",
            "cuda": str(torch.version.cuda),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        }
        more = {"name": self.options.output.stem, "hardware": hardware, "notes": self.notes}
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}, indent=2) + "\n")

    def save_arrays(self, ending: str, **arrays: np.ndarray) -> None:
        """Write a .npz file whose name is OUTPUT's with an ending."""

        def save(path: Path) -> None:
            with open(path, "wb") as file:
                np.savez(file, **arrays)

        write_atomically(self.options.output.with_name(f"{self.options.output.stem}{ending}.npz"), save)


class GroundTruth:
    """Runs on halves: which there are, and what they say of the queries."""

    def __init__(self, masks: np.ndarray, scale: Scale) -> None:
        self.masks = masks
        self.scale = scale
        self.outputs: dict[tuple[int, int], np.ndarray] = {}  # by subset and seed

    @property
    def n_subsets(self) -> int:
        """Subsets with at least one run."""
        return len({subset for subset, _ in self.outputs})

    def next(self) -> tuple[int, int]:
        """Return the subset and seed of the next run: each subset once before any comes again."""
        return len(self.outputs) % self.scale.n_subsets, len(self.outputs) // self.scale.n_subsets

    def of_seed(self, seed: int) -> np.ndarray:
        """Return the outputs of one seed, (n_subsets, n_query), for the first subsets, those that have it."""
        return np.stack([outputs for (_, own), outputs in self.outputs.items() if own == seed])

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to save. The masks are packed: np.unpackbits(masks, axis=1, count=n_train) restores them, one row per run."""
        runs = np.asarray(list(self.outputs), dtype=np.int32).reshape(-1, 2)
        return {
            "masks": np.packbits(self.masks[runs[:, 0]], axis=1),
            "n_train": np.asarray(self.masks.shape[1]),
            "subset": runs[:, 0],
            "seed": runs[:, 1],
            "outputs": np.stack(list(self.outputs.values())),
        }


def train_one(
    runs: Runs,
    seed: int,
    subset: Tensor,
    images: Sequence[Images],
    results: Results,
    *,
    after_epoch: Callable[[int], None] = lambda epoch: None,
) -> list[np.ndarray]:
    """Train a network and return its outputs; a run that diverges is noted, and another seed takes its place.

    Raises:
        FloatingPointError: If three diverge.
    """
    for attempt in range(3):
        try:
            runs.run(seed + attempt * OTHER_SEEDS, subset, after_epoch=after_epoch)
            return [runs.outputs(some) for some in images]
        except FloatingPointError as error:
            results.note(f"The run of seed {seed + attempt * OTHER_SEEDS} diverged: {error}")
    raise FloatingPointError(f"Three runs on the same {len(subset)} rows diverged; try a lower learning rate.")


def train_full(runs: Runs, scale: Scale, train: Images, queries: Images, results: Results) -> list[Trajectory]:
    """Train on everything, and keep the weights along the way."""
    trajectories: list[Trajectory] = []
    seconds, accuracies = [], []
    for seed in range(N_FULL):
        states: dict[int, State] = {}

        def keep(epoch: int, states: dict[int, State] = states) -> None:
            if epoch in scale.kept_epochs:
                states[epoch] = runs.state()

        start = time.perf_counter()
        margins = train_one(runs, FULL_SEEDS + seed, torch.arange(len(train)), (train, queries), results, after_epoch=keep)
        seconds.append(time.perf_counter() - start)
        accuracies.append([float((one > 0).mean()) for one in margins])
        trajectories.append(states)
    add_spread(results, "run on the whole training set", "train_run_s", seconds, "s")
    for name, values in zip(("training", "test"), zip(*accuracies, strict=True), strict=True):
        add_spread(results, f"runs on the whole training set, {name} rows", "accuracy", list(values), "")
    results.save()
    return trajectories


def add_spread(results: Results, method: str, metric: str, values: list[float], unit: str) -> None:
    results.add(method, metric, float(np.median(values)), unit, [min(values), max(values)], n_runs=len(values))


def train_halves(runs: Runs, scale: Scale, truth: GroundTruth, queries: Images, results: Results) -> None:
    """Train on random halves until the time for it is used."""
    seconds: list[float] = []
    accuracies: list[float] = []
    most = 2 * scale.n_subsets
    while len(seconds) < most and results.used() + max(seconds, default=0) / results.options.seconds < TRAINING_SHARE:
        start = time.perf_counter()
        subset, seed = truth.next()
        rows = torch.from_numpy(np.flatnonzero(truth.masks[subset]))
        (truth.outputs[subset, seed],) = train_one(runs, subset + scale.n_subsets * seed, rows, (queries,), results)
        seconds.append(time.perf_counter() - start)
        accuracies.append(float((truth.outputs[subset, seed] > 0).mean()))
        results.save_arrays("", **truth.arrays())
    if truth.n_subsets < 2:
        raise SystemExit(
            f"The LDS needs two subsets at least, but {truth.n_subsets} were trained in {results.used():.0%} of the time. Give more --seconds."
        )
    add_spread(results, "run on a half", "train_run_s", seconds, "s")
    add_spread(results, "runs on halves, test rows", "accuracy", accuracies, "")
    if (n_twice := len(truth.outputs) - truth.n_subsets) >= SECOND_SEEDS:
        both = np.stack([truth.of_seed(0)[:n_twice], truth.of_seed(1)])
        found = ground_truth_reliability(both)
        results.add(
            "ceiling of one run per subset",
            "lds_ceiling",
            float(np.sqrt(max(found.split_half, 0))),
            "Spearman",
            n_twice=n_twice,
        )


class Member(NamedTuple):
    """Features at one point of one run, on the device."""

    features: Tensor
    out_to_loss: Tensor
    gram: Tensor
    queries: Tensor


class Gradients:
    """Features of both sets at any weights, by one featurizer whose weights are replaced."""

    def __init__(self, scale: Scale, train: Images, queries: Images, results: Results) -> None:
        self.scale = scale
        self.train = train
        self.both = Images(*(torch.cat(parts) for parts in zip(train, queries, strict=True)))
        self.results = results
        config = ResNet9Config(width=scale.width, num_labels=2)
        self.model = ResNet9ForImageClassification(config).to(train.pixels.device).eval()
        self.featurizer = Featurizer(
            self.model, TrakConfig(proj_dim=scale.proj_dim, label_mapping="by_id"), device=train.pixels.device
        )
        self.rates: list[float] = []
        if ring.kernels_for(train.pixels.device) is not None:
            self._check_kernels()

    def _check_kernels(self) -> None:
        """Turn the sketch's Triton kernels off where they fail, or differ from plain tensors."""

        def no_kernels(device: torch.device) -> None: ...

        kernels_for, found = ring.kernels_for, []
        for chosen in (no_kernels, kernels_for):
            ring.kernels_for = chosen  # type: ignore[assignment]
            try:
                found.append(self._features_of_few())
            except Exception as error:  # a compiler raises whatever it likes
                self.results.note(f"The sketch with {chosen.__name__} fails: {type(error).__name__}: {error}")
        difference = ((found[0] - found[1]).norm() / found[0].norm()).item() if len(found) == 2 else math.inf
        serve = difference < KERNEL_TOLERANCE
        ring.kernels_for = kernels_for if serve else no_kernels  # type: ignore[assignment]
        self.results.note(
            f"The sketch's Triton kernels are {'on' if serve else 'off'}; they differ from plain tensors by {difference:.1e}."
        )

    def _few(self) -> dict[str, Tensor]:
        """Return the last queries as a batch."""
        return {key: values[-6:] for key, values in zip(("pixel_values", "labels"), self.both, strict=True)}

    def _features_of_few(self) -> Tensor:
        task, selection, projector, _ = self.featurizer.prepare()
        arguments = {"output_function": task.output_function, "parameters": selection.parameters, "projector": projector}
        return layerwise_features(self.model, self._few(), **arguments).features

    def load(self, trajectory: Trajectory, epoch: int) -> None:
        self.model.load_state_dict(trajectory[epoch])

    def load_line(self, trajectory: Trajectory, alpha: float, *, statistics: bool) -> None:
        """Move to a point of the line from the initial weights.

        Args:
            statistics (`bool`): Measure the activations' means and variances there, instead of taking the line's.
        """
        self.load(trajectory, max(trajectory))
        move_to_point(self.model, trajectory[0], alpha)
        if statistics:
            measure_statistics(self.model, self.train)

    def member(self) -> Member:
        """Return the features at the weights that were loaded.

        Raises:
            FloatingPointError: If one is not finite.
        """
        start = time.perf_counter()
        batches = [self.featurizer.features(batch) for batch in self.both.batches(500)]
        features, out_to_loss = (
            torch.cat(parts) for parts in zip(*((b.features, b.out_to_loss) for b in batches), strict=True)
        )
        if not (features.isfinite().all() and out_to_loss.isfinite().all()):
            raise FloatingPointError("Some features are not finite.")
        self.rates.append(len(features) / (time.perf_counter() - start))
        n_train, proj_dim = len(self.train), self.scale.proj_dim
        gram = torch.zeros(proj_dim, proj_dim, dtype=torch.float64, device=features.device)
        accumulate_gram(gram, features[:n_train])
        return Member(features[:n_train], out_to_loss[:n_train], gram, features[n_train:])

    def error(self) -> float:
        """Return the median relative error of a few queries' features, beside autograd in float64 on the CPU."""
        few = self._few()
        ours = self.featurizer.features(few).features.cpu().double()
        model = ResNet9ForImageClassification(self.model.config).double().eval()
        model.load_state_dict({name: values.cpu() for name, values in self.model.state_dict().items()})
        projector = make_projector("block_count_sketch", proj_dim=self.scale.proj_dim, seed=0, fold=TrakConfig().fold)
        parameters = dict(model.named_parameters())
        errors = []
        for row, found in enumerate(ours):
            one = {key: values[row : row + 1].cpu() for key, values in few.items()}
            logits = model(pixel_values=one["pixel_values"].double()).logits[0]
            label = int(one["labels"])
            output = logits[label] - logits[1 - label]  # of two classes
            accumulator = projector.start(1, dtype=torch.float64, device=torch.device("cpu"))
            for name, grad in zip(parameters, torch.autograd.grad(output, list(parameters.values())), strict=True):
                projector.add(accumulator, name, grad.unsqueeze(0))
            expected = projector.finish(accumulator)[0]
            errors.append(((found - expected).norm() / expected.norm()).item())
        return float(np.median(errors))


@torch.no_grad()
def measure_statistics(model: nn.Module, train: Images) -> None:
    """Replace the running means and variances of batch normalization by those of the training set at the model's weights."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
    model.train()
    for batch in train.batches(500):
        model(pixel_values=batch["pixel_values"])
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@dataclass(frozen=True)
class Method:
    """How features become scores."""

    name: str
    damping: float
    power: float
    reference_rescale: bool = False
    combination: str = "scaled"
    role: str = ""

    def scores(self, members: Sequence[Member]) -> Tensor:
        """Return the scores of an ensemble, (n_train, n_query)."""
        solved = []
        for member in members:
            n_rows = len(member.features)
            found = precondition(
                member.queries,
                member.gram,
                n_rows=n_rows,
                damping=self.damping,
                reference_rescale=self.reference_rescale,
                dtype=torch.float32,
            )
            rms = influence_rms(found, member.gram, n_rows=n_rows) if self.combination == "scaled" else None
            solved.append(SolvedQueries(found, None, rms))
        queries = [one.preconditioned for one in bring_to_one_scale(solved)]
        blocks = [MemberBlock(member.features, member.out_to_loss) for member in members]
        scores = score_blocks(iter([blocks]), queries, out_to_loss_power=self.power, combination=self.combination)
        return torch.cat(list(scores))


class Judge:
    """LDS and its bootstrap over subsets, with the same draws for all scores."""

    def __init__(self, masks: np.ndarray, outputs: np.ndarray, n_draws: int, device: torch.device) -> None:
        self.masks, self.outputs = masks, outputs
        self.on_device = torch.from_numpy(outputs).to(device)
        drawn = np.random.default_rng(0).integers(len(masks), size=(n_draws, len(masks)))
        # Ranks are found by comparing every subset with every other one, some draws at a time.
        at_once = max(1, int(2e8) // (len(masks) ** 2 * outputs.shape[1]))
        self.draws = torch.from_numpy(drawn).to(device).split(at_once)

    def __call__(self, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return the LDS, first of all subsets and then of each draw, and what is predicted of each subset.

        Raises:
            FloatingPointError: If a score is not finite.
        """
        if not scores.isfinite().all():
            raise FloatingPointError("Some scores are not finite.")
        predictions = predicted_outputs(scores.cpu().numpy(), self.masks)
        on_device = torch.from_numpy(predictions).to(self.on_device.device)
        values = [torch.tensor([np.nanmean(spearman(predictions, self.outputs))])]
        for draws in self.draws:
            sides = [_columns(values[draws]) for values in (on_device, self.on_device)]
            each = spearman_on_device(*sides, torch.ones_like(sides[0], dtype=torch.bool))
            values.append(each.view(len(draws), -1).mean(1).cpu())
        return torch.cat(values).numpy(), predictions


def _columns(values: Tensor) -> Tensor:
    """(n_draws, n_subsets, n_query) -> (n_subsets, n_draws · n_query)"""
    return values.transpose(0, 1).flatten(1)


def methods_at(point: str, *, final: bool, n_members: int) -> list[Method]:
    """Return what is judged at a point; what is published is so of final weights alone."""
    power, auto = default_power("one_minus_p"), default_damping(n_members)
    found = [Method(f"{point}, damping auto", auto, power, role="default")]
    found += [Method(f"{point}, damping {damping:g}", damping, power) for damping in DAMPINGS]
    if final:
        found += [
            Method(f"{point}, {PUBLISHED}", 0.0, 1.0, combination="means", role="published"),
            Method(f"{point}, {REFERENCE}", 0.0, 1.0, reference_rescale=True, combination="means"),
            Method(f"{point}, damping auto, out_to_loss_power 1", auto, 1.0),
            Method(f"{point}, damping 0, out_to_loss_power {power:g}", 0.0, power),
        ]
    return found


class Comparison:
    """Judges every method at a point: of one run, the mean over the runs; and of all runs together."""

    def __init__(self, judge: Judge, results: Results) -> None:
        self.judge = judge
        self.results = results
        self.published: dict[int, np.ndarray] = {}
        self.pending: list[tuple[str, int, np.ndarray]] = []

    def point(self, name: str, members: Sequence[Member], *, final: bool) -> None:
        for groups in ([[member] for member in members], [list(members)]):
            for method in methods_at(name, final=final, n_members=len(groups[0])):
                self._judge(method, groups)
        self._differences()
        self.results.save()
        self.results.save_arrays("_predictions", **self.results.predictions)

    def _judge(self, method: Method, groups: Sequence[Sequence[Member]]) -> None:
        n = len(groups[0])
        damped = self._score(method, groups)
        if damped is None:
            return
        method, scores = damped
        judged = [self.judge(one) for one in scores]
        values = np.mean([one for one, _ in judged], axis=0)
        for number, (_, predictions) in enumerate(judged):
            key = f"{method.name}, of {n}" + (f", run {number}" if len(judged) > 1 else "")
            self.results.predictions[key] = _as_ranks(predictions)
        settings = {"n_checkpoints": n, "damping": method.damping, "out_to_loss_power": method.power}
        each = {"each_run": [float(one[0]) for one, _ in judged]} if len(judged) > 1 else {}
        interval = list(percentile_interval(values[1:].tolist(), 0.95))
        self.results.add(method.name, "lds", float(values[0]), "Spearman", interval, **settings, **each)
        if method.role == "published":
            self.published[n] = values
        if method.role == "default":
            self.pending.append((method.name, n, values))

    def _score(self, method: Method, groups: Sequence[Sequence[Member]]) -> tuple[Method, list[Tensor]] | None:
        """Return the scores of every group, and the method they are of; None where there are none.

        Where a Gram matrix is singular without damping, the least damping that serves takes its place, and the method's name says so.
        """
        for damping in (method.damping,) if method.damping else (0.0, *LEAST):
            name = (
                method.name if damping == method.damping else f"{method.name} ({damping:g}, since the Gram matrix is singular)"
            )
            tried = replace(method, name=name, damping=damping)
            try:
                return tried, [tried.scores(group) for group in groups]
            except ValueError as error:
                self.results.note(f"{name}, of {len(groups[0])}: {error}")
        return None

    def _differences(self) -> None:
        """Hold every default beside what is published, draw by draw."""
        for name, n, values in self.pending:
            if n in self.published:
                more = values - self.published[n]
                interval = list(percentile_interval(more[1:].tolist(), 0.95))
                self.results.add(
                    f"{name}, less the published", "lds_difference", float(more[0]), "Spearman", interval, n_checkpoints=n
                )
        self.pending.clear()


def _as_ranks(predictions: np.ndarray) -> np.ndarray:
    """Return each column's ranks, all that a rank correlation needs, in as few bytes as hold them."""
    return predictions.argsort(0).argsort(0).astype(np.uint8 if len(predictions) <= 256 else np.uint16)


def points(scale: Scale, gradients: Gradients) -> list[tuple[str, Callable[[Trajectory], None]]]:
    """Return every point and how to go there on a run, the most interesting first."""
    last = max(scale.kept_epochs)

    def epoch(number: int) -> tuple[str, Callable[[Trajectory], None]]:
        name = f"epoch {number}" + (", final weights" if number == last else "")
        return name, functools.partial(gradients.load, epoch=number)

    def line(alpha: float, *, statistics: bool) -> tuple[str, Callable[[Trajectory], None]]:
        name = f"line from the initial weights, α = {alpha:g}" + (", statistics measured there" if statistics else "")
        return name, functools.partial(gradients.load_line, alpha=alpha, statistics=statistics)

    middle, *others = scale.line
    first = [epoch(last), line(middle, statistics=False), *map(epoch, scale.epochs_of_interest[:3])]
    lines = [line(middle, statistics=True), *(line(alpha, statistics=False) for alpha in others)]
    rest = [*map(epoch, scale.epochs_of_interest[3:]), *(line(alpha, statistics=True) for alpha in others)]
    return [*first, *lines, *rest]


def attribute(gradients: Gradients, compare: Comparison, trajectories: Sequence[Trajectory], results: Results) -> None:
    """Judge one point after another until the time is used."""
    seconds: list[float] = []
    planned = points(gradients.scale, gradients)
    for number, (name, move) in enumerate(planned):
        if seconds and results.used() + max(seconds) / results.options.seconds > SCORING_SHARE:
            results.note(f"No time for {len(planned) - number} points: {', '.join(left for left, _ in planned[number:])}.")
            break
        start = time.perf_counter()
        members = []
        try:
            for trajectory in trajectories:
                move(trajectory)
                members.append(gradients.member())
        except (FloatingPointError, ValueError, torch.OutOfMemoryError) as error:
            results.note(f"{name} is left out: {error}")
            continue
        if number == 0:
            results.note(f"Gradients by {gradients.featurizer.engine}.")
            error = gradients.error()
            results.add("features of final weights, beside float64", "relative_error", error, "")
            if not error < 0.05:
                raise SystemExit(f"Wrong answer: features differ from float64 autograd by {error:.1e}.")
        compare.point(name, members, final=number == 0)
        seconds.append(time.perf_counter() - start)
    if rates := gradients.rates[1:]:  # the first pass warms up
        results.add("featurizing", "featurize_rows_per_s", float(np.median(rates)), "rows/s", [min(rates), max(rates)])


def main(options: argparse.Namespace) -> None:
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("There is no CUDA device here. To see whether the benchmark runs: --device cpu --scale tiny")
    scale = SCALES[options.scale]
    results = Results(options)
    device = torch.device(options.device)
    with results.stage("loading"):
        train = Images.load(options.data / "train.parquet", device, most=scale.n_train)
        queries = Images.load(options.data / "test.parquet", device, most=scale.n_query)
    results.case = (
        f"CIFAR-2, ResNet-9 of width {scale.width} from scratch, {scale.recipe.epochs} epochs, {len(train):,} training rows, "
        f"{len(queries):,} queries"
    )
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # outputs and features are float32's; training is in bfloat16
        torch.backends.cudnn.benchmark = True
    recipe = replace(scale.recipe, batch_size=batch_size_for(len(train), most=scale.largest_batch))
    results.note(f"Batches of {recipe.batch_size}, so that all steps are alike; as published, 512.")
    with results.stage("preparing a step"):
        runs = Runs(train, recipe, width=scale.width, note=results.note)
    with results.stage("training on everything"):
        trajectories = train_full(runs, scale, train, queries, results)
    truth = GroundTruth(make_masks(len(train), scale.n_subsets), scale)
    with results.stage("training on halves"):
        train_halves(runs, scale, truth, queries, results)
    torch.backends.cudnn.benchmark = False
    results.case += f", {truth.n_subsets} subsets, proj_dim {scale.proj_dim}"
    judge = Judge(truth.masks[: truth.n_subsets], truth.of_seed(0), scale.n_draws, device)
    with results.stage("attributing"):
        gradients = Gradients(scale, train, queries, results)
        attribute(gradients, Comparison(judge, results), trajectories, results)
    results.add("everything", "stage_s", time.time() - results.begun, "s")
    results.save()


def stop(*_: Any) -> None:
    """Leave by an exception, so that a file being written is not left half written under a temporary name."""
    raise SystemExit("Stopped; what was found until now is written.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    main(parse())
