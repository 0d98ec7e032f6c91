"""Small dense linear algebra that does not fail: no exception on a singular matrix, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 10.0
"""Damping floor in units of eps * trace: below it a Gram matrix is rounding noise and Cholesky may break down."""


def damped_pinv(x: Tensor, damping: float, *, relative: bool) -> Tensor:
    """`(X^T X + lambda I)^{-1} X^T`: the damped left pseudo-inverse of a tall `X`, by Cholesky of the Gram matrix.

    It is computed for X / max|X|, so neither a huge nor a tiny X over- or underflows in the Gram matrix.

    Args:
        x: (..., m, r) with m >= r, fp32 or fp64.
        damping: lambda if `relative` is False, else lambda = damping * trace(X^T X) / r.
            Never less than 10 eps trace(X^T X), which keeps the factorisation alive for rank-deficient X.

    Returns:
        (..., r, m); zero where X is zero.
    """
    r, eps, largest = x.shape[-1], torch.finfo(x.dtype).eps, torch.finfo(x.dtype).max
    size = x.abs().amax((-2, -1), keepdim=True)
    unit = x / size.clamp_min(torch.finfo(x.dtype).tiny)
    gram = unit.mT @ unit
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    if relative:
        shift = damping / r * trace
    else:
        shift = (damping / size / size).clamp_max(largest**0.5)  # tiny X: damped to nothing, without an infinity
    shift = shift.maximum(_FLOOR * eps * trace).maximum(torch.full_like(trace, torch.finfo(x.dtype).tiny ** 0.5))
    eye = torch.eye(r, dtype=x.dtype, device=x.device)
    factor, _ = torch.linalg.cholesky_ex(gram + shift * eye)
    inverse = torch.cholesky_solve(unit.mT, factor) / size.clamp_min(torch.finfo(x.dtype).tiny)
    return torch.where(size > 0, inverse, torch.zeros_like(inverse))
