"""Stable-SPAM: Adam on gradients whose spikes and whose norm are held to their own history."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import UserError
from gossamer.optim import rules, stores
from gossamer.optim.contract import Context, State, check_adam, register


@register(
    "stable-spam",
    paper="Huang et al., Stable-SPAM, 2025, arXiv 2502.17055",
    matrix_only=False,
    by_rows=True,
)
@dataclass(frozen=True)
class StableSPAM:
    """Adam after two corrections of the gradient, with moments that restart from zero.

        a = max |g|;  c <- gamma3 c + (1 - gamma3) a;  c^ = c / (1 - gamma3^t);  g <- g c^ / a  where |g| > c^   AdaClip
        z = ||g||;  p <- gamma1 p + (1 - gamma1) z;  q <- gamma2 q + (1 - gamma2) z^2                            AdaGN
        g <- g / z  p / (1 - gamma1^t) / (sqrt(q / (1 - gamma2^t)) + eps)
        every reset_gap steps: m <- 0, v <- 0                                                                    MoRet
        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
        direction = m / (1 - beta1^s) / (sqrt(v / (1 - beta2^s)) + eps)         s: steps since the moments were zero

    Paper: arXiv 2502.17055 (version 1), Algorithm 1. c, p, q are one number each for a parameter.

    Deviations from the authors' code:
    - No `total_T`: the code lets beta1 and gamma1 fall along a cosine to half of what they were, and rise again after
      total_T steps, whatever the length of the run. The paper has no such schedule.
    - A reset step starts from zero moments; the code takes it with the old ones under the bias correction of a first
      step. The bias corrections of c, p and q, which are not reset, go on; the code restarts them, and so multiplies
      its threshold by up to 1 / (1 - gamma3) = 1000 (`test_stable_spam_is_its_equations`).
    - A gradient of zero stays zero. Gradients are cut where the sum of their squares would overflow.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment and of q."""
    gamma1: float = 0.7
    """Decay of the average norm; 0.85 in arXiv 2505.22922."""
    gamma2: float = 0.9
    """Decay of the average squared norm; 0.999 in arXiv 2505.22922."""
    gamma3: float = 0.999
    """Decay of the average largest entry."""
    reset_gap: int = 1000
    """Steps between two resets."""

    def __post_init__(self) -> None:
        check_adam("stable-spam", self.betas, self.eps)
        gammas = (self.gamma1, self.gamma2, self.gamma3)
        if not all(0 <= gamma < 1 for gamma in gammas) or self.reset_gap < 1:
            raise UserError(
                f"stable-spam: gamma1, gamma2, gamma3 are {gammas}, reset_gap is {self.reset_gap}; "
                "allowed: 0 <= gamma < 1, reset_gap >= 1"
            )

    def init(self, param: Tensor) -> State:
        state = stores.dense(param, "m", "v")
        return {**state, **{name: state["m"].new_zeros(()) for name in ("largest", "norm", "square")}}

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        beta1, beta2 = self.betas
        since = (ctx.step - 1) % self.reset_gap + 1
        if since == 1:
            state["m"].zero_()
            state["v"].zero_()
        m_age, v_age = min(ctx.m_step, since), min(ctx.v_step, since)  # Optimizer.reset may have come in between

        grad = self._stabilized(rules.cut_gradient(grad, ctx.rows), state, ctx)
        m = state["m"].lerp_(grad, 1 - beta1)
        v = state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        return rules.adam(m / (1 - beta1**m_age), v / (1 - beta2**v_age), self.eps)

    def _stabilized(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        """AdaClip, then AdaGN."""
        tiny, t = torch.finfo(grad.dtype).tiny, ctx.step  # c, p and q are never reset
        largest = ctx.rows.largest(grad)
        clip = state["largest"].lerp_(largest, 1 - self.gamma3) / (1 - self.gamma3**t)
        grad = torch.where(grad.abs() > clip, grad * (clip / largest.clamp_min(tiny)), grad)

        unit = grad / largest.clamp_min(tiny)  # so that the norm of a tiny gradient does not underflow
        length = ctx.rows.hypot(torch.linalg.vector_norm(unit))
        norm = length * largest
        mean = state["norm"].lerp_(norm, 1 - self.gamma1) / (1 - self.gamma1**t)
        square = state["square"].lerp_(norm * norm, 1 - self.gamma2) / (1 - self.gamma2**t)
        return unit * (mean / (square.sqrt() + self.eps) / length.clamp_min(tiny))
