r"""TracIn for fact tracing: inner products of loss gradients, for chosen layers, scaled and normalized in several ways.

With $g_p$ the loss gradient of parameter p at a checkpoint, divided by the root of the optimizer's second moment if wanted:

    dot             $\sum_p \langle g_p(z_i), g_p(z)\rangle$
    cosine          that over $\sqrt{\sum_p\|g_p(z_i)\|^2 \sum_p\|g_p(z)\|^2}$      ("global")
    layer_cosine    $\sum_p \cos(g_p(z_i), g_p(z))$                                 ("local")

averaged over checkpoints. One pass of gradients serves all variants.

Sources: Pruthi et al. (2020), [TracIn](https://huggingface.co/papers/2002.08484); Akyürek et al. (2022), [Towards tracing factual
knowledge in language models back to the training data](https://huggingface.co/papers/2205.11482), section 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from hf_trak.config import TrakConfig
from hf_trak.evaluation.baselines.base import Checkpoints, check_scores, project_gradients
from hf_trak.evaluation.fact_tracing.encoding import Encoder
from hf_trak.evaluation.fact_tracing.fine_tuning import load_moments
from hf_trak.evaluation.fact_tracing.output import fact_task
from hf_trak.evaluation.fact_tracing.side_by_side import SideBySide
from hf_trak.featurizing.featurizer import Featurizer

SIMILARITIES = ("dot", "cosine", "layer_cosine")
_TINY = 1e-7  # added to the root of second moments, as in the paper's code


@dataclass(frozen=True)
class Variant:
    """One way to compare gradients.

    Args:
        similarity (`str`): dot, cosine or layer_cosine.
        layers (`str`): A regular expression that picks parameters by name; by default all.
    """

    similarity: str = "cosine"
    layers: str = ""

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise ValueError(f"`similarity` must be one of {', '.join(SIMILARITIES)}, but is {self.similarity!r}.")

    def __str__(self) -> str:
        return f"{self.similarity}, {self.layers or 'all layers'}"


@dataclass
class TracIn:
    """TracIn scores; see above.

    Args:
        checkpoints (`Sequence`): Folders, or models in memory, of one run.
        encoder (`Encoder`): Says which tokens are in the loss.
        variant (`Variant`): For a call; [`TracIn.sweep`] takes several.
        use_second_moments (`bool`): Divide gradients by the roots of the second moments saved beside each checkpoint.
        parameters (`Sequence[str]`, *optional*): Regular expressions: take gradients of these only.
        dim (`int`): Numbers kept per parameter; parameters of more entries are sketched.
    """

    checkpoints: Sequence[Any]
    encoder: Encoder
    variant: Variant = Variant()
    use_second_moments: bool = False
    parameters: Sequence[str] | None = None
    dim: int = 4096
    batch_size: int | str = "auto"

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        return self.sweep(train, queries, [self.variant])[self.variant]

    def sweep(
        self, train: Dataset, queries: Dataset, variants: Sequence[Variant]
    ) -> dict[Variant, Float[np.ndarray, "n_train n_query"]]:
        """Return the scores of several variants for the price of one.

        Raises:
            ValueError: If a variant's layers match no parameter, or a checkpoint has no second moments.
        """
        scores = {variant: np.zeros((len(train), len(queries)), dtype=np.float32) for variant in variants}
        for number in range(len(self.checkpoints)):
            featurizer, sketch = self._prepare(number)
            places = {variant: _places(sketch, variant) for variant in variants}
            targets = torch.cat([features for _, features in self._gradients(featurizer, sketch, queries)])
            for rows, features in self._gradients(featurizer, sketch, train):
                products = {name: _products(features[:, place], targets[:, place]) for name, place in sketch.slices.items()}
                for variant, names in places.items():
                    chosen = [products[name] for name in names]
                    scores[variant][rows] += _combine(chosen, variant.similarity).numpy() / len(self.checkpoints)
        return {variant: check_scores(values, train, queries) for variant, values in scores.items()}

    def _prepare(self, number: int) -> tuple[Featurizer, SideBySide]:
        task = fact_task(self.encoder, output="log_probability")
        config = TrakConfig(proj_dim=1, projector="dense_rademacher", parameters=self._patterns())
        checkpoint = self.checkpoints[number]
        checkpoints = Checkpoints([checkpoint], config, self.encoder.tokenizer, task, batch_size=self.batch_size)
        featurizer = checkpoints.featurizer(0)
        sizes = {name: parameter.numel() for name, parameter in featurizer.selection.parameters.items()}
        return featurizer, SideBySide(sizes, dim=self.dim, scales=self._scales(checkpoint, sizes))

    def _patterns(self) -> tuple[str, ...] | None:
        return None if self.parameters is None else tuple(self.parameters)

    def _scales(self, checkpoint: Any, names: Mapping[str, int]) -> dict[str, Tensor] | None:
        if not self.use_second_moments:
            return None
        moments = load_moments(Path(checkpoint)) if isinstance(checkpoint, (str, Path)) else None
        if moments is None or not names.keys() <= moments.keys():
            raise ValueError(f"{checkpoint} has no second moments for all its parameters; save it with `save_with_moments`.")
        return {name: 1 / (moments[name].sqrt() + _TINY) for name in names}

    def _gradients(self, featurizer: Featurizer, sketch: SideBySide, rows: Dataset) -> Iterator[tuple[range, Tensor]]:
        """Yield blocks of rows and their gradients' sketches, in order."""
        size = self.batch_size if isinstance(self.batch_size, int) else featurizer.budget.rows
        for start in range(0, len(rows), size):
            block = range(start, min(start + size, len(rows)))
            batch = featurizer.collate(rows[block.start : block.stop]).to(featurizer.device)
            yield block, project_gradients(featurizer, batch, sketch).features.float().cpu()


Products = tuple[Tensor, Tensor, Tensor]
"""Of one parameter: inner products (rows, n_query), and the squared norms of the rows and of the queries."""


def _products(rows: Float[Tensor, "rows dim"], queries: Float[Tensor, "n_query dim"]) -> Products:
    return rows @ queries.T, rows.square().sum(1), queries.square().sum(1)


def _combine(products: Sequence[Products], similarity: str) -> Float[Tensor, "rows n_query"]:
    if similarity == "layer_cosine":
        return torch.stack([_cosine(*product) for product in products]).sum(0)
    total = tuple(torch.stack(list(part)).sum(0) for part in zip(*products, strict=True))
    return total[0] if similarity == "dot" else _cosine(*total)


def _cosine(dot: Tensor, left: Tensor, right: Tensor) -> Tensor:
    scale = torch.outer(left, right).sqrt()
    return torch.where(scale > 0, dot / scale.clamp(min=1e-30), 0.0)


def _places(sketch: SideBySide, variant: Variant) -> list[str]:
    names = [name for name in sketch.slices if re.search(variant.layers, name)]
    if not names:
        raise ValueError(f"No parameter matches {variant.layers!r}; they are {', '.join(list(sketch.slices)[:5])}, ...")
    return names
