"""A benchmark's runs as one self-contained web page.

The page and the terminal's table draw on the same `reading.load` and `table.cells`: what the two show cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

from gossamer.bench import plots, words
from gossamer.bench.page import page
from gossamer.bench.plots import Style
from gossamer.bench.reading import BASELINE, Method, Run, baseline, load
from gossamer.bench.table import cells
from gossamer.bench.words import MISSING

COLUMNS = ("perplexity", "perplexity ratio", "weights", "state", "memory ratio", "hidden", "hidden ratio", "step time",
           "seconds", "speed", "legacy")  # fmt: skip
HEAD = """<thead>
<tr><th rowspan="2">Method</th><th rowspan="2">Learning rate</th>
<th class="group" colspan="2">Validation perplexity</th>
<th class="group" colspan="3">Weights and state, MiB</th><th class="group" colspan="2">State of hidden layers</th>
<th rowspan="2">Step time ÷&nbsp;AdamW</th><th rowspan="2">Seconds</th><th rowspan="2">Tokens/s</th>
<th rowspan="2">Legacy perplexity</th></tr>
<tr><th>mean&nbsp;±&nbsp;sd</th><th>÷&nbsp;AdamW</th><th>weights</th><th>state</th><th>both&nbsp;÷&nbsp;AdamW</th>
<th>MiB</th><th>÷&nbsp;AdamW</th></tr>
</thead>"""


def write_report(directory: Path) -> Path:
    """Write ``directory/report.html``, one page that needs nothing but itself, and return its path.

    The same logs and rows give the same bytes.
    """
    methods = load(directory)
    runs = [run for method in methods for run in method.runs]
    styles = plots.styles_of(methods)
    figures = {"loss": plots.loss}
    if all(run.score is None for run in runs):  # the others are of perplexities
        figures |= {"memory": plots.memory, "rates": plots.rates}
    drawn = {name: figure for name, draw in figures.items() if (figure := draw(methods, styles))}
    diagnosed = plots.diagnostics(methods, styles)
    tables = sorted({run.table for run in runs if run.table})
    title = f"Gossamer benchmark: {', '.join(tables)}" if tables else "Gossamer training report"
    body = [f"<h1>{escape(title)}</h1>", *_summary(methods, runs), *_results(methods, runs, styles)]
    body += [_plot(name, _key(methods, styles) if name == "loss" else "") for name in drawn]
    body += _diagnostics(methods, styles, list(diagnosed))
    body += _details(runs)
    path = directory / "report.html"
    path.write_text(page(title, body, drawn | diagnosed), encoding="utf-8", errors="replace")
    return path


def _summary(methods: list[Method], runs: list[Run]) -> Iterator[str]:
    finished = sum(run.finished for run in runs)
    model, data, parameters = (_common(runs, name) for name in ("config.model", "config.data.data", "parameters"))
    size = f"{words.count(int(parameters.replace(',', '')))} parameters" if parameters else ""
    compared = words.plural(len(methods), "method") if len(methods) > 1 else methods[0].name
    text = f"{words.plural(finished, 'finished run')} of {compared}"
    if model:
        text += f", training the {model} model" + (f" ({size})" if size else "")
    elif size:
        text += f", training a model of {size}"
    text += f", on {data}." if data else "."
    if finished < len(runs):
        text += f" {words.plural(len(runs) - finished, 'more run')} did not finish."
    yield f'<p class="lead">{escape(text)}{_verdict(methods)}</p>'


def _verdict(methods: list[Method]) -> str:
    best, reference = methods[0].best, baseline(methods)
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


def _results(methods: list[Method], runs: list[Run], styles: dict[str, Style]) -> Iterator[str]:
    tokens = {int(run.eval_tokens) for run in runs if run.eval_tokens}
    over = f" over {tokens.pop():,} validation tokens" if len(tokens) == 1 else ""
    yield "<h2>Results</h2>"
    yield (
        f'<p class="note">Perplexity{over}, at the best learning rate tried for each method: the one with the lowest '
        "mean over seeds. All numbers are means over those runs.</p>"
    )
    yield f'<div class="scroll"><table class="results">{HEAD}<tbody>'
    reference = baseline(methods)
    for method in methods:
        texts = {name: escape(text) for name, text in cells(method, reference).items()}
        yield f"<tr><th>{_dot(styles[method.name])}{texts['method']}</th>"
        yield f"<td>{texts['rate']}<small>{texts['tried']}</small></td>"
        yield "".join(f'<td class="{name}">{texts[name]}</td>' for name in COLUMNS) + "</tr>"
    yield "</tbody></table></div>"
    if unfinished := [f"{run.label} (step {run.last_step:,})" for run in runs if not run.finished]:
        yield f'<p class="note">Did not finish: {escape("; ".join(unfinished))}.</p>'


PLOTS = {
    "loss": (
        "Loss",
        "Training loss, lightly smoothed, with the validation loss as points and restarts as upright marks that say "
        "what was touched. Runs at each method's best learning rate are shown; the buttons below bring in the others. "
        "Double-click to see all.",
    ),
    "memory": (
        "Memory and quality",
        "Lower and further left is better. Bars are one standard deviation over seeds.",
    ),
    "rates": (
        "Learning rates",
        "Mean perplexity over seeds at each learning rate tried, bars of one standard deviation, and each seed as a "
        "faint point. A rate at which a seed diverged leaves a gap in the line and has a cross at the top.",
    ),
}


def _plot(name: str, key: str) -> str:
    title, note = PLOTS[name]
    return f'<h2>{title}</h2>\n<p class="note">{note}</p>\n<div class="plot" id="{name}"></div>{key}'


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
        lines.append(f"<li><span>{_dot(styles[method.name])}{escape(method.name)}</span>{buttons}</li>")
    return f'<ul class="key">{"".join(lines)}</ul>'


def _dot(style: Style) -> str:
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
            MISSING if run.perplexity is None else words.perplexity(run.perplexity),
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
