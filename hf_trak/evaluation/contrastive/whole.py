"""A whole dual encoder, trained with its own contrastive loss on images and captions as they are."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.utils.data import DataLoader

from hf_trak.config import TrakConfig
from hf_trak.evaluation.contrastive.data import load_pairs
from hf_trak.evaluation.contrastive.settings import ContrastiveArguments
from hf_trak.evaluation.contrastive.trained import describe_case, is_kept, make_optimizer
from hf_trak.evaluation.training import save_checkpoint
from hf_trak.sources.checkpoints import load_model, load_processing_class
from hf_trak.tasks import AutoTask, PairCollator, is_dual_encoder


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
