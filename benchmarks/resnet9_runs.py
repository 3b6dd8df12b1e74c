"""ResNet-9 on CIFAR-2 as published, one network after another in the same memory: one CUDA graph of a training step serves all.

A run's rows, augmentation and learning rates are drawn beforehand, so that a step reads everything from the device, and the host does
nothing but start it. `gpu_cifar2.py` uses it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from hf_trak import AutoTask, TrakConfig
from hf_trak.evaluation import Recipe

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from paper_models import ResNet9Config, ResNet9ForImageClassification

MEAN, STD = (
    (125.307, 122.961, 113.8575),
    (51.5865, 50.847, 51.255),
)  # of CIFAR-10's pixels by channel; MadryLab/trak, tests/utils.py
CUT = 4
"""Side of the square that is cut out of each image; MadryLab/trak, tests/utils.py."""
LARGEST_BATCH = 512
SIDE = 32
_REPLAY_TOLERANCE = 0.05  # convolutions in bfloat16 do not repeat themselves to the bit

State = dict[str, Tensor]


class Images(NamedTuple):
    """Plain images on the device, normalized, and their labels."""

    pixels: Tensor
    labels: Tensor

    @classmethod
    def load(cls, path: Path, device: torch.device, *, most: int | None = None) -> Images:
        """Decode the images of a Parquet file with columns `image` and `label`, by several threads."""
        table = pq.read_table(path, columns=["image", "label"]).slice(0, most)
        encoded = table["image"].combine_chunks().field("bytes").to_pylist()
        with ThreadPoolExecutor() as threads:
            decoded = np.stack(list(threads.map(_decode, encoded)))
        pixels = torch.from_numpy(decoded).to(device).permute(0, 3, 1, 2).float()
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
        return cls(((pixels - mean) / std).contiguous(), torch.tensor(table["label"].to_pylist(), device=device))

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the rows in order, as the model takes them."""
        for pixels, labels in zip(self.pixels.split(size), self.labels.split(size), strict=True):
            yield {"pixel_values": pixels, "labels": labels}


def _decode(encoded: bytes) -> np.ndarray:
    pixels = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(f"Expected images of {SIDE} × {SIDE} pixels, but one is of shape {pixels.shape}.")
    return pixels


class Plan(NamedTuple):
    """Everything that a run draws at random but for its weights, by step."""

    rows: Tensor
    mirrored: Tensor
    moved: Tensor
    cut: Tensor
    learning_rate: Tensor

    @classmethod
    def draw(cls, subset: Tensor, recipe: Recipe, seed: int) -> Plan:
        """Draw every step of a run. Where batches of one size do not hold a subset, each epoch leaves out some other rows of it."""
        generator = torch.Generator().manual_seed(seed)
        n_steps, batch_size = len(subset) // recipe.batch_size, recipe.batch_size
        orders = [torch.randperm(len(subset), generator=generator)[: n_steps * batch_size] for _ in range(recipe.epochs)]
        shape = (recipe.epochs * n_steps, batch_size)
        return cls(
            rows=subset[torch.cat(orders)].view(shape),
            mirrored=torch.rand(shape, generator=generator) < 0.5,
            moved=torch.randint(0, 2 * recipe.translate + 1, (*shape, 2), generator=generator),
            cut=torch.randint(0, SIDE - CUT + 1, (*shape, 2), generator=generator),
            learning_rate=torch.tensor([recipe.learning_rate_at((step + 0.5) / n_steps) for step in range(shape[0])]),
        )


def batch_size_for(n_rows: int, *, most: int = LARGEST_BATCH) -> int:
    """Return the largest batch, `most` at most, that divides a half of the rows into equal steps."""
    half = n_rows // 2
    return half // -(-half // most)


class Runs:
    """Trains networks one after another.

    Args:
        train (`Images`): The whole training set.
        recipe (`Recipe`): Its batch size is that of every step.
        width (`int`): Of the network.
        note (`Callable`): Told of everything that does not go as planned.
    """

    def __init__(self, train: Images, recipe: Recipe, *, width: int, note: Callable[[str], None]) -> None:
        self.recipe = recipe
        self.config = ResNet9Config(width=width, num_labels=2)
        self.device = train.pixels.device
        self.labels = train.labels
        self.padded = F.pad(train.pixels, (recipe.translate,) * 4).permute(0, 2, 3, 1).contiguous()
        self.model = ResNet9ForImageClassification(self.config).to(self.device)
        self.task = AutoTask.from_model(self.model, TrakConfig(label_mapping="by_id"))
        self.memory_format = torch.channels_last
        self.step = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        everything = torch.arange(len(train))
        self.plan = Plan(*(drawn.to(self.device) for drawn in Plan.draw(everything, recipe, seed=0)))
        self._lay_out(note)
        self.graph = self._capture(everything, note) if self.device.type == "cuda" else None

    def _lay_out(self, note: Callable[[str], None]) -> None:
        """Take one step with channels last, or without where that fails."""
        try:
            self._place(torch.channels_last)
        except RuntimeError as error:
            note(f"Channels first, since a step with channels last failed: {error}")
            self._place(torch.contiguous_format)

    def _place(self, memory_format: torch.memory_format) -> None:
        self.memory_format = memory_format
        self.model.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.parameters = list(self.model.parameters())
        self.velocity = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.step.zero_()
        self._take_step()

    def _capture(self, subset: Tensor, note: Callable[[str], None]) -> torch.cuda.CUDAGraph | None:
        """Return one step as a CUDA graph; None where it cannot be captured, or does not do what the step does."""
        try:
            self.begin(0, subset)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._take_step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._take_step()
            errors = [self._difference(graph.replay, subset, n_steps) for n_steps in (1, 3)]
            torch.cuda.synchronize()
        except RuntimeError as error:
            note(f"No CUDA graph, since capturing a step failed: {error}")
            return None
        if not errors[0] < _REPLAY_TOLERANCE:
            note(f"No CUDA graph, since what it does to the weights differs from the step's by {errors[0]:.1e}.")
            return None
        note(f"CUDA graph: its updates differ from the step's by {errors[0]:.1e} after 1 step, {errors[1]:.1e} after 3.")
        return graph

    def _difference(self, replay: Callable[[], None], subset: Tensor, n_steps: int) -> float:
        """Return how far apart steps and their replays end, relative to how far they go."""
        self.begin(0, subset)
        before = torch.cat([parameter.detach().flatten() for parameter in self.parameters])
        moves = []
        for take in (self._take_step, replay):
            self.begin(0, subset)
            for _ in range(n_steps):
                take()
            moves.append(torch.cat([parameter.detach().flatten() for parameter in self.parameters]) - before)
        return ((moves[1] - moves[0]).norm() / moves[0].norm()).item()

    def begin(self, seed: int, subset: Tensor) -> None:
        """Draw fresh weights and a plan, in place."""
        torch.manual_seed(seed)
        fresh = ResNet9ForImageClassification(self.config)
        self.model.load_state_dict(fresh.state_dict())
        torch._foreach_zero_(self.velocity)
        self.step.zero_()
        for ours, drawn in zip(self.plan, Plan.draw(subset, self.recipe, seed), strict=True):
            ours[: len(drawn)].copy_(drawn)
        self.model.train()

    def run(self, seed: int, subset: Tensor, *, after_epoch: Callable[[int], None] = lambda epoch: None) -> None:
        """Train a fresh network on some rows.

        Args:
            after_epoch (`Callable`): Called with the number of epochs done, from 0: the weights are initial then.

        Raises:
            FloatingPointError: If the loss is not finite in the end.
        """
        self.begin(seed, subset)
        after_epoch(0)
        take = self._take_step if self.graph is None else self.graph.replay
        for epoch in range(self.recipe.epochs):
            for _ in range(len(subset) // self.recipe.batch_size):
                take()
            after_epoch(epoch + 1)
        if not self.loss.isfinite():
            raise FloatingPointError(f"The loss of the run of seed {seed} is {self.loss.item()}.")

    def _take_step(self) -> None:
        pixels, labels = self._batch()
        # A cache of weights cast to bfloat16 would outlive the graph's memory.
        with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
            (logits,) = self.model(pixel_values=pixels, return_dict=False)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        grads = torch.autograd.grad(loss, self.parameters)
        with torch.no_grad():
            torch._foreach_mul_(self.velocity, self.recipe.momentum)
            torch._foreach_add_(self.velocity, grads)
            torch._foreach_add_(self.velocity, self.parameters, alpha=self.recipe.weight_decay)
            torch._foreach_sub_(self.parameters, torch._foreach_mul(self.velocity, self._now(self.plan.learning_rate)))
            self.loss.copy_(loss)
            self.step.add_(1)

    def _now(self, drawn: Tensor) -> Tensor:
        """Return what was drawn for this step, without the host knowing which it is."""
        return drawn.index_select(0, self.step).squeeze(0)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Return the step's images, mirrored, moved, and a square cut out; what is not of an image is 0, the mean pixel."""
        rows, mirrored, moved, cut, _ = self.plan
        rows, (down, right), (top, left) = self._now(rows), self._now(moved).unbind(1), self._now(cut).unbind(1)
        place = torch.arange(SIDE, device=self.device)
        across = torch.where(self._now(mirrored)[:, None], SIDE - 1 - place, place)
        # (batch, height, 1), (batch, 1, width) -> (batch, height, width, channels)
        pixels = self.padded[rows[:, None, None], (down[:, None] + place)[:, :, None], (right[:, None] + across)[:, None, :]]
        hidden = _within(place, top)[:, :, None] & _within(place, left)[:, None, :]
        pixels = pixels.masked_fill(hidden[..., None], 0.0).permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=self.memory_format), self.labels.index_select(0, rows)

    def state(self) -> State:
        """Return a copy of the weights and buffers."""
        return {name: values.detach().clone() for name, values in self.model.state_dict().items()}

    @torch.no_grad()
    def outputs(self, images: Images) -> np.ndarray:
        """Return the margin of every plain image's label, in float32 and evaluation mode.

        Raises:
            FloatingPointError: If one is not finite.
        """
        self.model.eval()
        margins = torch.cat([self.task.output_function(self.model, batch)[0] for batch in images.batches(1000)])
        if not margins.isfinite().all():
            raise FloatingPointError(f"{int((~margins.isfinite()).sum())} of {len(margins)} margins are not finite.")
        return margins.float().cpu().numpy()


def _within(place: Tensor, start: Tensor) -> Tensor:
    return (place >= start[:, None]) & (place < start[:, None] + CUT)
