"""The page's frame: style, script, and the markup around what the report says."""

from __future__ import annotations

import json
from html import escape
from typing import Any

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
.results tbody tr:first-child .perplexity:not(.ratio) { font-weight: 650; }
td small { display: block; color: var(--quiet); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 9px; }
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
const buttons = [...document.querySelectorAll(".key button")], chooser = document.querySelector("#parameter");
const choose = () => {
  const on = new Set(buttons.flatMap((b) => b.getAttribute("aria-pressed") === "true" ? [b.dataset.group] : []));
  for (const [id, {data}] of Object.entries(figures)) {
    if (!data[0].meta) continue;
    const shown = ({group, parameter}) => on.has(group) && (!parameter || parameter === chooser.value);
    Plotly.restyle(id, {visible: data.map((trace) => shown(trace.meta))});
  }
};
for (const button of buttons) {
  button.onclick = () => {
    const on = button.getAttribute("aria-pressed") === "false";
    for (const b of buttons) if (b.dataset.group === button.dataset.group) b.setAttribute("aria-pressed", on);
    choose();
  };
}
if (chooser) chooser.onchange = choose;
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


def page(title: str, body: list[str], figures: dict[str, Any]) -> str:
    """One document that needs nothing but itself."""
    return PAGE.format(title=escape(title), style=STYLE, body="\n".join(body), scripts=_scripts(figures))


def _scripts(figures: dict[str, Any]) -> str:
    if not figures:
        return ""
    from plotly.offline import get_plotlyjs

    # Inside a script element only "<" can end it, and JSON allows any character to be written as its number.
    data = json.dumps(figures).replace("<", "\\u003c")
    return f"<script>{get_plotlyjs()}</script>\n<script>const figures = {data};{SCRIPT}</script>"
