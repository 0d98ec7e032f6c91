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
Each kernel takes L matrices of one shape (M, N) in one launch. Thin operands are padded with zeros: (L, M, R) and
(L, R, WIDTH), with R a power of two and rows of WIDTH numbers at multiples of 16 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels import Tables, primitives
from gossamer.kernels.primitives import clip, dot, narrow, pointer, reciprocal, root, round_bf16_ref

OWN_M, OWN_V, TAIL_WEIGHT, RATE, DECAY, SEED = range(6)
"""Columns of the table `numbers`: the weights of g and g^2 in the corrected moments, that of `update`'s tail, the
learning rate, what the weight is multiplied by before the step, and the seed of its rounding."""
COLUMNS = tl.constexpr(6)
DIRECTION_BOUND = tl.constexpr(torch.finfo(torch.float32).max ** 0.5)
FACTORED = ("floored", "square", "absolute")
FLOORED = ("floored", "square")
PRECISION = "tf32x3"
"""Of products of fp32 operands: three tf32 ones, which keep fp32's accuracy."""


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
        m_W, v_W: (L, R, WIDTH) test matrices, of the operands' dtype, as are the factors of the second moment.
        v_B, v_A: (L, M, R) and (L, R, WIDTH).
        m_Y, v_Y: (L, M, R) fp32, written: T W^T. "floored" counts the floor as zero here.
        below_Y: (L, M, R) fp32, written by "floored": [B A < 0] W^T, which is to be added `floor` times.
        rows: (L, M) fp32, written by "rows-columns": the sums of g^2.
        below: (L, M, 2) fp32, written by "floored" and "square": of a row's entries of B A below zero, the sum of the
            magnitudes and the number.
        bound: g is cut here in g^2.
    """
    for i, grad in enumerate(grads):
        n, g = grad.shape[1], grad.float()
        square = g.clamp(-bound, bound).square()
        m_Y[i] = g @ m_W[i, :, :n].float().mT
        if SECOND == "rows-columns":
            rows[i] = square.sum(1)
        if SECOND not in FACTORED:
            continue
        target = g.abs() if SECOND == "absolute" else numbers[i, OWN_V] * square
        if SECOND != "absolute":
            past = v_B[i].float() @ v_A[i, :, :n].float()
            below[i] = torch.stack([-past.clamp_max(0).sum(1), (past < 0).sum(1)], 1)
            if SECOND == "floored":
                target = target - past.clamp_max(0)
                below_Y[i] = (past < 0).float() @ v_W[i, :, :n].float().mT
        v_Y[i] = target @ v_W[i, :, :n].float().mT


@triton.jit
def operand(x, TYPE: tl.constexpr, DOT_F32: tl.constexpr):
    """`x` as a product takes it; the interpreter's own conversion to bf16 cuts."""
    if DOT_F32:
        found = x.to(tl.float32)
    else:
        found = x.to(TYPE)
    return found


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
    G_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    LOW: tl.constexpr = m_W.dtype.element_ty
    FLOOR: tl.constexpr = SECOND == "floored" or SECOND == "square"
    HAS_V: tl.constexpr = FLOOR or SECOND == "absolute"
    blocks = tl.cdiv(M, BM)
    layer, row = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BM
    own = tl.load(numbers + layer * COLUMNS + 1)
    i = row + tl.arange(0, BM)
    grad = matrix(pointer(grads, layer, G_TYPE), M, N, BM, BN, ALIGNED)
    m_w = matrix(m_W + layer * R * WIDTH, R, WIDTH, R, BN, True)
    m_y = tl.zeros((BM, R), tl.float32)
    if SECOND == "rows-columns":
        sums = tl.zeros((BM, BN), tl.float32)
    if HAS_V:
        v_w = matrix(v_W + layer * R * WIDTH, R, WIDTH, R, BN, True)
        v_y = tl.zeros((BM, R), tl.float32)
    if FLOOR:
        v_b = matrix(v_B + layer * M * R, M, R, BM, R, True).load([row, 0])
        v_a = matrix(v_A + layer * R * WIDTH, R, WIDTH, R, BN, True)
        total, count = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    if SECOND == "floored":
        below_y = tl.zeros((BM, R), tl.float32)

    for column in range(0, N, BN):
        g = read(grad, row, column, M, N, BM, BN, ALIGNED)
        m_y = dot(g.to(LOW), tl.trans(m_w.load([0, column])), m_y, PRECISION, DOT_F32)
        square = tl.minimum(g.to(tl.float32) * g.to(tl.float32), bound * bound, propagate_nan=tl.PropagateNan.ALL)
        if SECOND == "rows-columns":
            sums += square
        if HAS_V:
            w = tl.trans(v_w.load([0, column]))
            if FLOOR:
                target = own * square
                past = dot(v_b, v_a.load([0, column]), tl.zeros((BM, BN), tl.float32), PRECISION, DOT_F32)
                total -= tl.sum(tl.minimum(past, 0.0), 1)
                count += tl.sum(tl.where(past < 0, 1.0, 0.0), 1)
                if SECOND == "floored":
                    target -= tl.minimum(past, 0.0)
                    below_y = dot(operand(tl.where(past < 0, 1.0, 0.0), LOW, DOT_F32), w, below_y, PRECISION, DOT_F32)
                target = operand(target, LOW, DOT_F32)
            else:
                target = tl.abs(g.to(LOW))
            v_y = dot(target, w, v_y, PRECISION, DOT_F32)

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
        m_B, m_A: (L, M, R) and (L, R, WIDTH); A is fp32, all other operands of one dtype.
        m_I, m_W: (L, M, R) and (L, R, WIDTH), read with a tail.
        m_N, v_N: (L, M, R), the new B'.
        v_B, v_A: (L, M, R) and (L, R, WIDTH).
        rows, columns: (L, M) and (L, N) fp32, read by "rows-columns": the second moment without this step's.
        floor: (L,) fp32.
        m_P, v_P: (L, R, WIDTH) fp32, written: B'^T T.
        sums: (L, N) fp32, written by "rows-columns": the sums of g^2.
        bound, eps: g is cut at one, but not in products; the other is added to the root of the second moment.
        STEP: whether the weights are written; else only the products and sums are.
        TAIL: whether there is a tail. STOCHASTIC: how the weights are rounded.
    """
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        n, raw, g = grad.shape[1], grad.float(), grad.float().clamp(-bound, bound)
        own_m, own_v, tail, rate, decay, seed = numbers[i]
        m_P[i, :, :n] = m_N[i].float().mT @ raw
        v = own_v * g.square()
        if SECOND == "rows-columns":
            v = v + torch.outer(rows[i], columns[i])
            sums[i] = g.square().sum(0)
        elif SECOND in FACTORED:
            past = v_B[i].float() @ v_A[i, :, :n].float()
            history = past.square() if SECOND == "absolute" else torch.where(past < 0, floor[i], past)
            target = {"absolute": raw.abs(), "square": v, "floored": history - past + v}[SECOND]
            v_P[i, :, :n] = v_N[i].float().mT @ target
            v = v + history
        if not STEP:
            continue
        thin = m_A[i, :, :n]
        if TAIL and tail != 0:
            thin = thin - tail * (m_B[i].float().mT @ raw)
        m = m_B[i].float() @ thin + own_m * g
        if TAIL:
            m = m + m_I[i].float() @ m_W[i, :, :n].float()
        largest = torch.finfo(torch.float32).max ** 0.5
        direction = m.sign() if SECOND == "none" else (m / (v.sqrt() + eps)).clamp(-largest, largest)
        new = decay * param.float() - rate * direction
        param.copy_(round_bf16_ref(new, m, seed.int()) if STOCHASTIC else new)


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
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
    DOT_F32: tl.constexpr,
):
    LOW: tl.constexpr = m_N.dtype.element_ty
    HAS_V: tl.constexpr = SECOND == "floored" or SECOND == "square" or SECOND == "absolute"
    blocks = tl.cdiv(N, BN)
    layer, column = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BN
    own_m, own_v = tl.load(numbers + layer * COLUMNS), tl.load(numbers + layer * COLUMNS + 1)
    tail, rate = tl.load(numbers + layer * COLUMNS + 2), tl.load(numbers + layer * COLUMNS + 3)
    decay, seed = tl.load(numbers + layer * COLUMNS + 4), tl.load(numbers + layer * COLUMNS + 5).to(tl.int32)
    j = column + tl.arange(0, BN)
    grad = matrix(pointer(grads, layer, G_TYPE), M, N, BM, BN, ALIGNED)
    m_n = matrix(m_N + layer * M * R, M, R, BM, R, True)
    m_p = tl.zeros((R, BN), tl.float32)
    if HAS_V:
        v_b = matrix(v_B + layer * M * R, M, R, BM, R, True)
        v_a = matrix(v_A + layer * R * WIDTH, R, WIDTH, R, BN, True).load([0, column])
        v_n = matrix(v_N + layer * M * R, M, R, BM, R, True)
        v_p = tl.zeros((R, BN), tl.float32)
        lowest = tl.load(floor + layer)
    if SECOND == "rows-columns":
        mean = tl.load(columns + layer * N + j, j < N, 0.0)
        squares = tl.zeros((BM, BN), tl.float32)
    if STEP:
        param = matrix(pointer(params, layer, W_TYPE), M, N, BM, BN, ALIGNED)
        m_b = matrix(m_B + layer * M * R, M, R, BM, R, True)
        thin = matrix(m_A + layer * R * WIDTH, R, WIDTH, R, BN, True).load([0, column])
        if TAIL:
            inside = matrix(m_I + layer * M * R, M, R, BM, R, True)
            w = matrix(m_W + layer * R * WIDTH, R, WIDTH, R, BN, True).load([0, column])
            if tail != 0:
                known = tl.zeros((R, BN), tl.float32)
                for row in range(0, M, BM):
                    g = read(grad, row, column, M, N, BM, BN, ALIGNED).to(LOW)
                    known = dot(tl.trans(m_b.load([row, 0])), g, known, PRECISION, DOT_F32)
                thin -= tail * known
        thin = operand(thin, LOW, DOT_F32)

    for row in range(0, M, BM):
        raw = read(grad, row, column, M, N, BM, BN, ALIGNED)
        m_p = dot(tl.trans(m_n.load([row, 0])), raw.to(LOW), m_p, PRECISION, DOT_F32)
        g = clip(raw.to(tl.float32), bound)
        v = own_v * g * g
        if SECOND == "rows-columns":
            i = row + tl.arange(0, BM)
            squares += g * g
            v += tl.load(rows + layer * M + i, i < M, 0.0)[:, None] * mean[None, :]
        if HAS_V:
            past = dot(v_b.load([row, 0]), v_a, tl.zeros((BM, BN), tl.float32), PRECISION, DOT_F32)
            if SECOND == "absolute":
                target, history = tl.abs(raw.to(LOW)), past * past
            else:
                target, history = v, tl.where(past < 0, lowest, past)
                if SECOND == "floored":
                    target += history - past
                target = operand(target, LOW, DOT_F32)
            v_p = dot(tl.trans(v_n.load([row, 0])), target, v_p, PRECISION, DOT_F32)
            v += history
        if STEP:
            m = dot(m_b.load([row, 0]), thin, tl.zeros((BM, BN), tl.float32), PRECISION, DOT_F32)
            if TAIL:
                m = dot(inside.load([row, 0]), w, m, PRECISION, DOT_F32)
            m += own_m * g
            if SECOND == "none":
                direction = tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, m))
            else:
                direction = clip(m * reciprocal(root(v, FAST) + eps, FAST), DIRECTION_BOUND)
            old = read(param, row, column, M, N, BM, BN, ALIGNED).to(tl.float32)
            new = narrow(decay * old - rate * direction, m, seed, W_TYPE, STOCHASTIC)
            write(param, row, column, new, M, N, BM, BN, ALIGNED)

    matrix(m_P + layer * R * WIDTH, R, WIDTH, R, BN, True).store([0, column], m_p)
    if HAS_V:
        matrix(v_P + layer * R * WIDTH, R, WIDTH, R, BN, True).store([0, column], v_p)
    if SECOND == "rows-columns":
        tl.store(sums + layer * N + j, tl.sum(squares, 0), j < N)


def tile(kernel: str, SECOND: str, depth: int, dtype: torch.dtype, aligned: bool) -> dict[str, int]:
    """A large tile of a kernel that spills nothing, for R = depth and operands of a dtype: `benchmarks/kernels.py`."""
    factored = SECOND in FACTORED
    if dtype is torch.float32:  # each operand of a product is held three times
        shapes = {"sketch": {16: (64, 32, 4), 32: (64, 32, 4), 64: (32, 32, 8)}} | {
            "update": {16: (64, 64, 4), 32: (16, 64, 4), 64: (16, 32, 4)}
        }
        BM, BN, warps = shapes[kernel][depth]
        BN = BN if aligned else BN // 2
    elif aligned:
        BM, BN, warps = 64, 32 if factored and depth > 64 else 64, 4
    else:
        BM, BN, warps = 64, 32, 8 if kernel == "sketch" and depth > 64 else 4
    narrow = aligned and depth <= 32 and dtype is torch.bfloat16
    return {"BM": BM, "BN": BN, "num_warps": warps, "num_stages": 3 if narrow else 2}


def launch_sketch(tables: Tables, numbers: Tensor, *tensors: Tensor | None, bound: float, SECOND: str) -> None:
    """Run `sketch` on its tensors from `m_W` to `below`, None where it reads nothing."""
    m_W = tensors[0]
    assert m_W is not None
    shape = tile("sketch", SECOND, m_W.shape[1], m_W.dtype, tables.aligned)
    tasks = len(m_W) * triton.cdiv(tables.shape[0], shape["BM"])
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
    m_P, m_N = tensors[11], tensors[4]
    assert m_P is not None and m_N is not None
    shape = tile("update", SECOND, m_P.shape[1], m_N.dtype, tables.aligned)
    tasks = len(m_P) * triton.cdiv(tables.shape[1], shape["BN"])
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
        W_TYPE=primitives.TYPES[tables.dtype],
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
            rows.shape[2],
            R=rows.shape[1],
            G_TYPE=primitives.TYPES[tables.grad_dtype],
            ALIGNED=tables.aligned,
            PRECISION=PRECISION,
            DOT_F32=primitives.constants()["DOT_F32"],
            enable_fp_fusion=True,
            **constants,
        )
