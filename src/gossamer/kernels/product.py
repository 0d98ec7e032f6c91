"""Products of a tile with a thin factor."""

from __future__ import annotations

import torch
from torch import Tensor


def product_ref(x: Tensor, y: Tensor) -> Tensor:
    """`x @ y`, (m, k) and (k, n), one of m, k, n small."""
    return x @ y


def product(x: Tensor, y: Tensor) -> Tensor:
    """`product_ref` by the fastest path there is, a new tensor.

    torch sends fp32 on a CPU to MKL, which is slow where a side is thin: oneDNN's linear layer does the same sums up to
    twice as fast. After `torch.set_float32_matmul_precision("medium")`, which says that fp32 products may be made of
    bf16 numbers, they are: faster at ranks of 64 and more, and wrong by 3e-3.
    """
    if x.dtype is not torch.float32 or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return x @ y
    if torch.get_float32_matmul_precision() == "medium":
        return (x.bfloat16() @ y.bfloat16()).float()
    return torch.ops.mkldnn._linear_pointwise(x, y.mT, None, "none", [], "")
