"""TRAK with the choices that are open: whose gradients, of what, for which tokens, the damping, and whether long gradients weigh more."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_trak.config import TrakConfig
from hf_trak.evaluation.fact_tracing.output import fact_task
from hf_trak.evaluation.fact_tracing.settings import TRAK_FEATURES
from hf_trak.evaluation.fact_tracing.trak import Trak
from hf_trak.evaluation.fact_tracing.workspace import Workspace
from hf_trak.index import AttributionIndex


@dataclass(frozen=True)
class Features:
    """What an index is made of.

    Args:
        parameters (`tuple[str, ...]`, *optional*): Regular expressions of what is differentiated; by default all.
        reduction (`str`): mean or sum over scored tokens.
        answer_only (`bool`): Score neither `<extra_id_0>` nor the end of the sequence.
    """

    parameters: tuple[str, ...] | None = None
    reduction: str = "mean"
    answer_only: bool = False


FEATURES = dict(
    zip(
        TRAK_FEATURES,
        (
            Features(),
            Features(parameters=(r"^shared",)),
            Features(parameters=(r"^(?!shared|lm_head)",)),
            Features(answer_only=True),
            Features(parameters=(r"^shared",), answer_only=True),
            Features(parameters=(r"^encoder\.",), answer_only=True),
            Features(parameters=(r"^decoder\.",), answer_only=True),
            Features(reduction="sum"),
        ),
        strict=True,
    )
)
DAMPINGS: tuple[float | str, ...] = ("auto", 0.03, 0.3)


def trak_scores(space: Workspace, name: str, members: str) -> dict[str, np.ndarray]:
    """Return the scores of some features under some members by every variant's name, (n_train, n_query) each."""
    queries, _ = space.asked
    index = trak_index(space, name, members)
    lengths = gradient_norms(index)[:, None]
    scores: dict[str, np.ndarray] = {}
    for damping in DAMPINGS:
        found = Trak(index, {"damping": damping})(space.abstracts, queries)
        scores[f"damping {damping}"] = found
        scores[f"damping {damping}, unit rows"] = found / lengths
    return scores


def trak_index(space: Workspace, name: str, members: str) -> AttributionIndex:
    """Return an index of all abstracts under runs on halves, or under the full run's checkpoints, built once."""
    features = FEATURES[name]
    encoder = replace(space.encoder, score_sentinel=not features.answer_only, score_eos=not features.answer_only)
    halves = members == "halves"
    folder = "".join(letter if letter.isalnum() else "-" for letter in f"{name} {members}")
    return AttributionIndex.build(
        space.folder / "index" / folder,
        models=[space.member_checkpoint(m) for m in range(space.args.n_members)] if halves else space.checkpoints,
        dataset=space.abstracts,
        config=TrakConfig(proj_dim=space.args.proj_dim, parameters=features.parameters),
        processing_class=space.encoder.tokenizer,
        task=fact_task(encoder, reduction=features.reduction),
        masks=torch.from_numpy(space.masks) if halves else None,
        sketch_seeds_per_checkpoint=space.args.sketch_seeds,
    )


def gradient_norms(index: AttributionIndex) -> np.ndarray:
    """Return the mean over members of each row's gradient norm, (n_train,)."""
    norms = [
        np.asarray(index.features(member).with_format("numpy")["trak_grad_norm"][:]) for member in range(len(index.members))
    ]
    return np.maximum(np.mean(norms, axis=0, dtype=np.float64), 1e-12)
