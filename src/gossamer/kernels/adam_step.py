"""Adam's rule and the write of the weight in one pass over a tile."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = 0.5, 0.5
"""With these betas and a first step, whose bias correction doubles what the averages halved, the rule is
`weight - rate (m + g) / (sqrt(v + g^2) + eps)`, and leaves (m + g) / 2 in m and (v + g^2) / 2 in v."""


def adam_step_ref(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    rate: float,
    decay: float,
    eps: float,
    betas: tuple[float, float] = HALVES,
    step: int = 1,
) -> None:
    """`weight <- decay weight - rate Adam's direction`, where m and v are advanced by the gradient first.

    Args:
        weight, grad, m, v: of one shape and one dtype, fp32 or fp64; v >= 0.
        step: counts from 1; for the bias corrections.
    """
    m.lerp_(grad, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    root = (v / (1 - betas[1] ** step)).sqrt_().add_(eps)
    weight.mul_(decay).sub_(m / (1 - betas[0] ** step) / root, alpha=rate)


def adam_step(
    weight: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    rate: float,
    decay: float,
    eps: float,
    betas: tuple[float, float] = HALVES,
    step: int = 1,
) -> None:
    """`adam_step_ref` of contiguous tensors on a CPU.

    torch has AdamW as one vectorised pass, so nothing has to be compiled at run time. It takes the decay over the rate.
    """
    if rate == 0:
        adam_step_ref(weight, grad, m, v, rate, decay, eps, betas, step)
        return
    torch._fused_adamw_(  # pyright: ignore
        [weight],
        [grad],
        [m],
        [v],
        [],
        [m.new_full((), step, dtype=torch.float32)],
        lr=rate,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=(1 - decay) / rate,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
