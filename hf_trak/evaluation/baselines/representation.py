r"""Baselines of similarity: training examples, or pairs, that look to the model as the query does.

$\tau(z_i, z) = \langle h(z_i), h(z)\rangle$ or their cosine, averaged over checkpoints, with $h$ what the model's last linear layer
reads: the pooled last hidden state. Labels play no part, so that it tells what is alike, not what speaks for or against.

Source: Hanawa et al. (2021), [Evaluation of similarity-based explanations](https://huggingface.co/papers/2006.04528).

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
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn

from hf_trak.evaluation.baselines.base import Checkpoints, check_scores, similarity
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.gradients.batch import evaluation_mode
from hf_trak.tasks import needs_bank


@dataclass(frozen=True)
class RepresentationSimilarity:
    """Dot product or cosine of the states before the classifier.

    Args:
        similarity (`"dot"` or `"cosine"`): Cosine is the usual choice.
        module (`str`, *optional*): Name of the module whose input is the representation, where it is not the last linear layer.
    """

    checkpoints: Checkpoints
    similarity: Literal["dot", "cosine"] = "cosine"
    module: str | None = None

    def __call__(self, train: Dataset, queries: Dataset) -> Float64[np.ndarray, "n_train n_query"]:
        scores = np.zeros((len(train), len(queries)))
        for number in range(len(self.checkpoints)):
            featurizer = self.checkpoints.featurizer(number, sketched=False)
            found = [self._representations(featurizer, dataset) for dataset in (train, queries)]
            scores += similarity(found[0], found[1], self.similarity) / len(self.checkpoints)
        return check_scores(scores, train, queries)

    def _representations(self, featurizer: Featurizer, dataset: Dataset) -> Float32[np.ndarray, "n hidden_dim"]:
        def call(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
            return {"hidden": represent(featurizer, batch, self.module).float().cpu().numpy()}

        return self.checkpoints.run(featurizer, dataset, call)["hidden"]


def represent(featurizer: Featurizer, batch: Mapping[str, Any], module: str | None = None) -> Float[Tensor, "batch hidden_dim"]:
    """Return what the model's last linear layer, or `module`, reads of each example.

    Where it reads every token, as in GPT-2 and Llama, the last token of each example is taken, and checked to be the one that the
    model classifies by.

    Raises:
        ValueError: If there is no such layer, or it does not read one vector per example; name another with `module`.
    """
    task, model = featurizer.task, featurizer.model
    if needs_bank(task):
        raise ValueError(
            f"{type(model).__name__} has two towers, and so no layer that decides all. Compare its embeddings: PairSimilarity "
            "('similarity_images', 'similarity_captions', 'similarity_mean')."
        )
    seen: list[tuple[Tensor, Any]] = []
    candidates = _heads(model, module)
    handles = [head.register_forward_hook(lambda _, args, output: seen.append((args[0], output))) for head in candidates]
    logits: list[Tensor | None] = []

    def recording(**inputs: Any) -> Any:
        result = model(**inputs)
        logits.append(getattr(result, "logits", None))
        return result

    try:
        with evaluation_mode(model), torch.no_grad():
            task.output_function(recording, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise ValueError(f"{_describe(model, module)} is not called in a forward pass. Name another with `module`.")
    hidden, output = seen[-1]
    if hidden.ndim == 3 and "attention_mask" in batch:
        last = batch["attention_mask"].sum(1) - 1
        rows = torch.arange(len(hidden), device=hidden.device)
        hidden, output = hidden[rows, last], output[rows, last]
    if hidden.ndim != 2 or (module is None and not _same(output, logits[-1])):
        raise ValueError(
            f"{_describe(model, module)} reads a tensor of shape {tuple(hidden.shape)}, which does not decide the logits of each "
            "example alone. Name the module whose input is one vector per example with `module`."
        )
    return hidden


def _heads(model: nn.Module, module: str | None) -> list[nn.Module]:
    """Return the modules of which the last to run is the head."""
    if module is not None:
        modules = dict(model.named_modules())
        if module not in modules:
            raise ValueError(f"{type(model).__name__} has no module {module!r}; it ends in {', '.join(list(modules)[-3:])}.")
        return [modules[module]]
    n_labels = getattr(getattr(model, "config", None), "num_labels", None)
    heads: list[nn.Module] = [head for head in model.modules() if isinstance(head, nn.Linear) and head.out_features == n_labels]
    if not heads:
        raise ValueError(f"{type(model).__name__} has no linear layer with {n_labels} outputs. Name its head with `module`.")
    return heads


def _same(output: Tensor, logits: Tensor | None) -> bool:
    """Whether a head's output is the logits, but for a temperature."""
    if logits is None or output.shape != logits.shape:
        return False
    scale = logits.norm() / output.norm().clamp_min(torch.finfo(output.dtype).tiny)
    return torch.allclose(output * scale, logits, rtol=1e-3, atol=1e-5)


def _describe(model: nn.Module, module: str | None) -> str:
    return f"The last linear layer of {type(model).__name__}" if module is None else f"{module!r} of {type(model).__name__}"


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
