"""What is asked about all rows of a matrix by code that may hold only some of them.

Code that reduces over rows takes a `Rows` and says so:

    gram = rows.sum(x.mT @ x)                   # x: my rows
    size = rows.largest(x)

In one process these are the identity and a maximum. Where rows lie in several processes, `gossamer.distributed` answers
with the same numbers. Everything an answer is made of is the same in every process, and so is the answer: processes
decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch
from torch import Tensor


class Rows:
    """All rows are here. A tensor of one dimension has its entries as rows."""

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the whole tensor of which x holds my rows."""
        return tuple(x.shape)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what each process made of its rows. May overwrite x."""
        return x

    def hypot(self, norms: Tensor) -> Tensor:
        """Euclidean norms over all rows, from those over mine. Any shape."""
        return norms

    def largest(self, x: Tensor) -> Tensor:
        """The largest magnitude in the whole tensor, (); NaN if there is a NaN."""
        return x.abs().amax()

    def any(self, where: Tensor) -> Tensor:
        """Whether a boolean is true in any row, ()."""
        return where.any()

    def gather(self, x: Tensor) -> Tensor:
        """All rows of x: for thin ones, (m, k)."""
        return x

    def mine(self, x: Tensor) -> Tensor:
        """My rows of an x of which every process has all."""
        return x

    def whole(self, function: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """`function` of all rows of x, gathered in one process; the result, of this shape and x's dtype, in all."""
        return function(x)


HERE = Rows()
"""All rows are in this process."""


def entries(x: Tensor, rows: Rows) -> int:
    """Of the whole tensor."""
    return int(torch.Size(rows.shape(x)).numel())


Parts = Generator[tuple[Callable[[Tensor], Tensor], Tensor], Tensor, Tensor]
"""Work on my rows of a matrix that needs all of them once, in one place.

    def parts(grad, rows):
        ...                                     # before
        rows_of_f = yield f, x                  # x: my rows of what f takes; f(all rows) has its shape and dtype
        ...                                     # after
        return direction
"""


def finish(parts: Parts, rows: Rows) -> Tensor:
    """What `parts` returns."""
    function, x = next(parts)
    return answered(parts, rows.mine(rows.whole(function, x, rows.shape(x))))


def answered(parts: Parts, answer: Tensor) -> Tensor:
    """What `parts` returns when its question is answered."""
    try:
        parts.send(answer)
    except StopIteration as end:
        return end.value
    raise RuntimeError("parts: it asked twice")
