"""Per-example gradients, sketched as they appear: tensors in, tensors out."""

from hf_trak.gradients.batch import BatchFeatures, OutputFunction, evaluation_mode
from hf_trak.gradients.check import check_gradients
from hf_trak.gradients.dropout import thinned
from hf_trak.gradients.functional import functional_features
from hf_trak.gradients.layerwise import layerwise_features
from hf_trak.gradients.selection import ParameterSelection, select_parameters

GRADIENTS = {"layerwise": layerwise_features, "functional": functional_features}

__all__ = [
    "GRADIENTS",
    "BatchFeatures",
    "OutputFunction",
    "ParameterSelection",
    "check_gradients",
    "evaluation_mode",
    "functional_features",
    "layerwise_features",
    "select_parameters",
    "thinned",
]
