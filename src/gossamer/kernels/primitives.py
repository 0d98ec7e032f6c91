"""What the Triton kernels share.

Two constexprs run through all of them. `FAST` takes the hardware's approximate root and reciprocal, whose error is an
fp32 rounding or two; the interpreter has no such instructions. `DOT_F32` widens what is multiplied, because the
interpreter reads bf16 operands of a product as integers. `constants` gives both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels import interpreted

LARGEST_BF16 = tl.constexpr(torch.finfo(torch.bfloat16).max)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
PIECES = {torch.bfloat16: 1, torch.float32: 3}
"""bf16 numbers that an operand is the sum of, by the weight's dtype."""


def constants() -> dict[str, bool]:
    """`FAST` and `DOT_F32`, by whether the kernels are compiled or interpreted."""
    return {"FAST": not interpreted(), "DOT_F32": interpreted()}


def allow_descriptors() -> None:
    """Give Triton the memory in which a kernel builds its descriptors: call it in the thread that launches.

    From torch's own allocator, so that under a CUDA graph it lies in the graph's pool and outlives its replays.
    """
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


@contextmanager
def full_precision() -> Iterator[None]:
    """torch's fp32 products in fp32, whatever is allowed to the model's: in TF32 a Gram matrix may turn indefinite."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def padded_rank(rank: int) -> int:
    """The least power of two that the tensor cores multiply: at least 16."""
    return max(16, 1 << (rank - 1).bit_length())


def stride(n: int) -> int:
    """Numbers from one row of n to the next in our own stacks, whose rows all begin at a multiple of 16 bytes."""
    return -(-n // 8) * 8


def padded(x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """`x` (L, ., .) as operands for weights of this dtype: (L, pieces, rows, columns) bf16, filled up with zeros."""
    out = torch.zeros(len(x), PIECES[dtype], rows, columns, dtype=torch.bfloat16, device=x.device)
    inside = out[:, :, : x.shape[1], : x.shape[2]]
    for piece in range(PIECES[dtype]):
        inside[:, piece] = x
        x = x - inside[:, piece]
    return out


def whole(*operands: Tensor) -> list[Tensor]:
    """The matrices of which operands hold the pieces."""
    return [operand.float().sum(0) for operand in operands]


@triton.jit
def pointer(table, index, TYPE: tl.constexpr, ALIGNED: tl.constexpr = False):  # pyright: ignore
    """The address at `index` of an int64 table, as a pointer to TYPE; ALIGNED promises a multiple of 16 bytes."""
    address = tl.load(table + index).to(tl.pointer_type(TYPE))  # pyright: ignore
    # said here, where the conversion is: on the result of a call it would be lost, and with it all wide loads
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, DOT_F32: tl.constexpr):
    """`acc + a b` in fp32."""
    if DOT_F32:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def split(x, PIECES: tl.constexpr):
    """bf16 numbers that add up to x: three hold all 24 bits of an fp32 one."""
    high = x.to(tl.bfloat16)
    if PIECES == 1:
        return (high,)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def pieces(descriptor, row, column, HEIGHT, PIECES: tl.constexpr):
    """A block of each piece of a matrix of this height."""
    if PIECES == 1:
        return (descriptor.load([row, column]),)
    return (
        descriptor.load([row, column]),
        descriptor.load([row + HEIGHT, column]),
        descriptor.load([row + 2 * HEIGHT, column]),
    )


@triton.jit
def product(a, b, acc, PIECES: tl.constexpr, TRANSPOSE: tl.constexpr, DOT_F32: tl.constexpr):
    """`acc + a b`, of the pieces of both; what is left out is below fp32's rounding.

    TRANSPOSE: "a" or "b", or "" for neither.
    """
    if PIECES == 3:
        acc = _product(a[2], b[0], acc, TRANSPOSE, DOT_F32)
        acc = _product(a[1], b[1], acc, TRANSPOSE, DOT_F32)
        acc = _product(a[0], b[2], acc, TRANSPOSE, DOT_F32)
        acc = _product(a[1], b[0], acc, TRANSPOSE, DOT_F32)
        acc = _product(a[0], b[1], acc, TRANSPOSE, DOT_F32)
    return _product(a[0], b[0], acc, TRANSPOSE, DOT_F32)


@triton.jit
def _product(a, b, acc, TRANSPOSE: tl.constexpr, DOT_F32: tl.constexpr):
    if TRANSPOSE == "a":
        a = tl.trans(a)
    if TRANSPOSE == "b":
        b = tl.trans(b)
    return dot(a, b, acc, "ieee", DOT_F32)


@triton.jit
def root(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.sqrt(x)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def clip(x, bound):
    """`x` within [-bound, bound]; NaN is passed on."""
    return tl.clamp(x, -bound, bound, propagate_nan=tl.PropagateNan.ALL)


def round_bf16_ref(x: Tensor, key: Tensor, seed: Tensor) -> Tensor:
    """Round fp32 to bf16, up or down with probabilities that make the expectation over seeds exact.

    The upper half of an fp32 number is a bf16 one, so a 16-bit dither is added to the bits and the lower half cut off.
    Philox would cost more than the rest of a step; here the dither is a hash of the number's own bits, of those of
    `key` and of the seed. What bf16 represents is kept, and so are infinity and NaN: their bits must not be added to.

    Args:
        x, key: fp32, of one shape. seed: int32, to be broadcast; another one for every step.
    """
    bits = x.contiguous().view(torch.int32)
    dither = (bits ^ key.contiguous().view(torch.int32) ^ seed) * -1640531527
    dither = (dither ^ (dither >> 13)) & 0xFFFF
    # past the largest bf16 number a carry would make an infinity: those are cut
    dither = torch.where(x.abs() < LARGEST_BF16.value, dither, torch.zeros_like(dither))
    return ((bits + dither) & -65536).view(torch.float32).to(torch.bfloat16)


@triton.jit
def round_bf16(x, key, seed):
    bits = x.to(tl.int32, bitcast=True)
    dither = (bits ^ key.to(tl.int32, bitcast=True) ^ seed) * -1640531527
    return _cut(x, bits, (dither ^ (dither >> 13)) & 0xFFFF)


@triton.jit
def _cut(x, bits, dither):
    dither = tl.where(tl.abs(x) < LARGEST_BF16, dither, 0)
    return ((bits + dither) & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def narrow(x, key, seed, TYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """`x` as the weight's TYPE; to the nearest, ties to even, if not stochastically."""
    if STOCHASTIC:
        found = round_bf16(x, key, seed)
    elif TYPE == tl.bfloat16:  # noqa: SIM300 - spelled out, since the interpreter's own conversion cuts
        bits = x.to(tl.int32, bitcast=True)
        found = _cut(x, bits, ((bits >> 16) & 1) + 0x7FFF)
    else:
        found = x
    return found
