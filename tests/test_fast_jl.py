"""The optional CUDA projector: what is refused, what surrounds the kernel, and, on a GPU, the kernel."""

import importlib.util
import math
from types import SimpleNamespace

import pytest
import torch
from datasets_for_tests import save_model, token_rows

from hf_trak import AttributionIndex, Featurizer, TrakConfig
from hf_trak.projectors import FastJL, make_projector
from hf_trak.projectors import fast_jl as module

PROJ_DIM = 512
HAS_FAST_JL = importlib.util.find_spec("fast_jl") is not None
needs_kernel = pytest.mark.skipif(not (HAS_FAST_JL and torch.cuda.is_available()), reason="needs fast_jl and a CUDA device")


@pytest.fixture
def calls(monkeypatch):
    """A stand-in for the extension that draws signs from (seed, tiles) and rounds to float16, as the kernel does."""
    seen = []

    def kernel(size):
        def project(values, proj_dim, seed, n_tiles):
            assert values.is_contiguous()
            assert values.dtype == torch.float32
            assert values.shape[0] == size
            assert values.abs().max() <= 1
            seen.append((tuple(values.shape), seed, n_tiles))
            generator = torch.Generator().manual_seed(seed * 1000 + n_tiles)
            signs = 1.0 - 2.0 * torch.randint(0, 2, (values.shape[1], proj_dim), generator=generator).float()
            return values.half().float() @ signs

        return project

    extension = SimpleNamespace(**{f"project_rademacher_{size}": kernel(size) for size in (8, 16, 32)})
    monkeypatch.setattr(module, "load_fast_jl", lambda: extension)
    properties = SimpleNamespace(multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return seen


def gpu(monkeypatch, name, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def sketch(projector, grads):
    accumulator = projector.start(len(next(iter(grads.values()))), dtype=torch.float32, device=torch.device("cpu"))
    for name, values in grads.items():
        projector.add(accumulator, name, values)
    return projector.finish(accumulator)


@pytest.mark.skipif(HAS_FAST_JL, reason="fast_jl is installed")
def test_without_the_extension_it_says_how_to_install_it(tmp_path):
    with pytest.raises(ImportError, match="pip install --no-build-isolation fast_jl. Or use projector='block_count_sketch'"):
        make_projector("fast_jl", proj_dim=PROJ_DIM, seed=0)
    folder = save_model(tmp_path / "model")
    config = TrakConfig(projector="fast_jl", proj_dim=PROJ_DIM)
    with pytest.raises(ImportError, match="needs the CUDA extension fast_jl"):
        AttributionIndex.build(tmp_path / "index", models=folder, dataset=token_rows(4), config=config)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(("proj_dim", "advice"), [(100, "try 512"), (1000, "try 512 or 1024"), (4097, "try 4096 or 4608")])
def test_a_proj_dim_the_kernel_cannot_compute_is_refused(proj_dim, advice):
    with pytest.raises(ValueError, match=f"multiple of 512, but it is {proj_dim}; {advice}"):
        make_projector("fast_jl", proj_dim=proj_dim, seed=0)


def test_another_device_than_cuda_is_refused_before_anything_is_written(calls, tmp_path):
    with pytest.raises(ValueError, match="runs only on CUDA devices, but the device is cpu"):
        FastJL(proj_dim=PROJ_DIM, seed=0).tied_to(torch.device("cpu"))
    if torch.cuda.is_available():
        return
    folder = save_model(tmp_path / "model")
    config = TrakConfig(projector="fast_jl", proj_dim=PROJ_DIM)
    with pytest.raises(ValueError, match="Use a machine with a GPU, or projector='block_count_sketch'"):
        AttributionIndex.build(tmp_path / "index", models=folder, dataset=token_rows(4), config=config)
    assert not (tmp_path / "index").exists()


def test_a_gpu_that_is_too_old_is_refused(calls, monkeypatch):
    gpu(monkeypatch, "Tesla P100", capability=(6, 0))
    with pytest.raises(ValueError, match="needs compute capability 7.0, but Tesla P100 has 6.0"):
        FastJL(proj_dim=PROJ_DIM, seed=0).tied_to(torch.device("cuda"))


def test_a_parameter_larger_than_the_kernel_counts_is_refused_by_name(calls):
    grads = torch.zeros(1).expand(1, 1 << 29)
    with pytest.raises(ValueError, match="shared.weight has 536,870,912 entries, but fast_jl supports at most 536,870,912"):
        FastJL(proj_dim=PROJ_DIM, seed=0).add(torch.zeros(1, PROJ_DIM), "shared.weight", grads)


@pytest.mark.parametrize(("n_rows", "sizes"), [(1, [8]), (8, [8]), (9, [16]), (20, [32]), (33, [32, 8]), (70, [32, 32, 8])])
def test_any_batch_is_padded_to_what_the_kernel_takes(calls, n_rows, sizes):
    generator = torch.Generator().manual_seed(0)
    grads = {"w": torch.randn(n_rows, 3, 5, generator=generator), "b": torch.randn(n_rows, 3, generator=generator)}
    features = sketch(FastJL(proj_dim=PROJ_DIM, seed=0), grads)
    assert [shape[0] for shape, _, _ in calls] == sizes * 2
    alone = torch.cat(
        [sketch(FastJL(proj_dim=PROJ_DIM, seed=0), {k: v[i : i + 1] for k, v in grads.items()}) for i in range(n_rows)]
    )
    torch.testing.assert_close(features, alone, rtol=1e-5, atol=1e-6)


def test_every_parameter_and_every_seed_has_signs_of_its_own(calls):
    grads = torch.ones(2, 7)
    for seed in (0, 1):
        sketch(FastJL(proj_dim=PROJ_DIM, seed=seed), {"a": grads, "b": grads})
    seeds = [seed for _, seed, _ in calls]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 1 << 32 for seed in seeds)
    assert {n_tiles for _, _, n_tiles in calls} == {108}


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_gradients_of_any_size_keep_their_inner_products(calls, size):
    """float16 alone would lose the smallest and overflow at the largest."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, generator=generator)
    y = x + 0.3 * y
    products = []
    for seed in range(200):
        features = sketch(FastJL(proj_dim=PROJ_DIM, seed=seed), {"w": size * torch.stack([x, y])}).double()
        products.append(float(features[0] @ features[1]) / size**2)
    products = torch.tensor(products)
    assert abs(products.mean() - x @ y) < 4 * products.std() / math.sqrt(len(products)) + 1e-3 * abs(x @ y)
    dense = math.sqrt(((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 @ y**2)) / PROJ_DIM)
    assert 0.8 < products.std() / dense < 1.2


def test_factored_gradients_and_those_of_a_few_rows_have_the_sketch_of_the_whole(calls, monkeypatch):
    monkeypatch.setattr(module, "_ENTRIES", 8 * 30)  # eight rows at a time
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(11, 4, 6, generator=generator), torch.randn(11, 4, 5, generator=generator)
    tokens = torch.randint(0, 6, (11, 4), generator=generator)
    projector = FastJL(proj_dim=PROJ_DIM, seed=0)
    accumulator = projector.start(11, dtype=torch.float32, device=torch.device("cpu"))
    projector.add_outer(accumulator, "w", left, right)
    expected = sketch(projector, {"w": torch.einsum("bto,bti->boi", left, right)})
    torch.testing.assert_close(projector.finish(accumulator), expected, rtol=1e-3, atol=1e-3)
    assert {shape[0] for shape, _, _ in calls} == {8}
    accumulator = projector.start(11, dtype=torch.float32, device=torch.device("cpu"))
    projector.add_rows(accumulator, "e", (6, 5), tokens, right)
    whole = torch.einsum("btv,bti->bvi", torch.nn.functional.one_hot(tokens, 6).float(), right)
    torch.testing.assert_close(projector.finish(accumulator), sketch(projector, {"e": whole}), rtol=1e-3, atol=1e-3)


def test_an_index_says_which_gpu_it_is_tied_to_and_refuses_another(calls, monkeypatch, tmp_path):
    folder = save_model(tmp_path / "model")
    config = TrakConfig(projector="fast_jl", proj_dim=PROJ_DIM)
    monkeypatch.setattr(FastJL, "tied_to", lambda self, device: "NVIDIA A100")
    build = {"models": folder, "dataset": token_rows(20), "config": config, "progress": False}
    index = AttributionIndex.build(tmp_path / "index", **build)
    assert index.members[0].identity["gpu_model"] == "NVIDIA A100"
    expected = index.score(token_rows(3, seed=1), progress=False)
    assert (
        AttributionIndex.from_pretrained(tmp_path / "index").score(token_rows(3, seed=1), progress=False).shape
        == expected.shape
    )
    monkeypatch.setattr(FastJL, "tied_to", lambda self, device: "NVIDIA H100")
    with pytest.raises(ValueError, match="gpu_model: 'NVIDIA A100' there, 'NVIDIA H100' here"):
        index.score(token_rows(3, seed=1), progress=False)
    with pytest.raises(ValueError, match="(?s)holds other features.*gpu_model: 'NVIDIA A100' there, 'NVIDIA H100' here"):
        AttributionIndex.build(tmp_path / "index", **build)


def test_other_sketches_are_tied_to_no_gpu(tmp_path):
    assert Featurizer(str(save_model(tmp_path / "model")), TrakConfig(proj_dim=64)).gpu_model is None


@pytest.mark.gpu
@needs_kernel
def test_the_kernels_inner_products_are_those_of_the_gradients():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 1000, generator=generator).cuda()
    products = []
    for seed in range(100):
        projector = FastJL(proj_dim=PROJ_DIM, seed=seed)
        accumulator = projector.start(6, dtype=torch.float32, device=x.device)
        projector.add(accumulator, "w", torch.cat([x, y]))
        features = projector.finish(accumulator).double()
        products.append((features[:3] * features[3:]).sum(1).cpu())
    products, exact = torch.stack(products), (x.double() * y.double()).sum(1).cpu()
    assert ((products.mean(0) - exact).abs() <= 4 * products.std(0) / 10 + 1e-3 * exact.abs()).all()


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("n_rows", [8, 13, 32, 40])
def test_the_kernels_sketch_does_not_depend_on_the_batch(n_rows):
    grads = torch.randn(40, 2000, generator=torch.Generator().manual_seed(0)).cuda()
    projector = FastJL(proj_dim=PROJ_DIM, seed=0)
    whole, part = (projector.start(n, dtype=torch.float32, device=grads.device) for n in (40, n_rows))
    projector.add(whole, "w", grads)
    projector.add(part, "w", grads[:n_rows])
    torch.testing.assert_close(part, whole[:n_rows], rtol=1e-4, atol=1e-4)
