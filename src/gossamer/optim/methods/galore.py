"""GaLore: Adam on the gradient's projection onto its leading singular directions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gossamer.optim import rules, stores, subspace
from gossamer.optim.contract import Context, State, check_adam, check_choice, check_rank, register
from gossamer.optim.subspace import Subspace, check_gap, due, tall
from gossamer.optim.sweep import Sweep


@register(
    "galore",
    paper="Zhao et al., GaLore, ICML 2024, arXiv 2403.03507",
    by_rows=True,
)
@dataclass(frozen=True)
class GaLore:
    """Adam whose moments live on r leading singular directions of the gradient's smaller side.

        every update_proj_gap steps: P = the first r left (wide) or right (tall) singular vectors of G, s x r
        R = P^T G  (wide)  or  G P  (tall)
        m <- beta1 m + (1 - beta1) R;    v <- beta2 v + (1 - beta2) R^2
        N = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        direction = scale P N  (wide)  or  scale N P^T  (tall)

    Paper: arXiv 2403.03507, Algorithm 2. State: `basis` (s, r), `m` and `v` (l, r) with s, l the smaller and the larger
    side. At full rank: AdamW on the rotated gradient (`test_full_rank_is_adamw_in_rotated_coordinates`).

    Deviations from the paper and the authors' code:
    - eps is added to the bias-corrected root, as in torch; the authors add 1e-6 before the correction, an effective
      eps / sqrt(1 - beta2^t) (`test_galore`).
    - Projector and moments are fp32 whatever the weight's dtype, and singular vectors have fixed signs: moments outlive
      a refresh, so signs matter (`test_galore`).
    - Gradient entries beyond 4e9 (fp32) are cut (`test_nothing_non_finite`).
    - `refresh="warm"` and `staggered` are ours.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    rank: int = 128
    """Directions kept, r."""
    update_proj_gap: int = 50
    """Steps between two refreshes of the projector, T. The authors' C4 runs: 200, at 7B 500."""
    scale: float = 1.0
    """Multiplies the direction, alpha. The authors' C4 runs: 0.25."""
    refresh: Literal["svd", "warm"] = "svd"
    """An SVD of the gradient, or one subspace iteration from the old projector."""
    staggered: bool = False
    """Refresh parameters in turn over the gap instead of all in one step."""
    state_bits: Literal[32, 16, 8] = 32
    """Of each moment: fp32, or 8-bit codes with one scale for 256 neighbours in a row (the paper's 8-bit GaLore)."""

    def __post_init__(self) -> None:
        check_adam("galore", self.betas, self.eps)
        check_rank("galore", self.rank)
        check_gap("galore", self.update_proj_gap)
        stores.check_bits("galore", self.state_bits)
        check_choice("galore", refresh=(self.refresh, subspace.REFRESHES))

    def init(self, param: Tensor) -> State:
        return subspace.fresh(param, self.rank, self.state_bits)

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        grad, basis = rules.cut_projected(grad), state["basis"]
        if due(ctx.step, self.update_proj_gap, ctx.key if self.staggered else 0):
            basis.copy_(subspace.refreshed(basis, grad, ctx, self.refresh))
        view = Subspace.of(basis, grad, ctx.rows)
        return view.up(self._rule(view.down(grad), state, ctx))

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        for sweep in sweeps:
            state, ctx = sweep.state, sweep.context
            if due(ctx.step, self.update_proj_gap, ctx.key if self.staggered else 0):
                whole = sweep.whole(rules.projected_bound(sweep.dtype))
                state["basis"].copy_(subspace.refreshed(state["basis"], whole, ctx, self.refresh))
            view = Subspace(state["basis"], tall(ctx.param))
            sweep.descend_sum(view.up_factors(self._rule(view.down_sweep(sweep), state, ctx)))

    def _rule(self, low: Tensor, state: State, ctx: Context) -> Tensor:
        """Adam's scaled direction of a projected gradient, l x r. Advances the moments."""
        return rules.adam(*stores.adam_moments_(state, low, self.betas, ctx), self.eps).mul_(self.scale)

    def moments(self, param: Tensor, state: State, m_step: int, v_step: int) -> State:
        """What `m` stands for under the projector at hand, bias-corrected: estimates E g. `v` is of other entries."""
        low = stores.read(state, "m") / (1 - self.betas[0] ** m_step)
        return {"m": Subspace(state["basis"], tall(param)).up(low)}


@register(
    "galore-8bit",
    paper="Zhao et al., GaLore, ICML 2024, arXiv 2403.03507",
    by_rows=True,
)
@dataclass(frozen=True)
class GaLore8bit(GaLore):
    """GaLore with both moments in 8-bit codes; the projector stays fp32.

    The algorithm, paper and deviations are `GaLore`'s; the codes and their deviations `AdamW8bit`'s.
    """

    state_bits: Literal[32, 16, 8] = 8
