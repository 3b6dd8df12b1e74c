"""What caching with dattri's TRAK attributor costs on a CPU, beside a plain forward and backward of the same batches.

    python benchmarks/peers/run_dattri.py --dataset qnli.parquet --images cifar10.parquet --output results/peers_dattri.json

It runs as its documentation has it: `TRAKAttributor.cache` over a loader, which takes `torch.func` gradients of every example,
projects them (on a CPU, by dense normal entries), evaluates p once more, and solves for the features' inverse, proj_dim × proj_dim,
whose cost is nothing beside the rest. It makes its projector anew for every batch, so that its cost grows with proj_dim × parameters.
A batch of 8, once, and 512 are what finishes; "gradients alone" says how much of that is its gradients. It has no decoder here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common import Case, run
from environment import Environment

if TYPE_CHECKING:
    import torch
    from workloads import Workload

ENVIRONMENT = Environment("dattri==0.3.0")
CHECKED = 4
REGULARIZATION = 1e-3
"""Any positive number makes the Gram matrix of so few rows invertible; its size costs nothing."""


class Cached:
    """TRAKAttributor over a workload."""

    method = "dense normal projection"

    def __init__(self, workload: Workload, proj_dim: int) -> None:
        from dattri.algorithm.trak import TRAKAttributor
        from dattri.task import AttributionTask
        from vmappable import as_tuple

        self.workload, self.proj_dim = workload, proj_dim
        self.batches = [as_tuple(batch) for batch in workload.batches]
        weights = {name: value.clone() for name, value in workload.model.state_dict().items()}
        self.task = AttributionTask(loss_func=self.log_odds, model=workload.model, checkpoints=weights)
        self.attributor = TRAKAttributor(
            self.task,
            correct_probability_func=self.probability,
            projector_kwargs={"proj_dim": proj_dim, "device": "cpu"},
            device="cpu",
            regularization=REGULARIZATION,
        )

    def log_odds(self, params: dict[str, torch.Tensor], example: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The output of one example, which dattri's TRAK differentiates in place of the loss."""
        import torch

        *inputs, label = (value.unsqueeze(0) for value in example)
        names = ("pixel_values",) if len(inputs) == 1 else ("input_ids", "token_type_ids", "attention_mask")
        arguments = dict(zip(names, inputs, strict=True))
        logits = torch.func.functional_call(self.workload.model, params, kwargs=arguments).logits
        others = logits.scatter(1, label.unsqueeze(1), float("-inf")).logsumexp(1)
        return (logits.gather(1, label.unsqueeze(1)).squeeze(1) - others).sum()

    def probability(self, params: dict[str, torch.Tensor], example: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.log_odds(params, example).sigmoid()

    def featurize(self) -> None:
        self.cache(self.batches)

    def cache(self, batches: list[tuple[torch.Tensor, ...]]) -> None:
        from torch.utils.data import DataLoader
        from vmappable import eager_attention

        with eager_attention(self.workload.model.eval()):
            self.attributor.cache(DataLoader(batches, batch_size=None))

    def gradients(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        from vmappable import eager_attention

        parameters, _ = self.task.get_param(ckpt_idx=0)
        with eager_attention(self.workload.model.eval()):
            return self.task.get_grad_loss_func(in_dims=(None, 0))(parameters, batch)

    def check(self) -> dict[str, float]:
        import reference
        from vmappable import as_tuple

        few = reference.first(self.workload.batches[-1], CHECKED)
        expected = reference.gradients(self.workload, few, [name for name, _ in self.workload.model.named_parameters()])
        error = reference.relative_error(self.gradients(as_tuple(few)), expected)
        return {"relative_error_to_float64": error, **self.check_features(as_tuple(few), expected)}

    def check_features(self, batch: tuple[torch.Tensor, ...], expected: torch.Tensor) -> dict[str, float]:
        """The attributor keeps an inverse, not the features, which are taken where its projection returns them."""
        import reference
        from dattri.algorithm import trak

        kept: list[torch.Tensor] = []
        original = trak.random_project

        def recording(*arguments: Any, **options: Any) -> Any:
            project = original(*arguments, **options)
            return lambda *features, **which: kept.append(project(*features, **which)) or kept[-1]

        trak.random_project = recording
        self.cache([batch])
        trak.random_project = original
        # dattri divides gradients by the root of the number of parameters.
        features = kept[0] * expected.shape[1] ** 0.5
        return {"projection_error_sigmas": reference.projection_error(features, expected)}


class Gradients(Cached):
    """Its per-example gradients, and then nothing: what its caching would cost if projecting were free."""

    method = "gradients alone"

    def featurize(self) -> None:
        for batch in self.batches:
            self.gradients(batch)

    def check_features(self, batch: tuple[torch.Tensor, ...], expected: torch.Tensor) -> dict[str, float]:
        return {}


NOT_PROJECTED = "not projected"
CASES = {
    "bert": Case("bert", Cached, proj_dim=512, rows=8, batch_size=8, rounds=1, memory_gb=17),
    "bert-gradients": Case("bert", Gradients, proj_dim=512, rows=8, batch_size=8, rounds=1, memory_gb=8, label=NOT_PROJECTED),
    "vit": Case("vit", Cached, proj_dim=512, rows=8, batch_size=8, rounds=1, memory_gb=15),
    "vit-gradients": Case("vit", Gradients, proj_dim=512, rows=8, batch_size=8, rounds=1, memory_gb=8, label=NOT_PROJECTED),
}

if __name__ == "__main__":
    run(ENVIRONMENT, CASES, __doc__, __file__)
