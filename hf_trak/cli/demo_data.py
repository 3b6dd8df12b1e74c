"""What the demo works on, and its main path in the library's own terms."""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_trak.cli.data import load_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_trak.cli.demo import DemoArguments
    from hf_trak.config import TrakConfig
    from hf_trak.index import AttributionIndex


_N_QUERIES = 360
_IMAGE_SIZE = 16

# The topics of the text demo, and the modules of the standard library that belong to each.
_TOPICS = {
    "asyncio": ["asyncio"],
    "dates": ["calendar", "datetime.py", "_pydatetime.py", "zoneinfo"],
    "email": ["email", "mailbox.py", "imaplib.py", "poplib.py", "smtplib.py"],
    "files": ["pathlib", "pathlib.py", "shutil.py", "tarfile.py", "tempfile.py", "zipfile", "zipfile.py"],
    "processes": ["concurrent", "multiprocessing", "subprocess.py", "threading.py"],
    "tests": ["doctest.py", "unittest"],
    "web": ["http", "urllib", "wsgiref"],
    "xml": ["xml", "xmlrpc"],
}
_RECIPES: dict[str, dict[str, Any]] = {
    "images": {"epochs": 6, "learning_rate": 3e-3, "batch_size": 64},
    "text": {"epochs": 3, "learning_rate": 2e-3, "batch_size": 32},
    "own": {"epochs": 3, "learning_rate": 5e-5, "batch_size": 16},
}
_LONGEST_TEXT = 300


@dataclass(frozen=True)
class DemoData:
    """A model, the rows it learns from, and held-out rows to ask about."""

    name: str
    model: PreTrainedModel
    processing_class: Any
    train: Dataset
    queries: Dataset
    label_column: str = "label"

    def label_name(self, label: Any) -> str:
        """Return a label as the dataset names it."""
        names = getattr(self.train.features[self.label_column], "names", None)
        return names[label] if names else str(label)


def digits(seed: int) -> DemoData:
    """Return the 1,797 real 8 × 8 digits of scikit-learn, shuffled and split, and an untrained ResNet of 80,000 parameters.

    Raises:
        ImportError: If scikit-learn or pillow is missing.
    """
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("The demo needs scikit-learn, pillow and matplotlib: pip install 'hf-trak[demo]'.") from error
    import torch
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    source = load_digits()
    pixels = (source.images * (255 / 16)).round().astype(np.uint8)
    order = np.random.default_rng(seed).permutation(len(pixels))
    rows = Dataset.from_dict(
        {"image": [Image.fromarray(pixels[row]) for row in order], "label": source.target[order]},
        features=Features({"image": ImageFeature(), "label": ClassLabel(names=[str(digit) for digit in range(10)])}),
    )
    torch.manual_seed(seed)
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", num_labels=10)
    return DemoData(
        name="scikit-learn digits",
        model=ResNetForImageClassification(config),
        processing_class=ViTImageProcessor(size={"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}),
        train=rows.select(range(_N_QUERIES, len(rows))),
        queries=rows.select(range(_N_QUERIES)),
    )


def docstrings(seed: int) -> DemoData:
    """Return first paragraphs of docstrings of Python's standard library, labelled by topic, and an untrained ModernBERT of
    one layer.

    The files are read and not imported. How many rows there are depends on the version of Python.

    Raises:
        FileNotFoundError: If this Python has no sources of its standard library.
    """
    import torch
    from datasets import ClassLabel, Dataset, Features, Value
    from transformers import BertTokenizerFast, ModernBertConfig, ModernBertForSequenceClassification

    found = _first_paragraphs(Path(sysconfig.get_path("stdlib")))
    topics = list(_TOPICS)
    order = np.random.default_rng(seed).permutation(len(found))
    texts, labels = zip(*(found[row] for row in order), strict=True)
    rows = Dataset.from_dict(
        {"text": list(texts), "label": [topics.index(label) for label in labels]},
        features=Features({"text": Value("string"), "label": ClassLabel(names=topics)}),
    )
    tokenizer = BertTokenizerFast(vocab=_vocabulary(texts), model_max_length=128)
    torch.manual_seed(seed)
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=128,
        classifier_pooling="mean",
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
        bos_token_id=None,
        eos_token_id=None,
        num_labels=len(topics),
        id2label=dict(enumerate(topics)),
        label2id={name: number for number, name in enumerate(topics)},
    )
    return DemoData(
        name="docstrings of Python's standard library",
        model=ModernBertForSequenceClassification(config),
        processing_class=tokenizer,
        train=rows.select(range(_N_QUERIES, len(rows))),
        queries=rows.select(range(_N_QUERIES)),
    )


def _first_paragraphs(folder: Path) -> list[tuple[str, str]]:
    """Return (text, topic) of each docstring in the topics' files; one that stands in several places is taken once."""
    topics: dict[str, str] = {}
    for topic, names in _TOPICS.items():
        files = [
            file for name in names for file in ([folder / name] if name.endswith(".py") else (folder / name).rglob("*.py"))
        ]
        for file in sorted(file for file in files if file.is_file() and "test" not in file.relative_to(folder).parts):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                    if len(text.split()) >= 4 and len(text) <= _LONGEST_TEXT:
                        topics.setdefault(text, topic)
    if set(topics.values()) != set(_TOPICS):
        raise FileNotFoundError(
            f"The text demo reads the docstrings of Python's standard library, but {folder} lacks the sources of "
            f"{', '.join(sorted(set(_TOPICS) - set(topics.values())))}. Run it with a Python that has them, or try `hf-trak demo`."
        )
    return list(topics.items())


def _vocabulary(texts: Sequence[str]) -> dict[str, int]:
    """Return a vocabulary of WordPiece: the words that occur twice or more, and characters, of which the others are made.

    It is counted, because the trainers of `tokenizers` break ties in another order each time.
    """
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    normalizer, splitter = BertNormalizer(), BertPreTokenizer()
    counts = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    characters = sorted({character for word in counts for character in word})
    words = sorted(word for word, count in counts.items() if count > 1)
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *characters,
        *(f"##{character}" for character in characters),
        *words,
    ]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def own_data(args: DemoArguments) -> DemoData:
    """Load the user's model with its tokenizer or image processor, and the two splits."""
    from hf_trak.sources.checkpoints import load_model
    from hf_trak.sources.processors import find_processing_class

    assert args.model is not None
    assert args.dataset is not None
    train = load_rows(args.dataset, split=args.split, config=args.dataset_config, max_rows=args.max_rows)
    queries = load_rows(
        args.queries or args.dataset,
        split=args.query_split,
        config=None if args.queries else args.dataset_config,
        max_rows=args.max_queries,
    )
    model = load_model(args.model)
    if model.config.num_labels < 2:
        raise ValueError(
            f"The demo is for classifiers, but {args.model} has one output. Try `hf-trak featurize` and `attribute`."
        )
    return DemoData(
        name=args.dataset,
        model=model,
        processing_class=find_processing_class(args.processor, args.model, None),
        train=train,
        queries=queries,
        label_column=_label_column(train.column_names, args.label_column),
    )


def _label_column(columns: list[str], chosen: str | None) -> str:
    for name in (chosen,) if chosen else ("labels", "label"):
        if name in columns:
            return name
    raise ValueError(f"There is no label column {chosen or 'label'!r}; the dataset has {', '.join(columns)}.")


def flip_labels(data: DemoData, *, fraction: float, seed: int) -> tuple[DemoData, np.ndarray]:
    """Give a share of the training rows another label at random.

    Returns:
        The data with those labels, and which rows were flipped, (n_train,). Only the last count may look at the latter.

    Raises:
        ValueError: If `fraction` is out of range or flips no row, or labels are not class indices.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"--flip_fraction must be above 0 and below 1, but is {fraction}.")
    column = data.label_column
    labels = np.array(data.train[column][:])
    n_classes = data.model.config.num_labels
    if n_classes < 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError("Only class labels can be flipped, and this model or dataset has none.")
    n_flipped = round(fraction * len(labels))
    if n_flipped == 0:
        raise ValueError(f"--flip_fraction {fraction} of {len(labels)} rows flips none.")
    rng = np.random.default_rng(seed)
    flipped = np.zeros(len(labels), dtype=bool)
    flipped[rng.choice(len(labels), n_flipped, replace=False)] = True
    labels[flipped] = (labels[flipped] + rng.integers(1, n_classes, n_flipped)) % n_classes
    kind = data.train.features[column]
    train = data.train.remove_columns(column).add_column(column, labels.tolist(), feature=kind)
    return replace(data, train=train), flipped


@contextmanager
def n_threads(number: int | None) -> Iterator[None]:
    """Let torch use this many threads for a while; None leaves it alone.

    The digits' model is so small that a second thread gains nothing, and costs tenfold where the machine has other work.
    """
    import torch

    previous = torch.get_num_threads()
    torch.set_num_threads(number or previous)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def _features(args: DemoArguments) -> dict[str, Any]:
    names = ("proj_dim", "damping", "text_columns", "image_column", "label_column")
    kept = ["text", "label"] if args.data == "text" else None
    return {"sketch_seed": args.seed, "keep_columns": kept, **{name: getattr(args, name) for name in names}}


def featurize(args: DemoArguments, data: DemoData, folder: Path) -> AttributionIndex:
    """Featurize under the model as it is."""
    from hf_trak.feature_args import FeatureArguments
    from hf_trak.index import AttributionIndex

    config = FeatureArguments(**_features(args)).trak_config()
    return AttributionIndex.build(
        folder / "index",
        models=args.model,
        dataset=data.train,
        config=config,
        processing_class=args.processor,
        overwrite=args.overwrite,
    )


def train_and_featurize(args: DemoArguments, data: DemoData, folder: Path) -> AttributionIndex:
    """Train with an `AttributionTrainer`, and featurize under the snapshots it kept."""
    from transformers import ProgressCallback

    from hf_trak import AttributionArguments, AttributionTrainer

    class Bar(ProgressCallback):
        def on_log(self, *_: Any, **__: Any) -> None:
            """The bar says enough."""

    usual = _RECIPES["own" if args.model else args.data]
    training = AttributionArguments(
        output_dir=str(folder),
        members=args.members,
        num_train_epochs=args.epochs or usual["epochs"],
        learning_rate=args.learning_rate or usual["learning_rate"],
        per_device_train_batch_size=usual["batch_size"],
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        seed=args.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        **_features(args),
    )
    trainer = AttributionTrainer(
        model=data.model,
        args=training,
        train_dataset=data.train,
        data_collator=_collator(data, training.trak_config()),
        processing_class=data.processing_class,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Bar)
    print("Training:")
    trainer.train()
    return trainer.featurize(overwrite=True)  # an index here is of an earlier demo


def _collator(data: DemoData, config: TrakConfig) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return the collator to train with: rows become the very batches that are featurized later."""
    from hf_trak.tasks import AutoTask

    task = AutoTask.from_model(data.model, config).reading(data.train)
    task.check(data.train, data.processing_class)
    task.check(data.queries, data.processing_class)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return task.collate({name: [row[name] for row in rows] for name in rows[0]}, data.processing_class)

    return collate


def out_to_loss(index: AttributionIndex) -> np.ndarray:
    """Return 1 − p of every training example's label, averaged over members, (n_train,)."""
    members = [index.features(member)["trak_out_to_loss"] for member in range(len(index.members))]
    return np.mean([np.asarray(member[:], dtype=np.float64) for member in members], axis=0)
