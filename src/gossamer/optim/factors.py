"""Moments as products of two thin factors, B (m, r) and A (r, n): the arithmetic that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.linalg import orthonormalize
from gossamer.optim.contract import State
from gossamer.optim.stores import arithmetic_dtype


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


def follow(b: Tensor, a: Tensor, w: Tensor, target: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """One warm-started subspace iteration on `decay B A + (1 - decay) target`, which is never formed.

    Y = decay B (A W^T) + (1 - decay) target W^T,  B' = orth(Y),  A' = decay (B'^T B) A + (1 - decay) B'^T target. So
    B'A' is the projection of the average on the columns of B': the average itself if the rank suffices, and never
    larger than it. Two thin products with the target, no inverse.

    Args:
        b, a: factors (m, r) and (r, n). w: `frame`, (r, n). target: (m, n).
    """
    y = torch.addmm(target @ w.mT, b, a @ w.mT, beta=1 - decay, alpha=decay)
    new_b = orthonormalize(y)
    return new_b, torch.addmm(new_b.mT @ target, new_b.mT @ b, a, beta=1 - decay, alpha=decay)


class Follow:
    """`follow` of a target that comes some rows at a time, and comes twice."""

    def __init__(self, b: Tensor, a: Tensor, w: Tensor, decay: float) -> None:
        self.b, self.a, self.w, self.decay = b, a, w, decay
        self.inside = torch.empty_like(b)
        """`target W^T`, once all rows were seen."""

    def see(self, rows: slice, target: Tensor) -> None:
        torch.mm(target, self.w.mT, out=self.inside[rows])

    def turn(self) -> None:
        """All rows were seen once; they come again."""
        y = torch.addmm(self.inside, self.b, self.a @ self.w.mT, beta=1 - self.decay, alpha=self.decay)
        self.new_b = orthonormalize(y)
        self.new_a = (self.new_b.mT @ self.b @ self.a).mul_(self.decay)

    def see_again(self, rows: slice, target: Tensor) -> None:
        self.new_a.addmm_(self.new_b[rows].mT, target, alpha=1 - self.decay)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.new_b, self.new_a


def outside(b: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """`(I - B B^T) target (I - W^T W)`: the part of the target outside both spaces, (m, n)."""
    rest = target - b @ (b.mT @ target)
    return rest - (rest @ w.mT) @ w


def keep_(state: State, **factors: tuple[Tensor, Tensor]) -> None:
    """Store new factors of the named moments, all or none: none if any product could be non-finite.

    A first moment that saw a gradient which the second did not would later be divided by too little.
    """
    bounds = [b.abs().amax() * a.abs().amax() * b.shape[1] for b, a in factors.values()]
    sound = torch.stack(bounds).isfinite().all()
    for name, (b, a) in factors.items():
        for key, factor in ((f"{name}_B", b), (f"{name}_A", a)):
            state[key].copy_(torch.where(sound, factor, state[key]))


def nonnegative(x: Tensor) -> Tensor:
    """Replace the negative entries of a reconstructed second moment by the mean of their magnitudes.

    MLorc's Algorithm 1. Without a floor an entry near zero would divide by nothing; no host synchronisation.
    """
    floor = Floor(x)
    below = floor.see(x)
    return torch.where(below, floor.mean(), x)


class Floor:
    """The mean magnitude of the negative entries of a moment, which may come some rows at a time."""

    def __init__(self, like: Tensor) -> None:
        self.total = like.new_zeros(())
        self.count = like.new_zeros((), dtype=torch.int64)

    def see(self, x: Tensor) -> Tensor:
        """Returns where x is negative."""
        below = x < 0
        self.total -= x.clamp_max(0).sum()
        self.count += below.sum()
        return below

    def mean(self) -> Tensor:
        return self.total / self.count.clamp_min(1)


def means(param: Tensor, name: str) -> State:
    """`{name}_rows` (m,) and `{name}_columns` (n,), both zero: Adafactor's second moment."""
    like = {"dtype": arithmetic_dtype(param), "device": param.device}
    m, n = param.shape
    return {f"{name}_rows": torch.zeros(m, **like), f"{name}_columns": torch.zeros(n, **like)}


def follow_means_(state: State, name: str, target: Tensor, decay: float) -> None:
    """Advance the averages of the target's row and column means (Shazeer and Stern 2018, Algorithm 4)."""
    state[f"{name}_rows"].lerp_(target.mean(1), 1 - decay)
    state[f"{name}_columns"].lerp_(target.mean(0), 1 - decay)


def from_means(state: State, name: str) -> Tensor:
    """The non-negative rank-one matrix with these row and column means, (m, n); zero if they are."""
    rows, columns = state[f"{name}_rows"], state[f"{name}_columns"]
    # divided before it is multiplied: the product of two tiny means would underflow
    return torch.outer(rows / rows.mean().clamp_min(torch.finfo(rows.dtype).tiny), columns)
