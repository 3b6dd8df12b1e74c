"""Per-example gradients, sketched as they appear: tensors in, tensors out."""

from hf_trak.gradients.batch import (
    BatchFeatures,
    BatchRefused,
    OutputFunction,
    ParameterSelection,
    evaluation_mode,
    select_parameters,
)
from hf_trak.gradients.functional import functional_features
from hf_trak.gradients.layer_patches import dropout_mask
from hf_trak.gradients.layerwise import layerwise_features
from hf_trak.gradients.loop import loop_features, rows_of
from hf_trak.gradients.taps import CallPlan
from hf_trak.gradients.verify import CheckFailed, Collate, TooFewExamples, check_gradients

GRADIENTS = {"layerwise": layerwise_features, "functional": functional_features, "loop": loop_features}

__all__ = [
    "GRADIENTS",
    "BatchFeatures",
    "BatchRefused",
    "CallPlan",
    "CheckFailed",
    "Collate",
    "OutputFunction",
    "ParameterSelection",
    "TooFewExamples",
    "check_gradients",
    "dropout_mask",
    "evaluation_mode",
    "functional_features",
    "layerwise_features",
    "loop_features",
    "rows_of",
    "select_parameters",
]
