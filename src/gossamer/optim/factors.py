"""Moments as products of two thin factors, B (m, r) and A (r, n): the arithmetic that several methods share.

`rows` are those of B and of the target; every process has the same A.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.linalg import damped_gram, damped_size, orthonormalize
from gossamer.optim.contract import State
from gossamer.optim.stores import arithmetic_dtype
from gossamer.rows import HERE, Rows


def product(state: State, name: str) -> Tensor:
    """The moment that the factors stand for, (m, n)."""
    return state[f"{name}_B"] @ state[f"{name}_A"]


def ema(state: State, name: str, target: Tensor, decay: float) -> Tensor:
    """`decay B A + (1 - decay) target`, a new tensor (m, n); the state stays as it is."""
    return torch.addmm(target, state[f"{name}_B"], state[f"{name}_A"], beta=1 - decay, alpha=decay)


def frame(state: State, name: str, generator: torch.Generator) -> Tensor:
    """Orthonormal rows W (r, n) that span the rows of A; a random frame while A is zero."""
    a = state[f"{name}_A"]
    gaussian = torch.randn(a.shape, dtype=a.dtype, device=a.device, generator=generator)
    return orthonormalize(torch.where((a != 0).any(), a, gaussian).mT).mT


def frames(state: State, names: Sequence[str], generator: torch.Generator) -> list[Tensor]:
    """`frame` of each of the named moments, on a CPU, where nothing is drawn that is not used."""
    rows = [state[f"{name}_A"] for name in names]
    if not all(map(largest, rows)):
        fresh = [torch.randn(a.shape, dtype=a.dtype, device=a.device, generator=generator) for a in rows]
        rows = [a if largest(a) else gaussian for a, gaussian in zip(rows, fresh, strict=True)]
    return [orthonormalize(a.mT).mT for a in rows]


def follow(b: Tensor, a: Tensor, w: Tensor, target: Tensor, decay: float, rows: Rows = HERE) -> tuple[Tensor, Tensor]:
    """One warm-started subspace iteration on `decay B A + (1 - decay) target`, which is never formed.

    Y = decay B (A W^T) + (1 - decay) target W^T,  B' = orth(Y),  A' = decay (B'^T B) A + (1 - decay) B'^T target. So
    B'A' is the projection of the average on the columns of B': the average itself if the rank suffices, and never
    larger than it. Two thin products with the target, no inverse.

    Args:
        b, a: factors (m, r) and (r, n). w: `frame`, (r, n). target: (m, n).
    """
    new_b = followed_b(b, a, w, target @ w.mT, decay, rows)
    return new_b, followed_a(new_b, b, a, rows.sum(new_b.mT @ target), decay, rows)


def followed_b(b: Tensor, a: Tensor, w: Tensor, inside: Tensor, decay: float, rows: Rows = HERE) -> Tensor:
    """B' of `follow`, from `inside`, target W^T."""
    return orthonormalize(torch.addmm(inside, b, a @ w.mT, beta=1 - decay, alpha=decay), rows)


def followed_a(new_b: Tensor, b: Tensor, a: Tensor, below: Tensor, decay: float, rows: Rows = HERE) -> Tensor:
    """A' of `follow`, from `below`, B'^T target."""
    return torch.addmm(below, rows.sum(new_b.mT @ b), a, beta=1 - decay, alpha=decay)


class Damped(NamedTuple):
    """`(X^T X + lambda I)^{-1}`: what `linalg.damped_pinv` multiplies by X^T, kept as `inverse / size^2`."""

    inverse: Tensor
    """(r, r)."""
    size: Tensor
    """()."""

    def solve(self, y: Tensor) -> Tensor:
        """`y (X^T X + lambda I)^{-1}`, (k, r), of a y that is a product with X; zero where X is."""
        return (y / self.size @ self.inverse).div_(self.size)

    def solve_left(self, y: Tensor) -> Tensor:
        """`(X^T X + lambda I)^{-1} y`, (r, k)."""
        return (self.inverse @ (y / self.size)).div_(self.size)


def damped(xs: Sequence[Tensor], damping: float, *, relative: bool) -> list[Damped]:
    """`Damped` of tall matrices of one width, factorised in one call."""
    grams, sizes = [], []
    for x in xs:
        size = damped_size(torch.maximum(*_ends(x)), damping, relative=relative)
        unit = x / size
        grams.append(unit.mT @ unit)
        sizes.append(size)
    size = torch.stack(sizes)[:, None, None]
    factors, _ = torch.linalg.cholesky_ex(damped_gram(torch.stack(grams), size, damping, relative=relative))
    return [Damped(*pair) for pair in zip(torch.cholesky_inverse(factors), sizes, strict=True)]


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    low, high = (x if x.is_contiguous() else x.mT).aminmax()  # of a transposed view it is five times as slow
    return -low, high


def largest(x: Tensor) -> float:
    """The largest magnitude in a tensor on a CPU, read on the host; NaN if there is a NaN."""
    return max(map(float, _ends(x)))


def reach(b: Tensor, a: Tensor) -> float:
    """No entry of B A is larger, on a CPU."""
    return b.shape[1] * largest(b) * largest(a)


def outside(b: Tensor, w: Tensor, target: Tensor, rows: Rows = HERE) -> Tensor:
    """`(I - B B^T) target (I - W^T W)`: the part of the target outside both spaces, (m, n)."""
    rest = target - b @ rows.sum(b.mT @ target)
    return rest - (rest @ w.mT) @ w


def keep_(state: State, rows: Rows = HERE, **factors: tuple[Tensor, Tensor]) -> None:
    """Store new factors of the named moments, all or none: none if any product could be non-finite.

    A first moment that saw a gradient which the second did not would later be divided by too little.
    """
    bounds = [rows.largest(b) * a.abs().amax() * b.shape[1] for b, a in factors.values()]
    sound = torch.stack(bounds).isfinite().all()
    for name, (b, a) in factors.items():
        for key, factor in ((f"{name}_B", b), (f"{name}_A", a)):
            state[key].copy_(torch.where(sound, factor, state[key]))


def put_(state: State, **factors: tuple[Tensor, Tensor]) -> None:
    """`keep_` on a CPU, where the answer may be read on the host."""
    if all(isfinite(reach(b, a)) for b, a in factors.values()):
        for name, (b, a) in factors.items():
            state[f"{name}_B"].copy_(b)
            state[f"{name}_A"].copy_(a)


def nonnegative(x: Tensor, rows: Rows = HERE) -> Tensor:
    """Replace the negative entries of a reconstructed second moment by the mean of their magnitudes.

    MLorc's Algorithm 1. Without a floor an entry near zero would divide by nothing; no host synchronisation.
    """
    below = x < 0
    floor = -rows.sum(x.clamp_max(0).sum()) / rows.sum(below.sum()).clamp_min(1)
    return torch.where(below, floor, x)


def means(param: Tensor, name: str) -> State:
    """`{name}_rows` (m,) and `{name}_columns` (n,), both zero: Adafactor's second moment."""
    like = {"dtype": arithmetic_dtype(param), "device": param.device}
    m, n = param.shape
    return {f"{name}_rows": torch.zeros(m, **like), f"{name}_columns": torch.zeros(n, **like)}


def follow_means_(state: State, name: str, target: Tensor, decay: float, rows: Rows = HERE) -> None:
    """Advance the averages of the target's row and column means (Shazeer and Stern 2018, Algorithm 4)."""
    state[f"{name}_rows"].lerp_(target.mean(1), 1 - decay)
    state[f"{name}_columns"].lerp_(rows.sum(target.sum(0)).div_(rows.shape(target)[0]), 1 - decay)


def from_means(state: State, name: str, rows: Rows = HERE) -> Tensor:
    """The non-negative rank-one matrix with these row and column means, (m, n); zero if they are."""
    of_rows, of_columns = state[f"{name}_rows"], state[f"{name}_columns"]
    mean = rows.sum(of_rows.sum()) / rows.shape(of_rows)[0]
    # divided before it is multiplied: the product of two tiny means would underflow
    return torch.outer(of_rows / mean.clamp_min(torch.finfo(mean.dtype).tiny), of_columns)
