"""How a moment is kept between two steps: dense, or as the product of two thin factors."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.optim.contract import State


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """fp32, or the parameter's own dtype if that is wider: a bf16 second moment cannot decay (0.999 v rounds to v)."""
    return torch.promote_types(param.dtype, torch.float32)


def dense(param: Tensor, *names: str) -> State:
    """One zero tensor of the parameter's shape for each name."""
    return {name: torch.zeros_like(param, dtype=arithmetic_dtype(param)) for name in names}


def factored(param: Tensor, rank: int, *names: str) -> State:
    """`{name}_B` (m, r) and `{name}_A` (r, n), both zero, for each name; r = min(rank, m, n)."""
    m, n = param.shape
    r, like = min(rank, m, n), {"dtype": arithmetic_dtype(param), "device": param.device}
    state = {}
    for name in names:
        state[f"{name}_B"] = torch.zeros(m, r, **like)
        state[f"{name}_A"] = torch.zeros(r, n, **like)
    return state
