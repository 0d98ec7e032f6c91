"""A launched step of moments kept as B A: what torch does around the two passes of `kernels.factors`.

    passes = Passes(batch, "none", m=Moment(...))
    q = passes.basis(passes.gaussian())                  # orth(target W^T), target = decay B A + gain T
    batch.keep_(m=(q["m"], passes.project(q, step=True)["m"]))

Whatever changes from step to step is a tensor on the device, and nothing waits for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.kernels import factors, primitives
from gossamer.kernels.primitives import padded, stride
from gossamer.linalg import cholesky_qr
from gossamer.optim import rules
from gossamer.optim.batch import Batch

Named = dict[str, Tensor]
"""Stacks by the name of their moment, "m" or "v"."""

LARGEST = rules.gradient_bound(torch.float32, 1)
"""No gradient that was cut makes a factor as large as this. One that is counts as infinite: `keep_` discards it."""


class Moment(NamedTuple):
    """How one moment enters the step, and how it advances: numbers, or fp64 tensors with one for each parameter."""

    past: float | Tensor
    """The weight of what the state holds in this step's corrected moment."""
    own: float | Tensor
    """The weight of g, or of g^2."""
    decay: float
    """Of B A in what the new factors follow."""
    gain: float | Tensor
    """What T is multiplied by there."""


class Passes:
    """The two passes over the gradients of a batch.

    Args:
        second: the kind of second moment, see `kernels.factors`; "rows-columns" reads the states' v_rows and v_columns.
        m, v: the moments; v is None if second is "none".
        eps: added to the root of the second moment.
        tail: what the part of g outside of B and W weighs beside `own g`; None if there is none. `basis` is
            then to be called once, with orthonormal W.
    """

    def __init__(
        self,
        batch: Batch,
        second: str,
        *,
        m: Moment,
        v: Moment | None = None,
        eps: float = 0.0,
        tail: float | Tensor | None = None,
    ) -> None:
        self.batch, self.second, self.eps, self.tail = batch, second, eps, tail
        self.moments = {"m": m, "v": v} if v is not None and second in factors.FACTORED else {"m": m}
        self.b = {name: batch.stack(f"{name}_B") for name in self.moments}
        self.a = {name: batch.stack(f"{name}_A") for name in self.moments}
        (self.m, self.rank), self.n = self.b["m"].shape[1:], self.a["m"].shape[2]
        self.depth = primitives.padded_rank(self.rank)
        self.width, self.height = stride(self.n), -(-self.m // factors.GRAIN.value) * factors.GRAIN.value

        self.bound = rules.gradient_bound(torch.float32, self.m * self.n)
        self.tables = batch.tables
        outside = 0.0 if tail is None else tail
        weights = m.own + outside, 0.0 if v is None else v.own, outside
        self.numbers = batch.numbers(*weights, batch.rates, batch.decay, batch.seeds)
        self.m_b, self.thin = self._columns(self.b["m"]), self._thin(self.a["m"] * wide(m.past))
        self.v_b = self.v_a = self.inside = self.w = self.mean_rows = self.mean_columns = None
        self.floor = self.m_b.new_zeros(len(self.m_b), dtype=torch.float32)
        if v is not None and second in factors.FACTORED:
            self.v_b, self.v_a = self._columns(self.b["v"]), self._rows(self.a["v"] * wide(v.past))
        if v is not None and second == "rows-columns":
            rows, columns = batch.stack("v_rows"), batch.stack("v_columns")
            # divided before it is multiplied: the product of two tiny means would underflow
            self.mean_rows = rows / rows.mean(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
            self.mean_columns = (columns[:, None] * wide(v.past))[:, 0]

    def gaussian(self) -> Named:
        """Random test matrices (L, r, n), each parameter's from its own generator."""
        frames = {name: torch.empty_like(a) for name, a in self.a.items()}
        for i, context in enumerate(self.batch.contexts):
            for frame in frames.values():
                frame[i].normal_(generator=context.generator)
        return frames

    def frames(self) -> Named:
        """`factors.frame` on stacks: orthonormal rows that span those of A, random while A is zero."""
        fresh = self.gaussian()
        nonzero = {name: (a != 0).any(2).any(1)[:, None, None] for name, a in self.a.items()}
        return self.orthonormalize({name: torch.where(nonzero[name], a, fresh[name]) for name, a in self.a.items()})

    @primitives.full_precision()
    def orthonormalize(self, rows: Named) -> Named:
        """Orthonormal rows (L, r, n) that span the given ones."""
        return {name: cholesky_qr(x.mT).mT for name, x in rows.items()}

    @primitives.full_precision()
    def basis(self, frames: Named) -> Named:
        """Orthonormal columns (L, m, r) that span `target W^T`, for rows W (L, r, n)."""
        second = self.second
        w = {name: self._rows(frame) for name, frame in frames.items()}
        y = {name: self._new(self.m, self.depth) for name in w}
        below_y = self._new(self.m, self.depth) if second == "floored" else None
        below = self._new(self.m, 2)
        self.row_sums = self._new(self.m)
        factors.launch_sketch(
            self.tables,
            self.numbers,
            w["m"],
            w.get("v"),
            self.v_b,
            self.v_a,
            y["m"],
            y.get("v"),
            below_y,
            self.row_sums,
            below,
            bound=self.bound,
            SECOND=second,
        )
        if second in factors.FLOORED:
            total, count = below.sum(1).unbind(1)
            self.floor = total / count.clamp_min(1)
        if below_y is not None:
            y["v"] += wide(self.floor) * below_y
        if self.tail is not None:
            self._prepare_tail(y["m"], w["m"], frames["m"])
        found = {}
        for name, moment in self.moments.items():
            # the frame as the kernel saw it: its rounding then makes another test matrix, not another product
            seen = w[name][..., : self.rank, : self.n].float().sum(1)
            history = self.b[name] @ (self.a[name] @ seen.mT) * moment.decay
            found[name] = cholesky_qr(history + wide(moment.gain) * y[name][..., : self.rank])
        return found

    @primitives.full_precision()
    def project(self, basis: Named, *, step: bool) -> Named:
        """`B'^T target`, (L, r, n), of new columns B'. With `step`, the weights take it."""
        second = self.second
        low = {name: self._columns(b) for name, b in basis.items()}
        found = {name: self._new(self.depth, self.width) for name in basis}
        self.column_sums = self._new(self.n)
        factors.launch_update(
            self.tables,
            self.numbers,
            self.m_b,
            self.thin,
            self.inside,
            self.w,
            low["m"],
            self.v_b,
            self.v_a,
            low.get("v"),
            self.mean_rows,
            self.mean_columns,
            self.floor,
            found["m"],
            found.get("v"),
            self.column_sums,
            bound=self.bound,
            eps=self.eps,
            SECOND=second,
            STEP=step,
            TAIL=self.tail is not None,
        )
        new = {}
        for name, moment in self.moments.items():
            history = basis[name].mT @ self.b[name] @ self.a[name] * moment.decay
            new[name] = history + wide(moment.gain) * found[name][:, : self.rank, : self.n]
            if name == "m" or second == "absolute":  # gradients enter these products uncut
                new[name] = torch.where(new[name].abs() < LARGEST, new[name], torch.inf)
        return new

    def follow_means_(self, decay: float) -> None:
        """`factors.follow_means_` of g^2, after both passes."""
        for key, sums, count in (("v_rows", self.row_sums, self.n), ("v_columns", self.column_sums, self.m)):
            self.batch.scatter(key, self.batch.stack(key).lerp_(sums / count, 1 - decay))

    def _prepare_tail(self, seen: Tensor, rows: Tensor, w: Tensor) -> None:
        """With C = B^T g, the tail `t (I - B B^T) g (I - W^T W)` is `t g - t B (C - C W^T W) - t g W^T W`.

        C W^T is known from the first pass, C itself only in the second.
        """
        # the kernels multiply gradients uncut: where one should have been, the rest of this tail is left away
        sound = (seen.abs() < LARGEST).all(2).all(1)
        column = self.numbers[:, factors.TAIL_WEIGHT.value]
        tail = column.copy_(torch.where(sound, column, 0.0))
        inside = torch.where(sound[:, None, None], seen[..., : self.rank], 0.0) * wide(tail)
        self.inside, self.w = self._columns(-inside), rows
        self.thin += self._thin(self.b["m"].mT @ inside @ w)

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(len(self.batch.params), *shape, dtype=torch.float32, device=self.batch.device)

    def _thin(self, x: Tensor) -> Tensor:
        """A stack (L, r, n) as (L, R, width) fp32."""
        out = self._new(self.depth, self.width).zero_()
        out[:, : self.rank, : self.n] = x
        return out

    def _columns(self, x: Tensor) -> Tensor:
        """A stack (L, m, r) as an operand."""
        return padded(x, self.height, self.depth, self.batch.dtype)

    def _rows(self, x: Tensor) -> Tensor:
        """A stack (L, r, n) as an operand."""
        return padded(x, self.depth, self.width, self.batch.dtype)


def wide(x: float | Tensor) -> float | Tensor:
    """A number for all, or (L,) of them, that multiply stacks."""
    return x.float()[:, None, None] if isinstance(x, Tensor) else x
