"""The report's pictures, as the JSON that Plotly draws."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gossamer.bench import words
from gossamer.bench.reading import BASELINE, Method, Point, Rate, Run
from gossamer.bench.words import MIB, MISSING
from gossamer.optim.diagnostics import QUANTITIES

Figure = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart, less the yellow and black that vanish on a white
# or a dark page; the baseline is grey. With more methods than colours, dashes and symbols tell the rounds apart.
GREY = "#8a8f98"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "triangle-down", "pentagon")


@dataclass(frozen=True)
class Style:
    colour: str
    dash: str = DASHES[0]
    symbol: str = SYMBOLS[0]


def styles_of(methods: list[Method]) -> dict[str, Style]:
    """By name rather than by rank, so that a method keeps its colour when the results change."""
    styles = {BASELINE: Style(GREY)}
    for index, name in enumerate(sorted({method.name for method in methods} - {BASELINE})):
        turn, colour = divmod(index, len(COLOURS))
        styles[name] = Style(COLOURS[colour], DASHES[turn % len(DASHES)], SYMBOLS[turn % len(SYMBOLS)])
    return styles


def _smooth(points: tuple[Point, ...]) -> list[Point]:
    """A running mean over about a fortieth of the curve, thinned to what a screen can show. Gaps stay gaps."""
    keep = 1 - 1 / max(1, len(points) // 40)
    total = weight = 0.0
    smooth: list[Point] = []
    for step, loss in points:
        if loss is None:
            total = weight = 0.0
        else:
            total, weight = keep * total + loss, keep * weight + 1
        smooth.append((step, None if loss is None else round(total / weight, 5)))
    return _thin(smooth, 600)


def _thin(points: Sequence[Point], most: int) -> list[Point]:
    """Every so many-th point, and the last."""
    stride = math.ceil(len(points) / most) or 1
    return [*points[:-1:stride], *points[-1:]]


def _axis(title: str, **more: Any) -> dict[str, Any]:
    grid = "rgba(128,128,128,0.22)"
    look = {"gridcolor": grid, "linecolor": grid, "zeroline": False, "automargin": True}
    return {"title": {"text": title}} | look | more


def _figure(data: list[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], **layout: Any) -> Figure:
    return {
        "data": data,
        "layout": {
            "xaxis": x,
            "yaxis": y,
            "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 8, "r": 8, "t": 12, "b": 8},
            "hovermode": "closest",
            "legend": {"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top", "itemwidth": 30},
            **layout,
        },
    }


def _text(text: str) -> str:
    """Plotly reads a subset of HTML in its texts."""
    return escape(text, quote=False)


def loss(methods: list[Method], styles: dict[str, Style]) -> Figure | None:
    """Every run's curves. Those away from their method's best rate start hidden, until the key brings them in."""
    traces: list[dict[str, Any]] = []
    shown: list[Point] = []
    for method in methods:
        for run in method.runs:
            curve, visible = _smooth(run.train), run in method.shown
            traces += _curve(run, curve, styles[method.name], visible=visible)
            shown += [*curve, *run.evals] if visible else []
    losses = [(step, loss) for step, loss in shown if loss is not None]
    if not losses:
        return None
    # The steep fall of the first steps would flatten all that matters, so it starts outside the frame.
    late = 0.1 * max(step for step, _ in losses)
    height = _padded([loss for step, loss in losses if step >= late], 0.06)
    return _figure(
        traces, _axis("step", tickformat=",d"), _axis("loss, nats per token", range=height), showlegend=False
    )


def _curve(run: Run, curve: list[Point], style: Style, *, visible: bool) -> Iterator[dict[str, Any]]:
    """One run's training line, validation points and restart marks."""
    label = _label(run)
    common = {
        "meta": {"group": group_of(run)},
        "visible": visible,
        "hovertemplate": f"%{{y:.4f}} at step %{{x:,}}<extra>{label}</extra>",
    }
    steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
    line = {"color": style.colour, "width": 1.6, "dash": style.dash}
    yield common | {"mode": "lines", "x": steps, "y": losses, "line": line}
    marker = {"color": style.colour, "size": 7, "symbol": style.symbol, "line": {"width": 1, "color": "white"}}
    x, y = [step for step, _ in run.evals], [loss for _, loss in run.evals]
    yield common | {"mode": "markers", "x": x, "y": y, "marker": marker}
    if run.restarts and curve:
        x, text = [step for step, _ in run.restarts], [_text(done) for _, done in run.restarts]
        y = [losses[max(0, bisect_right(steps, step) - 1)] for step in x]
        marks = {"color": style.colour, "size": 20, "symbol": "line-ns-open", "line": {"width": 2}}
        hover = f"restart after step %{{x:,}}<br>%{{text}}<extra>{label}</extra>"
        yield common | {"mode": "markers", "x": x, "y": y, "text": text, "marker": marks, "hovertemplate": hover}


def _label(run: Run) -> str:
    return _text(run.label if run.finished else f"{run.label} ({run.status})")


def group_of(run: Run) -> str:
    """What ties the runs of a method at one rate to their button in a key."""
    return f"{run.method} {MISSING if run.rate is None else words.rate(run.rate)}"


def memory(methods: list[Method], styles: dict[str, Style]) -> Figure | None:
    points = [
        (size / MIB, method, rate)
        for method in methods
        if (rate := method.best) and rate.perplexity and (size := rate.mean("memory_bytes")) is not None
    ]
    if len(points) < 2:
        return None
    points.sort(key=lambda point: (point[0], point[1].name))
    traces = [
        {
            "mode": "markers+text",
            "x": [size],
            "y": [rate.perplexity],
            "error_y": _error([rate.sd], styles[method.name]),
            "text": [_text(method.name)],
            # Neighbours' names go to opposite sides, so that points close together can still be read.
            "textposition": "bottom center" if index % 2 else "top center",
            "marker": {"color": styles[method.name].colour, "size": 12, "symbol": styles[method.name].symbol},
            "hovertemplate": f"%{{y:,.3f}} with %{{x:,.3f}} MiB<extra>{_text(method.name)}</extra>",
            "showlegend": False,
            "cliponaxis": False,
        }
        for index, (size, method, rate) in enumerate(points)
    ]
    sizes = [size for size, _, _ in points]
    values = [rate.perplexity + sign * (rate.sd or 0) for *_, rate in points if rate.perplexity for sign in (-1, 1)]
    x = _axis("weights and optimizer state, MiB", range=_padded(sizes, 0.18))
    return _figure(traces, x, _axis("validation perplexity", range=_padded(values, 0.18)))


def _padded(values: list[float], share: float) -> list[float]:
    """A range with room around the values for their labels."""
    low, high = min(values), max(values)
    margin = share * (high - low) or 0.1 * high or 1.0
    return [low - margin, high + margin]


def _error(sds: list[float | None], style: Style) -> dict[str, Any]:
    return {"type": "data", "array": [sd or 0 for sd in sds], "color": style.colour, "thickness": 1.2, "width": 4,
            "visible": any(sd is not None for sd in sds)}  # fmt: skip


def rates(methods: list[Method], styles: dict[str, Style]) -> Figure | None:
    """Perplexity against the learning rate, where any method was tried at two: means, seeds, and what diverged."""
    tried = {method.name: sorted((rate.rate, rate) for rate in method.rates if rate.rate) for method in methods}
    runs = [run for pairs in tried.values() for _, rate in pairs for run in rate.runs]
    seen = [run.perplexity for run in runs if run.perplexity is not None]
    if max(map(len, tried.values())) < 2 or not seen:
        return None
    top = max(seen)
    traces = [trace for name, pairs in tried.items() for trace in _tried(name, pairs, styles[name], top) if trace["x"]]
    # Ticks at the rates themselves; a rate far too high must not flatten the differences between the good ones.
    values = sorted({lr for pairs in tried.values() for lr, _ in pairs})
    ticks = {"tickmode": "array", "tickvals": values, "ticktext": [words.rate(value) for value in values]}
    wide = "log" if top > 4 * min(seen) else "linear"
    return _figure(traces, _axis("learning rate", type="log", **ticks), _axis("validation perplexity", type=wide))


def _tried(method: str, pairs: list[tuple[float, Rate]], style: Style, top: float) -> Iterator[dict[str, Any]]:
    """One method's line of means with its spread, a point for each of several seeds, a cross where a seed diverged."""
    name = _text(method)
    common = {"name": name, "legendgroup": name}
    yield common | {
        "mode": "lines+markers",
        "x": [lr for lr, _ in pairs],
        "y": [rate.perplexity for _, rate in pairs],
        "error_y": _error([rate.sd for _, rate in pairs], style),
        "line": {"color": style.colour, "width": 1.6, "dash": style.dash},
        "marker": {"color": style.colour, "size": 8, "symbol": style.symbol},
        "hovertemplate": f"%{{y:,.3f}} at learning rate %{{x}}<extra>{name}</extra>",
    }
    seeds = [(lr, run) for lr, rate in pairs if len(rate.runs) > 1 for run in rate.runs if run.perplexity is not None]
    yield common | {
        "mode": "markers",
        "showlegend": False,
        "x": [lr for lr, _ in seeds],
        "y": [run.perplexity for _, run in seeds],
        "text": [_text(run.label) for _, run in seeds],
        "marker": {"color": style.colour, "size": 5, "symbol": style.symbol, "opacity": 0.5},
        "hovertemplate": "%{y:,.3f}<extra>%{text}</extra>",
    }
    diverged = [(lr, run) for lr, rate in pairs for run in rate.runs if run.perplexity is None]
    yield common | {
        "mode": "markers",
        "showlegend": False,
        "x": [lr for lr, _ in diverged],
        "y": [top for _ in diverged],
        "text": [_text(run.label) for _, run in diverged],
        "marker": {"color": style.colour, "size": 10, "symbol": "x-thin-open", "line": {"width": 2}},
        "hovertemplate": "diverged<extra>%{text}</extra>",
    }


def diagnostics(methods: list[Method], styles: dict[str, Style]) -> dict[str, Figure]:
    """A figure for each quantity that any run measured: one curve for each run and parameter, the first one shown."""
    return {
        quantity: _diagnosed(quantity, methods, styles)
        for quantity in QUANTITIES
        if any(quantity in run.diagnostics for method in methods for run in method.runs)
    }


def parameters(methods: list[Method]) -> list[str]:
    """Every parameter that was diagnosed, in the models' order."""
    curves = [curves for method in methods for run in method.runs for curves in run.diagnostics.values()]
    return list(dict.fromkeys(name for by_name in curves for name in by_name))


def _diagnosed(quantity: str, methods: list[Method], styles: dict[str, Style]) -> Figure:
    traces, values, first = [], [], parameters(methods)[0]
    for method in methods:
        style = styles[method.name]
        for run in method.runs:
            for parameter, points in run.diagnostics.get(quantity, {}).items():
                curve = _thin(points, 300)
                values += [value for _, value in curve if value]
                traces.append(
                    {
                        "mode": "lines+markers",
                        "meta": {"group": group_of(run), "parameter": parameter},
                        "visible": run in method.shown and parameter == first,
                        "x": [step for step, _ in curve],
                        "y": [None if value is None else float(f"{value:.5g}") for _, value in curve],
                        "line": {"color": style.colour, "width": 1.6, "dash": style.dash},
                        "marker": {"color": style.colour, "size": 4, "symbol": style.symbol},
                        "hovertemplate": f"%{{y:.4g}} at step %{{x:,}}<extra>{_label(run)}</extra>",
                    }
                )
    return _figure(traces, _axis("step", tickformat=",d"), _scale(quantity, values), showlegend=False)


def _scale(quantity: str, values: list[float]) -> dict[str, Any]:
    """Shares from 0 to 1; anything else from 0, or logarithmic where that would flatten most of it."""
    if quantity in ("overlap", "lost"):
        return _axis("", range=[-0.03, 1.03])
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    flat = high > 5 if quantity.endswith("_error") else high > 20 * low
    if not flat:
        return _axis("", rangemode="tozero")
    ticks = {"dtick": "D2"} if high < 1000 * low else {}  # at 1, 2 and 5, or else at powers of ten
    return _axis("", type="log", tickformat="~g", **ticks)


def step_ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """For each rival the ratio of step times against the rank, from least to greatest; a line a method and setting."""
    figures = {}
    for rival in dict.fromkeys(row["rival"] for row in rows):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["rival"] == rival and row["rank"]:
                lines.setdefault(f"{row['method']}, {row['model']}, {row['dtype']}", []).append(row)
        colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(sorted(lines))}
        traces = [
            {
                "mode": "lines+markers",
                "name": _text(name),
                "x": [row["rank"] for row in points],
                "y": [row["ratio"] for row in points],
                "error_y": {
                    "type": "data",
                    "symmetric": False,
                    "array": [row["ratio_max"] - row["ratio"] for row in points],
                    "arrayminus": [row["ratio"] - row["ratio_min"] for row in points],
                    "color": colours[name],
                    "thickness": 1.2,
                },
                "line": {"color": colours[name], "width": 1.6},
                "hovertemplate": f"%{{y:.3g}} at rank %{{x}}<extra>{_text(name)}</extra>",
            }
            for name, points in sorted(
                (name, sorted(line, key=lambda row: row["rank"])) for name, line in lines.items()
            )
        ]
        ranks = sorted({row["rank"] for line in lines.values() for row in line})
        ticks = {"tickmode": "array", "tickvals": ranks, "ticktext": [str(rank) for rank in ranks]}
        if traces:
            x = _axis("rank", type="log", **ticks)
            figures[rival] = _figure(traces, x, _axis(f"time ÷ {_text(rival)}", type="log", tickformat="~g"))
    return figures
