"""A folder of results as a static site; a single table as a single page.

    results/                     site/index.html
      quick/rows.jsonl             site/tables/quick.html, site/methods/adamw.html, ...
      step.jsonl                   site/tables/step.html
                                   site/plotly.js

A table is a file of rows, `rows.jsonl` with the logs below its folder, or the logs that belong to no such file. A
site's pages share one copy of the plotting library, of megabytes, by a relative address; a single page, which is to
travel alone, holds it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from gossamer.bench import step, words
from gossamer.bench.page import GENERATED, PLOTLY, Page, library_text, plain_table, prose
from gossamer.bench.plots import Figure
from gossamer.bench.reading import STEP, Method, Published, Run, facets_of_row, leaves, load_files, read_published
from gossamer.bench.report import method_page, of_rows, rows_page, runs_page, summary
from gossamer.errors import UserError
from gossamer.layers import PARAMETRIZATIONS
from gossamer.optim.contract import methods as registered
from gossamer.train import jsonl

SITE = "site"
SAMPLES = ".samples.jsonl"
"""What `gossamer eval` keeps of every example: read by people, drawn nowhere."""


@dataclass(frozen=True)
class Source:
    """Where a table comes from."""

    name: str
    folder: Path
    rows: Path | None
    logs: tuple[Path, ...] = ()

    @property
    def of_runs(self) -> bool:
        """Whether the files' names say that runs are in them."""
        return self.rows is None or self.rows.name == "rows.jsonl"

    @property
    def claims(self) -> Path | None:
        """The file of what papers printed, where there is one."""
        path = self.folder / "claims.json"
        return path if self.rows and self.of_runs and path.is_file() else None


@dataclass
class Table:
    """What a source holds: methods, or rows of another kind."""

    source: Source
    methods: list[Method] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)
    more: dict[str, Figure] = field(default_factory=dict)
    """Figures of the rows of runs."""
    superseded: int = 0
    """Rows that a later one of the same label, or of the same case, replaces."""

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def runs(self) -> list[Run]:
        return [run for method in self.methods for run in method.runs]

    @property
    def written(self) -> list[dict[str, Any]]:
        """Every row, of runs too."""
        return self.rows or [run.row for run in self.runs]


def write_report(directory: Path, out: Path | None = None) -> Path:
    """Draw every table below ``directory``; returns the page to begin with.

    One table becomes ``report.html`` in ``directory``, a page that needs nothing but itself. Several become a site in
    ``directory/site``, from which pages of tables that are gone are removed. The same files give the same bytes.

    Args:
        out: the folder to write to in place of these.

    Raises:
        UserError: there is nothing to read, or no table could be read. Of several tables, one that cannot be read is
            named on the site's first page instead.
    """
    sources = find_sources(directory)
    if not sources:
        raise UserError(f"no log.jsonl in or below {directory}")
    if len(sources) == 1:
        table = read(sources[0])
        called = sorted({run.table for run in table.runs if run.table})
        title = f"Gossamer benchmark: {', '.join(called)}" if called else "Gossamer training report"
        return _page(table, title).write((out or directory) / "report.html")
    return _write_site(directory, sources, out or directory / SITE)


def find_sources(directory: Path) -> list[Source]:
    """Every table below the folder, by name."""
    files = [path for path in sorted(directory.rglob("*.jsonl")) if not path.name.endswith(SAMPLES)]
    homes = {path.parent for path in files if path.name == "rows.jsonl"}
    logs: dict[Path, list[Path]] = {home: [] for home in homes}
    for path in files:
        if path.name == "log.jsonl":
            home = next((parent for parent in path.parents if parent in homes or parent == directory), directory)
            logs.setdefault(home, []).append(path)

    def called(path: Path) -> str:
        return path.relative_to(directory).as_posix() if path != directory else directory.resolve().name

    sources = [
        Source(called(home), home, home / "rows.jsonl" if home in homes else None, tuple(found))
        for home, found in logs.items()
    ]
    others = (path for path in files if path.name not in ("rows.jsonl", "log.jsonl"))
    taken = {source.name for source in sources}
    for path in others:
        short = called(path.with_suffix(""))
        sources.append(Source(called(path) if short in taken else short, path.parent, path))
    return sorted(sources, key=lambda source: source.name)


def read(source: Source, table: str | None = None) -> Table:
    """The methods or rows of a source; `table` is what its runs call their table in place of what rows say.

    Raises:
        UserError: something in the source is not as it was written.
    """
    rows = [row for _, row in jsonl.read(source.rows)] if source.rows else []
    if source.of_runs or any("perplexity" in row or "score" in row for row in rows):
        published = read_published(source.claims) if source.claims else []
        methods = load_files(source.folder, source.rows, source.logs, table)
        kept = [run.row for method in methods for run in method.runs]
        superseded = sum(row not in kept for row in rows)
        return Table(source, methods, published=published, more=of_rows(methods), superseded=superseded)
    if not rows:
        raise UserError(f"{source.rows}: no rows")
    kept = step.latest(rows) if _of_steps(rows) else rows
    return Table(source, rows=kept, superseded=len(rows) - len(kept))


def _page(table: Table, title: str, link: Callable[[str], str] = escape) -> Page:
    name = re.sub(r"\W+", "-", table.name)
    if table.methods:
        return runs_page(title, table.methods, more=table.more, name=name, published=table.published, link=link)
    if _of_steps(table.rows):
        return step.page_of(table.rows, title, name)
    assert table.source.rows
    return rows_page(title, table.rows, name=name, pictures=_pictures(table.source.rows))


def _of_steps(rows: list[dict[str, Any]]) -> bool:
    numbers = ("ratio", "ratio_min", "ratio_max", "milliseconds", "rival_milliseconds")
    return all(
        {"rival", *step.CASE, *STEP} <= row.keys()
        and all(isinstance(row.get(name), int | float) for name in numbers)
        and isinstance(row.get("hardware"), dict)
        and "threads" in row["hardware"]
        for row in rows
    )


def _pictures(rows: Path) -> list[Path]:
    """Those that were made of the rows: `step_memory_cpu.svg` is of `step_memory.jsonl` rather than of `step.jsonl`."""
    stems = sorted((path.stem for path in rows.parent.glob("*.jsonl")), key=len)

    def of(picture: Path) -> str | None:
        begun = [stem for stem in stems if picture.stem == stem or picture.stem.startswith(f"{stem}_")]
        return begun[-1] if begun else None

    return [picture for picture in sorted(rows.parent.glob("*.svg")) if of(picture) == rows.stem]


# ---- the site --------------------------------------------------------------------------------------------------------


def _write_site(directory: Path, sources: list[Source], out: Path) -> Path:
    tables, broken = [], {}
    for source in sources:
        try:
            tables.append(read(source, source.name))
        except UserError as error:
            broken[source.name] = " ".join(str(error).replace(f"{directory}/", "").split())
    if not tables:
        raise UserError(next(iter(broken.values())))
    names = sorted({name for table in tables for name in _methods_of(table)})
    addresses = _addresses("tables", [table.name for table in tables]) | _addresses("methods", names)

    def to(folder: str, name: str, up: str = "../") -> str:
        return f'<a href="{up}{addresses[folder, name]}">{escape(name)}</a>'

    _remove_pages(out)
    above = '<nav><a href="../index.html">All tables and methods</a></nav>'
    drawn: dict[str, str] = {}
    for table in tables:
        page = _page(table, table.name, lambda name: to("methods", name))
        drawn[table.name] = _what(page, table.superseded)
        _write(page, out / addresses["tables", table.name], above)
    for name in names:
        _write(_method_page(name, tables, to), out / addresses["methods", name], above)
    (out / PLOTLY).write_text(library_text(), encoding="utf-8")
    parts = [*_front(tables, names, broken, to), *_files(directory, sources, drawn, broken), *_made(directory, tables)]
    return Page(f"Gossamer: {directory.resolve().name}", parts).write(out / "index.html")


def _addresses(folder: str, names: Iterable[str]) -> dict[tuple[str, str], str]:
    """A file for each name; a number tells names apart that differ in other signs than letters and digits alone."""
    found: dict[tuple[str, str], str] = {}
    for name in names:
        plain = re.sub(r"[^a-z0-9_]+", "-", name.lower()).strip("-") or "table"
        same = sum(re.fullmatch(rf"{folder}/{plain}(\.\d+)?\.html", address) is not None for address in found.values())
        found[folder, name] = f"{folder}/{plain}{f'.{same + 1}' if same else ''}.html"
    return found


def _remove_pages(out: Path) -> None:
    """Those of an earlier site: no other page is touched."""
    for page in (*out.glob("tables/*.html"), *out.glob("methods/*.html")):
        if GENERATED in page.read_text(encoding="utf-8", errors="replace"):
            page.unlink()


def _write(page: Page, path: Path, above: str) -> None:
    replace(page, body=[above, *page.body]).write(path, plotly=f"../{PLOTLY}")


def _what(page: Page, superseded: int) -> str:
    """What a page draws, in words."""
    left = [f"{words.plural(superseded, 'row')} superseded by later ones"] if superseded else []
    pictures = list(page.figures) + ["a picture beside it"] * sum("<img " in part for part in page.body)
    return ", ".join(["a table", *pictures, *left])


def _methods_of(table: Table) -> dict[str, int]:
    """How many rows each method has."""
    facets = [{"method": [run.method]} for run in table.runs] or [facets_of_row(row) for row in table.rows]
    known = registered()
    named = [name for one in facets for name in one.get("method", ()) if table.methods or name in known]
    return {name: named.count(name) for name in dict.fromkeys(named)}


def _method_page(name: str, tables: list[Table], to: Callable[..., str]) -> Page:
    found = [
        (to("tables", table.name), method, table.methods)
        for table in tables
        for method in table.methods
        if method.name == name
    ]
    about = list(_about(name, found[0][1].runs[0] if found else None))
    others = [(table, count) for table in tables if table.rows and (count := _methods_of(table).get(name))]
    if others:
        items = "".join(f"<li>{to('tables', table.name)}: {words.plural(count, 'row')}</li>" for table, count in others)
        about.append(f'<p class="note">Other measurements of it:</p><ul class="list">{items}</ul>')
    return method_page(name, about, found)


def _about(name: str, run: Run | None) -> Iterator[str]:
    """What a method is: itself if it is registered, else what its runs trained, and how."""
    config = dict(leaves(run.row.get("config"), "config") if run else ())
    parts = {key: str(config.get(f"config.{key}.name")) for key in ("method", "layers")}
    known, layers = registered(), PARAMETRIZATIONS
    if parts["layers"] in layers:
        said = (layers[parts["layers"]].__doc__ or "").strip().splitlines()[0]
        yield f'<p class="lead">Weights: <b>{escape(parts["layers"])}</b>. {prose(said)}</p>'
    trained = name if name in known else parts["method"]
    if trained in known:
        by = "" if trained == name and parts["layers"] not in layers else f"Trained by <b>{escape(trained)}</b>. "
        entry = known[trained]
        yield f'<p class="lead">{by}{prose(entry.summary)}</p><p class="note">{escape(entry.paper)}</p>'
    restarts = {key.split(".", 2)[2]: value for key, value in config.items() if key.startswith("config.restarts.")}
    if restarts:
        said = ", ".join(f"{key} {words.fact(value)}" for key, value in restarts.items())
        yield f'<p class="note">With restarts: {escape(said)}.</p>'


def _front(tables: list[Table], names: list[str], broken: dict[str, str], to: Callable[..., str]) -> Iterator[str]:
    runs = sum(run.finished for table in tables for run in table.runs)
    said = f"{words.plural(len(broken), 'more table')} could not be read, see the list of files: {', '.join(broken)}."
    lost = f" <b>{escape(said)}</b>" if broken else ""
    yield "<h1>Gossamer: results</h1>"
    yield (
        f'<p class="lead">{words.plural(len(tables), "table")}, {words.plural(runs, "finished run")}, '
        f"{words.plural(len(names), 'method')}.{lost}</p>"
    )
    for title, chosen in (
        ("Runs", [table for table in tables if table.methods]),
        ("Other measurements", [table for table in tables if table.rows]),
    ):
        if chosen:
            yield f'<h2>{title}</h2><ul class="list">'
            for table in chosen:
                said = summary(table.methods) if table.methods else _columns(table)
                yield f"<li>{to('tables', table.name, '')}<small>{said}</small></li>"
            yield "</ul>"
    yield '<h2>Methods</h2><ul class="list">'
    known = registered()
    for name in names:
        counts = [count for table in tables if (count := _methods_of(table).get(name))]
        text = f"{words.plural(sum(counts), 'row')} in {words.plural(len(counts), 'table')}."
        said = f"{known[name].summary} {text}" if name in known else text
        yield f"<li>{to('methods', name, '')}<small>{prose(said)}</small></li>"
    yield "</ul>"
    if unseen := [name for name in known if name not in names]:
        yield f'<p class="note">Methods without a row here: {escape(", ".join(unseen))}.</p>'


def _columns(table: Table) -> str:
    """How many rows, of what, and the numbers that they hold."""
    count = len(_methods_of(table))
    of = f" of {words.plural(count, 'method')}" if count else ""
    numbers = dict.fromkeys(
        name.partition(".")[0]
        for row in table.rows
        for name, leaf in leaves(row)
        if isinstance(leaf, float) and not name.startswith("hardware")
    )
    listed = f": {', '.join(list(numbers)[:8])}" if numbers else ""
    return escape(f"{words.plural(len(table.rows), 'row')}{of}{listed}.")


def _files(directory: Path, sources: list[Source], drawn: dict[str, str], broken: dict[str, str]) -> Iterator[str]:
    """Every file that was found, and what became of it."""
    lines: list[list[str]] = []
    for source in sources:
        became = drawn.get(source.name) or f"not understood: {broken[source.name]}"
        if source.rows:
            lines.append([source.rows.relative_to(directory).as_posix(), became])
        if source.logs:
            lines.append([f"{words.plural(len(source.logs), 'log')} of {source.name}", became])
        if source.claims:
            of_claims = "hollow marks and a table" if source.name in drawn else became
            lines.append([source.claims.relative_to(directory).as_posix(), of_claims])
    samples = sorted(path.relative_to(directory).as_posix() for path in directory.rglob(f"*{SAMPLES}"))
    lines += [[name, "samples of an evaluation: not drawn"] for name in samples]
    yield "<h2>Files</h2>"
    yield from plain_table(["File", "Became"], lines, [{}] * len(lines))


def _made(directory: Path, tables: list[Table]) -> Iterator[str]:
    """Under what all this was measured, and how it is made again."""
    values: dict[str, dict[str, None]] = {}
    for table in tables:
        for row in table.written:
            kept = {key: row[key] for key in ("hardware", "versions", "commit") if row.get(key) is not None}
            for name, value in leaves(kept):
                values.setdefault(name, {})[words.fact(value)] = None
    yield "<h2>Versions and hardware</h2><dl>"
    for name, found in sorted(values.items()):
        yield f"<dt>{escape(name)}</dt><dd>{escape(', '.join(sorted(found)))}</dd>"
    yield f"</dl><h2>To make it again</h2><pre>gossamer report {escape(directory.resolve().name)}</pre>"
    yield (
        '<p class="note">Each row has its configuration, commit, versions and machine: on the page of its table and '
        "in the CSV.</p>"
    )
