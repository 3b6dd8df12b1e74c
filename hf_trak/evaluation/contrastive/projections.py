"""Two projections on frozen towers: a dual encoder of which one training run takes a second.

Both towers are pretrained and frozen, and what they make of every image and caption is kept in the output folder; trained, and so what
gradients are of, are the two projections and the temperature, as a `VisionTextDualEncoderModel` has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_trak.config import TrakConfig
from hf_trak.evaluation.contrastive.data import load_pairs
from hf_trak.evaluation.contrastive.settings import ContrastiveArguments
from hf_trak.evaluation.contrastive.trained import describe_case, is_kept, make_optimizer
from hf_trak.storage.files import write_atomically
from hf_trak.tasks import Task
from hf_trak.tasks.contrastive import ContrastiveOutput
from hf_trak.tasks.pairs import pair_keys
from hf_trak.tasks.pictures import to_rgb

_AT_ONCE = 32


class PairHeads(nn.Module):
    """Two projections into a shared space, and a temperature: what is trained of the dual encoder."""

    def __init__(self, image_dim: int, text_dim: int, dim: int) -> None:
        super().__init__()
        self.visual_projection = nn.Linear(image_dim, dim, bias=False)
        self.text_projection = nn.Linear(text_dim, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def get_image_features(self, image: Float[Tensor, "batch image_dim"]) -> Float[Tensor, "batch dim"]:
        """Return the projections of images' states."""
        return self.visual_projection(image)

    def get_text_features(self, text: Float[Tensor, "batch text_dim"]) -> Float[Tensor, "batch dim"]:
        """Return the projections of captions' states."""
        return self.text_projection(text)


@dataclass(frozen=True)
class StateInputs:
    """Rows that hold what the frozen towers made of an image and its caption."""

    def check(self, features: Features, processing_class: Any) -> None:
        """The rows are made here."""

    def check_rows(self, dataset: Dataset, processing_class: Any) -> None:
        """The rows are made here."""

    def reading(self, features: Mapping[str, Any], dataset: Dataset | None, label_column: str | None) -> StateInputs:
        """The columns are known."""
        return self

    def columns_read(self, features: Features) -> dict[str, Any]:
        """Return the two columns of states."""
        return {"image": "image", "text": ["text"]}

    def collate(self, rows: Mapping[str, Any], processing_class: Any) -> dict[str, Tensor]:
        """Return a batch as the contrastive task has it."""
        batch = {"image": torch.tensor(rows["image"]), "text": torch.tensor(rows["text"]).unsqueeze(1)}
        return {
            **batch,
            "caption_weights": torch.ones(len(batch["image"]), 1),
            "pair_keys": pair_keys(batch, ["image", "text"]),
        }

    def lengths(self, dataset: Dataset, processing_class: Any = None) -> list[int] | None:
        """All rows are alike."""
        return None


class Projections:
    """Projections trained on what two frozen towers make of the pairs; of a row with several captions, the first is taken."""

    task = Task(
        "contrastive",
        StateInputs(),
        ContrastiveOutput("softmax", "logit_scale", None, ("image",), ("text",)),
        needs_labels=False,
        out_to_loss_kind="mean_one_minus_p",
    )
    config = TrakConfig(fold=1)
    processing_class = None

    def __init__(self, args: ContrastiveArguments, folder: Path) -> None:
        self.args = args
        pairs = dict(zip(("train", "queries"), load_pairs(args), strict=True))
        states = {name: tower_states(args, rows, folder / f"{name}.safetensors") for name, rows in pairs.items()}
        self.states = states["train"]
        self.train_rows, self.query_rows = as_rows(states["train"]), as_rows(states["queries"])
        towers = " and ".join(Path(tower).name for tower in (args.vision, args.text) if tower is not None)
        self.case = describe_case(args, f"projections on frozen {towers}", len(self.train_rows), len(self.query_rows))

    def fresh(self) -> PairHeads:
        """Return projections with weights drawn from torch's generator."""
        return PairHeads(self.states["image"].shape[1], self.states["text"].shape[1], self.args.dim)

    def train(self, mask: Bool[np.ndarray, " n_train"], seed: int, *, keep: int = 1) -> list[PairHeads]:
        """Train on the pairs where `mask` is True; return the models of `keep` evenly spaced epochs, the last among them."""
        args, states = self.args, self.states
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.fresh()
        optimizer = make_optimizer(model, args)
        subset = torch.from_numpy(np.flatnonzero(mask))
        n_steps = args.epochs * -(-len(subset) // args.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        kept = []
        for epoch in range(1, args.epochs + 1):
            for rows in subset[torch.randperm(len(subset), generator=generator)].split(args.batch_size):
                optimizer.zero_grad()
                contrastive_loss(model, states["image"][rows], states["text"][rows]).backward()
                optimizer.step()
                schedule.step()
            if is_kept(epoch, epochs=args.epochs, keep=keep):
                kept.append(self.fresh())
                kept[-1].load_state_dict(model.state_dict())
        return kept

    def save(self, model: PairHeads, path: Path) -> None:
        """Save a model so that it is either whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, partial(save_file, model.state_dict()))

    def load(self, path: Path) -> PairHeads:
        """Load what [`~Projections.save`] saved."""
        model = self.fresh()
        model.load_state_dict(load_file(path))
        return model


def contrastive_loss(
    model: PairHeads, images: Float[Tensor, "batch image_dim"], texts: Float[Tensor, "batch text_dim"]
) -> Float[Tensor, ""]:
    """Return CLIP's loss of a batch: the mean of the cross-entropies of the rows and columns of its logits."""
    images = F.normalize(model.get_image_features(images), dim=1)
    texts = F.normalize(model.get_text_features(texts), dim=1)
    logits = model.logit_scale.exp() * images @ texts.T
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def tower_states(args: ContrastiveArguments, pairs: Dataset, path: Path) -> dict[str, Tensor]:
    """Return what the frozen towers make of all pairs, unit vectors, computing it once."""
    if path.exists():
        return load_file(path)
    from transformers import AutoModel, AutoTokenizer

    vision, text = (AutoModel.from_pretrained(tower).eval() for tower in (args.vision, args.text))
    tokenizer = AutoTokenizer.from_pretrained(args.text)
    images, texts = [], []
    for start in tqdm(range(0, len(pairs), _AT_ONCE), desc=f"Frozen towers, {path.stem}"):
        rows = pairs[start : start + _AT_ONCE]
        images.append(vision(pixel_values=_pixels(rows["image"], args.image_size)).pooler_output)
        captions = [caption if isinstance(caption, str) else caption[0] for caption in rows["caption"]]
        tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
        mask = tokens["attention_mask"].unsqueeze(2)
        texts.append((text(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))
    states = {"image": F.normalize(torch.cat(images), dim=1), "text": F.normalize(torch.cat(texts), dim=1)}
    write_atomically(path, partial(save_file, states))
    return states


def _pixels(images: list[Any], side: int) -> Float[Tensor, "batch 3 side side"]:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    squares = [np.asarray(to_rgb(image).resize((side, side))) for image in images]
    return ((torch.from_numpy(np.stack(squares)).float() / 255 - mean) / std).permute(0, 3, 1, 2)


def as_rows(states: Mapping[str, Tensor]) -> Dataset:
    """Return the states as a dataset."""
    return Dataset.from_dict({name: values.tolist() for name, values in states.items()}).with_format("numpy")
