"""Fira: GaLore, plus what the projection left out, scaled as Adam scaled what it kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.kernels.product import product
from gossamer.optim import rules, stores, subspace
from gossamer.optim.contract import Context, State, check_adam, check_choice, check_rank, register
from gossamer.optim.subspace import Subspace, check_gap, check_growth, due, tall
from gossamer.optim.sweep import Sweep


@register(
    "fira",
    paper="Chen et al., Fira, NeurIPS 2025, arXiv 2410.01623",
    by_rows=True,
)
@dataclass(frozen=True)
class Fira:
    """GaLore's direction plus the gradient's residual, channel by channel as long as Adam would have made it.

        P, R, m, v, N: as GaLore
        phi_j = |N_j| / |R_j|                      one number for each channel j of the larger side
        E = (G - scale P R) diag(phi)              residual="code"; G - P R for "paper"
        E <- E min(1, gamma |E|_before / |E|)      the limiter, before bias correction
        direction = scale P N + E                  (wide; a tall matrix transposed)

    Paper: arXiv 2410.01623, norm-based scaling and norm-growth limiter. State: GaLore's, and `norm`, one
    number, with the limiter.

    Deviations:
    - The paper subtracts P R; the authors' code, whose numbers were published, subtracts scale P R, so that
      1 - scale of the projected gradient stays in the residual. `residual` chooses; the default is the code's
      (`test_fira`).
    - The limiter acts on E without Adam's bias correction, as in the authors' code, where the correction is part of the
      step size: norms are divided by sqrt(1 - beta2^t) / (1 - beta1^t) before they are compared, which is the same
      (`test_fira`). A norm of zero limits nothing; there, growth would have to start from 1e-8
      (`test_a_zero_gradient_does_not_freeze_the_limiter`).
    - eps, dtypes, signs, the cut of huge gradients, `refresh` and `staggered`: as `GaLore`.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    rank: int = 128
    """Directions kept, r."""
    update_proj_gap: int = 50
    """Steps between two refreshes of the projector, T. The authors' C4 runs: 200, at 7B 500."""
    scale: float = 0.25
    """Multiplies the projected part, alpha. The authors' C4 runs: 0.25, at 1B and 7B 0.0625."""
    residual: Literal["code", "paper"] = "code"
    """What is left of the gradient: G - scale P R, or G - P R."""
    growth_limit: float | None = 1.01
    """By how much the residual's norm may grow a step, gamma. None: without bound."""
    refresh: Literal["svd", "warm"] = "svd"
    """An SVD of the gradient, or one subspace iteration from the old projector."""
    staggered: bool = False
    """Refresh parameters in turn over the gap instead of all in one step."""

    def __post_init__(self) -> None:
        check_adam("fira", self.betas, self.eps)
        check_rank("fira", self.rank)
        check_gap("fira", self.update_proj_gap)
        check_growth("fira", self.growth_limit)
        check_choice("fira", refresh=(self.refresh, subspace.REFRESHES), residual=(self.residual, ("code", "paper")))

    def init(self, param: Tensor) -> State:
        state = subspace.fresh(param, self.rank)
        return state if self.growth_limit is None else state | subspace.fresh_norm(param)

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        grad, basis = rules.cut_projected(grad), state["basis"]
        if due(ctx.step, self.update_proj_gap, ctx.key if self.staggered else 0):
            basis.copy_(subspace.refreshed(basis, grad, ctx, self.refresh))
        view = Subspace.of(basis, grad, ctx.rows)

        low = view.down(grad)
        psi = rules.adam(*stores.adam_moments_(state, low, self.betas, ctx), self.eps)
        residual = grad.sub_(view.up(low * (self.scale if self.residual == "code" else 1.0)))
        gain = subspace.channel_gain(psi, low)
        if self.growth_limit is not None:
            norms = gain * view.channel_norms(residual)
            gain = gain * subspace.limit_channels(norms, state, self.betas, ctx, self.growth_limit, view.channels)
        return residual.mul_(view.along(gain)).add_(view.up(psi * self.scale))

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        for sweep in sweeps:
            self._descend(sweep)  # a call, so that one matrix's temporaries are gone when the next one's are made

    def _descend(self, sweep: Sweep) -> None:
        state, ctx, bound = sweep.state, sweep.context, rules.projected_bound(sweep.dtype)
        if due(ctx.step, self.update_proj_gap, ctx.key if self.staggered else 0):
            whole = sweep.whole(bound)
            state["basis"].copy_(subspace.refreshed(state["basis"], whole, ctx, self.refresh))
        view = Subspace(state["basis"], tall(ctx.param))
        low = view.down_sweep(sweep)
        psi = rules.adam(*stores.adam_moments_(state, low, self.betas, ctx), self.eps)
        taken = self.scale if self.residual == "code" else 1.0

        gain = subspace.channel_gain(psi, low)
        if self.growth_limit is not None:
            sums, (left, right) = torch.zeros_like(gain), view.up_factors(low)
            for rows, tile in sweep.gradients(bound):
                middle = (rows.start + rows.stop + 1) // 2  # by halves: `low` and `psi` and a tile are more than two
                for part, half in zip(
                    (slice(rows.start, middle), slice(middle, rows.stop)), tile.chunk(2), strict=False
                ):
                    subspace.add_squares_(
                        sums, part, product(left[part] * -taken, right).add_(half).square_(), view.tall
                    )
            gain = gain * subspace.limit_channels(gain * sums.sqrt_(), state, self.betas, ctx, self.growth_limit)
        # gain (G - P taken) + P psi: both products in one
        both = psi.mul_(self.scale).addcmul_(low, gain, value=-taken)
        sweep.descend_sum(view.up_factors(both), view.along(gain), bound)
