"""The folder of one evaluation: what was trained and what came out of it, each made once and then read.

```
models/           what scores are made of: the members of the ensembles, and the checkpoints of one run
ensemble_1/, ...  the indices
scores.safetensors
lds/              outputs of models of random halves, one file per run
counterfactuals/  cosines after removals, one file per run
```
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hf_trak.config import TrakConfig
from hf_trak.evaluation.baselines import Checkpoints
from hf_trak.evaluation.baselines.representation import embed_pairs
from hf_trak.evaluation.contrastive.projections import Projections
from hf_trak.evaluation.contrastive.settings import NOT_SHARED, ContrastiveArguments
from hf_trak.evaluation.contrastive.trained import Trained
from hf_trak.evaluation.contrastive.whole import WholeEncoder
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.gradients.batch import evaluation_mode
from hf_trak.index import AttributionIndex
from hf_trak.messages import list_differences
from hf_trak.storage.files import read_json, write_json


class Workspace:
    """One evaluation in one folder.

    Raises:
        ValueError: If the folder was begun with other settings.
    """

    def __init__(self, args: ContrastiveArguments) -> None:
        self.args = args
        self.folder = Path(args.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        _begin(self.folder / "settings.json", args)
        kind: Callable[..., Trained] = Projections if args.model is None else WholeEncoder
        self.trained = kind(args, self.folder)
        self.n_train, self.n_query = len(self.trained.train_rows), len(self.trained.query_rows)
        self.everything = np.ones(self.n_train, dtype=bool)

    @property
    def config(self) -> TrakConfig:
        """What features mean."""
        return replace(self.trained.config, proj_dim=self.args.proj_dim, bank_size=self.args.bank_size)

    @property
    def batch_size(self) -> int | str:
        """Rows of a batch of gradients."""
        size = self.args.featurize_batch_size
        return int(size) if size.isdigit() else size

    def models(self, name: str, mask: Bool[np.ndarray, " n_train"], seed: int, *, keep: int = 1) -> list[Any]:
        """Return the models of `keep` epochs of a training run, doing it once."""
        paths = self._paths(name, keep)
        if not self.has_models(name, keep):
            for model, path in zip(self.trained.train(mask, seed, keep=keep), paths, strict=True):
                self.trained.save(model, path)
        return [self.trained.load(path) for path in paths]

    def has_models(self, name: str, keep: int = 1) -> bool:
        """Return whether a training run is done."""
        return self._paths(name, keep)[-1].exists()  # which is saved last

    def _paths(self, name: str, keep: int) -> list[Path]:
        return [self.folder / "models" / name / f"checkpoint_{number}" for number in range(keep)]

    def checkpoints(self, model: Any) -> Checkpoints:
        """Return one model as baselines take it."""
        return Checkpoints(
            model,
            self.config,
            self.trained.processing_class,
            task=self.trained.task,
            batch_size=self.batch_size,
            device=self.args.device,
        )

    def index(
        self,
        name: str,
        models: list[Any],
        *,
        masks: Bool[np.ndarray, "n_models n_train"] | None = None,
        sketch_seed: int = 0,
    ) -> AttributionIndex:
        """Return the index of some models."""
        return AttributionIndex.build(
            self.folder / name,
            models=models,
            dataset=self.trained.train_rows,
            config=replace(self.config, seed=sketch_seed),
            processing_class=self.trained.processing_class,
            task=self.trained.task,
            masks=None if masks is None else torch.from_numpy(masks),
            batch_size=self.batch_size,
        )

    def embeddings(self, model: Any) -> tuple[Float[Tensor, "n_query dim"], Float[Tensor, "n_query dim"]]:
        """Return those of the held-out images and captions."""
        checkpoints = self.checkpoints(model)
        found = embed_pairs(checkpoints, checkpoints.featurizer(0, sketched=False), self.trained.query_rows)
        return torch.from_numpy(found["images"]), torch.from_numpy(found["captions"])

    def cosines(self, model: Any) -> Float[np.ndarray, " n_query"]:
        """Return the cosine between each held-out image and its caption."""
        return torch.cosine_similarity(*self.embeddings(model)).numpy()

    def outputs(self, model: Any) -> Float[np.ndarray, " n_query"]:
        """Return the output f of every held-out pair, against the bank of the model."""
        checkpoints = self.checkpoints(model)
        featurizer = checkpoints.featurizer(0, sketched=False)
        featurizer.make_bank(self.trained.train_rows)
        return checkpoints.run(featurizer, self.trained.query_rows, lambda batch: _outputs(featurizer, batch))["output"]


@torch.no_grad()
def _outputs(featurizer: Featurizer, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    with evaluation_mode(featurizer.model):
        return {"output": featurizer.task.output_function(featurizer.model, batch)[0].float().cpu().numpy()}


def _begin(path: Path, args: ContrastiveArguments) -> None:
    wanted = json.loads(json.dumps({name: value for name, value in asdict(args).items() if name not in NOT_SHARED}))
    if not path.exists():
        write_json(path, wanted)
    if (found := read_json(path)) != wanted:
        differences = "\n".join(f"  {line}" for line in list_differences(found, wanted))
        raise ValueError(f"{path.parent} was begun with other settings:\n{differences}\nChoose another folder.")
