"""Lion: the sign of an interpolation between momentum and gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.optim import rules, stores
from gossamer.optim.contract import Context, State, check_adam, register


@register(
    "lion",
    paper="Chen et al., Symbolic Discovery of Optimization Algorithms, NeurIPS 2023, arXiv 2302.06675",
    matrix_only=False,
    by_rows=True,
)
@dataclass(frozen=True)
class Lion:
    """Every entry moves by the learning rate: the sign of momentum and gradient together, and one moment of state.

        direction = sign(beta1 m + (1 - beta1) g)
        m <- beta2 m + (1 - beta2) g

    Paper: arXiv 2302.06675, Algorithm 2 (Program 1 is the same without the decay, which is the driver's).

    Deviations: none (`test_lion_is_its_two_lines`). The sign of zero is zero, as in the authors' code.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    """Weight of the momentum in the step, and its decay."""

    def __post_init__(self) -> None:
        check_adam("lion", self.betas, 0.0)

    def init(self, param: Tensor) -> State:
        return stores.dense(param, "m")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        beta1, beta2 = self.betas
        m = state["m"]
        direction = rules.sign_((beta1 * m).add_(grad, alpha=1 - beta1))
        m.mul_(beta2).add_(grad, alpha=1 - beta2)  # not lerp: grad - m overflows for the largest finite numbers
        return direction
