r"""Influence functions with the Hessian approximated by EK-FAC, through the `kronfluence` library.

$\tau(z_i, z) = -\nabla f(z)^\top (G + \lambda I)^{-1} \nabla L(z_i)$. Within each linear or convolutional layer $G = (U_A \otimes U_S)\,
\Lambda\,(U_A \otimes U_S)^\top$, with $U_A, U_S$ the eigenvectors of the second moments of the layer's inputs and of its outputs'
gradients, and $\Lambda$ the second moments of the gradient in that basis.

Sources: George et al. (2018), [Fast approximate natural gradient descent in a Kronecker-factored
eigenbasis](https://huggingface.co/papers/1806.03884); Grosse et al. (2023), [Studying large language model generalization with
influence functions](https://huggingface.co/papers/2308.03296). The computation is kronfluence's; this file translates to it.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from hf_trak.evaluation.baselines.arnoldi import classification_loss, loss_of
from hf_trak.evaluation.baselines.base import Checkpoints, check_scores
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.tasks import Task
from hf_trak.tasks.token_outputs import IGNORED, TokenOutput


@dataclass(frozen=True)
class EKFACInfluence:
    """EK-FAC influence functions, averaged over checkpoints.

    It serves classification, regression and language models (the loss of a row is the sum over its scored tokens).
    Only `nn.Linear` and `nn.Conv2d` layers take part, as kronfluence has it: embeddings, norms and GPT-2's `Conv1D` do not.

    Args:
        modules (`Sequence[str]`, *optional*): Names of the layers that take part; by default all that can.
        damping (`float`, *optional*): Added to the eigenvalues; by default a tenth of each layer's mean eigenvalue.
        empirical_fisher (`bool`): Use the given labels in place of labels drawn from the model's predictions.
        strategy (`str`): `"ekfac"`, or kronfluence's `"kfac"`, `"diagonal"`, `"identity"`.
        seed (`int`): Of the labels that are drawn.
    """

    checkpoints: Checkpoints
    modules: Sequence[str] | None = None
    damping: float | None = None
    empirical_fisher: bool = False
    strategy: str = "ekfac"
    seed: int = 0

    def __call__(self, train: Dataset, queries: Dataset) -> Float64[np.ndarray, "n_train n_query"]:
        _kronfluence()
        if len(train) == 0 or len(queries) == 0:
            raise ValueError("There is nothing to score: a dataset is empty.")
        scores = np.zeros((len(train), len(queries)))
        for number in range(len(self.checkpoints)):
            featurizer = self.checkpoints.featurizer(number, sketched=False)
            for dataset in (train, queries):
                featurizer.check(dataset)
            with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                # kronfluence names torch's gradient scaler by its old name, in every pass.
                warnings.filterwarnings("ignore", message=".*GradScaler.*", category=FutureWarning)
                torch.manual_seed(self.seed)
                scores += self._score(featurizer, train, queries, folder) / len(self.checkpoints)
        return check_scores(scores, train, queries)

    def _score(self, featurizer: Featurizer, train: Dataset, queries: Dataset, folder: str) -> np.ndarray:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.utils.dataset import DataLoaderKwargs

        task = _translate(featurizer.task, self.modules)
        model = prepare_model(copy.deepcopy(featurizer.model), task)  # it replaces layers in place
        analyzer = Analyzer(
            "hf_trak",
            model,
            task,
            cpu=featurizer.device.type == "cpu",
            log_level=logging.ERROR,
            disable_tqdm=True,
            output_dir=folder,
        )
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=_collator(featurizer)))
        size = self.checkpoints.rows_at_a_time(featurizer)
        analyzer.fit_all_factors(
            "factors",
            _Rows(train),
            per_device_batch_size=min(size, len(train)),
            factor_args=FactorArguments(strategy=self.strategy, use_empirical_fisher=self.empirical_fisher),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            "factors",
            query_dataset=_Rows(queries),
            train_dataset=_Rows(train),
            per_device_query_batch_size=min(size, len(queries)),
            per_device_train_batch_size=min(size, len(train)),
            score_args=ScoreArguments(damping_factor=self.damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].double().cpu().numpy().T


class _Rows(torch.utils.data.Dataset):
    """Rows as a torch dataset; kronfluence takes no other."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return self.dataset[int(row)]


def _collator(featurizer: Featurizer) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return featurizer.task.collate({key: [row[key] for row in rows] for key in rows[0]}, featurizer.processing_class)

    return collate


def _translate(task: Task, modules: Sequence[str] | None) -> Any:
    """Return a kronfluence task whose measurement is −f, so that a positive score raises f."""
    from kronfluence.task import Task as KronfluenceTask

    tokens = task.output_function if isinstance(task.output_function, TokenOutput) else None
    loss = loss_of(task) if tokens is None else None

    class Translated(KronfluenceTask):
        def compute_train_loss(self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False) -> Tensor:
            results: list[Any] = []

            def recording(**inputs: Any) -> Any:
                results.append(model(**inputs))
                return results[-1]

            output, out_to_loss = task.output_function(recording, batch)
            if tokens is not None:
                return token_loss(results[-1].logits, _targets(tokens, results[-1].logits, batch["labels"], sample))
            assert loss is not None
            if sample:
                labels = _draw_labels(loss is classification_loss, results[-1].logits)
                output, out_to_loss = task.output_function(lambda **_: results[-1], {**batch, "labels": labels})
            return loss(output, out_to_loss).sum()

        def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
            return -task.output_function(model, batch)[0].sum()

        def get_influence_tracked_modules(self) -> list[str] | None:
            return None if modules is None else list(modules)

        def get_attention_mask(self, batch: Mapping[str, Tensor]) -> Tensor | None:
            return batch.get("attention_mask")

    return Translated()


def token_loss(logits: Float[Tensor, "batch tokens vocabulary"], targets: Int64[Tensor, "batch tokens"]) -> Tensor:
    """Return Σ_t -log p_t over all tokens that are scored."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _targets(function: TokenOutput, logits: Tensor, labels: Tensor, sample: bool) -> Int64[Tensor, "batch tokens"]:
    """Return the token that each position's logits are about, or tokens drawn from these logits."""
    targets = function.targets(labels)
    if not sample:
        return targets
    drawn = torch.multinomial(logits.detach().float().softmax(-1).flatten(0, 1), 1).view(targets.shape)
    return drawn.where(targets != IGNORED, IGNORED)


def _draw_labels(classes: bool, logits: Tensor) -> Tensor:
    """Draw labels from the model's own predictions: of a classifier's distribution, or normal around a regression's."""
    if classes:
        return torch.multinomial(logits.detach().float().softmax(-1), 1).squeeze(1)
    prediction = logits.detach().squeeze(-1)
    return prediction + torch.randn_like(prediction)


def _kronfluence() -> None:
    try:
        import kronfluence  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "EK-FAC needs the kronfluence library: pip install 'hf-trak[ekfac]'. It asks for torchvision without using it; where "
            "that gets in the way of your torch: pip install --no-deps kronfluence einops einconv opt-einsum."
        ) from error
