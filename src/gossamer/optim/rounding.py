"""Writing a wide number into a narrow parameter."""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to bf16, up or down with the probabilities that make the expectation exact.

    A bf16 number is the upper half of an fp32 one, so adding a uniform 16-bit integer to the bits and cutting the
    lower half carries into the upper half with just the right probability. Numbers that bf16 represents are kept, and
    so are NaN and infinity, whose bits must not be added to.

    Args:
        x: fp32 tensor of any shape. generator: on the same device.
    """
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = x.contiguous().view(torch.int32).add(noise).bitwise_and_(-1 << 16).view(torch.float32)
    # a carry past the largest finite number would make an infinity: such x round to nearest, which saturates later
    return torch.where(x.isfinite() & rounded.isfinite(), rounded, x).to(torch.bfloat16)


def write_(param: Tensor, value: Tensor, rounding: str, generator: torch.Generator) -> None:
    """Copy `value` into `param`; only a bf16 parameter is ever rounded stochastically."""
    if rounding == "stochastic" and param.dtype is torch.bfloat16:
        value = stochastic_bf16(value.float(), generator)
    param.copy_(value)
