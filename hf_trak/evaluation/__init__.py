"""How good attributions are: what they find, against what is known."""

from hf_trak.evaluation.mislabeled import found_share, mislabel_auc

__all__ = ["found_share", "mislabel_auc"]
