"""LDAdam: low-dimensional Adam whose subspace moves every step, and whose moments and errors move with it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.errors import UserError
from gossamer.optim import rules, stores, subspace
from gossamer.optim.contract import Context, State, check_adam, check_rank, register
from gossamer.optim.subspace import Subspace


@register(
    "ldadam",
    paper="Robert et al., LDAdam, ICLR 2025, arXiv 2410.16103",
    by_rows=True,
)
@dataclass(frozen=True)
class LDAdam:
    """Adam in a subspace that follows the gradient by one power iteration a step, with error feedback.

        a = g + e
        U = Q of b b^T U_old,   b = rho U_old m_hat + (1 - rho) a;   at the first step the singular vectors of a
        C = U^T U_old;   m~ = C m;   v~ = (1 - beta2^(t-1)) |C^2 (v_hat - m_hat^2) + (C m_hat)^2|
        m' = beta1 m~ + (1 - beta1) U^T a;   v' = beta2 v~ + (1 - beta2) (U^T a)^2
        direction = U m' / (1 - beta1^t) / (sqrt(v' / (1 - beta2^t)) + eps)
        e' = a - U U^T a + beta1 / (1 - beta1) (U_old m - U m~)          hats: bias-corrected; squares: entry by entry

    Paper: arXiv 2410.16103: projection-aware update, generalised error feedback. Written for wide matrices; a tall one
    is transposed. With error feedback U' m' = beta1 U m + (1 - beta1) (g + e - e'), so nothing is lost, only late
    (`test_error_feedback_loses_nothing`). State: `basis` (s, r), `m` and `v` (l, r), and with error feedback `m_error`
    (m, n): momentum that is late, forgotten with `m`.

    Deviations:
    - e is a tensor of its own; the authors keep it in `param.grad`, which then cannot be freed.
    - C^2 is C squared, as in the equation; the copy of the authors' code that we read squares it twice (`test_ldadam`).
    - A power iteration orthonormalises between its two products: the same U without rounding
      (`test_ldadam`, which does not).
    - A square matrix is projected on its columns, the authors' on its rows. All state is fp32.
    - Entries of g and of e beyond 4e9 (fp32) are cut (`test_nothing_non_finite`).
    """

    betas: tuple[float, float] = (0.908, 0.99)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    rank: int = 16
    """Directions kept, r."""
    rho: float = 0.908
    """How much the subspace follows the momentum rather than the gradient."""
    error_feedback: bool = True
    """Keep what the projections left out, m n numbers, and add it to the next gradient."""

    def __post_init__(self) -> None:
        check_adam("ldadam", self.betas, self.eps)
        check_rank("ldadam", self.rank)
        if not 0.0 <= self.rho < 1.0:
            raise UserError(f"ldadam: rho is {self.rho}; allowed: 0 <= rho < 1")

    def init(self, param: Tensor) -> State:
        state = subspace.fresh(param, self.rank)
        return state | (stores.dense(param, "m_error") if self.error_feedback else {})

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        beta1, beta2 = self.betas
        m, v, old = state["m"], state["v"], Subspace.of(state["basis"], grad, ctx.rows)
        # before the first step of a moment both are zero, and so is what the hats are made of
        old1, old2 = 1 - beta1 ** (ctx.m_step - 1) or 1.0, 1 - beta2 ** (ctx.v_step - 1)
        m_hat, v_hat = m / old1, v / (old2 or 1.0)

        total = rules.cut_projected(grad)
        if self.error_feedback:
            total.add_(state["m_error"])
        if ctx.step == 1:
            basis = subspace.refreshed(old.basis, total, ctx, "svd")
        else:
            blend = old.up(m_hat * self.rho).add_(total, alpha=1 - self.rho)
            basis = subspace.iterated(old.basis, blend, ctx.rows)
        new, change = old._replace(basis=basis), old.side.sum(old.basis.mT @ basis)
        low, carried = new.down(total), m @ change
        if self.error_feedback:
            weight = beta1 / (1 - beta1)
            error = total.sub_(new.up(low + weight * carried)).add_(old.up(m), alpha=weight)
            state["m_error"].copy_(rules.cut_projected(error))

        v.copy_((v_hat - m_hat.square()) @ change.square() + (m_hat @ change).square()).abs_().mul_(old2)
        m.copy_(carried).lerp_(low, 1 - beta1)
        v.mul_(beta2).addcmul_(low, low, value=1 - beta2)
        old.basis.copy_(basis)
        return new.up(rules.adam(m / (1 - beta1**ctx.m_step), v / (1 - beta2**ctx.v_step), self.eps))
