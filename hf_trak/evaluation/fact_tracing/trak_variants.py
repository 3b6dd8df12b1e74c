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
from hf_trak.scoring.ensemble import default_power


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
GROUPS = {"halves": ("halves",), "checkpoints": ("checkpoints",), "both": ("halves", "checkpoints")}
"""Which indexes a choice of members takes; TRAK averages over all members of all of them."""
_POWER = default_power("mean_one_minus_p")  # the kind of `fact_task`


def trak_scores(space: Workspace, name: str) -> dict[str, np.ndarray]:
    """Return the scores of some features under all choices of members by every variant's name, (n_train, n_query) each."""
    queries, _ = space.asked
    groups = dict.fromkeys(group for members in space.args.trak_members for group in GROUPS[members])
    indexes = {group: trak_index(space, name, group) for group in groups}
    columns = {group: member_columns(index) for group, index in indexes.items()}
    scores: dict[str, np.ndarray] = {}
    for damping in DAMPINGS:
        options = {"damping": damping, "out_to_loss_power": 0.0, "combination": "means"}
        influence = {group: Trak(index, options)(space.abstracts, queries) for group, index in indexes.items()}
        for members in space.args.trak_members:
            parts = GROUPS[members]
            n_members = [columns[group].shape[1] for group in parts]
            mean = np.average([influence[group] for group in parts], axis=0, weights=n_members).astype(np.float32)
            out_to_loss, lengths = np.concatenate([columns[group] for group in parts], axis=1).mean(axis=1)[..., None]
            scores[f"damping {damping}, {members}"] = mean * out_to_loss**_POWER
            scores[f"damping {damping}, no out_to_loss, {members}"] = mean
            scores[f"damping {damping}, unit rows, {members}"] = mean / np.maximum(lengths, 1e-12)
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


def member_columns(index: AttributionIndex) -> np.ndarray:
    """Return each member's `out_to_loss` and gradient norms, (2, n_members, n_train)."""
    rows = [index.features(member).with_format("numpy") for member in range(len(index.members))]
    names = ("trak_out_to_loss", "trak_grad_norm")
    return np.array([[of_member[name][:] for of_member in rows] for name in names], dtype=np.float32)
