"""MLorc: keep the momentum itself as a truncated SVD, re-made by a randomized SVD at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import UserError
from gossamer.linalg import cut_rank, orthonormalize, randomized_svd
from gossamer.optim import factors, rules, stores
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

Tiles = Iterator[tuple[slice, Tensor, dict[str, Tensor]]]
"""Rows, their gradient, and the same rows of each moment, by name."""

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
        )

    def compress_(
        self,
        sweep: Sweep,
        state: State,
        ctx: Context,
        tiles: Callable[[], Tiles],
        last: Callable[[slice, Tensor, dict[str, Tensor]], None],
    ) -> None:
        """`compress` of all moments at once, some rows at a time, and kept. `last` may overwrite what it is given."""
        names = [key.removesuffix("_B") for key in state if key.endswith("_B")]
        (m, n), width = sweep.shape, min(self.rank + self.oversampling, *sweep.shape)
        like = {"dtype": sweep.dtype, "device": ctx.param.device}

        def through(frame: dict[str, Tensor]) -> dict[str, Tensor]:  # orth(M frame)
            y = {name: torch.empty(m, width, **like) for name in names}
            for rows, _, moments in tiles():
                for name in names:
                    torch.mm(moments[name], frame[name], out=y[name][rows])
            return {name: orthonormalize(y[name]) for name in names}

        q = through({name: torch.randn(width, n, **like, generator=ctx.generator).mT for name in names})
        for _ in range(self.power_iterations):
            z = {name: torch.zeros(n, width, **like) for name in names}
            for rows, _, moments in tiles():
                for name in names:
                    z[name].addmm_(moments[name].mT, q[name][rows])
            q = through({name: orthonormalize(z[name]) for name in names})
        b = {name: torch.zeros(width, n, **like) for name in names}
        for rows, grad, moments in tiles():
            for name in names:
                b[name].addmm_(q[name][rows].mT, moments[name])
            last(rows, grad, moments)
        factors.keep_(state, **{name: cut_rank(q[name], b[name], self.rank) for name in names})


@register("mlorc", paper=PAPER, quick={"lr": 4e-4, "rank": 32, "power_iterations": 1, "betas": (0.9, 0.95)})
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
        grad = rules.cut_gradient(grad)
        beta1, beta2 = self.betas
        m = factors.ema(state, "m", grad, beta1)
        v = factors.nonnegative(factors.product(state, "v")).lerp_(grad.square(), 1 - beta2)
        factors.keep_(state, m=self.compress(m, ctx), v=self.compress(v, ctx))
        direction = rules.adam(m / (1 - beta1**ctx.m_step), v / (1 - beta2**ctx.v_step), self.eps)
        return rules.cut_direction_(direction)

    def step_(self, sweep: Sweep, state: State, ctx: Context) -> None:
        beta1, beta2 = self.betas
        m_b, m_a, v_b, v_a = (state[key] for key in ("m_B", "m_A", "v_B", "v_A"))
        negative = factors.Floor(v_b)
        for rows in sweep.rows():
            negative.see(torch.mm(v_b[rows], v_a, out=sweep.buffer("v", rows)))
        floor = negative.mean()

        def tiles() -> Tiles:
            for rows, grad in sweep.tiles(rules.gradient_bound(sweep.dtype, m_b.shape[0] * m_a.shape[1])):
                m = torch.addmm(grad, m_b[rows], m_a, beta=1 - beta1, alpha=beta1, out=sweep.buffer("m", rows))
                v = torch.mm(v_b[rows], v_a, out=sweep.buffer("v", rows))
                torch.where(v < 0, floor, v, out=v).lerp_(grad.square_(), 1 - beta2)
                yield rows, grad, {"m": m, "v": v}

        def last(rows: slice, grad: Tensor, moments: dict[str, Tensor]) -> None:
            m, v = moments["m"].div_(1 - beta1**ctx.m_step), moments["v"].div_(1 - beta2**ctx.v_step)
            sweep.descend(rows, rules.cut_direction_(rules.adam(m, v, self.eps)))

        self.compress_(sweep, state, ctx, tiles, last)

    def moments(self, param: Tensor, state: State, m_step: int, v_step: int) -> State:
        """What the factors stand for, bias-corrected: estimates of E g and E g^2."""
        m, v = factors.product(state, "m"), factors.nonnegative(factors.product(state, "v"))
        return {"m": m / (1 - self.betas[0] ** m_step), "v": v / (1 - self.betas[1] ** v_step)}


@register("mlorc-lion", paper=PAPER, quick={"lr": 2e-4, "rank": 32, "power_iterations": 1})
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
        grad = rules.cut_gradient(grad)
        beta1, beta2 = self.betas
        direction = factors.ema(state, "m", grad, beta1).sign_()
        factors.keep_(state, m=self.compress(factors.ema(state, "m", grad, beta2), ctx))
        return direction

    def step_(self, sweep: Sweep, state: State, ctx: Context) -> None:
        beta1, beta2 = self.betas
        b, a = state["m_B"], state["m_A"]

        def tiles() -> Tiles:
            for rows, grad in sweep.tiles(rules.gradient_bound(sweep.dtype, b.shape[0] * a.shape[1])):
                m = torch.addmm(grad, b[rows], a, beta=1 - beta2, alpha=beta2, out=sweep.buffer("m", rows))
                yield rows, grad, {"m": m}

        def last(rows: slice, grad: Tensor, moments: dict[str, Tensor]) -> None:
            sweep.descend(rows, grad.addmm_(b[rows], a, beta=1 - beta1, alpha=beta1).sign_())

        self.compress_(sweep, state, ctx, tiles, last)


@register("mlorc-muon", paper=f"{PAPER}; applied to Muon here", quick={"lr": 5e-3, "rank": 32, "power_iterations": 1})
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
        grad = rules.cut_gradient(grad)
        m = factors.ema(state, "m", grad, self.momentum)
        factors.keep_(state, m=self.compress(m, ctx))
        return rules.orthogonalize(grad.lerp(m, self.momentum) if self.nesterov else m, self.adjust_lr_fn)
