"""Small dense linear algebra that does not fail on singular, tiny or huge matrices.

Nothing here waits for the device, except `svd` on CUDA, where cuSOLVER's convergence is read back: it is called at
refreshes of a projector, or where oversampling was asked for, and never in an ordinary step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from gossamer.rows import HERE, Rows

_FLOOR = 10.0
"""Damping floor in units of eps * trace: below it a Gram matrix is rounding noise and Cholesky may break down."""


@contextmanager
def without_autocast() -> Iterator[None]:
    """Products in the dtypes of their factors: `torch.autocast` is for the model's."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def damped_pinv(x: Tensor, damping: float, *, relative: bool, rows: Rows = HERE) -> Tensor:
    """`(X^T X + lambda I)^{-1} X^T`: the damped left pseudo-inverse of a tall `X`, by Cholesky of the Gram matrix.

    It is computed for X / max|X|, so neither a huge nor a tiny X over- or underflows in the Gram matrix.

    Args:
        x: (..., m, r) with m >= r, fp32 or fp64.
        damping: lambda if `relative` is False, else lambda = damping * trace(X^T X) / r.
            Never less than 10 eps trace(X^T X), which keeps the factorisation alive for rank-deficient X.
        rows: of X; not for batches.

    Returns:
        (..., r, m), my columns; zero where X is zero.
    """
    size = x.abs().amax((-2, -1), keepdim=True) if rows is HERE else rows.largest(x).reshape(1, 1)
    unit_size = damped_size(size, damping, relative=relative)
    unit = x / unit_size
    factor, _ = torch.linalg.cholesky_ex(damped_gram(rows.sum(unit.mT @ unit), unit_size, damping, relative=relative))
    inverse = torch.cholesky_solve(unit.mT, factor) / unit_size
    return torch.where(size > 0, inverse, torch.zeros_like(inverse))


def damped_size(size: Tensor, damping: float, *, relative: bool) -> Tensor:
    """What to divide an X with this largest magnitude by, before its Gram matrix is formed and damped."""
    tiny = torch.finfo(size.dtype).tiny
    # an X below the root of an absolute damping is divided by that root: the damping then stays within range
    return size.clamp_min(tiny if relative else max(tiny, damping**0.5))


def damped_gram(gram: Tensor, size: Tensor, damping: float, *, relative: bool) -> Tensor:
    """`(X^T X + lambda I) / size^2`, positive definite: see `damped_pinv`.

    Args:
        gram: (..., r, r) of X / size. size: (..., 1, 1), from `damped_size`.
    """
    r, eps, tiny = gram.shape[-1], torch.finfo(gram.dtype).eps, torch.finfo(gram.dtype).tiny
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    shift = damping / r * trace if relative else damping / size / size
    shift = shift.maximum(_FLOOR * eps * trace).maximum(torch.full_like(trace, tiny**0.5))
    return gram + shift * torch.eye(r, dtype=gram.dtype, device=gram.device)


def orthonormalize(x: Tensor, rows: Rows = HERE) -> Tensor:
    """Q of the thin QR factorisation of a tall `x`, with signs such that the diagonal of R is not negative.

    Columns past the rank of x are completed with orthonormal ones; a zero matrix gives the first columns of the
    identity. x is divided by its largest entry first, so that no norm over- or underflows.

    Rows that lie in several processes are gathered, and each process does the same QR: a QR of blocks completes a basis
    in another way, and to find out where it may not would be to wait for the device.

    Args:
        x: (..., m, r) with m >= r, fp32 or fp64. Returns (..., m, r).
        rows: of x; not for batches.
    """
    q, r = torch.linalg.qr(_unit(rows.gather(x)))
    return rows.mine(q * _signs(r.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2))


def cholesky_qr(x: Tensor) -> Tensor:
    """`orthonormalize` without a Householder reflection: a few products, batched over stacks of tall matrices.

    Cholesky QR, twice, with the Gram matrix in fp64 (Yamazaki, Tomov and Dongarra 2015). It never breaks down, because
    the first columns of the identity are added to x at its rounding level. That completes the columns past its rank;
    where it has full rank the result is `orthonormalize`'s, to rounding.

    Args:
        x: (..., m, r) with m >= r, fp32. Returns (..., m, r); all NaN for a matrix that is not finite.
    """
    r, eps = x.shape[-1], torch.finfo(x.dtype).eps
    q = _unit(x)
    q = q / torch.linalg.vector_norm(q, dim=(-2, -1), keepdim=True).clamp_min(1.0)
    q.diagonal(dim1=-2, dim2=-1).add_(eps)
    eye = torch.eye(r, dtype=torch.float64, device=x.device)
    for _ in range(2):
        wide = q.double()
        gram = wide.mT @ wide
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        factor, _ = torch.linalg.cholesky_ex(gram + _FLOOR * torch.finfo(torch.float64).eps * trace * eye)
        q = torch.linalg.solve_triangular(factor.mT.to(x.dtype), q, upper=True, left=False)
    return q


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD `x = U diag(S) Vh` whose signs do not depend on the LAPACK at hand.

    The entry of each right singular vector that is largest in magnitude is positive. Entries of x that are not finite
    count as zero: an exception would leave the optimizer in the middle of a step. On CUDA it waits for the device.

    Args:
        x: (..., m, n), fp32 or fp64. Returns U (..., m, s), S (..., s), Vh (..., s, n) with s = min(m, n).
    """
    size = x.abs().nan_to_num(0.0, 0.0).amax((-2, -1), keepdim=True)
    u, s, vh = torch.linalg.svd(_unit(x.nan_to_num(0.0, 0.0, 0.0)), full_matrices=False)
    signs = _signs(vh.gather(-1, vh.abs().argmax(-1, keepdim=True)).squeeze(-1))
    return u * signs.unsqueeze(-2), s * size.squeeze(-1), vh * signs.unsqueeze(-1)


def randomized_svd(
    x: Tensor,
    rank: int,
    *,
    oversampling: int,
    power_iterations: int,
    generator: torch.Generator,
    rows: Rows = HERE,
) -> tuple[Tensor, Tensor]:
    """A rank-r approximation of x as two factors, Q (m, r) with orthonormal columns and B (r, n).

    Halko, Martinsson and Tropp 2011, Algorithms 4.4 and 5.1: a Gaussian sketch of the range, `power_iterations`
    rounds through x^T and x, then B = Q^T x. The SVD of B is taken only to cut `oversampling` extra columns off:
    without them Q B already equals U S V^T.

    Args:
        x: (m, n), fp32 or fp64.
        rank: r; cut to min(m, n), as is r + oversampling.
        generator: on x's device; draws n (r + oversampling) numbers.
        rows: of x and of Q.
    """
    m, n = rows.shape(x)
    width = min(rank + oversampling, m, n)
    sketch = torch.randn(width, n, dtype=x.dtype, device=x.device, generator=generator).mT
    q = orthonormalize(x @ sketch, rows)
    for _ in range(power_iterations):
        q = orthonormalize(x @ orthonormalize(rows.sum(x.mT @ q)), rows)
    return cut_rank(q, rows.sum(q.mT @ x), rank)


def cut_rank(q: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of Q B of a rank, as such a pair again: itself if B has no more rows.

    Args:
        q: (m, k) with orthonormal columns. b: (k, n).
    """
    if len(b) <= rank:
        return q, b
    u, s, vh = svd(b)
    return q @ u[:, :rank], s[:rank, None] * vh[:rank]


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix, U V^T, by a quintic iteration on the smaller side (Jordan 2024).

    Operation for operation `torch.optim.Muon`'s, in bf16; fp64, which torch rounds to bf16 too, is computed as it is.
    A matrix of norm below `eps` stays small, and one whose norm overflows gives zero.

    Args:
        x: (m, n). Returns x's shape, in bf16 or fp64.
    """
    a, b, c = coefficients
    y = x.clone() if x.dtype is torch.float64 else x.to(torch.bfloat16, copy=True)
    tall = x.shape[0] > x.shape[1]
    y = y.mT if tall else y
    y.div_(y.norm().clamp_min(eps))
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


def _unit(x: Tensor) -> Tensor:
    return x / x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _signs(x: Tensor) -> Tensor:
    return torch.where(x < 0, -torch.ones_like(x), torch.ones_like(x))
