"""The learning rate over time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a fall from 1 down to `floor`, as a multiple of the peak learning rate.

    Unlike the published recipe, neither the first update (lr 0) nor one past the end is wasted: update 0 takes
    1 / warmup, the last update takes `floor` exactly, unless a restart is not yet recovered from.
    """

    steps: int
    warmup: int
    floor: float
    every: int = 0
    """Updates between restarts; 0: none."""
    recovery: int = 1
    """Updates in which the rate rises again after a restart, linearly, and is back on the curve with the last of them
    (arXiv 2505.22922, whose code also spends the update before the restart at a thousandth of the rate)."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How it falls."""

    def __call__(self, step: int) -> float:
        """The multiplier of update `step`, counted from 0."""
        since = step % self.every if self.every and step >= self.every else self.recovery
        if since < self.recovery:
            return self.curve(step - since + self.recovery - 1) * (since + 1) / self.recovery
        return self.curve(step)

    def curve(self, step: int) -> float:
        """The multiplier without restarts."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = min(1.0, (step + 1 - self.warmup) / max(1, self.steps - self.warmup))
        left = 1 - progress if self.decay == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.floor + (1 - self.floor) * left
