"""Gossamer: follow the momentum by one warm-started subspace iteration a step, in two thin factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import UserError
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

PAPER = "this project, docs/methods/gossamer.md"
SECOND = ("rows-columns", "square", "absolute", "dense")


@dataclass(frozen=True, kw_only=True)
class Tracker:
    """What the three rules share: a first moment M = B A that follows its exact average.

        W  = orth(A^T)^T                                           (a random frame before the first step)
        B' = orth(decay B (A W^T) + (1 - decay) g W^T)
        A' = decay (B'^T B) A + (1 - decay) B'^T g

    What a step uses is `past M + own g + tail (mass - own) H`, where H is the part of g outside B and W, of which M
    remembers nothing: a dense momentum would hold it with weight mass - own if it stayed the same.
    """

    rank: int = 128
    """Columns of B and rows of A."""
    tail: float = 1.0
    """Weight, in [0, 1], of the gradient outside the subspace: 0 leaves it the weight of a single step."""

    def __post_init__(self) -> None:
        name = entry_of(self).name
        check_rank(name, self.rank)
        if not 0.0 <= self.tail <= 1.0:
            raise UserError(f"{name}: tail is {self.tail}; allowed: 0 <= tail <= 1")

    def blend(self, state: State, w: Tensor, grad: Tensor, *, past: float, own: float, mass: float) -> Tensor:
        """`past B A + own g + tail (mass - own) H`, (m, n)."""
        m = torch.addmm(grad, state["m_B"], state["m_A"], beta=own, alpha=past)
        weight = self.tail * (mass - own)
        return m if weight == 0 else m.add_(factors.outside(state["m_B"], w, grad), alpha=weight)

    def follow_(
        self,
        sweep: Sweep,
        state: State,
        w: Tensor,
        *,
        past: float,
        own: float,
        mass: float,
        decay: float,
        first: Callable[[slice, Tensor], None],
        between: Callable[[], None],
        last: Callable[[slice, Tensor, Tensor], None],
    ) -> tuple[Tensor, Tensor]:
        """`blend` and `factors.follow` in two passes over the gradient. Returns the new factors.

        With C = B^T g, known after the first pass, `blend` is
        (own + t) g + B (past A - t C + t (C W^T) W) - t (g W^T) W,    t = tail (mass - own).

        Args:
            first: sees every tile of the gradient. between: called after the first pass.
            last: takes rows, their gradient and their momentum; it may overwrite both.
        """
        b, a, tail = state["m_B"], state["m_A"], self.tail * (mass - own)
        bound = rules.gradient_bound(sweep.dtype, b.shape[0] * a.shape[1])
        follow, known = factors.Follow(b, a, w, decay), torch.zeros_like(a)
        for rows, grad in sweep.tiles(bound):
            follow.see(rows, grad)
            known.addmm_(b[rows].mT, grad)
            first(rows, grad)
        between()
        follow.turn()
        thin = past * a - tail * (known - (known @ w.mT) @ w)
        for rows, grad in sweep.tiles(bound):
            follow.see_again(rows, grad)
            m = torch.addmm(grad, b[rows], thin, beta=own + tail, out=sweep.buffer("m", rows))
            last(rows, grad, m.addmm_(follow.inside[rows], w, alpha=-tail))
        return follow.factors()


@register("gossamer", paper=PAPER, quick={"lr": 4e-4, "rank": 32})
@dataclass(frozen=True)
class Gossamer(Tracker):
    """AdamW whose first moment follows the exact average in two thin factors.

        m = [beta1 B A + (1 - beta1) g + tail (c - (1 - beta1)) H] / c,   c = 1 - beta1^t
        direction = m / (sqrt(v) + eps), then B, A follow g

    The second moment v, bias-corrected, is held in one of four ways (`second`), always with this gradient's own
    square at full resolution, weight a = (1 - beta2) / (1 - beta2^t), beside the history:

        rows-columns   row and column means of g^2, r c / mean(r)                                  m + n numbers
        square         B A follows g^2, negative entries replaced by their mean magnitude          r (m + n)
        absolute       B A follows |g| with decay sqrt(beta2), and is squared                      r (m + n)
        dense          as AdamW                                                                    m n

    Source: `docs/methods/gossamer.md` has the derivation. At full rank, with "dense" or "square": AdamW
    (`test_full_rank_is_the_parent`).

    Deviations: none, it is ours. "absolute" estimates (E|g|)^2, which is less than E g^2.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    second: Literal["rows-columns", "square", "absolute", "dense"] = "rows-columns"
    """How the second moment is held."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adam("gossamer", self.betas, self.eps)
        check_choice("gossamer", second=(self.second, SECOND))

    def init(self, param: Tensor) -> State:
        state = stores.factored(param, self.rank, "m")
        if self.second == "dense":
            return state | stores.dense(param, "v")
        if self.second == "rows-columns":
            return state | factors.means(param, "v")
        return state | stores.factored(param, self.rank, "v")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        grad = rules.cut_gradient(grad)
        beta1, mass = self.betas[0], 1 - self.betas[0] ** ctx.m_step
        w = factors.frame(state, "m", ctx.generator)
        m = self.blend(state, w, grad, past=beta1, own=1 - beta1, mass=mass).div_(mass)
        new = {"m": factors.follow(state["m_B"], state["m_A"], w, grad, beta1)}
        v = self._second_moment(grad, state, ctx, new)
        factors.keep_(state, **new)
        return rules.cut_direction_(rules.adam(m, v, self.eps))

    def _second_moment(self, grad: Tensor, state: State, ctx: Context, new: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The bias-corrected second moment of this step. Advances it, or adds its new factors to `new`."""
        beta2, t, square = self.betas[1], ctx.v_step, grad.square()
        own = (1 - beta2) / (1 - beta2**t)
        past = self._history(state, t - 1)
        if self.second == "dense":
            state["v"].lerp_(square, 1 - beta2)
        elif self.second == "rows-columns":
            factors.follow_means_(state, "v", square, beta2)
        else:
            target, decay = (square, beta2) if self.second == "square" else (grad.abs(), beta2**0.5)
            w = factors.frame(state, "v", ctx.generator)
            new["v"] = factors.follow(state["v_B"], state["v_A"], w, target, decay)
        return past.mul_(1 - own).add_(square, alpha=own)

    def _history(self, state: State, steps: int) -> Tensor:
        """The second moment of the `steps` gradients so far, bias-corrected, (m, n); zero before the first."""
        beta2, steps = self.betas[1], max(steps, 1)
        if self.second == "dense":
            return state["v"] / (1 - beta2**steps)
        if self.second == "rows-columns":
            return factors.from_means(state, "v").div_(1 - beta2**steps)
        tracked = factors.product(state, "v")
        if self.second == "square":
            return factors.nonnegative(tracked).div_(1 - beta2**steps)
        return tracked.div_(1 - beta2 ** (steps / 2)).square_()

    def step_(self, sweep: Sweep, state: State, ctx: Context) -> None:
        beta1, mass = self.betas[0], 1 - self.betas[0] ** ctx.m_step
        w = factors.frame(state, "m", ctx.generator)
        second = Second(self, sweep, state, ctx)

        def last(rows: slice, grad: Tensor, m: Tensor) -> None:
            v = second.take(rows, grad)
            sweep.descend(rows, rules.cut_direction_(rules.adam(m.div_(mass), v, self.eps)))

        new = {
            "m": self.follow_(
                sweep,
                state,
                w,
                past=beta1,
                own=1 - beta1,
                mass=mass,
                decay=beta1,
                first=second.see,
                between=second.turn,
                last=last,
            )
        }
        factors.keep_(state, **new, **second.new())

    def moments(self, param: Tensor, state: State, m_step: int, v_step: int) -> State:
        """What the state stands for after that many steps, bias-corrected: estimates of E g and E g^2."""
        m = factors.product(state, "m").div_(1 - self.betas[0] ** m_step)
        return {"m": m, "v": self._history(state, v_step)}


class Second:
    """The second moment of a step that sees the gradient twice, some rows at a time."""

    def __init__(self, method: Gossamer, sweep: Sweep, state: State, ctx: Context) -> None:
        self.method, self.sweep, self.state, self.ctx = method, sweep, state, ctx
        beta2, t = method.betas[1], ctx.v_step
        self.own, self.past_mass = (1 - beta2) / (1 - beta2**t), 1 - beta2 ** max(t - 1, 1)
        self.kind = method.second
        if self.kind == "rows-columns":
            self.rows, self.columns = (torch.zeros_like(state[key]) for key in ("v_rows", "v_columns"))
            mean = state["v_rows"].mean().clamp_min(torch.finfo(sweep.dtype).tiny)
            self.scaled = state["v_rows"] / mean
        elif self.kind != "dense":
            w, decay = factors.frame(state, "v", ctx.generator), beta2 if self.kind == "square" else beta2**0.5
            self.follow = factors.Follow(state["v_B"], state["v_A"], w, decay)
            self.negative = factors.Floor(w)

    def see(self, rows: slice, grad: Tensor) -> None:
        """The first time; `grad` is kept."""
        if self.kind == "dense":
            return
        target = self._target(rows, grad)
        if self.kind == "rows-columns":
            self.rows[rows] = target.mean(1)
            self.columns += target.sum(0)
            return
        self.follow.see(rows, target)
        if self.kind == "square":
            self.negative.see(torch.mm(self.state["v_B"][rows], self.state["v_A"], out=target))

    def turn(self) -> None:
        if self.kind in ("square", "absolute"):
            self.follow.turn()
            self.floor = self.negative.mean()

    def take(self, rows: slice, grad: Tensor) -> Tensor:
        """The second time: the bias-corrected second moment of these rows, a buffer. Overwrites `grad`."""
        past = self.sweep.buffer("v", rows)
        if self.kind == "rows-columns":
            torch.outer(self.scaled[rows], self.state["v_columns"], out=past).div_(self.past_mass)
        elif self.kind == "dense":
            v = self.state["v"][rows]
            torch.div(v, self.past_mass, out=past)
            v.mul_(self.method.betas[1]).addcmul_(grad, grad, value=1 - self.method.betas[1])
        else:
            torch.mm(self.state["v_B"][rows], self.state["v_A"], out=past)
            self.follow.see_again(rows, self._target(rows, grad))
            if self.kind == "square":
                torch.where(past < 0, self.floor, past, out=past).div_(self.past_mass)
            else:
                past.div_(1 - self.method.betas[1] ** (max(self.ctx.v_step - 1, 1) / 2)).square_()
        return past.mul_(1 - self.own).add_(grad.square_(), alpha=self.own)

    def new(self) -> dict[str, tuple[Tensor, Tensor]]:
        """New factors to keep; means are kept here."""
        if self.kind == "rows-columns":
            weight = 1 - self.method.betas[1]
            self.state["v_rows"].lerp_(self.rows, weight)
            self.state["v_columns"].lerp_(self.columns / len(self.rows), weight)
        return {"v": self.follow.factors()} if self.kind in ("square", "absolute") else {}

    def _target(self, rows: slice, grad: Tensor) -> Tensor:
        out = self.sweep.buffer("target", rows)
        return torch.abs(grad, out=out) if self.kind == "absolute" else torch.square(grad, out=out)


@register("gossamer-lion", paper=PAPER, quick={"lr": 2e-4, "rank": 32})
@dataclass(frozen=True)
class GossamerLion(Tracker):
    """Lion whose momentum follows the exact average in two thin factors.

        direction = sign(beta1 B A + (1 - beta1) g + tail beta1 (1 - beta2^(t-1)) H), then B, A follow g with beta2

    Source: `docs/methods/gossamer.md`. At full rank: Lion.

    Deviations: none, it is ours.
    """

    betas: tuple[float, float] = (0.9, 0.99)
    """Weight of the momentum in the step, and its decay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adam("gossamer-lion", self.betas, 0.0)

    def init(self, param: Tensor) -> State:
        return stores.factored(param, self.rank, "m")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        grad = rules.cut_gradient(grad)
        beta1, beta2 = self.betas
        w = factors.frame(state, "m", ctx.generator)
        mass = 1 - beta1 * beta2 ** (ctx.m_step - 1)
        direction = self.blend(state, w, grad, past=beta1, own=1 - beta1, mass=mass).sign_()
        factors.keep_(state, m=factors.follow(state["m_B"], state["m_A"], w, grad, beta2))
        return direction

    def step_(self, sweep: Sweep, state: State, ctx: Context) -> None:
        beta1, beta2 = self.betas
        new = self.follow_(
            sweep,
            state,
            factors.frame(state, "m", ctx.generator),
            past=beta1,
            own=1 - beta1,
            mass=1 - beta1 * beta2 ** (ctx.m_step - 1),
            decay=beta2,
            first=lambda rows, grad: None,
            between=lambda: None,
            last=lambda rows, grad, m: sweep.descend(rows, m.sign_()),
        )
        factors.keep_(state, m=new)


@register("gossamer-muon", paper=PAPER, quick={"lr": 5e-3, "rank": 32})
@dataclass(frozen=True)
class GossamerMuon(Tracker):
    """Muon whose momentum follows the exact average in two thin factors.

        m = momentum B A + (1 - momentum) g
        direction = NewtonSchulz((1 - momentum) g + momentum m + tail ... H), then B, A follow g

    Source: `docs/methods/gossamer.md`. At full rank: `muon`, and so `torch.optim.Muon`.

    Deviations: none, it is ours.
    """

    momentum: float = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Look one step ahead, as `torch.optim.Muon`."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    """How the step depends on the shape, as in `torch.optim.Muon`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_decay("gossamer-muon", "momentum", self.momentum)
        check_choice("gossamer-muon", adjust_lr_fn=(self.adjust_lr_fn, rules.ADJUSTMENTS))

    def init(self, param: Tensor) -> State:
        return stores.factored(param, self.rank, "m")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        grad, mu = rules.cut_gradient(grad), self.momentum
        w = factors.frame(state, "m", ctx.generator)
        past, own, mass = mu, 1 - mu, 1 - mu**ctx.m_step
        if self.nesterov:  # (1 - mu) g + mu (past B A + own g)
            past, own, mass = mu * past, (1 - mu) + mu * own, (1 - mu) + mu * mass
        m = self.blend(state, w, grad, past=past, own=own, mass=mass)
        factors.keep_(state, m=factors.follow(state["m_B"], state["m_A"], w, grad, mu))
        return rules.orthogonalize(m, self.adjust_lr_fn)
