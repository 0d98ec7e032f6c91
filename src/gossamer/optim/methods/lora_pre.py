"""LoRA-Pre: momentum is an online linear regression, so keep its solution as two thin factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.errors import UserError
from gossamer.kernels.native import Past, Product, Reading, Step
from gossamer.linalg import damped_pinv
from gossamer.optim import factors, rules, stores
from gossamer.optim.batch import Batch, fits
from gossamer.optim.contract import (
    Context,
    State,
    check_adam,
    check_choice,
    check_decay,
    check_rank,
    entry_of,
    register,
)
from gossamer.optim.factors import Damped
from gossamer.optim.sweep import Sweep
from gossamer.rows import Parts, Rows, finish

PAPER = "Wang et al., Taming Momentum, ICLR 2026, arXiv 2602.24283"


@dataclass(frozen=True, kw_only=True)
class Regression:
    """What the Adam and the Muon form share: a moment BA fitted to its target by one block-Newton step.

        B <- (1 - g) B + g T A^+,   A <- (1 - g) A + g B^+ T       X^+ the damped pseudo-inverse

    arXiv 2602.24283, Theorem 3.1, equations 11 and 12.
    """

    rank: int = 128
    """Columns of B and rows of A, for each moment."""
    scale: float = 1.0
    """Multiplies the direction. The paper's C4 runs say 0.25, as GaLore."""
    updates: Literal["simultaneous", "sequential"] = "simultaneous"
    """Whether A is advanced with the old B (the paper) or the new one (bounded, exact in its subspace)."""
    damping: float = 1e-6
    """Added to the Gram matrix's diagonal."""
    damping_mode: Literal["absolute", "relative"] = "absolute"
    """Whether `damping` is an absolute number or a multiple of the Gram matrix's mean diagonal entry."""
    init_std: float = 0.02
    """Standard deviation of the first A."""

    def __post_init__(self) -> None:
        name = entry_of(self).name
        check_rank(name, self.rank)
        check_choice(
            name,
            updates=(self.updates, ("simultaneous", "sequential")),
            damping_mode=(self.damping_mode, ("absolute", "relative")),
        )
        if self.damping < 0 or self.init_std <= 0:
            raise UserError(
                f"{name}: damping is {self.damping}, init_std is {self.init_std}; allowed: damping >= 0, init_std > 0"
            )

    def begin_(self, state: State, ctx: Context, **steps: int) -> None:
        """Draw the first A of the moments that are at their first step."""
        for name, step in steps.items():
            if step == 1:
                state[f"{name}_A"].normal_(0.0, self.init_std, generator=ctx.generator)

    def damped(self, xs: Sequence[Tensor]) -> list[Damped]:
        return factors.damped(xs, self.damping, relative=self.damping_mode == "relative")

    def advance_(self, state: State, rows: Rows, **targets: tuple[Tensor, float]) -> None:
        """One step of the named moments towards (target, gamma)."""
        relative, new = self.damping_mode == "relative", {}
        for name, (target, gamma) in targets.items():
            b, a, silent = state[f"{name}_B"], state[f"{name}_A"], ~rows.any(target != 0)
            new_b = b.lerp(target @ damped_pinv(a.mT, self.damping, relative=relative).mT, gamma)
            basis = new_b if self.updates == "sequential" else b
            inverse = damped_pinv(basis, self.damping, relative=relative, rows=rows)
            new_a = a.lerp(rows.sum(inverse @ target), gamma)
            new[name] = torch.where(silent, (1 - gamma) ** 2 * b, new_b), torch.where(silent, a, new_a)
        factors.keep_(state, rows, **new)


@dataclass
class Fit:
    """One step of a moment B A towards a target T, of which only thin products are known, on a CPU."""

    b: Tensor
    a: Tensor
    gamma: float
    right: Damped
    """Of A^T."""
    left: Damped | None
    """Of what B^T T is taken with; None until it is known."""
    inside: Tensor = field(init=False)
    """T A^T, (m, r); once solved, what B moves towards."""
    below: Tensor = field(init=False)
    """B^T T, (r, n), with the old B or the new one; once solved, what A moves towards."""

    def solve_(self) -> bool:
        """Whether the product of the new factors is finite, bounded as `factors.keep_` does."""
        assert self.left is not None
        self.inside, self.below = self.right.solve(self.inside), self.left.solve_left(self.below)
        b, a = (
            (1 - self.gamma) * factors.largest(old) + self.gamma * factors.largest(target)
            for old, target in ((self.b, self.inside), (self.a, self.below))
        )
        return b * a * self.b.shape[1] <= torch.finfo(self.b.dtype).max

    def keep_(self, silent: bool) -> None:
        if silent:
            self.b.mul_((1 - self.gamma) ** 2)
        else:
            self.b.lerp_(self.inside, self.gamma)
            self.a.lerp_(self.below, self.gamma)


@register("lora-pre", paper=PAPER, by_rows=True)
@dataclass(frozen=True, kw_only=True)
class LoRAPre(Regression):
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
    - A factor update that is not finite is discarded, and the first moment is cut at the largest finite number, so that
      huge gradients never reach a weight as infinity or NaN (`test_no_nonfinite_weight`). A NaN gradient is passed on.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    bias_correction: Literal["paper", "exact"] = "paper"
    """The paper's 1 - beta2^t, or weights that sum to one given how fast the tracker of |g| warms up."""
    gammas: tuple[float, float] | None = None
    """Step sizes g1, g2 of the factor updates; None couples them to the betas."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adam("lora-pre", self.betas, self.eps)
        check_choice("lora-pre", bias_correction=(self.bias_correction, ("paper", "exact")))
        if self.gammas is not None and not all(0 < gamma <= 1 for gamma in self.gammas):
            raise UserError(f"lora-pre: gammas are {self.gammas}; allowed: 0 < gamma <= 1, or None")

    def _gammas(self) -> tuple[float, float]:
        return self.gammas or (1 - self.betas[0] ** 0.5, 1 - self.betas[1] ** 0.25)

    def init(self, param: Tensor) -> State:
        return stores.factored(param, self.rank, "m", "v")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        gamma1, gamma2 = self._gammas()
        self.begin_(state, ctx, m=ctx.m_step, v=ctx.v_step)

        largest = torch.finfo(grad.dtype).max
        m = factors.ema(state, "m", grad, self.betas[0]).div_(1 - self.betas[0] ** ctx.m_step).clamp_(-largest, largest)
        tracked = factors.product(state, "v")
        self.advance_(state, ctx.rows, m=(grad, gamma1), v=(grad.abs(), gamma2))
        past, own = self._weights(ctx.v_step)
        v = tracked.mul_(past).square_().addcmul_(grad, grad, value=own)
        return rules.cut_direction_(rules.adam(m, v, self.eps).mul_(self.scale))

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        for sweep in sweeps:
            self.begin_(sweep.state, sweep.context, m=sweep.context.m_step, v=sweep.context.v_step)
        sequential = self.updates == "sequential"
        keys = ("m_A", "v_A") if sequential else ("m_A", "v_A", "m_B", "v_B")
        sides = [[s.state[key].mT if key.endswith("A") else s.state[key] for s in sweeps] for key in keys]
        for sweep, *grams in zip(sweeps, *map(self.damped, sides), strict=True):
            m, v = (
                Fit(b, a, gamma, right, left)
                for b, a, gamma, right, left in zip(
                    (sweep.state["m_B"], sweep.state["v_B"]),
                    (sweep.state["m_A"], sweep.state["v_A"]),
                    self._gammas(),
                    grams[:2],
                    grams[2:] or (None, None),
                    strict=True,
                )
            )
            self._sweep(sweep, m, v)
            if sequential:
                self._sweep_again(sweep, m, v)
            silent = float(v.inside[0, 0]) == 0 and sweep.largest == 0  # one number answers for most gradients
            if m.solve_() and v.solve_():  # all or none, as `factors.keep_`
                m.keep_(silent)
                v.keep_(silent)

    def _sweep(self, sweep: Sweep, m_fit: Fit, v_fit: Fit) -> None:
        """Descend by the old factors, and take products with them."""
        ctx, beta1 = sweep.context, self.betas[0]
        # the direction is gain (m + g) / (sqrt(v + g^2) + eps): the other constants scale the products
        past, own = self._weights(ctx.v_step)
        gain = self.scale * (1 - beta1) / (1 - beta1**ctx.m_step) / own**0.5
        found = sweep.read(
            Reading(
                right=(m_fit.a.mT, v_fit.a.mT),
                left=(None, None) if self.updates == "sequential" else (m_fit.b, v_fit.b),
                target="magnitude",
                past=Past(Product(v_fit.b, v_fit.a, past / own**0.5), "squared"),
                step=Step("adam", Product(m_fit.b, m_fit.a, beta1 / (1 - beta1)), gain, self.eps / own**0.5),
            )
        )
        (m_fit.inside, v_fit.inside), (m_fit.below, v_fit.below), _ = found

    def _sweep_again(self, sweep: Sweep, m_fit: Fit, v_fit: Fit) -> None:
        """Take products with the new B."""
        m_b, v_b = (fit.b.lerp(fit.right.solve(fit.inside), fit.gamma) for fit in (m_fit, v_fit))
        m_fit.left, v_fit.left = self.damped([m_b, v_b])
        m_fit.below, v_fit.below = sweep.read(Reading(left=(m_b, v_b), target="magnitude")).left

    def _weights(self, t: Any) -> tuple[Any, Any]:
        """p, w: the bias-corrected second moment is (p tracked)^2 + w g^2, with the magnitude tracked so far.

        Args:
            t: steps of the second moment, a number or a tensor of several matrices' numbers.
        """
        beta2 = self.betas[1]
        own = (1 - beta2) / (1 - beta2**t)
        if self.bias_correction == "paper":
            return (beta2 / (1 - beta2**t)) ** 0.5, own
        # the tracker of |g| decays by (1 - gamma2)^2 a step, so the t - 1 gradients before this one have that mass
        decay = (1 - self._gammas()[1]) ** 2
        before = t.sub(1).clamp_min(1) if isinstance(t, Tensor) else max(t - 1, 1)
        return (1 - own) ** 0.5 / (1 - decay**before), own

    def can_launch(self, param: Tensor) -> bool:
        # the hardware's root takes tiny numbers as zero, which without an eps would be divided by
        return fits(param, min(self.rank, *param.shape)) and self.eps > 0

    def launch_(self, batch: Batch) -> None:
        from gossamer.kernels.lora_pre import step

        for state, ctx in zip(batch.states, batch.contexts, strict=True):
            self.begin_(state, ctx, m=ctx.m_step, v=ctx.v_step)
        beta1, gain = self.betas[0], self.scale / (1 - self.betas[0] ** batch.counter("m_step"))
        past, own = self._weights(batch.counter("v_step"))
        b, a = step(
            batch.tables,
            batch.numbers(gain * (1 - beta1) * batch.sign, own, self.eps, batch.decay, batch.rates, batch.seeds),
            batch.stack("m_B", "v_B"),
            batch.stack("m_A", "v_A"),
            scales=batch.numbers(gain * beta1, past),
            signs=batch.numbers(batch.sign, 1.0),
            gammas=batch.numbers(*self._gammas()),
            damping=self.damping,
            relative=self.damping_mode == "relative",
            sequential=self.updates == "sequential",
        )
        half = len(batch.params)
        batch.keep_(m=(b[:half], a[:half]), v=(b[half:], a[half:]))

    def moments(self, param: Tensor, state: State, m_step: int, v_step: int) -> State:
        """What the factors stand for, bias-corrected: estimates of E g and E g^2."""
        decay1, decay2 = ((1 - gamma) ** 2 for gamma in self._gammas())  # of the averages of g and of |g|
        m, v = factors.product(state, "m"), factors.product(state, "v")
        return {"m": m.div_(1 - decay1**m_step), "v": v.div_(1 - decay2**v_step).square_()}


@register("lora-pre-stable", paper=f"{PAPER}; stabilised here", by_rows=True)
@dataclass(frozen=True, kw_only=True)
class LoRAPreStable(LoRAPre):
    """LoRA-Pre with sequential updates, relative damping and a second moment whose weights sum to one.

    The algorithm, paper and deviations are `LoRAPre`'s; only four defaults differ. With them the tracked momentum
    obeys |B'A'| <= beta |BA| + (1 - beta) |g|, follows a sign reversal, and does not depend on the gradient's scale.
    """

    updates: Literal["simultaneous", "sequential"] = "sequential"
    bias_correction: Literal["paper", "exact"] = "exact"
    damping: float = 1e-3
    damping_mode: Literal["absolute", "relative"] = "relative"


@register("lora-pre-muon", paper=PAPER, by_rows=True)
@dataclass(frozen=True, kw_only=True)
class LoRAPreMuon(Regression):
    """Muon's momentum as one product of rank-r factors: Algorithm 2.

        m = mu m_B m_A + g
        m_B <- (1 - g1) m_B + g1 / (1 - mu) g m_A^+              X^+ the damped pseudo-inverse
        m_A <- (1 - g1) m_A + g1 / (1 - mu) m_B^+ g              1 - g1 = sqrt(mu)
        direction = scale NewtonSchulz(m)

    Paper: arXiv 2602.24283, Algorithm 2, Theorem 3.1. Muon's momentum sums gradients, so each factor is fitted to
    g / (1 - mu), the constant gradient's fixed point.

    Deviations, beside those of `lora-pre`:
    - The one transcription of Algorithm 2 at hand swaps g1 and 1 - g1 and then orthogonalises the advanced factors
      alone. Neither has a memory of mu; ours is the reading whose fixed point is Muon's (`test_muon_fixed_point`).
    - Momentum, Nesterov, iteration and shape factor are not stated: mu = 0.95, no Nesterov, and torch's other two.
    """

    momentum: float = 0.95
    """mu, the decay of the momentum."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    """How the step depends on the shape, as in `torch.optim.Muon`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("lora-pre-muon", "momentum", self.momentum)
        check_choice("lora-pre-muon", adjust_lr_fn=(self.adjust_lr_fn, rules.ADJUSTMENTS))

    def init(self, param: Tensor) -> State:
        return stores.factored(param, self.rank, "m")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        return finish(self.parts(grad, state, ctx), ctx.rows)

    def parts(self, grad: Tensor, state: State, ctx: Context) -> Parts:
        self.begin_(state, ctx, m=ctx.m_step)
        grad, mu = rules.cut_gradient(grad, ctx.rows), self.momentum
        m = torch.addmm(grad, state["m_B"], state["m_A"], alpha=mu)
        self.advance_(state, ctx.rows, m=(grad / (1 - mu), 1 - mu**0.5))
        m = rules.cut_gradient(m, ctx.rows)
        return (yield from rules.orthogonalize(m, self.adjust_lr_fn, ctx.rows)).mul_(self.scale)
