"""What one optimizer step takes, measured: the allocator's peak on a GPU, the resident set's on a CPU.

    measure_step(partial(torch.optim.AdamW, foreach=True), [(768, 768)] * 4)

Each measurement has a fresh process, so that no other's memory is in it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from torch import nn

from gossamer.errors import UserError
from gossamer.optim.optimizer import num_bytes

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""glibc's settings under which a block of 64 KiB or more goes back to the system when it is freed."""


@dataclass(frozen=True)
class Measured:
    """Bytes."""

    state: int
    """The tensors in the optimizer's state."""
    scratch: int
    """What else stays allocated between two steps."""
    transient: int
    """The peak of a step above what is there before it, the median of some."""
    first: int
    """The peak of the first step above what is there after it."""


def measure_step(
    make: MakeOptimizer,
    shapes: Sequence[tuple[int, ...]],
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    repeats: int = 5,
) -> Measured:
    """Steps of an optimizer over parameters of these shapes with random gradients.

    Another such optimizer takes two steps before, so that code is loaded and kernels' own workspaces exist. On a CPU
    numbers are of whole pages, and right to some hundred KiB: Python and the kernels allocate too.

    Args:
        make: builds the optimizer; pickled, so a function of a module or a `functools.partial` of one.
        repeats: of the steps whose median is taken.

    Raises:
        UserError: not on Linux with glibc, where a CPU is measured.
    """
    if device == "cpu" and not sys.platform.startswith("linux"):
        raise UserError(f"measure_step: reads /proc, which {sys.platform} does not have")
    task = pickle.dumps((make, [tuple(shape) for shape in shapes], dtype, device, repeats))
    child = [sys.executable, "-m", "gossamer.memory.measure"]
    done = subprocess.run(child, input=task, capture_output=True, env=os.environ | MALLOC)
    if done.returncode != 0:
        raise RuntimeError(f"measure_step: its process failed:\n{done.stderr.decode()}")
    return Measured(**json.loads(done.stdout))


class _Resident:
    """The memory of this process, in pages that are there."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL("libc.so.6")

    def settle(self) -> None:
        gc.collect()
        self._libc.malloc_trim(0)

    def now(self) -> int:
        return self._read("VmRSS")

    def reset_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return self._read("VmHWM")

    def _read(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024


class _Allocated:
    """The tensors on the current GPU."""

    def settle(self) -> None:
        gc.collect()
        torch.cuda.synchronize()

    def now(self) -> int:
        return torch.cuda.memory_allocated()

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def _measure(
    make: MakeOptimizer, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str, repeats: int
) -> Measured:
    meter = _Resident() if device == "cpu" else _Allocated()
    params = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param).mul_(1e-3)

    def peak_of(step: Callable[[], object]) -> int:
        meter.reset_peak()
        step()
        return meter.peak() - meter.now()

    warm = make(params)
    for _ in range(2):
        warm.step()
    del warm
    meter.settle()
    before = meter.now()
    optimizer = make(params)
    first = peak_of(optimizer.step)
    peaks = [peak_of(optimizer.step) for _ in range(repeats + 1)][1:]
    meter.settle()
    state = num_bytes(
        value for held in optimizer.state.values() for value in held.values() if isinstance(value, torch.Tensor)
    )
    return Measured(state, meter.now() - before - state, round(median(peaks)), first)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(*pickle.load(sys.stdin.buffer)))))
