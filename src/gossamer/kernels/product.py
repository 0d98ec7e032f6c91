"""Products of a tile with a thin factor."""

from __future__ import annotations

import torch
from torch import Tensor


def product_ref(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y`, (m, k) and (k, n), one of m, k, n small."""
    return x @ y


def product(x: Tensor, y: Tensor) -> Tensor:
    """`product_ref` by the fastest path there is.

    torch sends fp32 on a CPU to MKL, which is slow where a side is thin: oneDNN's linear layer takes the same arithmetic
    1.2 to 4 times as fast at ranks 8 to 128 (`benchmarks/product.py`). The global switches that route `matmul` there
    would let newer processors round the operands to bf16; this call does not.
    """
    if x.dtype is torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, y.mT, None, "none", [], "")
    return x @ y
