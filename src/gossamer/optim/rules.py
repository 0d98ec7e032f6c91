"""What is made of the moments: the last line of an algorithm box."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.linalg import newton_schulz
from gossamer.rows import HERE, Parts, Rows, entries

ADJUSTMENTS = ("original", "match_rms_adamw")
"""How `orthogonalize` accounts for the shape of a matrix: torch.optim.Muon's two words."""


def adam(m: Tensor, v: Tensor, eps: float) -> Tensor:
    """`m / (sqrt(v) + eps)` for bias-corrected moments (Kingma and Ba 2015, Algorithm 1). Overwrites both: it is in m.

    Args:
        m, v: first and second moment, any shape, v >= 0.
        eps: added to the root, as in `torch.optim.Adam`.
    """
    return m.div_(v.sqrt_().add_(eps))


def sign_(x: Tensor) -> Tensor:
    """The signs, in place; of zero it is zero. NaN is passed on, where `torch.sign` gives zero.

    Args:
        x: fp32 or fp64.
    """
    largest = torch.finfo(x.dtype).max
    return x.mul_(largest).mul_(largest).clamp_(-1, 1)  # once would not do for the smallest numbers


def orthogonalize(m: Tensor, adjust_lr_fn: str, rows: Rows = HERE) -> Parts:
    """Roughly U V^T of `m = U S V^T`, times a factor that depends on the shape alone (Jordan 2024; Liu et al. 2025).

    Rows travel in bf16, which is what `newton_schulz` reads and gives, except for fp64.

    Args:
        m: (rows, columns), fp32 or fp64.
        adjust_lr_fn: "original", sqrt(max(1, rows / columns)), which gives every shape the same spectral norm from unit
            inputs to unit outputs; or "match_rms_adamw", 0.2 sqrt(max(rows, columns)), a root mean square of 0.2.
        rows: of m.

    Returns:
        m's shape and dtype; finite where m is.
    """
    height, columns = rows.shape(m)
    factor = max(1.0, height / columns) ** 0.5 if adjust_lr_fn == "original" else 0.2 * max(height, columns) ** 0.5
    found = yield newton_schulz, m if m.dtype is torch.float64 else m.to(torch.bfloat16)
    return found.to(m.dtype).mul_(factor)


# --- guards against overflow: far above any gradient of a run that is alive; NaN is passed on ---


def cut_gradient(g: Tensor, rows: Rows = HERE) -> Tensor:
    """`g` with its entries cut at `gradient_bound`. rows: of g."""
    bound = gradient_bound(g.dtype, entries(g, rows))
    return g.clamp(-bound, bound)


def gradient_bound(dtype: torch.dtype, entries: int) -> float:
    """Where the sum of all squares could overflow: 9e18 / sqrt(number of entries) in fp32."""
    return (torch.finfo(dtype).max / max(entries, 1)) ** 0.5 / 2


def cut_projected(g: Tensor) -> Tensor:
    """`g` with its entries cut at `projected_bound`."""
    bound = projected_bound(g.dtype)
    return g.clamp(-bound, bound)


def projected_bound(dtype: torch.dtype) -> float:
    """The fourth root of the largest number, 4e9 in fp32.

    Squares of sums over a side and their sums over the matrix then stay finite, and so does every weight.
    """
    return torch.finfo(dtype).max ** 0.25


def cut_direction_(direction: Tensor) -> Tensor:
    """Cut in place at the root of the largest number, so that no weight becomes infinite."""
    bound = torch.finfo(direction.dtype).max ** 0.5
    return direction.clamp_(-bound, bound)
