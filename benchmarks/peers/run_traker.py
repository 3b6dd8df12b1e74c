"""What featurizing with MadryLab/trak (`traker` on PyPI) costs on a CPU, beside a plain forward and backward of the same batches.

    python benchmarks/peers/run_traker.py --dataset qnli.parquet --images cifar10.parquet --output results/peers_traker.json

It runs as its documentation has it, `TRAKer.load_checkpoint` and `TRAKer.featurize`, with its own gradient computer and, as always on
a CPU, its `BasicProjector` with normal entries; `use_half_precision=False`, since its default, float16, has no fast product of matrices there.
Its projection is generated again for every batch, so that its cost grows with proj_dim × parameters: 512, and a batch or two, are
what finishes. It has no output function for language models, and so no decoder here.
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

from common import Case, run
from environment import Environment

if TYPE_CHECKING:
    import torch
    from workloads import Workload

ENVIRONMENT = Environment("traker==0.3.2", dependencies=("tqdm", "jaxtyping"))
TASKS = {"bert": "text_classification", "vit": "image_classification"}
CHECKED = 4


class Projected:
    """TRAKer's features of a workload."""

    method = "float32, dense normal projection"

    def __init__(self, workload: Workload, proj_dim: int) -> None:
        from vmappable import as_tuple

        self.workload = workload
        self.module = logits_of(workload.model)
        self.batches = [as_tuple(batch) for batch in workload.batches]
        self.folder = tempfile.TemporaryDirectory()
        self.checkpoints = 0
        self.traker = self.make(proj_dim=proj_dim)

    def make(self, **projection: Any) -> Any:
        from trak import TRAKer

        return TRAKer(
            self.module,
            TASKS[self.workload.name],
            train_set_size=sum(len(labels) for *_, labels in self.batches),
            save_dir=self.folder.name,
            device="cpu",
            use_half_precision=False,
            logging_level=40,
            **projection,
        )

    def featurize(self) -> None:
        self.pass_over(self.batches)

    def pass_over(self, batches: list[tuple[torch.Tensor, ...]]) -> None:
        from vmappable import eager_attention

        # What is featurized is skipped, so that each pass is a checkpoint of its own, and so has a projection of its own.
        self.traker.load_checkpoint(self.module.state_dict(), model_id=self.checkpoints)
        self.checkpoints += 1
        with eager_attention(self.workload.model):
            for batch in batches:
                self.work(batch)

    def work(self, batch: tuple[torch.Tensor, ...]) -> None:
        self.traker.featurize(batch, num_samples=len(batch[-1]))

    def check(self) -> dict[str, float]:
        import reference
        from trak.utils import vectorize
        from vmappable import as_tuple, eager_attention

        few = reference.first(self.workload.batches[-1], CHECKED)
        names = [name for name, _ in self.workload.model.named_parameters()]
        expected = reference.gradients(self.workload, few, names)
        self.pass_over([as_tuple(few)])
        with eager_attention(self.workload.model):
            actual = vectorize(self.traker.gradient_computer.compute_per_sample_grad(as_tuple(few)), device="cpu")
        return {"relative_error_to_float64": reference.relative_error(actual, expected), **self.check_features(expected)}

    def check_features(self, expected: torch.Tensor) -> dict[str, float]:
        import reference
        import torch

        features = torch.as_tensor(self.traker.saver.current_store["grads"][: len(expected)])
        # TRAKer divides by the root of the number of parameters, where unbiased inner products want that of proj_dim.
        scale = (expected.shape[1] / features.shape[1]) ** 0.5
        return {"projection_error_sigmas": reference.projection_error(features * scale, expected)}


class Gradients(Projected):
    """Its per-example gradients, and then nothing: what its featurizing would cost if projecting were free."""

    method = "float32, gradients alone"

    def make(self, **projection: Any) -> Any:
        from trak.projectors import NoOpProjector

        return super().make(projector=NoOpProjector(device="cpu"))

    def work(self, batch: tuple[torch.Tensor, ...]) -> None:
        self.traker.gradient_computer.compute_per_sample_grad(batch)

    def check_features(self, expected: torch.Tensor) -> dict[str, float]:
        return {}


def logits_of(model: torch.nn.Module) -> torch.nn.Module:
    """The model as TRAKer's output functions call one: inputs to logits, with the same parameters."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
            return self.model(*inputs, **named).logits

    return Logits()


NOT_PROJECTED = "not projected"
CASES = {
    "bert": Case("bert", Projected, proj_dim=512, rows=32, memory_gb=15),
    "bert-gradients": Case("bert", Gradients, proj_dim=0, rows=32, memory_gb=5, label=NOT_PROJECTED),
    "vit": Case("vit", Projected, proj_dim=512, rows=16, memory_gb=13),
    "vit-gradients": Case("vit", Gradients, proj_dim=0, rows=16, memory_gb=5, label=NOT_PROJECTED),
}

if __name__ == "__main__":
    run(ENVIRONMENT, CASES, __doc__, __file__)
