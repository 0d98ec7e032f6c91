"""APOLLO: the raw gradient, scaled channel by channel as a small Adam on a random projection says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import UserError
from gossamer.optim import rules, stores, subspace
from gossamer.optim.contract import Context, State, check_adam, check_choice, check_rank, hash63, register
from gossamer.optim.subspace import Subspace, check_gap, check_growth, generation, tall
from gossamer.optim.sweep import Sweep
from gossamer.rows import Rows

PAPER = "Zhu et al., APOLLO, MLSys 2025, arXiv 2412.05270"


@register("apollo", paper=PAPER, by_rows=True)
@dataclass(frozen=True)
class Apollo:
    """SGD with a learning rate for each channel, read off an Adam that sees a random projection of the gradient.

        P ~ N(0, 1/r), s x r, drawn anew every update_proj_gap steps
        R = P^T G  (wide)  or  G P  (tall);    m, v, N: Adam on R
        s_j = |N_j| / |R_j|                        for each channel j of the larger side, or one s for all
        U = G diag(s)                              (wide; a tall matrix transposed)
        U <- U min(1, gamma |U|_before / |U|)      the limiter, before bias correction
        direction = sqrt(scale) U

    Paper: arXiv 2412.05270, Algorithm 1. State: `m` and `v` (l, r), and `norm`, one number, with the limiter. P is not
    kept: every step draws it again from (seed, parameter name, number of the refresh).

    Deviations:
    - `scale` enters as its square root, as in the authors' code, after the limiter; their `scale_front` puts it before,
      which differs by no more than the 1e-8 in the limiter.
    - The limiter acts before bias correction, as in the authors' code: see `Fira`. A norm of zero limits nothing.
    - eps is added to the bias-corrected root, as in torch; the authors add 1e-6 before the correction (`test_apollo`).
    - The stream of P is ours; theirs is a chain of seeds. Their projector by SVD (APOLLO-SVD) is not offered.
    - Gradient entries beyond 4e9 (fp32) are cut (`test_nothing_non_finite`).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    rank: int = 128
    """Rows of the projection, r. The authors' C4 runs: a quarter of the hidden size."""
    update_proj_gap: int = 200
    """Steps between two projections, T."""
    scale: float = 1.0
    """The direction is multiplied by its square root, alpha."""
    scaling: Literal["channel", "tensor"] = "channel"
    """One factor for each channel of the larger side, or one for the matrix."""
    growth_limit: float | None = 1.01
    """By how much the direction's norm may grow a step, gamma. None: without bound."""

    def __post_init__(self) -> None:
        check_adam("apollo", self.betas, self.eps)
        check_rank("apollo", self.rank)
        check_gap("apollo", self.update_proj_gap)
        check_growth("apollo", self.growth_limit)
        check_choice("apollo", scaling=(self.scaling, ("channel", "tensor")))
        if self.scale < 0:
            raise UserError(f"apollo: scale is {self.scale}; allowed: a number >= 0")

    def init(self, param: Tensor) -> State:
        state = subspace.moments(param, self.rank)
        return state if self.growth_limit is None else state | subspace.fresh_norm(param)

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        grad = rules.cut_projected(grad)
        projection, is_tall = self.projection(grad, ctx), tall(grad, ctx.rows)
        view = Subspace.of(projection if is_tall else ctx.rows.mine(projection), grad, ctx.rows)
        gain = self._gain(view.down(grad), view.channel_norms(grad), state, ctx, view.channels)
        return grad.mul_(view.along(gain))

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        for sweep in sweeps:
            self._descend(sweep)  # a call, so that one matrix's temporaries are gone when the next one's are made

    def _descend(self, sweep: Sweep) -> None:
        like = sweep.grad.new_empty((), dtype=sweep.dtype).expand(sweep.shape)
        bound, sums = rules.projected_bound(sweep.dtype), like.new_zeros(max(sweep.shape), 1)
        if self.growth_limit is not None:
            for rows, grad in sweep.gradients(bound):
                subspace.add_squares_(sums, rows, grad.square(), tall(like))
        low = Subspace(self.projection(like, sweep.context), tall(like)).down_sweep(sweep)
        gain = self._gain(low, sums.sqrt_(), sweep.state, sweep.context, sweep.context.rows)
        sweep.descend_sum(None, gain if tall(like) else gain.mT, bound)

    def _gain(self, low: Tensor, norms: Tensor, state: State, ctx: Context, channels: Rows) -> Tensor:
        """What each channel of the gradient is multiplied by, l x 1 or 1 x 1. Advances the moments and the limiter.

        Args:
            low: the projected gradient, l x r. norms: of the gradient's channels, l x 1. channels: the rows of both.
        """
        psi = rules.adam(*stores.adam_moments_(state, low, self.betas, ctx), self.eps)
        gain = subspace.channel_gain(psi, low, whole=channels if self.scaling == "tensor" else None)
        if self.growth_limit is not None:
            gain = gain * subspace.limit_channels(gain * norms, state, self.betas, ctx, self.growth_limit, channels)
        return gain * self.scale**0.5

    def projection(self, grad: Tensor, ctx: Context) -> Tensor:
        """P, s x r: the same between two refreshes, without being kept."""
        seed = hash63(ctx.key, generation(ctx.step, self.update_proj_gap))
        shape = ctx.rows.shape(grad)
        size, rank = min(shape), min(self.rank, *shape)
        generator = torch.Generator(grad.device).manual_seed(seed)
        return torch.randn(size, rank, dtype=grad.dtype, device=grad.device, generator=generator).div_(rank**0.5)


@register("apollo-mini", paper=PAPER, by_rows=True)
@dataclass(frozen=True)
class ApolloMini(Apollo):
    """APOLLO at rank 1 with one factor for the whole matrix: state of two vectors.

    The algorithm, paper and deviations are `Apollo`'s; three defaults differ.
    """

    rank: int = 1
    scale: float = 128.0
    scaling: Literal["channel", "tensor"] = "tensor"
