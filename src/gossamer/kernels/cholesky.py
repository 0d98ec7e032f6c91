"""Cholesky factors of many small matrices at once, and the inverses of the factors."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 64
"""Rows that one program holds in registers; larger matrices are left to torch."""


def cholesky_inverse_ref(a: Tensor) -> tuple[Tensor, Tensor]:
    """L with `L L^T = a`, and L^-1, lower triangular both.

    Args:
        a: (N, r, r) symmetric positive definite, fp32. Nothing waits for the device. Where a pivot is not positive, the
            kernel goes on with a tiny one, and torch returns what it has.
    """
    lower, _ = torch.linalg.cholesky_ex(a)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
    return lower, torch.linalg.solve_triangular(lower, eye, upper=False)


def cholesky_inverse(a: Tensor) -> tuple[Tensor, Tensor]:
    """`cholesky_inverse_ref`, by one program a matrix where it is small enough."""
    count, r = a.shape[0], a.shape[-1]
    if r > LARGEST:
        return cholesky_inverse_ref(a)
    a, size = a.contiguous(), 1 << (r - 1).bit_length()
    lower, inverse = torch.empty_like(a), torch.empty_like(a)
    with torch.cuda.device_of(a):
        kernel: Any = _cholesky_inverse[(count,)]
        kernel(a, lower, inverse, r, SIZE=size, num_warps=warps(size))
    return lower, inverse


def warps(size: int) -> int:
    return 1 if size <= 16 else 4 if size == 32 else 8


@triton.jit
def _cholesky_inverse(a_, lower_, inverse_, r, SIZE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * r * r
    index = tl.arange(0, SIZE)
    i, j = index[:, None], index[None, :]
    inside = (i < r) & (j < r)
    eye = tl.where(i == j, 1.0, 0.0)
    rest = tl.where(inside, tl.load(a_ + start + i * r + j, mask=inside, other=0.0), eye)
    lower, inverse = tl.zeros((SIZE, SIZE), tl.float32), eye
    for k in range(r):
        row = tl.sum(tl.where(i == k, rest, 0.0), 0)
        pivot = tl.sum(tl.where(index == k, row, 0.0), 0)
        scale = 1.0 / tl.sqrt_rn(tl.maximum(pivot, 1e-37, propagate_nan=tl.PropagateNan.ALL))
        across = tl.where(index >= k, row * scale, 0.0)  # column k of L, along the columns and along the rows
        down = tl.where(index >= k, tl.sum(tl.where(j == k, rest, 0.0), 1) * scale, 0.0)
        rest -= down[:, None] * across[None, :]
        lower = tl.where(j == k, down[:, None], lower)
        # forward substitution of the identity, one row a turn
        done = tl.sum(tl.where(i == k, inverse, 0.0), 0) * scale
        left = inverse - down[:, None] * done[None, :]
        inverse = tl.where(i == k, done[None, :], tl.where(i > k, left, inverse))
    tl.store(lower_ + start + i * r + j, lower, mask=inside)
    tl.store(inverse_ + start + i * r + j, inverse, mask=inside)
