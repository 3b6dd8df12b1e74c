"""What a batch gave, fetched from the device, and refused where it is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_trak.gradients import BatchFeatures


def fetch(features: BatchFeatures) -> BatchFeatures:
    """Fetch all that a batch gave in one copy: each copy waits for the device."""
    numbers = torch.stack([features.output, features.out_to_loss], dim=1).to(features.features.dtype)
    packed = torch.cat([features.features, numbers], dim=1).cpu()
    return BatchFeatures(packed[:, -2], packed[:, -1], packed[:, :-2])


def not_finite(features: BatchFeatures) -> list[int]:
    """Return the rows of what was fetched that are not finite."""
    finite = features.features.isfinite().all(1) & features.output.isfinite() & features.out_to_loss.isfinite()
    return (~finite).nonzero().flatten().tolist()


def check_finite(features: BatchFeatures, ids: Sequence[int] | None = None) -> None:
    """Check what was fetched.

    Args:
        ids (`Sequence[int]`, *optional*): The rows' ids, for the message.

    Raises:
        ValueError: If a row's output or gradient is not finite; the message names the rows.
    """
    if bad := not_finite(features):
        names = [ids[row] for row in bad] if ids is not None else bad
        raise ValueError(
            f"The gradients of {len(bad)} examples are not finite: rows {', '.join(map(str, names[:10]))}"
            f"{', ...' if len(bad) > 10 else ''}. Look for NaN in their inputs or in the model's weights, or overflow in half "
            "precision. Nothing of this shard was written."
        )
