"""Seven ways to fine-tune a classifier, by task, learning rate and seed: scores, and the memory of optimizer state.

    python benchmarks/base_model.py --text ...                       # a base model, once
    python benchmarks/finetune.py --base runs/base/checkpoints/step-00020000 --glue .../glue
                                            # all runs that results/finetune/rows.jsonl lacks, then table.md beside it
    python benchmarks/finetune.py --base ... --tasks words --steps 20 --seeds 0     # minutes, to try it

`words` is generated: does a sentence hold a word? The others are GLUE's, from the benchmark's TSV files. `gossamer` has
the rank whose state comes closest to that of LoRA-Pre with rank 8 from below. Every method takes the learning rate that
is best on its dev set among those tried, which flatters all of them alike.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import tyro

import gossamer
from gossamer.data import TaskConfig
from gossamer.errors import UserError
from gossamer.layers import Adapter
from gossamer.memory import predict
from gossamer.models import load_model, locate
from gossamer.train import Finetune, finetune, jsonl

GENERATED = "words"
METHODS: dict[str, tuple[Any, Adapter]] = {
    "adamw": (gossamer.AdamW(), Adapter()),
    "lora": (gossamer.AdamW(), Adapter("lora", rank=8)),
    "galore": (gossamer.GaLore(rank=8), Adapter()),
    "ldadam": (gossamer.LDAdam(rank=8), Adapter()),
    "mlorc": (gossamer.MLorc(rank=4), Adapter()),
    "lora-pre": (gossamer.LoRAPre(rank=8), Adapter()),
    "gossamer": (gossamer.Gossamer(), Adapter()),
}
RATES = dict.fromkeys(METHODS, (0.0001, 0.0003, 0.001)) | {"lora": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class Options:
    """Train what is missing."""

    base: str
    """Folder of the base model."""
    glue: Path | None = None
    """Folder with GLUE's folders; only `words` does without."""
    out: Path = Path("results/finetune")
    """Folder of `rows.jsonl` and `table.md`."""
    runs: Path = Path("runs/finetune")
    """Folder of logs and checkpoints, by which a stopped run goes on; deleted as runs finish."""
    tasks: tuple[str, ...] = ("rte", "mrpc", "cola", "stsb", "sst2", GENERATED)
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = ()
    """For every method, in place of `RATES`."""
    epochs: float = 3.0
    steps: int | None = None
    """In place of epochs."""
    examples: int = 8000
    """Training examples of a task, at most."""
    batch_size: int = 32


def write_words(folder: Path, seed: int = 0) -> Path:
    """A generated task in the form of GLUE's RTE: does the first sentence hold the second one's word?"""
    draw, words = (
        random.Random(seed),
        ["red", "blue", "green", "gold", "black", "white", "grey", "pink", "brown", "plain"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 4000), ("dev", 500)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for index in range(count):
            held = draw.sample(words, 4)
            asked = draw.choice(held if index % 2 else [word for word in words if word not in held])
            lines.append(f"{index}\t{' '.join(held)}\t{asked}\t{'entailment' if index % 2 else 'not_entailment'}")
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def matched_rank(base: str) -> int:
    """The largest rank at which `gossamer` keeps no more state of hidden matrices than LoRA-Pre with rank 8."""
    model = load_model(locate(base), dtype=torch.float32, device=torch.device("cpu"))
    most = predict(model, METHODS["lora-pre"][0]).hidden_state
    ranks = range(1, 65)
    fitting = [rank for rank in ranks if predict(model, gossamer.Gossamer(rank=rank)).hidden_state <= most]
    if not fitting:
        raise UserError(f"base: no rank of gossamer fits into {most:,} bytes of state")
    return max(fitting)


def configurations(options: Options) -> Iterator[tuple[dict[str, Any], Finetune[Any, Any]]]:
    """What identifies a run, and the run; whole seeds first, so that an unfinished experiment is a smaller one."""
    methods = METHODS | {"gossamer": (gossamer.Gossamer(rank=matched_rank(options.base)), Adapter())}
    words = write_words(options.runs / GENERATED)
    for seed, task, method in itertools.product(options.seeds, options.tasks, options.methods):
        if task != GENERATED and options.glue is None:
            raise UserError(f"glue: task {task} needs the folder of GLUE's files; name it, or --tasks {GENERATED}")
        rule, adapter = methods[method]
        for lr in options.lrs or RATES[method]:
            length: dict[str, Any] = {"steps": options.steps} if options.steps else {"epochs": options.epochs}
            key = {"task": task, "method": method, "lr": lr, "seed": seed, **length, "examples": options.examples}
            name, data = ("glue/rte", words) if task == GENERATED else (f"glue/{task}", options.glue)
            yield (
                key,
                Finetune(
                    rule,
                    model=options.base,
                    data=TaskConfig(name, str(data), examples=options.examples),
                    adapter=adapter,
                    out=options.runs / "-".join(map(str, key.values())),
                    resume=True,
                    batch_size=options.batch_size,
                    lr=lr,
                    warmup=0.03,
                    decay="linear",
                    min_lr_ratio=0.0,
                    save_every=200,
                    keep_last=1,
                    seed=seed,
                    **length,
                ),
            )


def main(options: Options) -> None:
    rows = options.out / "rows.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    jsonl.mend(rows)
    done = [row for _, row in jsonl.read(rows)] if rows.exists() else []
    for key, config in configurations(options):
        if any(key.items() <= row.items() for row in done):
            continue
        result = finetune(config, quiet=True)
        _, start = next(jsonl.read(config.out / "log.jsonl"))
        row = {
            **key,
            **result.score.numbers(),
            "state_bytes": start["memory"]["state"],
            "hidden_state_bytes": start["memory"]["hidden_state"],
            "seconds": result.seconds,
            **{name: start[name] for name in ("config", "data", "versions", "hardware", "commit", "time")},
        }
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shutil.rmtree(config.out)
        print(*key.values(), f"{100 * result.score.score:.1f} %", f"{result.seconds:.0f} s", flush=True)
    (options.out / "table.md").write_text(table([row for _, row in jsonl.read(rows)]))


def table(rows: list[dict[str, Any]]) -> str:
    """Every method at its best rate for each task: mean and standard deviation over seeds, per cent."""
    tasks, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("task", "method"))
    lines = [f"| method | state, KiB | {' | '.join(tasks)} |", "|---" * (2 + len(tasks)) + "|"]
    for method in methods:
        own = [row for row in rows if row["method"] == method]
        cells = []
        for task in tasks:
            rates: dict[float, list[float]] = {}
            for row in own:
                if row["task"] == task:
                    rates.setdefault(row["lr"], []).append(100 * row["score"])
            if not rates:
                cells.append("")
                continue
            lr, scores = max(rates.items(), key=lambda rate: fmean(rate[1]))
            spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
            cells.append(f"{fmean(scores):.1f}{spread} ({lr:g}, {len(scores)})")
        state = max(row["hidden_state_bytes"] for row in own)
        lines.append(f"| {method} | {state / 1024:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options))
