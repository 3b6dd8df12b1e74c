"""What the sketch costs in attribution quality: LDS with each sketch of the same gradients, at equal proj_dim.

    python benchmarks/sketch_lds.py --train train.parquet --queries queries.parquet --checkpoint my-bert \\
        --ground_truth ground_truth.parquet --output results/sketch_lds.json

`train`, `queries` and `ground_truth` are what `scripts/train_subsets.py` writes. Every gradient is computed once, some parameters at
a time, and all sketches read the same numbers, so that they differ by their randomness alone. LDS is that of one checkpoint; the
interval is over sketch seeds (two standard errors of their mean), for the subsets and queries are the same for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from featurize import write
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_trak import Featurizer, TrakConfig
from hf_trak.evaluation import ground_truth_from, lds
from hf_trak.gradients import layerwise_features
from hf_trak.linalg import accumulate_gram, factor, solve
from hf_trak.projectors import BlockCountSketch, DenseRademacher, Identity, Projector

CPU = torch.device("cpu")
_GROUP = 1 << 18  # gradient entries per example that are made in one pass
_BLOCK = 1 << 29  # gradient entries that exist at one time


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="training set of the ground truth, Parquet")
    parser.add_argument("--queries", required=True, help="its queries, Parquet")
    parser.add_argument("--checkpoint", required=True, help="a model trained on all of the training set")
    parser.add_argument(
        "--ground_truth", help="outputs of models retrained on subsets, Parquet; without, features are only kept"
    )
    parser.add_argument("--features", type=Path, help="safetensors file to keep the features in, or to find them in")
    parser.add_argument("--parameters", nargs="+", help="regular expressions; by default, all parameters")
    parser.add_argument("--proj_dim", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--damping", type=float, nargs="+", default=[0.1, 3.0])
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seeds", type=int, default=6, help="sketch seeds of the count sketches")
    parser.add_argument("--dense_seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/sketch_lds.json"))
    return parser.parse_args()


def parquet(path: str) -> Dataset:
    return load_dataset("parquet", data_files={"train": path}, split="train")


def groups_of(parameters: dict[str, torch.nn.Parameter]) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Parameters in groups of at most `_GROUP` entries, or alone."""
    group: dict[str, torch.nn.Parameter] = {}
    for name, parameter in parameters.items():
        if group and sum(p.numel() for p in group.values()) + parameter.numel() > _GROUP:
            yield group
            group = {}
        group[name] = parameter
    yield group


def gradients(
    featurizer: Featurizer, dataset: Dataset, group: dict[str, torch.nn.Parameter], *, batch_size: int = 64
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield rows, their gradients of a group of parameters (rows, entries), and their out_to_loss (rows,)."""
    sizes = {name: parameter.numel() for name, parameter in group.items()}
    identity = Identity(proj_dim=sum(sizes.values()), sizes=sizes)
    block_size = max(batch_size, _BLOCK // sum(sizes.values()) // batch_size * batch_size)
    for first in range(0, len(dataset), block_size):
        features, out_to_loss = [], []
        rows = range(first, min(first + block_size, len(dataset)))
        for start in range(0, len(rows), batch_size):
            batch = featurizer.task.collate(dataset[list(rows[start : start + batch_size])], featurizer.processing_class)
            result = layerwise_features(
                featurizer.model, batch, output_function=featurizer.task.output_function, parameters=group, projector=identity
            )
            features.append(result.features)
            out_to_loss.append(result.out_to_loss)
        yield slice(rows.start, rows.stop), torch.cat(features), torch.cat(out_to_loss)


def sketch_all(
    featurizer: Featurizer, datasets: list[Dataset], projectors: dict[tuple[str, int, int], Projector]
) -> tuple[dict[tuple[str, int, int], list[Tensor]], Tensor]:
    """Return the features of each dataset under every projector, from one computation of the gradients; and out_to_loss."""
    accumulators = {
        key: [projector.start(len(dataset), dtype=torch.float32, device=CPU) for dataset in datasets]
        for key, projector in projectors.items()
    }
    out_to_loss = torch.empty(len(datasets[0]))
    for group in groups_of(featurizer.selection.parameters):
        for number, dataset in enumerate(datasets):
            for rows, grads, weights in gradients(featurizer, dataset, group):
                if number == 0:
                    out_to_loss[rows] = weights
                pieces = dict(zip(group, grads.split([p.numel() for p in group.values()], dim=1), strict=True))
                for key, projector in projectors.items():
                    for name, piece in pieces.items():
                        projector.add(accumulators[key][number][rows], name, piece.view(-1, *group[name].shape))
        print(", ".join(group), flush=True)
    features = {key: [projectors[key].finish(values) for values in accumulator] for key, accumulator in accumulators.items()}
    return features, out_to_loss


def save_features(path: Path, features: dict[tuple[str, int, int], list[Tensor]], out_to_loss: Tensor) -> None:
    tensors = {f"{'|'.join(map(str, key))}|{i}": value for key, values in features.items() for i, value in enumerate(values)}
    save_file({**tensors, "out_to_loss": out_to_loss}, path)


def load_features(
    path: Path, projectors: dict[tuple[str, int, int], Projector]
) -> tuple[dict[tuple[str, int, int], list[Tensor]], Tensor]:
    tensors = load_file(path)
    return {key: [tensors[f"{'|'.join(map(str, key))}|{i}"] for i in (0, 1)] for key in projectors}, tensors["out_to_loss"]


def scores(features: list[Tensor], out_to_loss: Tensor, damping: float) -> Tensor:
    train, queries = features
    gram = torch.zeros(train.shape[1], train.shape[1], dtype=torch.float64)
    accumulate_gram(gram, train)
    cholesky = factor(gram, n_rows=len(train), damping=damping)
    return (train.double() @ solve(cholesky, queries).T) * out_to_loss.double().unsqueeze(1)


def make_projectors(options: argparse.Namespace) -> dict[tuple[str, int, int], Projector]:
    projectors: dict[tuple[str, int, int], Projector] = {}
    for proj_dim in options.proj_dim:
        for seed in range(options.dense_seeds):
            projectors["dense_rademacher", proj_dim, seed] = DenseRademacher(proj_dim=proj_dim, seed=seed)
        for fold in options.folds:
            for seed in range(options.seeds):
                name = f"block_count_sketch, fold {fold}"
                projectors[name, proj_dim, seed] = BlockCountSketch(proj_dim=proj_dim, seed=seed, fold=fold)
    return projectors


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    train, queries = parquet(options.train), parquet(options.queries)
    featurizer = Featurizer(options.checkpoint, TrakConfig(proj_dim=min(options.proj_dim), parameters=options.parameters))
    projectors = make_projectors(options)
    if options.features and options.features.exists():
        features, out_to_loss = load_features(options.features, projectors)
    else:
        features, out_to_loss = sketch_all(featurizer, [train, queries], projectors)
    if options.features:
        save_features(options.features, features, out_to_loss)
    if options.ground_truth is None:
        return
    masks, outputs = ground_truth_from(parquet(options.ground_truth))
    n_seeds, n_subsets, n_query = outputs.shape
    parameters = featurizer.selection.grad_dim
    case = (
        f"{type(featurizer.model).__name__}, {parameters / 1e6:.1f}M parameters, {len(train)} rows, {n_query} queries, "
        f"{n_subsets} half-subsets × {n_seeds} seeds, one checkpoint"
    )
    rows = []
    for damping in options.damping:
        for method, proj_dim in dict.fromkeys((method, proj_dim) for method, proj_dim, _ in projectors):
            values = [
                lds(scores(features[key], out_to_loss, damping).numpy(), masks, outputs, n_bootstrap=0).value
                for key in projectors
                if key[:2] == (method, proj_dim)
            ]
            spread = 2 * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            mean = statistics.mean(values)
            rows.append(
                {
                    "case": f"{case}, proj_dim {proj_dim}, damping {damping:g}, mean of {len(values)} sketch seeds",
                    "method": method,
                    "metric": "lds",
                    "value": mean,
                    "unit": "",
                    "interval": [mean - spread, mean + spread],
                    "values": values,
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    write(options, rows, command="python benchmarks/sketch_lds.py")


if __name__ == "__main__":
    main()
