r"""Similarity of pairs: training pairs whose image, or caption, a dual encoder puts next to the query's.

$\tau(z_i, z) = \cos(x_i, x)$ of the images' embeddings in the shared space, of the captions', or the mean of both, averaged over
checkpoints. Of a row with several captions, the mean of their unit vectors is taken.

Source: the CLIP baseline of Park et al. (2023), [TRAK](https://huggingface.co/papers/2303.14186), section 5.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float64

from hf_trak.evaluation.baselines.base import Checkpoints, check_scores, similarity
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.gradients.batch import evaluation_mode
from hf_trak.tasks import needs_bank

SIDES = {"images": ("images",), "captions": ("captions",), "mean": ("images", "captions")}
"""What is compared, by name."""


@dataclass(frozen=True)
class PairSimilarity:
    """Cosines of the embeddings of images, of captions, or their mean.

    Args:
        of (`"images"`, `"captions"` or `"mean"`): What is compared.
    """

    checkpoints: Checkpoints
    of: Literal["images", "captions", "mean"] = "mean"

    def __call__(self, train: Dataset, queries: Dataset) -> Float64[np.ndarray, "n_train n_query"]:
        if self.of not in SIDES:
            raise ValueError(f"Similarities are of {', '.join(SIDES)}, but `of` is {self.of!r}.")
        scores = np.zeros((len(train), len(queries)))
        for number in range(len(self.checkpoints)):
            featurizer = self.checkpoints.featurizer(number, sketched=False)
            found = [embed_pairs(self.checkpoints, featurizer, dataset) for dataset in (train, queries)]
            for side in SIDES[self.of]:
                scores += similarity(found[0][side], found[1][side], "cosine") / len(SIDES[self.of])
        return check_scores(scores / len(self.checkpoints), train, queries)


def embed_pairs(checkpoints: Checkpoints, featurizer: Featurizer, dataset: Dataset) -> dict[str, np.ndarray]:
    """Return the embeddings of `images` and `captions` of a dataset, (n, dim) each.

    Raises:
        ValueError: If the model is no dual encoder.
    """
    task, model = featurizer.task, featurizer.model
    if not needs_bank(task):
        raise ValueError(f"{type(model).__name__} is no dual encoder: it embeds no pairs of images and captions.")

    @torch.no_grad()
    def call(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        with evaluation_mode(model):
            images, captions = task.output_function.embed(model, batch)  # type: ignore[attr-defined]
        weights = batch["caption_weights"].to(images.dtype)
        texts = sum(weights[:, slot, None] * embeddings for slot, embeddings in enumerate(captions))
        return {"images": images.float().cpu().numpy(), "captions": texts.float().cpu().numpy()}

    return checkpoints.run(featurizer, dataset, call)
