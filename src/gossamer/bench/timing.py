"""Time as a ratio against a named rival in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 2
"""Steps of each before any counts: state is made, code is loaded, memory is touched."""


@dataclass(frozen=True)
class Pairs:
    """Seconds of two steps taken back to back, pair by pair."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [mine / other for mine, other in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """The median."""
        return statistics.median(self.ratios)


def time_pairs(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    rounds: int,
    device: torch.device | str = "cpu",
) -> Pairs:
    """Take both steps in turn, the first of a pair being the second of the next one.

    On a GPU, times are those between two events on its stream, and its cache is flushed before each step.
    """
    seconds = stopwatch(torch.device(device))
    for _ in range(WARM_UP):
        ours()
        theirs()
    mine, others = [], []
    for index in range(rounds):
        for step, times in ((ours, mine), (theirs, others))[:: -1 if index % 2 else 1]:
            times.append(seconds(step))
    return Pairs(tuple(mine), tuple(others))


def stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """A function that runs a piece of work and returns its seconds, on a GPU as `time_pairs` says."""
    return _on_gpu(device) if device.type == "cuda" else _on_cpu


def _on_cpu(step: Callable[[], object]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def _on_gpu(device: torch.device) -> Callable[[Callable[[], object]], float]:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    other_data = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def seconds(step: Callable[[], object]) -> float:
        other_data.zero_()
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        step()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) / 1e3

    return seconds
