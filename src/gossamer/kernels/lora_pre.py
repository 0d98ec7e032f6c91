"""LoRA-Pre's step: `rows` writes the weight and fits B to the gradient, `columns` fits A.

Both read only factors, never a moment: a tile of it is rebuilt in registers and forgotten. For one fit after the other
they are two launches; for both at once they share a grid, matrix by matrix, so that the columns find in the L2 cache
what the rows have read.

What they multiply with is made by `Side` from a moment's factors. The first moment is whitened: with `L L^T` the damped
Gram matrix of A,

    B A = (B L) (L^-1 A),        g A^+ = (g (L^-1 A)^T) L^-1

and one tile of L^-1 A serves both, with a rounding error to bf16 that no conditioning of A magnifies. The second
moment's factors are nearly non-negative, nothing cancels, and they go in as they are, divided by their largest entry.
For bf16 weights an operand is rounded to bf16; for fp32 ones it is the sum of three bf16 numbers, which lose nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels import Tables, primitives
from gossamer.kernels.cholesky import cholesky_inverse
from gossamer.kernels.primitives import (
    PIECES,
    clip,
    narrow,
    padded,
    pieces,
    pointer,
    product,
    reciprocal,
    root,
    round_bf16_ref,
    split,
    stride,
    whole,
)
from gossamer.linalg import damped_gram, damped_size

# columns of the table of numbers
OWN_M, OWN_V, EPS, DECAY, RATE, SEED = (tl.constexpr(i) for i in range(6))
NUMBERS = tl.constexpr(6)
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
BOUND = tl.constexpr(torch.finfo(torch.float32).max ** 0.5)


def rows_ref(
    weights: list[Tensor],
    grads: list[Tensor],
    numbers: Tensor,
    m_left: Tensor,
    m_right: Tensor,
    v_left: Tensor,
    v_right: Tensor,
    m_seen: Tensor,
    v_seen: Tensor,
    *,
    stochastic: bool,
) -> None:
    """Step L weights, and see their gradients through the right factors.

        m = m_left m_right + own_m g,   v = (v_left v_right)^2 + own_v g^2,   W <- decay W - rate m / (sqrt(v) + eps)
        m_seen <- g m_right^T,          v_seen <- |g| v_right^T

    m is cut at the largest finite number and the direction at its root; NaN is passed on.

    Args:
        weights, grads: L tensors (m, n), fp32 or bf16; the kernel takes (L,) int64 tables of their addresses.
        numbers: (L, 6) fp32: own_m, own_v, eps, decay, rate, and a whole number that seeds the rounding.
        m_left, v_left: (L, pieces, m, R) bf16. m_right, v_right: (L, pieces, R, stride), zero past n.
        m_seen, v_seen: (L, m, R) fp32, written.
    """
    n = weights[0].shape[1]
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        own_m, own_v, eps, decay, rate, seed = numbers[i].unbind()
        (m_b, v_b), (m_a, v_a) = whole(m_left[i], v_left[i]), whole(m_right[i, ..., :n], v_right[i, ..., :n])
        g = grad.float()
        m = (m_b @ m_a + own_m * g).clamp_(-LARGEST.value, LARGEST.value)
        v = (v_b @ v_a).square_() + own_v * g * g
        direction = (m / (v.sqrt_() + eps)).clamp_(-BOUND.value, BOUND.value)
        new = decay * weight.float() - rate * direction
        weight.copy_(round_bf16_ref(new, m, seed.int()) if stochastic else new)
        operand = multiplied(grad, m_right.shape[1])
        torch.mm(operand, m_a.mT, out=m_seen[i])
        torch.mm(operand.abs(), v_a.mT, out=v_seen[i])


def multiplied(grad: Tensor, pieces: int) -> Tensor:
    """The gradient as it is multiplied: rounded to bf16 if that is all there is."""
    return grad.float() if pieces > 1 else grad.bfloat16().float()


@triton.jit
def rows(
    weights,
    grads,
    numbers,
    m_left,
    m_right,
    v_left,
    v_right,
    m_seen,
    v_seen,
    layer,
    start,
    M,
    N,
    STRIDE,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PIECES: tl.constexpr,
    FAST: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    weight, grad = pointer(weights, layer, WEIGHT), pointer(grads, layer, GRAD)
    layer = layer.to(tl.int64)
    numbers += layer * NUMBERS
    own_m, own_v, eps = tl.load(numbers + OWN_M), tl.load(numbers + OWN_V), tl.load(numbers + EPS)
    decay, rate = tl.load(numbers + DECAY), tl.load(numbers + RATE)
    seed = tl.load(numbers + SEED).to(tl.int32) * 7919 + start
    thick, wide = M * PIECES, R * PIECES  # a matrix's pieces lie below each other
    m_block = tl.make_tensor_descriptor(m_left + layer * thick * R, [thick, R], [R, 1], [BM, R])
    v_block = tl.make_tensor_descriptor(v_left + layer * thick * R, [thick, R], [R, 1], [BM, R])
    m_b, v_b = pieces(m_block, start, 0, M, PIECES), pieces(v_block, start, 0, M, PIECES)
    m_rows = tl.make_tensor_descriptor(m_right + layer * wide * STRIDE, [wide, STRIDE], [STRIDE, 1], [R, BN])
    v_rows = tl.make_tensor_descriptor(v_right + layer * wide * STRIDE, [wide, STRIDE], [STRIDE, 1], [R, BN])
    if ALIGNED:
        weight_rows = tl.make_tensor_descriptor(weight, [M, N], [N, 1], [BM, BN])
        grad_rows = tl.make_tensor_descriptor(grad, [M, N], [N, 1], [BM, BN])
    else:
        weight += start.to(tl.int64) * N
        grad += start.to(tl.int64) * N
        down = tl.arange(0, BM)[:, None]
        across = tl.arange(0, BN)[None, :]
        offsets = down * N + across
    m_sum = tl.zeros((BM, R), tl.float32)
    v_sum = tl.zeros((BM, R), tl.float32)
    for column in range(0, N, BN):
        if ALIGNED:
            raw = grad_rows.load([start, column])
        else:
            inside = (down < M - start) & (across < N - column)
            raw = tl.load(grad + column + offsets, mask=inside, other=0.0)
        m_a, v_a = pieces(m_rows, 0, column, R, PIECES), pieces(v_rows, 0, column, R, PIECES)
        zero = tl.zeros((BM, BN), tl.float32)
        m = product(m_b, m_a, zero, PIECES, "", DOT_F32)
        v = product(v_b, v_a, zero, PIECES, "", DOT_F32)
        m_sum = product(split(raw, PIECES), m_a, m_sum, PIECES, "b", DOT_F32)
        v_sum = product(split(tl.abs(raw), PIECES), v_a, v_sum, PIECES, "b", DOT_F32)
        g = raw.to(tl.float32)
        m = clip(m + own_m * g, LARGEST)
        v = tl.fma(v, v, own_v * (g * g))
        direction = clip(m * reciprocal(root(v, FAST) + eps, FAST), BOUND)
        if ALIGNED:
            new = decay * weight_rows.load([start, column]).to(tl.float32) - rate * direction
            weight_rows.store([start, column], narrow(new, m, seed, WEIGHT, STOCHASTIC))
        else:
            new = decay * tl.load(weight + column + offsets, mask=inside, other=0.0).to(tl.float32) - rate * direction
            tl.store(weight + column + offsets, narrow(new, m, seed, WEIGHT, STOCHASTIC), mask=inside)
    tl.make_tensor_descriptor(m_seen + layer * M * R, [M, R], [R, 1], [BM, R]).store([start, 0], m_sum)
    tl.make_tensor_descriptor(v_seen + layer * M * R, [M, R], [R, 1], [BM, R]).store([start, 0], v_sum)


def columns_ref(grads: list[Tensor], m_left: Tensor, v_left: Tensor, m_seen: Tensor, v_seen: Tensor) -> None:
    """See L gradients through the left factors: `m_seen <- m_left^T g`, `v_seen <- v_left^T |g|`.

    Args:
        grads: L tensors (m, n), fp32 or bf16; the kernel takes a table of their addresses.
        m_left, v_left: (L, pieces, m, R) bf16. m_seen, v_seen: (L, R, stride) fp32, written up to column n.
    """
    for i, grad in enumerate(grads):
        (m_b, v_b), operand = whole(m_left[i], v_left[i]), multiplied(grad, m_left.shape[1])
        m_seen[i, :, : grad.shape[1]] = m_b.mT @ operand
        v_seen[i, :, : grad.shape[1]] = v_b.mT @ operand.abs()


@triton.jit
def columns(
    grads,
    m_left,
    v_left,
    m_seen,
    v_seen,
    layer,
    start,
    M,
    N,
    STRIDE,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECES: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    grad = pointer(grads, layer, GRAD)
    layer = layer.to(tl.int64)
    thick = M * PIECES
    m_rows = tl.make_tensor_descriptor(m_left + layer * thick * R, [thick, R], [R, 1], [BM, R])
    v_rows = tl.make_tensor_descriptor(v_left + layer * thick * R, [thick, R], [R, 1], [BM, R])
    if ALIGNED:
        grad_rows = tl.make_tensor_descriptor(grad, [M, N], [N, 1], [BM, BN])
    else:
        down = tl.arange(0, BM)[:, None]
        across = start + tl.arange(0, BN)[None, :]
        offsets = down * N + across
    m_sum = tl.zeros((R, BN), tl.float32)
    v_sum = tl.zeros((R, BN), tl.float32)
    for row in range(0, M, BM):
        if ALIGNED:
            raw = grad_rows.load([row, start])
        else:
            raw = tl.load(grad + offsets, mask=(down < M - row) & (across < N), other=0.0)
            grad += BM * N
        m_b, v_b = pieces(m_rows, row, 0, M, PIECES), pieces(v_rows, row, 0, M, PIECES)
        m_sum = product(m_b, split(raw, PIECES), m_sum, PIECES, "a", DOT_F32)
        v_sum = product(v_b, split(tl.abs(raw), PIECES), v_sum, PIECES, "a", DOT_F32)
    m_out = tl.make_tensor_descriptor(m_seen + layer * R * STRIDE, [R, STRIDE], [STRIDE, 1], [R, BN])
    v_out = tl.make_tensor_descriptor(v_seen + layer * R * STRIDE, [R, STRIDE], [STRIDE, 1], [R, BN])
    m_out.store([0, start], m_sum)
    v_out.store([0, start], v_sum)


@triton.jit
def both(
    weights,
    grads,
    numbers,
    m_left,
    m_right,
    v_left,
    v_right,
    m_seen,
    v_seen,
    m_left_whole,
    v_left_whole,
    m_seen_below,
    v_seen_below,
    M,
    N,
    STRIDE,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    CM: tl.constexpr,
    CN: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PIECES: tl.constexpr,
    FAST: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    """`rows` (arguments up to `v_seen`) and `columns` (the next four) of every matrix, one matrix after the other."""
    row_tasks = tl.cdiv(M, BM) if ROWS else 0
    column_tasks = tl.cdiv(N, CN) if COLUMNS else 0
    layer = tl.program_id(0) // (row_tasks + column_tasks)
    task = tl.program_id(0) % (row_tasks + column_tasks)
    if task < row_tasks:
        if ROWS:
            rows(
                weights, grads, numbers, m_left, m_right, v_left, v_right, m_seen, v_seen,
                layer, task * BM, M, N, STRIDE,
                R, BM, BN, WEIGHT, GRAD, ALIGNED, STOCHASTIC, PIECES, FAST, DOT_F32,
            )  # fmt: skip
    else:
        if COLUMNS:
            columns(
                grads, m_left_whole, v_left_whole, m_seen_below, v_seen_below,
                layer, (task - row_tasks) * CN, M, N, STRIDE,
                R, CM, CN, GRAD, ALIGNED, PIECES, DOT_F32,
            )  # fmt: skip


class Tiles(NamedTuple):
    """What one program takes at a time."""

    BM: int
    """Rows of a row task, and columns that it takes in one turn."""
    BN: int
    CM: int
    """Rows that a column task takes in one turn, and its columns."""
    CN: int
    warps: int
    stages: int


def tiles(rank: int, dtype: torch.dtype, aligned: bool) -> Tiles:
    """The largest that keep all in registers, by `benchmarks/compile_kernels.py`: large ones load less often.

    Args:
        rank: padded. dtype: of the weights.
    """
    warps = 8 if rank == 128 else 4
    if not aligned:
        return Tiles(64, 16 if dtype is torch.float32 and rank == 64 else 32, 32, 64, warps, 2)
    if dtype is torch.float32:
        return Tiles(64, 32, 32, 64, 4, 3)
    if rank < 64:
        return Tiles(64, 64, 64, 128, 4, 3)
    return Tiles(128, 64, 64, 128, 8, 3) if rank == 64 else Tiles(128, 32, 32, 128, 8, 3)


Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Columns = tuple[Tensor, Tensor, Tensor, Tensor]


def launch(tables: Tables, *, rows: Rows | None = None, columns: Columns | None = None) -> None:
    """`rows` with its arguments after `grads`, `columns` with its, or both in one grid."""
    (m, n), count = tables.shape, len(tables.weights)
    rank = rows[1].shape[3] if rows else columns[0].shape[3] if columns else 0
    tile = tiles(rank, tables.dtype, tables.aligned)
    tasks = (triton.cdiv(m, tile.BM) if rows else 0) + (triton.cdiv(n, tile.CN) if columns else 0)
    primitives.allow_descriptors()
    with torch.cuda.device_of(tables.weights):
        kernel: Any = both[(count * tasks,)]
        kernel(
            tables.weights,
            tables.grads,
            *(rows or (None,) * 7),
            *(columns or (None,) * 4),
            m,
            n,
            stride(n),
            ROWS=rows is not None,
            COLUMNS=columns is not None,
            R=rank,
            BM=tile.BM,
            BN=tile.BN,
            CM=tile.CM,
            CN=tile.CN,
            WEIGHT=primitives.TYPES[tables.dtype],
            GRAD=primitives.TYPES[tables.grad_dtype],
            ALIGNED=tables.aligned,
            STOCHASTIC=tables.stochastic,
            PIECES=PIECES[tables.dtype],
            **primitives.constants(),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )


class Side(NamedTuple):
    """What fitting takes from one side of both moments, as stacks (2L, ...), first moments first.

    Made of X (2L, r, k): every A, or every B^T.
    """

    unit: Tensor
    """X over its `size`, (2L, r, k)."""
    size: Tensor
    """(2L, 1, 1), see `linalg.damped_size`."""
    lower: Tensor
    """L (2L, r, r), with `L L^T` the damped Gram matrix of `unit`."""
    inverse: Tensor
    """L^-1."""

    @classmethod
    def of(cls, *xs: Tensor, damping: float, relative: bool) -> list[Side]:
        """One of each X, all factorised in one launch."""
        sizes = [damped_size(x.abs().amax((1, 2), keepdim=True), damping, relative=relative) for x in xs]
        units = [x / size for x, size in zip(xs, sizes, strict=True)]
        grams = torch.cat([unit @ unit.mT for unit in units])
        found = cholesky_inverse(damped_gram(grams, torch.cat(sizes), damping, relative=relative))
        lowers, inverses = (x.chunk(len(xs)) for x in found)
        return [cls(*each) for each in zip(units, sizes, lowers, inverses, strict=True)]

    def operand(self) -> Tensor:
        """What the gradients are multiplied by, (2L, r, k): whitened for the first moments."""
        half = len(self.unit) // 2
        return torch.cat((self.inverse[:half] @ self.unit[:half], self.unit[half:]))

    def solve(self, seen: Tensor) -> Tensor:
        """The fit, (2L, r, j), from what was seen of the gradients through `operand`, (2L, r, j)."""
        half, left = len(self.unit) // 2, self.inverse.mT
        left = torch.cat((left[:half], left[half:] @ self.inverse[half:]))
        # an X that is zero has a size next to nothing, and saw nothing
        return torch.where(self.unit.any((1, 2), keepdim=True), left, 0.0) @ seen / self.size


@primitives.full_precision()
def step(
    tables: Tables,
    numbers: Tensor,
    b: Tensor,
    a: Tensor,
    *,
    scales: Tensor,
    signs: Tensor,
    gammas: Tensor,
    damping: float,
    relative: bool,
    sequential: bool,
) -> tuple[Tensor, Tensor]:
    """Step L weights and return the new factors of their moments.

    Stacks hold both moments, the L first ones first; tables (L, 2) hold both side by side.

    Args:
        tables: of the weights (m, n) and their gradients.
        numbers: (L, 6) fp32, as `rows` takes them.
        b, a: (2L, m, r) and (2L, r, n) fp32.
        scales: (L, 2) what the rebuilt product is multiplied by; v's is then squared.
        signs: (L, 2) what the seen gradients are multiplied by. gammas: (L, 2) the fits' step sizes.
        damping, relative: of `linalg.damped_pinv`.
        sequential: whether A is fitted to the new B, in a second launch.
    """
    (m, n), half, r = tables.shape, len(tables.weights), b.shape[2]
    size, width = primitives.padded_rank(r), stride(n)
    like = {"dtype": torch.float32, "device": b.device}
    scales, signs, gammas = (x.mT.reshape(-1, 1, 1) for x in (scales, signs, gammas))

    right, *left = Side.of(a, *(() if sequential else (b.mT,)), damping=damping, relative=relative)
    rebuilt = torch.cat((b[:half] @ right.lower[:half], b[half:])) * (right.size * scales)
    lefts, rights = padded(rebuilt, m, size, tables.dtype), padded(right.operand(), size, width, tables.dtype)
    inside, below = torch.empty(2 * half, m, size, **like), torch.empty(2 * half, size, width, **like)
    row_task = (numbers, lefts[:half], rights[:half], lefts[half:], rights[half:], inside[:half], inside[half:])

    def column_task(left: Side) -> Columns:
        wholes = padded(left.operand().mT, m, size, tables.dtype)
        return wholes[:half], wholes[half:], below[:half], below[half:]

    launch(tables, rows=row_task, columns=None if sequential else column_task(*left))
    new_b = b.lerp(right.solve(inside[:, :, :r].mT).mT * signs, gammas)
    if sequential:
        left = Side.of(new_b.mT, damping=damping, relative=relative)
        launch(tables, columns=column_task(*left))
    new_a = a.lerp(left[0].solve(below[:, :r, :n]) * signs, gammas)
    # a gradient of which nothing was seen is zero: its moments fade, and their A stays
    silent = (inside == 0).all((1, 2), keepdim=True)
    silent = (silent[:half] & silent[half:]).repeat(2, 1, 1)
    return torch.where(silent, (1 - gammas) ** 2 * b, new_b), torch.where(silent, a, new_a)
