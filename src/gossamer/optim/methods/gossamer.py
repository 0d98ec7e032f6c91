"""Gossamer: follow the momentum by one warm-started subspace iteration a step, in two thin factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from gossamer.errors import UserError
from gossamer.kernels.product import product
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

if TYPE_CHECKING:
    from gossamer.optim.passes import Moment, Passes

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
        w: Tensor,
        *,
        past: float,
        own: float,
        mass: float,
        decay: float,
        first: Callable[[slice, Tensor], None] | None,
        last: Callable[[slice, Tensor, Tensor], None],
    ) -> tuple[Tensor, Tensor]:
        """`blend` and `factors.follow` in two passes over the gradient, on a CPU. Returns the new factors.

        With C = B^T g, known after the first pass, and t = tail (mass - own), `blend` over own + t is
        g + [B (past A - t C + t (C W^T) W) - t (g W^T) W] / (own + t).

        Args:
            first: sees every tile of the gradient, in the first pass.
            last: takes rows, their gradient, and their `blend` over own + t without g, which it may overwrite.
        """
        b, a, tail = sweep.state["m_B"], sweep.state["m_A"], self.tail * (mass - own)
        bound = rules.gradient_bound(sweep.dtype, sweep.grad.numel())
        r, weight = b.shape[1], own + tail
        both = torch.cat([b, sweep.right(w.mT, bound)], 1)  # B and g W^T, (m, 2r)
        known = sweep.left(b, bound)
        if first is not None:
            for rows, grad in sweep.gradients(bound):
                first(rows, grad)
        new_b = factors.followed_b(b, a, w, both[:, r:], decay)
        new_a = factors.followed_a(new_b, b, a, sweep.left(new_b, bound), decay)
        thin = torch.cat([past * a - tail * (known - product(product(known, w.mT), w)), -tail * w]).div_(weight)
        for rows, grad in sweep.gradients(bound):
            last(rows, grad, product(both[rows], thin))
        return new_b, new_a

    def follow_launch_(
        self, batch: Batch, second: str, *, m: Moment, v: Moment | None, rest: float | Tensor, eps: float = 0.0
    ) -> Passes:
        """`blend` and `factors.follow` of all matrices at once; the weights are written on the way.

        Args:
            rest: the weight (mass - own) that a tail of one would have, over the mass.
        """
        from gossamer.optim.passes import Passes

        tail = None if self.tail == 0 else self.tail * batch.sign * rest
        passes = Passes(batch, second, m=m, v=v, eps=eps, tail=tail)
        b = passes.basis(passes.frames())
        a = passes.project(b, step=True)
        batch.keep_(**{name: (b[name], a[name]) for name in b})
        return passes


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

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        for sweep in sweeps:
            beta1, ctx = self.betas[0], sweep.context
            mass = 1 - beta1**ctx.m_step
            w, second = factors.frame(sweep.state, "m", ctx.generator), Second(self, sweep)
            # the direction is gain (m + g) / (sqrt(v + g^2) + eps)
            spread, weight = second.own**-0.5, 1 - beta1 + self.tail * (mass - (1 - beta1))

            def last(rows: slice, grad: Tensor, m: Tensor) -> None:
                v = second.take(rows, grad)
                reach = max(factors.largest(m), factors.largest(v) ** 0.5)
                sweep.descend_adam(rows, grad, m, v, gain=weight / mass * spread, eps=self.eps * spread, reach=reach)

            new = self.follow_(
                sweep, w, past=beta1, own=1 - beta1, mass=mass, decay=beta1, first=second.see, last=last
            )
            factors.put_(sweep.state, m=new, **second.new())

    def can_launch(self, param: Tensor) -> bool:
        # an eps of nothing would show that the hardware's root flushes tiny numbers to zero
        return fits(param, min(self.rank, *param.shape)) and self.second != "dense" and self.eps > 0

    def launch_(self, batch: Batch) -> None:
        from gossamer.optim.passes import Moment

        (beta1, beta2), sign = self.betas, batch.sign
        mass, t = 1 - beta1 ** batch.counter("m_step"), batch.counter("v_step")
        own, before = (1 - beta2) / (1 - beta2**t), (t - 1).clamp_min(1)
        if self.second == "absolute":
            v = Moment((1 - own) ** 0.5 / (1 - beta2 ** (before / 2)), own, beta2**0.5, 1 - beta2**0.5)
        else:
            v = Moment((1 - own) / (1 - beta2**before), own, beta2, 1 - beta2**t)
        m = Moment(beta1 / mass, sign * (1 - beta1) / mass, beta1, sign * (1 - beta1))
        passes = self.follow_launch_(batch, self.second, m=m, v=v, rest=1 - (1 - beta1) / mass, eps=self.eps)
        if self.second == "rows-columns":
            passes.follow_means_(beta2)

    def moments(self, param: Tensor, state: State, m_step: int, v_step: int) -> State:
        """What the state stands for after that many steps, bias-corrected: estimates of E g and E g^2."""
        m = factors.product(state, "m").div_(1 - self.betas[0] ** m_step)
        return {"m": m, "v": self._history(state, v_step)}


class Second:
    """The second moment of a step that sees the gradient twice, some rows at a time, on a CPU."""

    def __init__(self, method: Gossamer, sweep: Sweep) -> None:
        self.method, self.sweep, self.state, self.kind = method, sweep, sweep.state, method.second
        ctx, beta2, state = sweep.context, method.betas[1], sweep.state
        self.own, before = (1 - beta2) / (1 - beta2**ctx.v_step), max(ctx.v_step - 1, 1)
        decay = beta2**0.5 if self.kind == "absolute" else beta2
        past = (1 - self.own) / self.own / (1 - decay**before) ** (2 if self.kind == "absolute" else 1)
        self.past = past
        """The bias-corrected second moment is own (past history + g^2)."""
        if self.kind == "rows-columns":
            self.rows, self.columns = (torch.zeros_like(state[key]) for key in ("v_rows", "v_columns"))
            mean = state["v_rows"].mean().clamp_min(torch.finfo(sweep.dtype).tiny)
            self.scaled = state["v_rows"] / mean * past
        elif self.kind != "dense":
            self.b, self.a, self.decay = state["v_B"], state["v_A"], decay
            self.w = factors.frame(state, "v", ctx.generator)
            self.inside, self.below = torch.empty_like(self.b), torch.zeros_like(self.a)
            self.new_b: Tensor | None = None
            self.floor = factors.Floor(self.w)

    def see(self, rows: slice, grad: Tensor) -> None:
        """The first time; `grad` is kept."""
        if self.kind == "dense":
            return
        target = self._target(grad)
        if self.kind == "rows-columns":
            self.rows[rows] = target.mean(1)
            self.columns += target.sum(0)
            return
        self.inside[rows] = product(target, self.w.mT)
        if self.kind == "square":
            self.floor.see(product(self.b[rows], self.a))

    def take(self, rows: slice, grad: Tensor) -> Tensor:
        """The second time: `past history` of these rows. `grad` is kept."""
        if self.kind == "rows-columns":
            return torch.outer(self.scaled[rows], self.state["v_columns"])
        if self.kind == "dense":
            v = self.state["v"][rows]
            history = v * self.past
            v.mul_(self.method.betas[1]).addcmul_(grad, grad, value=1 - self.method.betas[1])
            return history
        if self.new_b is None:
            self.new_b = factors.followed_b(self.b, self.a, self.w, self.inside, self.decay)
        self.below += product(self.new_b[rows].mT, self._target(grad))
        history = product(self.b[rows], self.a)
        if self.kind == "absolute":
            return history.square_().mul_(self.past)
        return torch.where(history < 0, self.floor.mean(), history).mul_(self.past)

    def new(self) -> dict[str, tuple[Tensor, Tensor]]:
        """New factors to keep; means are kept here."""
        if self.kind == "rows-columns":
            weight = 1 - self.method.betas[1]
            self.state["v_rows"].lerp_(self.rows, weight)
            self.state["v_columns"].lerp_(self.columns / len(self.rows), weight)
        if self.kind not in ("square", "absolute"):
            return {}
        assert self.new_b is not None
        return {"v": (self.new_b, factors.followed_a(self.new_b, self.b, self.a, self.below, self.decay))}

    def _target(self, grad: Tensor) -> Tensor:
        return grad.abs() if self.kind == "absolute" else grad.square()


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

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        beta1, beta2 = self.betas
        for sweep in sweeps:
            mass = 1 - beta1 * beta2 ** (sweep.context.m_step - 1)

            def last(rows: slice, grad: Tensor, m: Tensor) -> None:
                sweep.descend(rows, m.add_(grad).sign_())

            w = factors.frame(sweep.state, "m", sweep.context.generator)
            new = self.follow_(sweep, w, past=beta1, own=1 - beta1, mass=mass, decay=beta2, first=None, last=last)
            factors.put_(sweep.state, m=new)

    def can_launch(self, param: Tensor) -> bool:
        return fits(param, min(self.rank, *param.shape))

    def launch_(self, batch: Batch) -> None:
        from gossamer.optim.passes import Moment

        (beta1, beta2), sign = self.betas, batch.sign
        m = Moment(beta1, sign * (1 - beta1), beta2, sign * (1 - beta2))
        rest = beta1 * (1 - beta2 ** (batch.counter("m_step") - 1))
        self.follow_launch_(batch, "none", m=m, v=None, rest=rest)


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
