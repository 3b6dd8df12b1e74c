from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import IMAGE_MODELS, MODELS, TEXT_MODELS, VOCAB_SIZE, image_batch, make_batch, make_model, swin, text_batch
from reference import gradient_loop, to_double
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_trak.featurizing.devices import in_bfloat16
from hf_trak.gradients import GRADIENTS, check_gradients, functional_features, layerwise, select_parameters
from hf_trak.projectors import BlockCountSketch, Identity
from hf_trak.projectors import count_sketch as folding
from hf_trak.tasks import classification_margin, vmappable_attention

pytestmark = [
    # torch's own remark on operators that `vmap` runs one example at a time.
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule"),
]

ROUND_OFF = {torch.float32: 5e-6, torch.float64: 1e-12}  # relative, per example
CASES = [(name, padding) for name in TEXT_MODELS for padding in ("right", "left")] + [(name, None) for name in IMAGE_MODELS]

KINDS = ("bert", "llama", "vit", "resnet")  # one of each kind of layers, where every model would only cost time


def each_engine_of_a_kind(*options: Any) -> list[Any]:
    """Return every model with every engine and option; those that are slow are further models of kinds that are there."""
    return [
        pytest.param(name, engine, *option, marks=() if name in KINDS else pytest.mark.slow)
        for name in MODELS
        for engine in GRADIENTS
        for option in (options or [()])
    ]


def identity(parameters: Mapping[str, nn.Parameter]) -> Identity:
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    return Identity(proj_dim=sum(sizes.values()), sizes=sizes)


def gradients_of(
    model: nn.Module,
    batch: Mapping[str, Any],
    output_function: Callable[..., tuple[Tensor, Tensor]] = classification_margin,
    *,
    engine: str = "layerwise",
    patterns: list[str] | None = None,
    **options: Any,
) -> Any:
    parameters = select_parameters(model, patterns).parameters
    with vmappable_attention(model):
        return GRADIENTS[engine](
            model, batch, output_function=output_function, parameters=parameters, projector=identity(parameters), **options
        )


def check(model: nn.Module, batch: Mapping[str, Any], output_function: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    n_rows = len(next(value for value in batch.values() if isinstance(value, Tensor)))
    parameters = select_parameters(model).parameters
    return check_gradients(
        model, lambda rows: rows_of(batch, list(rows)), n_rows, output_function=output_function, parameters=parameters
    )


def assert_rows_close(actual: Tensor, expected: Tensor, *, relative: float) -> None:
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    assert torch.isfinite(expected).all()
    errors = (actual.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    assert (errors < relative).all(), f"relative errors {errors.tolist()}"


def rows_of(batch: Mapping[str, Any], rows: list[int]) -> dict[str, Any]:
    return {key: value[rows] if isinstance(value, Tensor) else value for key, value in batch.items()}


# Law 1: layerwise = functional = a float64 loop.


@pytest.mark.parametrize(
    ("name", "padding", "dtype"),
    [
        pytest.param(name, padding, dtype, marks=() if dtype == torch.float64 or name in KINDS else pytest.mark.slow)
        for name, padding in CASES
        for dtype in ROUND_OFF
    ],
)
def test_engines_equal_a_float64_loop(name: str, padding: str | None, dtype: torch.dtype):
    model = make_model(name).to(dtype)
    batch = make_batch(name, **({"padding": padding} if padding else {}))
    if dtype == torch.float64:
        batch = to_double(batch)
    names = list(select_parameters(model).parameters)
    output, out_to_loss, grads = gradient_loop(model, batch, classification_margin, names)
    for engine in GRADIENTS:
        result = gradients_of(model, batch, engine=engine)
        assert result.features.dtype == dtype
        assert_rows_close(result.features, grads, relative=ROUND_OFF[dtype])
        assert_rows_close(result.output[:, None], output[:, None], relative=10 * ROUND_OFF[dtype])
        assert_rows_close(result.out_to_loss[:, None], out_to_loss[:, None], relative=10 * ROUND_OFF[dtype])
        assert not result.features.requires_grad
        assert not result.output.requires_grad


@pytest.mark.parametrize(("name", "engine"), each_engine_of_a_kind())
def test_a_bfloat16_model_has_float32_features_close_to_its_float32_ones(name: str, engine: str):
    model, batch = make_model(name), make_batch(name)
    _, _, grads = gradient_loop(model, batch, classification_margin, list(select_parameters(model).parameters))
    halved = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    result = gradients_of(model.bfloat16(), halved, engine=engine)
    assert result.features.dtype == torch.float32
    # Where activations are pooled by their maximum, rounding may pick another of two that are nearly equal.
    assert_rows_close(result.features, grads, relative=0.5 if name == "resnet9" else 0.05)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "convnext"])
def test_layerwise_features_under_autocast_are_close_to_float32_ones(name: str):
    model, batch = make_model(name), make_batch(name)
    output_function = in_bfloat16(classification_margin, device_type="cpu", vmapped=False)
    features = gradients_of(model, batch, output_function).features
    expected = gradients_of(model, batch).features
    assert features.dtype == torch.float32
    assert not torch.equal(features, expected)  # autocast did something
    assert (torch.cosine_similarity(features, expected) > 0.99).all()


@pytest.mark.parametrize(("name", "engine", "fold"), each_engine_of_a_kind((1,), (4,)))
def test_a_sketch_of_a_batch_is_the_sketch_of_a_float64_loop(name: str, engine: str, fold: int, monkeypatch):
    monkeypatch.setattr(folding, "_SMALL", 1)  # so that these small layers fold
    model, batch = make_model(name), make_batch(name)
    parameters = select_parameters(model).parameters
    names = list(parameters)
    _, _, grads = gradient_loop(model, batch, classification_margin, names)
    projector = BlockCountSketch(proj_dim=64, seed=3, fold=fold)
    accumulator = projector.start(len(grads), dtype=torch.float64, device=grads.device)
    for name, block in zip(names, grads.split([parameters[name].numel() for name in names], dim=1), strict=True):
        projector.add(accumulator, name, block.reshape(-1, *parameters[name].shape))
    with vmappable_attention(model):
        result = GRADIENTS[engine](
            model, batch, output_function=classification_margin, parameters=parameters, projector=projector
        )
    assert_rows_close(result.features, projector.finish(accumulator), relative=2e-5)


def test_chunks_do_not_change_functional_features():
    model, batch = make_model("bert"), make_batch("bert")
    parameters = select_parameters(model).parameters
    options = {"output_function": classification_margin, "parameters": parameters, "projector": identity(parameters)}
    with vmappable_attention(model):
        whole = functional_features(model, batch, **options)
        chunked = functional_features(model, batch, **options, chunk_size=2)
    assert_rows_close(chunked.features, whole.features, relative=5e-6)


# Law 2: a row is the example's own.


@pytest.mark.parametrize(("name", "engine"), each_engine_of_a_kind())
def test_a_row_is_the_same_alone_in_any_batch_and_in_any_order(name: str, engine: str):
    model, batch = make_model(name), make_batch(name, n_rows=6)
    whole = gradients_of(model, batch, engine=engine)
    for rows in ([0], [5], [4, 1], [5, 4, 3, 2, 1, 0], [2, 2, 2]):
        part = gradients_of(model, rows_of(batch, rows), engine=engine)
        assert_rows_close(part.features, whole.features[rows], relative=ROUND_OFF[torch.float32])
        assert torch.allclose(part.output, whole.output[rows], rtol=1e-4, atol=1e-5)
        assert torch.allclose(part.out_to_loss, whole.out_to_loss[rows], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "distilbert", "albert", "tied"])
def test_wider_padding_on_the_right_does_not_change_a_row(name: str):
    model, batch = make_model(name), text_batch(width=7)
    wide = {key: F.pad(value, (0, 4)) if value.ndim == 2 else value for key, value in batch.items()}
    assert_rows_close(gradients_of(model, wide).features, gradients_of(model, batch).features, relative=5e-6)


def test_check_gradients_passes_every_supported_model():
    for name in MODELS:
        check(make_model(name), make_batch(name, n_rows=2), classification_margin)


# One rule at a time, against autograd.


class Layer(nn.Module):
    """A layer, and how it is called."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.call is None else self.call(self.layer, x)


def readout(model: Callable[[Tensor], Tensor], batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A smooth function of everything a layer returns, different in every entry."""
    values = model(batch["x"]).flatten(1).sin()
    output = (values * torch.arange(1, values.shape[1] + 1).to(values).cos()).sum(1)
    return output, torch.ones_like(output).detach()


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def ids(*shape: int, below: int = 9) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(2))


class Scale(nn.Module):
    """A bare parameter, for which there is no rule."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ClassToken(nn.Module):
    """Bare parameters that broadcast over the batch, and a Linear among them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.positions = nn.Parameter(torch.randn(1, 6, 6))
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.linear(x)], dim=1)
        return tokens + self.positions


class ManyOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, *, flag: bool) -> dict[str, Any]:
        assert flag
        return {"scaled": x * self.scale, "others": (x + self.shift, None, x.argmax(-1), x * self.shift)}


class Positions(nn.Module):
    """Position ids of shape (1, seq), looked up once for the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.linear = nn.Embedding(5, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.positions(torch.arange(5, device=x.device).unsqueeze(0)))


class TiedByHand(nn.Module):
    """One matrix embeds and, as a Linear, reads out; it is trained in both uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).tanh())


class OnePlus(nn.Module):
    """A norm of another kind, which no list of names has."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.offset = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + 1e-3) * (1 + self.gain) + self.offset


def norms() -> dict[str, Callable[[], nn.Module]]:
    """The norms that families of transformers write for themselves."""
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    kinds = (LlamaRMSNorm, Qwen3RMSNorm, MistralRMSNorm, Phi3RMSNorm, Olmo2RMSNorm, GemmaRMSNorm, Gemma3RMSNorm, T5LayerNorm)
    made = {kind.__name__: lambda kind=kind: kind(6) for kind in (*kinds, CohereLayerNorm)}
    return {**made, "OnePlus": OnePlus}


def gated_norm() -> nn.Module:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    return Qwen3NextRMSNormGated(6)


NORMS = norms()
IMAGE = (4, 4, 7, 6)
SERIES = (4, 4, 9)
TOKENS = (4, 5, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(6, 3), inputs(4, 6)),
    "linear, tokens": (lambda: nn.Linear(6, 3), inputs(*TOKENS)),
    "linear, two token axes": (lambda: nn.Linear(6, 3), inputs(4, 2, 5, 6)),
    "linear, no bias": (lambda: nn.Linear(6, 3, bias=False), inputs(*TOKENS)),
    "linear, input by name": (lambda: Layer(nn.Linear(6, 3), lambda layer, x: layer(input=x)), inputs(*TOKENS)),
    "linear, tokens merged into the batch": (
        lambda: Layer(nn.Linear(6, 3), lambda layer, x: layer(x.flatten(0, 1)).unflatten(0, (-1, 5))),
        inputs(*TOKENS),
    ),
    "linear, called twice": (lambda: Layer(nn.Linear(6, 6), lambda layer, x: layer(layer(x).tanh())), inputs(*TOKENS)),
    "linear, one output unused": (lambda: Layer(nn.Linear(6, 6), lambda layer, x: (layer(x.cos()), layer(x))[1]), inputs(4, 6)),
    "Conv1D of transformers": (lambda: Conv1D(3, 6), inputs(*TOKENS)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), inputs(*SERIES)),
    "conv1d, stride, padding, dilation": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=3, dilation=2), inputs(*SERIES)),
    "conv1d, groups": (lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), inputs(*SERIES)),
    "conv1d, depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, bias=False), inputs(*SERIES)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), inputs(*IMAGE)),
    "conv2d, stride, padding, dilation": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
        inputs(*IMAGE),
    ),
    "conv2d, stride that leaves a rest": (lambda: nn.Conv2d(4, 6, 2, stride=3), inputs(*IMAGE)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), inputs(*IMAGE)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), inputs(*IMAGE)),
    "conv2d, 1 by 1": (lambda: nn.Conv2d(4, 6, 1), inputs(*IMAGE)),
    "conv2d, padding 'same'": (lambda: nn.Conv2d(4, 6, 3, padding="same"), inputs(*IMAGE)),
    "conv2d, reflected padding": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), inputs(*IMAGE)),
    "conv2d, inplace ReLU": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 3), nn.ReLU(inplace=True)),
        inputs(*IMAGE),
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), inputs(4, 2, 3, 3, 3)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(4, 3, 2, stride=2), inputs(*IMAGE)),
    "embedding": (lambda: nn.Embedding(9, 6), ids(4, 7)),
    "embedding, padding_idx": (lambda: nn.Embedding(9, 6, padding_idx=2), ids(4, 7, below=5)),
    "embedding, two token axes": (lambda: nn.Embedding(9, 6), ids(4, 3, 2)),
    "embedding, one id each": (lambda: nn.Embedding(9, 6), ids(4)),
    "embedding, positions (1, seq)": (Positions, inputs(*TOKENS)),
    "layer norm": (lambda: nn.LayerNorm(6), inputs(*TOKENS)),
    "layer norm, two axes": (lambda: nn.LayerNorm((5, 6), eps=0.1), inputs(*TOKENS)),
    "layer norm, no bias": (lambda: nn.LayerNorm(6, bias=False), inputs(4, 6)),
    "rms norm": (lambda: nn.RMSNorm(6, eps=0.1), inputs(*TOKENS)),
    "rms norm, default eps": (lambda: nn.RMSNorm(6), inputs(*TOKENS)),
    **{f"{name}, norm of transformers": (lambda make=make: Layer(make()), inputs(*TOKENS)) for name, make in NORMS.items()},
    "gated, norm of transformers, parts": (
        lambda: Layer(gated_norm(), lambda layer, x: layer(x.flatten(0, 1), x.flatten(0, 1).cos()).reshape(x.shape)),
        inputs(*TOKENS),
    ),
    "group norm": (lambda: nn.GroupNorm(2, 4, eps=0.1), inputs(*IMAGE)),
    "group norm, no places": (lambda: nn.GroupNorm(2, 6), inputs(4, 6)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(6, eps=0.1), inputs(4, 6)),
    "batch norm 1d, places": (lambda: nn.BatchNorm1d(4), inputs(*SERIES)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4, eps=0.1), inputs(*IMAGE)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2), inputs(4, 2, 3, 3, 3)),
    "bare parameter": (lambda: Scale(6), inputs(*TOKENS)),
    "bare parameters that broadcast": (ClassToken, inputs(*TOKENS)),
    "bare parameter, called twice": (lambda: Layer(Scale(6), lambda layer, x: layer(layer(x).tanh())), inputs(*TOKENS)),
    "bare parameters, many outputs": (
        lambda: Layer(
            ManyOutputs(),
            lambda layer, x: (lambda out: out["scaled"] * out["others"][0] + out["others"][3])(layer(x, flag=True)),
        ),
        inputs(*TOKENS),
    ),
    "bare parameters, one output used": (
        lambda: Layer(ManyOutputs(), lambda layer, x: layer(x, flag=True)["others"][0]),
        inputs(*TOKENS),
    ),
    "bilinear": (lambda: Layer(nn.Bilinear(6, 6, 3), lambda layer, x: layer(x, x.cos())), inputs(*TOKENS)),
    "prelu": (lambda: nn.PReLU(4), inputs(*IMAGE)),
    "tied embedding and head": (TiedByHand, ids(4, 7)),
    "a part that is not used": (
        lambda: Layer(nn.ModuleList([nn.Linear(6, 3), nn.Linear(2, 2)]), lambda m, x: m[0](x)),
        inputs(4, 6),
    ),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_layers_gradients_equal_a_loop_over_examples(case: str):
    make, x = LAYERS[case]
    torch.manual_seed(0)
    model = randomise(make()).double()
    batch = to_double({"x": x})
    _, _, grads = gradient_loop(model, batch, readout, list(select_parameters(model).parameters))
    assert grads.norm() > 0
    # Some norms compute in float32 whatever they are given.
    relative = 1e-6 if "norm of transformers" in case.lower() else 1e-12
    assert_rows_close(gradients_of(model, batch, readout).features, grads, relative=relative)
    check(model, batch, readout)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_known_by_what_it_computes(name: str, scale: float, monkeypatch):
    monkeypatch.setattr(layerwise, "vmap", None)  # it is not differentiated
    torch.manual_seed(0)
    model, batch = Layer(nn.Sequential(randomise(NORMS[name]()), randomise(NORMS[name]()))), {"x": scale * inputs(*TOKENS)}
    _, _, grads = gradient_loop(model, batch, readout, list(select_parameters(model).parameters))
    assert_rows_close(gradients_of(model, batch, readout).features, grads, relative=2e-5 if scale < 1 else 5e-6)
    assert_rows_close(gradients_of(model.bfloat16(), batch, in_half(readout)).features, grads, relative=0.1)


def in_half(output_function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda model, batch: output_function(lambda x: model(x.bfloat16()).float(), batch)


class Softly(nn.Module):
    """A scale that enters by a function that is not affine, and is near to one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight + 0.01 * self.weight.square())


def test_a_module_that_is_nearly_affine_is_not_taken_for_one():
    torch.manual_seed(0)
    model, batch = Layer(Softly()), {"x": inputs(*TOKENS)}
    _, _, grads = gradient_loop(model, batch, readout, list(select_parameters(model).parameters))
    assert_rows_close(gradients_of(model, batch, readout).features, grads, relative=5e-6)


def test_a_parameter_that_is_not_used_has_a_gradient_of_zero():
    make, x = LAYERS["a part that is not used"]
    torch.manual_seed(0)
    model = make()
    result = gradients_of(model, {"x": x}, readout, patterns=[r"layer\.1"])
    assert torch.equal(result.features, torch.zeros(4, 6))


def test_an_activation_overwritten_in_place_by_a_function_is_no_obstacle():
    torch.manual_seed(0)
    model = Layer(nn.Linear(6, 3), lambda layer, x: F.leaky_relu(layer(x), inplace=True))
    batch = {"x": inputs(4, 6)}
    _, _, grads = gradient_loop(model, batch, readout, list(select_parameters(model).parameters))
    assert_rows_close(gradients_of(model, batch, readout).features, grads, relative=5e-6)


@pytest.mark.parametrize("case", ["windows", "tokens"])
def test_a_layer_without_a_rule_that_sees_examples_cut_up_is_whole_or_refused(case: str):
    """Such as a norm of one's own inside windowed attention: (batch · windows, tokens, d)."""
    cut = {"windows": lambda x: x.reshape(-1, 4, 6), "tokens": lambda x: x.reshape(-1, 6)}[case]
    model = Layer(randomise(Scale(6)), lambda layer, x: layer(cut(x)).reshape(x.shape))
    batch = {"x": inputs(4, 8, 6)}
    _, _, grads = gradient_loop(model, batch, readout, ["layer.scale"])
    try:
        result = gradients_of(model, batch, readout)
    except ValueError as error:
        assert "layer.scale" in str(error)  # noqa: PT017
    else:
        assert_rows_close(result.features, grads, relative=5e-6)


class SharedPositions(Positions):
    """Position ids of shape (seq,): nothing in them tells examples apart, even where their number divides seq."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.positions(torch.arange(x.shape[1], device=x.device)))


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_an_embedding_of_ids_without_an_example_axis_is_whole_or_refused(batch_size: int):
    torch.manual_seed(0)
    model, batch = SharedPositions(), {"x": inputs(batch_size, 5, 6)}
    _, _, grads = gradient_loop(model, batch, readout, list(select_parameters(model).parameters))
    try:
        plan = check(model, batch, readout)
        result = gradients_of(model, batch, readout, plan=plan)
    except ValueError as error:
        assert "positions.weight" in str(error)  # noqa: PT017
    else:
        assert_rows_close(result.features, grads, relative=5e-6)


# Selection.


@pytest.mark.parametrize("engine", GRADIENTS)
@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("bert", ["classifier"]),
        ("bert", [r"layer\.1\.", "word_embeddings"]),
        ("bert", [r"bias$"]),
        ("bert", ["LayerNorm"]),
        ("albert", ["attention"]),
        ("gpt2", [r"c_attn\.weight", "wpe"]),
        ("llama", ["norm"]),
        ("tied", ["embedding"]),
        ("vit", ["cls_token", "classifier"]),
        ("resnet", ["normalization"]),
        ("resnet", [r"stages\.1\.layers\.0\.layer\.1\.normalization"]),
    ],
)
def test_features_of_a_selection_are_that_slice_of_the_whole_gradient(name: str, patterns: list[str], engine: str):
    model, batch = make_model(name), make_batch(name)
    every = select_parameters(model).parameters
    chosen = select_parameters(model, patterns).parameters
    assert 0 < len(chosen) < len(every)
    whole = gradients_of(model, batch, engine=engine).features
    slices = whole.split([parameter.numel() for parameter in every.values()], dim=1)
    expected = torch.cat([block for key, block in zip(every, slices, strict=True) if key in chosen], dim=1)
    result = gradients_of(model, batch, engine=engine, patterns=patterns)
    assert_rows_close(result.features, expected, relative=5e-6)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in MODELS])
def test_each_parameter_can_be_selected_alone(name: str):
    model, batch = make_model(name), make_batch(name, n_rows=3)
    every = select_parameters(model).parameters
    whole = gradients_of(model, batch).features
    for key, block in zip(every, whole.split([p.numel() for p in every.values()], dim=1), strict=True):
        alone = gradients_of(model, batch, patterns=[f"^{key}$".replace(".", r"\.")]).features
        # Against the whole: a key's bias, which softmax ignores, has no gradient but round-off.
        assert torch.isfinite(alone).all(), key
        assert ((alone - block).norm(dim=1) <= 5e-6 * whole.norm(dim=1)).all(), key


def watch_hidden_states(model: nn.Module) -> tuple[dict[str, bool], Callable[..., tuple[Tensor, Tensor]]]:
    """Return an output function, and which layers' outputs it has seen to require a gradient."""
    needs: dict[str, bool] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            needs[name] = hidden.requires_grad or hidden.grad_fn is not None

        return hook

    for name, module in model.named_modules():
        if name.endswith((".embeddings", "layer.0", "layer.1", ".pooler")):
            module.register_forward_hook(remember(name))
    return needs, classification_margin


def test_what_is_not_selected_is_not_differentiated():
    model, batch = make_model("bert"), make_batch("bert")
    needs, output_function = watch_hidden_states(model)
    gradients_of(model, batch, output_function, patterns=["classifier"])
    assert needs == {
        "bert.embeddings": False,
        "bert.encoder.layer.0": False,
        "bert.encoder.layer.1": False,
        "bert.pooler": False,
    }
    gradients_of(model, batch, output_function, patterns=[r"layer\.1\.output"])
    assert needs == {"bert.embeddings": False, "bert.encoder.layer.0": False, "bert.encoder.layer.1": True, "bert.pooler": True}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_are_not_selected():
    model = make_model("bert")
    model.bert.requires_grad_(False)
    selection = select_parameters(model)
    assert list(selection.parameters) == ["classifier.weight", "classifier.bias"]
    assert selection.coverage == 1.0
    assert selection.shapes == {"classifier.weight": [3, 16], "classifier.bias": [3]}
    assert selection.grad_dim == 3 * 16 + 3
    assert gradients_of(model, make_batch("bert")).features.shape == (5, 51)


def test_coverage_is_the_selected_share_of_trainable_entries():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    assert select_parameters(model).coverage == 1.0
    assert select_parameters(model, [r"^1\."]).coverage == pytest.approx(12 / 32)
    assert select_parameters(model, [r"^1\.", "bias"]).coverage == pytest.approx(17 / 32)
    model[0].weight.requires_grad_(False)
    assert select_parameters(model, ["bias"]).coverage == pytest.approx(7 / 17)


def test_parameters_keep_the_models_order_and_tied_ones_appear_once():
    model = make_model("tied")
    selection = select_parameters(model, ["mix", "embedding"])
    assert list(selection.parameters) == ["embedding.weight", "mix.weight", "mix.bias"]
    assert list(select_parameters(model).parameters) == ["embedding.weight", "mix.weight", "mix.bias"]
    assert select_parameters(model).grad_dim == VOCAB_SIZE * 8 + 72


def test_a_model_with_nothing_to_train_is_refused():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"Linear has no trainable parameter.*requires_grad_\(True\)"):
        select_parameters(model)


def test_a_pattern_selects_frozen_parameters_only_where_it_matches_no_trainable_one():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    model[0].requires_grad_(False)
    assert list(select_parameters(model, ["weight"]).parameters) == ["1.weight"]
    selection = select_parameters(model, ["0.weight", "bias"])
    assert list(selection.parameters) == ["0.weight", "1.bias"]
    assert selection.coverage == pytest.approx(17 / 27)
    model[0].weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"0\.weight is of torch\.int8, and quantized weights have no gradients"):
        select_parameters(model, ["0.weight"])


def test_a_pattern_that_matches_nothing_shows_the_names_there_are():
    with pytest.raises(ValueError, match=r"'head' matches none of the 4 parameters, such as 0\.weight.*1\.bias"):
        select_parameters(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), ["0", "head"])


def test_a_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(ValueError, match=r"takes regular expressions, but '\(' is not one"):
        select_parameters(nn.Linear(2, 2), ["("])


def test_an_empty_list_of_patterns_is_refused():
    with pytest.raises(ValueError, match="parameters"):
        select_parameters(nn.Linear(2, 2), [])


# What a model is left as.


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "training": [module.training for module in model.modules()],
        "inplace": [getattr(module, "inplace", None) for module in model.modules()],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grads": [parameter.grad for parameter in model.parameters()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "values": [tensor.sum().item() for tensor in model.state_dict().values()],
    }


def fail(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    classification_margin(model, batch)
    raise KeyError("on purpose")


def model_in_an_odd_state(name: str) -> nn.Module:
    model = make_model(name)
    if name == "bert":
        model.gradient_checkpointing_enable()
        model.bert.encoder.layer[0].eval()
        model.bert.embeddings.requires_grad_(False)
    else:
        model.resnet.embedder.embedder.activation = nn.ReLU(inplace=True)
        model.resnet.encoder.stages[1].eval()
        model.resnet.embedder.requires_grad_(False)
    return model


@pytest.mark.parametrize("output_function", [classification_margin, fail], ids=["done", "failed"])
@pytest.mark.parametrize("engine", GRADIENTS)
@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_a_model_is_left_as_it_was(name: str, engine: str, output_function: Callable[..., tuple[Tensor, Tensor]]):
    model = model_in_an_odd_state(name)
    before = state_of(model)
    assert len(set(before["training"])) == len(set(before["requires_grad"])) == 2
    try:
        gradients_of(model, make_batch(name), output_function, engine=engine)
    except KeyError:
        assert output_function is fail
    else:
        assert output_function is classification_margin
    assert state_of(model) == before


def test_check_gradients_leaves_a_model_as_it_was():
    model = model_in_an_odd_state("bert")
    before = state_of(model)
    check(model, make_batch("bert", n_rows=2), classification_margin)
    assert state_of(model) == before


def test_a_batch_is_left_as_it_was():
    model, batch = make_model("vit"), make_batch("vit")
    before = {key: value.clone() for key, value in batch.items()}
    gradients_of(model, batch)
    assert all(torch.equal(batch[key], before[key]) and not batch[key].requires_grad for key in batch)


@pytest.mark.parametrize("engine", GRADIENTS)
def test_dropout_is_off_and_gradients_are_on_whatever_the_surroundings(engine: str):
    model, batch = make_model("bert"), make_batch("bert")
    assert any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in model.modules())
    first = gradients_of(model, batch, engine=engine)
    with torch.no_grad():
        second = gradients_of(model.eval(), batch, engine=engine)
    assert torch.equal(first.features, second.features)
    assert first.features.norm() > 0


def test_batch_norm_statistics_do_not_move():
    model, batch = make_model("resnet"), make_batch("resnet")
    before = copy.deepcopy(dict(model.named_buffers()))
    gradients_of(model, batch)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


# Refusals.


def test_a_bias_shared_by_the_whole_batch_is_refused_by_name():
    model = swin()
    with pytest.raises(
        ValueError,
        match=r"SwinRelativePositionBias \(parameters .*relative_position_bias_table\) does not keep the examples of a batch apart",
    ):
        gradients_of(model, image_batch())


def test_the_rest_of_a_model_with_a_refused_parameter_can_be_selected():
    model, batch = swin(), image_batch()
    patterns = [r"classifier", r"mlp", r"norm", r"embeddings", r"_proj"]
    names = list(select_parameters(model, patterns).parameters)
    assert not any("relative" in name for name in names)
    _, _, grads = gradient_loop(model, batch, classification_margin, names)
    assert_rows_close(gradients_of(model, batch, patterns=patterns).features, grads, relative=5e-6)


@pytest.mark.parametrize("use", ["outside alone", "outside as well"])
def test_a_parameter_used_outside_the_module_that_owns_it_is_covered_or_named(use: str):
    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return F.linear(x if use == "outside alone" else layer[1](x), layer[1].weight, layer[1].bias) + layer[0](x)

    torch.manual_seed(0)
    model = Layer(nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), call)
    batch = {"x": inputs(3, 6)}
    _, _, grads = gradient_loop(model, batch, readout, list(select_parameters(model).parameters))
    if use == "outside alone":  # a module that is never called has its parameters watched where they are used
        result = gradients_of(model, batch, readout, plan=check(model, batch, readout))
        assert_rows_close(result.features, grads, relative=5e-6)
    else:
        with pytest.raises(ValueError, match=r"whole gradient of layer\.1\.weight, layer\.1\.bias: .*gradients='loop'"):
            check(model, batch, readout)
    result = gradients_of(model, batch, readout, engine="functional")
    assert_rows_close(result.features, grads, relative=5e-6)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 6, "add_bias_kv": True}], ids=str)
def test_multi_head_attention_of_torch_which_calls_no_module_for_its_output_is_covered(options: dict[str, Any]):
    torch.manual_seed(0)
    attention = randomise(nn.MultiheadAttention(6, 2, batch_first=True, **options))
    model = Layer(attention, lambda layer, x: layer(x, x, x, need_weights=False)[0])
    batch = {"x": inputs(*TOKENS)}
    check(model, batch, readout)
    _, _, grads = gradient_loop(model, batch, readout, list(select_parameters(model).parameters))
    assert_rows_close(gradients_of(model, batch, readout).features, grads, relative=5e-6)


def test_a_parameter_that_the_output_function_reads_itself_is_covered():
    model = Layer(nn.Linear(6, 3))
    model.temperature = nn.Parameter(torch.tensor([0.3]))

    def output(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        values, extra = readout(model, batch)
        scale = model.get_parameter("temperature").exp().reshape(-1)
        return scale * values + scale.square(), extra

    batch = {"x": inputs(3, 6)}
    check(model, batch, output)
    _, _, grads = gradient_loop(model, batch, output, list(select_parameters(model).parameters))
    for engine in GRADIENTS:
        assert_rows_close(gradients_of(model, batch, output, engine=engine).features, grads, relative=5e-6)
    assert "get_parameter" not in model.__dict__
    assert gradients_of(model, batch, output, patterns=["weight"]).features.shape == (3, 18)


MIXERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "mean over the batch": (
        r"row \d changes with the other examples of its batch",
        lambda: Layer(nn.Linear(6, 3), lambda layer, x: layer(x) - 0.5 * layer(x).mean(0)),
    ),
    "batch norm without statistics": (
        "whole gradient of weight.* see the whole batch at a time",
        lambda: nn.BatchNorm1d(5, track_running_stats=False),
    ),
    "a sequence in front": (
        "loses the examples' axis: `linear` has the examples along another axis than the first",
        lambda: Layer(nn.Linear(6, 3), lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1)),
    ),
}


@pytest.mark.parametrize("case", MIXERS)
def test_a_model_that_mixes_the_examples_of_a_batch_is_caught(case: str):
    torch.manual_seed(0)
    batch = {"x": inputs(5, 5, 6)}
    message, make = MIXERS[case]
    with pytest.raises(ValueError, match=message):
        check(randomise(make()), batch, readout)


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.tanh() if x.sum().item() < math.inf else x


def test_a_module_that_cannot_be_vectorised_is_named():
    with pytest.raises(ValueError, match=r"no rule for LooksAtValues \(parameters layer\.scale\).*gradients='loop'"):
        gradients_of(Layer(LooksAtValues()), {"x": inputs(4, 6)}, readout)


class RunsOnce(LooksAtValues):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 1:
            raise ValueError("one example is not enough")
        return x * self.scale.tanh()


def test_a_module_that_cannot_be_run_again_is_named():
    with pytest.raises(ValueError, match=r"no rule for RunsOnce \(parameters layer\.scale\).*gradients='loop'"):
        gradients_of(Layer(RunsOnce()), {"x": inputs(4, 6)}, readout)


def test_a_failed_second_run_leaves_no_hook_behind():
    model = Layer(nn.Sequential(nn.Linear(6, 6), RunsOnce()))
    before = state_of(model)
    with pytest.raises(ValueError, match="RunsOnce"):
        gradients_of(model, {"x": inputs(4, 6)}, readout)
    assert state_of(model) == before


def _with(output: Callable[[Tensor], Tensor], out_to_loss: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def output_function(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        logits = model(batch["x"])
        return output(logits), out_to_loss(logits.detach())

    return output_function


WRONG_SHAPES = {
    "one number per class": _with(lambda logits: logits, lambda logits: logits),
    "one number for the batch": _with(lambda logits: logits.sum(), lambda logits: logits.sum()),
    "one number per example and class, flattened": _with(lambda logits: logits.flatten(), lambda logits: logits.flatten()),
    "out-to-loss of another shape": _with(lambda logits: logits[:, 0], lambda logits: logits[:, :1]),
}


@pytest.mark.parametrize("engine", GRADIENTS)
@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_an_output_function_of_the_wrong_shape_is_refused(case: str, engine: str):
    with pytest.raises(ValueError, match=r"shape \(batch,\), but it returned shapes"):
        gradients_of(nn.Linear(6, 3), {"x": inputs(4, 6)}, WRONG_SHAPES[case], engine=engine)


def test_what_is_no_tensor_in_a_batch_is_handed_on():
    def output_function(model: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return readout(model, {"x": batch["scale"] * batch["x"]})

    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    batch = {"scale": 2.0, "x": inputs(4, 6)}
    _, _, grads = gradient_loop(model, batch, output_function, ["weight", "bias"])
    for engine in GRADIENTS:
        assert_rows_close(gradients_of(model, batch, output_function, engine=engine).features, grads, relative=5e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_vmappable_attention_keeps_its_name_and_is_put_back(implementation: str):
    from transformers import AttentionMaskInterface

    model = make_model("bert")
    model.set_attn_implementation(implementation)
    masks = AttentionMaskInterface()
    before = masks[implementation]
    with vmappable_attention(model):
        assert model.config._attn_implementation == implementation  # some models decide by it what they compute
        assert masks[implementation] is not before
        inside = gradients_of(model, make_batch("bert"), engine="functional")
    assert model.config._attn_implementation == implementation
    assert masks[implementation] is before
    assert_rows_close(inside.features, gradients_of(model, make_batch("bert")).features, relative=5e-6)
    with vmappable_attention(nn.Linear(2, 2)), vmappable_attention(SimpleNamespace()):  # type: ignore[arg-type]
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_same_on_cuda(name: str):
    model, batch = make_model(name).double(), to_double(make_batch(name))
    expected = gradients_of(model, batch).features
    actual = gradients_of(model.cuda(), {key: value.cuda() for key, value in batch.items()})
    assert actual.features.is_cuda
    # Rotary positions are float32 in any dtype, and CUDA's cosines are not the CPU's.
    assert_rows_close(actual.features.cpu(), expected, relative=1e-6 if name in ("llama", "modernbert") else 1e-10)


class ScaleKept(nn.Module):
    """Keeps in evaluation mode what it made of its table, as LeViT's and timm's attention do, until `train` drops it."""

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8))
        self.keeps = keeps
        self.kept: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training or not self.keeps or "scale" not in self.kept:
            self.kept["scale"] = self.table.tanh() * 2
        return hidden * self.kept["scale"]


class Kept(nn.Module):
    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_SIZE, 8)
        self.scale = ScaleKept(keeps=keeps)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, **others: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.scale(self.embedding(input_ids)).tanh().mean(1)))


@pytest.mark.parametrize("engine", ["layerwise", "loop"])
def test_what_a_module_keeps_from_pass_to_pass_costs_no_parameter_its_gradient(engine: str):
    torch.manual_seed(0)
    model, plain, batch = Kept(keeps=True).eval(), Kept(keeps=False), text_batch()
    plain.load_state_dict(model.state_dict())
    names = list(select_parameters(model).parameters)
    _, _, expected = gradient_loop(plain, batch, classification_margin, names)
    with torch.no_grad():
        model(**batch)  # an evaluation, which leaves a constant behind
    first, again = (gradients_of(model, batch, engine=engine).features for _ in range(2))
    assert_rows_close(first, expected, relative=ROUND_OFF[torch.float32])
    assert torch.equal(first, again)
    assert not model.scale.kept
