"""How good attributions are: what they find, against what is known."""

from hf_trak.evaluation.lds import LDS, Reliability, ground_truth_reliability, lds, predicted_outputs, spearman
from hf_trak.evaluation.mislabeled import found_share, mislabel_auc
from hf_trak.evaluation.subsets import GroundTruth, SubsetJob, collect, ground_truth_from, make_masks
from hf_trak.evaluation.training import Recipe

__all__ = [
    "LDS",
    "GroundTruth",
    "Recipe",
    "Reliability",
    "SubsetJob",
    "collect",
    "found_share",
    "ground_truth_from",
    "ground_truth_reliability",
    "lds",
    "make_masks",
    "mislabel_auc",
    "predicted_outputs",
    "spearman",
]
