"""The demo's main path in the library's own terms: train, featurize, and score every example for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hf_trak.cli.demo_arguments import DemoArguments
    from hf_trak.cli.demo_data import DemoData
    from hf_trak.config import TrakConfig
    from hf_trak.index import AttributionIndex


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
    return {"sketch_seed": args.seed, **{name: getattr(args, name) for name in names}}


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

    digits = args.model is None
    training = AttributionArguments(
        output_dir=str(folder),
        members=args.members,
        num_train_epochs=args.epochs or (6 if digits else 3),
        learning_rate=args.learning_rate or (3e-3 if digits else 5e-5),
        per_device_train_batch_size=64 if digits else 16,
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
