r"""Methods beside TRAK: of texts alone, of embeddings, and TracIn.

A method with `whole_corpus = True` needs every abstract, candidate or not: for the rarity of words, or for a Gram matrix.

$\tau(z_i, z) = \frac1C\sum_c \cos(h_c(z_i), h_c(z))$, with $h$ the mean over tokens of one layer's hidden states, of the encoder (which
reads the sentence) or the decoder (which reads its target). Layer 0 is the embedding.

Source: Akyürek et al. (2022), [Towards tracing factual knowledge in language models back to the training
data](https://huggingface.co/papers/2205.11482), section 4.

Fact tracing compares parameters one by one: layers are chosen, cosines are taken per parameter, and Adam's second moments scale the
entries. A sketch that mixes all parameters can do none of this.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float, Int64
from torch import Tensor

from hf_trak.config import TrakConfig
from hf_trak.evaluation.baselines.base import Checkpoints, check_scores, project_gradients, similarity
from hf_trak.evaluation.baselines.bm25 import BM25PlusIndex
from hf_trak.evaluation.fact_tracing.data import restored
from hf_trak.evaluation.fact_tracing.fine_tuning import load_moments
from hf_trak.evaluation.fact_tracing.task import IGNORED, EncodedRows, Encoder, fact_task
from hf_trak.featurizing.featurizer import Featurizer
from hf_trak.hashing import fingerprint_of, stream_key
from hf_trak.projectors import BlockCountSketch, Identity, Projector
from hf_trak.sources.checkpoints import load_model

Method = Callable[[Dataset, Dataset], Float[np.ndarray, "n_train n_query"]]


@dataclass
class BM25PlusSentences:
    """BM25+ of sentences and questions with their answers put back. All maskings of a sentence tie."""

    whole_corpus = True

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        return self.index(train).score(restored(queries))

    def index(self, train: Dataset) -> BM25PlusIndex:
        """Return the index of the abstracts, which is made once for a dataset."""
        key = fingerprint_of(train)
        if getattr(self, "_key", None) != key:
            self._key, self._index = key, BM25PlusIndex(restored(train))
        return self._index

    def nearest_to(self, train: Dataset, queries: Dataset, k: int) -> Callable[[int], Int64[np.ndarray, " k"]]:
        """Return `(query number) -> its k best abstracts`, for [`draw_candidates`]."""
        index, texts = self.index(train), restored(queries)
        return lambda number: index.nearest(texts[number], k)


@dataclass(frozen=True)
class RandomTarget:
    """Abstracts whose target is the query's, in random order, before all others, in random order."""

    seed: int = 0

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        targets = np.array(train["targets_pretokenized"][:], dtype=object)
        same = targets[:, None] == np.array(queries["targets_pretokenized"][:], dtype=object)[None, :]
        return same + random_scores(train, queries, self.seed)


@dataclass(frozen=True)
class Random:
    """Uniform scores: what any method must beat."""

    seed: int = 0

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        return random_scores(train, queries, self.seed)


def random_scores(train: Dataset, queries: Dataset, seed: int) -> Float[np.ndarray, "n_train n_query"]:
    """Return numbers in [0, 1) that depend on the seed, the query and the abstract, not on what else is scored."""
    order = np.array([stream_key("abstract", seed, identity) for identity in train["id"][:]])
    drawn = np.empty((len(train), len(queries)))
    for column, uuid in enumerate(queries["uuid"][:]):
        mixed = (order ^ stream_key("query", seed, uuid)).astype(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64, as in hf_trak.hashing
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        drawn[:, column] = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) / 2.0**53
    return drawn


@dataclass
class Embed:
    """Cosines of mean hidden states.

    Args:
        checkpoints (`Sequence`): Folders, or models in memory.
        layer (`str`): `encoder.0`, `decoder.2` and the like.
    """

    checkpoints: Sequence[Any]
    encoder: Encoder
    layer: str = "encoder.0"
    batch_size: int = 64

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        found = self.sweep(train, queries)
        if self.layer not in found:
            raise ValueError(f"The model has no layer {self.layer!r}; it has {', '.join(found)}.")
        return found[self.layer]

    def sweep(self, train: Dataset, queries: Dataset) -> dict[str, Float[np.ndarray, "n_train n_query"]]:
        """Return the scores by every layer for the price of one."""
        scores: dict[str, np.ndarray] = {}
        for checkpoint in self.checkpoints:
            model = load_model(str(checkpoint)) if not isinstance(checkpoint, torch.nn.Module) else checkpoint
            states = [self._states(model, rows) for rows in (train, queries)]
            for layer in states[0]:
                found = similarity(states[0][layer], states[1][layer], "cosine") / len(self.checkpoints)
                scores[layer] = scores.get(layer, 0) + found
        return {layer: check_scores(values, train, queries) for layer, values in scores.items()}

    @torch.no_grad()
    def _states(self, model: Any, dataset: Dataset) -> dict[str, Float[np.ndarray, "n hidden_dim"]]:
        rows = EncodedRows(dataset, self.encoder)
        order = np.argsort(rows.lengths, kind="stable")
        model.eval()
        parts: dict[str, list[np.ndarray]] = {}
        blocks = [order[start : start + self.batch_size].tolist() for start in range(0, len(order), self.batch_size)]
        for batch in rows.batches(blocks, next(model.parameters()).device):
            labels = batch.pop("labels")
            output = model(**batch, use_cache=False, output_hidden_states=True)
            for side, states, mask in (
                ("encoder", output.encoder_hidden_states, batch["attention_mask"].bool()),
                ("decoder", output.decoder_hidden_states, labels != IGNORED),
            ):
                for number, state in enumerate(states):
                    parts.setdefault(f"{side}.{number}", []).append(_mean_over_tokens(state, mask))
        back = np.argsort(order)
        return {layer: np.concatenate(values)[back] for layer, values in parts.items()}


def _mean_over_tokens(states: Float[Tensor, "batch tokens dim"], mask: Tensor) -> Float[np.ndarray, "batch dim"]:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return ((states * weights).sum(1) / weights.sum(1).clamp(min=1)).float().cpu().numpy()


class SideBySide(Projector):
    """One projector per parameter: none where the parameter is small enough, else a block count sketch.

    Args:
        sizes (`Mapping[str, int]`): Entries of each parameter.
        dim (`int`): Numbers kept per parameter, at most.
        scales (`Mapping[str, Tensor]`, *optional*): What to multiply the gradient's entries by, shaped as the parameter.
    """

    def __init__(
        self, sizes: Mapping[str, int], *, dim: int, seed: int = 0, scales: Mapping[str, Tensor] | None = None
    ) -> None:
        self.parts: dict[str, Projector] = {
            name: Identity(proj_dim=size, sizes={name: size}) if size <= dim else BlockCountSketch(proj_dim=dim, seed=seed)
            for name, size in sizes.items()
        }
        super().__init__(proj_dim=sum(part.proj_dim for part in self.parts.values()), seed=seed)
        self.scales = dict(scales or {})
        widths = [part.start(1, dtype=torch.float32, device=torch.device("cpu")).shape[1] for part in self.parts.values()]
        self._accumulators = _slices(self.parts, widths)
        self.slices = _slices(self.parts, [part.proj_dim for part in self.parts.values()])
        """Where each parameter's numbers lie in the features."""

    def start(self, batch_size: int, *, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "batch width"]:
        width = max(place.stop for place in self._accumulators.values())
        return torch.zeros(batch_size, width, dtype=dtype, device=device)

    def finish(self, accumulator: Float[Tensor, "batch width"]) -> Float[Tensor, "batch proj_dim"]:
        return torch.cat([part.finish(accumulator[:, self._accumulators[name]]) for name, part in self.parts.items()], 1)

    def add(self, accumulator: Float[Tensor, "batch width"], name: str, grads: Float[Tensor, "batch *shape"]) -> None:
        scaled = grads * self.scales[name].to(grads) if name in self.scales else grads
        self.parts[name].add(accumulator[:, self._accumulators[name]], name, scaled)

    def add_outer(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        left: Float[Tensor, "batch tokens rows"],
        right: Float[Tensor, "batch tokens columns"],
    ) -> None:
        if name in self.scales:  # no longer a sum of outer products
            super().add_outer(accumulator, name, left, right)
        else:
            self.parts[name].add_outer(accumulator[:, self._accumulators[name]], name, left, right)

    def add_rows(
        self,
        accumulator: Float[Tensor, "batch width"],
        name: str,
        shape: tuple[int, int],
        rows: Int64[Tensor, "batch tokens"],
        values: Float[Tensor, "batch tokens columns"],
    ) -> None:
        scaled = values * self.scales[name].to(values)[rows] if name in self.scales else values
        self.parts[name].add_rows(accumulator[:, self._accumulators[name]], name, shape, rows, scaled)


def _slices(parts: Mapping[str, Projector], widths: list[int]) -> dict[str, slice]:
    slices, start = {}, 0
    for name, width in zip(parts, widths, strict=True):
        slices[name] = slice(start, start + width)
        start += width
    return slices


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
