"""Coordinates on a few directions of a matrix's smaller side: what GaLore, GoLore, Fira, APOLLO and LDAdam share.

    basis = subspace.refreshed(state["basis"], grad, ctx, "svd")      # s x r, orthonormal columns
    view = Subspace.of(basis, grad, ctx.rows)
    low = view.down(grad)                                             # l x r
    direction = view.up(low)                                          # the shape of grad

A matrix is m x n, s = min(m, n), l = max(m, n). It is tall where m >= n, so a square one is. A wide one is worked on as
its transpose: in the subspace every tensor is l x r, one row for each channel of the larger side, and only this file
knows which side that was. Where processes hold rows of the matrix, they hold their channels of a tall one, and of a
wide one their rows of the basis and every channel.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gossamer import linalg
from gossamer.errors import UserError
from gossamer.optim import rules, stores
from gossamer.optim.contract import Context, State
from gossamer.optim.stores import arithmetic_dtype
from gossamer.optim.sweep import Sweep
from gossamer.rows import HERE, Rows

Refresh = Literal["svd", "warm", "random"]
REFRESHES = ("svd", "warm")
"""The kinds of refresh that look at the gradient."""

START_ITERATIONS = 3
"""Subspace iterations from a Gaussian start, where "warm" has no old basis yet."""

TINY_NORM = 1e-8
"""Added to norms that divide: the authors' constant in Fira and in APOLLO, for the gain and for the limiter."""


def tall(matrix: Tensor, rows: Rows = HERE) -> bool:
    """Whether the columns are the smaller side (m >= n)."""
    m, n = rows.shape(matrix)
    return m >= n


def low_shape(param: Tensor, rank: int) -> tuple[int, int]:
    """(l, r): the shape of what lives in the subspace; r = min(rank, m, n)."""
    return max(param.shape), min(rank, *param.shape)


def fresh(param: Tensor, rank: int, bits: int = 32) -> State:
    """`basis` (s, r) and the moments `m` and `v` (l, r), all zero: the first step draws the basis."""
    size, like = min(param.shape), {"dtype": arithmetic_dtype(param), "device": param.device}
    return {"basis": torch.zeros(size, min(rank, size), **like)} | moments(param, rank, bits)


def moments(param: Tensor, rank: int, bits: int = 32) -> State:
    """`m` and `v` (l, r), zero; with 8 bits as `stores.moments` keeps them."""
    return stores.moments(param, "m", "v", bits=bits, shape=low_shape(param, rank))


def fresh_norm(param: Tensor) -> State:
    """`norm`: what the growth limiter remembers, one number; zero before the first step."""
    return {"norm": torch.zeros((), dtype=arithmetic_dtype(param), device=param.device)}


def add_squares_(sums: Tensor, rows: slice, squares: Tensor, is_tall: bool) -> None:
    """Add the squares of some rows to those of each channel, (l, 1)."""
    if is_tall:
        sums[rows] = squares.sum(1, keepdim=True)
    else:
        sums += squares.sum(0)[:, None]


class Subspace(NamedTuple):
    """The span of r directions of the smaller side of an m x n matrix."""

    basis: Tensor
    """s x r."""
    tall: bool
    side: Rows = HERE
    """Of the basis: those of a wide matrix."""
    channels: Rows = HERE
    """Of what is l x r: those of a tall matrix."""

    @classmethod
    def of(cls, basis: Tensor, matrix: Tensor, rows: Rows) -> Subspace:
        """The span of `basis`, of the smaller side of `matrix`."""
        return cls(basis, True, channels=rows) if tall(matrix, rows) else cls(basis, False, side=rows)

    def down(self, matrix: Tensor) -> Tensor:
        """Coordinates of `matrix`, l x r: G P for a tall matrix, G^T P for a wide one (the paper's (P^T G)^T)."""
        return self.side.sum((matrix if self.tall else matrix.mT) @ self.basis)

    def up(self, low: Tensor) -> Tensor:
        """The matrix whose coordinates are `low` (l x r), in the shape of the weight."""
        left, right = self.up_factors(low)
        return left @ right

    def down_sweep(self, sweep: Sweep) -> Tensor:
        """`down` of a gradient cut by `rules.cut_projected`."""
        bound = rules.projected_bound(sweep.dtype)
        return sweep.right(self.basis, bound) if self.tall else sweep.left(self.basis, bound).mT.contiguous()

    def up_factors(self, low: Tensor) -> tuple[Tensor, Tensor]:
        """The two factors of `up`."""
        return (low, self.basis.mT) if self.tall else (self.basis, low.mT)

    def along(self, gain: Tensor) -> Tensor:
        """One number for each channel (l x 1, or 1 x 1) in a shape that broadcasts over the weight."""
        return gain if self.tall else gain.mT

    def channel_norms(self, matrix: Tensor) -> Tensor:
        """Norm of each channel of a matrix of the weight's shape, l x 1."""
        return self.side.hypot(torch.linalg.vector_norm(matrix if self.tall else matrix.mT, dim=1, keepdim=True))


# --- the basis ---


def check_gap(method: str, update_proj_gap: int) -> None:
    if update_proj_gap < 1:
        raise UserError(f"{method}: update_proj_gap is {update_proj_gap}; allowed: an integer >= 1")


def generation(step: int, gap: int, key: int = 0) -> int:
    """The number of the basis in force at a step, from 0. It goes up every `gap` steps.

    Args:
        step: counts from 1.
        key: shifts the schedule by `key % gap` steps. With the parameter's own key, parameters take turns; with 0 all
            refresh in the same steps.
    """
    return (step - 1 + key % gap) // gap


def due(step: int, gap: int, key: int = 0) -> bool:
    """Whether the basis is refreshed at this step: always at the first, and then every `gap` steps."""
    return step == 1 or generation(step, gap, key) != generation(step - 1, gap, key)


def refreshed(old: Tensor, grad: Tensor, ctx: Context, kind: Refresh) -> Tensor:
    """A new basis, s x r with orthonormal columns. `old` is only read.

    A gradient of zero says nothing: it gives `old`, or at the first step a random basis.

    "svd": the leading singular vectors of `grad` on its smaller side. "warm": one subspace iteration from `old`, which
    needs no SVD; at the first step three, from a Gaussian start. "random": uniform over all r-dimensional subspaces, by
    QR of an s x r Gaussian.
    """
    view = Subspace.of(old, grad, ctx.rows)
    start, shape = old, view.side.shape(old)
    if ctx.step == 1 or kind == "random":
        gaussian = torch.randn(shape, dtype=old.dtype, device=old.device, generator=ctx.generator)
        start = view.side.mine(linalg.orthonormalize(gaussian))
    if kind == "random":
        return start
    if kind == "svd":

        def leading(matrix: Tensor) -> Tensor:
            return linalg.svd(matrix if view.tall else matrix.mT)[2][: shape[1]].mT

        found = view.side.mine(ctx.rows.whole(leading, grad, shape))
        return torch.where(ctx.rows.any(grad != 0), found, start)
    for _ in range(START_ITERATIONS if ctx.step == 1 else 1):
        start = iterated(start, grad, ctx.rows)
    return start


def iterated(basis: Tensor, matrix: Tensor, rows: Rows) -> Tensor:
    """One block power iteration towards the leading singular vectors of `matrix` on its smaller side.

    Q of X^T X basis, with an orthonormalisation between the two products: the same Q in exact arithmetic, but the
    trailing directions do not drown in the rounding of the squared leading ones. A zero matrix leaves the basis.
    """
    view = Subspace.of(basis, matrix, rows)
    low = linalg.orthonormalize(view.down(matrix), view.channels)
    found = linalg.orthonormalize(view.channels.sum((matrix.mT if view.tall else matrix) @ low), view.side)
    return torch.where(rows.any(matrix != 0), found, basis)


# --- norms ---


def check_growth(method: str, growth_limit: float | None) -> None:
    if growth_limit is not None and growth_limit < 1:
        raise UserError(f"{method}: growth_limit is {growth_limit}; allowed: a number >= 1, or None")


def norm(x: Tensor) -> Tensor:
    """Euclidean norm of each row of l x k, l x 1, of numbers so large or so small that their squares are not."""
    size = x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return size * torch.linalg.vector_norm(x / size, dim=1, keepdim=True)


def whole_norm(x: Tensor, channels: Rows = HERE) -> Tensor:
    """The same of all of l x k, 1 x 1."""
    size = channels.largest(x).clamp_min(torch.finfo(x.dtype).tiny)
    return (size * channels.hypot(torch.linalg.vector_norm(x / size))).reshape(1, 1)


def channel_gain(after: Tensor, before: Tensor, *, whole: Rows | None = None) -> Tensor:
    """How much a rule lengthened each channel: |after_j| / (|before_j| + 1e-8) over the rank dimension, l x 1.

    Args:
        after, before: l x r, e.g. Adam's direction and the projected gradient.
        whole: their rows, for one ratio of the whole matrix, 1 x 1.
    """
    of_after, of_before = (norm(x) if whole is None else whole_norm(x, whole) for x in (after, before))
    gain = of_after / (of_before + TINY_NORM)
    return gain.clamp_max(torch.finfo(gain.dtype).max ** 0.5)


def limit_channels(
    norms: Tensor, state: State, betas: tuple[float, float], ctx: Context, gamma: float, channels: Rows = HERE
) -> Tensor:
    """`limit_growth` of a direction whose channels have these norms, l x 1: its size is without bias correction."""
    size = whole_norm(norms, channels) * ((1 - betas[0] ** ctx.m_step) / (1 - betas[1] ** ctx.v_step) ** 0.5)
    return limit_growth(size, state["norm"], gamma, fresh=ctx.m_step == 1 or ctx.v_step == 1)


def limit_growth(size: Tensor, previous: Tensor, gamma: float, *, fresh: bool) -> Tensor:
    """The factor that keeps a norm from growing by more than `gamma` a step: Fira's limiter. Advances `previous`.

    On the device throughout. A `previous` of zero limits nothing: it stands for "no step yet", and after a gradient of
    zero the growth would otherwise have to start from 1e-8.

    Args:
        size: the norm to limit, one number.
        previous: () the norm applied at the step before.
        gamma: 1.01 in the papers.
        fresh: whether a moment is at its first step. Sizes are compared without bias correction, which starts again
            with the moment: held to the size before, the direction would shrink to a quarter for a hundred steps.

    Returns:
        min(1, gamma (previous + 1e-8) / size), 1 x 1.
    """
    if fresh:
        previous.zero_()
    growth = torch.where(previous > 0, size / (previous + TINY_NORM), torch.ones_like(size))
    factor = gamma / growth.clamp_min(gamma)
    previous.copy_((size * factor).squeeze())
    return factor.reshape(1, 1)
