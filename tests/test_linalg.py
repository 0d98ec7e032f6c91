"""Linear algebra that the methods do not test on their way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.linalg import cholesky_qr, orthonormalize


def conditioned(m: int, r: int, condition: float) -> Tensor:
    """A random matrix with singular values from 1 to 1 / condition."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0]
    s = torch.logspace(0, -float(torch.tensor(condition).log10()), r, dtype=torch.float64)
    return ((u * s) @ v).float()


def broken(m: int, r: int) -> dict[str, Tensor]:
    """Matrices whose columns do not span r dimensions."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, r, generator=generator)
    half, row, spike = x.clone(), torch.zeros(m, r), torch.full((m, r), -1.0)
    half[:, r // 2 :] = 0
    row[5] = x[5]
    spike[0, 0] = 1e9
    rank_two = x[:, :2] @ torch.randn(2, r, generator=generator)
    graded = x * torch.logspace(0, -12, r)
    minus = -torch.finfo(torch.float32).eps * r**0.5 * torch.eye(m, r)  # what is added cancels it
    return {
        "zero": 0 * x,
        "half": half,
        "rank two": rank_two,
        "row": row,
        "spike": spike,
        "graded": graded,
        "-I": minus,
    }


def lost(q: Tensor, x: Tensor) -> float:
    """How much of x is outside of the columns of Q, relatively."""
    q, x = q.double(), x.double()
    return float((x - q @ (q.mT @ x)).norm() / x.norm().clamp_min(1e-300))


def deviation(q: Tensor) -> float:
    return float((q.double().mT @ q.double() - torch.eye(q.shape[1], dtype=torch.float64)).norm())


@pytest.mark.parametrize("condition", [1e0, 1e3, 1e5, 1e7, 1e9])
@pytest.mark.parametrize(("m", "r"), [(1, 1), (16, 16), (512, 4), (768, 32), (1024, 128)])
def test_cholesky_qr_is_as_good_as_householder(m: int, r: int, condition: float) -> None:
    """Q^T Q = I and Q Q^T X = X to fp32 rounding, which adds up over r columns: 4e-7 sqrt(r).

    Measured: 1.6e-7 and 1.3e-7 sqrt(r) at most; Householder reflections have 3.4e-7 and 1.9e-7.
    """
    x = conditioned(m, r, condition)
    q = cholesky_qr(x)
    assert deviation(q) < 4e-7 * r**0.5 and lost(q, x) < 4e-7 * r**0.5
    if condition <= 1e3:  # beyond, neither knows the last columns
        torch.testing.assert_close(q, orthonormalize(x), rtol=0, atol=1e-7 * condition + 3e-7 * r**0.5)


@pytest.mark.parametrize("kind", broken(8, 4))
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e28])
@pytest.mark.parametrize(("m", "r"), [(64, 8), (768, 32)])
def test_cholesky_qr_completes_what_does_not_span(m: int, r: int, scale: float, kind: str) -> None:
    x = broken(m, r)[kind] * scale
    q = cholesky_qr(x)
    assert deviation(q) < 4e-7 * r**0.5 and lost(q, x) < 4e-7 * r**0.5


def test_cholesky_qr_of_a_stack() -> None:
    """Each of its own, and one that is not finite spoils no other."""
    stack = torch.stack([conditioned(40, 6, 10.0 ** (i + 1)) for i in range(3)])
    stack[1, 3, 2] = torch.inf
    q = cholesky_qr(stack)
    assert q[1].isnan().all()
    for i in (0, 2):
        torch.testing.assert_close(q[i], cholesky_qr(stack[i]), rtol=0, atol=1e-5)
