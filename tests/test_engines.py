"""Which engine makes the gradients of a run: what it finds, and that every row is right whichever it is."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets_for_tests import image_rows, token_rows
from models import N_CLASSES, VOCAB_SIZE, make_model
from torch import Tensor, nn

from hf_trak import AttributionIndex, Featurizer, Task, TrakConfig
from hf_trak.featurizing.engine_choice import rows_to_check
from hf_trak.gradients import loop
from hf_trak.gradients.loop import loop_features
from hf_trak.projectors import make_projector

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule"
)

# Models that are hard to serve, of (batch, tokens, 4) with a mask.


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.head(self.mix(self.first(x).tanh(), mask).tanh()).squeeze(2) * mask).sum(1)

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(x)


class ZeroesPadding(Base):
    """Writes zeros over padding in place, only where there is any, as Wav2Vec2 does."""

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.second(x)
        if not mask.all():
            x[~mask] = 0.0
        return x


class AddsInPlace(Base):
    """Writes over what a layer was given, and over what it returned."""

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.second(x)
        y += 1
        y[:, 0] *= 2
        return y


class OverwritesItsInput(Base):
    """Writes over what a layer was given, in which its gradient is."""

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x.clone()
        y = self.second(x)
        x *= 0.5
        return y + x


class ReadsPadding(Base):
    """A mean over all tokens, padding too."""

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(x) - x.mean(1, keepdim=True)


class CountsFromTheRight(Base):
    """Each token meets what lies at the end of the batch's width."""

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(x) + x[:, -1:]


class MixesExamples(Base):
    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(x) - 0.3 * x.mean((0, 1))


class Experts(Base):
    """Tokens are gathered by index for one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        flat = self.second(x).reshape(-1, 4)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            at = ((x.reshape(-1, 4)[:, 0] > 0.35).long() == number).nonzero().flatten()
            if len(at):
                out = out.index_add(0, at, expert(flat[at]))
        return out.view_as(x)


class Table(nn.Module):
    """Makes something of a table that the examples share, whose first axis has some size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x + (table @ self.weight).tanh().sum(0)


class SharesATable(Base):
    """A table of six rows: as long as a batch of six, and as three batches of two."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.register_buffer("rows", torch.linspace(-1, 1, 24).reshape(6, 4))

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.table(self.second(x), self.rows)


class ProjectsATable(Base):
    """A Linear of a table that the examples share."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.register_buffer("rows", torch.linspace(-1, 1, 24).reshape(6, 4))

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(x) + self.project(self.rows).tanh().sum(0)


class RepeatsATable(ProjectsATable):
    """A projection, repeated for each example and head, as DeBERTa's."""

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.second(x)
        tables = self.project(self.rows).view(6, 2, 2).permute(1, 0, 2).repeat(len(x), 1, 1)  # (batch · heads, rows, 2)
        heads = x.view(len(x), -1, 2, 2).permute(0, 2, 1, 3).flatten(0, 1)
        scores = torch.bmm(heads, tables.mT).tanh().sum(2).view(len(x), 2, -1)
        return x + scores.mT.repeat(1, 1, 2)


class LooksAtATableByWidth(ProjectsATable):
    """Does other things with its table where rows are long."""

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        table = self.project(self.rows)
        if x.shape[1] > 6:
            table = (table * 2).exp()
        return self.second(x) + table.tanh().sum(0)


class TokensFirst(ProjectsATable):
    """Its table meets tensors of (tokens, batch, 4)."""

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.second(x).transpose(0, 1) + self.project(self.rows[:1])).transpose(0, 1)


class ConvolvesByHand(Base):
    """Uses a convolution's weight without calling it, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, groups=4)

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        x = nn.functional.pad(self.second(x).mT, (2, 0))
        return nn.functional.conv1d(x, self.conv.weight, self.conv.bias, groups=4).mT


class Sinks(nn.Module):
    """Returns its weights beside its output, which is made of them, as attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = (x * self.sinks).softmax(-1)
        return weights * x, weights


class ReturnsAnIntermediate(Base):
    def __init__(self) -> None:
        super().__init__()
        self.sinks = Sinks()

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        output, weights = self.sinks(self.second(x))
        return output + 0.1 * weights


class HasAFaintParameter(Base):
    """A parameter used by hand, with a ten-thousandth of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.faint = nn.Linear(4, 4)

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(x) + 1e-4 * nn.functional.linear(x, self.faint.weight, self.faint.bias)


class Recurrent(Base):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(4, 4, batch_first=True)

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.second(x) + self.cell(x)[0]


class OnePicture(nn.Module):
    """A BatchNorm whose output is transposed, as CvT's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 6, 1), nn.BatchNorm2d(6)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        pictures = self.norm(self.conv(x.transpose(1, 2)).unsqueeze(3))
        return (self.head(pictures.flatten(2).permute(0, 2, 1).tanh()).squeeze(2) * mask).sum(1)


MODELS: dict[type[nn.Module], str] = {
    Base: "layerwise",
    ZeroesPadding: "layerwise",
    AddsInPlace: "layerwise",
    ReadsPadding: "loop",
    CountsFromTheRight: "loop",
    MixesExamples: "loop",
    Experts: "any",
    SharesATable: "layerwise",
    ProjectsATable: "layerwise",
    RepeatsATable: "layerwise",
    LooksAtATableByWidth: "layerwise",
    TokensFirst: "loop",
    ConvolvesByHand: "layerwise",
    ReturnsAnIntermediate: "layerwise",
    HasAFaintParameter: "layerwise",
    Recurrent: "loop",
    OnePicture: "layerwise",
}


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["x"]) for row in rows)
    x, mask = torch.zeros(len(rows), width, 4), torch.zeros(len(rows), width, dtype=torch.bool)
    for place, row in enumerate(rows):
        x[place, : len(row["x"])] = torch.as_tensor(row["x"])
        mask[place, : len(row["x"])] = True
    return {"x": x, "attention_mask": mask}


def output(model: Any, batch: Any) -> Tensor:
    return model(batch["x"], batch["attention_mask"])


def make_task() -> Task:
    return Task.custom(output, collator=collate)


def rows(lengths: Sequence[int], *, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_list([{"x": torch.randn(length, 4, generator=generator).tolist()} for length in lengths])


def make(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


def identity(model: nn.Module, **options: Any) -> TrakConfig:
    return TrakConfig(projector="identity", proj_dim=sum(p.numel() for p in model.parameters()), **options)


def reference(
    model: nn.Module,
    dataset: Dataset,
    collator: Callable[..., Any] = collate,
    of: Any = output,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return every row's gradient, alone and without padding."""
    model, grads = model.to(dtype).eval(), []
    for row in dataset:
        batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in collator([row]).items()}
        found = torch.autograd.grad(of(model, batch).sum(), list(model.parameters()), allow_unused=True)
        pairs = zip(found, model.parameters(), strict=True)
        grads.append(torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for g, p in pairs]).double())
    model.float()
    return torch.stack(grads)


def assert_right(model: nn.Module, found: Any, expected: Tensor, *, relative: float = 1e-5) -> None:
    """Hold each row and each parameter against its own norm."""
    found = torch.as_tensor(np.asarray(found)).double()
    sizes = [parameter.numel() for parameter in model.parameters()]
    for (name, _), actual, wanted in zip(
        model.named_parameters(), found.split(sizes, 1), expected.split(sizes, 1), strict=True
    ):
        error = (actual - wanted).norm(dim=1)
        assert (error <= relative * wanted.norm(dim=1) + 1e-6 * expected.norm(dim=1)).all(), (name, error)


@pytest.mark.parametrize(
    ("kind", "lengths"),
    [
        *[pytest.param(kind, [5, 3, 5, 3, 4, 6], id=kind.__name__) for kind in MODELS],
        *[
            pytest.param(
                kind, lengths, id=f"{kind.__name__}-{lengths}", marks=() if kind is ZeroesPadding else pytest.mark.slow
            )
            for kind in MODELS
            for lengths in ([5, 5, 5, 3], [3, 5, 5, 5])
        ],
    ],
)
def test_every_model_is_right_by_whichever_engine(kind: type[nn.Module], lengths: list[int]):
    model, dataset = make(kind), rows(lengths)
    featurizer = Featurizer(model, identity(model), task=make_task())
    found = featurizer(dataset[:])["trak_features"]
    assert featurizer.engine is not None
    assert MODELS[kind] in (featurizer.engine.name, "any")
    assert (featurizer.engine.reason is not None) == (featurizer.engine.name == "loop")
    expected = reference(model, dataset)
    assert expected.norm() > 0
    assert_right(model, found, expected)
    other = rows([2, 7, 1, 7, 3, 3, 4], seed=1)
    expected = reference(model, other)
    for size in (1, 2, 3, 6, 7):
        parts = [featurizer(other[start : start + size])["trak_features"] for start in range(0, 7, size)]
        assert_right(model, np.concatenate(parts), expected)


@pytest.mark.parametrize("engine", ["auto", "layerwise"])
def test_a_layer_whose_input_is_overwritten_has_no_gradient_rather_than_a_wrong_one(engine: str):
    model = make(OverwritesItsInput)
    with pytest.raises((RuntimeError, ValueError), match=r"modified by an inplace operation|modified in place"):
        Featurizer(model, identity(model, gradients=engine), task=make_task())(rows([5, 3, 4])[:])


@pytest.mark.parametrize("engine", ["layerwise", "functional"])
@pytest.mark.parametrize("kind", [ReadsPadding, CountsFromTheRight, MixesExamples], ids=lambda kind: kind.__name__)
def test_an_engine_that_would_be_wrong_is_refused_by_name(kind: type[nn.Module], engine: str):
    if (kind, engine) == (MixesExamples, "functional"):
        return  # each example has a pass of its own, and padding adds nothing to the mean but zeros of a bias
    model, dataset = make(kind), rows([5, 3, 4])
    featurizer = Featurizer(model, identity(model, gradients=engine), task=make_task())
    with pytest.raises(ValueError, match=r"The gradient of row \d changes with .*padding.*gradients='loop'"):
        featurizer(dataset[:])


class TrainsInTrainingModeAlone(Base):
    """Says so when it goes forward, or only when it goes back, as Reformer does."""

    when = "forward"

    def mix(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.second(x)
        if self.when == "forward" and torch.is_grad_enabled():
            raise NotImplementedError("call model.train() first")
        if x.requires_grad:
            x.register_hook(self.refuse)
        return x

    def refuse(self, grad: Tensor) -> None:
        assert self.training, "call model.train() first"


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_model_that_refuses_gradients_in_evaluation_mode_is_named(when: str):
    model, dataset = make(TrainsInTrainingModeAlone), rows([5, 3, 4])
    model.when = when
    with pytest.raises(
        ValueError, match="TrainsInTrainingModeAlone itself refuses gradients in evaluation mode.*call model.train"
    ):
        Featurizer(model, identity(model), task=make_task())(dataset[:])


def test_what_torch_func_cannot_trace_is_refused_with_the_way_out():
    model, dataset = make(ZeroesPadding), rows([5, 3, 4])
    featurizer = Featurizer(model, identity(model, gradients="functional"), task=make_task())
    with pytest.raises(ValueError, match=r"gradients='functional' cannot serve ZeroesPadding: .*gradients='loop'"):
        featurizer(dataset[:])


def test_a_single_row_passes_no_check_and_is_right():
    model, dataset = make(MixesExamples), rows([4])
    featurizer = Featurizer(model, identity(model), task=make_task())
    assert_right(model, featurizer(dataset[:])["trak_features"], reference(model, dataset))
    assert featurizer.engine is None
    featurizer(rows([4, 3])[:])
    assert featurizer.engine is not None
    assert featurizer.engine.name == "loop"


def test_a_batch_that_the_engine_refuses_is_computed_one_row_at_a_time(caplog):
    model = make(Experts)
    dataset = rows([6, 6, 6, 5])
    flat = torch.tensor(dataset["x"][0] + dataset["x"][1])
    assert flat.shape == (12, 4)

    def first_expert(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": [[-2.0 if abs(token[0]) < 9 else token[0], *token[1:]] for token in row["x"]]}

    with torch.no_grad():  # where no token of these rows goes to the second expert
        model.first.weight.copy_(torch.eye(4))
        model.first.bias.zero_()
    seen = dataset.map(first_expert)
    featurizer = Featurizer(model, identity(model), task=make_task())
    featurizer(seen[:])
    assert featurizer.engine is not None
    assert featurizer.engine.name == "layerwise"
    assert_right(model, featurizer(dataset[:])["trak_features"], reference(model, dataset))
    assert "one row at a time, since `layerwise` does not serve them" in caplog.text


def test_padding_that_no_check_has_seen_is_not_trusted():
    model = make(ReadsPadding)
    featurizer = Featurizer(model, identity(model), task=make_task())
    featurizer(rows([4, 4, 4])[:])  # nothing is padded
    assert featurizer.engine is not None
    assert featurizer.engine.name == "layerwise"
    mixed = rows([4, 6, 2], seed=1)
    assert_right(model, featurizer(mixed[:])["trak_features"], reference(model, mixed))


def test_the_rows_of_the_check_are_of_different_lengths_wherever_these_are():
    def lengths(dataset: Dataset) -> list[int]:
        return [len(row) for row in dataset["x"]]

    same = [5] * 300
    assert rows_to_check(rows(same[:10]), lengths) == [9, 0, 8]
    found = rows_to_check(rows([*same, 2, 9, *same]), lambda dataset: lengths(dataset))
    assert len(found) == len(set(found)) == 3
    far = rows([*same, *[7] * 300])
    assert {len(far["x"][row]) for row in rows_to_check(far, lengths)} == {5, 7}
    assert rows_to_check(rows([3]), lengths) == [0]
    assert rows_to_check(rows([3, 3, 3, 3]), lambda dataset: None) == [0, 1, 2]


# Families of transformers that lose the examples' axis, or read padding.


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForSequenceClassification

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": VOCAB_SIZE,
    }
    experts = {"num_local_experts": 3, "num_key_value_heads": 1, "num_labels": N_CLASSES, "pad_token_id": 0}
    return MixtralForSequenceClassification(MixtralConfig(**sizes, **experts))


def deberta() -> nn.Module:
    """As on the Hub: positions relative to each other, from a table that all examples share."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": VOCAB_SIZE,
    }
    kind = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4, "norm_rel_ebd": "layer_norm"}
    return DebertaV2ForSequenceClassification(
        DebertaV2Config(**sizes, **kind, num_labels=N_CLASSES, max_position_embeddings=20, share_att_key=True)
    )


def fnet() -> nn.Module:
    """Its Fourier transform over tokens reads padding."""
    from transformers import FNetConfig, FNetForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": VOCAB_SIZE}
    return FNetForSequenceClassification(FNetConfig(**sizes, num_labels=N_CLASSES, max_position_embeddings=20))


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": VOCAB_SIZE, "time_step_rank": 2}
    return MambaForCausalLM(MambaConfig(**sizes))


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def mpnet() -> nn.Module:
    """A bias for each pair of tokens, computed once and shared by its layers."""
    from transformers import MPNetConfig, MPNetForSequenceClassification

    sizes = {"vocab_size": VOCAB_SIZE, "num_labels": N_CLASSES, "max_position_embeddings": 30, "pad_token_id": 0}
    return MPNetForSequenceClassification(MPNetConfig(**_SIZES, **sizes))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB_SIZE}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


def swinv2() -> nn.Module:
    """Windows that are shifted, and a bias that a small network makes of distances."""
    from transformers import Swinv2Config, Swinv2ForImageClassification

    sizes = {"image_size": 8, "patch_size": 1, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
    return Swinv2ForImageClassification(Swinv2Config(**sizes, num_labels=N_CLASSES))


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    sizes = {"image_size": 8, "patch_size": 1, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
    return SwinForImageClassification(SwinConfig(**sizes, num_labels=N_CLASSES))


def beit() -> nn.Module:
    from transformers import BeitConfig, BeitForImageClassification

    sizes = {"image_size": 8, "patch_size": 2, "num_labels": N_CLASSES, "use_shared_relative_position_bias": True}
    return BeitForImageClassification(BeitConfig(**_SIZES, **sizes))


def gpt_oss() -> nn.Module:
    """Experts, and attention sinks."""
    from transformers import GptOssConfig, GptOssForSequenceClassification

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1, "head_dim": 8}
    sizes = {"vocab_size": VOCAB_SIZE, "num_labels": N_CLASSES, "pad_token_id": 0}
    return GptOssForSequenceClassification(GptOssConfig(**_SIZES, **experts, **sizes))


def qwen3_next() -> nn.Module:
    """Linear attention: a convolution whose weight is used by hand, decays, a gated norm."""
    from transformers import Qwen3NextConfig, Qwen3NextForSequenceClassification

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
    heads = {"num_key_value_heads": 1, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
    text = {"vocab_size": VOCAB_SIZE, "num_labels": N_CLASSES, "pad_token_id": 0}
    return Qwen3NextForSequenceClassification(Qwen3NextConfig(**_SIZES, **experts, **heads, **sizes, **text))


def biogpt() -> nn.Module:
    from transformers import BioGptConfig, BioGptForSequenceClassification

    sizes = {"vocab_size": VOCAB_SIZE, "num_labels": N_CLASSES, "pad_token_id": 0, "max_position_embeddings": 30}
    return BioGptForSequenceClassification(BioGptConfig(**_SIZES, **sizes))


PICTURES, EXPERTS = (swin, swinv2, beit), (mixtral, gpt_oss, qwen3_next)
BY_LAYER = (deberta, mamba, mpnet, t5, biogpt, *PICTURES, *EXPERTS)
FAMILIES = {**dict.fromkeys(BY_LAYER, "layerwise"), fnet: "loop"}


@pytest.mark.parametrize("kind", FAMILIES, ids=lambda kind: kind.__name__)
def test_families_that_are_hard_to_serve_are_right_by_whichever_engine(kind: Callable[[], nn.Module]):
    model = make(kind).eval()
    with torch.no_grad():  # tables of positions may be zero at first
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    dataset = image_rows(6) if kind in PICTURES else token_rows(6)
    if kind in (mamba, t5):
        dataset = dataset.remove_columns("label").add_column("labels", dataset["input_ids"][:])
    featurizer = Featurizer(model, identity(model))
    found = featurizer(dataset[:])["trak_features"]
    assert featurizer.engine is not None
    assert featurizer.engine.name == FAMILIES[kind]
    task = featurizer.task

    def collator(chosen: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return task.collate({key: [row[key] for row in chosen] for key in chosen[0]}, featurizer.processing_class)

    dtype = torch.float32 if kind in EXPERTS else torch.float64  # their kernels know no float64
    expected = reference(model, dataset, collator, lambda model, batch: task.output_function(model, batch)[0], dtype=dtype)
    assert_right(model, found, expected, relative=1e-4)


# An index.


def test_an_index_has_one_engine_which_its_member_names_and_its_queries_share(tmp_path, caplog):
    model, dataset = make(ReadsPadding), rows([3, 5, 4, 4, 6, 2, 5, 3])
    config = TrakConfig(proj_dim=16, damping=1.0)
    index = AttributionIndex.build(
        tmp_path / "index", models=model, dataset=dataset, config=config, task=make_task(), shard_rows=3, progress=False
    )
    engine = json.loads((tmp_path / "index" / "member_0" / "member.json").read_text())["engine"]
    assert engine["name"] == "loop"
    assert "padding" in engine["reason"]
    assert caplog.text.count("gradients='loop', one example at a time") == 1
    assert "times the time of a plain forward and backward pass" in caplog.text
    featurizer = Featurizer(model, config, task=make_task())
    alone = np.concatenate([featurizer(dataset[row : row + 1])["trak_features"] for row in range(8)])
    np.testing.assert_array_equal(np.stack(index.features(0).with_format("numpy")["trak_features"][:]), alone)
    caplog.clear()
    scores = index.score(dataset)
    assert "gradients=" not in caplog.text  # nothing is decided again
    assert np.isfinite(np.asarray(scores)).all()


def test_an_interrupted_run_goes_on_with_the_engine_it_began_with(tmp_path, monkeypatch):
    model, dataset = make(Base), rows([3, 5, 4, 4, 6, 2, 5, 3])
    config = TrakConfig(proj_dim=16, damping=1.0)
    options = {"models": model, "dataset": dataset, "config": config, "task": make_task(), "shard_rows": 3, "progress": False}
    from hf_trak.building import passes as one_pass

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(one_pass, "featurize", stop)
        with pytest.raises(KeyboardInterrupt):
            AttributionIndex.build(tmp_path / "index", **options)
    path = tmp_path / "index" / "member_0" / ".progress" / "engine.json"
    assert json.loads(path.read_text()) == {"name": "layerwise", "reason": None}
    path.write_text(json.dumps({"name": "loop", "reason": "as another machine found"}))
    AttributionIndex.build(tmp_path / "index", **options)
    engine = json.loads((tmp_path / "index" / "member_0" / "member.json").read_text())["engine"]
    assert engine == {"name": "loop", "reason": "as another machine found"}


@pytest.mark.parametrize("name", ["bert", "llama", "resnet"])
def test_the_loop_is_what_layerwise_computes(name: str):
    dataset = image_rows(5) if name == "resnet" else token_rows(5)
    found = {}
    for engine in ("auto", "layerwise", "functional", "loop"):
        featurizer = Featurizer(make_model(name), TrakConfig(proj_dim=64, gradients=engine))
        found[engine] = featurizer(dataset[:])["trak_features"]
    np.testing.assert_array_equal(found["auto"], found["layerwise"])
    scale = np.abs(found["auto"]).max()
    for engine in ("functional", "loop"):
        np.testing.assert_allclose(found[engine], found["layerwise"], rtol=0, atol=2e-6 * scale)


def test_the_loop_holds_one_large_gradient_at_a_time_and_leaves_no_hooks(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(loop, "_LARGE", 64)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    projector = make_projector("block_count_sketch", proj_dim=16, seed=0)
    alive: list[weakref.ref[Tensor]] = []
    most = []
    plain_add = projector.add

    def add(accumulator: Tensor, name: str, grad: Tensor) -> None:
        if name.endswith("weight"):
            alive.append(weakref.ref(grad if grad._base is None else grad._base))
            most.append(sum(one() is not None for one in alive))
        plain_add(accumulator, name, grad)

    projector.add = add
    rows = [{"x": torch.randn(1, 8)}, {"x": torch.randn(1, 8)}]

    def output(model: Callable[..., Any], batch: Any) -> tuple[Tensor, Tensor]:
        value = model(batch["x"]).sum(1)
        return value, torch.ones_like(value)

    parameters = dict(model.named_parameters())
    found = loop_features(model, rows, output_function=output, parameters=parameters, projector=projector)
    assert len(most) == 2 * 6
    assert max(most) == 1, "the gradient at hand"
    assert not any(parameter._backward_hooks for parameter in parameters.values())
    with pytest.raises(ZeroDivisionError):
        loop_features(model, rows, output_function=lambda *_: 1 // 0, parameters=parameters, projector=projector)  # type: ignore[arg-type, return-value]
    assert not any(parameter._backward_hooks for parameter in parameters.values())
    assert torch.isfinite(found.features).all()
