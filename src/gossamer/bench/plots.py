"""The report's pictures, as the JSON that Plotly draws.

A trace's `meta` says what shows it: the `group` of a key's button, the `parameter` chosen, the `facets` that filters
ask for. A layout's `meta` says how the page fits axes to what is shown: `axes`, with `share` of their length to spare,
from `late`, a part of the last x, on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from gossamer.bench import words
from gossamer.bench.reading import BASELINE, Method, Point, Published, Rate, Run, facets_of, facets_of_row, step_setting
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
    """A running mean over about a fortieth of the curve, thinned to what a screen can show. Gaps stay gaps.

    A row's curve, of a hundred means, is left as it is.
    """
    keep = 1 - 1 / max(1, len(points) // 40) if len(points) > 100 else 0.0
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


def axis(title: str, **more: Any) -> dict[str, Any]:
    grid = "rgba(128,128,128,0.22)"
    look = {"gridcolor": grid, "linecolor": grid, "zeroline": False, "automargin": True}
    return {"title": {"text": title}} | look | more


def figure_of(data: list[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], **layout: Any) -> Figure:
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


def text_of(text: str) -> str:
    """Plotly reads a subset of HTML in its texts."""
    return escape(text, quote=False)


def loss(methods: list[Method], styles: dict[str, Style]) -> Figure | None:
    """Every run's curves. Those away from their method's best rate start hidden, until the key brings them in."""
    traces: list[dict[str, Any]] = []
    for method in methods:
        for run in method.runs:
            traces += _curve(run, _smooth(run.train), styles[method.name], visible=run in method.shown)
    if not any(trace["x"] for trace in traces):
        return None
    # The steep fall of the first steps would flatten all that matters, so it starts outside the frame.
    fit = {"axes": ["yaxis"], "share": 0.06, "late": 0.1}
    return figure_of(traces, axis("step", tickformat=",d"), axis("loss, nats per token"), showlegend=False, meta=fit)


def _curve(run: Run, curve: list[Point], style: Style, *, visible: bool) -> Iterator[dict[str, Any]]:
    """One run's training line, validation points and restart marks."""
    label = _label(run)
    common = {
        "meta": {"group": group_of(run), "facets": facets_of([run])},
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
        x, text = [step for step, _ in run.restarts], [text_of(done) for _, done in run.restarts]
        y = [losses[max(0, bisect_right(steps, step) - 1)] for step in x]
        marks = {"color": style.colour, "size": 20, "symbol": "line-ns-open", "line": {"width": 2}}
        hover = f"restart after step %{{x:,}}<br>%{{text}}<extra>{label}</extra>"
        yield common | {"mode": "markers", "x": x, "y": y, "text": text, "marker": marks, "hovertemplate": hover}


def _label(run: Run) -> str:
    return text_of(run.label if run.finished else f"{run.label} ({run.status})")


def group_of(run: Run) -> str:
    """What ties the runs of a method at one rate to their button in a key."""
    rate = MISSING if run.rate is None else words.rate(run.rate)
    return " ".join(filter(None, [run.method, run.variant, run.table, run.setting, rate]))


def memory(methods: list[Method], styles: dict[str, Style], published: Sequence[Published] = ()) -> Figure | None:
    """Quality against memory: each method at its best, the front of those that none beats in both, papers' points.

    Papers count perplexity in their own way; beside their points, ours are counted so, too.
    """
    scored, legacy = _scored(methods), bool(published)
    sized = "memory_bytes" if any(run.memory_bytes for method in methods for run in method.runs) else "state_bytes"
    points = [
        (size / MIB, value, method, rate)
        for method in methods
        if (rate := method.best) and (size := rate.mean(sized)) is not None
        if (value := rate.mean("legacy_perplexity") if legacy and rate.quality else rate.quality)
    ]
    hollow = [_hollow(claim, styles) for claim in published if claim.gigabytes is not None]
    if len(points) + len(hollow) < 2:
        return None
    points.sort(key=lambda point: (point[0], point[2].title))
    fronts = {setting: _front(points, setting, scored) for setting in dict.fromkeys(it.setting for *_, it, _ in points)}
    named = {method.title for front in fronts.values() for *_, method, _ in front} if len(points) > 8 else None
    traces: list[dict[str, Any]] = [
        {
            "mode": "lines",
            "x": [size for size, *_ in front],
            "y": [value for _, value, *_ in front],
            "line": {"color": GREY, "width": 1, "dash": "dot"},
            "meta": {"facets": {key: facet for key, facet in _facets(front).items() if key in ("size", "task")}},
            "hoverinfo": "skip",
            "showlegend": False,
        }
        for front in fronts.values()
        if len(front) > 1
    ]
    traces += [
        {
            "mode": "markers+text" if named is None or method.title in named or method.name == BASELINE else "markers",
            "x": [size],
            "y": [value],
            "error_y": _error([None if legacy else rate.sd], styles[method.name]),
            "text": [text_of(method.title)],
            # Neighbours' names go to opposite sides, so that points close together can still be read.
            "textposition": "bottom center" if index % 2 else "top center",
            "marker": {"color": styles[method.name].colour, "size": 12, "symbol": styles[method.name].symbol},
            "hovertemplate": f"%{{y:,.3f}} with %{{x:,.3f}} MiB<extra>{text_of(method.title)}</extra>",
            "meta": {"facets": facets_of(rate.runs)},
            "showlegend": False,
            "cliponaxis": False,
        }
        for index, (size, value, method, rate) in enumerate(points)
    ]
    values = [value for trace in (*traces, *hollow) for value in trace["x"]]
    wide = "log" if max(values) > 10 * min(values) > 0 else "linear"
    x = axis("weights and optimizer state, MiB" if sized == "memory_bytes" else "optimizer state, MiB", type=wide)
    y = axis("score, %" if scored else f"{'legacy ' if legacy else ''}validation perplexity")
    return figure_of(traces + hollow, x, y, meta={"axes": ["xaxis", "yaxis"], "share": 0.18})


MemoryPoint = tuple[float, float, Method, Rate]
"""MiB, quality, and whose they are."""


def _front(points: Sequence[MemoryPoint], setting: str, scored: bool) -> list[MemoryPoint]:
    """Those of the setting, by memory, that are better than everything that takes no more."""
    front: list[MemoryPoint] = []
    sign = -1 if scored else 1
    for point in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if point[2].setting == setting and (not front or sign * point[1] < sign * front[-1][1]):
            front.append(point)
    return front


def _facets(points: Sequence[MemoryPoint]) -> dict[str, list[str]]:
    return facets_of(run for *_, rate in points for run in rate.runs)


def _hollow(claim: Published, styles: dict[str, Style]) -> dict[str, Any]:
    style = styles.get(claim.method, Style(GREY))
    source = "<br>".join(map(text_of, filter(None, [claim.source, claim.caveats])))
    return {
        "mode": "markers",
        "x": [(claim.gigabytes or 0) * 1e9 / MIB],
        "y": [claim.perplexity],
        "marker": {"color": style.colour, "size": 12, "symbol": f"{style.symbol}-open", "line": {"width": 2}},
        "hovertemplate": f"published: %{{y:,.2f}} with {claim.gigabytes:g} GB<br>{source}"
        f"<extra>{text_of(claim.method)}, {text_of(claim.size)}</extra>",
        "meta": {"facets": {"size": [claim.size], "method": [claim.method]}},
        "showlegend": False,
        "cliponaxis": False,
    }


def _scored(methods: list[Method]) -> bool:
    return any(run.score is not None for method in methods for run in method.runs)


def _error(sds: list[float | None], style: Style) -> dict[str, Any]:
    return {"type": "data", "array": [sd or 0 for sd in sds], "color": style.colour, "thickness": 1.2, "width": 4,
            "visible": any(sd is not None for sd in sds)}  # fmt: skip


def rates(methods: list[Method], styles: dict[str, Style]) -> Figure | None:
    """Quality against the learning rate, where any method was tried at two: means, seeds, and what diverged."""
    tried = [(method, sorted((rate.rate, rate) for rate in method.rates if rate.rate)) for method in methods]
    runs = [run for _, pairs in tried for _, rate in pairs for run in rate.runs]
    seen = [run.quality for run in runs if run.quality is not None]
    if not seen or max(len(pairs) for _, pairs in tried) < 2:
        return None
    top = max(seen)
    traces = [
        trace for method, pairs in tried for trace in _tried(method, pairs, styles[method.name], top) if trace["x"]
    ]
    # Ticks at the rates themselves; a rate far too high must not flatten the differences between the good ones.
    values = sorted({lr for _, pairs in tried for lr, _ in pairs})
    ticks: dict[str, Any] = {"tickmode": "array", "tickvals": values, "ticktext": list(map(words.rate, values))}
    if len(values) > 8:
        ticks = {"dtick": "D2", "tickformat": "~g"}  # at 1, 2 and 5
    wide = "log" if top > 4 * min(seen) > 0 and not _scored(methods) else "linear"
    y = axis("score, %" if _scored(methods) else "validation perplexity", type=wide)
    return figure_of(traces, axis("learning rate", type="log", **ticks), y)


def _tried(method: Method, pairs: list[tuple[float, Rate]], style: Style, top: float) -> Iterator[dict[str, Any]]:
    """One method's line of means with its spread, a point for each of several seeds, a cross where a seed diverged."""
    name = text_of(method.title)
    facets = facets_of(run for _, rate in pairs for run in rate.runs)
    common = {"name": name, "legendgroup": name, "meta": {"facets": facets}}
    yield common | {
        "mode": "lines+markers",
        "x": [lr for lr, _ in pairs],
        "y": [rate.quality for _, rate in pairs],
        "error_y": _error([rate.sd for _, rate in pairs], style),
        "line": {"color": style.colour, "width": 1.6, "dash": style.dash},
        "marker": {"color": style.colour, "size": 8, "symbol": style.symbol},
        "hovertemplate": f"%{{y:,.3f}} at learning rate %{{x}}<extra>{name}</extra>",
    }
    seeds = [(lr, run) for lr, rate in pairs if len(rate.runs) > 1 for run in rate.runs if run.quality is not None]
    yield common | {
        "mode": "markers",
        "showlegend": False,
        "x": [lr for lr, _ in seeds],
        "y": [run.quality for _, run in seeds],
        "text": [text_of(run.label) for _, run in seeds],
        "marker": {"color": style.colour, "size": 5, "symbol": style.symbol, "opacity": 0.5},
        "hovertemplate": "%{y:,.3f}<extra>%{text}</extra>",
    }
    diverged = [(lr, run) for lr, rate in pairs for run in rate.runs if run.quality is None]
    yield common | {
        "mode": "markers",
        "showlegend": False,
        "x": [lr for lr, _ in diverged],
        "y": [top for _ in diverged],
        "text": [text_of(run.label) for _, run in diverged],
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
                        "meta": {"group": group_of(run), "parameter": parameter, "facets": facets_of([run])},
                        "visible": run in method.shown and parameter == first,
                        "x": [step for step, _ in curve],
                        "y": [None if value is None else float(f"{value:.5g}") for _, value in curve],
                        "line": {"color": style.colour, "width": 1.6, "dash": style.dash},
                        "marker": {"color": style.colour, "size": 4, "symbol": style.symbol},
                        "hovertemplate": f"%{{y:.4g}} at step %{{x:,}}<extra>{_label(run)}</extra>",
                    }
                )
    return figure_of(traces, axis("step", tickformat=",d"), _scale(quantity, values), showlegend=False)


def _scale(quantity: str, values: list[float]) -> dict[str, Any]:
    """Shares from 0 to 1; anything else from 0, or logarithmic where that would flatten most of it."""
    if quantity in ("overlap", "lost"):
        return axis("", range=[-0.03, 1.03])
    low, high = (min(values), max(values)) if values else (1.0, 1.0)
    flat = high > 5 if quantity.endswith("_error") else high > 20 * low
    if not flat:
        return axis("", rangemode="tozero")
    ticks = {"dtick": "D2"} if high < 1000 * low else {}  # at 1, 2 and 5, or else at powers of ten
    return axis("", type="log", tickformat="~g", **ticks)


def step_ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """For each rival the ratio of step times against the rank, from least to greatest; a line a method and setting."""
    figures = {}
    for rival in dict.fromkeys(row["rival"] for row in rows):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["rival"] == rival and row["rank"]:
                lines.setdefault(f"{row['method']}, {row['implementation']}, {step_setting(row)}", []).append(row)
        colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(sorted(lines))}
        traces = [
            {
                "mode": "lines+markers",
                "name": text_of(name),
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
                "meta": {"facets": facets_of_row(points[0])},
                "hovertemplate": f"%{{y:.3g}} at rank %{{x}}<extra>{text_of(name)}</extra>",
            }
            for name, points in sorted(
                (name, sorted(line, key=lambda row: row["rank"])) for name, line in lines.items()
            )
        ]
        ranks = sorted({row["rank"] for line in lines.values() for row in line})
        ticks = {"tickmode": "array", "tickvals": ranks, "ticktext": [str(rank) for rank in ranks]}
        if traces:
            x = axis("rank", type="log", **ticks)
            figures[rival] = figure_of(traces, x, axis(f"time ÷ {text_of(rival)}", type="log", tickformat="~g"))
    return figures
