"""hf_trak: which training examples made my Hugging Face model do this?

Names are imported when first used, so that `import hf_trak` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_CONTENTS = {
    "AttributionArguments": "hf_trak.training_args",
    "AttributionCallback": "hf_trak.training.callback",
    "AttributionIndex": "hf_trak.index",
    "AttributionMixin": "hf_trak.trainer_mixin",
    "AttributionTrainer": "hf_trak.trainer",
    "AutoTask": "hf_trak.tasks",
    "Ensemble": "hf_trak.members",
    "Explanation": "hf_trak.querying.explanations",
    "Featurizer": "hf_trak.featurizing.featurizer",
    "ScoreOptions": "hf_trak.scoring.ensemble",
    "Task": "hf_trak.tasks",
    "TrakConfig": "hf_trak.config",
    "attribution": "hf_trak.trainer",
}

if TYPE_CHECKING:
    from hf_trak.config import TrakConfig
    from hf_trak.featurizing.featurizer import Featurizer
    from hf_trak.index import AttributionIndex
    from hf_trak.members import Ensemble
    from hf_trak.querying.explanations import Explanation
    from hf_trak.scoring.ensemble import ScoreOptions
    from hf_trak.tasks import AutoTask, Task
    from hf_trak.trainer import AttributionTrainer, attribution
    from hf_trak.trainer_mixin import AttributionMixin
    from hf_trak.training.callback import AttributionCallback
    from hf_trak.training_args import AttributionArguments

__all__ = [
    "AttributionArguments",
    "AttributionCallback",
    "AttributionIndex",
    "AttributionMixin",
    "AttributionTrainer",
    "AutoTask",
    "Ensemble",
    "Explanation",
    "Featurizer",
    "ScoreOptions",
    "Task",
    "TrakConfig",
    "attribution",
]


def __getattr__(name: str) -> Any:
    if name in _CONTENTS:
        return getattr(importlib.import_module(_CONTENTS[name]), name)
    raise AttributeError(f"module 'hf_trak' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_CONTENTS])
