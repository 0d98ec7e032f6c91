"""What training takes beside weights and state, with gradients held and with gradients released.

    python benchmarks/release.py          # 60m, fp32, 1 x 32 tokens: rows in results/release_memory.jsonl, a table
    python benchmarks/release.py --draw   # the table again

Few tokens, so that activations hide nothing. Each case in a process of its own (`gossamer.memory.measure_training`),
beside the prediction. 8 processes, a minute each; what else runs does not matter.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from gossamer.bench.step import what_runs, write_markdown
from gossamer.evaluate import token_loss
from gossamer.memory import activations, measure_training, predict
from gossamer.optim.contract import build, describe
from gossamer.train import jsonl

MIB = 2**20
WAYS = {
    "held": (False, "clip_grad_norm_"),
    "released, not clipped": (True, None),
    "released, two-pass": (True, "two-pass"),
    "released, previous": (True, "previous"),
}


@dataclass(frozen=True)
class Options:
    """Measure training."""

    methods: tuple[str, ...] = ("adamw", "lora-pre")
    """At their default ranks."""
    model: str = "60m"
    batch_size: int = 1
    seq_len: int = 32
    checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    repeats: int = 3
    out: Path = Path("results/release_memory.jsonl")
    draw: bool = False
    """Measure nothing."""


def measure(options: Options) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    jsonl.mend(options.out)
    dtype = getattr(torch, options.dtype)
    sizes = options.batch_size, options.seq_len, options.checkpointing
    kept = activations(options.model, *sizes, loss=token_loss, dtype=dtype)
    for name in options.methods:
        for way, (release, clip) in WAYS.items():
            found = measure_training(
                options.model,
                build(name),
                *sizes,
                loss=token_loss,
                dtype=dtype,
                device=options.device,
                release_gradients=release,
                clip=clip,
                repeats=options.repeats,
            )
            memory = predict(options.model, build(name), dtype=dtype, implementation="auto", release_gradients=release)
            row = {
                "method": describe(build(name)),
                "gradients": way,
                **vars(found),
                "predicted": {
                    "held": memory.weights + memory.state + memory.scratch,
                    "gradients": memory.gradients,
                    "activations": kept,
                    "step": memory.step.transient,
                },
                **{key: getattr(options, key) for key in SETTING},
                "repeats": options.repeats,
                **what_runs(),
            }
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(" ".join(line(row)), flush=True)


SETTING = ("model", "batch_size", "seq_len", "checkpointing", "dtype", "device")
HEADER = ["method", "gradients", "setting", "weights and state", "predicted", "peak above", "predicted gradients"]
HEADER += ["and activations", "and step"]


def line(row: dict[str, Any]) -> list[str]:
    predicted = row["predicted"]
    tokens = f"{row['batch_size']} x {row['seq_len']} tokens{', checkpointing' if row['checkpointing'] else ''}"
    setting = f"{row['model']}, {row['dtype']}, {row['device']}, {tokens}"
    sizes = row["held"], predicted["held"], row["transient"], *(predicted[key] for key in list(predicted)[1:])
    return [row["method"]["name"], row["gradients"], setting, *(f"{size / MIB:.1f}" for size in sizes)]


def draw(options: Options) -> None:
    read = (row for _, row in jsonl.read(options.out))
    rows = {(row["method"]["name"], row["gradients"], *(row[key] for key in SETTING)): row for row in read}
    write_markdown(HEADER, [line(row) for row in rows.values()], options.out.with_suffix(".md"))


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if not chosen.draw:
        measure(chosen)
    draw(chosen)
