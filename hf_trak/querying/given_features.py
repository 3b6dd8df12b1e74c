"""Features of queries that were made elsewhere, by `Dataset.map` with an index's featurizer: checked, and brought into one form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor


def read_query_features(features: Any, *, n_members: int, proj_dim: int) -> list[Float32[Tensor, "n_query proj_dim"]]:
    """Return the features of every member, as float32 tensors.

    Args:
        features: An array or tensor of shape (n_query, proj_dim), or a Dataset with the column `trak_features` (and `trak_scale`, where it is
            stored in float16); or, for several members, a list with one of these for each.

    Raises:
        ValueError: If there is not one per member, they do not have `proj_dim` numbers each, or a number is not finite.
    """
    given = list(features) if isinstance(features, (list, tuple)) else [features]
    if len(given) != n_members:
        raise ValueError(
            f"This index has {n_members} members, but features of {len(given)} were given. Give a list with those of each member, made "
            "by `index.featurizer(member)`."
        )
    found = [_read(one) for one in given]
    for number, rows in enumerate(found):
        if rows.ndim != 2 or rows.shape[1] != proj_dim or len(rows) != len(found[0]):
            raise ValueError(
                f"Query features of member {number} must have the shape ({len(found[0])}, {proj_dim}), but have {tuple(rows.shape)}."
            )
        if not bool(rows.isfinite().all()):
            bad = (~rows.isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(
                f"Query features of member {number} hold NaN or infinity in rows {', '.join(map(str, bad[:10]))}"
                f"{' and others' if len(bad) > 10 else ''}, {len(bad)} in all. Leave these queries out, or featurize them again."
            )
    return found


def mean_output(features: Any) -> np.ndarray | None:
    """Return the mean over members of the queries' outputs, where all of them record it."""
    given: Sequence[Any] = features if isinstance(features, (list, tuple)) else [features]
    if not all("trak_output" in getattr(one, "column_names", ()) for one in given):
        return None
    return np.mean([np.asarray(one.with_format("numpy")["trak_output"][:], dtype=np.float32) for one in given], axis=0)


def _read(features: Any) -> Tensor:
    if isinstance(features, Tensor):
        return features.detach().cpu().float()
    names = getattr(features, "column_names", None)
    if names is None:
        return torch.from_numpy(np.array(features, dtype=np.float32))
    if "trak_features" not in names:
        raise ValueError(
            f"These queries have no column trak_features; they have {', '.join(names)}. Make it with "
            "`queries.map(index.featurizer(), batched=True)`, or ask `index.attribute(queries)`."
        )
    rows = features.with_format("numpy", dtype=np.float32)
    values = torch.from_numpy(np.array(rows["trak_features"][:], dtype=np.float32))
    return values * torch.from_numpy(np.array(rows["trak_scale"][:])).unsqueeze(1) if "trak_scale" in names else values
