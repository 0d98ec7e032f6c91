"""What a run will take, before it is started: tokens, memory, and time by floating-point operations."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch
from rich.table import Table as Grid
from torch import nn

from gossamer.bench.claim import Run, Table
from gossamer.evaluate import token_loss
from gossamer.layers import Parametrization
from gossamer.memory import activations, meta_model, operations, predict

SIDE, SECONDS = 1024, 1.0
"""Of the matrices by which this device's rate is measured, and for how long."""


def plan_table(table: Table, runs: Iterable[Run], seeds: int) -> Grid:
    """A line for one run of each cell, and how many the cell may take; `rows` are those of a forward pass.

    Bytes are those of one process that holds the whole model and steps by the reference. Hours are at least: all matrix
    products of forward and backward passes, at the rate of one product here.
    """
    grid = Grid(title="GiB of one process; hours of one run on one device like this, at the least")
    for column in ("size", "method", "rate", "steps", "tokens", "rows", "weights", "gradients", "state", "step",
                   "activations", "total", "hours", "runs, at most"):  # fmt: skip
        grid.add_column(column, justify="left" if column in ("size", "method") else "right", no_wrap=True)
    grid.add_column("not the paper's")
    for run in runs:
        config = run.config
        dtype = getattr(torch, config.dtype)
        shape = _Shape(config.model, config.layers, config.layer_targets)
        model = shape.model(dtype)
        memory = predict(model, config.method, fallback=config.fallback)
        rows = config.micro_batch_size or config.batch_size
        kept = _activations(shape, dtype, rows, config.data.seq_len, config.checkpointing)
        sizes = memory.weights, memory.gradients, memory.state, memory.step.transient + memory.scratch, kept
        slots = config.steps * config.batch_size * config.data.seq_len
        passes = config.steps * config.batch_size / rows
        hours = passes * _operations(shape, rows, config.data.seq_len) / 3600
        gib = [f"{size / 2**30:,.3g}" for size in (*sizes, sum(sizes))]
        lr = f"as in {table.follows.table}" if table.follows else f"{config.lr:g}"
        grid.add_row(
            run.size, run.method, lr, f"{config.steps:,}", f"{slots / 1e6:,.1f} M", str(rows), *gib,
            f"{hours / _rate(config.device, dtype):,.3f}", str(table.most_runs(seeds)), run.caveats,
        )  # fmt: skip
    return grid


class _Shape(NamedTuple):
    """Of a model: what methods have in common."""

    size: str
    layers: Parametrization | None
    layer_targets: tuple[str, ...]

    def model(self, dtype: torch.dtype) -> nn.Module:
        return meta_model(self.size, self.layers, dtype, self.layer_targets)


@cache
def _activations(shape: _Shape, dtype: torch.dtype, rows: int, seq_len: int, checkpointing: bool) -> int:
    return activations(shape.model(dtype), rows, seq_len, checkpointing, loss=token_loss)


@cache
def _operations(shape: _Shape, rows: int, seq_len: int) -> int:
    return operations(shape.model(torch.float32), rows, seq_len, loss=token_loss)


@cache
def _rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product here."""
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    a = torch.randn(SIDE, SIDE, dtype=dtype, device=where)
    done, begun = 0, time.perf_counter()
    while (seconds := time.perf_counter() - begun) < SECONDS or not done:
        (a @ a).sum().item()  # waits for a GPU
        done += 1
    return 2 * SIDE**3 * done / seconds
