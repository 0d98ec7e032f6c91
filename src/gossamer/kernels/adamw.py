"""AdamW with moments in fp32, for what the thin methods do not train: embeddings, heads, norms."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels import Tables, primitives
from gossamer.kernels.primitives import clip, narrow, pointer, reciprocal, root, round_bf16_ref

# columns of the table of numbers
SIGN, GAIN, SPREAD, EPS, DECAY, RATE, SEED = (tl.constexpr(i) for i in range(7))
NUMBERS = tl.constexpr(7)
BLOCK = 1024


def adamw_ref(
    weights: list[Tensor],
    grads: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    numbers: Tensor,
    own_m: float,
    beta2: float,
    own_v: float,
    bound: float,
    *,
    stochastic: bool,
) -> None:
    """Advance L moments of each kind, and step their weights.

        m <- m + own_m (g - m),   v <- beta2 v + own_v g^2
        W <- decay W - rate gain m / (spread sqrt(v) + eps)

    Args:
        weights, grads: L tensors of one shape, fp32 or bf16; the kernel takes (L,) int64 tables of their addresses, as
            it does of the moments, ms and vs, fp32.
        numbers: (L, 7) fp32: the gradient's sign, gain and spread, which correct the biases of m and of sqrt(v), eps,
            decay, rate, and a whole number that seeds the rounding.
        own_m, beta2, own_v: 1 - beta1, beta2 and 1 - beta2; fp32 could not take the difference.
        bound: gradients are cut there; NaN is passed on.
    """
    for i, (weight, grad, m, v) in enumerate(zip(weights, grads, ms, vs, strict=True)):
        sign, gain, spread, eps, decay, rate, seed = numbers[i].unbind()
        g = sign * grad.float().clamp(-bound, bound)
        m.lerp_(g, own_m)
        v.mul_(beta2).addcmul_(g, g, value=own_v)
        new = decay * weight.float() - rate * (gain * m / (spread * v.sqrt() + eps))
        seeds = seed.int() + torch.arange(new.numel(), dtype=torch.int32, device=new.device).view(new.shape)
        weight.copy_(round_bf16_ref(new, m, seeds) if stochastic else new)


@triton.jit
def adamw(
    weights,
    grads,
    ms,
    vs,
    numbers,
    own_m,
    beta2,
    own_v,
    bound,
    SIZE,
    BLOCK: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FAST: tl.constexpr,
):
    layer, block = tl.program_id(1), tl.program_id(0)
    weight, grad = pointer(weights, layer, WEIGHT, ALIGNED), pointer(grads, layer, GRAD, ALIGNED)
    m_, v_ = pointer(ms, layer, tl.float32, ALIGNED), pointer(vs, layer, tl.float32, ALIGNED)
    numbers += layer * NUMBERS
    sign, gain, spread = tl.load(numbers + SIGN), tl.load(numbers + GAIN), tl.load(numbers + SPREAD)
    eps, decay, rate = tl.load(numbers + EPS), tl.load(numbers + DECAY), tl.load(numbers + RATE)
    start = block.to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    # neighbours may be equal, gradients and all: each gets a dither of its own
    seed = tl.load(numbers + SEED).to(tl.int32) + offsets.to(tl.int32)
    inside = tl.arange(0, BLOCK) < SIZE - start
    g = sign * clip(tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32), bound)
    m = tl.load(m_ + offsets, mask=inside, other=0.0)
    m += own_m * (g - m)
    v = beta2 * tl.load(v_ + offsets, mask=inside, other=0.0) + own_v * (g * g)
    tl.store(m_ + offsets, m, mask=inside)
    tl.store(v_ + offsets, v, mask=inside)
    direction = gain * m * reciprocal(spread * root(v, FAST) + eps, FAST)
    new = decay * tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float32) - rate * direction
    tl.store(weight + offsets, narrow(new, m, seed, WEIGHT, STOCHASTIC), mask=inside)


def step(tables: Tables, ms: Tensor, vs: Tensor, numbers: Tensor, betas: tuple[float, float], bound: float) -> None:
    """`adamw` of all tensors of the tables. Where those are aligned, the moments are to be, too."""
    size = prod(tables.shape)
    with torch.cuda.device_of(ms):
        kernel: Any = adamw[(triton.cdiv(size, BLOCK), len(ms))]
        kernel(
            tables.weights,
            tables.grads,
            ms,
            vs,
            numbers,
            1 - betas[0],
            betas[1],
            1 - betas[1],
            bound,
            size,
            BLOCK=BLOCK,
            WEIGHT=primitives.TYPES[tables.dtype],
            GRAD=primitives.TYPES[tables.grad_dtype],
            ALIGNED=tables.aligned,
            STOCHASTIC=tables.stochastic,
            FAST=primitives.constants()["FAST"],
            enable_fp_fusion=True,
        )
