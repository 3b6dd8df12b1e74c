"""Nothing of a batch outlives it: memory is the same after two hundred batches as after a few."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import DUAL_ENCODERS, LANGUAGE_MODELS, MODELS, make_batch, make_dual_encoder, make_model, pair_columns, plan_for
from torch import Tensor, nn

from hf_trak.config import TrakConfig
from hf_trak.gradients import GRADIENTS, OutputFunction, select_parameters
from hf_trak.projectors import BlockCountSketch
from hf_trak.tasks import AutoTask, classification_margin, embed_bank, vmappable_attention, with_bank

pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop because we have not yet implemented the batching rule"
)

WARM_UP = 5
FAMILIES = (*MODELS, *LANGUAGE_MODELS, *DUAL_ENCODERS)
PAIRS = [(name, engine) for name in FAMILIES for engine in GRADIENTS if (name, engine) != ("siglip2", "functional")]
KINDS = ("bert", "resnet", "qwen3 lm", "t5", "clip")  # one of each kind; the others are slow
LONG = [("qwen3 lm", "layerwise"), ("vit", "layerwise")]


def cases() -> Iterator[Any]:
    for name, engine in PAIRS:
        yield pytest.param(name, engine, 20, marks=() if name in KINDS else pytest.mark.slow)
        yield pytest.param(name, engine, 200, marks=() if (name, engine) in LONG else pytest.mark.slow)


ROOM = 16 << 20  # bytes that an allocator may keep for itself


def make_case(name: str) -> tuple[nn.Module, OutputFunction, Mapping[str, Any]]:
    """Return a model, its output function and a batch of two rows of different lengths."""
    if name in MODELS:
        return make_model(name), classification_margin, make_batch(name, n_rows=2)
    if name in DUAL_ENCODERS:
        model, columns = make_dual_encoder(name), pair_columns(name, 4)
        task = AutoTask.from_model(model)
        task = with_bank(task, embed_bank(task, model.eval(), task.collate(columns, None), torch.arange(4)))
        return model, task.output_function, task.collate({key: values[:2] for key, values in columns.items()}, None)
    model = make_model(name)
    task = AutoTask.from_model(model, TrakConfig())
    rows: dict[str, Any] = {"input_ids": [[5, 6, 7, 8, 9], [11, 12, 13]]}
    if task.name == "question-answering":
        rows |= {"start_positions": [1, 0], "end_positions": [3, 1]}
    else:
        rows["labels"] = [[1, 2, 0, 1, 2], [2, 1, 0]]
    return model, task.output_function, task.collate(rows, None)


@contextmanager
def no_collector() -> Iterator[None]:
    """Turn the garbage collector off, which would hide what it happens to collect in time, and have it overlook what is there already:
    other tests' objects, which may go at any moment, and of which there are millions."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def live_tensors() -> tuple[int, int]:
    """Return how many tensors have been made under [`no_collector`] and are still there, and how many bytes they show."""
    tensors = [value for value in gc.get_objects() if issubclass(type(value), Tensor)]
    return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("name", "engine", "n_batches"), cases())
def test_memory_does_not_grow_with_the_number_of_batches(name: str, engine: str, n_batches: int):
    model, output_function, batch = make_case(name)
    parameters = select_parameters(model).parameters
    arguments: dict[str, Any] = {
        "output_function": output_function,
        "parameters": parameters,
        "projector": BlockCountSketch(proj_dim=32, seed=0),
    }

    if engine == "layerwise":
        arguments["plan"] = plan_for(model, batch, output_function, parameters)

    def run(times: int) -> None:
        for _ in range(times):
            GRADIENTS[engine](model, batch, **arguments)

    with vmappable_attention(model) if engine == "functional" else nullcontext(), no_collector():
        run(WARM_UP)
        before = live_tensors()
        run(n_batches // 4)
        assert live_tensors() == before
        resident = resident_bytes()
        run(n_batches - n_batches // 4)
        assert resident_bytes() - resident < ROOM


class Remembers(nn.Module):
    """A module without a rule that is handed an object which holds on to its own output, as a cache of keys and values does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor, cache: list[Any]) -> Tensor:
        output = x * self.scale.tanh()
        cache[0].kept = output
        return output


class WithCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.layer = nn.Linear(64, 64), Remembers()

    def forward(self, x: Tensor) -> Tensor:
        cache = torch.nn.Identity()  # an object that pytree does not open
        return self.layer(self.linear(x), [cache]).sum(-1)


@pytest.mark.parametrize("fails", [False, True])
def test_a_batch_is_let_go_of_whatever_its_modules_keep_and_if_it_fails(fails: bool):
    torch.manual_seed(0)
    model, parameters = WithCache(), None
    parameters = select_parameters(model).parameters

    def output_function(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = model(batch["x"])
        if fails:
            raise KeyError("on purpose")
        return output, torch.ones_like(output).detach()

    def run() -> None:
        try:
            GRADIENTS["layerwise"](
                model,
                {"x": torch.randn(8, 64)},
                output_function=output_function,
                parameters=parameters,
                projector=BlockCountSketch(proj_dim=32, seed=0),
            )
        except KeyError:
            assert fails

    with no_collector():
        run()
        gc.collect()
        before = live_tensors()
        for _ in range(5):
            run()
        gc.collect()
        assert live_tensors() == before
