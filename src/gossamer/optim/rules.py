"""What is made of the moments: the last line of an algorithm box."""

from __future__ import annotations

from torch import Tensor


def adam(m: Tensor, v: Tensor, eps: float) -> Tensor:
    """`m / (sqrt(v) + eps)` for bias-corrected moments (Kingma and Ba 2015, Algorithm 1). Overwrites `v`.

    Args:
        m, v: first and second moment, any shape, v >= 0.
        eps: added to the root, as in `torch.optim.Adam`.
    """
    return m / v.sqrt_().add_(eps)
