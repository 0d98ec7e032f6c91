"""Steps written for one kind of machine, one file a kernel.

In a file of Triton kernels, each stands under its torch reference: `name_ref` above `name`, the same arguments in the
same order. Such a file is imported only where `available` says yes, so that nothing here asks for Triton to be there.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor


class Tables(NamedTuple):
    """L matrices or vectors of one shape and dtype, as a kernel sees them."""

    weights: Tensor
    """(L,) int64 on the device: where each begins."""
    grads: Tensor
    """The same of their gradients."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    grad_dtype: torch.dtype
    aligned: bool
    """Whether every row of weights and gradients begins at a multiple of 16 bytes, as the hardware's tiles must."""
    stochastic: bool
    """Whether the weights are rounded stochastically."""


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU: TRITON_INTERPRET=1, set before it was first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def available(device: torch.device) -> bool:
    """Whether Triton kernels run here: Triton is installed, and the device's compute capability is 9.0, as an H100's.

    Tiles are chosen for that one; elsewhere they spill registers, or want more shared memory than there is. Under the
    interpreter it is the CPU.
    """
    if find_spec("triton") is None:
        return False
    if interpreted():
        return device.type == "cpu"
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)
