"""Seven ways to fine-tune a classifier, by task, learning rate and seed: scores, and the memory of optimizer state.

    python benchmarks/base_model.py --text ...                       # a base model, once
    python benchmarks/finetune.py --base runs/base/checkpoints/step-00020000 --glue .../glue
                                    # what results/finetune/rows.jsonl lacks, then table.md and scores.svg beside it
    python benchmarks/finetune.py --base ... --tasks words --steps 20 --seeds 0     # minutes, to try it

`words` is generated: does a sentence hold a word? The others are GLUE's, from the benchmark's TSV files. `gossamer` has
the rank whose state comes closest to that of LoRA-Pre with rank 8 from below. The first seed tries all learning rates
of a method on a task; the others take the one that had the best score on the dev set, which flatters all alike.
Processes may share the work if their tasks differ.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
import tyro
from plotly.subplots import make_subplots

import gossamer
from gossamer.bench import plots
from gossamer.bench.reading import Rate, load
from gossamer.bench.runner import Rows
from gossamer.data import TaskConfig
from gossamer.data.glue import glue_task, read_glue
from gossamer.errors import UserError
from gossamer.evaluate.metrics import METRICS as SCORES
from gossamer.layers import Adapter
from gossamer.memory import predict
from gossamer.models import load_model, locate
from gossamer.train import Finetune, finetune, jsonl
from gossamer.train.config import PLACE, differences

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
RATES = dict.fromkeys(METHODS, (3e-4, 1e-3, 3e-3)) | {"lora": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class Options:
    """Train what is missing."""

    base: str
    """Folder of the base model."""
    glue: Path | None = None
    """Folder with GLUE's folders; only `words` does without."""
    out: Path = Path("results/finetune")
    """Folder of `rows.jsonl`, `table.md` and `scores.svg`."""
    runs: Path = Path("runs/finetune")
    """Folder of logs and checkpoints, by which a stopped run goes on; deleted as runs finish."""
    tasks: tuple[str, ...] = ("rte", "mrpc", "cola", "stsb", "sst2", GENERATED)
    methods: tuple[str, ...] = tuple(METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    lrs: tuple[float, ...] = ()
    """For every method, in place of `RATES`."""
    epochs: float = 2.0
    steps: int | None = None
    """In place of epochs."""
    examples: int = 2000
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


def runs(options: Options, done: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Finetune[Any, Any]]]:
    """What identifies a run, and the run; whole seeds first, so that an unfinished experiment is a smaller one.

    The rate of the other seeds follows from the rows of `done`, which must have grown by the first one's.
    """
    methods = METHODS | {"gossamer": (gossamer.Gossamer(rank=matched_rank(options.base)), Adapter())}
    length: dict[str, Any] = {"steps": options.steps} if options.steps else {"epochs": options.epochs}
    for seed, task, method in itertools.product(options.seeds, options.tasks, options.methods):
        name, data = dataset(options, task)
        rule, adapter = methods[method]
        same = {"task": task, "method": method, **length, "examples": options.examples}
        first = {**same, "seed": options.seeds[0]}
        for lr in options.lrs or RATES[method] if seed == options.seeds[0] else (best_rate(done, first),):
            key = {**same, "lr": lr, "seed": seed}
            yield (
                key,
                Finetune(
                    rule,
                    model=options.base,
                    data=TaskConfig(name, data, examples=options.examples),
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


@cache  # the files of the generated task are written once
def dataset(options: Options, task: str) -> tuple[str, str]:
    """The name of a task in `gossamer finetune`, and where its files are."""
    if task == GENERATED:
        return "glue/rte", str(write_words(options.runs / GENERATED))
    if options.glue is None:
        raise UserError(f"glue: task {task} needs the folder of GLUE's files; name it, or --tasks {GENERATED}")
    return f"glue/{task}", str(options.glue)


def best_rate(rows: list[dict[str, Any]], same: dict[str, Any]) -> float:
    """The learning rate with the highest score."""
    scores = {row["lr"]: row["score"] for row in rows if same.items() <= row.items()}
    return max(scores, key=scores.__getitem__)


def main(options: Options) -> None:
    path = options.out / "rows.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    done = [row for _, row in jsonl.read(path)] if path.exists() else []
    for key, config in runs(options, done):
        if (row := next((row for row in done if key.items() <= row.items()), None)) is not None:
            for option, old, new in differences(row["config"], config):
                if option not in (*PLACE, "steps", "epochs"):  # these the key has
                    raise UserError(f"out: {path} has runs with {option} {old}, not {new}; name another --out")
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
        Rows(path, options.runs).append(row)
        done.append(row)
        shutil.rmtree(config.out)
        print(*key.values(), f"{100 * result.score.score:.1f} %", f"{result.seconds:.0f} s", flush=True)
    found = by_task(options.out)
    floors = {task: constant_score(*dataset(options, task)) for task in found}
    (options.out / "table.md").write_text(table(found, floors))
    picture(found, floors).write_image(options.out / "scores.svg")


def constant_score(name: str, data: str) -> float:
    """The score of answering every question of the dev set with the largest class of the training set."""
    learnt, asked = (np.asarray(read_glue(name, data, part).labels) for part in ("train", "dev"))
    values, counts = np.unique(learnt, return_counts=True)
    always = np.full(len(asked), values[counts.argmax()])
    return fmean(SCORES[metric](always, asked) for metric in glue_task(name).metrics)


def by_task(folder: Path) -> dict[str, dict[str, Rate]]:
    """Every method at its best rate, as the report chooses it; of several lengths of training the last, the longest."""
    found: dict[str, dict[str, Rate]] = {}
    for method in load(folder):
        if method.best is not None:
            found.setdefault(method.runs[0].task or "", {})[method.name] = method.best
    return found


def table(found: Mapping[str, Mapping[str, Rate]], floors: Mapping[str, float]) -> str:
    """Mean and standard deviation over seeds, per cent, and in brackets the rate and how many seeds."""
    lines = [f"| method | state, KiB | {' | '.join(found)} |", "|---" * (2 + len(found)) + "|"]
    lines.append(f"| largest class | | {' | '.join(f'{100 * floors[task]:.1f}' for task in found)} |")
    for method in METHODS:
        rates = [rates.get(method) for rates in found.values()]
        if not any(rates):
            continue
        state = max(rate.mean("hidden_state_bytes") or 0.0 for rate in rates if rate)
        lines.append(f"| {method} | {state / 1024:,.0f} | {' | '.join(map(in_words, rates))} |")
    return "\n".join(lines) + "\n"


def in_words(rate: Rate | None) -> str:
    if rate is None:
        return ""
    spread = "" if rate.sd is None else f" ± {rate.sd:.1f}"
    return f"{rate.quality:.1f}{spread} ({rate.rate:g}, {len(rate.runs)})"


def picture(found: Mapping[str, Mapping[str, Rate]], floors: Mapping[str, float]) -> go.Figure:
    """A panel a task: every method's mean and standard deviation over seeds, and what the largest class scores."""
    columns = 3
    figure = make_subplots(-(-len(found) // columns), columns, subplot_titles=list(found), vertical_spacing=0.18)
    for index, (task, rates) in enumerate(found.items()):
        where: dict[str, Any] = {"row": index // columns + 1, "col": index % columns + 1}
        names = [method for method in METHODS if method in rates]
        figure.add_scatter(
            x=names,
            y=[rates[name].quality for name in names],
            error_y={"type": "data", "array": [rates[name].sd or 0.0 for name in names]},
            mode="markers",
            marker={"color": plots.COLOURS[0]},
            **where,
        )
        figure.add_hline(100 * floors[task], line={"dash": "dot", "color": plots.GREY}, **where)
    figure.update_layout(template="plotly_white", width=1000, height=600, showlegend=False)
    return figure.update_yaxes(title_text="score, % ± sd", col=1)


if __name__ == "__main__":
    main(tyro.cli(Options))
