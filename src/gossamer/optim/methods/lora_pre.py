"""LoRA-Pre: momentum is an online linear regression, so keep its solution as two thin factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import UserError
from gossamer.linalg import damped_pinv
from gossamer.optim import rules, stores
from gossamer.optim.contract import Context, State, check_adam, check_choice, check_rank, register

PAPER = "Wang et al., Taming Momentum, ICLR 2026, arXiv 2602.24283"


@register("lora-pre", paper=PAPER, quick={"lr": 2e-3, "rank": 32, "scale": 0.25})
@dataclass(frozen=True)
class LoRAPre:
    """Both of Adam's moments as products of rank-r factors, advanced by one block-Newton step: Algorithm 1 as printed.

        m = beta1 m_B m_A + (1 - beta1) g                       v = beta2 (v_B v_A)^2 + (1 - beta2) g^2
        m_B <- (1 - g1) m_B + g1 g m_A^+                        v_B, v_A: the same with |g| and g2
        m_A <- (1 - g1) m_A + g1 m_B^+ g                        X^+ the damped pseudo-inverse
        direction = scale m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        (1 - g1)^2 = beta1,  (1 - g2)^4 = beta2;  m_B = v_B = 0,  m_A, v_A ~ N(0, init_std^2) before the first step

    Paper: arXiv 2602.24283, Theorem 3.1 (factor updates), Algorithm 1, Appendix B.1 (coupling of g and beta).

    Deviations from the paper (no code of the authors is public):
    - The damping of the pseudo-inverse is printed nowhere; ours is `damping`, never below the rounding noise of the
      Gram matrix (`test_pinv_survives_rank_deficiency`).
    - A zero gradient shrinks B by beta and leaves A, where the printed step shrinks both by sqrt(beta): the same
      product, but factors that cannot die out (`test_zero_gradients_decay_the_product`).
    - A factor update that is not finite is discarded, and moments are cut at the largest finite number, so that huge
      gradients never reach a weight as infinity or NaN (`test_no_nonfinite_weight`). A NaN gradient is passed on.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    rank: int = 128
    """Columns of B and rows of A, for each moment."""
    scale: float = 1.0
    """Multiplies the direction. The paper's C4 runs say 0.25, as GaLore."""
    updates: Literal["simultaneous", "sequential"] = "simultaneous"
    """Whether A is advanced with the old B (the paper) or the new one (bounded, exact in its subspace)."""
    bias_correction: Literal["paper", "exact"] = "paper"
    """The paper's 1 - beta2^t, or weights that sum to one given how fast the tracker of |g| warms up."""
    damping: float = 1e-6
    """Added to the Gram matrix's diagonal."""
    damping_mode: Literal["absolute", "relative"] = "absolute"
    """Whether `damping` is an absolute number or a multiple of the Gram matrix's mean diagonal entry."""
    init_std: float = 0.02
    """Standard deviation of the first A."""
    gammas: tuple[float, float] | None = None
    """Step sizes g1, g2 of the factor updates; None couples them to the betas."""

    def __post_init__(self) -> None:
        check_adam("lora-pre", self.betas, self.eps)
        check_rank("lora-pre", self.rank)
        check_choice(
            "lora-pre",
            updates=(self.updates, ("simultaneous", "sequential")),
            bias_correction=(self.bias_correction, ("paper", "exact")),
            damping_mode=(self.damping_mode, ("absolute", "relative")),
        )
        if self.damping < 0 or self.init_std <= 0:
            raise UserError(
                f"lora-pre: damping is {self.damping}, init_std is {self.init_std}; allowed: damping >= 0, init_std > 0"
            )

    def init(self, param: Tensor) -> State:
        return stores.factored(param, self.rank, "m", "v")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        beta1, beta2 = self.betas
        gamma1, gamma2 = self.gammas or (1 - beta1**0.5, 1 - beta2**0.25)
        for name, step in (("m_A", ctx.m_step), ("v_A", ctx.v_step)):
            if step == 1:
                state[name].normal_(0.0, self.init_std, generator=ctx.generator)

        largest = torch.finfo(grad.dtype).max
        m = torch.addmm(grad, state["m_B"], state["m_A"], beta=1 - beta1, alpha=beta1).clamp_(-largest, largest)
        tracked = state["v_B"] @ state["v_A"]
        self._advance_(state, grad, gamma1, gamma2)

        if self.bias_correction == "paper":
            v = tracked.square_().mul_(beta2).addcmul_(grad, grad, value=1 - beta2).div_(1 - beta2**ctx.v_step)
        else:
            # the tracker of |g| decays by (1 - gamma2)^2 a step, so the t - 1 gradients before this one have that mass
            a, decay = (1 - beta2) / (1 - beta2**ctx.v_step), (1 - gamma2) ** 2
            v = tracked.div_(1 - decay ** max(ctx.v_step - 1, 1)).square_().mul_(1 - a).addcmul_(grad, grad, value=a)
        direction = rules.adam(m.div_(1 - beta1**ctx.m_step), v, self.eps).mul_(self.scale)
        return direction.clamp_(-(largest**0.5), largest**0.5)

    def _advance_(self, state: State, grad: Tensor, gamma1: float, gamma2: float) -> None:
        """One block-Newton step of both products, towards g and |g|: Theorem 3.1, equations 11 and 12."""
        relative, silent = self.damping_mode == "relative", (grad == 0).all()
        new: State = {}
        for name, target, gamma in (("m", grad, gamma1), ("v", grad.abs(), gamma2)):
            b, a = state[f"{name}_B"], state[f"{name}_A"]
            new_b = b.lerp(target @ damped_pinv(a.mT, self.damping, relative=relative).mT, gamma)
            basis = new_b if self.updates == "sequential" else b
            new_a = a.lerp(damped_pinv(basis, self.damping, relative=relative) @ target, gamma)
            new[f"{name}_B"] = torch.where(silent, (1 - gamma) ** 2 * b, new_b)
            new[f"{name}_A"] = torch.where(silent, a, new_a)
        # all four or none: a first moment that saw a gradient which the second did not would be divided by too little
        bounds = [new[f"{x}_B"].abs().amax() * new[f"{x}_A"].abs().amax() * new["m_B"].shape[1] for x in "mv"]
        sound = torch.stack(bounds).isfinite().all()  # no entry of a product can overflow either
        for name, factor in new.items():
            state[name].copy_(torch.where(sound, factor, state[name]))


@register("lora-pre-stable", paper=f"{PAPER}; stabilised here", quick={"lr": 4e-3, "rank": 32, "scale": 0.25})
@dataclass(frozen=True)
class LoRAPreStable(LoRAPre):
    """LoRA-Pre with sequential updates, relative damping and a second moment whose weights sum to one.

    The algorithm, paper and deviations are `LoRAPre`'s; only four defaults differ. With them the tracked momentum
    obeys |B'A'| <= beta |BA| + (1 - beta) |g|, follows a sign reversal, and does not depend on the gradient's scale.
    """

    updates: Literal["simultaneous", "sequential"] = "sequential"
    bias_correction: Literal["paper", "exact"] = "exact"
    damping: float = 1e-3
    damping_mode: Literal["absolute", "relative"] = "relative"
