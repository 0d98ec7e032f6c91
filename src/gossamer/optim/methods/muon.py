"""Muon: momentum, orthogonalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gossamer.optim import rules, stores
from gossamer.optim.contract import Context, State, check_choice, check_decay, register
from gossamer.rows import Parts, finish


@register("muon", paper="Jordan et al., Muon, 2024, kellerjordan.github.io/posts/muon", by_rows=True)
@dataclass(frozen=True)
class Muon:
    """The nearest semi-orthogonal matrix to the momentum: every singular direction moves alike. One moment of state.

        m <- momentum m + (1 - momentum) g
        direction = factor NewtonSchulz((1 - momentum) g + momentum m)             m alone without nesterov
        factor = sqrt(max(1, rows / columns))                                      or 0.2 sqrt(max(rows, columns))

    Paper: Jordan et al. 2024 (the method, "original"); Liu et al. 2025, arXiv 2502.16982 ("match_rms_adamw").

    Deviations: equal to `torch.optim.Muon`, bit for bit in fp32 where the factor is a power of two, else up to the
    rounding of lr times factor (`test_muon_is_torch`). Gradients are cut where the sum of their squares would overflow.
    The five Newton-Schulz steps are in bf16 as torch's, except for fp64 parameters.
    """

    momentum: float = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Look one step ahead: weigh the gradient in once more."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    """The factor of the shape. With the second, learning rates tuned for AdamW carry over."""

    def __post_init__(self) -> None:
        check_decay("muon", "momentum", self.momentum)
        check_choice("muon", adjust_lr_fn=(self.adjust_lr_fn, rules.ADJUSTMENTS))

    def init(self, param: Tensor) -> State:
        return stores.dense(param, "m")

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        return finish(self.parts(grad, state, ctx), ctx.rows)

    def parts(self, grad: Tensor, state: State, ctx: Context) -> Parts:
        grad = rules.cut_gradient(grad, ctx.rows)
        m = state["m"].lerp_(grad, 1 - self.momentum)
        m = grad.lerp(m, self.momentum) if self.nesterov else m
        return (yield from rules.orthogonalize(m, self.adjust_lr_fn, ctx.rows))
