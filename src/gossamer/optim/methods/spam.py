"""SPAM: Adam that clips what spikes and forgets its moments now and then."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import UserError
from gossamer.optim import rules, stores
from gossamer.optim.contract import Context, State, check_adam, register


@register(
    "spam",
    paper="Huang et al., SPAM, ICLR 2025, arXiv 2501.06842",
    matrix_only=False,
    by_rows=True,
)
@dataclass(frozen=True)
class SPAM:
    """Adam with a bound on every gradient entry from its own past, and moments that restart from zero.

        every reset_gap steps: m <- 0, v <- 0
        g <- sign(g) sqrt(threshold v)    where g^2 > threshold v and v > 0
        m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g^2
        direction = s m / (1 - beta1^a) / (sqrt(v / (1 - beta2^a)) + eps)       a: steps since the moments were zero
        s = (1 - cos(pi a / (warmup + 1))) / 2   for the first `warmup` steps after a reset, else 1

    Paper: arXiv 2501.06842, Algorithm 1. The sparse momentum of its second half (a random subset of entries with
    moments) is left out: it needs index buffers that change at each reset.

    Deviations from the paper and from the authors' code:
    - Entries whose v is zero are not clipped; the formula would set them, and with them v, to zero for good. The code
      does not clip for 20 steps after a reset instead, and freezes rows first seen later
      (`test_spam_does_not_freeze_what_it_has_not_seen`).
    - The bias corrections count from the reset; the code goes on counting, which lengthens the steps after a reset by
      (1 - beta1^a) / sqrt(1 - beta2^a), up to six times (`test_spam_is_its_equations`).
    - eps is added to the bias-corrected root, as in torch; the code adds it before the correction.
    - The warm-up rises from 0; the code's from 0.01. Neither warms up before the first reset: that is the schedule's.
    - `Optimizer.reset` starts the warm-up too, and does not shift the next reset. Gradients are cut where the sum of
      their squares would overflow.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    threshold: float = 5000.0
    """Largest ratio of a squared gradient entry to its second moment."""
    reset_gap: int = 500
    """Steps between two resets."""
    warmup: int = 150
    """Steps of the warm-up after a reset."""

    def __post_init__(self) -> None:
        check_adam("spam", self.betas, self.eps)
        if self.threshold <= 0 or self.reset_gap < 1 or self.warmup < 0:
            raise UserError(
                f"spam: threshold is {self.threshold}, reset_gap is {self.reset_gap}, warmup is {self.warmup}; "
                "allowed: threshold > 0, reset_gap >= 1, warmup >= 0"
            )

    def init(self, param: Tensor) -> State:
        return stores.dense(param, "m", "v")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        beta1, beta2 = self.betas
        m, v = state["m"], state["v"]
        since = (ctx.step - 1) % self.reset_gap + 1
        if since == 1:
            m.zero_()
            v.zero_()
        m_age, v_age = min(ctx.m_step, since), min(ctx.v_step, since)  # Optimizer.reset may have come in between

        grad = rules.cut_gradient(grad, ctx.rows)
        bound = self.threshold * v
        spike = (grad.square() > bound) & (v > 0)
        grad = torch.where(spike, bound.sqrt_().copysign_(grad), grad)
        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        direction = rules.adam(m / (1 - beta1**m_age), v / (1 - beta2**v_age), self.eps)

        age = min(m_age, v_age)
        if age < ctx.step and age <= self.warmup:
            direction.mul_((1 - float(np.cos(np.pi * age / (self.warmup + 1)))) / 2)
        return direction
