"""MLorc: keep the momentum itself as a truncated SVD, re-made by a randomized SVD at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from gossamer.errors import UserError
from gossamer.kernels.native import Past, Product, Products, Reading, Step
from gossamer.linalg import cut_rank, orthonormalize, randomized_svd
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
from gossamer.optim.sweep import Sweep
from gossamer.rows import Parts, finish

if TYPE_CHECKING:
    from gossamer.optim.passes import Passes

PAPER = "Shen et al., MLorc, AISTATS 2026, arXiv 2506.01897"


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What MLorc's three optimizers share: a moment M is kept as Q B, from `randomized_svd` (the paper's Algorithm 3).

    The paper's U, S, V are held as Q = U (m, r) and B = S V^T (r, n): the same product from r numbers less.
    """

    rank: int = 4
    """Of each compressed moment; the paper fine-tunes with 4."""
    oversampling: int = 0
    """Extra columns p of the sketch, cut off again by an SVD. The paper suggests 0."""
    power_iterations: int = 0
    """Rounds through M^T and M: 0 in the paper, 1 in the authors' code, and much closer to M."""

    def __post_init__(self) -> None:
        name = entry_of(self).name
        check_rank(name, self.rank)
        if self.oversampling < 0 or self.power_iterations < 0:
            raise UserError(
                f"{name}: oversampling is {self.oversampling}, power_iterations is {self.power_iterations}; "
                "allowed: integers >= 0"
            )

    def compress(self, moment: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Q and B of a moment, (m, r) and (r, n)."""
        return randomized_svd(
            moment,
            self.rank,
            oversampling=self.oversampling,
            power_iterations=self.power_iterations,
            generator=ctx.generator,
            rows=ctx.rows,
        )

    def compress_(self, swept: Swept, step: Step) -> None:
        """`compress` of all moments at once, and kept; the weight is stepped on the way."""
        sweep = swept.sweep
        width, ctx, m_a = min(self.rank + self.oversampling, *sweep.shape), sweep.context, sweep.state["m_A"]
        names = ("m",) if swept.v is None else ("m", "v")
        frames = [
            torch.randn(width, sweep.shape[1], dtype=m_a.dtype, device=m_a.device, generator=ctx.generator).mT
            for _ in names
        ]
        bases = [orthonormalize(y) for y in swept.right(frames)]
        for _ in range(self.power_iterations):
            frames = [orthonormalize(z.mT) for z in swept.left(bases)]
            bases = [orthonormalize(y) for y in swept.right(frames)]
        pairs = [cut_rank(q, b, self.rank) for q, b in zip(bases, swept.left(bases, step), strict=True)]
        factors.put_(sweep.state, **dict(zip(names, pairs, strict=True)))

    def compress_launch_(self, batch: Batch, passes: Passes) -> None:
        """`compress` of all moments at once, of all matrices at once, and kept; the weights are written on the way."""
        q = passes.basis(passes.gaussian())
        for _ in range(self.power_iterations):
            q = passes.basis(passes.orthonormalize(passes.project(q, step=False)))
        b = passes.project(q, step=True)
        batch.keep_(**{name: (q[name], b[name]) for name in q})


@dataclass
class Swept:
    """MLorc's moments, `decay B A + (1 - decay) g` and `(1 - v_decay) (H + g^2)`, by their thin products alone."""

    sweep: Sweep
    decay: float
    v: Past | None = None
    """H, or None where there is no second moment. The first `right` finds its floor."""
    v_decay: float = 0.0

    def right(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """`M x` of each moment, (m, k)."""
        b, a = self.sweep.state["m_B"], self.sweep.state["m_A"]
        return self._blend(self._read(Reading(right=_two(xs))).right, b @ (a @ xs[0]))

    def left(self, ys: Sequence[Tensor], step: Step | None = None) -> list[Tensor]:
        """`y^T M` of each moment, (k, n)."""
        b, a = self.sweep.state["m_B"], self.sweep.state["m_A"]
        return self._blend(self._read(Reading(left=_two(ys), step=step)).left, (ys[0].mT @ b) @ a)

    def _read(self, reading: Reading) -> Products:
        bound = rules.gradient_bound(self.sweep.dtype, self.sweep.grad.numel())
        target = None if self.v is None else "second"
        found = self.sweep.read(replace(reading, target=target, past=self.v, bound=bound))
        if self.v is not None and found.floor is not None:
            self.v = replace(self.v, floor=found.floor)
        return found

    def _blend(self, found: tuple[Tensor, Tensor | None], past: Tensor) -> list[Tensor]:
        own, second = found
        moments = [own.mul_(1 - self.decay).add_(past, alpha=self.decay)]
        return moments if second is None else [*moments, second.mul_(1 - self.v_decay)]


def _two(thin: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    return thin[0], thin[1] if len(thin) > 1 else None


@register("mlorc", paper=PAPER, by_rows=True)
@dataclass(frozen=True)
class MLorc(Compression):
    """AdamW whose two moments are compressed after use: this step sees them whole, only their history is low-rank.

        m = beta1 m_Q m_B + (1 - beta1) g
        v = beta2 floor(v_Q v_B) + (1 - beta2) g^2   floor(L) = L where L >= 0, else the mean of |L| where L < 0
        direction = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        (m_Q, m_B) = RSVD(m);  (v_Q, v_B) = RSVD(v)

    Paper: arXiv 2506.01897, Algorithm 1 (MLorc-AdamW) and Algorithm 3 (RSVD). At full rank: AdamW
    (`test_full_rank_is_the_parent`).

    Deviations:
    - Parameters that are not hidden matrices are trained by the fallback; the authors' code leaves every parameter
      that is not 2-D as it was, and compresses embeddings and the output head.
    - eps is added to the corrected root and the decay is torch's; the authors add eps before the correction and decay
      the weight after the step. The authors' code runs `torch.pca_lowrank`: one power iteration, sketching the smaller
      side; ours sketches the columns, as the paper.
    - The sketch comes from a generator of the parameter's own: replicas draw the same. The floor stays on the device.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adam("mlorc", self.betas, self.eps)

    def init(self, param: Tensor) -> State:
        return stores.factored(param, self.rank, "m", "v")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        grad = rules.cut_gradient(grad, ctx.rows)
        beta1, beta2 = self.betas
        m = factors.ema(state, "m", grad, beta1)
        v = factors.nonnegative(factors.product(state, "v"), ctx.rows).lerp_(grad.square(), 1 - beta2)
        factors.keep_(state, ctx.rows, m=self.compress(m, ctx), v=self.compress(v, ctx))
        direction = rules.adam(m / (1 - beta1**ctx.m_step), v / (1 - beta2**ctx.v_step), self.eps)
        return rules.cut_direction_(direction)

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        beta1, beta2 = self.betas
        for sweep in sweeps:
            state, ctx = sweep.state, sweep.context
            # of moments over 1 - beta the direction is gain (m + g) / (sqrt(v + g^2) + eps)
            m, v = (
                Product(state[f"{name}_B"], state[f"{name}_A"], beta / (1 - beta))
                for name, beta in (("m", beta1), ("v", beta2))
            )
            spread = ((1 - beta2**ctx.v_step) / (1 - beta2)) ** 0.5
            step = Step("adam", m, (1 - beta1) / (1 - beta1**ctx.m_step) * spread, self.eps * spread)
            self.compress_(Swept(sweep, beta1, Past(v, "floored"), beta2), step)

    def can_launch(self, param: Tensor) -> bool:
        # an eps of nothing would show that the hardware's root flushes tiny numbers to zero
        return fits(param, min(self.rank, *param.shape)) and self.oversampling == 0 and self.eps > 0

    def launch_(self, batch: Batch) -> None:
        from gossamer.optim.passes import Moment, Passes

        (beta1, beta2), sign = self.betas, batch.sign
        m_mass, v_mass = 1 - beta1 ** batch.counter("m_step"), 1 - beta2 ** batch.counter("v_step")
        m = Moment(beta1 / m_mass, sign * (1 - beta1) / m_mass, beta1, sign * (1 - beta1))
        v = Moment(beta2 / v_mass, (1 - beta2) / v_mass, beta2, v_mass)
        self.compress_launch_(batch, Passes(batch, "floored", m=m, v=v, eps=self.eps))

    def moments(self, param: Tensor, state: State, m_step: int, v_step: int) -> State:
        """What the factors stand for, bias-corrected: estimates of E g and E g^2."""
        m, v = factors.product(state, "m"), factors.nonnegative(factors.product(state, "v"))
        return {"m": m / (1 - self.betas[0] ** m_step), "v": v / (1 - self.betas[1] ** v_step)}


@register("mlorc-lion", paper=PAPER, by_rows=True)
@dataclass(frozen=True)
class MLorcLion(Compression):
    """Lion with a compressed momentum.

        direction = sign(beta1 m_Q m_B + (1 - beta1) g)
        (m_Q, m_B) = RSVD(beta2 m_Q m_B + (1 - beta2) g)

    Paper: arXiv 2506.01897, Algorithm 2 (MLorc-Lion), the one with the convergence theorem. At full rank: Lion.

    Deviations: those of `mlorc` that concern one moment. The authors' code ignores its oversampling option here.
    """

    betas: tuple[float, float] = (0.95, 0.98)
    """Weight of the momentum in the step, and its decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adam("mlorc-lion", self.betas, 0.0)

    def init(self, param: Tensor) -> State:
        return stores.factored(param, self.rank, "m")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        grad = rules.cut_gradient(grad, ctx.rows)
        beta1, beta2 = self.betas
        direction = rules.sign_(factors.ema(state, "m", grad, beta1))
        factors.keep_(state, ctx.rows, m=self.compress(factors.ema(state, "m", grad, beta2), ctx))
        return direction

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        beta1, beta2 = self.betas
        for sweep in sweeps:
            m = Product(sweep.state["m_B"], sweep.state["m_A"], beta1 / (1 - beta1))
            self.compress_(Swept(sweep, beta2), Step("sign", m))

    def can_launch(self, param: Tensor) -> bool:
        return fits(param, min(self.rank, *param.shape)) and self.oversampling == 0

    def launch_(self, batch: Batch) -> None:
        from gossamer.optim.passes import Moment, Passes

        (beta1, beta2), sign = self.betas, batch.sign
        m = Moment(beta1, sign * (1 - beta1), beta2, sign * (1 - beta2))
        self.compress_launch_(batch, Passes(batch, "none", m=m))


@register(
    "mlorc-muon",
    paper=f"{PAPER}; applied to Muon here",
    by_rows=True,
)
@dataclass(frozen=True)
class MLorcMuon(Compression):
    """Muon with a compressed momentum: ours, since the paper claims that its scheme carries over and shows no Muon.

        m = momentum m_Q m_B + (1 - momentum) g
        direction = NewtonSchulz((1 - momentum) g + momentum m)        with nesterov, else NewtonSchulz(m)
        (m_Q, m_B) = RSVD(m)

    At full rank: `muon`, and so `torch.optim.Muon`.

    Deviations: there is nothing to deviate from.
    """

    momentum: float = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Look one step ahead, as `torch.optim.Muon`."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    """How the step depends on the shape, as in `torch.optim.Muon`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("mlorc-muon", "momentum", self.momentum)
        check_choice("mlorc-muon", adjust_lr_fn=(self.adjust_lr_fn, rules.ADJUSTMENTS))

    def init(self, param: Tensor) -> State:
        return stores.factored(param, self.rank, "m")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        return finish(self.parts(grad, state, ctx), ctx.rows)

    def parts(self, grad: Tensor, state: State, ctx: Context) -> Parts:
        grad = rules.cut_gradient(grad, ctx.rows)
        m = factors.ema(state, "m", grad, self.momentum)
        factors.keep_(state, ctx.rows, m=self.compress(m, ctx))
        m = grad.lerp(m, self.momentum) if self.nesterov else m
        return (yield from rules.orthogonalize(m, self.adjust_lr_fn, ctx.rows))
