"""MadryLab/trak itself (`traker`) on the checkpoints of `benchmarks/lds.py`, and hf_trak's scores by its conventions beside it.

    python benchmarks/peers/traker_lds.py --folder out/image --ground_truth results/ground_truth_image.parquet \\
        --case "CIFAR-2, ..." --work out/lds_image --output results/traker_lds_image.json

traker featurizes and scores in an environment of its own, as its documentation has it, in float32 on the CPU. Ours are the scores of
`damping=0, out_to_loss_power=1, reference_rescale=True`. Both are run with several projection seeds: a difference has to be compared
with the spread of either. One seed gives `traker` the same projection for each run by itself, so that the mean over runs varies as much
as a single one does; ours have a projection each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from environment import ROOT, child_environment, default_cache
from run_traker import ENVIRONMENT, logits_of

if TYPE_CHECKING:
    import numpy as np
    import torch


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what scripts/train_subsets.py wrote: data and full")
    parser.add_argument("--ground_truth", type=Path, help="Parquet file of benchmarks/ground_truth.py")
    parser.add_argument("--case", default="", help="model, data, sizes")
    parser.add_argument("--work", type=Path, help="folder for indexes; what is there is used again")
    parser.add_argument("--runs", type=int, default=5, help="how many of the full runs")
    parser.add_argument("--seeds", type=int, default=6, help="projection seeds of either")
    parser.add_argument("--proj_dim", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where the peers' environments are kept")
    parser.add_argument("--output", type=Path, help="file of results")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def checkpoints_of(options: argparse.Namespace) -> list[Path]:
    """Return the last checkpoint of each full run."""
    runs = sorted((options.folder / "full" / "checkpoints").iterdir())[: options.runs]
    return [sorted(path for path in run.iterdir() if path.is_dir())[-1] for run in runs]


# --- in traker's environment ---


def score_inside(options: argparse.Namespace) -> None:
    """Write the scores of each run alone, and of all together, by seed: (seeds, runs + 1, n_train, n_query)."""
    import numpy as np
    import torch

    torch.set_num_threads(options.threads)
    models = [load_model(path) for path in checkpoints_of(options)]
    train, queries = (list(batches(options, name)) for name in ("train", "queries"))
    begin = time.process_time()
    groups = [[model] for model in models] + ([models] if len(models) > 1 else [])
    scores = [[score_group(group, train, queries, options, seed) for group in groups] for seed in range(options.seeds)]
    np.save(options.inside, np.array(scores))
    print(json.dumps({"cpu_s": time.process_time() - begin}))


def load_model(path: Path) -> torch.nn.Module:
    import transformers

    name = json.loads((path / "config.json").read_text())["architectures"][0]
    if not hasattr(transformers, name):  # our own ResNet-9, the one thing here that is not traker's
        sys.path += [str(ROOT), str(ROOT / "scripts")]
        import paper_models as library
    else:
        library = transformers
    return getattr(library, name).from_pretrained(path).eval()


def batches(options: argparse.Namespace, name: str) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield batches as traker takes them: inputs in the model's order, labels last."""
    import torch
    from datasets import Dataset
    from vmappable import as_tuple

    dataset = Dataset.from_parquet(str(options.folder / "data" / f"{name}.parquet"))
    keys = [
        key for key in ("input_ids", "token_type_ids", "attention_mask", "pixel_values", "labels") if key in dataset.features
    ]
    for start in range(0, len(dataset), options.batch_size):
        rows = dataset[start : start + options.batch_size]
        columns = {key: [torch.as_tensor(value) for value in rows[key]] for key in keys}
        ragged = {"input_ids", "token_type_ids", "attention_mask"}
        pad = torch.nn.utils.rnn.pad_sequence
        yield as_tuple({k: pad(v, batch_first=True) if k in ragged else torch.stack(v) for k, v in columns.items()})


def score_group(
    models: list[torch.nn.Module],
    train: list[tuple[torch.Tensor, ...]],
    queries: list[tuple[torch.Tensor, ...]],
    options: argparse.Namespace,
    seed: int,
) -> np.ndarray:
    """Return traker's scores with these checkpoints."""
    import numpy as np
    from trak import TRAKer
    from vmappable import eager_attention

    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            logits_of(models[0]),
            "image_classification" if len(train[0]) == 2 else "text_classification",
            train_set_size=sum(len(batch[-1]) for batch in train),
            save_dir=folder,
            device="cpu",
            use_half_precision=False,
            proj_dim=options.proj_dim,
            projector_seed=seed,
            logging_level=40,
        )
        states = [logits_of(model).state_dict() for model in models]
        with eager_attention(models[0]):
            for number, state in enumerate(states):
                traker.load_checkpoint(state, model_id=number)
                for batch in train:
                    traker.featurize(batch, num_samples=len(batch[-1]))
            traker.finalize_features()
            for number, state in enumerate(states):
                traker.start_scoring_checkpoint("queries", state, number, num_targets=sum(len(batch[-1]) for batch in queries))
                for batch in queries:
                    traker.score(batch, num_samples=len(batch[-1]))
            return np.array(traker.finalize_scores("queries"))


# --- in ours ---


def main(options: argparse.Namespace) -> None:
    import numpy as np

    sys.path.append(str(ROOT / "benchmarks"))
    from featurize import write
    from lds_setting import Judge, Setting, parquet

    from hf_trak.evaluation import ground_truth_from

    setting = Setting.load(options.folder, options.case)
    judge = Judge(ground_truth_from(parquet(options.ground_truth)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.npy"
        flags = [f"--{key}={getattr(options, key)}" for key in ("folder", "runs", "seeds", "proj_dim", "batch_size", "threads")]
        command = [str(ENVIRONMENT.python(options.cache)), __file__, f"--inside={path}", *flags]
        print(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=child_environment()).stdout)
        theirs = np.load(path)
    rows = list(compared(options, setting, judge, theirs))
    write(options, rows, command=f"python benchmarks/peers/traker_lds.py --output {options.output}")


def compared(options: argparse.Namespace, setting: Any, judge: Any, theirs: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yield LDS rows: the mean over seeds of traker's and of ours by its conventions, and their difference in its standard errors."""
    import numpy as np
    from lds_setting import Pool, as_row

    from hf_trak import TrakConfig

    paths = [str(path) for path in checkpoints_of(options)]
    pools = [
        Pool.make(
            options.work / f"traker_{options.proj_dim}_{seed}",
            paths,
            setting,
            options.proj_dim,
            config=TrakConfig(proj_dim=options.proj_dim, sketch_seed=100 * seed),
        )
        for seed in range(options.seeds)
    ]
    all_runs = list(range(len(paths)))
    for of, groups, chosen in (
        ("1 run", [[run] for run in all_runs], slice(0, len(paths))),
        (f"{len(paths)} runs", [all_runs], slice(len(paths), None)),
    ):
        if theirs[0, chosen].shape[0] == 0:
            continue
        case = f"{options.case}, proj_dim {options.proj_dim}, {of}, mean of {options.seeds} projection seeds"
        peer = np.array([judge(list(of_seed[chosen])) for of_seed in theirs])
        ours = np.array(
            [
                judge([pool.score(g, 0.0, reference_rescale=True, out_to_loss_power=1.0, combination="means") for g in groups])
                for pool in pools
            ]
        )
        yield {**as_row(case, ENVIRONMENT.method, peer.mean(0)), "seed_deviation": float(peer[:, 0].std(ddof=1))}
        method = "hf_trak, damping 0, out_to_loss_power 1, reference_rescale"
        yield {**as_row(case, method, ours.mean(0)), "seed_deviation": float(ours[:, 0].std(ddof=1))}
        difference = float(peer[:, 0].mean() - ours[:, 0].mean())
        error = float(np.sqrt((peer[:, 0].var(ddof=1) + ours[:, 0].var(ddof=1)) / options.seeds))
        yield {
            "case": case,
            "method": f"{ENVIRONMENT.method} - hf_trak (interval: two standard errors over seeds)",
            "metric": "lds_difference",
            "value": difference,
            "unit": "Spearman",
            "interval": [difference - 2 * error, difference + 2 * error],
        }


if __name__ == "__main__":
    arguments = parse()
    if arguments.inside:
        score_inside(arguments)
    else:
        main(arguments)
