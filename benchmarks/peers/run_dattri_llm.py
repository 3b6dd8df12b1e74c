"""What capturing projected gradients with dattri-llm costs on a CPU, beside a plain forward and backward of the same batches.

    python benchmarks/peers/run_dattri_llm.py --dataset qnli.parquet --output results/peers_dattri_llm.json

It runs as its documentation has it: a `HookManager` with factorized hooks, here on the linear layers of the blocks, whose factors are projected on both sides at capture
(`logra`, with dattri's dense normal entries) and contracted at once (`capture_style="materialized"`), for one backward pass of the sum of each row's mean log-odds. Its token
embeddings and the head could be hooked, too; as bergson's here, its features cover the weights of the layers inside the blocks alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common import Case, run
from environment import Environment

if TYPE_CHECKING:
    import torch
    from workloads import Workload

ENVIRONMENT = Environment("dattri-llm==0.1.0", dependencies=("dattri==0.3.0", "accelerate"))
CHECKED = 4
BLOCKS = r"transformer\.h\.\d+\.(attn|mlp)\.c_"


class Captured:
    """Features of a workload by hooks on its blocks."""

    def __init__(self, workload: Workload, proj_dim: int) -> None:
        self.workload = workload
        self.names = [
            name.removesuffix(".weight")
            for name, weight in workload.model.named_parameters()
            if ".h." in name and ".c_" in name and weight.ndim == 2
        ]
        n_layers = len(self.names)
        self.side = min(range(1, proj_dim + 1), key=lambda p: abs(n_layers * p * p - proj_dim))
        weights = dict(workload.model.named_parameters())
        covered = sum(weights[f"{name}.weight"].numel() for name in self.names)
        share = covered / sum(weight.numel() for weight in weights.values())
        self.method = (
            f"logra {n_layers} × {self.side} × {self.side} = {n_layers * self.side**2} features, {share:.0%} of the parameters"
        )

    def capture(self, batches: list[dict[str, torch.Tensor]], side: int | None) -> list[dict[str, torch.Tensor]]:
        """Return each batch's gradients by layer; projected if `side` is given."""
        from dattri_llm import HookManager, HookManagerConfig
        from dattri_llm.gradient.callbacks import CaptureCallback

        projection = {"style": "logra", "proj_dim": side, "proj_max_batch_size": 16, "proj_type": "normal"}
        config = HookManagerConfig(
            linear_io=[BLOCKS],
            capture_style="materialized",
            projection_kwargs=None if side is None else {"__default__": projection},
        )
        capture = CaptureCallback()
        model = self.workload.model.eval()
        manager = HookManager(model, config=config, callbacks=[capture])
        found = []
        with manager.collect():
            for batch in batches:
                self.workload.output_function(model, batch)[0].sum().backward()
                model.zero_grad(set_to_none=True)
                found.append({name: value.detach() for name, value in capture.record.gradient.data.items()})
        manager.remove()
        return found

    def featurize(self) -> None:
        self.capture(self.workload.batches, self.side)

    def check(self) -> dict[str, float]:
        """Unprojected, beside the float64 loop; and inner products of what is projected."""
        import reference
        import torch

        few = reference.first(self.workload.batches[-1], CHECKED)
        expected = reference.gradients(self.workload, few, [f"{name}.weight" for name in self.names])
        (found,) = self.capture([few], None)
        flat = torch.cat([self.as_weight(name, found[name]).flatten(1) for name in self.names], dim=1)
        return {"relative_error_to_float64": reference.relative_error(flat, expected)}

    def as_weight(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Return a layer's gradients, (out, in + 1) with the bias last, in the layout of GPT-2's weight, (in, out)."""
        n_in, n_out = self.workload.model.get_submodule(name).weight.shape
        return value.reshape(-1, n_out, n_in + 1)[..., :n_in].mT


CASES = {"decoder": Case("decoder", Captured, proj_dim=4096, rows=64, rounds=5, memory_gb=4)}

if __name__ == "__main__":
    run(ENVIRONMENT, CASES, __doc__, __file__)
