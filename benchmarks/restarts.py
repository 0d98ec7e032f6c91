"""Low-rank and SLTrain weights with and without refactorization and momentum reset, states in fp32 and in bf16.

Does momentum reset still help when the second moment is kept in fp32? In pure bf16 it cannot decay (0.999 v rounds to
v), so that any reset un-sticks it.

    python benchmarks/restarts.py                      # all runs that `results/restarts_tiny/rows.jsonl` lacks,
                                                       # then table.md and perplexity.svg beside it
    python benchmarks/restarts.py --part 0 --parts 2   # half of them; the other half elsewhere at the same time
    python benchmarks/restarts.py --ablate             # what about a restart does it: `ablations.jsonl`
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import plotly.graph_objects as go
import tyro

from gossamer import AdamW, Restarts
from gossamer.bench.claim import settled_first
from gossamer.bench.runner import Rows
from gossamer.data import DataConfig
from gossamer.layers import LowRank, Parametrization, SLTrain
from gossamer.train import Pretrain, jsonl, pretrain

LAYERS: dict[str, Parametrization] = {"low-rank": LowRank(rank=32), "sltrain": SLTrain(rank=32)}
RATES = {"low-rank": (3e-4, 6e-4, 1.2e-3), "sltrain": (6e-4, 1.2e-3, 2.4e-3)}
"""Learning rates of factors and sparse values, around the best of a probe; everything else has 4e-3."""
BASE = Restarts(every=50, recovery_steps=5, scope="all")
ARMS: dict[str, Restarts | None] = {
    "plain": None,
    "refactorize": replace(BASE, reset=None),
    "reset": replace(BASE, refactorize=False),
    "both": BASE,
}
ABLATIONS: dict[str, Restarts] = {
    "reset, factors only": replace(BASE, refactorize=False, scope="factors"),
    "reset m": replace(BASE, refactorize=False, reset="first"),
    "reset v": replace(BASE, refactorize=False, reset="second"),
    "reset, no recovery": replace(BASE, refactorize=False, schedule="none"),
    "refactorize, no recovery": replace(BASE, reset=None, schedule="none"),
    "both, once": replace(BASE, every=200, recovery_steps=10),
}
"""Of low-rank weights in fp32 at the rate that was best without restarts."""


@dataclass(frozen=True)
class Options:
    """Train what is missing."""

    out: Path = Path("results/restarts_tiny")
    """Folder of `rows.jsonl`."""
    runs: Path = Path("runs/restarts_tiny")
    """Folder of logs; deleted as runs finish."""
    seeds: tuple[int, ...] = (0, 1, 2)
    state_bits: tuple[int, ...] = (32, 16)
    """Of both moments of every parameter."""
    steps: int = 400
    ablate: bool = False
    """Run `ABLATIONS` instead."""
    part: int = 0
    """Which of `parts` shares of the runs."""
    parts: int = 1


def configurations(options: Options) -> Iterator[tuple[dict[str, Any], Pretrain[Any, Any, Any]]]:
    """What identifies a run, and the run; whole seeds first, so that an unfinished experiment is a smaller one."""
    if options.ablate:
        grid = [(seed, "low-rank", arm, 32, 6e-4) for seed in options.seeds for arm in ABLATIONS]
    else:
        cases = itertools.product(options.seeds, LAYERS, ARMS, options.state_bits)
        grid = [(*case, lr) for case in cases for lr in RATES[case[1]]]
    for seed, layers, arm, bits, lr in grid:
        key = {"layers": layers, "arm": arm, "state_bits": bits, "lr": lr, "seed": seed, "steps": options.steps}
        method = AdamW(state_bits=bits)  # pyright: ignore
        yield (
            key,
            Pretrain(
                method=method,
                fallback=method,
                layers=LAYERS[layers],
                restarts={**ARMS, **ABLATIONS}[arm],
                model="tiny",
                data=DataConfig(seq_len=128),
                out=options.runs / "-".join(map(str, key.values())).replace(" ", "-"),
                steps=options.steps,
                batch_size=8,
                lr=lr,
                fallback_lr=4e-3,
                seed=seed,
            ),
        )


def main(options: Options) -> None:
    rows = options.out / ("ablations.jsonl" if options.ablate else "rows.jsonl")
    options.out.mkdir(parents=True, exist_ok=True)
    done = [row for _, row in jsonl.read(rows)] if rows.exists() else []
    for index, (key, config) in enumerate(configurations(options)):
        if index % options.parts != options.part or any(key.items() <= row.items() for row in done):
            continue
        shutil.rmtree(config.out, ignore_errors=True)
        result = pretrain(config, quiet=True)
        _, start = next(jsonl.read(config.out / "log.jsonl"))
        restarts = [event for _, event in jsonl.read(config.out / "log.jsonl") if event["event"] == "restart"]
        row = {
            **key,
            "perplexity": result.score.perplexity,
            "restarts": len(restarts),
            "change": max((event["change"] or 0.0 for event in restarts), default=0.0),
            "seconds": result.seconds,
            **{name: start[name] for name in ("config", "versions", "hardware", "commit", "time")},
        }
        Rows(rows, options.runs).append(row)
        shutil.rmtree(config.out)
        print(*key.values(), f"{result.score.perplexity:.2f}", f"{result.seconds:.0f} s", flush=True)
    if not options.ablate:
        summarise([row for _, row in jsonl.read(rows) if row["steps"] == options.steps], options.out)


def summarise(rows: list[dict[str, Any]], out: Path) -> None:
    """Every arm at its best rate, and its difference from plain, paired by seed."""
    by: dict[tuple[str, int, str], dict[float, dict[int, float]]] = {}
    for row in rows:
        rates = by.setdefault((row["layers"], row["state_bits"], row["arm"]), {})
        rates.setdefault(row["lr"], {})[row["seed"]] = row["perplexity"]
    best = {case: min(rates.items(), key=lambda rate: settled_first([*rate[1].values()])) for case, rates in by.items()}
    lines = [
        "| weights | states | restarts | best rate (tried) | perplexity, mean ± sd | minus plain, ± standard error |",
        "|---|---|---|---|---|---|",
    ]
    for (layers, bits, arm), (lr, seeds) in best.items():
        plain = best[layers, bits, "plain"][1]
        gaps = [value - plain[seed] for seed, value in seeds.items() if seed in plain]
        gap = "" if arm == "plain" else f"{fmean(gaps):+.2f} ± {_sd(gaps) / len(gaps) ** 0.5:.2f}"
        tried = ", ".join(f"{rate:g}" for rate in sorted(by[layers, bits, arm]))
        values = list(seeds.values())
        lines.append(
            f"| {layers} | {'fp32' if bits == 32 else 'bf16'} | {arm} | {lr:g} ({tried}) "
            f"| {fmean(values):.2f} ± {_sd(values):.2f} ({len(values)}) | {gap} |"
        )
    (out / "table.md").write_text("\n".join(lines) + "\n")
    figure = go.Figure()
    for layers, bits in itertools.product(LAYERS, (32, 16)):
        arms = [arm for arm in ARMS if (layers, bits, arm) in best]
        values = [list(best[layers, bits, arm][1].values()) for arm in arms]
        figure.add_scatter(
            name=f"{layers}, {'fp32' if bits == 32 else 'bf16'} states",
            x=arms,
            y=[fmean(value) for value in values],
            error_y={"type": "data", "array": [_sd(value) for value in values]},
            line={"dash": "solid" if bits == 32 else "dot", "color": "#0072b2" if layers == "low-rank" else "#d55e00"},
        )
    figure.update_layout(template="plotly_white", width=800, height=450, yaxis_title="validation perplexity, ± sd")
    figure.write_image(out / "perplexity.svg")


def _sd(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main(tyro.cli(Options))
