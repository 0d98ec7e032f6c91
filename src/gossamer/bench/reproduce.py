"""`gossamer reproduce`: a table of a paper, trained as far as it is missing, and ours beside the paper's."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.text import Text

from gossamer.bench import words
from gossamer.bench.claim import Finished, Run, Table
from gossamer.bench.outlook import plan_table
from gossamer.bench.reading import write_published
from gossamer.bench.runner import Rows, work
from gossamer.bench.verdict import show
from gossamer.distributed import of_main
from gossamer.errors import UserError, first_line, nearest
from gossamer.train.config import same_run

ROUNDS = 5
"""Of timed steps a run."""


@dataclass(frozen=True)
class Reproduce:
    """Train what a table of a paper lacks, and print ours beside the paper's.

    Finished runs are kept in `rows.jsonl`: the same command again trains only what is missing. Several processes may
    work on one table at the same time, each started by the same command; under `torchrun` they train each run together.
    """

    table: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="path::name")] = "papers"
    """A table: a Python file and its name there, as `papers/galore.py::table2`. With --list also a file or a folder."""
    sizes: tuple[str, ...] = ()
    """Of the table's model sizes; none named: all."""
    methods: tuple[str, ...] = ()
    """Of the table's methods; none named: all."""
    seeds: int | None = None
    """Runs of a cell, with seeds 0, 1, ...; None: the table's own number."""
    data: str | None = None
    """Training text in place of the table's: as `gossamer pretrain --data`, several files or globs with commas."""
    tokenizer: str | None = None
    """In place of the table's: as `gossamer pretrain --tokenizer`."""
    micro_batch_size: int | None = None
    """Rows of one forward pass in one process; None: the table's."""
    device: str = "auto"
    """auto, cpu or cuda."""
    out: Path | None = None
    """Folder of `rows.jsonl`; None: results/<file>_<name>."""
    runs: Path | None = None
    """Folder of logs and checkpoints; None: runs/<file>_<name>. Checkpoints of finished runs are deleted."""
    train: bool = True
    """Train what is missing; off: print what is there."""
    dry_run: bool = False
    """Print tokens, steps, memory and an estimated time of a run of each cell, and train nothing."""
    list: bool = False
    """Name every table of the file or folder with its sizes and methods, and do nothing else."""

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise UserError(f"seeds: {self.seeds} is too small; allowed: an integer >= 1")


def reproduce(options: Reproduce, console: Console) -> None:
    """Do what the options ask for; results go to the console.

    Raises:
        UserError: no such file, table, size or method; no text.
    """
    if options.list:
        _list(options.table, console)
        return
    path, name = _parts(options.table)
    chosen = _Chosen(path, name, options)
    if options.dry_run:
        console.print(plan_table(chosen.table, chosen.first_runs(), chosen.seeds))
        return
    if options.train:
        of_main(options.device, lambda _: chosen.check_rates())
        work(chosen.wanted, chosen.rows, device=options.device, rounds=ROUNDS, keep=False)
        of_main(options.device, lambda _: write_published(chosen.table, chosen.rows.path.with_name("claims.json")))
    of_main(options.device, lambda _: show(chosen.table, chosen.sizes, chosen.methods, chosen.finished, console))


class _Chosen:
    """The part of a table that the options choose, and where its rows are."""

    def __init__(self, path: Path, name: str, options: Reproduce) -> None:
        self.options, self.table = options, load_table(path, name)
        self.sizes = _chosen("sizes", options.sizes, self.table.sizes)
        self.methods = _chosen("methods", options.methods, self.table.methods)
        self.seeds = options.seeds or self.table.seeds
        out = options.out or Path("results") / f"{path.stem}_{name}"
        self.rows = Rows(out / "rows.jsonl", options.runs or Path("runs") / f"{path.stem}_{name}")
        self.before: Finished = {}
        if (follows := self.table.follows) is not None:
            self.followed = load_table(path, follows.table)
            before = Rows(out.parent / f"{path.stem}_{follows.table}" / "rows.jsonl", self.rows.runs).read()
            self.before = self._made_so(self.followed, before)

    @property
    def finished(self) -> Finished:
        """What is there of the table as it is now."""
        return self._made_so(self.table, self.rows.read())

    def wanted(self, rows: Sequence[dict[str, Any]]) -> list[Run]:
        own = self._made_so(self.table, rows)
        runs = self.table.wanted(self.sizes, self.methods, self.seeds, own, self.before)
        return [self._trained(run) for run in runs]

    def check_rates(self) -> None:
        """That the table which this one follows has tried every rate: before, its best ones may be others.

        Raises:
            UserError: it lacks runs.
        """
        if (follows := self.table.follows) is None:
            return
        methods = tuple(dict.fromkeys(map(follows.method_of, self.methods)))
        runs = self.followed.wanted((follows.size,), methods, 1, self.before, {})
        if missing := [run.label for run in runs if run.label not in self.before]:
            raise UserError(
                f"table: its rates are the best ones of {follows.table}, which lacks "
                f"{words.plural(len(missing), 'run')} on this text, such as {missing[0]!r}"
            )

    def _made_so(self, table: Table, rows: Sequence[dict[str, Any]]) -> Finished:
        """Those of a table's rows that its runs would make today: no other text's, no other recipe's.

        Where neither the table nor the options name a text, it is that of the newest row, as is the tokenizer then.
        """
        newest: dict[str, Any] = rows[-1]["config"]["data"] if rows else {}
        kept: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["size"] in table.sizes and row["method"] in table.methods:
                config = self._on_text(table.run(row["size"], row["method"], row["seed"]).at(row["lr"])).config
                if not config.data.data:
                    text = {"data": newest["data"], "tokenizer": self.options.tokenizer or newest["tokenizer"]}
                    config = replace(config, data=replace(config.data, **text))
                if same_run(row["config"], config):
                    kept[row["label"]] = row
        return kept

    def first_runs(self) -> list[Run]:
        """One of each cell."""
        return [self._here(self.table.run(size, method, 0)) for size in self.sizes for method in self.methods]

    def _trained(self, run: Run) -> Run:
        """The run on a text, on this device.

        Raises:
            UserError: there is no text.
        """
        run = self._on_text(run)
        if not run.config.data.data:
            raise UserError(f"data: table {run.table!r} has no text of its own; name files by --data")
        return self._here(run)

    def _on_text(self, run: Run) -> Run:
        """The run on the text that the options name, if they do."""
        data: Any = {key: value for key in ("data", "tokenizer") if (value := getattr(self.options, key)) is not None}
        return replace(run, config=replace(run.config, data=replace(run.config.data, **data)))

    def _here(self, run: Run) -> Run:
        micro = self.options.micro_batch_size or run.config.micro_batch_size
        return replace(run, config=replace(run.config, micro_batch_size=micro, device=self.options.device))


def _list(text: str, console: Console) -> None:
    path = Path(text.partition("::")[0])
    files = sorted(path.glob("*.py")) if path.is_dir() else [path]
    found = {f"{file}::{name}": table for file in files for name, table in tables_in(file).items()}
    if not found:
        raise UserError(f"table: no table in {path}")
    for name, table in found.items():
        lines = f"{name}  {table.title}", f"  sizes    {' '.join(table.sizes)}", f"  methods  {' '.join(table.methods)}"
        for line in lines:
            console.print(Text(line), soft_wrap=True)


def _chosen(what: str, names: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(name for word in names for name in word.split(","))
    for name in names:
        if name not in known:
            raise UserError(f"{what}: unknown {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return names or known


def _parts(text: str) -> tuple[Path, str]:
    path, _, name = text.partition("::")
    if not name:
        raise UserError(f"table: {text!r} names no table; allowed: path::name, as papers/galore.py::table2")
    return Path(path), name


def load_table(path: Path, name: str) -> Table:
    """A table by the file that it is written in and its name there."""
    known = tables_in(path)
    if name not in known:
        raise UserError(f"table: {path} has no {name!r}{nearest(name, known)}; known: {', '.join(known) or 'none'}")
    return known[name]


def tables_in(path: Path) -> dict[str, Table]:
    """Every table of a Python file, by name. The file is run; it may import its package, or files beside it.

    Raises:
        UserError: there is no such file, or it does not run.
    """
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"table: no such Python file: {path}")
    path = path.resolve()
    root = path.parent.parent if (path.parent / "__init__.py").exists() else path.parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    name = f"table {path}"  # nobody's module but this file's
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"table: {path} does not run: {type(error).__name__}: {first_line(error)}") from error
    finally:
        del sys.modules[name]
    return {key: value for key, value in vars(module).items() if isinstance(value, Table)}
