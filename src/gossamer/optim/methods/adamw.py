"""Adam with decoupled weight decay: the dense parent of everything here."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.optim import rules, stores
from gossamer.optim.contract import Context, State, check_adam, register


@register(
    "adamw",
    paper="Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101",
    matrix_only=False,
    quick={"lr": 2e-3, "betas": (0.9, 0.95)},
)
@dataclass(frozen=True)
class AdamW:
    """Dense first and second moments: the reference for memory and for quality.

    Algorithm (Loshchilov and Hutter 2019, Algorithm 2; the decay is the driver's):

        m <- beta1 m + (1 - beta1) g
        v <- beta2 v + (1 - beta2) g^2
        direction = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    Deviations: none; equal to `torch.optim.AdamW` (`test_adamw_is_torch`).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        check_adam("adamw", self.betas, self.eps)

    def init(self, param: Tensor) -> State:
        return stores.dense(param, "m", "v")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        beta1, beta2 = self.betas
        m = state["m"].lerp_(grad, 1 - beta1)
        v = state["v"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        return rules.adam(m / (1 - beta1**ctx.m_step), v / (1 - beta2**ctx.v_step), self.eps)
