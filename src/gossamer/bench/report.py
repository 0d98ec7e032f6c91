"""A table of runs, or of other measurements, as a web page.

The page and the terminal's table draw on the same `reading.load` and `table.cells`: what the two show cannot disagree.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from gossamer.bench import plots, scaling, sweep, words
from gossamer.bench.again import command
from gossamer.bench.page import SAVE, Page, Rows, filters, plain_table, prose, shown_for, table_row
from gossamer.bench.plots import Figure, Style
from gossamer.bench.reading import (
    BASELINE,
    Method,
    Published,
    Rate,
    Run,
    as_facts,
    baseline,
    facets_of,
    facets_of_row,
    leaves,
)
from gossamer.bench.table import cells
from gossamer.bench.words import MISSING
from gossamer.errors import UserError

BEST = (
    "Of each method the best learning rate tried: of those with the most seeds the one with the lowest mean "
    "perplexity, or the highest mean score. All numbers are means over those runs."
)

Link = Callable[[str], str]
"""A method's name as markup."""


class Drawn(NamedTuple):
    """A picture of a table's rows."""

    id: str
    title: str
    note: str
    draw: Callable[[Sequence[Mapping[str, Any]]], Figure | None]
    """None where there is nothing to draw."""


OF_ROWS = (
    Drawn(
        "sweep",
        "Sweeps",
        "Each trial of `gossamer sweep` is a point, the best of each sweep is ringed.",
        sweep.figure,
    ),
    Drawn(
        "scaling",
        "Loss and compute",
        "The best run of each size; a line is a power law, its band the uncertainty of its mean (docs/scaling.md).",
        scaling.figure,
    ),
    Drawn(
        "transfer",
        "Learning rates over sizes",
        "The best rate of each size, bars to the neighbours that were tried; hollow: at the edge of what was tried.",
        scaling.transfer,
    ),
)
"""Drawn after those of :mod:`gossamer.bench.plots`, of rows with a whole configuration of pre-training."""
WHOLE: dict[str, Any] = {
    "model": str,
    "steps": int,
    "batch_size": int,
    "lr": float,
    "data.data": str,
    "data.seq_len": int,
}
"""What such a configuration has at least."""

COLUMNS = ("perplexity", "perplexity ratio", "weights", "state", "memory ratio", "hidden", "hidden ratio", "step time",
           "seconds", "speed", "legacy")  # fmt: skip
HEAD = """<thead>
<tr><th rowspan="2">{first}</th><th rowspan="2">Learning rate</th>
<th class="group" colspan="2">Validation {quality}</th>
<th class="group" colspan="3">Weights and state, MiB</th><th class="group" colspan="2">State of hidden layers</th>
<th rowspan="2">Step time ÷&nbsp;AdamW</th><th rowspan="2">Seconds</th><th rowspan="2">Tokens/s</th>
<th rowspan="2">Legacy perplexity</th></tr>
<tr><th>mean&nbsp;±&nbsp;sd</th><th>÷&nbsp;AdamW</th><th>weights</th><th>state</th><th>both&nbsp;÷&nbsp;AdamW</th>
<th>MiB</th><th>÷&nbsp;AdamW</th></tr>
</thead>"""


def of_rows(methods: list[Method]) -> dict[str, Figure]:
    """What `OF_ROWS` draws.

    Raises:
        UserError: a row is not as a run writes it.
    """
    rows = []
    for run in (run for method in methods for run in method.runs):
        known = dict(leaves(run.row.get("config")))
        if "perplexity" in run.row and all(isinstance(known.get(name), kind) for name, kind in WHOLE.items()):
            rows.append(run.row | {"label": run.label, "method": run.method})
    figures = {}
    for it in OF_ROWS:
        try:
            figures[it.id] = it.draw(rows)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{it.title}: a row is not as it was written ({type(error).__name__}: {error})") from None
    return {name: figure for name, figure in figures.items() if figure}


def runs_page(
    title: str,
    methods: list[Method],
    *,
    more: Mapping[str, Figure] = MappingProxyType({}),
    name: str = "rows",
    published: Sequence[Published] = (),
    pictures: Sequence[Path] = (),
    link: Link = escape,
) -> Page:
    """Results, curves and everything else that is known of runs.

    Args:
        more: what `of_rows` drew.
        name: of the CSV.
        published: what papers report of the same sizes.
        pictures: SVG files to show as they are.
        link: the markup of a method's name.
    """
    runs = [run for method in methods for run in method.runs]
    styles = plots.styles_of(methods)
    rows = [run.row for run in runs]
    figures = {
        "loss": plots.loss(methods, styles),
        "memory": plots.memory(methods, styles, published),
        "rates": plots.rates(methods, styles),
        **more,
    }
    drawn = _with_own_legends(figures)
    diagnosed = plots.diagnostics(methods, styles)
    facets = [facets_of([run]) for run in runs]
    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{summary(methods)}</p>', *filters(facets), SAVE]
    body += [*_results(methods, runs, styles, link), *_costs(methods, styles, link), *_published(published)]
    body += [_plot(name, methods, styles) for name in drawn]
    body += [*_diagnostics(methods, styles, list(diagnosed)), *_pictures(pictures), *_details(runs)]
    return Page(title, body, drawn | diagnosed, Rows(name, rows, facets))


def method_page(name: str, about: Iterable[str], found: list[tuple[str, Method, list[Method]]]) -> Page:
    """A method's results, curves and learning rates over tables.

    Args:
        about: markup: what the method is.
        found: of each table the markup of its name, the method in it, and all methods in it; runs know their table.
    """
    of_tables = [replace(method, name=method.runs[0].table or MISSING) for _, method, _ in found]
    runs = [run for method in of_tables for run in method.runs]
    styles = plots.styles_of(of_tables)
    figures = {"loss": plots.loss(of_tables, styles), "rates": plots.rates(of_tables, styles)}
    drawn = _with_own_legends(figures)
    diagnosed = plots.diagnostics(of_tables, styles)
    facets = [facets_of([run]) for run in runs]
    body = [f"<h1>{escape(name)}</h1>", *about]
    if found:
        body += [*filters(facets), SAVE, "<h2>Results</h2>", f'<p class="note">{BEST}</p>']
        heads = [
            f"{_dot(styles[shown.name])}{head}{_small(shown.about)}"
            for (head, _, _), shown in zip(found, of_tables, strict=True)
        ]
        lines = [(head, method, among) for head, (_, method, among) in zip(heads, found, strict=True)]
        body += [*results_table(lines, "Table"), *_costs(of_tables, styles, escape)]
    body += [_plot(key, of_tables, styles) for key in drawn]
    body += [*_diagnostics(of_tables, styles, list(diagnosed)), *(_details(runs) if found else ())]
    return Page(name, body, drawn | diagnosed, Rows(re.sub(r"\W+", "-", name), [run.row for run in runs], facets))


def rows_page(title: str, rows: list[dict[str, Any]], *, name: str = "rows", pictures: Sequence[Path] = ()) -> Page:
    """Measurements that are not runs: their rows as they are, and what they share."""
    facets = [facets_of_row(row) for row in rows]
    facts = [as_facts(row) for row in rows]
    lead = f"{words.plural(len(rows), 'row')} of measurements. A long value is cut here and whole in the CSV."
    body = [f"<h1>{escape(title)}</h1>", f'<p class="lead">{lead}</p>', *filters(facets), SAVE, *_pictures(pictures)]
    found = Counter(name for row in facts for name in row)
    names = sorted(found, key=lambda name: -found[name])  # what all rows have first, else in order of appearance
    common = {name: facts[0][name] for name in names if len({row.get(name) for row in facts}) == 1}
    differing = [name for name in names if name not in common]
    body += ["<h2>Rows</h2>"]
    body += plain_table(differing, ([row.get(name, "") for name in differing] for row in facts), facets)
    return Page(title, [*body, "<h2>What they share</h2>", *_facts(common)], {}, Rows(name, rows, facets))


def summary(methods: list[Method]) -> str:
    """What was trained and what came of it, as markup."""
    runs = [run for method in methods for run in method.runs]
    finished = sum(run.finished for run in runs)
    model, data, parameters = (_common(runs, name) for name in ("config.model", "config.data.data", "parameters"))
    size = f"{words.count(int(parameters.replace(',', '')))} parameters" if parameters else ""
    names = list(dict.fromkeys(method.name for method in methods))
    compared = words.plural(len(names), "method") if len(names) > 1 else names[0]
    text = f"{words.plural(finished, 'finished run')} of {compared}"
    if model:
        text += f", training the {Path(model).name} model" + (f" ({size})" if size else "")
    elif size:
        text += f", training a model of {size}"
    text += f", on {data}." if data else "."
    if finished < len(runs):
        text += f" {words.plural(len(runs) - finished, 'more run')} did not finish."
    settings = list(dict.fromkeys(method.setting for method in methods))
    if len(settings) > 1:
        return escape(f"{text} Compared apart: {'; '.join(settings)}.")
    return escape(text) + _verdict(methods)


def _verdict(methods: list[Method]) -> str:
    best, reference = methods[0].best, baseline(methods, methods[0].setting)
    if best is None or best.perplexity is None:
        return ""
    first = methods[0].name
    name = "AdamW, the baseline" if first == BASELINE else first
    text = f" The lowest validation perplexity, <b>{words.perplexity(best.perplexity, best.sd)}</b>, is that of "
    text += f"<b>{escape(name)}</b>" + (f" at learning rate {words.rate(best.rate)}." if best.rate else ".")
    if reference is None:
        text += " There is no finished run of the baseline, AdamW, to compare with."
    elif first != BASELINE and reference.perplexity is not None:
        text += f" The baseline, AdamW, reaches {words.perplexity(reference.perplexity, reference.sd)}"
        text += f" at {words.rate(reference.rate)}." if reference.rate else "."
    return text


def _common(runs: list[Run], name: str) -> str | None:
    """The fact of this name, where every run has it with the same value."""
    values = {run.facts.get(name) for run in runs if run.facts}
    return values.pop() if len(values) == 1 else None


def _results(methods: list[Method], runs: list[Run], styles: dict[str, Style], link: Link) -> Iterator[str]:
    tokens = {int(run.eval_tokens) for run in runs if run.eval_tokens}
    over = f" over {tokens.pop():,} validation tokens" if len(tokens) == 1 else ""
    yield "<h2>Results</h2>"
    yield (f'<p class="note">{f"Perplexity{over}. " if over else ""}{BEST}</p>')
    for setting in dict.fromkeys(method.setting for method in methods):
        compared = [method for method in methods if method.setting == setting]
        facets = facets_of(run for method in compared for run in method.runs)
        yield f"<section{shown_for(facets)}>" + (f"<h3>{escape(setting)}</h3>" if setting else "")
        heads = [f"{_named(method, styles, link)}{_small(method.variant)}" for method in compared]
        yield from results_table((head, method, methods) for head, method in zip(heads, compared, strict=True))
        yield "</section>"
    if unfinished := [f"{run.label} (step {run.last_step:,})" for run in runs if not run.finished]:
        yield f'<p class="note">Did not finish: {escape("; ".join(unfinished))}.</p>'


def results_table(lines: Iterable[tuple[str, Method, list[Method]]], first: str = "Method") -> Iterator[str]:
    """A line for each: the markup of its head, the method, and those among which its baseline is."""
    lines = list(lines)
    quality = "score" if any(run.score is not None for _, method, _ in lines for run in method.runs) else "perplexity"
    ranked = "ranked " if first == "Method" else ""  # the first line is the best
    yield f'<div class="scroll"><table class="{ranked}results">{HEAD.format(first=first, quality=quality)}<tbody>'
    for head, method, among in lines:
        texts = {name: escape(text) for name, text in cells(method, baseline(among, method.setting)).items()}
        yield f"<tr{shown_for(facets_of(method.runs))}><th>{head}</th>"
        yield f"<td>{texts['rate']}<small>{texts['tried']}</small></td>"
        yield "".join(f'<td class="{name}">{texts[name]}</td>' for name in COLUMNS) + "</tr>"
    yield "</tbody></table></div>"


def _named(method: Method, styles: dict[str, Style], link: Link) -> str:
    return f"{_dot(styles[method.name])}{link(method.name)}"


def _small(text: str) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


PREDICTED = ("weights", "gradients", "state", "activations", "step")
PEAKS = ("forward", "backward", "step")


def _costs(methods: list[Method], styles: dict[str, Style], link: Link) -> Iterator[str]:
    """Time and memory that were measured in the run itself, where it did so."""
    measured = [method for method in methods if method.best and any(run.measured for run in method.best.runs)]
    if not measured:
        return
    yield "<h2>Time and memory, measured in the run</h2>"
    yield (
        '<p class="note">An optimizer step, in milliseconds and as a part of a training step; training steps a second '
        "over those of torch.optim.AdamW on the dense model, timed in turn; memory as predicted and, at the peak of "
        "each phase, as measured, in MiB.</p>"
    )
    head = ["Method", "Step, ms", "Part of a step", "Speed ÷ AdamW"]
    head += [*(f"predicted {part}" for part in PREDICTED), *(f"peak {phase}" for phase in PEAKS)]
    yield f'<div class="scroll"><table class="results"><thead><tr>{table_row("th", head)}</tr></thead><tbody>'
    for method in measured:
        assert method.best
        best = method.best
        time, share = best.mean("step_time"), best.mean("step_share")
        whole, reference = _training_step(best), _training_step(best, "reference.")
        texts = [MISSING if time is None else f"{1e3 * time:,.2f}", MISSING if share is None else f"{share:.3f}"]
        texts += [words.ratio(reference / whole) if whole and reference else MISSING]
        names = [*(f"memory.predicted.{part}" for part in PREDICTED), *(f"memory.peak.{phase}" for phase in PEAKS)]
        texts += [MISSING if (size := best.mean(name)) is None else words.mib(size) for name in names]
        head = f"{_named(method, styles, link)}{escape(method.title.removeprefix(method.name))}"
        yield f"<tr{shown_for(facets_of(method.runs))}><th>{head}</th>{table_row('td', texts)}</tr>"
    yield "</tbody></table></div>"


def _training_step(rate: Rate, of: str = "") -> float | None:
    """Seconds."""
    time, share = rate.mean(f"{of}step_time"), rate.mean(f"{of}step_share")
    return time / share if time and share else None


def _published(published: Sequence[Published]) -> Iterator[str]:
    if published:
        yield "<h2>Published</h2>"
        yield (
            '<p class="note">What papers print, perplexities counted as our legacy ones are. Hollow marks in the plot '
            "of memory; a GB is 1e9 bytes of weights and optimizer state.</p>"
        )
        lines = (
            [it.method, it.size, words.perplexity(it.perplexity), _gigabytes(it), it.source, it.caveats]
            for it in published
        )
        facets = [{"method": [it.method], "size": [it.size]} for it in published]
        yield from plain_table(["Method", "Size", "Perplexity", "GB", "Source", "Caveats"], lines, facets)


def _gigabytes(published: Published) -> str:
    return MISSING if published.gigabytes is None else f"{published.gigabytes:g}"


PLOTS = {
    "loss": (
        "Loss",
        "Training loss, lightly smoothed, with the validation loss as points and restarts as upright marks that say "
        "what was touched. Runs at each method's best learning rate are shown; the buttons below bring in the others. "
        "Double-click to see all.",
    ),
    "memory": (
        "Memory and quality",
        "Further left is less memory. The dotted line joins what no other method beats in both; bars are one standard "
        "deviation over seeds; hollow marks are papers', beside whose numbers ours are legacy perplexities.",
    ),
    "rates": (
        "Learning rates",
        "The mean over seeds at each learning rate tried, bars of one standard deviation, and each seed as a "
        "faint point. A rate at which a seed diverged leaves a gap in the line and has a cross at the top.",
    ),
}


def _plot(name: str, methods: list[Method], styles: dict[str, Style]) -> str:
    title, note = (PLOTS | {it.id: (it.title, it.note) for it in OF_ROWS})[name]
    key = KEYS[name](methods, styles) if name in KEYS else ""
    return f'<h2>{title}</h2>\n<p class="note">{prose(note)}</p>\n<div class="plot" id="{name}"></div>{key}'


QUANTITIES = {
    "m_error": ("First moment, relative error", "against the exact average of the gradients"),
    "v_error": ("Second moment, relative error", "against the exact average of their squares"),
    "update_rms": ("Update, root mean square", "in units of the learning rate, before decay and rounding"),
    "update_max": ("Update, largest magnitude", "in units of the learning rate, before decay and rounding"),
    "overlap": ("Subspace kept since the last look", "1: the same subspace, 0: an orthogonal one"),
    "lost": ("Writes lost to rounding", "share of the entries that should have changed and did not"),
}


def _diagnostics(methods: list[Method], styles: dict[str, Style], quantities: list[str]) -> Iterator[str]:
    if not quantities:
        return
    diagnosed = [method for method in methods if any(run.diagnostics for run in method.runs)]
    options = "".join(f"<option>{escape(name)}</option>" for name in plots.parameters(methods))
    yield '<h2>Diagnostics</h2>\n<p class="note">A curve for each run; a value that was not finite leaves a gap.</p>'
    yield f'<select id="parameter" aria-label="Parameter" autocomplete="off">{options}</select>'
    yield f'{_key(diagnosed, styles)}\n<div class="pictures">'
    for name in quantities:
        title, note = QUANTITIES[name]
        yield f'<section><h3>{title}</h3><p class="note">{note}</p><div class="plot" id="{name}"></div></section>'
    yield "</div>"


def _key(methods: list[Method], styles: dict[str, Style]) -> str:
    """A legend: a line for each method, with a button for each of its rates.

    Plotly's own would list every pair of the two, which on a phone leaves no room for the plot.
    """
    lines = []
    for method in methods:
        shown = {plots.group_of(run): str(run in method.shown).lower() for run in method.runs}
        rates = {plots.group_of(run): MISSING if run.rate is None else words.rate(run.rate) for run in method.runs}
        buttons = "".join(
            f'<button aria-pressed="{shown[group]}" data-group="{escape(group)}">{rate}</button>'
            for group, rate in rates.items()
        )
        name = f"<span>{_dot(styles[method.name])}{escape(method.title)}</span>"
        lines.append(f"<li{shown_for(facets_of(method.runs))}>{name}{buttons}</li>")
    return f'<ul class="key">{"".join(lines)}</ul>'


def _with_own_legends(figures: Mapping[str, Figure | None]) -> dict[str, Figure]:
    """What there is to draw; the page says below a figure what its colours are."""
    own = {"showlegend": False}
    return {
        name: figure | {"layout": figure["layout"] | own} if name in KEYS else figure
        for name, figure in figures.items()
        if figure
    }


def _legend(methods: list[Method], styles: dict[str, Style]) -> str:
    """Colours and symbols alone: Plotly's own legend would leave a phone no room for a plot of many methods."""
    items = "".join(
        f"<li{shown_for(facets_of(method.runs))}>{_dot(styles[method.name])}{escape(method.title)}</li>"
        for method in methods
    )
    return f'<ul class="legend">{items}</ul>'


def _dot(style: Style) -> str:
    return f'<span class="dot {style.symbol}" style="background:{style.colour}"></span>'


KEYS = {"loss": _key, "memory": _legend, "rates": _legend}
"""What stands below a figure."""
SECTIONS = {"config": "Configuration", "data": "Data", "versions": "Versions", "hardware": "Hardware"}


def _pictures(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        data = b64encode(path.read_bytes()).decode()
        yield f"<h2>{escape(path.stem)}</h2>"
        yield f'<p class="picture"><img alt="{escape(path.stem)}" src="data:image/svg+xml;base64,{data}"></p>'


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
            MISSING if run.perplexity is None else words.perplexity(run.perplexity),
            *(run.facts.get(name, MISSING) for name in differing),
        ]
        for run in runs
    ]
    yield "<h2>Details</h2>"
    yield from _facts(common)
    yield "<details><summary>Every run</summary>"
    yield from plain_table(head, rows, [facets_of([run]) for run in runs])
    yield "</details>"
    if commands := [f"{said}  # {run.label}" for run in runs if (said := command(run.row.get("config") or {}))]:
        yield '<details><summary>Every run again</summary><p class="note">Options are what differs from the defaults '
        yield "of this version; the row names the commit that made it.</p>"
        yield f"<pre>{escape(chr(10).join(commands))}</pre></details>"


def _facts(common: dict[str, str]) -> Iterator[str]:
    yield '<div class="facts">'
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in common.items():
        section, _, rest = name.partition(".")
        groups.setdefault(SECTIONS.get(section, "Other"), []).append((rest or section, value))
    for title, pairs in groups.items():
        items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs)
        yield f"<section><h3>{title}</h3><dl>{items}</dl></section>"
    yield "</div>"
