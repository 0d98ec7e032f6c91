"""A step that takes a matrix some rows at a time, so that nothing of the weight's size is ever made.

A method that can do so offers, beside `update`, its readable reference, a fused twin:

    def step_(self, sweeps):
        for sweep in sweeps:                                 # matrices of one shape
            found = sweep.read(Reading(...))                 # thin products with the gradient, and the step
            ...                                              # the state's thin factors are advanced by them

It advances each `sweep.state` as `update` does, and steps the weight once. It may read the gradient as often as it
likes. It gets all matrices of a shape at once, so that factorisations of small matrices can be done for all of them in
one call. What no `Reading` says is done in a loop over `sweep.gradients()`, rows and their gradient, and handed to one
of the `descend` functions.

This is how a step runs on a CPU, where looking at a number waits for nothing: the gradient's largest entry decides
whether guards against overflow are needed at all. A reading runs in tiles of rows, with Adam's rule as one pass of
torch's own fused AdamW over a tile in the cache; or, where it was built, by the compiled sweep of `kernels.native`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, threshold_

from gossamer.kernels import native
from gossamer.kernels.adam_step import adam_step
from gossamer.kernels.native import Past, Product, Products, Reading, Step
from gossamer.kernels.product import product
from gossamer.optim import factors, rules
from gossamer.optim.contract import Context, State
from gossamer.optim.rounding import write_

SMALLEST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074}
"""The smallest positive number of each arithmetic dtype."""
TILE = 3 << 17
"""Entries of a tile on a CPU: 1.5 MiB of fp32, of which a step holds two beside the weight and the gradient."""


class Scratch:
    """Buffers of at most a tile, made once and used by every matrix in turn."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor of this shape. It is valid until the name is taken again."""
        size = shape[0] * shape[1]
        buffer = self._buffers.get((name, dtype, device))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype, device] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)


@dataclass(frozen=True)
class Write:
    """How a direction becomes a change of the weight: decay, the step, and the rounding of a narrow one."""

    weight: Tensor
    """What is written to."""
    lr: float | Tensor
    weight_decay: float
    rounding: str
    generator: torch.Generator

    @property
    def decay(self) -> float:
        """What the weight is multiplied by before the step, on a CPU."""
        return 1 - float(self.lr) * self.weight_decay

    def descend(self, rows: slice, direction: Tensor) -> None:
        part = self.weight[rows] if self.weight.ndim else self.weight
        target = part if part.dtype is direction.dtype else part.to(direction.dtype)
        if self.weight_decay != 0:
            target.mul_(1 - self.lr * self.weight_decay)
        if isinstance(self.lr, Tensor):
            target.sub_(direction * self.lr)
        else:
            target.sub_(direction, alpha=self.lr)
        if target is not part:
            write_(part, target, self.rounding, self.generator)


@dataclass
class Sweep:
    """One matrix: its gradient in tiles of rows, its state, and where the directions of those rows go.

    Args:
        grad: (m, n), of any floating dtype.
        dtype: of the arithmetic; what `buffer` gives.
        negate: whether to climb.
        write: takes rows and their direction.
        scratch: shared by all matrices.
        seen: (m, n) or None: where directions are put down for those who look.
    """

    grad: Tensor
    state: State
    context: Context
    dtype: torch.dtype
    negate: bool
    write: Write
    scratch: Scratch
    seen: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.grad.shape[0], self.grad.shape[1]

    def rows(self) -> Iterator[slice]:
        """Consecutive slices of rows of about equal height, at most a tile each."""
        m, n = self.shape
        tiles = min(m, -(-m * n // TILE))
        edges = [m * i // tiles for i in range(tiles + 1)]
        return map(slice, edges, edges[1:])

    def gradients(self, bound: float = torch.inf) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their gradient in the arithmetic dtype, cut to [-bound, bound].

        Only to be read: it may be the gradient itself.
        """
        plain = self._is_plain(bound)
        for rows in self.rows():
            tile = self.grad[rows]
            if not plain or self.negate:
                tile = self.buffer("gradient", rows).copy_(tile).clamp_(-bound, bound)
            yield rows, tile.neg_() if self.negate else tile

    def right(self, x: Tensor, bound: float = torch.inf) -> Tensor:
        """`G x`, (m, k), of the gradient cut to [-bound, bound]."""
        if self._is_plain(bound):
            return product(self.grad, -x if self.negate else x)
        out = x.new_empty(self.shape[0], x.shape[1])
        for rows, grad in self.gradients(bound):
            out[rows] = product(grad, x)
        return out

    def left(self, y: Tensor, bound: float = torch.inf) -> Tensor:
        """`y^T G`, (k, n), of the gradient cut to [-bound, bound]."""
        if self._is_plain(bound):
            return product(-y.mT if self.negate else y.mT, self.grad)
        out = y.new_zeros(y.shape[1], self.shape[1])
        for rows, grad in self.gradients(bound):
            out += product(y[rows].mT, grad)
        return out

    def _is_plain(self, bound: float) -> bool:
        """Whether the gradient can be read as it is, but for its sign."""
        inside = bound == torch.inf or self.largest <= bound
        return inside and self.grad.dtype is self.dtype and self.grad.is_contiguous()

    @cached_property
    def largest(self) -> float:
        """The largest magnitude in the gradient; NaN if there is a NaN."""
        return factors.largest(self.grad)

    def read(self, reading: Reading) -> Products:
        """Do what the reading says."""
        if self._is_compiled() and not isinstance(reading.past, Tensor) and (reading.step is None or self._is_own()):
            write = self.write
            return native.sweep(self.grad, write.weight, reading, float(write.lr), write.decay, self._numbers)
        return self._read_by_rows(reading)

    def _is_compiled(self) -> bool:
        """Whether the compiled sweep can take the gradient as it is."""
        fits = self.dtype is self.grad.dtype is torch.float32 and self.grad.device.type == "cpu" and not self.negate
        return fits and self.grad.is_contiguous() and native.library() is not None

    def _is_own(self) -> bool:
        """Whether the weight can be written in place, and nobody looks."""
        return self.seen is None and self.write.weight.dtype is self.dtype and self.write.weight.is_contiguous()

    def _is_calm(self, step: Step, past: Past | Tensor | None) -> bool:
        """Whether no guard against overflow would touch a direction."""
        reach = _reach(step.m)
        if isinstance(past, Tensor):
            reach = max(reach, factors.largest(past) ** 0.5)
        elif past is not None:
            root = _reach(past.product)
            reach = max(reach, root if past.kind == "squared" else root**0.5)
        size, most = self.largest + reach, torch.finfo(self.dtype).max ** 0.5
        if step.rule == "sign":
            return size <= most
        inside = size <= most / 4 and size * step.gain <= step.eps * most
        return inside and step.gain > 0 and float(self.write.lr) > 0

    def _numbers(self, count: int) -> Tensor:
        return self.scratch.take("sweep", (1, count), self.dtype, self.grad.device)

    def _read_by_rows(self, reading: Reading) -> Products:
        (x, target_x), (y, target_y) = reading.right, reading.left
        target, past, step, bound = reading.target, reading.past, reading.step, reading.bound
        calm = step is None or self._is_calm(step, past)
        find = isinstance(past, Past) and past.kind == "floored" and past.floor is None
        right = None if x is None else self.right(x, bound)
        left = None if y is None else self.left(y, bound)
        target_right = None if target_x is None else target_x.new_empty(self.shape[0], target_x.shape[1])
        target_left = None if target_y is None else target_y.new_zeros(target_y.shape[1], self.shape[1])
        below = _Below(target_x, target_right if target == "second" else None) if find else None

        def project(rows: slice, tile: Tensor) -> None:
            if target_x is not None and target_right is not None:
                target_right[rows] = product(tile, target_x)
            if target_y is not None and target_left is not None:
                target_left.add_(product(target_y[rows].mT, tile))

        adam = step is not None and step.rule == "adam"

        def take(rows: slice, grad: Tensor) -> None:
            if target in ("magnitude", "square"):
                project(rows, grad.abs() if target == "magnitude" else grad.square())
            if step is not None and not adam:
                self.descend(rows, rules.sign_(_rows_of(step.m, rows).add_(grad)))
            if adam or target == "second" or below is not None:
                v = self._past(rows, past)
                if below is not None:
                    below.take_(rows, v)
                if step is not None and adam:
                    self._step(rows, grad, _rows_of(step.m, rows), v, step, calm)
                elif target == "second":
                    v.addcmul_(grad, grad)
                if target == "second":
                    project(rows, v)

        for rows, grad in self.gradients(bound) if target is not None or step is not None else ():
            take(rows, grad)  # a call, so that one tile's temporaries are gone when the next one's are made
        if adam:  # it left halves of H + g^2
            for half in (past, *((target_right, target_left) if target == "second" else ())):
                if isinstance(half, Tensor):
                    half.mul_(2)
        return Products((right, target_right), (left, target_left), below.floor_(target_right) if below else None)

    def _past(self, rows: slice, past: Past | Tensor | None) -> Tensor:
        """These rows of the remembered second moment, to be written to."""
        if isinstance(past, Tensor):
            return past[rows]
        assert past is not None
        tile = _rows_of(past.product, rows)
        if past.kind == "squared":
            tile.square_()
        elif past.floor is not None:  # what is not above minus the smallest number is negative
            threshold_(tile, -SMALLEST[self.dtype], past.floor)
        return tile

    def whole(self, bound: float = torch.inf) -> Tensor:
        """The gradient as `gradients` gives it, all rows at once: for a reference, and for a refresh of a projector."""
        whole = self.grad.to(self.dtype)
        if bound < torch.inf:
            whole = whole.clamp(-bound, bound)
        return whole.neg() if self.negate else whole

    def buffer(self, name: str, rows: slice) -> Tensor:
        """An uninitialised tensor of the shape of these rows, valid until the name is asked for again."""
        shape = rows.stop - rows.start, self.shape[1]
        return self.scratch.take(name, shape, self.dtype, self.grad.device)

    def descend(self, rows: slice, direction: Tensor) -> None:
        """Write these rows of the weight."""
        if self.seen is not None:
            self.seen[rows] = direction
        self.write.descend(rows, direction)

    def descend_sum(
        self, pair: tuple[Tensor, Tensor] | None, along: Tensor | None = None, bound: float = torch.inf
    ) -> None:
        """Descend `left right + along * G`, all rows at once, without making it.

        Args:
            pair: left (m, k) and right (k, n), or None for no product.
            along: broadcasts over the weight; None leaves the gradient out.
            bound: cuts the gradient.
        """
        weight, lr = self.write.weight, float(self.write.lr)
        own = weight.dtype is self.dtype and (along is None or self._is_plain(bound))
        if not own or self.seen is not None:
            self._descend_sum_by_rows(pair, along, bound, write=not own)
        if not own:
            return
        if pair is not None:
            weight.addmm_(*pair, beta=self.write.decay, alpha=-lr)
        elif self.write.decay != 1:
            weight.mul_(self.write.decay)
        if along is not None:
            weight.addcmul_(self.grad, along, value=lr if self.negate else -lr)

    def _descend_sum_by_rows(
        self, pair: tuple[Tensor, Tensor] | None, along: Tensor | None, bound: float, write: bool
    ) -> None:
        spread = None if along is None else along.expand(self.shape)
        for rows, grad in self.gradients(bound):
            direction = torch.zeros_like(grad) if pair is None else product(pair[0][rows], pair[1])
            if spread is not None:
                direction.addcmul_(grad, spread[rows])
            if self.seen is not None:
                self.seen[rows] = direction
            if write:
                self.write.descend(rows, direction)

    def _step(self, rows: slice, grad: Tensor, m: Tensor, v: Tensor, step: Step, calm: bool) -> None:
        """Adam's rule for these rows. Leaves (m + g) / 2 in m and (v + g^2) / 2 in v."""
        if not calm:
            self.descend(rows, self._adam_direction(rows, grad, m, v, step))
            return
        if self.seen is not None:
            self.seen[rows] = self._adam_direction(rows, grad, m.clone(), v.clone(), step)
        self._write(rows, grad, m, v, float(self.write.lr) * step.gain, step.eps)

    def _write(self, rows: slice, grad: Tensor, m: Tensor, v: Tensor, rate: float, eps: float, *form: Any) -> None:
        """`adam_step` of these rows of the weight."""
        part = self.write.weight[rows]
        own = part.dtype is self.dtype and part.is_contiguous()
        target = part if own else self.buffer("weight", rows).copy_(part)
        adam_step(target, grad, m, v, rate, self.write.decay, eps, *form)
        if not own:
            write_(part, target, self.write.rounding, self.write.generator)

    def descend_adamw(self, betas: tuple[float, float], eps: float, bound: float) -> None:
        """Advance the dense moments "m" and "v" of the state by the gradient, cut to [-bound, bound], and step."""
        ctx = self.context
        m_mass, v_mass = 1 - betas[0] ** ctx.m_step, 1 - betas[1] ** ctx.v_step
        rate = (
            float(self.write.lr) * (1 - betas[0] ** ctx.v_step) / m_mass
        )  # the kernel corrects both moments for one age
        for rows, grad in self.gradients(bound):
            m, v = self.state["m"][rows], self.state["v"][rows]
            self._write(rows, grad, m, v, rate, eps, betas, ctx.v_step)
            if self.seen is not None:
                torch.div(v, v_mass, out=self.seen[rows]).sqrt_().add_(eps)
                torch.div(m / m_mass, self.seen[rows], out=self.seen[rows])

    def _adam_direction(self, rows: slice, grad: Tensor, m: Tensor, v: Tensor, step: Step) -> Tensor:
        most = torch.finfo(self.dtype).max
        m.add_(grad).clamp_(-most, most)
        v.addcmul_(grad, grad)
        direction = torch.sqrt(v, out=self.buffer("direction", rows)).add_(step.eps)
        torch.div(m, direction, out=direction)
        m.mul_(0.5)
        v.mul_(0.5)
        return rules.cut_direction_(direction.mul_(step.gain))


class _Below:
    """What is below zero in a history P that goes by in tiles.

    Args:
        x: what the floored P is multiplied by from the right, into
        right: (m, k); None if it is not.
    """

    def __init__(self, x: Tensor | None, right: Tensor | None) -> None:
        self.x, self.sum, self.count = x, 0.0, 0.0
        self.right = None if right is None else torch.zeros_like(right)

    def take_(self, rows: slice, tile: Tensor) -> None:
        """Count these rows' entries below zero, and make them zero."""
        below = tile.clamp_max(0)
        tile.clamp_min_(0)
        self.sum -= float(below.sum())
        number = -float(below.sign_().sum())
        self.count += number
        if self.right is not None and self.x is not None and number:
            self.right[rows] = product(below.neg_(), self.x)

    def floor_(self, right: Tensor | None) -> float:
        """The mean magnitude, which is put where those entries were: into the product."""
        floor = self.sum / max(self.count, 1)
        if self.right is not None and right is not None and self.count:
            right.add_(self.right, alpha=floor)
        return floor


def _rows_of(thin: Product, rows: slice) -> Tensor:
    return product(thin.b[rows] * thin.scale, thin.a)


def _reach(thin: Product) -> float:
    """No entry is larger."""
    return factors.reach(thin.b, thin.a) * abs(thin.scale)
