from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, make_batch, make_model
from reference import to_double
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_trak import matmul as products
from hf_trak.gradients import GRADIENTS, select_parameters
from hf_trak.gradients.layer_patches import frozen_layers
from hf_trak.projectors import BlockCountSketch
from hf_trak.tasks import classification_margin, vmappable_attention

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN to multiply with"
)


@pytest.fixture
def counted(monkeypatch) -> list[tuple[int, ...]]:
    """oneDNN's products, however small, on any machine that has it; the list gets the shape of each."""
    shapes: list[tuple[int, ...]] = []
    linear = products.linear

    def count(*operands: Tensor | None) -> Tensor:
        result = linear(*operands)  # type: ignore[arg-type]
        shapes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_WORTH_A_CALL", 1)
    monkeypatch.setattr(products, "_WORTH_A_CALL_EACH", 1)
    monkeypatch.setattr(products, "linear", count)
    return shapes


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


OPERANDS = {
    "as they lie": (random(30, 70), random(40, 70, seed=1)),
    "both transposed": (random(70, 30).T, random(70, 40, seed=1).T),
    "parts of columns": (random(30, 90)[:, 10:80], random(40, 90, seed=1)[:, 5:75]),
    "parts of transposed rows": (random(70, 90).T[10:40], random(70, 90, seed=1).T[3:43]),
    "every second": (random(60, 140)[::2, ::2], random(80, 140, seed=1)[::2, ::2]),
    "one row for all": (random(1, 70).expand(30, 70), random(40, 70, seed=1)),
    "one number for all": (random(1, 1).expand(30, 70), random(40, 70, seed=1)),
    "one row": (random(1, 70), random(40, 70, seed=1)),
    "one column": (random(30, 70), random(1, 70, seed=1)),
    "one token": (random(30, 1), random(40, 1, seed=1)),
    "a long inner axis": (random(30, 20000), random(40, 20000, seed=1)),
}


@pytest.mark.parametrize("case", OPERANDS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_a_product_is_as_exact_as_torchs_whatever_its_operands_strides(case: str, has_bias: bool):
    inputs, weight = OPERANDS[case]
    bias = random(len(weight), seed=2) if has_bias else None
    exact = F.linear(inputs.double(), weight.double(), bias.double() if bias is not None else None)
    actual = products.linear(inputs, weight, bias)
    assert actual.shape == exact.shape
    error, torchs = ((result.double() - exact).norm() / exact.norm() for result in (actual, F.linear(inputs, weight, bias)))
    assert error <= 2 * max(torchs, 5e-8)
    for operand in (weight, weight[:, :50]):  # of a matrix with gaps between its rows a product would take for ever
        dense = products._without_gaps(operand)
        assert torch.equal(dense, operand)
        assert dense.is_contiguous() or dense.T.is_contiguous()


@pytest.mark.parametrize("shape", [(70,), (5, 70), (3, 5, 70), (2, 3, 5, 70)])
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_a_frozen_layer_has_the_output_and_the_gradient_of_linear(shape: tuple[int, ...], has_bias: bool, counted):
    weight, bias = random(40, 70, seed=1), random(40, seed=2) if has_bias else None
    ours, torchs = (random(*shape).requires_grad_() for _ in range(2))
    results = [function(x, weight, bias) for function, x in ((products.frozen_linear, ours), (F.linear, torchs))]
    for result in results:
        result.sin().sum().backward()
    torch.testing.assert_close(results[0], results[1])
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, torchs.grad, rtol=1e-5, atol=1e-4)  # sums of 40 numbers of about 5
    assert len(counted) == 2  # forward and backward


def test_a_gradient_of_a_gradient_is_that_of_linear():
    weight = random(40, 70, seed=1)
    seconds = []
    for function in (lambda x: products._FrozenLinear.apply(x, weight, None), lambda x: F.linear(x, weight)):
        inputs = random(5, 70).requires_grad_()
        (first,) = torch.autograd.grad(function(inputs).pow(3).sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), inputs)[0])
    torch.testing.assert_close(seconds[0], seconds[1], rtol=1e-4, atol=1e-2)


def test_an_output_may_be_changed_in_place(counted):
    weight, inputs = random(40, 70, seed=1), random(3, 5, 70).requires_grad_()
    output = products.frozen_linear(inputs, weight, None)
    output += 1
    output[:, 0] *= 3
    output.sum().backward()
    expected = weight.sum(0).expand(3, 5, 70).clone()
    expected[:, 0] *= 3
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, expected)
    assert counted


NOT_SERVED = {
    "float64": (random(5, 70).double(), random(40, 70).double()),
    "bfloat16": (random(5, 70).bfloat16(), random(40, 70).bfloat16()),
    "no rows": (random(0, 70), random(40, 70)),
    "no inner axis": (random(5, 0), random(40, 0)),
    "no columns": (random(5, 70), random(0, 70)),
    "a class of its own": (random(5, 70), random(40, 70).as_subclass(type("Quantized", (Tensor,), {}))),
}


@pytest.mark.parametrize("case", NOT_SERVED)
def test_what_onednn_does_not_serve_is_left_to_torch(case: str, counted):
    inputs, weight = NOT_SERVED[case]
    torch.testing.assert_close(products.frozen_linear(inputs, weight, None), F.linear(inputs, weight), rtol=0, atol=0)
    assert counted == []


def test_torchs_own_switch_turns_it_off(counted, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    products.frozen_linear(random(5, 70), random(40, 70), None)
    assert counted == []


@pytest.mark.parametrize(("cpu", "capability", "expected"), [
    ("AMD EPYC 9R14", "AVX512", True),
    ("AMD EPYC 7B13", "AVX2", False),
    ("Intel(R) Xeon(R) Platinum 8488C", "AVX512", False),
    ("", "DEFAULT", False),
])  # fmt: skip
def test_the_choice_is_the_machines(cpu: str, capability: str, expected: bool, monkeypatch):
    monkeypatch.setattr(products, "_cpu_name", lambda: cpu)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products.onednn_is_faster.__wrapped__() is expected


def test_pairs_are_given_one_by_one_where_each_is_large(counted, monkeypatch):
    monkeypatch.setattr(products, "_WORTH_A_CALL_EACH", 1 << 22)
    right = random(2, 128, 512)
    assert products.one_by_one(random(2, 64, 128), right)
    assert not products.one_by_one(random(2, 63, 128), right)
    assert not products.one_by_one(random(0, 64, 128), random(0, 128, 512))


@pytest.mark.parametrize("shape", [(512, 128, 512), (256, 2048, 384), (16, 4096, 384), (16, 30522, 64), (2, 30522, 64)])
def test_a_product_has_the_same_bits_whatever_the_number_of_threads(shape: tuple[int, int, int]):
    rows, inner, columns = shape
    inputs, weight = random(rows, inner), random(columns, inner, seed=1)
    threads = torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3, 8):
            torch.set_num_threads(n_threads)
            results.append(products.linear(inputs, weight))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    exact = inputs.double() @ weight.double().T
    assert (results[0] - exact).norm() / exact.norm() < 2e-6


@pytest.mark.parametrize("n_rows", [1, 300])
def test_inner_products_are_those_of_rows_however_few_there_are(n_rows: int, counted, monkeypatch):
    monkeypatch.setattr(products, "_WORTH_A_CALL", 1 << 40)
    rows, others = random(n_rows, 4096), random(7, 4096, seed=1)
    exact = rows.double() @ others.double().T
    assert ((products.inner_products(rows, others) - exact).norm(dim=1) / exact.norm(dim=1) < 2e-6).all()
    assert counted == [(n_rows, 7)]
    assert torch.equal(products.inner_products(rows.double(), others.double()), exact)
    assert products.inner_products(rows[:0], others).shape == (0, 7)
    assert len(counted) == 1


@pytest.mark.parametrize("proj_dim", [64, 4096], ids=["many tiles", "one tile"])
@pytest.mark.parametrize("batch_size", [0, 1, 3])
@pytest.mark.parametrize("fold", [1, 4])
def test_a_sketch_of_outer_products_is_the_same_either_way(proj_dim: int, batch_size: int, fold: int, counted, monkeypatch):
    left, right = random(batch_size, 9, 400), random(batch_size, 9, 200, seed=1)
    projector = BlockCountSketch(proj_dim=proj_dim, seed=3, fold=fold)

    def sketch(dtype: torch.dtype) -> Tensor:
        accumulator = projector.start(batch_size, dtype=dtype, device=torch.device("cpu"))
        projector.add_outer(accumulator, "weight", left.to(dtype), right.to(dtype))
        return projector.finish(accumulator)

    exact, ours = sketch(torch.float64), sketch(torch.float32)
    assert bool(counted) == bool(batch_size)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    scale = exact.norm(dim=1) + 1e-30
    for features in (ours, sketch(torch.float32)):
        assert ((features - exact).norm(dim=1) / scale < 1e-6).all()


class _Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), Conv1D(5, 8)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
        self.own = _Doubled(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.own(self.computed(self.second(self.first(input=inputs))))


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_layers_are_computed_by_onednn_within_the_block_and_as_before_after_it(counted):
    model, inputs = _Layers().requires_grad_(False), random(4, 12)
    expected = model(inputs)
    with frozen_layers(model, unless=lambda: False):
        torch.testing.assert_close(model(inputs), expected)
        assert counted == [(4, 8), (4, 5), (4, 3)]  # not that of a class with a forward of its own
    with pytest.raises(KeyError), frozen_layers(model, unless=lambda: False):
        raise KeyError
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(inputs), expected)
    assert len(counted) == 3


@pytest.mark.parametrize("case", ["unless", "autocast", "weights with gradients", "another forward"])
def test_layers_keep_to_torch(case: str, counted):
    model = nn.Linear(12, 8).requires_grad_(case == "weights with gradients")
    if case == "another forward":
        model.forward = lambda inputs: 3 * inputs  # type: ignore[method-assign]
    with torch.autocast("cpu", enabled=case == "autocast"):
        expected = model(random(4, 12))
        with frozen_layers(model, unless=lambda: case == "unless"):
            assert torch.equal(model(random(4, 12)), expected)
    assert ("forward" in model.__dict__) == (case == "another forward")
    assert counted == []


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("name", MODELS)
def test_features_by_onednn_are_those_of_the_functional_engine_in_float64(name: str, counted):
    model, batch = make_model(name), make_batch(name)
    projector = BlockCountSketch(proj_dim=128, seed=0)

    def features(engine: str, batch: dict[str, Any]) -> Tensor:
        parameters = select_parameters(model).parameters
        with vmappable_attention(model):
            return GRADIENTS[engine](
                model, batch, output_function=classification_margin, parameters=parameters, projector=projector
            ).features

    ours = features("layerwise", batch)
    n_products = len(counted)
    assert n_products
    model.double()
    exact = features("functional", to_double(batch))
    assert len(counted) == n_products
    assert exact.dtype == torch.float64
    assert ((ours - exact).norm(dim=1) / exact.norm(dim=1) < 5e-6).all()
