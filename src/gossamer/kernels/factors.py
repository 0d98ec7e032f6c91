"""A step of moments that are kept as B A, in two passes over the gradient.

Each moment advances to a B' A' that follows `decay B A + gain T`, where T is the gradient, its square or its magnitude.
`sketch` takes rows of the matrix and multiplies T with a test matrix W, from which torch makes the new B'. `update`
takes columns, writes the weight, and multiplies T with B'. Torch multiplies the history, decay B A, out of the thin
factors in fp32: only what is new in this step goes through narrow operands.

The second moment comes in five kinds, `SECOND`:

    none          there is none, and the step is the sign of the first moment
    rows-columns  the outer product of two vectors                   not followed: the sums of g^2 are returned
    floored       B A, negative entries replaced by `floor`          T = own g^2 + what the floor adds to B A
    square        the same                                           T = own g^2
    absolute      (B A)^2                                            T = |g|

Wherever a moment's B A enters it was multiplied by its weight in the bias-corrected moment of this step.
Each kernel takes L matrices of one shape (M, N) in one launch. Thin operands come as the bf16 pieces that they are the
sum of, P of them, and are filled up with zeros: (L, P, HEIGHT, R) and (L, P, R, WIDTH), where R is a power of two, and
HEIGHT and WIDTH are M and N up to the next multiple of 64 and 8.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels import Tables, primitives
from gossamer.kernels.primitives import (
    PIECES,
    clip,
    dot,
    narrow,
    pieces,
    pointer,
    product,
    reciprocal,
    root,
    round_bf16_ref,
    split,
    whole,
)

OWN_M, OWN_V, TAIL_WEIGHT, RATE, DECAY, SEED = (tl.constexpr(i) for i in range(6))
"""Columns of the table `numbers`: the weights of g and g^2 in the corrected moments, that of `update`'s tail, the
learning rate, what the weight is multiplied by before the step, and the seed of its rounding."""
COLUMNS = tl.constexpr(6)
DIRECTION_BOUND = tl.constexpr(torch.finfo(torch.float32).max ** 0.5)
FACTORED = ("floored", "square", "absolute")
FLOORED = ("floored", "square")
GRAIN = tl.constexpr(64)
"""Operands with a row for each of the matrix are filled up to a multiple of this, so that no tile is larger."""


def sketch_ref(
    grads: list[Tensor],
    numbers: Tensor,
    m_W: Tensor,
    v_W: Tensor,
    v_B: Tensor,
    v_A: Tensor,
    m_Y: Tensor,
    v_Y: Tensor,
    below_Y: Tensor,
    rows: Tensor,
    below: Tensor,
    bound: float,
    SECOND: str,
) -> None:
    """T W^T of both moments, and what is to be known of the whole matrix before the step.

    Args:
        grads: L matrices (M, N), fp32 or bf16; the kernel takes a table of their addresses.
        numbers: (L, 6) fp32.
        m_W, v_W: (L, P, R, WIDTH), the test matrices.
        v_B, v_A: (L, P, HEIGHT, R) and (L, P, R, WIDTH).
        m_Y, v_Y: (L, M, R) fp32, written: T W^T. "floored" counts the floor as zero here.
        below_Y: (L, M, R) fp32, written by "floored": [B A < 0] W^T, which is to be added `floor` times.
        rows: (L, M) fp32, written by "rows-columns": the sums of g^2.
        below: (L, M, 2) fp32, written by "floored" and "square": of a row's entries of B A below zero, the sum of the
            magnitudes and the number.
        bound: g is cut here in g^2.
    """
    for i, grad in enumerate(grads):
        (m, n), g = grad.shape, grad.float()
        square = g.clamp(-bound, bound).square()
        m_Y[i] = g @ whole(m_W[i])[0][:, :n].mT
        if SECOND == "rows-columns":
            rows[i] = square.sum(1)
        if SECOND not in FACTORED:
            continue
        w, b, a = whole(v_W[i], v_B[i], v_A[i])
        target = g.abs() if SECOND == "absolute" else numbers[i, OWN_V.value] * square
        if SECOND != "absolute":
            past = b[:m] @ a[:, :n]
            below[i] = torch.stack([-past.clamp_max(0).sum(1), (past < 0).sum(1)], 1)
            if SECOND == "floored":
                target = target - past.clamp_max(0)
                below_Y[i] = (past < 0).float() @ w[:, :n].mT
        v_Y[i] = target @ w[:, :n].mT


@triton.jit
def matrix(address, M, N, BM: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr):
    """What `read` and `write` take: a descriptor, where rows begin at multiples of 16 bytes."""
    if ALIGNED:
        found = tl.make_tensor_descriptor(address, [M, N], [N, 1], [BM, BN])  # pyright: ignore
    else:
        found = address
    return found


@triton.jit
def read(source, row, column, M, N, BM: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile (BM, BN), zero outside of the matrix."""
    if ALIGNED:
        found = source.load([row, column])
    else:
        i, j = row + tl.arange(0, BM)[:, None], column + tl.arange(0, BN)[None, :]
        found = tl.load(source + i * N + j, (i < M) & (j < N), 0.0)
    return found


@triton.jit
def write(target, row, column, x, M, N, BM: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr):
    if ALIGNED:
        target.store([row, column], x)
    else:
        i, j = row + tl.arange(0, BM)[:, None], column + tl.arange(0, BN)[None, :]
        tl.store(target + i * N + j, x, (i < M) & (j < N))


@triton.jit
def sketch(
    grads,
    numbers,
    m_W,
    v_W,
    v_B,
    v_A,
    m_Y,
    v_Y,
    below_Y,
    rows,
    below,
    bound,
    M,
    N,
    WIDTH,
    R: tl.constexpr,
    SECOND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECES: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    FLOOR: tl.constexpr = SECOND == "floored" or SECOND == "square"
    HAS_V: tl.constexpr = FLOOR or SECOND == "absolute"
    blocks = tl.cdiv(M, BM)
    layer, row = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BM
    own = tl.load(numbers + layer * COLUMNS + OWN_V)
    i, height = row + tl.arange(0, BM), tl.cdiv(M, GRAIN) * GRAIN
    grad = matrix(pointer(grads, layer, GRAD), M, N, BM, BN, ALIGNED)
    m_w = matrix(m_W + layer * PIECES * R * WIDTH, PIECES * R, WIDTH, R, BN, True)
    m_y = tl.zeros((BM, R), tl.float32)
    if SECOND == "rows-columns":
        sums = tl.zeros((BM, BN), tl.float32)
    if HAS_V:
        v_w = matrix(v_W + layer * PIECES * R * WIDTH, PIECES * R, WIDTH, R, BN, True)
        v_y = tl.zeros((BM, R), tl.float32)
    if FLOOR:
        v_b = matrix(v_B + layer * PIECES * height * R, PIECES * height, R, BM, R, True)
        v_b = pieces(v_b, row, 0, height, PIECES)
        v_a = matrix(v_A + layer * PIECES * R * WIDTH, PIECES * R, WIDTH, R, BN, True)
        total, count = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if SECOND == "floored":
        below_y = tl.zeros((BM, R), tl.float32)

    for column in range(0, N, BN):
        g = read(grad, row, column, M, N, BM, BN, ALIGNED)
        m_y = product(split(g, PIECES), pieces(m_w, 0, column, R, PIECES), m_y, PIECES, "b", DOT_F32)
        square = tl.minimum(g.to(tl.float32) * g.to(tl.float32), bound * bound, propagate_nan=tl.PropagateNan.ALL)
        if SECOND == "rows-columns":
            sums += square
        if HAS_V:
            w = pieces(v_w, 0, column, R, PIECES)
            if FLOOR:
                a, zero = pieces(v_a, 0, column, R, PIECES), tl.zeros((BM, BN), tl.float32)
                past = product(v_b, a, zero, PIECES, "", DOT_F32)
                negative = tl.where(past < 0, 1.0, 0.0)
                total -= tl.sum(tl.minimum(past, 0.0), 1)
                count += tl.sum(negative, 1)
                target = own * square
                if SECOND == "floored":
                    target -= tl.minimum(past, 0.0)
                    for piece in tl.static_range(PIECES):
                        below_y = dot(negative.to(tl.bfloat16), tl.trans(w[piece]), below_y, "ieee", DOT_F32)
            else:
                target = tl.abs(g)
            v_y = product(split(target, PIECES), w, v_y, PIECES, "b", DOT_F32)

    matrix(m_Y + layer * M * R, M, R, BM, R, True).store([row, 0], m_y)
    if SECOND == "rows-columns":
        tl.store(rows + layer * M + i, tl.sum(sums, 1), i < M)
    if HAS_V:
        matrix(v_Y + layer * M * R, M, R, BM, R, True).store([row, 0], v_y)
    if FLOOR:
        tl.store(below + (layer * M + i) * 2, total, i < M)
        tl.store(below + (layer * M + i) * 2 + 1, count, i < M)
    if SECOND == "floored":
        matrix(below_Y + layer * M * R, M, R, BM, R, True).store([row, 0], below_y)


def update_ref(
    params: list[Tensor],
    grads: list[Tensor],
    numbers: Tensor,
    m_B: Tensor,
    m_A: Tensor,
    m_I: Tensor,
    m_W: Tensor,
    m_N: Tensor,
    v_B: Tensor,
    v_A: Tensor,
    v_N: Tensor,
    rows: Tensor,
    columns: Tensor,
    floor: Tensor,
    m_P: Tensor,
    v_P: Tensor,
    sums: Tensor,
    bound: float,
    eps: float,
    SECOND: str,
    STEP: bool,
    TAIL: bool,
    STOCHASTIC: bool,
) -> None:
    """The step, and B'^T T of both moments.

        m = B A + own_m g + I W, where with a tail that is not zero A is first lessened by tail B^T g
        weight <- decay weight - rate m / (sqrt(v) + eps)

    Args:
        params, grads: L matrices (M, N); the kernel takes tables of their addresses.
        numbers: (L, 6) fp32.
        m_B, m_A: (L, P, HEIGHT, R), and (L, R, WIDTH) fp32.
        m_I, m_W: (L, P, HEIGHT, R) and (L, P, R, WIDTH), read with a tail.
        m_N, v_N: (L, P, HEIGHT, R), the new B'.
        v_B, v_A: (L, P, HEIGHT, R) and (L, P, R, WIDTH).
        rows, columns: (L, M) and (L, N) fp32, read by "rows-columns": the second moment without this step's.
        floor: (L,) fp32.
        m_P, v_P: (L, R, WIDTH) fp32, written: B'^T T.
        sums: (L, N) fp32, written by "rows-columns": the sums of g^2.
        bound, eps: g is cut at one, but not in products; the other is added to the root of the second moment.
        STEP: whether the weights are written; else only the products and sums are.
        TAIL: whether there is a tail. STOCHASTIC: how the weights are rounded.
    """
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        (m, n), raw, g = grad.shape, grad.float(), grad.float().clamp(-bound, bound)
        own_m, own_v, tail, rate, decay, seed = numbers[i]
        m_P[i, :, :n] = whole(m_N[i])[0][:m].mT @ raw
        v = own_v * g.square()
        if SECOND == "rows-columns":
            v = v + torch.outer(rows[i], columns[i])
            sums[i] = g.square().sum(0)
        elif SECOND in FACTORED:
            b, a, new_b = whole(v_B[i], v_A[i], v_N[i])
            past = b[:m] @ a[:, :n]
            history = past.square() if SECOND == "absolute" else torch.where(past < 0, floor[i], past)
            target = {"absolute": raw.abs(), "square": v, "floored": history - past + v}[SECOND]
            v_P[i, :, :n] = new_b[:m].mT @ target
            v = v + history
        if not STEP:
            continue
        b, thin = whole(m_B[i])[0][:m], m_A[i, :, :n]
        if TAIL and tail != 0:
            thin = thin - tail * (b.mT @ raw)
        moment = b @ thin + own_m * g
        if TAIL:
            inside, w = whole(m_I[i], m_W[i])
            moment = moment + inside[:m] @ w[:, :n]
        largest = torch.finfo(torch.float32).max ** 0.5
        if SECOND == "none":
            direction = torch.where(moment.isnan(), moment, moment.sign())
        else:
            direction = (moment / (v.sqrt() + eps)).clamp(-largest, largest)
        new = decay * param.float() - rate * direction
        param.copy_(round_bf16_ref(new, moment, seed.int()) if STOCHASTIC else new)


@triton.jit
def update(
    params,
    grads,
    numbers,
    m_B,
    m_A,
    m_I,
    m_W,
    m_N,
    v_B,
    v_A,
    v_N,
    rows,
    columns,
    floor,
    m_P,
    v_P,
    sums,
    bound,
    eps,
    M,
    N,
    WIDTH,
    R: tl.constexpr,
    SECOND: tl.constexpr,
    STEP: tl.constexpr,
    TAIL: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    FAST: tl.constexpr,
    PIECES: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    HAS_V: tl.constexpr = SECOND == "floored" or SECOND == "square" or SECOND == "absolute"
    blocks = tl.cdiv(N, BN)
    layer, column = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BN
    numbers += layer * COLUMNS
    own_m, own_v, tail = tl.load(numbers + OWN_M), tl.load(numbers + OWN_V), tl.load(numbers + TAIL_WEIGHT)
    rate, decay, seed = tl.load(numbers + RATE), tl.load(numbers + DECAY), tl.load(numbers + SEED).to(tl.int32)
    j, height = column + tl.arange(0, BN), tl.cdiv(M, GRAIN) * GRAIN
    grad = matrix(pointer(grads, layer, GRAD), M, N, BM, BN, ALIGNED)
    m_n = matrix(m_N + layer * PIECES * height * R, PIECES * height, R, BM, R, True)
    m_p = tl.zeros((R, BN), tl.float32)
    if HAS_V:
        v_b = matrix(v_B + layer * PIECES * height * R, PIECES * height, R, BM, R, True)
        v_a = matrix(v_A + layer * PIECES * R * WIDTH, PIECES * R, WIDTH, R, BN, True)
        v_a = pieces(v_a, 0, column, R, PIECES)
        v_n = matrix(v_N + layer * PIECES * height * R, PIECES * height, R, BM, R, True)
        v_p = tl.zeros((R, BN), tl.float32)
        lowest = tl.load(floor + layer)
    if SECOND == "rows-columns":
        mean = tl.load(columns + layer * N + j, j < N, 0.0)
        squares = tl.zeros((BM, BN), tl.float32)
    if STEP:
        param = matrix(pointer(params, layer, WEIGHT), M, N, BM, BN, ALIGNED)
        m_b = matrix(m_B + layer * PIECES * height * R, PIECES * height, R, BM, R, True)
        thin = matrix(m_A + layer * R * WIDTH, R, WIDTH, R, BN, True).load([0, column])
        if TAIL:
            inside = matrix(m_I + layer * PIECES * height * R, PIECES * height, R, BM, R, True)
            w = matrix(m_W + layer * PIECES * R * WIDTH, PIECES * R, WIDTH, R, BN, True)
            w = pieces(w, 0, column, R, PIECES)
            if tail != 0:
                known = tl.zeros((R, BN), tl.float32)
                for row in range(0, M, BM):
                    g = split(read(grad, row, column, M, N, BM, BN, ALIGNED), PIECES)
                    known = product(pieces(m_b, row, 0, height, PIECES), g, known, PIECES, "a", DOT_F32)
                thin -= tail * known
        thin = split(thin, PIECES)

    for row in range(0, M, BM):
        raw = read(grad, row, column, M, N, BM, BN, ALIGNED)
        m_p = product(pieces(m_n, row, 0, height, PIECES), split(raw, PIECES), m_p, PIECES, "a", DOT_F32)
        g = clip(raw.to(tl.float32), bound)
        v = own_v * g * g
        if SECOND == "rows-columns":
            i = row + tl.arange(0, BM)
            squares += g * g
            v += tl.load(rows + layer * M + i, i < M, 0.0)[:, None] * mean[None, :]
        if HAS_V:
            zero = tl.zeros((BM, BN), tl.float32)
            past = product(pieces(v_b, row, 0, height, PIECES), v_a, zero, PIECES, "", DOT_F32)
            if SECOND == "absolute":
                target, history = tl.abs(raw), past * past
            else:
                target, history = v, tl.where(past < 0, lowest, past)
                if SECOND == "floored":
                    target += history - past
            v_p = product(pieces(v_n, row, 0, height, PIECES), split(target, PIECES), v_p, PIECES, "a", DOT_F32)
            v += history
        if STEP:
            zero = tl.zeros((BM, BN), tl.float32)
            m = product(pieces(m_b, row, 0, height, PIECES), thin, zero, PIECES, "", DOT_F32)
            if TAIL:
                m = product(pieces(inside, row, 0, height, PIECES), w, m, PIECES, "", DOT_F32)
            m += own_m * g
            if SECOND == "none":
                direction = tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, m))
            else:
                direction = clip(m * reciprocal(root(v, FAST) + eps, FAST), DIRECTION_BOUND)
            old = read(param, row, column, M, N, BM, BN, ALIGNED).to(tl.float32)
            new = narrow(decay * old - rate * direction, m, seed, WEIGHT, STOCHASTIC)
            write(param, row, column, new, M, N, BM, BN, ALIGNED)

    matrix(m_P + layer * R * WIDTH, R, WIDTH, R, BN, True).store([0, column], m_p)
    if HAS_V:
        matrix(v_P + layer * R * WIDTH, R, WIDTH, R, BN, True).store([0, column], v_p)
    if SECOND == "rows-columns":
        tl.store(sums + layer * N + j, tl.sum(squares, 0), j < N)


def tile(kernel: str, SECOND: str, depth: int, dtype: torch.dtype, aligned: bool) -> dict[str, int]:
    """The largest tile of a kernel found that spills nothing, by `benchmarks/compile_kernels.py`."""
    small = {"BM": 64, "BN": 32, "num_warps": 4, "num_stages": 2}
    if kernel == "update" and dtype is torch.float32:  # three pieces of every operand in registers
        rows = 32 if depth == 16 or (depth == 32 and aligned) else 16
        return {**small, "BM": rows, "BN": 64 if aligned or depth < 64 else 32}
    if dtype is torch.float32 or (SECOND in FACTORED and depth > 64) or not aligned:
        crowded = kernel == "sketch" and depth > 64 and not aligned
        return {**small, "num_warps": 8} if crowded else small
    return {**small, "BN": 64, "num_stages": 3 if depth < 64 else 2}


def launch_sketch(tables: Tables, numbers: Tensor, *tensors: Tensor | None, bound: float, SECOND: str) -> None:
    """Run `sketch` on its tensors from `m_W` to `below`, None where it reads nothing."""
    m_W = tensors[0]
    assert m_W is not None
    shape = tile("sketch", SECOND, m_W.shape[2], tables.dtype, tables.aligned)
    tasks = len(m_W) * -(-tables.shape[0] // shape["BM"])
    _launch(sketch, tasks, tables, (tables.grads, numbers, *tensors, bound), m_W, SECOND=SECOND, **shape)


def launch_update(
    tables: Tables,
    numbers: Tensor,
    *tensors: Tensor | None,
    bound: float,
    eps: float,
    SECOND: str,
    STEP: bool,
    TAIL: bool,
) -> None:
    """Run `update` on its tensors from `m_B` to `sums`, None where it reads nothing."""
    m_P = tensors[11]
    assert m_P is not None
    shape = tile("update", SECOND, m_P.shape[1], tables.dtype, tables.aligned)
    tasks = len(m_P) * -(-tables.shape[1] // shape["BN"])
    _launch(
        update,
        tasks,
        tables,
        (tables.weights, tables.grads, numbers, *tensors, bound, eps),
        m_P,
        SECOND=SECOND,
        STEP=STEP,
        TAIL=TAIL,
        STOCHASTIC=tables.stochastic,
        WEIGHT=primitives.TYPES[tables.dtype],
        FAST=primitives.constants()["FAST"],
        **shape,
    )


def _launch(
    kernel: Any, tasks: int, tables: Tables, arguments: tuple[Any, ...], rows: Tensor, **constants: Any
) -> None:
    primitives.allow_descriptors()
    with torch.cuda.device_of(tables.weights):
        kernel[(tasks,)](
            *arguments,
            *tables.shape,
            rows.shape[-1],
            R=rows.shape[-2],
            GRAD=primitives.TYPES[tables.grad_dtype],
            ALIGNED=tables.aligned,
            PIECES=PIECES[tables.dtype],
            DOT_F32=primitives.constants()["DOT_F32"],
            enable_fp_fusion=True,
            **constants,
        )
