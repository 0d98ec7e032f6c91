"""Where torch has the method, ours is torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}], ids=["plain", "decay", "maximize"])
def test_adamw_is_torch(options: dict[str, object], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [nn.Parameter(torch.randn(s, dtype=dtype, generator=generator)) for s in [(5, 3), (7,), (2, 3, 4)]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = {"weight_decay": 0.0, **options}
    mine = gossamer.Optimizer(ours, lr=0.01, **options)
    rival = torch.optim.AdamW(theirs, lr=0.01, foreach=False, **options)  # pyright: ignore
    for _ in range(50):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, dtype=dtype, generator=generator)
            q.grad = p.grad.clone()
        mine.step()
        rival.step()
    # the same operations up to the order of the bias corrections: a few units in the last place, added up over 50 steps
    limit = 50 * torch.finfo(dtype).eps * 0.01 * 10
    assert all(float((p - q).detach().abs().max()) < limit for p, q in zip(ours, theirs, strict=True))
