"""The paper's settings: which model is trained on which rows, as published or small enough for two cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from paper_models import BertWithoutTanhForSequenceClassification, ResNet9Config, ResNet9ForImageClassification

from hf_trak.config import TrakConfig
from hf_trak.evaluation.training import Recipe, Rows, RowsInMemory, RowsOnDemand, save_checkpoint, train
from hf_trak.hashing import hash_tensors
from hf_trak.sources.row_digests import digest_rows
from hf_trak.storage.files import write_atomically
from hf_trak.tasks import AutoTask, Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_MEAN, _STD = 0.47, 0.25  # of CIFAR's pixels, over all channels


@dataclass(frozen=True)
class Setting:
    """Data and model of one setting."""

    model: str = field(metadata={"help": "resnet9, resnet18, or a pretrained checkpoint (folder or repository) to fine-tune."})
    num_labels: int = field(
        metadata={"help": "Number of classes; 0 for a causal language model, which is trained on the text."}
    )
    train_file: str = field(default="", metadata={"help": "Parquet file of training rows, in the data folder."})
    query_file: str = field(default="", metadata={"help": "Parquet file of queries, in the data folder."})
    hub_dataset: str = field(default="", metadata={"help": "Dataset of the Hub, used where the data folder has no such file."})
    hub_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    hub_query_split: str = field(default="validation", metadata={"help": "Its split of queries."})
    classes: list[int] | None = field(default=None, metadata={"help": "Keep these classes only, renumbered."})
    pretrain_classes: list[int] | None = field(
        default=None,
        metadata={
            "help": "Train the network on these classes first; every run then starts from its weights, with a head of its own if "
            "there are not as many classes."
        },
    )
    pretrain_epochs: int = field(default=10, metadata={"help": "Epochs of that."})
    pretrain_learning_rate: float = field(default=0.1, metadata={"help": "Peak learning rate of that."})
    n_train: int | None = field(default=None, metadata={"help": "Draw so many training rows; by default all."})
    n_query: int | None = field(default=None, metadata={"help": "Draw so many queries; by default all."})
    sample_seed: int = field(default=0, metadata={"help": "Of these draws."})
    text_columns: list[str] | None = field(default=None, metadata={"help": "One or two columns of text."})
    max_length: int = field(default=128, metadata={"help": "Texts are cut to so many tokens."})
    min_words: int = field(default=0, metadata={"help": "Leave out shorter training texts (words between spaces)."})
    max_words: int | None = field(default=None, metadata={"help": "Leave out longer training texts."})
    max_query_words: int | None = field(default=None, metadata={"help": "Leave out longer queries."})
    n_layers: int | None = field(default=None, metadata={"help": "Keep only the first layers of a pretrained model."})
    tanh: bool = field(default=True, metadata={"help": "False: BERT without the tanh before the classifier, as in the paper."})
    width: int = field(default=64, metadata={"help": "Channels of a network's first convolution."})
    on_demand: bool = field(default=False, metadata={"help": "Decode images as they are needed, cropping them at random."})
    n_workers: int = field(default=0, metadata={"help": "Processes that decode images."})


@dataclass(frozen=True)
class Prepared:
    """A setting whose rows are loaded: what [`SubsetJob.work`] takes."""

    make_model: Callable[[], PreTrainedModel]
    task: Task
    train_dataset: Dataset
    query_dataset: Dataset
    train_rows: Rows
    query_rows: Rows
    processing_class: Any = None

    def identity(self) -> dict[str, Any]:
        """Return what decides a run's outputs besides its recipe: the rows' content and the model's, wherever they came from."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = hash_tensors(self.make_model().state_dict())
        return {"model": model, "train_rows": self.train_rows.fingerprint(), "query_rows": self.query_rows.fingerprint()}

    def save_data(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write the rows as they are trained on, unless they are there already, for whoever scores these models.

        Args:
            overwrite (`bool`): Move files of other rows to `replaced-1`, or the next number; nothing is deleted.

        Raises:
            ValueError: If a file of another content is there; nothing is written then.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tables = {folder / "train.parquet": self.train_dataset, folder / "queries.parquet": self.query_dataset}
        other = [path for path, rows in tables.items() if path.exists() and not _holds_rows(path, rows)]
        if other and not overwrite:
            raise ValueError(
                f"{', '.join(map(str, other))} holds other rows than these. Choose another folder, or pass overwrite=True (--overwrite) to "
                "set it aside."
            )
        if other:
            number = 1
            while (folder / f"replaced-{number}").exists():
                number += 1
            (folder / f"replaced-{number}").mkdir()
            for path in other:
                os.rename(path, folder / f"replaced-{number}" / path.name)
        for path, rows in tables.items():
            if not path.exists():
                write_atomically(path, partial(_write_rows, rows))


def _holds_rows(path: Path, rows: Dataset) -> bool:
    """Return whether a Parquet file holds these rows."""
    from datasets import Dataset

    try:
        found = Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception:  # whatever it is, it is not these rows
        return False
    same = sorted(found.column_names) == sorted(rows.column_names) and len(found) == len(rows)
    return same and bool((digest_rows(found, found.column_names) == digest_rows(rows, rows.column_names)).all())


def _write_rows(rows: Dataset, path: Path) -> None:
    rows.to_parquet(str(path))


def prepare(setting: Setting, *, data_folder: Path | None = None, device: str = "cpu") -> Prepared:
    """Load and draw the rows of a setting, and make ready what builds its model."""
    train_dataset, query_dataset = load_datasets(setting, data_folder)
    if setting.text_columns:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(setting.model)
        train_dataset, query_dataset = (tokenize(rows, tokenizer, setting) for rows in (train_dataset, query_dataset))
    else:
        tokenizer = None
        if not setting.on_demand:
            train_dataset, query_dataset = to_pixels(train_dataset), to_pixels(query_dataset)

    def make_model() -> PreTrainedModel:
        return build_model(setting)

    # The head is trained on the numbers of the classes, whatever they are called.
    task = AutoTask.from_model(make_model(), TrakConfig(label_mapping="by_id"))
    if setting.on_demand:
        n_workers = setting.n_workers
        train_rows: Rows = RowsOnDemand(train_dataset, task, transform=random_crop, n_workers=n_workers, device=device)
        query_rows: Rows = RowsOnDemand(query_dataset, task, transform=center_crop, n_workers=n_workers, device=device)
    else:
        train_rows = RowsInMemory.of(train_dataset, task, device=device)
        query_rows = RowsInMemory.of(query_dataset, task, device=device)
    return Prepared(make_model, task, train_dataset, query_dataset, train_rows, query_rows, tokenizer)


def pretrain(
    setting: Setting, recipe: Recipe, folder: Path, *, data_folder: Path | None = None, device: str = "cpu"
) -> Setting:
    """Train a network on the setting's `pretrain_classes`, unless `folder` has it already; return the setting that starts from it."""
    assert setting.pretrain_classes is not None
    if not folder.exists():
        classes = setting.pretrain_classes
        general = replace(setting, classes=classes, num_labels=len(classes), n_train=None, n_query=1)
        with torch.random.fork_rng():
            torch.manual_seed(setting.sample_seed)
            prepared = prepare(general, data_folder=data_folder, device=device)
            model = prepared.make_model().to(device)
            longer = replace(recipe, epochs=setting.pretrain_epochs, learning_rate=setting.pretrain_learning_rate)
            train(model, prepared.train_rows, range(len(prepared.train_rows)), longer, seed=setting.sample_seed)
        save_checkpoint(folder, model)
    return replace(setting, model=str(folder))


def load_datasets(setting: Setting, data_folder: Path | None) -> tuple[Dataset, Dataset]:
    """Return the drawn training rows and queries, from the data folder or else from the Hub."""
    train = _draw(_load(setting, data_folder, setting.train_file, "train"), setting, setting.n_train, setting.max_words)
    query = _load(setting, data_folder, setting.query_file, setting.hub_query_split)
    return train, _draw(query, setting, setting.n_query, setting.max_query_words)


def _load(setting: Setting, data_folder: Path | None, file: str, split: str) -> Dataset:
    from datasets import load_dataset

    if data_folder is not None and file and (data_folder / file).is_file():
        rows = load_dataset("parquet", data_files={"train": str(data_folder / file)}, split="train")
        return rows if setting.classes is None else _keep_classes(rows, setting.classes)
    if not setting.hub_dataset:
        raise FileNotFoundError(f"There is no file {file!r} in {data_folder}, and the setting names no dataset of the Hub.")
    rows = load_dataset(setting.hub_dataset, setting.hub_config, split=split)
    rows = rows.rename_columns({old: new for old, new in {"img": "image"}.items() if old in rows.column_names})
    return rows if setting.classes is None else _keep_classes(rows, setting.classes)


def _keep_classes(rows: Dataset, classes: list[int]) -> Dataset:
    from datasets import ClassLabel

    names = [rows.features["label"].names[number] for number in classes]
    labels = np.asarray(rows["label"])
    kept = np.flatnonzero(np.isin(labels, classes))
    renumbered = [classes.index(label) for label in labels[kept]]
    return (
        rows.select(kept).remove_columns("label").add_column("label", renumbered).cast_column("label", ClassLabel(names=names))
    )


def _draw(rows: Dataset, setting: Setting, count: int | None, max_words: int | None) -> Dataset:
    if setting.text_columns and (setting.min_words or max_words):
        n_words = sum(np.asarray([len(text.split()) for text in rows[column]]) for column in setting.text_columns)
        rows = rows.select(np.flatnonzero((n_words >= setting.min_words) & (n_words <= (max_words or np.inf))))
    if count is not None:
        if count > len(rows):
            raise ValueError(f"The setting draws {count} rows, but there are only {len(rows)} to draw from.")
        rows = rows.select(np.random.default_rng(setting.sample_seed).permutation(len(rows))[:count])
    return rows.flatten_indices() if rows._indices is not None else rows


def tokenize(rows: Dataset, tokenizer: Any, setting: Setting) -> Dataset:
    """Add a tokenizer's columns; the text stays beside them."""
    columns = setting.text_columns or []

    def encode(*texts: list[str]) -> dict[str, Any]:
        return dict(tokenizer(*texts, truncation=True, max_length=setting.max_length))

    def encode_to_the_end(texts: list[str]) -> dict[str, Any]:
        ids = tokenizer(texts, truncation=True, max_length=setting.max_length - 1)["input_ids"]
        ids = [[*row, tokenizer.eos_token_id] for row in ids]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": ids}

    if setting.num_labels == 0:
        return rows.map(encode_to_the_end, batched=True, input_columns=columns)
    return rows.map(encode, batched=True, input_columns=columns).rename_column("label", "labels")


def to_pixels(rows: Dataset) -> Dataset:
    """Replace a column of small images by their pixels, centred and scaled, channels first."""
    from datasets import Dataset

    images = np.stack([np.asarray(image.convert("RGB")) for image in rows["image"]])
    pixels = (images.transpose(0, 3, 1, 2).astype(np.float32) / 255 - _MEAN) / _STD
    return Dataset.from_dict({"pixel_values": pixels, "labels": rows["label"]})


def random_crop(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Cut a random part of 8 % to 100 % of each image's area, its sides within 3:4, and scale it to 224 × 224."""

    def box(width: int, height: int) -> tuple[int, int, int, int]:
        area = width * height * torch.empty(()).uniform_(0.08, 1.0).item()
        ratio = torch.empty(()).uniform_(np.log(3 / 4), np.log(4 / 3)).exp().item()
        wide, high = min(width, round((area * ratio) ** 0.5)), min(height, round((area / ratio) ** 0.5))
        left = int(torch.randint(0, width - wide + 1, ()))
        top = int(torch.randint(0, height - high + 1, ()))
        return left, top, left + max(wide, 1), top + max(high, 1)

    return _cropped(columns, box)


def center_crop(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Cut the middle 7/8 of each image's shorter side, square, and scale it to 224 × 224."""

    def box(width: int, height: int) -> tuple[int, int, int, int]:
        side = max(1, round(min(width, height) * 7 / 8))
        left, top = (width - side) // 2, (height - side) // 2
        return left, top, left + side, top + side

    return _cropped(columns, box)


def _cropped(columns: dict[str, list[Any]], box: Callable[[int, int], tuple[int, int, int, int]]) -> dict[str, list[Any]]:
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = []
    for image in columns["image"]:
        image = image.convert("RGB")
        crop = np.asarray(image.resize((224, 224), box=box(*image.size), resample=2))
        pixels.append(((crop / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32))
    return {"pixel_values": pixels, "labels": columns["label"]}


def build_model(setting: Setting) -> PreTrainedModel:
    """Return a fresh model; what is not pretrained is drawn from torch's generator."""
    if setting.model == "resnet9":
        return ResNet9ForImageClassification(ResNet9Config(width=setting.width, num_labels=setting.num_labels))
    if setting.model == "resnet18":
        from transformers import ResNetConfig, ResNetForImageClassification

        sizes = {"embedding_size": setting.width, "hidden_sizes": [setting.width * 2**stage for stage in range(4)]}
        config = ResNetConfig(**sizes, depths=[2, 2, 2, 2], layer_type="basic", num_labels=setting.num_labels)
        return ResNetForImageClassification(config)
    return _pretrained(setting)


def _pretrained(setting: Setting) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForSequenceClassification

    if setting.num_labels == 0:
        return AutoModelForCausalLM.from_pretrained(setting.model)
    if not setting.text_columns:
        options = {"num_labels": setting.num_labels, "ignore_mismatched_sizes": True}  # the head is drawn anew
        return AutoModelForImageClassification.from_pretrained(setting.model, **options)
    options = {"num_labels": setting.num_labels}
    if setting.n_layers is not None:
        options["num_hidden_layers"] = setting.n_layers
    if setting.tanh:
        return AutoModelForSequenceClassification.from_pretrained(setting.model, **options)
    return BertWithoutTanhForSequenceClassification.from_pretrained(setting.model, **options)
