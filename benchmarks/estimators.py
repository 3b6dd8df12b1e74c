"""What other estimators do in place of the default, at points of the line from the base: a table of LDS, and paired differences.

    python benchmarks/estimators.py --setting sst2 --model bert-mini --job W/text/full --ground_truth results/ground_truth_text.parquet \\
        --work W/est --output results/estimators_text.json

The job is one that `path.py` has been run on. Gradients are sketched at the points of the default (α = .2, .5, .8), once whole, once by
block of the network (embeddings, and each layer's attention and feed-forward part), and once divided by the fourth root of the second
moments of batch gradients, as Adam has them. The variants are computed from these with float64 solves, and combined as the default combines
members. EK-FAC (kronfluence) is computed at the same points. Differences are paired over subsets: each bootstrap draw judges both.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from featurize import write
from lds_setting import as_row
from path import Run, parser_of_a_run
from torch import Tensor

from hf_trak import Featurizer, TrakConfig
from hf_trak.evaluation.baselines import Checkpoints, make_baseline
from hf_trak.linalg import DEFAULT_DAMPING
from hf_trak.members import DEFAULT_ALPHAS
from hf_trak.projectors import Projector, StackedProjector, make_projector

SIZE, BATCH = 2048, 32
WHOLE, ADAM = "whole", "adam"
REFERENCE = "one sketch, one Gram matrix (the default)"


# Gradients


def block_of(name: str) -> str:
    """Return which block of the network a parameter belongs to."""
    if "embed" in name:
        return "embeddings"
    if layer := re.search(r"layers?\.(\d+)\.(\w+)", name):
        return f"{layer[1]} {'attention' if 'att' in layer[2] or layer[2] == 'input_layernorm' else 'feed-forward'}"
    return name.split(".")[0]


class ByBlock(Projector):
    """A separate sketch for each block of the network. The features are the sketches, one after the other."""

    def __init__(self, blocks: list[str]) -> None:
        super().__init__(proj_dim=SIZE * len(blocks), seed=0)
        self.blocks = blocks
        self.sketches = [make_projector("block_count_sketch", proj_dim=SIZE, seed=1 + number) for number in range(len(blocks))]
        self.width = self.sketches[0].start(0, dtype=torch.float32, device=torch.device("cpu")).shape[1]

    def start(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.cat([sketch.start(batch_size, dtype=dtype, device=device) for sketch in self.sketches], 1)

    def _part(self, accumulator: Tensor, name: str) -> tuple[Projector, Tensor]:
        number = self.blocks.index(block_of(name))
        return self.sketches[number], accumulator[:, number * self.width : (number + 1) * self.width]

    def add(self, accumulator: Tensor, name: str, grads: Tensor) -> None:
        sketch, part = self._part(accumulator, name)
        sketch.add(part, name, grads)

    def add_outer(self, accumulator: Tensor, name: str, left: Tensor, right: Tensor) -> None:
        sketch, part = self._part(accumulator, name)
        sketch.add_outer(part, name, left, right)

    def add_rows(self, accumulator: Tensor, name: str, shape: tuple[int, int], rows: Tensor, values: Tensor) -> None:
        sketch, part = self._part(accumulator, name)
        sketch.add_rows(part, name, shape, rows, values)

    def finish(self, accumulator: Tensor) -> Tensor:
        parts = accumulator.split(self.width, 1)
        return torch.cat([sketch.finish(part) for sketch, part in zip(self.sketches, parts, strict=True)], 1)


class Divided(Projector):
    """The sketch of gradients that are divided by a number per weight."""

    def __init__(self, divisors: dict[str, Tensor]) -> None:
        super().__init__(proj_dim=SIZE, seed=0)
        self.sketch, self.divisors = make_projector("block_count_sketch", proj_dim=SIZE, seed=0), divisors

    def start(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.sketch.start(batch_size, dtype=dtype, device=device)

    def add(self, accumulator: Tensor, name: str, grads: Tensor) -> None:
        self.sketch.add(accumulator, name, grads / self.divisors[name])

    def finish(self, accumulator: Tensor) -> Tensor:
        return self.sketch.finish(accumulator)


def second_moments(featurizer: Featurizer, train: Dataset) -> dict[str, Tensor]:
    """Return the mean, over batches of the training set, of the squared gradient of a batch's mean loss."""
    parameters = featurizer.selection.parameters
    moments = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    order = np.random.default_rng(0).permutation(len(train))
    batches = [order[begin : begin + BATCH] for begin in range(0, len(order), BATCH)]
    model = featurizer.model.eval()
    for rows in batches:
        batch = featurizer.collate(train[rows.tolist()])
        output, out_to_loss = featurizer.task.output_function(model, dict(batch))
        # The loss's derivative in the output is -Q.
        grads = torch.autograd.grad((out_to_loss.detach() * output).mean(), list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                moments[name] += grad.square() / len(batches)
    return moments


def features_at(options: argparse.Namespace, point: dict[str, Any], train: Dataset, queries: Dataset) -> dict[str, np.ndarray]:
    """Return the features of both datasets at a point: whole, by block and divided. What an earlier call found is found again."""
    found = options.work / f"{options.setting}-{point['alpha']:g}.npz"
    if not found.exists():
        featurizer = Featurizer(config=TrakConfig(proj_dim=SIZE, label_mapping="by_id"), device="cpu", **point)
        featurizer.measure_statistics(train)
        featurizer.check(train)
        featurizer.choose_engine(train)
        moments = second_moments(featurizer, train)
        divisors = {name: moment.clamp(min=1e-16).pow(0.25) for name, moment in moments.items()}
        blocks = sorted({block_of(name) for name in featurizer.selection.parameters})
        whole = make_projector("block_count_sketch", proj_dim=SIZE, seed=0)
        projector = StackedProjector([whole, Divided(divisors), ByBlock(blocks)])
        columns: dict[str, np.ndarray] = {"blocks": np.array(blocks)}
        for side, rows in (("train", train), ("queries", queries)):
            batches = [featurizer.collate(rows[begin : begin + 8]) for begin in range(0, len(rows), 8)]
            results = [featurizer.features(batch, projector=projector) for batch in batches]
            features = torch.cat([result.features for result in results]).numpy()
            columns[f"{side} {WHOLE}"], columns[f"{side} {ADAM}"], *by_block = np.split(
                features, range(SIZE, projector.proj_dim, SIZE), axis=1
            )
            columns[f"{side} by block"] = np.stack(by_block, 1)
            columns[f"{side} out_to_loss"] = torch.cat([result.out_to_loss for result in results]).numpy()
        found.parent.mkdir(parents=True, exist_ok=True)
        np.savez(found, **columns)
        print(f"features at α = {point['alpha']:g}", flush=True)
    with np.load(found) as kept:
        return dict(kept)


# Estimators


Sides = tuple[np.ndarray, np.ndarray]  # features of training rows and of queries


def influences(train: np.ndarray, queries: np.ndarray, *, mixed: float = 0.0, damping: float = DEFAULT_DAMPING) -> np.ndarray:
    """Return Φ(K + λμI)⁻¹φ of every training row and query.

    Args:
        mixed (`float`): Share of the queries' mean outer product in that of the Gram matrix.
    """
    rows, asked = train.astype(np.float64), queries.astype(np.float64)
    if not mixed and rows.shape[1] > len(rows):  # the same by a smaller system
        kernel = rows @ rows.T / len(rows)
        return np.linalg.solve(kernel + damping * np.trace(kernel) / len(rows) * np.eye(len(rows)), rows @ asked.T)
    gram = (1 - mixed) * rows.T @ rows / len(rows) + mixed * asked.T @ asked / len(asked)
    level = np.trace(gram) / min(len(rows), len(gram))
    return rows @ np.linalg.solve(gram + damping * level * np.eye(len(gram)), asked.T)


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-30)


def of_loss(columns: dict[str, np.ndarray], sides: Sides) -> np.ndarray:
    """Return influences with the Gram matrix of the loss's gradients."""
    weights = columns["train out_to_loss"].astype(np.float64)[:, None]
    return influences(sides[0] * weights, sides[1]) / weights.clip(1e-30)


def smaller(features: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Sketch features again, to fewer numbers."""
    sketch = make_projector("block_count_sketch", proj_dim=size, seed=100 + seed)
    accumulator = sketch.start(len(features), dtype=torch.float32, device=torch.device("cpu"))
    sketch.add(accumulator, "features", torch.from_numpy(features))
    return sketch.finish(accumulator).numpy()


def variants(columns: dict[str, np.ndarray]) -> dict[str, Callable[[], np.ndarray]]:
    """Return what computes the influences of each estimator at one point."""
    whole: Sides = columns[f"train {WHOLE}"], columns[f"queries {WHOLE}"]
    adam: Sides = columns[f"train {ADAM}"], columns[f"queries {ADAM}"]
    train, queries = columns["train by block"], columns["queries by block"]
    n_blocks = train.shape[1]
    share = SIZE // n_blocks

    def block(number: int, size: int) -> Sides:
        sides = train[:, number], queries[:, number]
        return sides if size == SIZE else (smaller(sides[0], size, number), smaller(sides[1], size, number))

    def together(size: int) -> Sides:
        parts = [block(number, size) for number in range(n_blocks)]
        return np.concatenate([part[0] for part in parts], 1), np.concatenate([part[1] for part in parts], 1)

    def apart(size: int) -> np.ndarray:
        return sum(influences(*block(number, size)) for number in range(n_blocks))  # type: ignore[return-value]

    return {
        REFERENCE: lambda: influences(*whole),
        "rows of unit length": lambda: influences(unit(whole[0]), unit(whole[1])),
        "half of the Gram matrix from the queries": lambda: influences(*whole, mixed=0.5),
        "the Gram matrix of the loss's gradients": lambda: of_loss(columns, whole),
        "gradients over the fourth root of Adam's second moments": lambda: influences(*adam),
        "equal budgets by block, one Gram matrix": lambda: influences(*together(share)),
        "equal budgets by block, a Gram matrix for each": lambda: apart(share),
        f"{n_blocks} × the numbers, one Gram matrix": lambda: influences(*together(SIZE)),
        f"{n_blocks} × the numbers, a Gram matrix for each block": lambda: apart(SIZE),
    }


def ekfac_at(options: argparse.Namespace, point: dict[str, Any], train: Dataset, queries: Dataset) -> np.ndarray:
    """Return EK-FAC's influences at a point, not weighted by Q; the final weights have no base."""
    found = options.work / f"{options.setting}-{point.get('alpha', 1):g}-ekfac.npy"
    if not found.exists():
        config = TrakConfig(proj_dim=SIZE, label_mapping="by_id")
        featurizer = Featurizer(config=config, device="cpu", **point)
        featurizer.measure_statistics(train)
        checkpoint = Checkpoints(featurizer.model, config, featurizer.processing_class)
        np.save(found, make_baseline("influence_ekfac", checkpoint)(train, queries))
        print(f"EK-FAC at α = {point.get('alpha', 1):g}", flush=True)
    return np.load(found)


def combine(members: list[np.ndarray], weights: list[np.ndarray]) -> np.ndarray:
    """Bring each member's influences to one root mean square per query, and weigh its rows."""
    scaled = [member / np.sqrt(np.square(member).mean(0, keepdims=True)) for member in members]
    return sum(weight[:, None] * member for weight, member in zip(weights, scaled, strict=True)) / len(members)  # type: ignore[return-value]


def main() -> None:
    parser = parser_of_a_run(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for features and EK-FAC's scores, which are kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, queries, judge, epochs, base = Run.load(options)
    final = epochs[-1]
    points = [{"model": final, "base": base, "alpha": alpha} for alpha in DEFAULT_ALPHAS]
    features = [features_at(options, point, train, queries) for point in points]
    weights = [columns["train out_to_loss"].astype(np.float64) for columns in features]
    found: dict[str, np.ndarray] = {}
    for method in variants(features[0]):
        found[method] = combine([variants(columns)[method]() for columns in features], weights)
    ones = [np.ones(len(train))] * len(points)  # EK-FAC's scores are of the loss's gradients, Q included
    try:
        found["EK-FAC at the same points"] = combine([ekfac_at(options, point, train, queries) for point in points], ones)
        found["EK-FAC at the final weights"] = ekfac_at(options, {"model": final}, train, queries)
    except ValueError as error:
        print(f"EK-FAC: {error}", flush=True)
    case = (
        f"{options.setting}, points α = {', '.join(f'{alpha:g}' for alpha in DEFAULT_ALPHAS)}, {SIZE} numbers a row and point"
    )
    rows: list[dict[str, Any]] = []
    reference = judge([found[REFERENCE]])
    for method, scores in found.items():
        values = judge([scores])
        rows.append(as_row(case, method, values))
        if method != REFERENCE:
            rows.append(as_row(case, method, values - reference, metric="lds_difference"))
        print(json.dumps(rows[-1]), f"{values[0]:.3f}", flush=True)
    write(options, rows, command=f"python benchmarks/estimators.py --setting {options.setting}")


if __name__ == "__main__":
    main()
