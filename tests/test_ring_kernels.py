"""The Triton kernels against plain tensor operations: through Triton's interpreter on a CPU, and compiled on a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from test_projectors import FACTORED, sketch

from hf_trak.projectors import BlockCountSketch
from hf_trak.projectors import count_sketch as folding_module
from hf_trak.projectors import count_sketch as ring

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def test_the_kernels_agree_with_plain_tensors_in_tritons_interpreter():
    if find_spec("triton") is None:
        pytest.skip("needs Triton: pip install triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "kernel_by_kernel"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert "passed" in run.stdout


@pytest.fixture
def device(monkeypatch):
    if INTERPRETED:
        from hf_trak.projectors import count_sketch_triton as ring_kernels

        monkeypatch.setattr(ring, "kernels_for", lambda device: ring_kernels)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("fold", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns", "proj_dim"), [*FACTORED, (60, 13, 2500)])
def test_kernel_by_kernel_is_the_plain_sketch(device, rows, columns, proj_dim, dtype, fold, monkeypatch):
    monkeypatch.setattr(folding_module, "_SMALL", 1)
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(3, 5, rows, dtype=dtype, generator=generator)
    right = torch.randn(3, 5, columns, dtype=dtype, generator=generator)
    tokens = torch.randint(0, rows, (3, 5), generator=generator)
    results = []
    for kernels in (False, True):
        with monkeypatch.context() as patch:
            if not kernels:
                patch.setattr(ring, "kernels_for", lambda device: None)
            to = (lambda x: x) if not kernels else (lambda x: x.to(device))
            projector = BlockCountSketch(proj_dim=proj_dim, seed=0, fold=fold)
            accumulator = projector.start(3, dtype=dtype, device=device if kernels else torch.device("cpu"))
            projector.add(accumulator, "a", to(torch.einsum("bto,bti->boi", left, right)))
            projector.add_outer(accumulator, "b", to(left), to(right))
            projector.add_rows(accumulator, "c", (rows, columns), to(tokens), to(right))
            results.append(projector.finish(accumulator).cpu())
    assert results[0].norm() > 0
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_kernel_by_kernel_gives_the_same_bits_twice(device):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 7, (2, 50), generator=generator).to(device)
    values = torch.randn(2, 50, 24, generator=generator).to(device)
    first, second = [
        (
            accumulator := projector.start(2, dtype=torch.float32, device=device),
            projector.add_rows(accumulator, "w", (7, 24), tokens, values),
            projector.finish(accumulator),
        )[2]
        for projector in (BlockCountSketch(proj_dim=32, seed=0), BlockCountSketch(proj_dim=32, seed=0))
    ]
    assert torch.equal(first, second)


def test_kernels_are_for_cuda_alone():
    assert ring.kernels_for(torch.device("cpu")) is None
    assert sketch(BlockCountSketch(proj_dim=8, seed=0), {"w": torch.ones(1, 2, 2)}).abs().sum() > 0
