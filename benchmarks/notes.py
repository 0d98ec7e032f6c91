"""The measured numbers of docs/notes: what rounding does to a second moment, and how often singular vectors turn over.

OMP_NUM_THREADS=1 python benchmarks/notes.py         # some seconds on one core
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gossamer import linalg


def second_moment(dtype: torch.dtype, beta2: float, steps: int = 5000) -> tuple[float, float]:
    """The mean of 10,000 entries of v after `steps` unit normal gradients, and after as many of a tenth of that."""
    v, generator = torch.zeros(10_000, dtype=dtype), torch.Generator().manual_seed(1)
    means = []
    for size in (1.0, 0.1):
        for _ in range(steps):
            g = size * torch.randn(len(v), generator=generator)
            v = (beta2 * v.float() + (1 - beta2) * g * g).to(dtype)
        means.append(v.float().mean().item())
    return means[0], means[1]


def turned_over(svd: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], noise: float, matrices: int = 200) -> float:
    """The share of left singular vectors that point the other way when noise is added to the matrix."""
    turned = 0
    for seed in range(matrices):
        generator = torch.Generator().manual_seed(seed)
        u, v = (torch.linalg.qr(_normal(size, 16, generator)).Q for size in (64, 48))
        x = u * torch.arange(16, 0, -1, dtype=torch.float64) @ v.mT
        before, after = (svd(y)[0][:, :16] for y in (x, x + noise * _normal(64, 48, generator)))
        turned += int(((before * after).sum(0) < -0.5).sum())
    return turned / (16 * matrices)


def _normal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _torch(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(x, full_matrices=False)


def _torch_fp32(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, v = _torch(x.float())
    return u.double(), s.double(), v.double()


if __name__ == "__main__":
    v = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)).add(0.5).bfloat16()
    for beta2 in (0.999, 0.998, 0.997, 0.996):
        print(f"bf16, share of entries with {beta2} v == v: {(v * beta2 == v).float().mean():.1%}")
    for dtype, beta2 in ((torch.float32, 0.999), (torch.bfloat16, 0.999), (torch.bfloat16, 0.95)):
        print(f"{dtype}, beta2 = {beta2}: v = {second_moment(dtype, beta2)}")
    for noise in (1e-6, 1e-3, 1e-2, 1e-1):
        shares = (f"{turned_over(svd, noise):.1%}" for svd in (_torch, _torch_fp32, linalg.svd))
        print(f"noise {noise:g}: turned over by torch, torch in fp32, gossamer:", *shares)
