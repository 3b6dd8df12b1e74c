"""What collecting with EleutherAI/bergson costs on a CPU, beside a plain forward and backward of the same batches.

    python benchmarks/peers/run_bergson.py --dataset qnli.parquet --output results/peers_bergson.json

It runs as its in-memory interface has it, `CollectorComputer` with an `InMemoryCollector`, on the mean log-odds of each row's
tokens, with the parameters frozen as its own `build` freezes them. It projects either each module on both sides, `per_module`,
or all of them into one vector, `global`, whose matrix it generates again for every batch: one batch, once, of 512 features is
what finishes. Either covers the weights of the layers inside `base_model` alone: no embeddings, head, norms or biases. It
serves causal language models, and neither BERT's classification (a pooled input of two dimensions is refused) nor ViT (as is
the patch convolution's of four).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import Case, run
from environment import Environment

if TYPE_CHECKING:
    import torch
    from workloads import Workload

# bitsandbytes, torchvision and torchaudio, which it declares too, would bring a torch built for CUDA, and what runs here needs none.
ENVIRONMENT = Environment(
    "bergson==2.5.1",
    dependencies=(
        *("accelerate", "jaxtyping", "jinja2", "ml_dtypes", "natsort", "peft", "petname", "pyarrow", "pyyaml", "scipy"),
        *("simple-parsing", "torchopt"),
    ),
    alone=True,
)
CHECKED = 4


class Collected:
    """Features of a workload with one of bergson's projections."""

    def __init__(self, workload: Workload, proj_dim: int) -> None:
        from bergson import InMemoryCollector

        self.workload = workload
        self.rows = [row for batch in workload.batches for row in batch["input_ids"].tolist()]
        self.sizes = [len(batch["labels"]) for batch in workload.batches]
        self.layers = InMemoryCollector.discover_targets(workload.model.base_model)
        self.processor = self.make_processor(proj_dim)
        covered = sum(shape.numel() for _, shape, _ in self.layers.values())
        share = covered / sum(parameter.numel() for parameter in workload.model.parameters())
        self.method = f"{self.describe()}, {share:.0%} of the parameters"

    def make_processor(self, proj_dim: int) -> Any:
        """Of the sizes that `per_module` allows, n_modules × p × p, the one nearest to `proj_dim`."""
        from bergson import GradientProcessor

        n_layers = len(self.layers)
        side = min(range(1, proj_dim + 1), key=lambda p: abs(n_layers * p * p - proj_dim))
        return GradientProcessor(projection_dim=side)

    def describe(self) -> str:
        side = self.processor.projection_dim
        return f"per_module {len(self.layers)} × {side} × {side} = {len(self.layers) * side**2} features"

    def featurize(self) -> None:
        self.collect(self.rows, self.sizes, self.processor)

    def collect(self, rows: list[list[int]], sizes: list[int], processor: Any) -> dict[str, torch.Tensor]:
        from bergson import CollectorComputer, IndexConfig, InMemoryCollector
        from datasets import Dataset

        model = self.workload.model.eval()
        data = Dataset.from_dict({"input_ids": rows})
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        batches = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
        with tempfile.TemporaryDirectory() as folder:
            config = IndexConfig(run_path=str(Path(folder) / "run"), loss_fn="log_odds", loss_reduction="mean")
            config.partial_run_path.mkdir()
            model.requires_grad_(False)
            model.get_input_embeddings().requires_grad_(True)
            collector = InMemoryCollector(model=model.base_model, data=data, cfg=config, processor=processor)
            CollectorComputer(model, data, collector=collector, batches=batches, cfg=config).run_with_collector_hooks()
            model.requires_grad_(True)
        return collector.gradients

    def check(self) -> dict[str, float]:
        """Unprojected, and projected with its own matrices, beside the float64 loop."""
        import reference
        import torch
        from bergson import GradientProcessor
        from bergson.gradients import LayerAdapter

        few = reference.first(self.workload.batches[-1], CHECKED)
        rows, sizes = few["input_ids"].tolist(), [len(few["labels"])]
        base = self.workload.model.base_model
        prefix = next(name for name, module in self.workload.model.named_modules() if module is base)
        weights = {name: f"{prefix}.{name}.weight" for name in self.layers}
        flat = reference.gradients(self.workload, few, list(weights.values()))
        pieces = flat.split([shape.numel() for _, shape, _ in self.layers.values()], dim=1)
        expected = {}
        for piece, (name, (_, shape, _)) in zip(pieces, self.layers.items(), strict=True):
            turned = LayerAdapter.weight_transposed(base.get_submodule(name))
            # Its log-odds are a loss: the other sign. Its gradients are (out, in), whichever way the layer keeps its weight.
            piece = -piece.unflatten(1, tuple(reversed(shape)) if turned else tuple(shape))
            expected[name] = piece.mT if turned else piece
        whole = torch.cat([expected[name].flatten(1) for name in self.layers], dim=1)
        actual = self.collect(rows, sizes, GradientProcessor())
        error = reference.relative_error(torch.cat([actual[name] for name in self.layers], dim=1), whole)
        return {"relative_error_to_float64": error, **self.check_projection(rows, sizes, expected)}

    def check_projection(self, rows: list[list[int]], sizes: list[int], expected: dict[str, torch.Tensor]) -> dict[str, float]:
        import reference
        import torch
        from bergson.collector.collector import create_module_projection_matrix

        def matrix(name: str, role: str, width: int) -> torch.Tensor:
            made = create_module_projection_matrix(
                *(name, role, self.processor.projection_dim, width, torch.float32, torch.device("cpu")),
                *(self.processor.projection_type, self.processor.projection_scale, self.processor.projection_seed),
            )
            return made.double()

        features = self.collect(rows, sizes, self.processor)
        right = [
            (matrix(name, "left", grads.shape[1]) @ grads @ matrix(name, "right", grads.shape[2]).T).flatten(1)
            for name, grads in expected.items()
        ]
        actual = torch.cat([features[name] for name in expected], dim=1)
        return {"projection_relative_error": reference.relative_error(actual, torch.cat(right, dim=1))}


class Global(Collected):
    """Projected together, as TRAK's sketch is."""

    checked_proj_dim = 128
    """Its matrix for the check alone, since one of full size takes as long as a batch."""

    def make_processor(self, proj_dim: int) -> Any:
        from bergson import GradientProcessor

        return GradientProcessor(projection_dim=proj_dim, projection_target="global")

    def describe(self) -> str:
        return f"global {self.processor.projection_dim} features"

    def check_projection(self, rows: list[list[int]], sizes: list[int], expected: dict[str, torch.Tensor]) -> dict[str, float]:
        import reference
        import torch

        features = self.collect(rows, sizes, self.make_processor(min(self.checked_proj_dim, self.processor.projection_dim)))
        whole = torch.cat([grads.flatten(1) for grads in expected.values()], dim=1)
        return {"projection_error_sigmas": reference.projection_error(features["gradients"], whole)}


CASES = {
    "decoder": Case("decoder", Collected, proj_dim=4096, rows=64, rounds=5, memory_gb=4),
    "decoder-global": Case("decoder", Global, proj_dim=512, rows=16, rounds=1, memory_gb=4),
}

if __name__ == "__main__":
    run(ENVIRONMENT, CASES, __doc__, __file__)
