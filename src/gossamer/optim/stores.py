"""How a moment is kept between two steps: dense, in bf16, in 8-bit codes, or as the product of two thin factors.

A method that leaves the choice between dense, bf16 and 8 bits to a field `state_bits` reads a moment, advances what it
got in place, and writes it back; with 32 bits it got the stored tensor itself, and nothing is copied:

    def init(self, param):
        return stores.moments(param, "m", "v", bits=self.state_bits)

    def update(self, grad, state, ctx):
        m = stores.read(state, "m").lerp_(grad, 1 - beta1)
        v = stores.read(state, "v").mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        stores.write_(state, m=m, v=v)
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from gossamer.errors import UserError
from gossamer.optim.contract import Context, State

BLOCK = 256
"""Neighbours in a row that share one scale.

The last block of a row is what is left of it: a row, wherever it lies, is encoded by itself. A tensor of one dimension
is one row, and one of more than two has a row for each first index."""


def arithmetic_dtype(param: Tensor) -> torch.dtype:
    """fp32, or the parameter's own dtype if that is wider: a bf16 second moment cannot decay (0.999 v rounds to v)."""
    return torch.promote_types(param.dtype, torch.float32)


def dense(param: Tensor, *names: str) -> State:
    """One zero tensor of the parameter's shape for each name, row by row however the parameter lies."""
    return {name: _zeros(param, arithmetic_dtype(param)) for name in names}


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def factored(param: Tensor, rank: int, *names: str) -> State:
    """`{name}_B` (m, r) and `{name}_A` (r, n), both zero, for each name; r = min(rank, m, n)."""
    m, n = param.shape
    r, like = min(rank, m, n), {"dtype": arithmetic_dtype(param), "device": param.device}
    state = {}
    for name in names:
        state[f"{name}_B"] = torch.zeros(m, r, **like)
        state[f"{name}_A"] = torch.zeros(r, n, **like)
    return state


def check_bits(method: str, bits: int) -> None:
    """The range check of a field `state_bits`."""
    if bits not in (32, 16, 8):
        raise UserError(f"{method}: state_bits is {bits}; allowed: 32, 16, 8")


def moments(param: Tensor, *names: str, bits: int, shape: tuple[int, ...] | None = None) -> State:
    """Zero moments for `read` and `write_`.

    `{name}` if bits is 32, `{name}_bf16` if it is 16, `{name}_codes` and `{name}_scale` if it is 8.

    Args:
        param: gives dtype and device.
        shape: of the moment, if it is not the parameter's.
    """
    like = param if shape is None else param.new_empty(()).expand(shape)
    if bits == 32:
        return dense(like, *names)
    if bits == 16:
        if arithmetic_dtype(param) is not torch.float32:
            raise UserError(f"state_bits: 16 is not enough for a {param.dtype} parameter; allowed: 32, 8")
        return {f"{name}_bf16": _zeros(like, torch.bfloat16) for name in names}
    state = {}
    for name in names:
        state[f"{name}_codes"] = _zeros(like, torch.uint8)
        shape = (*_heights(like), -(-_length(like) // BLOCK))
        state[f"{name}_scale"] = like.new_zeros(shape, dtype=arithmetic_dtype(param))
    return state


def read(state: State, name: str) -> Tensor:
    """The moment, to be advanced in place: the stored tensor itself, or what its bf16 numbers or codes stand for."""
    if name in state:
        return state[name]
    if f"{name}_bf16" in state:
        return state[f"{name}_bf16"].float()
    codes, scale = state[f"{name}_codes"], state[f"{name}_scale"]
    values = codebook(_signed(name), scale.dtype, scale.device)[codes.view(-1).int()].view(codes.shape)
    return _unblocked(_blocks(values).mul_(scale[..., None]), codes)


def adam_moments_(state: State, grad: Tensor, betas: tuple[float, float], ctx: Context) -> tuple[Tensor, Tensor]:
    """Advance `m` and `v`, kept in any number of bits, by a gradient of their shape; returns both bias-corrected."""
    beta1, beta2 = betas
    m = read(state, "m").lerp_(grad, 1 - beta1)
    v = read(state, "v").mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    write_(state, m=m, v=v)
    return m / (1 - beta1**ctx.m_step), v / (1 - beta2**ctx.v_step)


def write_(state: State, **values: Tensor) -> None:
    """Keep moments: nothing to do for what `read` took from the state itself; otherwise the nearest numbers or codes.

    bf16 rounds to nearest, as the papers' code does that keeps everything in bf16: a second moment with beta2 above
    about 0.998 then never decays, since 0.999 v rounds to v. It is there to show that.

    The scale of a block is its entry of largest magnitude, sign and all: that entry and zero are kept exactly, and the
    codes of -x are those of x. An entry of a second moment (`v...`) that is not zero does not become zero either, but
    the smallest code: its root is divided by.
    """
    for name, value in values.items():
        if name in state:
            if value is not state[name]:
                state[name].copy_(value)
            continue
        if f"{name}_bf16" in state:
            state[f"{name}_bf16"].copy_(value)
            continue
        book, blocks = codebook(_signed(name), value.dtype, value.device), _blocks(value)
        scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        unit = blocks / torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = torch.bucketize(unit, (book[1:] + book[:-1]) / 2, out_int32=True)
        if not _signed(name):
            codes = codes.maximum((blocks > 0).int())
        state[f"{name}_codes"].copy_(_unblocked(codes, value))
        state[f"{name}_scale"].copy_(scale.squeeze(-1))


@cache
def codebook(signed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The 256 numbers in [-1, 1], or [0, 1], that a code can stand for, in ascending order.

    Dynamic tree quantization (Dettmers et al. 2022, Section 1.3): a sign bit if signed, then k zeros, a one, and what
    is left of the byte as a linear fraction f. They stand for +-10^-k f, where f is the middle of one of 2^bits equal
    parts of [0.1, 1]. The two bytes that this leaves over stand for 0 and 1.
    """
    magnitudes = []
    for k in range(7):
        parts = 2 ** (6 - k if signed else 7 - k)
        magnitudes += [10.0**-k * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
    negative = [-x for x in magnitudes] if signed else []
    return torch.tensor(sorted([*negative, 0.0, *magnitudes, 1.0]), dtype=dtype, device=device)  # copied once a device


def _signed(name: str) -> bool:
    return not name.startswith("v")


def _blocks(x: Tensor) -> Tensor:
    """(rows, blocks, entries) or, of one row, (blocks, entries); the last of a row filled up with zeros, if any is."""
    length = _length(x)
    count = -(-length // BLOCK)
    size = BLOCK if count > 1 else length
    return F.pad(x.reshape(*_heights(x), length), (0, count * size - length)).unflatten(-1, (count, size))


def _unblocked(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_blocks`, in the shape of `like`."""
    return blocks.flatten(-2)[..., : _length(like)].reshape(like.shape)


def _heights(x: Tensor) -> tuple[int, ...]:
    """(rows,), or nothing if there is one."""
    return tuple(x.shape[:1]) if x.ndim > 1 else ()


def _length(x: Tensor) -> int:
    """Entries of a row."""
    return torch.Size(x.shape[1:] if x.ndim > 1 else x.shape).numel()
