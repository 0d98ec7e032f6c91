"""What an optimizer step takes, or all of training, measured: the peak of the allocator on a GPU, of the resident set
on a CPU.

    measure_step(partial(torch.optim.AdamW, foreach=True), [(768, 768)] * 4)
    measure_training("60m", gossamer.AdamW(), batch_size=1, seq_len=32, loss=token_loss, release_gradients=True)

Each measurement has a fresh process, so that no other's memory is in it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import nn

from gossamer.errors import UserError
from gossamer.memory.activations import Loss, enable_checkpointing
from gossamer.models import build_model, resolve_config
from gossamer.optim.contract import Method, check_choice
from gossamer.optim.groups import param_groups
from gossamer.optim.optimizer import Optimizer, num_bytes
from gossamer.optim.release import CLIP, release_gradients

Result = TypeVar("Result")
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


@dataclass(frozen=True)
class Training:
    """Bytes."""

    held: int
    """What is there between two steps: weights, state, buffers."""
    transient: int
    """The peak of a step above that, the median of some: activations, gradients, what the update takes."""


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
    _check_platform("measure_step", device)
    return _alone(_measure, make, [tuple(shape) for shape in shapes], dtype, device, repeats)


def measure_training(
    model: str,
    method: Method,
    batch_size: int,
    seq_len: int,
    checkpointing: bool = False,
    *,
    loss: Loss,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    release_gradients: bool = False,
    clip: str | None = None,
    repeats: int = 3,
) -> Training:
    """Steps of training on random tokens, from the forward pass to the update.

    A smaller model takes two steps before, and this one two that are not counted.

    Args:
        model, batch_size, seq_len, checkpointing, loss: as for `activations`; the model is a size or a path.
        release_gradients: by `gossamer.release_gradients`.
        clip: how gradients are clipped; None: they are not. Without release: "clip_grad_norm_"; with it "two-pass" or
            "previous".
        repeats: of the steps whose median is taken.

    Raises:
        UserError: as `measure_step`.
    """
    _check_platform("measure_training", device)
    ways = CLIP if release_gradients else ("clip_grad_norm_",)
    if clip is not None:
        check_choice("measure_training", clip=(clip, ways))
    return _alone(
        _train, model, method, batch_size, seq_len, checkpointing, loss, dtype, device, release_gradients, clip, repeats
    )


def _check_platform(what: str, device: str) -> None:
    if device == "cpu" and not sys.platform.startswith("linux"):
        raise UserError(f"{what}: reads /proc, which {sys.platform} does not have")


def _alone(work: Callable[..., Result], *args: Any) -> Result:
    """What `work` returns in a process of its own."""
    child = [sys.executable, "-m", "gossamer.memory.measure"]
    done = subprocess.run(child, input=pickle.dumps((work, args)), capture_output=True, env=os.environ | MALLOC)
    if done.returncode != 0:
        raise RuntimeError(f"measuring: its process failed:\n{done.stderr.decode()}")
    return pickle.loads(done.stdout)


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


def meter(device: torch.device | str) -> _Resident | _Allocated:
    """What reads the memory of this process on a device, its peak since it was reset, and what is free put aside."""
    return _Resident() if torch.device(device).type == "cpu" else _Allocated()


def _measure(
    make: MakeOptimizer, shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str, repeats: int
) -> Measured:
    memory = meter(device)
    params = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param).mul_(1e-3)

    def peak_of(step: Callable[[], object]) -> int:
        memory.reset_peak()
        step()
        return memory.peak() - memory.now()

    warm = make(params)
    for _ in range(2):
        warm.step()
    del warm
    memory.settle()
    before = memory.now()
    optimizer = make(params)
    first = peak_of(optimizer.step)
    peaks = [peak_of(optimizer.step) for _ in range(repeats + 1)][1:]
    memory.settle()
    state = num_bytes(
        value for held in optimizer.state.values() for value in held.values() if isinstance(value, torch.Tensor)
    )
    return Measured(state, memory.now() - before - state, round(median(peaks)), first)


def _train(
    model: str,
    method: Method,
    batch_size: int,
    seq_len: int,
    checkpointing: bool,
    loss: Loss,
    dtype: torch.dtype,
    device: str,
    release: bool,
    clip: str | None,
    repeats: int,
) -> Training:
    memory = meter(device)

    def stepper(size: str) -> Callable[[], None]:
        built: Any = build_model(resolve_config(size), dtype=dtype, device=device, seed=0).train()
        if checkpointing:
            enable_checkpointing(built, use_reentrant=False)
        inputs, targets = torch.randint(built.config.vocab_size, (2, batch_size, seq_len), device=device)
        optimizer = Optimizer(param_groups(built, method))
        released = None
        if release:
            norm = None if clip is None else 1.0
            released = release_gradients(built, optimizer, max_norm=norm, clip=clip or CLIP[0])

        def step() -> None:
            value = loss(built, inputs, targets) / targets.numel()
            if released is not None and clip == "two-pass":
                with released.measure():
                    value.backward(retain_graph=True)
            value.backward()
            if released is None and clip is not None:
                torch.nn.utils.clip_grad_norm_(built.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    warm = stepper("tiny")
    for _ in range(2):
        warm()
    del warm
    memory.settle()
    before = memory.now()
    step = stepper(model)
    for _ in range(2):
        step()
    memory.settle()
    held, peaks = memory.now() - before, []
    for _ in range(repeats):
        memory.settle()
        begun = memory.now()
        memory.reset_peak()
        step()
        peaks.append(memory.peak() - begun)
    return Training(held, round(median(peaks)))


if __name__ == "__main__":
    work, args = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps(work(*args)))
