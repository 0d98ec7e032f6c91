"""GoLore: GaLore whose projector becomes random, so that gradient noise cannot choose it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from gossamer.errors import UserError
from gossamer.optim import rules, stores, subspace
from gossamer.optim.contract import Context, State, check_adam, check_rank, register
from gossamer.optim.subspace import Subspace, check_gap, due, tall
from gossamer.optim.sweep import Sweep


@register(
    "golore",
    paper="He et al., Subspace Optimization for LLMs with Convergence Guarantees, ICML 2025, arXiv 2410.11289",
    by_rows=True,
)
@dataclass(frozen=True)
class GoLore:
    """GaLore, with a uniformly random projector from step `random_after` on and a first moment that follows it.

        every update_proj_gap steps: P_old = P, then
            P = leading singular vectors of G up to step random_after, later Q of an s x r Gaussian
            m <- P^T P_old m  (wide)  or  m P_old^T P  (tall)
        R = P^T G  (wide)  or  G P  (tall);    m, v, N: as GaLore
        direction = scale P N  (wide)  or  scale N P^T  (tall)

    Paper: arXiv 2410.11289, its GoLore algorithm with momentum re-projection, and the GaLore-then-GoLore schedule its
    experiments use. State: as GaLore, `basis` (s, r), `m` and `v` (l, r).

    Deviations from the authors' code:
    - At a refresh their code rotates a copy of the first moment and drops it with that step's gradient; ours keeps it
      (`test_golore`). The second moment is kept as it is, as theirs.
    - The random basis is a QR of an s x r Gaussian, the same distribution as their polar factor of it without an
      n x n SVD (`test_random_bases_are_uniform`).
    - "Late" is a step, not a share of the run: a method does not know how long the run is. A projector stays until
      the first refresh after that step.
    - eps, dtypes, signs and the cut of huge gradients: as `GaLore`.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    rank: int = 128
    """Directions kept, r."""
    update_proj_gap: int = 50
    """Steps between two refreshes of the projector, tau. The authors' C4 runs: 200."""
    scale: float = 1.0
    """Multiplies the direction; 1 in the authors' C4 runs."""
    random_after: int = 0
    """Refreshes after this many steps are random; 0: all, as in the theorem. The authors' C4 runs: 80 % of the run."""
    staggered: bool = False
    """Refresh parameters in turn over the gap instead of all in one step."""

    def __post_init__(self) -> None:
        check_adam("golore", self.betas, self.eps)
        check_rank("golore", self.rank)
        check_gap("golore", self.update_proj_gap)
        if self.random_after < 0:
            raise UserError(f"golore: random_after is {self.random_after}; allowed: an integer >= 0")

    def init(self, param: Tensor) -> State:
        return subspace.fresh(param, self.rank)

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        grad = rules.cut_projected(grad)
        if due(ctx.step, self.update_proj_gap, ctx.key if self.staggered else 0):
            self._refresh(grad, state, ctx)
        view = Subspace.of(state["basis"], grad, ctx.rows)
        return view.up(self._rule(view.down(grad), state, ctx))

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        for sweep in sweeps:
            state, ctx = sweep.state, sweep.context
            if due(ctx.step, self.update_proj_gap, ctx.key if self.staggered else 0):
                self._refresh(sweep.whole(rules.projected_bound(sweep.dtype)), state, ctx)
            view = Subspace(state["basis"], tall(ctx.param))
            sweep.descend_sum(view.up_factors(self._rule(view.down_sweep(sweep), state, ctx)))

    def _refresh(self, grad: Tensor, state: State, ctx: Context) -> None:
        basis, m = state["basis"], state["m"]
        new = subspace.refreshed(basis, grad, ctx, "random" if ctx.step > self.random_after else "svd")
        m.copy_(m @ Subspace.of(basis, grad, ctx.rows).side.sum(basis.mT @ new))
        basis.copy_(new)

    def _rule(self, low: Tensor, state: State, ctx: Context) -> Tensor:
        """Adam's scaled direction of a projected gradient, l x r. Advances the moments."""
        return rules.adam(*stores.adam_moments_(state, low, self.betas, ctx), self.eps).mul_(self.scale)

    def moments(self, param: Tensor, state: State, m_step: int, v_step: int) -> State:
        """What `m` stands for under the projector at hand, bias-corrected: estimates E g. `v` is of other entries."""
        low = state["m"] / (1 - self.betas[0] ** m_step)
        return {"m": Subspace(state["basis"], tall(param)).up(low)}
