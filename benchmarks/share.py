"""The optimizer's share of a training step on a CPU: forward and backward passes beside the step, by method.

    python benchmarks/share.py     # rows in results/step_share.jsonl, the table beside; a minute a round at the most

A 9m Llama, 4,096 random tokens. In each round the passes run once, and every method steps weights of its own by their
gradients, by the reference and fused, so that a slow moment of the machine strikes all; medians over the rounds.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from torch import nn

import gossamer
from gossamer.bench.step import read_rows, what_runs, write_markdown
from gossamer.evaluate import token_loss
from gossamer.models import build_model, resolve_config
from gossamer.optim.contract import Method, describe
from gossamer.train import jsonl


@dataclass(frozen=True)
class Options:
    """Time training steps."""

    methods: tuple[str, ...] = tuple(gossamer.methods())
    rank: int = 32
    """Of methods that have one, of 128."""
    model: str = "9m"
    batch_size: int = 16
    seq_len: int = 256
    steps: int = 10
    """Rounds that count; two warm up, in the first of which projectors are computed."""
    out: Path = Path("results/step_share.jsonl")
    draw: bool = False
    """Time nothing."""


def optimizers(model: nn.Module, options: Options) -> Iterator[tuple[Method, str, gossamer.Optimizer]]:
    """Every method by the reference and, where it has a twin, fused; each over weights of its own."""
    for name in options.methods:
        cls = gossamer.methods()[name].cls
        fields = {"rank": min(options.rank, cls.rank)} if hasattr(cls, "rank") else {}
        if hasattr(cls, "update_proj_gap"):
            fields["update_proj_gap"] = 1 << 30
        method = cls(**fields)
        for way in ("reference", "auto"):
            groups = gossamer.param_groups(copy.deepcopy(model), method)
            optimizer = gossamer.Optimizer(groups, lr=1e-4, implementation=way)
            fused = any((row.method, row.implementation) == (name, "tiles") for row in optimizer.plan())
            if way == "reference" or fused:
                yield method, way, optimizer


def measure(options: Options) -> None:
    model = build_model(resolve_config(options.model), dtype=torch.float32, device="cpu", seed=0).train()
    size = 2, options.batch_size, options.seq_len
    inputs, targets = torch.randint(model.config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    found = list(optimizers(model, options))
    passes: list[float] = []
    steps: list[list[float]] = [[] for _ in found]
    for _ in range(options.steps + 2):
        passes.append(_seconds(lambda: token_loss(model, inputs, targets).backward()))
        grads = {name: param.grad for name, param in model.named_parameters()}
        for (_, _, optimizer), times in zip(found, steps, strict=True):
            for name, param, _ in optimizer.members():
                param.grad = grads[name]
            times.append(_seconds(optimizer.step))
        model.zero_grad()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    jsonl.mend(options.out)
    with options.out.open("a") as file:
        for (method, way, _), times in zip(found, steps, strict=True):
            both = {"passes_ms": 1e3 * median(passes[2:]), "step_ms": 1e3 * median(times[2:])}
            row = {
                "method": describe(method)["name"],
                "rank": getattr(method, "rank", None),
                "implementation": way,
                **both,
                "share": both["step_ms"] / sum(both.values()),
                "rival": None,  # rows are read as those of `benchmarks/step.py`
                "model": options.model,
                "layers_timed": "all",
                "tokens": options.batch_size * options.seq_len,
                "dtype": "float32",
                "device": "cpu",
                "steps": options.steps,
                "fields": describe(method),
                **what_runs(),
            }
            file.write(json.dumps(row) + "\n")


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def draw(options: Options) -> None:
    found: dict[tuple[str, Any, int], dict[str, dict[str, Any]]] = {}
    for row in read_rows(options.out):
        key = row["method"], row["rank"], row["hardware"]["threads"]
        found.setdefault(key, {})[row["implementation"]] = row
    body = []
    for (method, rank, threads), ways in found.items():
        line = [method, str(rank or "–"), str(threads), f"{ways['reference']['passes_ms']:,.0f}"]
        for way in ("reference", "auto"):
            line += [f"{ways[way]['step_ms']:,.0f}", f"{ways[way]['share']:.0%}"] if way in ways else ["–", "–"]
        body.append(line)
    header = ["method", "rank", "threads", "passes ms", "reference ms", "its share", "fused ms", "its share"]
    write_markdown(header, body, options.out.with_suffix(".md"))


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if not chosen.draw:
        measure(chosen)
    draw(chosen)
