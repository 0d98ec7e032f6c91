"""Gossamer: follow the momentum by one warm-started subspace iteration a step, in two thin factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from gossamer.errors import UserError
from gossamer.kernels.native import Past, Product, Products, Reading, Step
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
from gossamer.rows import HERE, Parts, Rows, finish

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

    def blend(
        self, state: State, w: Tensor, grad: Tensor, rows: Rows, *, past: float, own: float, mass: float
    ) -> Tensor:
        """`past B A + own g + tail (mass - own) H`, (m, n)."""
        m = torch.addmm(grad, state["m_B"], state["m_A"], beta=own, alpha=past)
        weight = self.tail * (mass - own)
        return m if weight == 0 else m.add_(factors.outside(state["m_B"], w, grad, rows), alpha=weight)

    def follow_(
        self,
        sweep: Sweep,
        w: Tensor,
        *,
        past: float,
        own: float,
        mass: float,
        decay: float,
        step: Callable[[Product], Step],
        second: Second | None = None,
    ) -> None:
        """`blend` and `factors.follow` in two readings of the gradient, on a CPU.

        With C = B^T g, known after the first, and t = tail (mass - own), `blend` over own + t is
        g + [B (past A - t C + t (C W^T) W) - t (g W^T) W] / (own + t).

        Args:
            step: takes what is in front of the g, as a product.
        """
        b, a, tail = sweep.state["m_B"], sweep.state["m_A"], self.tail * (mass - own)
        bound = rules.gradient_bound(sweep.dtype, sweep.grad.numel())
        one = Reading(right=(w.mT, None), left=(b, None), bound=bound)
        found = sweep.read(second.first(one) if second else one)
        inside, known = found.right[0], found.left[0]
        new_b = factors.followed_b(b, a, w, inside, decay)
        thin = torch.cat([past * a - tail * (known - (known @ w.mT) @ w), -tail * w]).div_(own + tail)
        two = Reading(left=(new_b, None), step=step(Product(torch.cat([b, inside], 1), thin)), bound=bound)
        below, v_below = sweep.read(second.last(two, found) if second else two).left
        new_a = factors.followed_a(new_b, b, a, below, decay)
        factors.put_(sweep.state, m=(new_b, new_a), **(second.new(v_below) if second else {}))

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


@register("gossamer", paper=PAPER, by_rows=True)
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
        grad = rules.cut_gradient(grad, ctx.rows)
        beta1, mass = self.betas[0], 1 - self.betas[0] ** ctx.m_step
        w = factors.frame(state, "m", ctx.generator)
        m = self.blend(state, w, grad, ctx.rows, past=beta1, own=1 - beta1, mass=mass).div_(mass)
        new = {"m": factors.follow(state["m_B"], state["m_A"], w, grad, beta1, ctx.rows)}
        v = self._second_moment(grad, state, ctx, new)
        factors.keep_(state, ctx.rows, **new)
        return rules.cut_direction_(rules.adam(m, v, self.eps))

    def _second_moment(self, grad: Tensor, state: State, ctx: Context, new: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The bias-corrected second moment of this step. Advances it, or adds its new factors to `new`."""
        beta2, t, square = self.betas[1], ctx.v_step, grad.square()
        own = (1 - beta2) / (1 - beta2**t)
        past = self._history(state, t - 1, ctx.rows)
        if self.second == "dense":
            state["v"].lerp_(square, 1 - beta2)
        elif self.second == "rows-columns":
            factors.follow_means_(state, "v", square, beta2, ctx.rows)
        else:
            target, decay = (square, beta2) if self.second == "square" else (grad.abs(), beta2**0.5)
            w = factors.frame(state, "v", ctx.generator)
            new["v"] = factors.follow(state["v_B"], state["v_A"], w, target, decay, ctx.rows)
        return past.mul_(1 - own).add_(square, alpha=own)

    def _history(self, state: State, steps: int, rows: Rows = HERE) -> Tensor:
        """The second moment of the `steps` gradients so far, bias-corrected, (m, n); zero before the first."""
        beta2, steps = self.betas[1], max(steps, 1)
        if self.second == "dense":
            return state["v"] / (1 - beta2**steps)
        if self.second == "rows-columns":
            return factors.from_means(state, "v", rows).div_(1 - beta2**steps)
        tracked = factors.product(state, "v")
        if self.second == "square":
            return factors.nonnegative(tracked, rows).div_(1 - beta2**steps)
        return tracked.div_(1 - beta2 ** (steps / 2)).square_()

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        beta1, own = self.betas[0], 1 - self.betas[0]
        for sweep in sweeps:
            mass = 1 - beta1**sweep.context.m_step
            names = ("m", "v") if self.second in ("square", "absolute") else ("m",)
            w, *v_w = factors.frames(sweep.state, names, sweep.context.generator)
            second = Second(self, sweep, *v_w)
            # the direction is gain (m + g) / (sqrt(v + g^2) + eps)
            gain = (own + self.tail * (mass - own)) / mass
            step = partial(Step, "adam", gain=gain * second.spread, eps=self.eps * second.spread)
            self.follow_(sweep, w, past=beta1, own=own, mass=mass, decay=beta1, step=step, second=second)

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
    """The second moment of a step that reads the gradient twice, on a CPU."""

    def __init__(self, method: Gossamer, sweep: Sweep, *w: Tensor) -> None:
        self.kind, self.beta2, self.state = method.second, method.betas[1], sweep.state
        state, ctx = sweep.state, sweep.context
        own, before = (1 - self.beta2) / (1 - self.beta2**ctx.v_step), max(ctx.v_step - 1, 1)
        self.decay = self.beta2**0.5 if self.kind == "absolute" else self.beta2
        # the bias-corrected second moment is own (past history + g^2)
        past = (1 - own) / own / (1 - self.decay**before) ** (2 if self.kind == "absolute" else 1)
        self.spread = own**-0.5
        if self.kind == "rows-columns":
            rows, columns = state["v_rows"], state["v_columns"]
            self.x, self.y = torch.ones_like(columns)[:, None], torch.ones_like(rows)[:, None]
            unit = rows / rows.mean().clamp_min(torch.finfo(rows.dtype).tiny)
            self.past = Past(Product(unit[:, None], columns[None], past), "plain")
        elif self.kind == "dense":
            self.past = state["v"].mul_(past)
        else:
            (self.w,) = w
            self.x, self.y = self.w.mT, None
            if self.kind == "absolute":
                self.past = Past(Product(state["v_B"], state["v_A"], past**0.5), "squared")
            else:
                self.past = Past(Product(state["v_B"], state["v_A"], past), "floored")

    def first(self, reading: Reading) -> Reading:
        """The first reading of the gradient, and what it is to find for this moment."""
        if self.kind == "dense":
            return reading
        reading = replace(reading, right=(reading.right[0], self.x), left=(reading.left[0], self.y))
        if self.kind == "square":  # whose floor is to be known before the last one
            reading = replace(reading, past=self.past)
        return replace(reading, target="magnitude" if self.kind == "absolute" else "square")

    def last(self, reading: Reading, found: Products) -> Reading:
        """The last one, after what the first found."""
        if isinstance(self.past, Past) and found.floor is not None:
            self.past = replace(self.past, floor=found.floor)
        reading, inside = replace(reading, past=self.past), found.right[1]
        if self.kind == "rows-columns":
            self.rows, self.columns = inside[:, 0], found.left[1][0]
        if self.kind in ("rows-columns", "dense"):
            return reading
        self.b = factors.followed_b(self.state["v_B"], self.state["v_A"], self.w, inside, self.decay)
        target = "magnitude" if self.kind == "absolute" else "square"
        return replace(reading, target=target, left=(reading.left[0], self.b))

    def new(self, below: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """New factors to keep; what else there is is kept here."""
        if self.kind == "rows-columns":
            self.state["v_rows"].lerp_(self.rows / len(self.columns), 1 - self.beta2)
            self.state["v_columns"].lerp_(self.columns / len(self.rows), 1 - self.beta2)
            return {}
        if self.kind == "dense":
            self.state["v"].mul_(1 - self.beta2)
            return {}
        return {"v": (self.b, factors.followed_a(self.b, self.state["v_B"], self.state["v_A"], below, self.decay))}


@register("gossamer-lion", paper=PAPER, by_rows=True)
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
        grad = rules.cut_gradient(grad, ctx.rows)
        beta1, beta2 = self.betas
        w = factors.frame(state, "m", ctx.generator)
        mass = 1 - beta1 * beta2 ** (ctx.m_step - 1)
        direction = rules.sign_(self.blend(state, w, grad, ctx.rows, past=beta1, own=1 - beta1, mass=mass))
        factors.keep_(state, ctx.rows, m=factors.follow(state["m_B"], state["m_A"], w, grad, beta2, ctx.rows))
        return direction

    def step_(self, sweeps: Sequence[Sweep]) -> None:
        beta1, beta2 = self.betas
        for sweep in sweeps:
            mass = 1 - beta1 * beta2 ** (sweep.context.m_step - 1)
            (w,) = factors.frames(sweep.state, ("m",), sweep.context.generator)
            self.follow_(sweep, w, past=beta1, own=1 - beta1, mass=mass, decay=beta2, step=partial(Step, "sign"))

    def can_launch(self, param: Tensor) -> bool:
        return fits(param, min(self.rank, *param.shape))

    def launch_(self, batch: Batch) -> None:
        from gossamer.optim.passes import Moment

        (beta1, beta2), sign = self.betas, batch.sign
        m = Moment(beta1, sign * (1 - beta1), beta2, sign * (1 - beta2))
        rest = beta1 * (1 - beta2 ** (batch.counter("m_step") - 1))
        self.follow_launch_(batch, "none", m=m, v=None, rest=rest)


@register("gossamer-muon", paper=PAPER, by_rows=True)
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
        return finish(self.parts(grad, state, ctx), ctx.rows)

    def parts(self, grad: Tensor, state: State, ctx: Context) -> Parts:
        grad, mu = rules.cut_gradient(grad, ctx.rows), self.momentum
        w = factors.frame(state, "m", ctx.generator)
        past, own, mass = mu, 1 - mu, 1 - mu**ctx.m_step
        if self.nesterov:  # (1 - mu) g + mu (past B A + own g)
            past, own, mass = mu * past, (1 - mu) + mu * own, (1 - mu) + mu * mass
        m = self.blend(state, w, grad, ctx.rows, past=past, own=own, mass=mass)
        factors.keep_(state, ctx.rows, m=factors.follow(state["m_B"], state["m_A"], w, grad, mu, ctx.rows))
        return (yield from rules.orthogonalize(m, self.adjust_lr_fn, ctx.rows))
