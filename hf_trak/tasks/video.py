"""Rows of videos, prepared by the model's processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_trak.tasks.inputs import ImageInputs

if TYPE_CHECKING:
    from datasets import Features


@dataclass(frozen=True)
class VideoInputs(ImageInputs):
    """Rows with `pixel_values`, or `pixel_values_videos` where the model takes these: (frames, channels, height, width)."""

    def check(self, features: Features, processing_class: Any) -> None:
        if not self._has_pixels(features):
            raise ValueError(
                f"Expected {self.main!r}, prepared with the model's processor, but the dataset has {', '.join(features)}. Videos are not decoded "
                "here: which frames are read would depend on the decoder."
            )
