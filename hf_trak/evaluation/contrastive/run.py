"""The whole evaluation on image-caption pairs: train, score, remove and train again, and sum up."""

from __future__ import annotations

from typing import Any

from hf_trak.evaluation.contrastive.measures import GroundTruth, Removals, lds_rows, recall_row
from hf_trak.evaluation.contrastive.scores import all_scores, train_for_scores
from hf_trak.evaluation.contrastive.settings import ContrastiveArguments
from hf_trak.evaluation.contrastive.workspace import Workspace


def run_contrastive(args: ContrastiveArguments) -> list[dict[str, Any]] | None:
    """Do what is not done yet, and return the result rows; None while another shard still has something to do.

    Scores are made by the first shard, of models that all shards train. A shard that has to wait returns: the same call later goes on
    with the removals.
    """
    space = Workspace(args)
    truth = GroundTruth(space)
    truth.train()
    train_for_scores(space)
    scores = all_scores(space)
    if scores is None:
        return None
    removals = Removals(space, scores)
    removals.train()
    if not (truth.is_complete and removals.is_complete):
        return None
    return [*lds_rows(truth, scores), *removals.rows(), recall_row(space)]
