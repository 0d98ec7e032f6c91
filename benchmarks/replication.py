"""The tables and pictures of docs/replication.md, each beside the rows that it is made of.

python -m benchmarks.replication
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.pages import table
from gossamer.bench import plots, reading, words
from gossamer.bench.reading import Method, Rate
from gossamer.bench.table import cells
from gossamer.bench.verdict import ARITHMETIC, orders
from gossamer.bench.words import MISSING
from papers import replication

RESULTS = Path("results")
HEADER = ("method", "family", "rate", "tried", "perplexity", "gain beside AdamW's", "state of hidden layers, MiB",
          "weights and state, MiB", "step ÷ `torch` AdamW's")  # fmt: skip


def main() -> None:
    for name in ("tiny", "small", "ranks"):
        folder = RESULTS / f"replication_{name}"
        if not (folder / "rows.jsonl").exists():
            continue
        methods = reading.load(folder)
        (folder / "table.md").write_text(page(name, methods))
        pictures = (
            {"ranks": by_rank(methods)}
            if name == "ranks"
            else {"rates": by_rate(methods), "memory": by_memory(methods)}
        )
        for picture, figure in pictures.items():
            figure.update_layout(template="plotly_white").write_image(folder / f"{picture}.svg")


def page(name: str, methods: Sequence[Method]) -> str:
    claimed = getattr(replication, name)
    finished = {run.label: run.row for method in methods for run in method.runs}
    lines = [
        f"# Replication: {claimed.title}",
        "",
        grid(methods, floor() if name == "tiny" else {}),
        "",
        ARITHMETIC.capitalize() + ".",
        "",
        *(f"- {line}" for line in orders(claimed, claimed.sizes, finished)),
    ]
    return "\n".join(lines) + "\n"


def floor() -> dict[int, float]:
    """Log perplexities, by seed, with hidden matrices as they were drawn."""
    folder = RESULTS / "replication_floor"
    return by_seed(reading.load(folder)[0].best) if (folder / "rows.jsonl").exists() else {}


def by_seed(rate: Rate | None) -> dict[int, float]:
    """Log perplexities of the runs that did not diverge."""
    return {run.row["seed"]: math.log(run.perplexity) for run in (rate.runs if rate else ()) if run.perplexity}


def gain(rate: Rate, reference: Rate | None, floor: Mapping[int, float]) -> str:
    """What log perplexity lies below the floor, over what the reference's does, with the seeds that all three have."""
    ours, theirs = by_seed(rate), by_seed(reference)
    seeds = ours.keys() & theirs.keys() & floor.keys()
    if not seeds or len(ours) < len(rate.runs):
        return MISSING
    return f"{sum(floor[it] - ours[it] for it in seeds) / sum(floor[it] - theirs[it] for it in seeds):.0%}"


def family_of(method: str) -> str:
    return next((name for name, own in replication.FAMILIES.items() if method in own), MISSING)


def grid(methods: Sequence[Method], floor: Mapping[int, float]) -> str:
    """A line a method, the best first."""
    reference = reading.baseline(list(methods))
    lines = []
    for method in methods:
        if (best := method.best) is None:
            continue
        texts, memory = cells(method, reference), best.mean("memory_bytes")
        lines.append(
            (
                f"`{texts['method']}`",
                family_of(method.name),
                *(texts[name] for name in ("rate", "tried", "perplexity")),
                gain(best, reference, floor),
                texts["hidden"],
                MISSING if memory is None else words.mib(memory),
                texts["step time"],
            )
        )
    return table(HEADER, lines)


def by_rate(methods: Sequence[Method]) -> go.Figure:
    """A panel a family: perplexity against the learning rate, bars of one standard deviation.

    The best three quarters of all that was tried are in the frame; lines to worse ones leave it at the top.
    """
    families: Mapping[str, Sequence[str]] = replication.FAMILIES
    figure = make_subplots(2, 2, subplot_titles=list(families), vertical_spacing=0.13, horizontal_spacing=0.2)
    for index, names in enumerate(families.values()):
        row, column = divmod(index, 2)
        own = [method for method in methods if method.name in names]
        drawn = plots.rates(own, plots.styles_of(own)) if own else None
        key = f"legend{index + 1}" if index else "legend"
        for trace in drawn["data"] if drawn else ():
            figure.add_trace(go.Scatter({**trace, "meta": None, "legend": key}), row + 1, column + 1)
        place = {"x": 0.41 + 0.6 * column, "y": 1.0 - 0.565 * row, "xanchor": "left", "yanchor": "top"}
        figure.update_layout({key: place | {"font": {"size": 10}}})
    figure.update_xaxes(type="log", title="learning rate", dtick="D2", tickformat="~g")
    tried = sorted(rate.quality for method in methods for rate in method.rates if rate.quality is not None)
    frame = [0.98 * tried[0], 1.02 * tried[3 * len(tried) // 4]]
    return figure.update_yaxes(title="validation perplexity", range=frame).update_layout(width=1100, height=900)


def by_memory(methods: Sequence[Method]) -> go.Figure:
    """The report's plot of perplexity against memory, with the name of every method."""
    figure = go.Figure(plots.memory(list(methods), plots.styles_of(list(methods))))
    figure.update_traces(mode="markers+text", textfont={"size": 10}, selector=lambda trace: trace.mode == "markers")
    return figure.update_layout(width=1000, height=600)


def by_rank(methods: Sequence[Method]) -> go.Figure:
    """Perplexity against the rank, bars of one standard deviation."""
    best = {method.name: method.best for method in methods if method.best}
    figure = go.Figure()
    for name, colour in zip(("lora-pre", "galore"), plots.COLOURS, strict=False):
        found = {rank: best[key] for rank in replication.RANKS if (key := f"{name}-r{rank}") in best}
        figure.add_scatter(
            name=name,
            x=list(found),
            y=[rate.perplexity for rate in found.values()],
            error_y={"type": "data", "array": [rate.sd or 0.0 for rate in found.values()]},
            line={"color": colour},
        )
    figure.update_xaxes(type="log", title="rank, of d = 128", tickvals=list(replication.RANKS))
    return figure.update_layout(width=800, height=450, yaxis_title="validation perplexity, ± sd")


if __name__ == "__main__":
    main()
