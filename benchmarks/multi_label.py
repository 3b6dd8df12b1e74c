"""Which output of a multi-label classifier to attribute: the labels that apply, or all labels, each as the row has it.

    python benchmarks/multi_label.py            # results/multi_label_cpu.json; a few CPU-minutes on one thread

The rows are scikit-learn's digits with four labels each: even, above four, prime, a multiple of three. Digit 1 has no label. A small ResNet is
trained on random halves from scratch; LDS is taken of one run on all rows, for three outputs of the queries: minus the loss, the sum of
log-odds of the labels that apply, and the sum over all labels of the log-odds of what the row says.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from featurize import write
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from hf_trak import AttributionIndex, Task, TrakConfig
from hf_trak.evaluation.lds import lds

N_TRAIN, N_QUERIES, BATCH = 800, 200, 64
LABELS = {"even": (0, 2, 4, 6, 8), "above four": (5, 6, 7, 8, 9), "prime": (2, 3, 5, 7), "multiple of three": (0, 3, 6, 9)}
ALL, CHOSEN = "all labels, as the row has them", "labels that apply"
CASE = f"digits, 4 labels, ResNet, {N_TRAIN} rows, proj_dim 1024"


def make_model(seed: int) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_channels": 1}
    config = ResNetConfig(layer_type="basic", num_labels=len(LABELS), problem_type="multi_label_classification", **sizes)
    return ResNetForImageClassification(config)


def load_rows() -> tuple[Dataset, Dataset]:
    source = load_digits()
    pixels = np.kron(source.images[:, None].astype(np.float32) / 16, np.ones((1, 1, 2, 2), np.float32))
    labels = np.stack([np.isin(source.target, digits) for digits in LABELS.values()], 1).astype(np.float32)
    rows = Dataset.from_dict({"pixel_values": pixels, "labels": labels})
    chosen = np.random.default_rng(0).permutation(len(rows))
    return rows.select(chosen[:N_TRAIN]), rows.select(chosen[N_TRAIN : N_TRAIN + N_QUERIES])


def tensors(rows: Dataset) -> tuple[Tensor, Tensor]:
    columns = rows.with_format("torch")[:]
    return columns["pixel_values"], columns["labels"]


def train(rows: tuple[Tensor, Tensor], kept: np.ndarray, seed: int, *, epochs: int) -> tuple[Any, dict[int, dict[str, Tensor]]]:
    """Return a model trained on some rows, and its weights after each epoch."""
    pixels, labels = rows
    model = make_model(seed).train()
    steps = epochs * -(-len(kept) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator, weights = np.random.default_rng(seed), {}
    for epoch in range(epochs):
        order = generator.permutation(kept)
        for begin in range(0, len(order), BATCH):
            some = torch.from_numpy(order[begin : begin + BATCH])
            model(pixel_values=pixels[some], labels=labels[some]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        weights[epoch + 1] = {name: value.clone() for name, value in model.state_dict().items()}
    return model.eval(), weights


@torch.no_grad()
def outputs_of(model: Any, rows: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
    logits, labels = model(pixel_values=rows[0]).logits.double(), rows[1].double()
    each = (2 * labels - 1) * logits
    found = {"minus the loss": torch.nn.functional.logsigmoid(each).sum(1), CHOSEN: (labels * logits).sum(1), ALL: each.sum(1)}
    return {name: values.numpy() for name, values in found.items()}


def chosen_only() -> Task:
    """Return the task whose output is the sum of the log-odds of the labels that apply."""

    def output(model: Callable[..., Any], batch: Any) -> Tensor:
        return (batch["labels"] * model(pixel_values=batch["pixel_values"]).logits).sum(1)

    def one_minus_p(model: Callable[..., Any], batch: Any) -> Tensor:
        labels = batch["labels"]
        each = labels * torch.sigmoid(-model(pixel_values=batch["pixel_values"]).logits)
        return each.sum(1) / labels.sum(1).clamp(min=1)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: torch.tensor(np.array([row[name] for row in rows]), dtype=torch.float32) for name in rows[0]}

    return Task.custom(
        output, out_to_loss=one_minus_p, out_to_loss_kind="mean_one_minus_p", collator=collate, name="chosen labels"
    )


def score(
    model: Any, weights: dict[str, Tensor], task: Task | None, train_rows: Dataset, queries: Dataset, power: float
) -> np.ndarray:
    model.load_state_dict(weights)
    config = TrakConfig(proj_dim=1024, out_to_loss_power=power)
    with tempfile.TemporaryDirectory() as folder:
        index = AttributionIndex.build(
            f"{folder}/index", models=model.eval(), dataset=train_rows, config=config, task=task, progress=False
        )
        return np.array(index.score(queries, progress=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subsets", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/multi_label_cpu.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    train_rows, queries = load_rows()
    data, asked = tensors(train_rows), tensors(queries)
    generator = np.random.default_rng(1)
    masks = np.zeros((options.subsets, N_TRAIN), dtype=bool)
    for mask in masks:
        mask[generator.permutation(N_TRAIN)[: N_TRAIN // 2]] = True
    truth: dict[str, list[list[np.ndarray]]] = {}
    for seed in range(options.seeds):
        for mask in tqdm(masks, desc=f"training on halves, seed {seed}"):
            model, _ = train(data, np.flatnonzero(mask), seed, epochs=options.epochs)
            for name, values in outputs_of(model, asked).items():
                truth.setdefault(name, [[] for _ in range(options.seeds)])[seed].append(values)
    model, weights = train(data, np.arange(N_TRAIN), 0, epochs=options.epochs)
    rows = []
    for epoch in (options.epochs // 5, options.epochs):
        for attributed, task in ((ALL, None), (CHOSEN, chosen_only())):
            for power in (0.5, 1.0):
                scores = score(model, weights[epoch], task, train_rows, queries, power)
                for name, values in truth.items():
                    found = lds(scores, masks, np.array(values))
                    rows.append(
                        {
                            "case": f"{CASE}, epoch {epoch}, power {power:g}, judged on {name}",
                            "method": f"hf_trak, {attributed}",
                            "metric": "lds",
                            "value": found.value,
                            "unit": "correlation",
                            "interval": list(found.interval),
                        }
                    )
                    print(rows[-1], flush=True)
    write(options, rows, command="python benchmarks/multi_label.py")


if __name__ == "__main__":
    main()
