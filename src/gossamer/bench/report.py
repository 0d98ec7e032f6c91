"""A benchmark's runs as one self-contained web page, and as a table for the terminal.

Both views draw on :func:`load`, which reads the logs and result rows below a directory and aggregates them by method
and learning rate. Nothing is recomputed from the page's side: what the two show cannot disagree.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from gossamer.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

BASELINE = "adamw"
MISSING = "–"
MIB = 2**20

Point = tuple[int, float | None]


# --- What was measured -----------------------------------------------------------------------------------------------


@dataclass
class _Log:
    """What one ``log.jsonl`` says once its events are replayed in order."""

    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    train: list[Point] = field(default_factory=list)
    evals: list[Point] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    last_step: int = 0
    peak_rate: float | None = None

    def resume(self, step: int) -> None:
        """Forget what came after the checkpoint: those steps are trained, and logged, again."""
        self.end = {}
        self.train = [point for point in self.train if point[0] <= step]
        self.evals = [point for point in self.evals if point[0] <= step]
        self.restarts = [restart for restart in self.restarts if restart <= step]


@dataclass(frozen=True)
class Run:
    """One training run: its outcome, its curves, and the flat facts (configuration, versions, ...) it ran under."""

    label: str
    method: str
    suite: str | None
    rate: float | None
    finished: bool
    last_step: int
    perplexity: float | None
    legacy_perplexity: float | None
    eval_tokens: float | None
    state_bytes: float | None
    hidden_state_bytes: float | None
    step_time_ratio: float | None
    seconds: float | None
    tokens_per_second: float | None
    train: tuple[Point, ...]
    evals: tuple[Point, ...]
    restarts: tuple[int, ...]
    facts: dict[str, str]

    @property
    def status(self) -> str:
        return "finished" if self.finished else f"unfinished, step {self.last_step:,}"


@dataclass(frozen=True)
class Rate:
    """A method's finished runs at one learning rate. ``perplexity`` is None where any of them diverged."""

    rate: float | None
    runs: tuple[Run, ...]

    @property
    def perplexity(self) -> float | None:
        values = self._perplexities()
        return fmean(values) if values else None

    @property
    def sd(self) -> float | None:
        """The sample standard deviation of the perplexity over seeds, where there are at least two."""
        values = self._perplexities()
        return stdev(values) if len(values) >= 2 else None

    def _perplexities(self) -> list[float]:
        values = [run.perplexity for run in self.runs if run.perplexity is not None]
        return values if len(values) == len(self.runs) else []

    def mean(self, name: str) -> float | None:
        """The mean of one of :class:`Run`'s numbers over the runs that have it."""
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return fmean(values) if values else None


@dataclass(frozen=True)
class Method:
    """One method: all its runs, and its finished ones by learning rate, the best rate first."""

    name: str
    runs: tuple[Run, ...]
    rates: tuple[Rate, ...]

    @property
    def best(self) -> Rate | None:
        return self.rates[0] if self.rates else None

    @property
    def shown(self) -> tuple[Run, ...]:
        """The runs whose curves are drawn at first: those at the best rate, or all where none has finished yet."""
        best = self.best
        return self.runs if best is None else tuple(run for run in self.runs if run.rate == best.rate)


def load(directory: Path) -> list[Method]:
    """Every run below ``directory``, by method, the lowest perplexity first.

    A run is a ``log.jsonl`` at any depth, a row of ``directory/rows.jsonl``, or the two together where the row names
    the log. Of rows with the same label the last one counts, and a log that only a superseded row names is left out.

    Raises:
        UserError: there is nothing to read, or a line that is not a whole event or row.
    """
    logs = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("log.jsonl"))}
    rows: dict[str, dict[str, Any]] = {}
    named: set[str] = set()
    rows_path = directory / "rows.jsonl"
    for number, row in _lines(rows_path) if rows_path.is_file() else ():
        if "label" not in row or "method" not in row:
            raise UserError(f"{rows_path}, line {number}: a row needs 'label' and 'method'")
        rows[row["label"]] = row
        named.add(row.get("log", ""))
    if not logs and not rows:
        raise UserError(f"no log.jsonl in or below {directory}")

    runs = [
        _run(label, _read_log(logs[row["log"]]) if row.get("log") in logs else _Log(), row)
        for label, row in rows.items()
    ]
    runs += [_run(Path(name).parent.name or "run", _read_log(path)) for name, path in logs.items() if name not in named]
    runs.sort(key=lambda run: (run.rate is None, run.rate or 0.0, run.label))
    methods = [_method(name, [run for run in runs if run.method == name]) for name in {run.method for run in runs}]
    return sorted(methods, key=lambda method: (_rank(method.best), method.name))


def _method(name: str, runs: list[Run]) -> Method:
    finished = [run for run in runs if run.finished]
    tried = dict.fromkeys(run.rate for run in finished)
    rates = [Rate(rate, tuple(run for run in finished if run.rate == rate)) for rate in tried]
    return Method(name, tuple(runs), tuple(sorted(rates, key=_rank)))


def _rank(rate: Rate | None) -> tuple[bool, float]:
    """Sorts by perplexity: a diverged rate comes after every finite one, and no finished run at all comes last."""
    if rate is None:
        return True, math.inf
    return False, math.inf if rate.perplexity is None else rate.perplexity


def _run(label: str, log: _Log, row: dict[str, Any] | None = None) -> Run:
    """A run from its log and, where the benchmark wrote one, its row; the row's numbers count where both have them."""
    start, outcome = (row or {}) | log.start, log.end | (row or {})
    memory = start.get("memory") or {}
    config = start.get("config") or {}
    rate = _number((row or {}).get("lr")) or _learning_rate(config) or log.peak_rate
    facts = {name: start.get(name) for name in ("config", "data", "parameters", "versions", "hardware", "commit")}
    return Run(
        label=str(start.get("label", label)),
        method=str(start.get("method", "unknown")),
        suite=outcome.get("suite"),
        rate=rate,
        finished=bool(outcome),
        last_step=int(outcome.get("step") or outcome.get("steps") or log.last_step),
        perplexity=_number(outcome.get("perplexity")),
        legacy_perplexity=_number(outcome.get("legacy_perplexity")),
        eval_tokens=_number(outcome.get("eval_tokens")),
        state_bytes=_number(outcome.get("state_bytes", memory.get("state"))),
        hidden_state_bytes=_number(outcome.get("hidden_state_bytes", memory.get("hidden_state"))),
        step_time_ratio=_number(outcome.get("step_time_ratio")),
        seconds=_number(outcome.get("seconds")),
        tokens_per_second=_number(outcome.get("tokens_per_second")),
        train=tuple(log.train),
        evals=tuple(log.evals),
        restarts=tuple(log.restarts),
        facts=dict(_flatten(facts)),
    )


def _read_log(path: Path) -> _Log:
    log = _Log()
    for number, event in _lines(path):
        try:
            step = int(event["step"]) if event["event"] != "start" else 0
            match event["event"]:
                case "start":
                    log = _Log(start=event)
                case "resume":
                    log.resume(step)
                case "train":
                    log.train.append((step, _number(event["loss"])))
                    log.peak_rate = max(log.peak_rate or 0.0, _number(event.get("lr")) or 0.0) or None
                case "eval":
                    log.evals.append((step, _number(event["loss"])))
                case "restart":
                    log.restarts.append(step)
                case "end":
                    log.end = event
            log.last_step = step
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}: an incomplete event ({error})") from None
    return log


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The file's objects with their line numbers. A last line that was torn, so lacks its newline, is passed over."""
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines):
                return
            raise UserError(f"{path}, line {number}: not a JSON object ({error})") from None
        yield number, value


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _learning_rate(config: dict[str, Any]) -> float | None:
    """The learning rate of a nested configuration: the outermost ``lr`` or ``learning_rate``."""
    for name in ("lr", "learning_rate"):
        if (rate := _number(config.get(name))) is not None:
            return rate
    inner = (_learning_rate(value) for value in config.values() if isinstance(value, dict))
    return next((rate for rate in inner if rate is not None), None)


def _flatten(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """``{"a": {"b": 1}}`` as ``("a.b", "1")``; None at the top gives nothing, deeper it is a value."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if prefix or inner is not None:
                yield from _flatten(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(value, int) and value >= 10_000:
        yield prefix, f"{value:,}"
    else:
        yield prefix, value if isinstance(value, str) else "none" if value is None else json.dumps(value)


# --- In words and digits ---------------------------------------------------------------------------------------------


def _perplexity(value: float, sd: float | None = None) -> str:
    digits = 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:,.{digits}f}" + ("" if sd is None else f"\u00a0±\u00a0{sd:,.{digits}f}")


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _mib(size: float) -> str:
    if 0 < size < 0.1 * MIB:
        return f"{size / MIB:.2g}"
    digits = 2 if size < 10 * MIB else 1 if size < 1000 * MIB else 0
    return f"{size / MIB:,.{digits}f}"


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _rate(value: float) -> str:
    return f"{value:g}"


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _count(value: float) -> str:
    """A large count as a reader says it: 60.1 million."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def _baseline(methods: list[Method]) -> Rate | None:
    return next((method.best for method in methods if method.name == BASELINE), None)


def _cells(method: Method, baseline: Rate | None) -> dict[str, str]:
    """The results table's texts for one method, by column. What was not measured is a dash."""
    best = method.best

    def show(form: Callable[[float], str], name: str) -> str:
        value = best.mean(name) if best else None
        return MISSING if value is None else form(value)

    def over_baseline(name: str) -> str:
        ours, theirs = (rate.mean(name) if rate else None for rate in (best, baseline))
        return _ratio(ours / theirs) if ours is not None and theirs else MISSING

    ratio = legacy = MISSING
    if best is None:
        perplexity = f"unfinished, step {max(run.last_step for run in method.runs):,}"
    elif best.perplexity is None:
        perplexity = "diverged"
    else:
        perplexity = _perplexity(best.perplexity, best.sd)
        legacy = show(_perplexity, "legacy_perplexity")
        if baseline and baseline.perplexity:
            ratio = f"{best.perplexity / baseline.perplexity:.3f}"
    return {
        "method": method.name,
        "rate": MISSING if best is None or best.rate is None else _rate(best.rate),
        "tried": f"of {_plural(len(method.rates), 'rate')}, {_plural(len(best.runs), 'seed')}" if best else "",
        "perplexity": perplexity,
        "perplexity ratio": ratio,
        "state": show(_mib, "state_bytes"),
        "state ratio": over_baseline("state_bytes"),
        "hidden": show(_mib, "hidden_state_bytes"),
        "hidden ratio": over_baseline("hidden_state_bytes"),
        "step time": show(_ratio, "step_time_ratio"),
        "seconds": show(_seconds, "seconds"),
        "speed": show("{:,.0f}".format, "tokens_per_second"),
        "legacy": legacy,
    }


def summary_table(directory: Path) -> Table:
    """The results below ``directory`` as a table for the terminal, the lowest perplexity first."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    methods = load(directory)
    table = Table(box=SIMPLE, padding=(0, 0, 0, 1))  # fits eighty columns
    table.add_column("Method")
    titles = ("Rate", "Perplexity", "÷ AdamW", "State, MiB\nhidden / total", "Step time\n÷ AdamW", "Seconds")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for method in methods:
        cells = _cells(method, _baseline(methods))
        state = f"{cells['hidden']} / {cells['state']}"
        row = (
            *(cells[name] for name in ("method", "rate", "perplexity", "perplexity ratio")),
            state,
            *(cells[name] for name in ("step time", "seconds")),
        )
        table.add_row(*map(Text, row))  # as Text, so that brackets in a name are not markup
    return table


# --- The plots -------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which colour-blind readers can tell apart, less the yellow and black that vanish on a white
# or a dark page; the baseline is grey. With more methods than colours, dashes and symbols tell the rounds apart.
GREY = "#8a8f98"
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7")
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "diamond", "square", "triangle-up")


@dataclass(frozen=True)
class _Style:
    colour: str
    dash: str = DASHES[0]
    symbol: str = SYMBOLS[0]


def _styles(methods: list[Method]) -> dict[str, _Style]:
    """By name rather than by rank, so that a method keeps its colour when the results change."""
    styles = {BASELINE: _Style(GREY)}
    for index, name in enumerate(sorted({method.name for method in methods} - {BASELINE})):
        turn, colour = divmod(index, len(COLOURS))
        styles[name] = _Style(COLOURS[colour], DASHES[turn % len(DASHES)], SYMBOLS[turn % len(SYMBOLS)])
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
    stride = math.ceil(len(smooth) / 600) or 1
    return smooth[:-1:stride] + smooth[-1:]


def _axis(title: str, **more: Any) -> dict[str, Any]:
    grid = "rgba(128,128,128,0.22)"
    look = {"gridcolor": grid, "linecolor": grid, "zeroline": False, "automargin": True}
    return {"title": {"text": title}} | look | more


def _figure(data: list[dict[str, Any]], x: dict[str, Any], y: dict[str, Any], **layout: Any) -> dict[str, Any]:
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


def _curves(methods: list[Method], styles: dict[str, _Style]) -> dict[str, Any] | None:
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


def _curve(run: Run, curve: list[Point], style: _Style, *, visible: bool) -> Iterator[dict[str, Any]]:
    """One run's training line, validation points and restart marks."""
    label = _text(run.label if run.finished else f"{run.label} ({run.status})")
    common = {
        "meta": _group(run),
        "visible": True if visible else "legendonly",
        "hovertemplate": f"%{{y:.4f}} at step %{{x:,}}<extra>{label}</extra>",
    }
    steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
    line = {"color": style.colour, "width": 1.6, "dash": style.dash}
    yield common | {"mode": "lines", "x": steps, "y": losses, "line": line}
    marker = {"color": style.colour, "size": 7, "symbol": style.symbol, "line": {"width": 1, "color": "white"}}
    x, y = [step for step, _ in run.evals], [loss for _, loss in run.evals]
    yield common | {"mode": "markers", "x": x, "y": y, "marker": marker}
    if run.restarts and curve:
        y = [losses[max(0, bisect_right(steps, restart) - 1)] for restart in run.restarts]
        marks = {"color": style.colour, "size": 16, "symbol": "line-ns-open", "line": {"width": 1.5}}
        hover = f"restart at step %{{x:,}}<extra>{label}</extra>"
        yield common | {"mode": "markers", "x": run.restarts, "y": y, "marker": marks, "hovertemplate": hover}


def _group(run: Run) -> str:
    """What ties the runs of a method at one rate to their button in the key."""
    return f"{run.method} {MISSING if run.rate is None else _rate(run.rate)}"


def _memory(methods: list[Method], styles: dict[str, _Style]) -> dict[str, Any] | None:
    points = [
        (size / MIB, method, rate)
        for method in methods
        if (rate := method.best) and rate.perplexity and (size := rate.mean("hidden_state_bytes")) is not None
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
    x = _axis("optimizer state of the hidden matrices, MiB", range=_padded(sizes, 0.18))
    return _figure(traces, x, _axis("validation perplexity", range=_padded(values, 0.18)))


def _padded(values: list[float], share: float) -> list[float]:
    """A range with room around the values for their labels."""
    low, high = min(values), max(values)
    margin = share * (high - low) or 0.1 * high or 1.0
    return [low - margin, high + margin]


def _error(sds: list[float | None], style: _Style) -> dict[str, Any]:
    return {"type": "data", "array": [sd or 0 for sd in sds], "color": style.colour, "thickness": 1.2, "width": 4,
            "visible": any(sd is not None for sd in sds)}  # fmt: skip


def _sweep(methods: list[Method], styles: dict[str, _Style]) -> dict[str, Any] | None:
    traces: list[dict[str, Any]] = []
    seen: list[float] = []
    tried: set[float] = set()
    for method in methods:
        rates = sorted((rate.rate, rate) for rate in method.rates if rate.rate)
        values = [rate.perplexity for _, rate in rates]
        if not rates:
            continue
        style = styles[method.name]
        tried.update(lr for lr, _ in rates)
        seen += [value for value in values if value is not None]
        traces.append(
            {
                "mode": "lines+markers",
                "name": _text(method.name),
                "x": [lr for lr, _ in rates],
                "y": values,
                "error_y": _error([rate.sd for _, rate in rates], style),
                "line": {"color": style.colour, "width": 1.6, "dash": style.dash},
                "marker": {"color": style.colour, "size": 8, "symbol": style.symbol},
                "hovertemplate": f"%{{y:,.3f}} at learning rate %{{x}}<extra>{_text(method.name)}</extra>",
            }
        )
    if len(tried) < 2 or not seen:
        return None
    # Ticks at the rates themselves; a rate far too high must not flatten the differences between the good ones.
    ticks = {"tickmode": "array", "tickvals": sorted(tried), "ticktext": [_rate(rate) for rate in sorted(tried)]}
    wide = "log" if max(seen) > 4 * min(seen) else "linear"
    return _figure(traces, _axis("learning rate", type="log", **ticks), _axis("validation perplexity", type=wide))


# --- The page --------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d2127; --quiet: #646b76; --line: #e4e6ea; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --ink: #e4e6ea; --quiet: #979ea9; --line: #2d3137; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 56px 24px 96px; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.02em; margin: 4px 0 20px; }
h2 { font-size: 1.25rem; font-weight: 620; letter-spacing: -0.01em; margin: 64px 0 4px; }
h3 { font-size: 0.95rem; font-weight: 620; margin: 36px 0 8px; }
p { max-width: 44rem; margin: 0 0 12px; overflow-wrap: anywhere; }
.lead { font-size: 1.1rem; }
.note, .legacy { color: var(--quiet); }
.note { font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 16px 0; }
table { border-collapse: collapse; font-size: 0.875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 8px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap; }
th { font-weight: 500; color: var(--quiet); }
thead th { vertical-align: bottom; }
.results th.group { border-bottom: 0; padding-bottom: 0; text-align: center; }
th:first-child, td:first-child { padding-left: 0; }
th:first-child, td:first-child, .plain td, .plain th { text-align: left; }
.results { width: 100%; }
.results thead tr + tr th { padding-left: 8px; text-align: right; }
.results th { white-space: normal; }
.results tbody th { position: sticky; left: 0; background: var(--page); color: var(--ink); white-space: nowrap; }
.results tbody tr:first-child .perplexity:not(.ratio) { font-weight: 650; }
td small { display: block; color: var(--quiet); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 9px; }
summary { cursor: pointer; font-size: 0.95rem; font-weight: 620; margin: 36px 0 8px; }
.plot { height: 460px; margin-top: 12px; }
.plot :is(.infolayer, .cartesianlayer, .xaxislayer-above, .yaxislayer-above) text { fill: var(--quiet) !important; }
.plot .textpoint text { fill: var(--ink) !important; }
.key { list-style: none; margin: 8px 0 0; padding: 0; font-size: 0.875rem;
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 6px 32px; }
.key li { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 6px; overflow-wrap: anywhere; }
.key li > span { min-width: 7.5rem; }
button { font: inherit; font-variant-numeric: tabular-nums; padding: 3px 10px; border-radius: 99px; cursor: pointer;
  border: 1px solid var(--line); background: none; color: var(--quiet); }
button[aria-pressed="true"] { background: var(--line); color: var(--ink); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 0 48px; }
dl { display: grid; grid-template-columns: minmax(7rem, auto) 1fr; margin: 0; font-size: 0.875rem; }
dt, dd { margin: 0; padding: 6px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
dt { color: var(--quiet); padding-right: 20px; }
@media (max-width: 600px) {
  main { padding: 32px 16px 64px; }
  h1 { font-size: 1.6rem; }
  h2 { margin-top: 48px; }
  .plot { height: 420px; }
  .key li > span { min-width: 100%; }
  button { padding: 3px 8px; }
}
"""

# A finger that drags over a plot means to scroll the page; only a mouse zooms.
SCRIPT = """
const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
for (const [id, figure] of Object.entries(figures)) {
  const layout = {...figure.layout, dragmode};
  Plotly.newPlot(id, figure.data, layout, {responsive: true, displayModeBar: false});
}
for (const button of document.querySelectorAll(".key button")) {
  button.onclick = () => {
    const on = button.getAttribute("aria-pressed") === "false";
    button.setAttribute("aria-pressed", on);
    const traces = figures.loss.data.flatMap((trace, index) => trace.meta === button.dataset.group ? [index] : []);
    Plotly.restyle("loss", {visible: on ? true : "legendonly"}, traces);
  };
}
"""

# The policy makes the browser itself refuse whatever would load from elsewhere.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
{scripts}
</body>
</html>
"""

COLUMNS = ("perplexity", "perplexity ratio", "state", "state ratio", "hidden", "hidden ratio", "step time", "seconds",
           "speed", "legacy")  # fmt: skip
HEAD = """<thead>
<tr><th rowspan="2">Method</th><th rowspan="2">Learning rate</th>
<th class="group" colspan="2">Validation perplexity</th>
<th class="group" colspan="2">Optimizer state, total</th><th class="group" colspan="2">Hidden matrices only</th>
<th rowspan="2">Step time ÷&nbsp;AdamW</th><th rowspan="2">Seconds</th><th rowspan="2">Tokens/s</th>
<th rowspan="2">Legacy perplexity</th></tr>
<tr><th>mean&nbsp;±&nbsp;sd</th><th>÷&nbsp;AdamW</th><th>MiB</th><th>÷&nbsp;AdamW</th><th>MiB</th><th>÷&nbsp;AdamW</th></tr>
</thead>"""


def write_report(directory: Path) -> Path:
    """Write ``directory/report.html``, one page that needs nothing but itself, and return its path.

    The same logs and rows give the same bytes.
    """
    methods = load(directory)
    runs = [run for method in methods for run in method.runs]
    styles = _styles(methods)
    figures = {
        "loss": _curves(methods, styles),
        "memory": _memory(methods, styles),
        "rates": _sweep(methods, styles),
    }
    drawn = {name: figure for name, figure in figures.items() if figure}
    suites = sorted({run.suite for run in runs if run.suite})
    title = f"Gossamer benchmark: {', '.join(suites)}" if suites else "Gossamer training report"
    body = [f"<h1>{escape(title)}</h1>", *_summary(methods, runs), *_results(methods, runs, styles)]
    body += [_plot(name, _key(methods, styles) if name == "loss" else "") for name in drawn]
    body += _details(runs)
    path = directory / "report.html"
    page = PAGE.format(title=escape(title), style=STYLE, body="\n".join(body), scripts=_scripts(drawn))
    path.write_text(page, encoding="utf-8")
    return path


def _scripts(figures: dict[str, dict[str, Any]]) -> str:
    if not figures:
        return ""
    from plotly.offline import get_plotlyjs

    # Inside a script element only "<" can end it, and JSON allows any character to be written as its number.
    data = json.dumps(figures).replace("<", "\\u003c")
    return f"<script>{get_plotlyjs()}</script>\n<script>const figures = {data};{SCRIPT}</script>"


def _summary(methods: list[Method], runs: list[Run]) -> Iterator[str]:
    finished = sum(run.finished for run in runs)
    model, data, parameters = (_common(runs, *names) for names in (MODEL, DATA, ("parameters",)))
    size = f"{_count(int(parameters.replace(',', '')))} parameters" if parameters else ""
    compared = _plural(len(methods), "method") if len(methods) > 1 else methods[0].name
    text = f"{_plural(finished, 'finished run')} of {compared}"
    if model:
        text += f", training the {model} model" + (f" ({size})" if size else "")
    elif size:
        text += f", training a model of {size}"
    text += f", on {data}." if data else "."
    if finished < len(runs):
        text += f" {_plural(len(runs) - finished, 'more run')} did not finish."
    yield f'<p class="lead">{escape(text)}{_verdict(methods)}</p>'


def _verdict(methods: list[Method]) -> str:
    best, baseline = methods[0].best, _baseline(methods)
    if best is None or best.perplexity is None:
        return ""
    first = methods[0].name
    name = "AdamW, the baseline" if first == BASELINE else first
    text = f" The lowest validation perplexity, <b>{_perplexity(best.perplexity, best.sd)}</b>, is that of "
    text += f"<b>{escape(name)}</b>" + (f" at learning rate {_rate(best.rate)}." if best.rate else ".")
    if baseline is None:
        text += " There is no finished run of the baseline, AdamW, to compare with."
    elif first != BASELINE and baseline.perplexity is not None:
        text += f" The baseline, AdamW, reaches {_perplexity(baseline.perplexity, baseline.sd)}"
        text += f" at {_rate(baseline.rate)}." if baseline.rate else "."
    return text


MODEL = ("config.model", "config.model.name")
DATA = ("config.data.data", "data.name")


def _common(runs: list[Run], *names: str) -> str | None:
    """The first of the named facts that every run has, with the same value."""
    for name in names:
        values = {run.facts.get(name) for run in runs if run.facts}
        if len(values) == 1 and (value := values.pop()):
            return value
    return None


def _results(methods: list[Method], runs: list[Run], styles: dict[str, _Style]) -> Iterator[str]:
    tokens = {int(run.eval_tokens) for run in runs if run.eval_tokens}
    over = f" over {tokens.pop():,} validation tokens" if len(tokens) == 1 else ""
    yield "<h2>Results</h2>"
    yield (
        f'<p class="note">Perplexity{over}, at the best learning rate tried for each method: the one with the lowest '
        "mean over seeds. All numbers are means over those runs.</p>"
    )
    yield f'<div class="scroll"><table class="results">{HEAD}<tbody>'
    baseline = _baseline(methods)
    for method in methods:
        cells = {name: escape(text) for name, text in _cells(method, baseline).items()}
        yield f"<tr><th>{_dot(styles[method.name])}{cells['method']}</th>"
        yield f"<td>{cells['rate']}<small>{cells['tried']}</small></td>"
        yield "".join(f'<td class="{name}">{cells[name]}</td>' for name in COLUMNS) + "</tr>"
    yield "</tbody></table></div>"
    if unfinished := [f"{run.label} (step {run.last_step:,})" for run in runs if not run.finished]:
        yield f'<p class="note">Did not finish: {escape("; ".join(unfinished))}.</p>'


PLOTS = {
    "loss": (
        "Loss",
        "Training loss, lightly smoothed, with the validation loss as points and restarts as upright marks. Runs at "
        "each method's best learning rate are shown; the buttons below bring in the others. Double-click to see all.",
    ),
    "memory": (
        "Memory and quality",
        "Lower and further left is better. Bars are one standard deviation over seeds.",
    ),
    "rates": (
        "Learning rates",
        "Mean perplexity over seeds at each learning rate tried. A run that diverged leaves a gap.",
    ),
}


def _plot(name: str, key: str) -> str:
    title, note = PLOTS[name]
    return f'<h2>{title}</h2>\n<p class="note">{note}</p>\n<div class="plot" id="{name}"></div>{key}'


def _key(methods: list[Method], styles: dict[str, _Style]) -> str:
    """The loss plot's legend: a line for each method, with a button for each of its rates.

    Plotly's own would list every pair of the two, which on a phone leaves no room for the plot.
    """
    lines = []
    for method in methods:
        shown = {_group(run): str(run in method.shown).lower() for run in method.runs}
        rates = {_group(run): MISSING if run.rate is None else _rate(run.rate) for run in method.runs}
        buttons = "".join(
            f'<button aria-pressed="{shown[group]}" data-group="{escape(group)}">{rate}</button>'
            for group, rate in rates.items()
        )
        lines.append(f"<li><span>{_dot(styles[method.name])}{escape(method.name)}</span>{buttons}</li>")
    return f'<ul class="key">{"".join(lines)}</ul>'


def _dot(style: _Style) -> str:
    return f'<span class="dot" style="background:{style.colour}"></span>'


SECTIONS = {"config": "Configuration", "data": "Data", "versions": "Versions", "hardware": "Hardware"}


def _details(runs: list[Run]) -> Iterator[str]:
    """What all runs share, by section, and a table of every run with the values in which the runs differ."""
    described = [run for run in runs if run.facts]
    names = list(dict.fromkeys(name for run in described for name in run.facts))
    common = {name: value for name in names if (value := _common(described, name)) is not None}
    differing = [name for name in names if name not in common]
    head = ["Run", "Status", "Perplexity", *(name.removeprefix("config.") for name in differing)]
    rows = [
        [
            run.label,
            run.status,
            MISSING if run.perplexity is None else _perplexity(run.perplexity),
            *(run.facts.get(name, MISSING) for name in differing),
        ]
        for run in runs
    ]
    yield '<h2>Details</h2>\n<div class="facts">'
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in common.items():
        section, _, rest = name.partition(".")
        groups.setdefault(SECTIONS.get(section, "Other"), []).append((rest or section, value))
    for title, pairs in groups.items():
        items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
        yield f"<section><h3>{title}</h3><dl>{items}</dl></section>"
    yield '</div>\n<details><summary>Every run</summary><div class="scroll"><table class="plain"><thead>'
    yield f"<tr>{_row('th', head)}</tr></thead><tbody>"
    yield from (f"<tr>{_row('td', row)}</tr>" for row in rows)
    yield "</tbody></table></div></details>"


def _row(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)
