"""Adam's rule and the write of the weight in one pass over a tile."""

from __future__ import annotations

import torch
from torch import Tensor


def adam_step_ref(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, rate: float, decay: float, eps: float) -> None:
    """`weight <- decay weight - rate (m + g) / (sqrt(v + g^2) + eps)`. Leaves (m + g) / 2 in m and (v + g^2) / 2 in v.

    Args:
        weight, grad, m, v: of one shape and one dtype, fp32 or fp64; v >= 0.
    """
    m.add_(grad).mul_(0.5)
    v.addcmul_(grad, grad).mul_(0.5)
    weight.mul_(decay).sub_(2 * m / ((2 * v).sqrt_().add_(eps)), alpha=rate)


def adam_step(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, rate: float, decay: float, eps: float) -> None:
    """`adam_step_ref` of contiguous tensors on a CPU, for rate > 0.

    It is the first step of AdamW with both betas one half, whose bias correction doubles what the average halved: torch
    has that as one vectorised pass, so nothing has to be compiled at run time.
    """
    torch._fused_adamw_(
        [weight],
        [grad],
        [m],
        [v],
        [],
        [m.new_ones((), dtype=torch.float32)],
        lr=rate,
        beta1=0.5,
        beta2=0.5,
        weight_decay=(1 - decay) / rate,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
