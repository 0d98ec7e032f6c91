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
        grid(methods, floor(claimed.sizes[0])),
        "",
        ARITHMETIC.capitalize() + ".",
        "",
        *(f"- {line}" for line in orders(claimed, claimed.sizes, finished)),
    ]
    return "\n".join(lines) + "\n"


def floor(size: str) -> dict[int, float]:
    """Log perplexities, by seed, with hidden matrices as they were drawn."""
    methods = reading.load(RESULTS / "replication_floor")
    return by_seed(next((method.best for method in methods if method.runs[0].size == size), None))


def by_seed(rate: Rate | None) -> dict[int, float]:
    """Log perplexities of the runs that did not diverge."""
    return {run.row["seed"]: math.log(run.perplexity) for run in (rate.runs if rate else ()) if run.perplexity}


def gain(rate: Rate, reference: Rate | None, floor: Mapping[int, float]) -> float | None:
    """What log perplexity lies below the floor, over what the reference's does, with the seeds that all three have."""
    ours, theirs = by_seed(rate), by_seed(reference)
    seeds = ours.keys() & theirs.keys() & floor.keys()
    if not seeds or len(ours) < len(rate.runs):
        return None
    return sum(floor[it] - ours[it] for it in seeds) / sum(floor[it] - theirs[it] for it in seeds)


def family_of(method: str) -> str:
    return next((name for name, own in replication.FAMILIES.items() if method in own), MISSING)


def grid(methods: Sequence[Method], floor: Mapping[int, float]) -> str:
    """A line a method, the best first: by its gain, since a method with fewer seeds has another mean."""
    reference = reading.baseline(list(methods))
    lines = []
    for method in methods:
        if (best := method.best) is None:
            continue
        texts, memory = cells(method, reference), best.mean("memory_bytes")
        gained = gain(best, reference, floor)
        lines.append(
            (
                -gained if gained is not None else math.inf,
                f"`{texts['method']}`",
                family_of(method.name),
                *(texts[name] for name in ("rate", "tried", "perplexity")),
                MISSING if gained is None else f"{gained:.0%}",
                texts["hidden"],
                MISSING if memory is None else words.mib(memory),
                texts["step time"],
            )
        )
    return table(HEADER, [line for _, *line in sorted(lines, key=lambda line: line[0])])


def by_rate(methods: Sequence[Method]) -> go.Figure:
    """A panel a family: perplexity against the learning rate, bars of one standard deviation.

    The best three quarters of all that was tried are in the frame; lines to worse ones leave it at the top.
    """
    families = {
        family: own
        for family, names in replication.FAMILIES.items()
        if (own := [method for method in methods if method.name in names])
    }
    figure = make_subplots(2, 2, subplot_titles=list(families), vertical_spacing=0.13, horizontal_spacing=0.2)
    for index, own in enumerate(families.values()):
        row, column = divmod(index, 2)
        drawn = plots.rates(own, plots.styles_of(own))
        key = f"legend{index + 1}" if index else "legend"
        for trace in drawn["data"] if drawn else ():
            figure.add_trace(go.Scatter({**trace, "meta": None, "legend": key}), row + 1, column + 1)
        place = {"x": 0.41 + 0.6 * column, "y": 1.0 - 0.565 * row, "xanchor": "left", "yanchor": "top"}
        figure.update_layout({key: place | {"font": {"size": 10}}})
    ticks = [digit * 10.0**power for power in range(-5, 1) for digit in (1, 3)]
    figure.update_xaxes(type="log", title="learning rate", tickvals=ticks, tickformat="~g")
    frame = _frame([rate for method in methods for rate in method.rates], 0.75)
    return figure.update_yaxes(title="validation perplexity", range=frame).update_layout(width=1100, height=900)


def _frame(rates: Sequence[Rate], part: float) -> list[float]:
    """Bounds of an axis that hold this part of the perplexities, the best ones."""
    tried = sorted(rate.perplexity for rate in rates if rate.perplexity is not None)
    return [0.97 * tried[0], 1.02 * tried[math.ceil(part * len(tried)) - 1]]


def by_memory(methods: Sequence[Method]) -> go.Figure:
    """The report's plot of perplexity against memory, with the name of every method; what is far worse is left out.

    Names of methods that take the same go to both sides in turn.
    """
    drawn = plots.memory(list(methods), plots.styles_of(list(methods)))
    points = [trace for trace in (drawn["data"] if drawn else ()) if trace["mode"].startswith("markers")]
    for index, trace in enumerate(sorted(points, key=lambda trace: (round(trace["x"][0], 1), trace["y"][0]))):
        side = "middle left" if index % 2 else "middle right"
        trace |= {"mode": "markers+text", "textfont": {"size": 10}, "textposition": side, "cliponaxis": True}
    figure = go.Figure(drawn).update_yaxes(range=_frame([method.best for method in methods if method.best], 0.95))
    return figure.update_layout(width=1100, height=900)


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
