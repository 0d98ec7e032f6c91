"""The page's frame: style, script, and the markup around what the report says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from gossamer.bench.reading import leaves

Facets = Mapping[str, Sequence[str]]
"""Of a thing that filters show or hide: the values it has by the name of the filter; none: it is always there."""

PLOTLY = "plotly.js"
GENERATED = '<meta name="generator" content="gossamer report">'

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d2127; --quiet: #646b76; --line: #e4e6ea; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --ink: #e4e6ea; --quiet: #979ea9; --line: #2d3137; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1240px; margin: 0 auto; padding: 56px 24px 96px; }
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
.ranked tbody tr:first-child .perplexity:not(.ratio) { font-weight: 650; }
td small { display: block; color: var(--quiet); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 9px; flex: none; }
.dot:not(.circle) { border-radius: 0; width: 12px; height: 12px; margin-right: 7px; }
.diamond { clip-path: polygon(50% 0, 100% 50%, 50% 100%, 0 50%); }
.square { clip-path: inset(1px); }
.triangle-up { clip-path: polygon(50% 0, 100% 100%, 0 100%); }
.triangle-down { clip-path: polygon(0 0, 100% 0, 50% 100%); }
.pentagon { clip-path: polygon(50% 0, 100% 38%, 82% 100%, 18% 100%, 0 38%); }
.legend { list-style: none; margin: 8px 0 0; padding: 0; font-size: 0.875rem; display: flex; flex-wrap: wrap;
  gap: 2px 18px; }
summary { cursor: pointer; font-size: 0.95rem; font-weight: 620; margin: 36px 0 8px; }
.plot { height: 460px; margin-top: 12px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); gap: 0 40px; }
.pictures > section { min-width: 0; }
.pictures .plot { height: 300px; margin-top: 0; }
.plot :is(.infolayer, .cartesianlayer, .xaxislayer-above, .yaxislayer-above) text { fill: var(--quiet) !important; }
.plot .textpoint text { fill: var(--ink) !important; }
.key { list-style: none; margin: 8px 0 0; padding: 0; font-size: 0.875rem;
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 6px 32px; }
.key li { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 6px; overflow-wrap: anywhere; }
.key li > span { min-width: 7.5rem; }
button { font: inherit; font-variant-numeric: tabular-nums; padding: 3px 10px; border-radius: 99px; cursor: pointer;
  border: 1px solid var(--line); background: none; color: var(--quiet); }
select { font: inherit; font-size: 0.875rem; max-width: 100%; padding: 5px 8px; border: 1px solid var(--line);
  border-radius: 6px; background: var(--page); color: var(--ink); }
button[aria-pressed="true"] { background: var(--line); color: var(--ink); }
a { color: inherit; text-decoration-color: var(--quiet); text-underline-offset: 3px; }
nav { font-size: 0.9rem; margin-bottom: 24px; }
nav a { margin-right: 16px; }
:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
[hidden] { display: none !important; }
.filters { display: grid; gap: 8px; margin: 24px 0; }
fieldset { border: 0; padding: 0; margin: 0; min-width: 0; display: flex; flex-wrap: wrap; gap: 4px 6px; }
legend { float: left; min-width: 6rem; padding: 3px 0; font-size: 0.875rem; color: var(--quiet); }
fieldset label { position: relative; font-size: 0.875rem; padding: 3px 10px; border-radius: 16px; cursor: pointer;
  border: 1px solid var(--line); color: var(--quiet); overflow-wrap: anywhere; }
fieldset input { position: absolute; inset: 0; opacity: 0; margin: 0; cursor: pointer; }
fieldset label:has(:checked) { background: var(--line); color: var(--ink); }
fieldset label:has(:focus-visible) { outline: 2px solid #0072b2; outline-offset: 2px; }
.filters details summary { margin: 0; font-weight: 400; font-size: 0.875rem; color: var(--quiet); }
.tall { max-height: 75vh; overflow: auto; }
.tall thead th { position: sticky; top: 0; background: var(--page); z-index: 1; }
.plain td { max-width: 22rem; overflow: hidden; text-overflow: ellipsis; }
.list { list-style: none; padding: 0; margin: 16px 0; }
.list li { padding: 9px 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
.list small { display: block; font-size: 0.875rem; color: var(--quiet); }
pre { font-size: 0.85rem; overflow-x: auto; padding: 12px 16px; border: 1px solid var(--line); border-radius: 6px; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
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
const all = (selector) => [...document.querySelectorAll(selector)];
const buttons = all(".key button"), chooser = document.querySelector("#parameter"), boxes = all(".filters input");
const dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";

// Of each filter with ticks, one of these must be among a thing's values; without values, the filter is not for it.
const ticked = () => {
  const on = {};
  for (const {checked, name, value} of boxes) if (checked) (on[name] ??= []).push(value);
  return (facets) => Object.entries(on).every(([name, values]) =>
    !facets?.[name] || facets[name].some((value) => values.includes(value)));
};

// Axes that hold what is shown, with some room.
const fit = (layout, traces) => {
  const {axes, share, late = 0} = layout.meta;
  const last = traces.reduce((most, {x}) => Math.max(most, ...x), 0);
  for (const name of axes) {
    const axis = layout[name], scaled = axis.type === "log" ? Math.log10 : Number;
    let low = Infinity, high = -Infinity;
    for (const {x, y, error_y} of traces) x.forEach((step, i) => {
      if (y[i] === null || step < late * last) return;
      const value = name === "xaxis" ? step : y[i], error = name === "yaxis" && error_y?.array[i] || 0;
      low = Math.min(low, scaled(value - error));
      high = Math.max(high, scaled(value + error));
    });
    const room = share * (high - low) || 0.1 * Math.abs(high) || 1;
    if (low <= high) axis.range = [low - room, high + room];
  }
};

const draw = () => {
  const passes = ticked();
  const on = new Set(buttons.flatMap((b) => b.getAttribute("aria-pressed") === "true" ? [b.dataset.group] : []));
  for (const [id, figure] of Object.entries(figures)) {
    const shown = ({group, parameter, facets} = {}) => (group === undefined || on.has(group)) &&
      (parameter === undefined || parameter === chooser.value) && passes(facets);
    const data = figure.data.map((trace) => ({...trace, visible: shown(trace.meta)}));
    const layout = {...structuredClone(figure.layout), dragmode};
    if (layout.meta) fit(layout, data.filter((trace) => trace.visible));
    Plotly.react(id, data, layout, {responsive: true, displayModeBar: false});
  }
  for (const element of all("[data-facets]")) element.hidden = !passes(JSON.parse(element.dataset.facets));
};
for (const button of buttons) {
  button.onclick = () => {
    const on = button.getAttribute("aria-pressed") === "false";
    for (const b of buttons) if (b.dataset.group === button.dataset.group) b.setAttribute("aria-pressed", on);
    draw();
  };
}
if (chooser) chooser.onchange = draw;

const saved = document.querySelector("#save");
const chosen = () => rows.cells.filter((_, i) => ticked()(rows.facets[i]));
const count = () => {
  const [some, every] = [chosen(), rows.cells].map(({length}) => length.toLocaleString("en"));
  saved.textContent = `Download ${some === every ? every : `${some} of ${every}`} rows as CSV`;
};
const csv = () => {
  const quoted = (text) => /[",\\r\\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  return [rows.columns, ...chosen()].map((cells) => cells.map(quoted).join(",") + "\\r\\n").join("");
};
if (saved) saved.onclick = () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
  link.download = `${rows.name}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
};
const update = () => { draw(); if (saved) count(); };
for (const box of boxes) box.onchange = update;
update();
"""

# The policy makes the browser itself refuse whatever would load from elsewhere.
HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{generated}
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'{script}; img-src data: blob:">
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


@dataclass
class Rows:
    """What a reader may take along as CSV."""

    name: str
    """Of the file, without its ending."""
    rows: Sequence[Mapping[str, Any]]
    facets: Sequence[Facets]
    """Of each row."""

    def as_texts(self) -> dict[str, Any]:
        """Columns in order of appearance, and a text for each column of each row; empty where a row has none."""
        flat = [{name: _plain(leaf) for name, leaf in leaves(row)} for row in self.rows]
        columns = list(dict.fromkeys(column for row in flat for column in row))
        texts = [[row.get(column, "") for column in columns] for row in flat]
        return {"name": self.name, "columns": columns, "cells": texts, "facets": self.facets}


def _plain(leaf: Any) -> str:
    return leaf if isinstance(leaf, str) else "" if leaf is None else json.dumps(leaf)


@dataclass
class Page:
    """What a page says, draws, and lets a reader take along."""

    title: str
    body: list[str]
    figures: dict[str, Any] = field(default_factory=dict)
    """By the id of the element that they are drawn in."""
    rows: Rows | None = None

    def html(self, plotly: str | None = None) -> str:
        """One document. It needs nothing but itself, or the plotting library at the address `plotly`, too."""
        return HTML.format(
            generated=GENERATED,
            title=escape(self.title),
            style=STYLE,
            body="\n".join(self.body),
            script=" 'self' file:" if plotly else "",
            scripts=self._scripts(plotly),
        )

    def _scripts(self, plotly: str | None) -> str:
        if not self.figures and not self.rows:
            return ""
        library = f'<script src="{escape(plotly)}"></script>' if plotly else f"<script>{library_text()}</script>"
        rows = self.rows.as_texts() if self.rows else None
        data = f"const figures = {_json(self.figures)}, rows = {_json(rows)};"
        return f"{library if self.figures else ''}\n<script>{data}{SCRIPT}</script>"

    def write(self, path: Path, plotly: str | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(plotly), encoding="utf-8", errors="replace")
        return path


def _json(value: Any) -> str:
    """Inside a script element only "<" can end it, and JSON allows any character to be written as its number."""
    return json.dumps(value).replace("<", "\\u003c")


def library_text() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def prose(text: str) -> str:
    """As markup: what stands in backticks is code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def shown_for(facets: Facets) -> str:
    """The attribute by which filters find an element."""
    return f' data-facets="{escape(json.dumps(facets))}"' if facets else ""


def filters(facets: Iterable[Facets]) -> list[str]:
    """A group of boxes for each facet that has a choice; nothing ticked shows all. Long groups start folded."""
    values: dict[str, dict[str, None]] = {}
    for one in facets:
        for name, found in one.items():
            values.setdefault(name, {}).update(dict.fromkeys(found))
    groups = []
    for name, found in values.items():
        if len(found) < 2:
            continue
        boxes = "".join(
            f'<label><input type="checkbox" autocomplete="off" name="{escape(name)}" value="{escape(value)}">'
            f"{escape(value)}</label>"
            for value in found
        )
        group = f"<fieldset><legend>{escape(name.capitalize())}</legend>{boxes}</fieldset>"
        folded = f"<details><summary>{escape(name.capitalize())}, {len(found)} of them</summary>{group}</details>"
        groups.append(folded if len(found) > 12 else group)
    return ['<div class="filters" role="group" aria-label="Filters">', *groups, "</div>"] if groups else []


SAVE = '<p><button id="save" type="button">Download the rows as CSV</button></p>'


def plain_table(head: Iterable[str], rows: Iterable[Iterable[str]], facets: Sequence[Facets]) -> Iterator[str]:
    """A plain table, a line for each facets."""
    yield f'<div class="scroll tall"><table class="plain"><thead><tr>{table_row("th", head)}</tr></thead><tbody>'
    yield from (f"<tr{shown_for(one)}>{table_row('td', row)}</tr>" for row, one in zip(rows, facets, strict=True))
    yield "</tbody></table></div>"


def table_row(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)
