"""What one optimizer step takes beside weights and gradients: state, scratch and the transient peak.

    python benchmarks/memory.py                          # 130m's hidden matrices: rows in results/step_memory.jsonl
    python benchmarks/memory.py --device cuda --dtype bfloat16
    python benchmarks/memory.py --draw                   # table and picture again

Each in a process of its own (`gossamer.memory.measure_step`), beside the prediction (`count_step`), with the gates:
at rank <= 32 a fused twin's transient and scratch are at most 5 MiB together; a projected method's transient is at most
two tiles between refreshes. 26 processes, 20 minutes on a busy core; what else runs does not matter.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
import torch
import tyro

from gossamer import AdamW
from gossamer.bench.step import RANKS, hidden_shapes, make_optimizer, read_rows, what_runs, write_markdown
from gossamer.memory import measure_step
from gossamer.memory.step import Kind, count_step
from gossamer.optim import sweep
from gossamer.optim.contract import Method, build, describe
from gossamer.train import jsonl

MIB = 2**20
PROJECTED = ("galore", "fira", "apollo")


@dataclass(frozen=True)
class Options:
    """Measure optimizer steps."""

    methods: tuple[str, ...] = tuple(RANKS)
    model: str = "130m"
    layers: int | None = None
    """Of the decoder; None: all."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    repeats: int = 5
    out: Path = Path("results/step_memory.jsonl")
    draw: bool = False
    """Measure nothing."""


def cases(options: Options) -> list[tuple[dict[str, Any], Any]]:
    """What identifies a measurement, and what makes its optimizer."""
    found: list[tuple[dict[str, Any], Any]] = []
    for kind in ("fused", "foreach"):
        found.append((_case("adamw", None, f"torch, {kind}"), partial(torch.optim.AdamW, **{kind: True})))
    methods: list[Method] = [AdamW()]
    methods += [build(name, rank=rank) for name in options.methods for rank in RANKS[name]]
    for method in methods:
        for implementation in ("reference", "auto"):
            case = _case(describe(method)["name"], getattr(method, "rank", None), implementation)
            found.append((case, partial(make_optimizer, method, implementation)))
    return found


def _case(method: str, rank: int | None, implementation: str) -> dict[str, Any]:
    return {"method": method, "rank": rank, "implementation": implementation}


def measure(options: Options) -> None:
    shapes, layers = hidden_shapes(options.model)
    timed = options.layers or layers
    shapes = shapes[: len(shapes) // layers * timed]
    dtype = getattr(torch, options.dtype)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    jsonl.mend(options.out)
    for case, make in cases(options):
        found = measure_step(make, shapes, dtype=dtype, device=options.device, repeats=options.repeats)
        predicted = None
        if make.func is make_optimizer:
            kinds = Counter(Kind(make.args[0], torch.Size(shape), dtype) for shape in shapes)
            steps, scratch = count_step(kinds, case["implementation"])
            predicted = {
                "scratch": scratch,
                "transient": max(step.transient for step in steps.values()),
                "first": max(step.first for step in steps.values()),
            }
        row = {
            **case,
            **vars(found),
            "predicted": predicted,
            "gate": gate(case, found.transient, found.scratch),
            "rival": None,  # rows are read as those of `benchmarks/step.py`
            "model": options.model,
            "layers": layers,
            "layers_timed": timed,
            "weights": sum(torch.Size(shape).numel() for shape in shapes),
            "dtype": options.dtype,
            "device": options.device,
            "repeats": options.repeats,
            **what_runs(),
        }
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(" ".join(line(row)), flush=True)


def gate(case: dict[str, Any], transient: int, scratch: int) -> bool | None:
    """Whether a twin's step keeps within its bounds; None where there is no bound."""
    if case["implementation"] != "auto" or case["method"] == "adamw":
        return None
    if case["method"] in PROJECTED:
        return transient <= 2 * 4 * sweep.TILE
    return transient + scratch <= 5 * MIB if case["rank"] <= 32 else None


def line(row: dict[str, Any]) -> list[str]:
    predicted = row["predicted"] or {}
    sizes = [f"{row['state'] / MIB:.1f}"]
    for part in ("scratch", "transient", "first"):
        sizes += [f"{row[part] / MIB:.1f}", f"{predicted[part] / MIB:.1f}" if predicted else "–"]
    within = {True: "yes", False: "no", None: "–"}[row["gate"]]
    setting = f"{row['model']}, {row['layers_timed']} layers, {row['dtype']}, {row['device']}"
    return [row["method"], str(row["rank"] or "–"), row["implementation"], setting, *sizes, within]


HEADER = ["method", "rank", "step", "hidden matrices of", "state"]
HEADER += [title for part in ("scratch", "transient", "first step") for title in (part, "predicted")] + ["within gate"]


def draw(options: Options) -> None:
    rows = read_rows(options.out)
    write_markdown(HEADER, [line(row) for row in rows], options.out.with_suffix(".md"))
    names = [" ".join(str(row[key]) for key in ("method", "rank", "implementation") if row[key]) for row in rows]
    figure = go.Figure()
    for part in ("state", "scratch", "transient"):
        figure.add_bar(name=part, y=names, x=[max(row[part], 0) / MIB for row in rows], orientation="h")
    figure.update_layout(barmode="stack", template="plotly_white", width=900, height=120 + 22 * len(rows))
    figure.update_layout(xaxis_title="MiB beside weights and gradients", yaxis_autorange="reversed")
    figure.write_image(options.out.with_suffix(".svg"))


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if not chosen.draw:
        measure(chosen)
    draw(chosen)
