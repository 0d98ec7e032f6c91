"""A step that takes a matrix some rows at a time, so that nothing of the weight's size is ever made.

A method that can do so offers, beside `update`, its readable reference, a fused twin:

    def step_(self, sweep, state, ctx):
        for rows, grad in sweep.gradients():             # a slice of rows, and their gradient
            direction = ...                              # of those rows, from the state's thin factors
            sweep.descend(rows, direction)

It advances `state` as `update` does, hands every row's direction to `descend` once, and may go over the gradient as
often as it likes. Tensors as large as a tile come from `sweep.buffer`, which are the same few at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

TILE = 1 << 18
"""Entries of a tile: 1 MiB of fp32, which stays in the cache while a step works on it."""


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


class Sweep:
    """The gradient of one matrix in tiles of rows, and where the directions of those rows go.

    Args:
        grad: (m, n), of any floating dtype.
        dtype: of the arithmetic; what `buffer` gives.
        negate: whether to climb.
        descend: takes rows and their direction, and writes those rows of the weight.
        scratch: shared by all matrices.
    """

    def __init__(
        self,
        grad: Tensor,
        dtype: torch.dtype,
        negate: bool,
        descend: Callable[[slice, Tensor], None],
        scratch: Scratch,
    ) -> None:
        self.grad, self.dtype, self.negate, self.descend, self._scratch = grad, dtype, negate, descend, scratch
        self.shape = (grad.shape[0], grad.shape[1])

    def rows(self) -> Iterator[slice]:
        """Consecutive slices of rows, about `TILE` entries each."""
        m, n = self.shape
        height = max(1, TILE // n)
        for start in range(0, m, height):
            yield slice(start, min(start + height, m))

    def gradients(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their gradient in the arithmetic dtype, only to be read: it may be the gradient itself."""
        for rows in self.rows():
            tile = self.grad[rows]
            if self.negate or tile.dtype is not self.dtype:
                tile = self.buffer("gradient", rows).copy_(tile)
            yield rows, tile.neg_() if self.negate else tile

    def tiles(self, bound: float) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their gradient in the arithmetic dtype, cut to [-bound, bound], in a buffer to be overwritten."""
        for rows in self.rows():
            tile = self.buffer("gradient", rows)
            if self.grad.dtype is self.dtype:
                torch.clamp(self.grad[rows], -bound, bound, out=tile)
            else:
                tile.copy_(self.grad[rows]).clamp_(-bound, bound)
            yield rows, tile.neg_() if self.negate else tile

    def whole(self, bound: float) -> Tensor:
        """The gradient as `tiles` gives it, all rows at once: a copy as large as the weight, for a refresh."""
        whole = self.grad.to(self.dtype).clamp(-bound, bound)
        return whole.neg_() if self.negate else whole

    def buffer(self, name: str, rows: slice) -> Tensor:
        """An uninitialised tensor of the shape of these rows, valid until the name is asked for again."""
        shape = rows.stop - rows.start, self.shape[1]
        return self._scratch.take(name, shape, self.dtype, self.grad.device)
