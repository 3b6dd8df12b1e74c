"""What a user gets on a GPU: rows per second of a whole index, from tokens to files, and of ranking it for some queries.

    python benchmarks/gpu_index.py --output results/gpu_index.json
    python benchmarks/gpu_index.py --scale tiny --output tiny.json      # does it run?

BERT-base with random weights and rows of random tokens, 16 to 256 of them, in float32, TF32 and bfloat16. The time is that of
`AttributionIndex.build`, with loading the model, the checks of its gradients, sorting rows by length and writing files. It is compared with
training on the same batches for one epoch, without the optimizer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from datasets import Dataset
from gpu import precision, row, save, synchronize

from hf_trak import AttributionIndex, Featurizer, TrakConfig
from hf_trak.featurizing import batching
from hf_trak.featurizing.batching import BatchSize, Budget, ShardBatches

SCALES = {"real": (768, 12, 20_000, 256), "tiny": (64, 2, 64, 24)}
"""Width, layers, rows and the longest row."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=list(SCALES), default="real")
    parser.add_argument("--proj_dim", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--top_k", type=int, default=100)
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "tf32", "float32"])
    parser.add_argument("--output", type=Path, default=Path("results/gpu_index.json"))
    return parser.parse_args()


def rows_of(n_rows: int, longest: int, *, seed: int = 0) -> Dataset:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(min(16, longest // 2), longest + 1, n_rows)
    ids = [generator.integers(1000, 30_000, length).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "label": generator.integers(0, 2, n_rows).tolist()})


def train(folder: Path, dataset: Dataset, config: TrakConfig) -> float:
    """Return the seconds of forward and backward over the batches that featurizing makes, read and collated as it does."""
    featurizer = Featurizer(str(folder), config)
    featurizer.prepare()
    model, device = featurizer.model.train(), featurizer.device
    shard = ShardBatches(range(len(dataset)), featurizer.lengths(dataset), BatchSize(automatic=featurizer.budget))
    times = []
    for _ in range(2):  # the first warms up
        synchronize()
        begin = time.perf_counter()
        for numbers in shard.batches():
            batch = {key: value.to(device, non_blocking=True) for key, value in featurizer.collate(dataset[numbers]).items()}
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.compute_dtype == "bfloat16"):
                loss = model(**batch).loss
            loss.backward()
            model.zero_grad(set_to_none=True)
        synchronize()
        times.append(time.perf_counter() - begin)
    return times[-1]


def main() -> None:
    options = parse()
    options.threads = torch.get_num_threads()
    width, layers, n_rows, longest = SCALES[options.scale]
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    settings = transformers.BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64, intermediate_size=4 * width
    )
    dataset, queries = rows_of(n_rows, longest), rows_of(options.queries, longest, seed=1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        transformers.BertForSequenceClassification(settings).save_pretrained(folder)
        usual = automatic_tokens()
        cases = [(name, usual) for name in options.precisions] + [(options.precisions[0], 4 * usual)]
        for number, (name, tokens) in enumerate(cases):
            config = TrakConfig(proj_dim=options.proj_dim, compute_dtype="bfloat16" if name == "bfloat16" else "float32")
            case = f"BERT-base shape, {n_rows:,} rows of up to {longest} tokens, {name}, {tokens:,} tokens a batch, proj_dim {options.proj_dim}"
            with precision(name), a_budget_of(tokens):
                training = train(folder, dataset, config)
                begin = time.perf_counter()
                index = AttributionIndex.build(
                    Path(scratch) / f"index_{number}", models=str(folder), dataset=dataset, config=config, progress=False
                )
                built = time.perf_counter() - begin
                begin = time.perf_counter()
                hits = index.attribute(queries, top_k=min(options.top_k, n_rows), progress=False)
                ranked = time.perf_counter() - begin
            assert len(hits) == options.queries
            method = "hf_trak AttributionIndex"
            rows += [
                row(case, method, "index_rows_per_s", [n_rows / built], "", engine=index.config.gradients),
                row(
                    case, method, "index_time_ratio", [built / training], "x", seconds_training=training, seconds_building=built
                ),
                row(case, method, "attribute_s", [ranked], "s", queries=options.queries, top_k=options.top_k),
            ]
            for one in rows[-3:]:
                print(json.dumps(one), flush=True)
            save(options, rows, command="python benchmarks/gpu_index.py")


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def automatic_tokens() -> int:
    return batching.automatic_budget(device_type()).tokens or 0


@contextmanager
def a_budget_of(tokens: int) -> Iterator[None]:
    """Let a batch of "auto" hold `tokens`."""
    with patch.dict(batching._BUDGETS, {device_type(): Budget(rows=1024, tokens=tokens)}):
        yield


if __name__ == "__main__":
    main()
