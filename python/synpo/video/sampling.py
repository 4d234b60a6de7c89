"""Which moments of a video the model sees, and which of those its amateur sees."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from synpo.setting import setting


@dataclass(frozen=True)
class FrameSampling:
    """Which frames the model sees: `fps` frames a second of (sub)clip, never fewer than `minimum` nor more than `maximum`."""

    fps: float = setting(0.5, "frames taken a second of video")
    minimum: int = setting(8, "but never fewer than these")
    maximum: int = setting(16, "nor more than these")

    def __post_init__(self) -> None:
        if not (0 < self.fps < math.inf and 1 <= self.minimum <= self.maximum):
            raise ValueError(f"frames: expected fps > 0 and finite, 1 <= minimum <= maximum, got {self}")

    def times(self, start: float, end: float) -> list[float]:
        """Seconds at which to take frames, evenly spaced over [start, end): the middles of equal parts."""
        if not end > start:
            raise ValueError(f"frames: expected a clip that ends after it starts, got {start} to {end} s")
        count = min(max(round((end - start) * self.fps), self.minimum), self.maximum)
        step = (end - start) / count
        return [start + (i + 0.5) * step for i in range(count)]


def amateur_frames(frames: Tensor) -> Tensor:
    """The amateur's view for contrastive decoding: ⌈n/3⌉ evenly spaced frames of (n, 3, H, W)."""
    count = -(-len(frames) // 3)
    index = ((torch.arange(count) + 0.5) * len(frames) / count).long()
    return frames[index]
