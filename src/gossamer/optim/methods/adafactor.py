"""Adafactor: the second moment from its row and column means."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.errors import UserError
from gossamer.optim import rules
from gossamer.optim.contract import Context, State, register
from gossamer.optim.stores import arithmetic_dtype, dense
from gossamer.rows import HERE, Rows, entries


@register(
    "adafactor",
    paper="Shazeer and Stern, Adafactor, ICML 2018, arXiv 1804.04235",
    matrix_only=False,
    by_rows=True,
)
@dataclass(frozen=True)
class Adafactor:
    """No first moment, and a second one of m + n numbers; steps are relative to the size of the weight.

        R <- lerp(R, row means of g^2, t^z);  C <- lerp(C, column means of g^2, t^z)      z = beta2_decay
        V = R C^T / mean(R)                                  v <- lerp(v, g^2, t^z) for vectors and scalars
        u = g / sqrt(max(V, eps1^2))
        direction = max(eps2, rms(W)) min(1, 1 / (lr sqrt(t))) u / max(1, rms(u) / d)

    Paper: arXiv 1804.04235, Algorithms 4 (matrices) and 5 (vectors), Sections 6 (clipping by d) and 8 (relative steps).

    Deviations: equal to `torch.optim.Adafactor` up to rounding (`test_adafactor_is_torch`), which says how it differs
    from the paper (eps1 bounds V instead of being added to g^2). It is not a wrapper because torch's reads rms(W) and
    rms(u) on the host, twice a parameter a step; here they stay on the device. torch's rule is the step itself, with
    rho = min(lr, 1 / sqrt(t)); what is returned is that over lr, worked out so that lr = 0 is no division by zero.
    - State and arithmetic of a bf16 parameter are fp32, and so is its default eps1.
    - As in torch, eps1 = 1.2e-7 is a floor under the root of V: gradients below about 5e-6 are no longer normalised
      entry by entry. Give eps=(1e-15, 1e-3) where they are that small.
    - Gradients are cut where the sum of their squares would overflow.
    """

    beta2_decay: float = -0.8
    """Exponent of t in the weight of the newest gradient."""
    eps: tuple[float | None, float] = (None, 1e-3)
    """eps1, the smallest root of V (None: the machine epsilon); eps2, the smallest size of a weight."""
    d: float = 1.0
    """Largest root mean square of u."""

    def __post_init__(self) -> None:
        eps1, eps2 = self.eps
        if self.beta2_decay > 0 or (eps1 is not None and eps1 < 0) or eps2 < 0 or self.d < 1:
            raise UserError(
                f"adafactor: beta2_decay is {self.beta2_decay}, eps is {self.eps}, d is {self.d}; "
                "allowed: beta2_decay <= 0, eps >= 0, d >= 1"
            )

    def init(self, param: Tensor) -> State:
        if param.ndim < 2:
            return dense(param, "v")
        return {"v_rows": _zeros(param, -1), "v_columns": _zeros(param, -2)}

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        grad = rules.cut_gradient(grad, ctx.rows)
        eps1 = torch.finfo(grad.dtype).eps if self.eps[0] is None else self.eps[0]
        newest = ctx.v_step**self.beta2_decay
        if grad.ndim < 2:
            v = state["v"].lerp_(grad.square(), newest).clone()
        else:
            rows = ctx.rows if grad.ndim == 2 else HERE  # beyond that they are matrices of their own
            height, columns = rows.shape(grad)[-2:]
            of_rows = torch.linalg.vector_norm(grad, dim=-1, keepdim=True).square_().div_(columns)
            of_columns = rows.sum(torch.linalg.vector_norm(grad, dim=-2, keepdim=True).square_()).div_(height)
            state["v_rows"].lerp_(of_rows, newest)
            state["v_columns"].lerp_(of_columns, newest)
            mean = rows.sum(state["v_rows"].sum(-2, keepdim=True)).div_(height)
            # divided before it is multiplied: the product of two huge means would overflow
            v = (state["v_rows"] / mean.clamp_min(eps1)) @ state["v_columns"]
        u = v.clamp_min_(eps1 * eps1).rsqrt_().mul_(grad)
        size = _rms(ctx.param.to(grad.dtype), ctx.rows).clamp_min(self.eps[1])
        ratio = ctx.lr * ctx.step**0.5  # of lr to 1 / sqrt(t)
        ratio = ratio.clamp_min(1.0) if isinstance(ratio, Tensor) else max(ratio, 1.0)
        return u.mul_(size / _rms(u, ctx.rows).div_(self.d).clamp_min_(1.0) / ratio)


def _rms(x: Tensor, rows: Rows) -> Tensor:
    return rows.hypot(torch.linalg.vector_norm(x)) / entries(x, rows) ** 0.5


def _zeros(param: Tensor, dim: int) -> Tensor:
    """Zeros of the shape of the mean over `dim`, which stays as a dimension of 1."""
    shape = list(param.shape)
    shape[dim] = 1
    return torch.zeros(shape, dtype=arithmetic_dtype(param), device=param.device)
