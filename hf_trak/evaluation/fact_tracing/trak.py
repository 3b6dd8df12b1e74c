"""TRAK for fact tracing: scores of an index over all abstracts, whichever are ranked.

The kernel $\\Phi^\\top\\Phi$ is of the whole training set: made of the candidates alone, it would know only of what the query's own
neighbours have in common.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Float

from hf_trak.index import AttributionIndex


@dataclass
class Trak:
    """TRAK scores of any index over the abstracts.

    Args:
        index (`AttributionIndex`): Of all abstracts, in their order, under one or more members.
        options (`dict`): For [`AttributionIndex.score`], such as `{"damping": 0.0}`; by default λ is chosen.
    """

    index: AttributionIndex
    options: dict[str, Any] = field(default_factory=dict)

    whole_corpus = True

    def __call__(self, train: Dataset, queries: Dataset) -> Float[np.ndarray, "n_train n_query"]:
        if len(train) != self.index.n_rows:
            raise ValueError(
                f"The index is of {self.index.n_rows} abstracts, but {len(train)} are to be scored. TRAK needs them all, since its "
                "kernel is of the whole training set; rank the candidates among its scores."
            )
        return self.index.score(queries, progress=False, **self.options)
