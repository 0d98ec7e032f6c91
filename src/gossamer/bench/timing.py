"""Time as a ratio against a named rival in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from gossamer.optim import Optimizer, param_groups
from gossamer.optim.contract import Method


def step_time_ratio(make_model: Callable[[], nn.Module], method: Method, *, rounds: int) -> float:
    """Median over `rounds` of (our optimizer step) / (`torch.optim.AdamW`'s default step), taken in turn.

    Both train a copy of the same model with the same random gradients; the first two pairs warm up and do not count.
    """
    ours, theirs = make_model(), make_model()
    rival = torch.optim.AdamW(theirs.parameters())
    mine = Optimizer(param_groups(ours, method))
    generator = torch.Generator().manual_seed(0)
    trained = ([p for p in model.parameters() if p.requires_grad] for model in (ours, theirs))
    for p, q in zip(*trained, strict=True):
        p.grad = torch.randn(p.shape, generator=generator).mul_(1e-3)
        q.grad = p.grad.clone()
    ratios = [_seconds(mine.step) / _seconds(rival.step) for _ in range(rounds + 2)]
    return statistics.median(ratios[2:])


def _seconds(step: Callable[[], object]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun
