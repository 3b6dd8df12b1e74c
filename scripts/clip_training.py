"""Training for the evaluation on image-caption pairs: its settings, its pairs, and what is trained: two projections or a whole dual encoder.

Both towers are pretrained and frozen, and what they make of every image and caption is kept in the output folder; trained, and so what
gradients are of, are the two projections and the temperature, as a `VisionTextDualEncoderModel` has them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, concatenate_datasets, load_dataset
from jaxtyping import Bool, Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_trak.config import TrakConfig
from hf_trak.evaluation.training import save_checkpoint
from hf_trak.sources.checkpoints import load_model, load_processing_class
from hf_trak.storage.files import write_atomically
from hf_trak.tasks import AutoTask, PairCollator, Task, is_dual_encoder
from hf_trak.tasks.contrastive import ContrastiveOutput
from hf_trak.tasks.pairs import pair_keys
from hf_trak.tasks.pictures import to_rgb


@dataclass(frozen=True)
class ContrastiveArguments:
    """Data, what is trained and how, and what is compared."""

    output: str = field(metadata={"help": "Folder for what is computed; the same command goes on where it was stopped."})
    data: str = field(metadata={"help": "Folder of files, or a dataset of the Hub, of images with captions."})
    # data
    image_column: str = field(default="image", metadata={"help": "Column of images."})
    caption_column: str = field(default="caption", metadata={"help": "Column of captions: one per row, or a list of them."})
    train_split: str = field(default="train", metadata={"help": "Split that is trained on, and credited."})
    query_split: str = field(default="validation", metadata={"help": "Split of the held-out pairs."})
    train_files: list[str] = field(
        default_factory=list, metadata={"help": "Parquet files in --data that are trained on, in place of the split."}
    )
    query_files: list[str] = field(default_factory=list, metadata={"help": "Parquet files in --data of the held-out pairs."})
    n_train: int | None = field(default=None, metadata={"help": "Train on so many pairs, the first; by default on all."})
    n_query: int | None = field(default=None, metadata={"help": "Score so many held-out pairs, the first; by default all."})
    model_name: str | None = field(
        default=None, metadata={"help": "What results call what is trained; by default its folders."}
    )
    data_name: str | None = field(default=None, metadata={"help": "What results call the data; by default --data."})
    # what is trained
    model: str | None = field(
        default=None, metadata={"help": "Dual encoder, with its processor, of which everything is trained."}
    )
    from_scratch: bool = field(default=False, metadata={"help": "Draw the weights of --model anew for each run, by its seed."})
    vision: str | None = field(default=None, metadata={"help": "Frozen vision tower; only projections are trained on it."})
    text: str | None = field(default=None, metadata={"help": "Frozen text tower; its tokens' states are averaged."})
    image_size: int = field(default=112, metadata={"help": "Side of the images that a frozen vision tower sees."})
    dim: int = field(default=256, metadata={"help": "Dimension of the space that projections share."})
    # how
    epochs: int = field(default=100, metadata={"help": "Passes over the training set."})
    batch_size: int = field(default=600, metadata={"help": "Pairs per step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak of the cosine schedule."})
    weight_decay: float = field(default=0.1, metadata={"help": "Of Adam, apart from the gradient (AdamW)."})
    momentum: float = field(default=0.9, metadata={"help": "Adam's first beta."})
    bf16: bool = field(default=False, metadata={"help": "Train a whole dual encoder under autocast to bfloat16."})
    n_workers: int = field(default=0, metadata={"help": "Processes that read the images of a whole dual encoder's batches."})
    # what is compared
    n_ensembles: int = field(default=2, metadata={"help": "Ensembles of TRAK, with halves, runs and sketches of their own."})
    n_members: int = field(default=20, metadata={"help": "Members of an ensemble, trained on random halves."})
    n_checkpoints: int = field(default=5, metadata={"help": "Evenly spaced checkpoints of one run that TracIn looks at."})
    proj_dim: int = field(default=4096, metadata={"help": "Numbers kept per pair and member."})
    bank_size: int = field(default=512, metadata={"help": "Pairs that each is held against."})
    n_subsets: int = field(default=64, metadata={"help": "Random halves of the ground truth of LDS."})
    n_targets: int = field(default=16, metadata={"help": "Held-out pairs that training pairs are removed for."})
    top_k: list[int] = field(default_factory=lambda: [50, 200, 400], metadata={"help": "How many pairs are removed."})
    n_seeds: int = field(default=2, metadata={"help": "Training seeds of every retraining."})
    featurize_batch_size: str = field(default="auto", metadata={"help": "Rows of a batch of gradients, or auto."})
    # sharing the work
    shard_index: int = field(default=0, metadata={"help": "Which part of the training runs to do."})
    num_shards: int = field(default=1, metadata={"help": "Number of parts."})
    device: str | None = field(default=None, metadata={"help": "By default CUDA where there is one."})

    def __post_init__(self) -> None:
        towers = self.vision is not None, self.text is not None
        if (self.model is not None) == any(towers) or (any(towers) and not all(towers)):
            raise ValueError(
                "Give --model, a dual encoder to train as a whole, or both --vision and --text, frozen towers to train projections on."
            )
        if bool(self.train_files) != bool(self.query_files):
            raise ValueError("Give both --train_files and --query_files, or neither: their pairs must not be the same.")
        if not 0 <= self.shard_index < self.num_shards:
            raise ValueError(f"`shard_index` must lie in 0 to {self.num_shards - 1}, but is {self.shard_index}.")
        if not 1 <= self.n_members <= 1000 or self.n_ensembles < 1:
            raise ValueError(
                f"There must be 1 to 1000 members and at least one ensemble, but `n_members` is {self.n_members} and `n_ensembles` "
                f"{self.n_ensembles}."
            )
        if not 1 <= self.n_checkpoints <= self.epochs:
            raise ValueError(f"`n_checkpoints` must lie in 1 to {self.epochs}, the epochs, but is {self.n_checkpoints}.")

    @property
    def shard(self) -> tuple[int, int]:
        """Which part of the training runs this call does, and of how many."""
        return self.shard_index, self.num_shards


NOT_SHARED = ("output", "shard_index", "num_shards", "device", "featurize_batch_size")
"""Flags that may differ from call to call in one folder."""


def load_pairs(args: ContrastiveArguments) -> tuple[Dataset, Dataset]:
    """Return training and held-out pairs, with the columns `image` and `caption` alone.

    Raises:
        ValueError: If a column is missing, or there are fewer pairs than are wanted.
    """
    parts = (args.train_files, args.train_split, args.n_train), (args.query_files, args.query_split, args.n_query)
    train, queries = (_rows(args, files, split, limit) for files, split, limit in parts)
    if len(train) < 2 or len(queries) == 0:
        raise ValueError(f"There must be training and held-out pairs, but there are {len(train)} and {len(queries)}.")
    return train, queries


def _rows(args: ContrastiveArguments, files: list[str], split: str, limit: int | None) -> Dataset:
    found = [_parquet(Path(args.data) / name) for name in files] or [load_dataset(args.data, split=split)]
    pairs = concatenate_datasets([_pairs(rows, args) for rows in found])
    if limit is not None and limit > len(pairs):
        raise ValueError(f"{limit} pairs are wanted of {', '.join(files) or split}, but there are {len(pairs)}.")
    return pairs if limit is None else pairs.select(range(limit))


def _parquet(path: Path) -> Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; --train_files and --query_files are names in the folder --data.")
    return load_dataset("parquet", data_files={"train": str(path)}, split="train")


def _pairs(rows: Dataset, args: ContrastiveArguments) -> Dataset:
    wanted = {args.image_column: "image", args.caption_column: "caption"}
    if missing := [column for column in wanted if column not in rows.column_names]:
        raise ValueError(
            f"{args.data} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}. Set --image_column and "
            "--caption_column."
        )
    rows = rows.select_columns(list(wanted))
    return rows.rename_columns({old: new for old, new in wanted.items() if old != new})


class Trained(Protocol):
    """Rows, a task, and what makes models of them.

    What [`~Trained.train`] and [`~Trained.load`] return is what [`AttributionIndex.build`] takes: a model, or its folder.
    """

    case: str
    config: TrakConfig
    task: Task
    processing_class: Any
    train_rows: Dataset
    query_rows: Dataset

    def train(self, mask: Bool[np.ndarray, " n_train"], seed: int, *, keep: int = 1) -> list[Any]:
        """Train on the pairs where `mask` is True; return the models of `keep` evenly spaced epochs, the last among them."""
        ...

    def save(self, model: Any, path: Path) -> None:
        """Save a model so that it is either whole or not there."""
        ...

    def load(self, path: Path) -> Any:
        """Load what [`~Trained.save`] saved."""
        ...


def describe_case(args: ContrastiveArguments, model_name: str, n_train: int, n_query: int) -> str:
    """Say what model and data the results are of."""
    data = f"{n_train} pairs of {args.data_name or Path(args.data).name}, {n_query} held-out pairs"
    return f"{args.model_name or model_name}, {data}"


def make_optimizer(model: torch.nn.Module, args: ContrastiveArguments) -> torch.optim.Optimizer:
    """Return Adam, with decay apart from the gradient."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.momentum, 0.999),
        fused=True,
    )


def is_kept(epoch: int, *, epochs: int, keep: int) -> bool:
    """Return whether an epoch, counted from 1, is among `keep` evenly spaced ones."""
    return epoch * keep % epochs < keep


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


class WholeEncoder:
    """All parameters of a dual encoder. Of a row with several captions one is drawn in each epoch.

    Raises:
        ValueError: If `args.model` is no dual encoder, or has no processor beside it.
    """

    config = TrakConfig(image_column="image", text_columns=("caption",))

    def __init__(self, args: ContrastiveArguments, folder: Path) -> None:
        assert args.model is not None
        self.args = args
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processing_class = load_processing_class(args.model)
        self.train_rows, self.query_rows = load_pairs(args)
        self.start = load_model(args.model)
        if not is_dual_encoder(self.start):
            raise ValueError(f"--model must be a dual encoder such as CLIP, but {args.model} is {type(self.start).__name__}.")
        self.task = AutoTask.from_model(self.start, self.config)
        for rows in (self.train_rows, self.query_rows):
            self.task.check(rows, self.processing_class)
        name = f"{Path(args.model).name}{' from scratch' if args.from_scratch else ''}"
        self.case = describe_case(args, name, len(self.train_rows), len(self.query_rows))

    def fresh(self) -> Any:
        """Return a model to train: as it was published, or with weights drawn from torch's generator."""
        return type(self.start)(self.start.config) if self.args.from_scratch else copy.deepcopy(self.start)

    def train(self, mask: Bool[np.ndarray, " n_train"], seed: int, *, keep: int = 1) -> list[Any]:
        """Train on the pairs where `mask` is True; return the models of `keep` evenly spaced epochs, the last among them.

        Raises:
            FloatingPointError: If the loss is not finite at the end of an epoch.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # weights, dropout and which captions are drawn
            return list(self._train(np.flatnonzero(mask), torch.Generator().manual_seed(seed), keep))

    def _train(self, subset: np.ndarray, generator: torch.Generator, keep: int) -> Iterator[Any]:
        args, model = self.args, self.fresh().to(self.device)
        optimizer = make_optimizer(model, args)
        n_steps = args.epochs * -(-len(subset) // args.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
        collator = PairCollator(model, self.config, self.processing_class)
        for epoch in range(1, args.epochs + 1):
            model.train()
            order = torch.from_numpy(subset)[torch.randperm(len(subset), generator=generator)].split(args.batch_size)
            for batch in self._batches([rows.tolist() for rows in order], collator):
                optimizer.zero_grad()
                loss = self._loss(model, batch)
                loss.backward()
                optimizer.step()
                schedule.step()
            if not loss.isfinite():
                raise FloatingPointError(
                    f"The loss is {loss.item()} after epoch {epoch} of {args.epochs}; try a lower rate than {args.learning_rate}."
                )
            if is_kept(epoch, epochs=args.epochs, keep=keep):
                yield copy.deepcopy(model).cpu().eval()

    def _batches(self, order: Sequence[Sequence[int]], collator: PairCollator) -> Iterator[dict[str, Any]]:
        """Yield the batches of an epoch on the device, their images decoded as they are needed."""
        loader: DataLoader[Any] = DataLoader(
            self.train_rows,
            batch_sampler=order,  # type: ignore[arg-type]
            collate_fn=collator,
            num_workers=self.args.n_workers,
        )
        for batch in loader:
            yield {key: value.to(self.device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _loss(self, model: Any, batch: dict[str, Any]) -> Tensor:
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.args.bf16):
            loss: Tensor = model(**batch).loss
        return loss

    def save(self, model: Any, path: Path) -> None:
        """Save a model, with its processor, so that it is either whole or not there."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, model, self.processing_class)

    def load(self, path: Path) -> str:
        """Return the folder itself: who needs the model loads it, one at a time."""
        return str(path)
