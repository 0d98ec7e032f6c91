"""One reading of a gradient on a CPU, compiled: a thread does all at once to a block of the matrix in its caches.

It is optional. `python -m gossamer.kernels` compiles `sweep.cpp` for the processor at hand; where that was not
done, the same readings run in tiles of plain PyTorch. Nothing is ever compiled unasked.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gossamer.errors import UserError

Buffer = Callable[[int], Tensor]

SOURCE = Path(__file__).with_name("sweep.cpp")
COMPILERS = ("g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


class Product(NamedTuple):
    """`scale B A`, (m, n)."""

    b: Tensor
    """(m, r)."""
    a: Tensor
    """(r, n)."""
    scale: float = 1.0


@dataclass(frozen=True)
class Past:
    """What is remembered of a second moment, H (m, n)."""

    product: Product
    kind: Literal["plain", "squared", "floored"]
    """H is the product P, its square, or P with the entries below zero replaced by `floor`."""
    floor: float | None = None
    """Of "floored". None: the mean magnitude of those entries, which the reading finds; it neither steps nor has left
    products with H then."""


@dataclass(frozen=True)
class Step:
    """A direction: `gain (M + g) / (sqrt(H + g^2) + eps)` for "adam", the sign of M + g for "sign".

    For "adam" M + g is cut at the largest number, and the direction at its root.
    """

    rule: Literal["adam", "sign"]
    m: Product
    """M."""
    gain: float = 1.0
    eps: float = 0.0


@dataclass(frozen=True)
class Reading:
    """What is done in one pass over a gradient G (m, n), cut to [-bound, bound].

    Products are taken with G itself and with a target F: |g|, g^2, or the second moment H + g^2.
    """

    right: tuple[Tensor | None, Tensor | None] = (None, None)
    """X (n, k), for G X and for F X."""
    left: tuple[Tensor | None, Tensor | None] = (None, None)
    """Y (m, k), for Y^T G and for Y^T F."""
    target: Literal["magnitude", "square", "second"] | None = None
    past: Past | Tensor | None = None
    """H, where "adam" or "second" ask for it. A tensor is H itself; a step makes it H + g^2, and `sweep` refuses it."""
    step: Step | None = None
    bound: float = torch.inf


class Products(NamedTuple):
    """Of G and of F; None where none was asked for."""

    right: tuple[Any, Any]
    """(m, k)."""
    left: tuple[Any, Any]
    """(k, n)."""
    floor: float | None = None
    """Where it was to be found."""


def sweep_ref(grad: Tensor, weight: Tensor, reading: Reading, rate: float, decay: float) -> Products:
    """Do what the reading says, all rows at once: `weight <- decay weight - rate direction`, if there is a step.

    Args:
        grad, weight: (m, n), fp32, contiguous, on a CPU; as all tensors of the reading, which may have any strides.
    """
    grad = grad.clamp(-reading.bound, reading.bound)
    second, square, floor = None, grad.square(), None
    if reading.past is not None:
        assert not isinstance(reading.past, Tensor)
        past = _multiplied(reading.past.product)
        if reading.past.kind == "squared":
            past = past.square()
        elif reading.past.kind == "floored":
            below = past < 0
            known = reading.past.floor
            floor = -float(past[below].sum()) / max(int(below.sum()), 1) if known is None else known
            past = torch.where(below, floor, past)
        second = past + square
    sources: Any = grad, {"magnitude": grad.abs(), "square": square, "second": second, None: None}[reading.target]
    products = Products(
        _pair(None if x is None else f @ x for f, x in zip(sources, reading.right, strict=True)),
        _pair(None if y is None else y.mT @ f for f, y in zip(sources, reading.left, strict=True)),
    )
    if (step := reading.step) is not None:
        m = _multiplied(step.m) + grad
        most = torch.finfo(weight.dtype).max
        if second is None or step.rule == "sign":
            direction = torch.where(m.isnan(), m, m.sign())
        else:
            direction = (m.clamp(-most, most) / (second.sqrt() + step.eps) * step.gain).clamp(-(most**0.5), most**0.5)
        weight.mul_(decay).sub_(direction, alpha=rate)
    return products._replace(floor=None if reading.past is None or reading.past.floor is not None else floor)


def sweep(
    grad: Tensor, weight: Tensor, reading: Reading, rate: float, decay: float, buffer: Buffer = torch.empty
) -> Products:
    """`sweep_ref` by the library, which must have been built, on as many threads as torch's.

    Left products are summed over the threads in a fixed order: the result depends on their number alone. `buffer` gives
    that many numbers of scratch.
    """
    (m, n), past, step, alive = grad.shape, reading.past, reading.step, []
    assert not isinstance(past, Tensor)
    right = _pair(None if x is None else x.new_empty(m, x.shape[1]) for x in reading.right)
    left = _pair(None if y is None else y.new_empty(y.shape[1], n) for y in reading.left)
    of = Arguments(m=m, n=n, threads=torch.get_num_threads(), bound=reading.bound)
    of.grad, of.weight = _address(grad), _address(weight)
    of.target = ("magnitude", "square", "second").index(reading.target) + 1 if reading.target else 0
    for i in range(2):
        of.right[i] = _columns(reading.right[i], right[i])
        of.left[i] = _rows(reading.left[i], alive, left[i])
    if past is not None:
        of.v_b, of.v_a = _factors(past.product, alive)
        of.past, of.floor = ("plain", "squared", "floored").index(past.kind), past.floor or 0.0
    if step is not None:
        of.m_b, of.m_a = _factors(step.m, alive)
        of.rule, of.rate, of.decay = ("adam", "sign").index(step.rule) + 1, rate, decay
        of.gain, of.eps = step.gain, step.eps
    below, below_right = (c_double * 2)(), None
    find = past is not None and past.kind == "floored" and past.floor is None
    if find:
        assert step is None and (reading.target != "second" or left[1] is None)
        below_right = torch.empty_like(right[1]) if reading.target == "second" else None
        of.below, of.below_right = ctypes.addressof(below), _address(below_right)
    _run(of, buffer)
    if step is not None:
        torch.autograd.graph.increment_version(weight)  # as torch's own operators do that write
    floor = below[0] / max(below[1], 1) if find else None
    if below_right is not None and floor:
        right[1].add_(below_right, alpha=floor)
    return Products(right, left, floor)


class Thin(Structure):
    """As in `sweep.cpp`."""

    _fields_ = (
        ("data", c_void_p),
        ("k", c_int64),
        ("row", c_int64),
        ("column", c_int64),
        ("out", c_void_p),
        ("scale", c_float),
    )


class Arguments(Structure):
    """As in `sweep.cpp`."""

    _fields_ = (
        *((name, c_int64) for name in ("m", "n", "threads")),
        *((name, c_void_p) for name in ("grad", "weight")),
        *((name, Thin) for name in ("m_b", "m_a", "v_b", "v_a")),
        *((name, Thin * 2) for name in ("right", "left")),
        *((name, c_int32) for name in ("past", "target", "rule")),
        *((name, c_float) for name in ("bound", "floor", "decay", "rate", "gain", "eps")),
        *((name, c_void_p) for name in ("below", "below_right", "scratch")),
    )


def _pair(two: Iterable[Tensor | None]) -> tuple[Any, Any]:
    first, second = two
    return first, second


def _multiplied(product: Product) -> Tensor:
    return product.b @ product.a * product.scale


def _address(x: Tensor | None) -> int | None:
    """None also for a tensor without data, whose step is only counted."""
    return None if x is None or x.untyped_storage().device.type == "meta" else x.data_ptr()


def _columns(x: Tensor | None, out: Tensor | None = None, scale: float = 1.0) -> Thin:
    """A thin operand (size, k), of any strides, that the library copies, times `scale`."""
    if x is None:
        return Thin()
    return Thin(_address(x), x.shape[1], *x.stride(), _address(out), scale)


def _rows(y: Tensor | None, alive: list[Tensor], out: Tensor | None = None) -> Thin:
    """A thin operand (size, k) that the library reads as it is, so each row must lie together; `alive` keeps a copy."""
    if y is None:
        return Thin()
    alive.append(y.contiguous())
    return _columns(alive[-1], out)


def _factors(product: Product, alive: list[Tensor]) -> tuple[Thin, Thin]:
    return _rows(product.b, alive), _columns(product.a.mT, scale=product.scale)


def _run(of: Arguments, buffer: Buffer) -> None:
    lib = library()
    assert lib is not None
    scratch = buffer(lib.gossamer_sweep_scratch(of))
    of.scratch = _address(scratch)
    if of.scratch is not None:
        lib.gossamer_sweep(of)


def library_path() -> Path:
    """Where the library for this source, these flags and this processor is kept: below `$GOSSAMER_CACHE` if set."""
    try:
        processor = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        known = [line for line in processor.splitlines() if line.startswith(("model name", "flags", "Features"))]
    except OSError:
        known = [platform.machine()]
    digest = hashlib.blake2b("\n".join([SOURCE.read_text(), *FLAGS, *known]).encode(), digest_size=8).hexdigest()
    folder = Path(os.environ.get("GOSSAMER_CACHE") or "~/.cache/gossamer").expanduser() / "native"
    return folder / f"sweep-{digest}.so"


def build() -> Path:
    """Compile the library for this processor. Returns where it is; processes that start later use it.

    Raises:
        UserError: there is no compiler, or it fails.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise UserError(f"gossamer.kernels: no C++ compiler on PATH; allowed: {', '.join(COMPILERS)}")
    path = library_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # whole or not at all
        made = Path(folder) / path.name
        ran = subprocess.run([compiler, *FLAGS, "-o", made, SOURCE], capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            raise UserError(f"gossamer.kernels: {compiler} cannot compile {SOURCE}: {_first_error(ran.stderr)}")
        made.replace(path)
    return path


def _first_error(text: str) -> str:
    lines = text.strip().splitlines() or ["no reason given"]
    return next((line for line in lines if "error" in line), lines[0])


@cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where nobody built it. It runs on the OpenMP threads that torch has started."""
    path = library_path()
    if not path.exists():
        return None
    lib = ctypes.CDLL(str(path))
    lib.gossamer_sweep_scratch.restype = c_int64
    lib.gossamer_sweep_scratch.argtypes = lib.gossamer_sweep.argtypes = (POINTER(Arguments),)
    lib.gossamer_sweep.restype = None
    return lib
