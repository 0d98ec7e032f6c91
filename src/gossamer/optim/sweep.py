"""A step that takes a matrix some rows at a time, so that nothing of the weight's size is ever made.

A method that can do so offers, beside `update`, its readable reference, a fused twin:

    def step_(self, sweeps):
        for sweep in sweeps:                                 # matrices of one shape
            for rows, grad in sweep.gradients():             # a slice of rows, and their gradient
                direction = ...                              # of those rows, from the state's thin factors
                sweep.descend(rows, direction)

It advances each `sweep.state` as `update` does, hands every row's direction to one of the `descend` functions once, and
may go over the gradient as often as it likes. It gets all matrices of a shape at once, so that factorisations of small
matrices can be done for all of them in one call.

This is how a step runs on a CPU, where reading a number waits for nothing: the gradient's largest entry decides whether
guards against overflow are needed at all, and Adam's whole rule is one pass of torch's own fused AdamW over a tile in
the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gossamer.kernels.adam_step import adam_step
from gossamer.kernels.product import product
from gossamer.optim import factors, rules
from gossamer.optim.contract import Context, State
from gossamer.optim.rounding import write_

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
        weight, lr = self.write.weight, self.write.lr
        own = weight.dtype is self.dtype and not isinstance(lr, Tensor) and (along is None or self._is_plain(bound))
        if not own or self.seen is not None:
            self._descend_sum_by_rows(pair, along, bound, write=not own)
        if not own:
            return
        decay = 1 - lr * self.write.weight_decay
        if pair is not None:
            weight.addmm_(*pair, beta=decay, alpha=-lr)
        elif decay != 1:
            weight.mul_(decay)
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

    def descend_adam(
        self, rows: slice, grad: Tensor, m: Tensor, v: Tensor, *, gain: float, eps: float, reach: float
    ) -> None:
        """Descend `gain (m + g) / (sqrt(v + g^2) + eps)`. Leaves (m + g) / 2 in m and (v + g^2) / 2 in v.

        Args:
            grad, m, v: these rows; m and v contiguous, v >= 0.
            reach: no entry of m and no root of an entry of v is larger.
        """
        size, most = self.largest + reach, torch.finfo(self.dtype).max ** 0.5
        calm = size <= most / 4 and size * gain <= eps * most  # no guard would touch anything
        if not (calm and gain > 0 and self.write.lr > 0):
            self.descend(rows, self._adam_direction(rows, grad, m, v, gain, eps))
            return
        if self.seen is not None:
            self.seen[rows] = self._adam_direction(rows, grad, m.clone(), v.clone(), gain, eps)
        part, lr = self.write.weight[rows], float(self.write.lr)
        own = part.dtype is self.dtype and part.is_contiguous()
        target = part if own else self.buffer("weight", rows).copy_(part)
        adam_step(target, grad, m, v, lr * gain, 1 - lr * self.write.weight_decay, eps)
        if not own:
            write_(part, target, self.write.rounding, self.write.generator)

    def _adam_direction(self, rows: slice, grad: Tensor, m: Tensor, v: Tensor, gain: float, eps: float) -> Tensor:
        most = torch.finfo(self.dtype).max
        m.add_(grad).clamp_(-most, most)
        v.addcmul_(grad, grad)
        direction = torch.sqrt(v, out=self.buffer("direction", rows)).add_(eps)
        torch.div(m, direction, out=direction)
        m.mul_(0.5)
        v.mul_(0.5)
        return rules.cut_direction_(direction.mul_(gain))

