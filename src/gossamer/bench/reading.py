"""What was measured: runs from logs and rows, aggregated by setting, method and learning rate.

Runs of another model, task, length or text are in another setting: only runs of one setting are compared with each
other. Runs of a method that differ in more than learning rate and seed are variants of it, each judged on its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from gossamer.bench import words
from gossamer.bench.claim import Table, settled_first
from gossamer.bench.words import MISSING
from gossamer.errors import UserError
from gossamer.restarts import in_words
from gossamer.train import jsonl
from gossamer.train.config import MAY_CHANGE_ON_RESUME, PLACE

BASELINE = "adamw"
FACETS = ("table", "size", "task", "method", "hardware")
"""What a reader may filter by."""

Point = tuple[int, float | None]
"""A step and a value; None where it was not finite."""

Restart = tuple[int, str]
"""The step after which it happened, and what it did."""


@dataclass
class _Log:
    """What one ``log.jsonl`` says once its events are replayed in order."""

    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    train: list[Point] = field(default_factory=list)
    evals: list[Point] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    looks: list[tuple[int, str, str, float | None]] = field(default_factory=list)
    last_step: int = 0

    def resume(self, step: int) -> None:
        """Forget what came after the checkpoint: those steps are trained, and logged, again."""
        self.end = {}
        self.train = [point for point in self.train if point[0] <= step]
        self.evals = [point for point in self.evals if point[0] <= step]
        self.restarts = [restart for restart in self.restarts if restart[0] <= step]
        self.looks = [look for look in self.looks if look[0] <= step]


@dataclass(frozen=True)
class Run:
    """One training run: its outcome, its curves, and the flat facts (configuration, versions, ...) it ran under."""

    label: str
    method: str
    table: str | None
    size: str | None
    """The model's."""
    task: str | None
    steps: int | None
    """Planned."""
    hardware: str | None
    setting: str
    """What of size, task, steps and data differs within the table; empty where nothing does."""
    variant: str
    """What else of the configuration, beside rate and seed, differs among the method's runs of the setting."""
    rate: float | None
    finished: bool
    last_step: int
    perplexity: float | None
    legacy_perplexity: float | None
    score: float | None
    """Of a classifier, in place of a perplexity: 1 is perfect."""
    eval_tokens: float | None
    weights_bytes: float | None
    state_bytes: float | None
    hidden_state_bytes: float | None
    step_time_ratio: float | None
    seconds: float | None
    tokens_per_second: float | None
    train: tuple[Point, ...]
    evals: tuple[Point, ...]
    restarts: tuple[Restart, ...]
    diagnostics: dict[str, dict[str, list[Point]]]
    """By quantity and parameter; holds only what was measured."""
    measured: dict[str, float]
    """The numbers of the row's `reference`, `step_time`, `step_share` and `memory`, by dotted name."""
    facts: dict[str, str]
    row: dict[str, Any]
    """As it was written; of a run that has a log alone, its first and last event."""

    @property
    def quality(self) -> float | None:
        """What methods are ranked by: a score in per cent, or a perplexity."""
        return self.perplexity if self.score is None else 100 * self.score

    @property
    def memory_bytes(self) -> float | None:
        """Weights and optimizer state together: low-rank weights save both, low-rank momentum the state alone."""
        if self.weights_bytes is None or self.state_bytes is None:
            return None
        return self.weights_bytes + self.state_bytes

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
        values = self._whole("perplexity")
        return fmean(values) if values else None

    @property
    def score(self) -> float | None:
        values = self._whole("score")
        return fmean(values) if values else None

    @property
    def quality(self) -> float | None:
        return self.perplexity if self.score is None else 100 * self.score

    @property
    def sd(self) -> float | None:
        """The sample standard deviation of the quality over seeds, where there are at least two."""
        values = self._whole("quality")
        return stdev(values) if len(values) >= 2 else None

    def _whole(self, name: str) -> list[float]:
        """One of :class:`Run`'s numbers of each run; nothing where any run lacks it."""
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return values if len(values) == len(self.runs) else []

    def mean(self, name: str) -> float | None:
        """The mean of one of :class:`Run`'s numbers, or of its measured ones, over the runs that have it."""
        values = [value for run in self.runs if (value := getattr(run, name, run.measured.get(name))) is not None]
        return fmean(values) if values else None


@dataclass(frozen=True)
class Method:
    """One method: all its runs, and its finished ones by learning rate, the best rate first.

    The best is looked for among those with the most seeds: a rate tried once may just have been lucky.
    """

    name: str
    runs: tuple[Run, ...]
    rates: tuple[Rate, ...]
    setting: str = ""
    variant: str = ""

    @property
    def about(self) -> str:
        """Which of its variants this is, and which of the table's settings; empty where there is one of each."""
        return ", ".join(filter(None, [self.variant, self.setting]))

    @property
    def title(self) -> str:
        """Its name, and what tells it from others of that name."""
        return f"{self.name}, {self.about}" if self.about else self.name

    @property
    def best(self) -> Rate | None:
        return self.rates[0] if self.rates else None

    @property
    def shown(self) -> tuple[Run, ...]:
        """The runs whose curves are drawn at first: those at the best rate, or all where none has finished yet."""
        best = self.best
        return self.runs if best is None else tuple(run for run in self.runs if run.rate == best.rate)


@dataclass(frozen=True)
class Published:
    """One result that a paper printed: its perplexity, computed as `legacy_perplexity` is, and its memory."""

    method: str
    size: str
    perplexity: float
    gigabytes: float | None
    """Of 1e9 bytes: weights and optimizer state."""
    source: str
    caveats: str


def load(directory: Path) -> list[Method]:
    """Every run below ``directory``, by method, the highest score or the lowest perplexity first.

    A run is a ``log.jsonl`` at any depth, a row of ``directory/rows.jsonl``, or the two together where the row names
    the log. Of rows with the same label and configuration the last one counts, and a log that only a superseded row
    names is left out.

    Raises:
        UserError: there is nothing to read, or a line that is not a whole event or row.
    """
    rows = directory / "rows.jsonl"
    return load_files(directory, rows if rows.is_file() else None, sorted(directory.rglob("log.jsonl")))


def load_files(
    folder: Path, rows_path: Path | None, log_paths: Iterable[Path], table: str | None = None
) -> list[Method]:
    """As :func:`load`, of one file of rows and of these logs; a row names its log from ``folder``.

    Args:
        table: what the runs' table is called, whatever rows say.
    """
    logs = {path.relative_to(folder).as_posix(): path for path in log_paths}
    rows: list[tuple[str, dict[str, Any]]] = []
    named: set[str] = set()
    for number, row in jsonl.read(rows_path) if rows_path else ():
        label = row.get("label", _label(row))
        if not isinstance(label, str) or not isinstance(_name(row), str) or not label:
            raise UserError(f"{rows_path}, line {number}: a run's row needs 'method', or 'label' too, as text")
        if not isinstance(row.get("log") or "", str):
            raise UserError(f"{rows_path}, line {number}: 'log' is not the name of a file")
        rows = [kept for kept in rows if not (kept[0] == label and _alike(kept[1], row))]
        rows.append((label, row))
        named.add(row.get("log") or "")
    if not logs and not rows:
        raise UserError(f"no log.jsonl in or below {folder}")

    runs = [_run(label, _read_log(logs[row["log"]]) if row.get("log") in logs else None, row) for label, row in rows]
    runs += [_run(Path(name).parent.name or "run", _read_log(path)) for name, path in logs.items() if name not in named]
    return grouped([replace(run, table=table or run.table) for run in _in_settings(runs)])


def write_published(table: Table, path: Path) -> None:
    """What a table's paper printed, for `read_published`; nothing where it has no perplexities."""
    claims = [
        Published(
            method=method,
            size=size,
            perplexity=claim.value,
            gigabytes=held.value if (held := table.gigabytes.get((method, size))) else None,
            source=claim.source,
            caveats=claim.caveats,
        )
        for (method, size), claim in table.perplexities.items()
    ]
    if claims:
        path.write_text(json.dumps([vars(claim) for claim in claims], indent=1) + "\n")


def read_published(path: Path) -> list[Published]:
    """A file ``claims.json``: a list of objects with the fields of :class:`Published`.

    Raises:
        UserError: it is not such a list.
    """
    try:
        return [Published(**claim) for claim in json.loads(path.read_bytes())]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a list of published results ({error})") from None


def grouped(runs: list[Run]) -> list[Method]:
    """By setting, smaller models first; within it by method and variant, the best first."""
    runs = sorted(runs, key=lambda run: (run.rate is None, run.rate or 0.0, run.label))
    heaviest: dict[str, tuple[str, float, int]] = {}
    for run in runs:
        order = (run.task or "", run.weights_bytes or 0.0, run.steps or 0)
        heaviest[run.setting] = max(order, heaviest.get(run.setting, order))
    lines: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        lines.setdefault((run.setting, run.method, run.variant), []).append(run)
    methods = [_method(*line, own) for line, own in lines.items()]
    return sorted(methods, key=lambda it: (heaviest[it.setting], it.setting, _rank(it.best), it.title))


def facets_of(runs: Iterable[Run]) -> dict[str, list[str]]:
    """The values of each of `FACETS` among the runs."""
    runs = list(runs)
    values = {name: sorted({value for run in runs if (value := getattr(run, name))}) for name in FACETS}
    return {name: found for name, found in values.items() if found}


def facets_of_row(row: dict[str, Any]) -> dict[str, list[str]]:
    """What of a measurement's columns says which model, method and machine it is of."""
    hardware = row.get("hardware")
    method = row.get("method", row.get("optimizer", row.get("kernel")))
    found = {
        "size": row.get("model"),
        "method": method.get("name") if isinstance(method, dict) else method,
        "hardware": machine(hardware) if isinstance(hardware, dict) else row.get("target"),
    }
    return {name: [value] for name, value in found.items() if isinstance(value, str)}


STEP = ("model", "layers_timed", "dtype", "device")
"""What says, with the machine and what is compiled on it, which steps a row of step times is of."""


def step_setting(row: dict[str, Any]) -> str:
    """Of a row of step times; those of another setting are not to be compared with it."""
    model, layers, dtype, device = (row[key] for key in STEP)
    where = machine(row["hardware"] | ({} if device == "cuda" else {"accelerator": None}))
    depth = words.plural(layers, "layer") if isinstance(layers, int) else f"{layers} layers"
    parts = [model, depth, dtype, where, "compiled sweep" if row.get("compiled_sweep") else None]
    return ", ".join(filter(None, parts))


def _in_settings(runs: list[Run]) -> list[Run]:
    """Each with its setting and its variant."""
    varying = [name for name in ("size", "task", "steps") if len({getattr(run, name) for run in runs}) > 1]
    placed = []
    for run, data in _told_apart(runs, lambda run: run.task, lambda option: option.startswith("data.")):
        values = {"size": run.size, "task": run.task, "steps": run.steps and words.plural(run.steps, "step")}
        parts = [*(str(values[name] or MISSING) for name in varying), *filter(None, [data])]
        placed.append(replace(run, setting=", ".join(parts)))
    told = _told_apart(placed, lambda run: (run.setting, run.method), _is_of_recipe)
    return [replace(run, variant=variant) for run, variant in told]


def _told_apart(
    runs: Iterable[Run], group: Callable[[Run], object], counts: Callable[[str], bool]
) -> Iterator[tuple[Run, str]]:
    """Each run of a group, and the options in which it differs from others there.

    Only options that all configurations have are compared: what a version did not know had its default.
    """
    groups: dict[object, list[tuple[Run, dict[str, str]]]] = {}
    for run in runs:
        options = {name: words.fact(value) for name, value in leaves(_config(run.row)) if counts(name)}
        groups.setdefault(group(run), []).append((run, options))
    for own in groups.values():
        known = [options for _, options in own if options]
        shared = [name for name in known[0] if all(name in options for options in known)] if known else []
        names = [name for name in shared if len({options[name] for options in known}) > 1]
        for run, options in own:
            yield run, ", ".join(f"{name.rpartition('.')[2]} {options[name]}" for name in names if options)


def _is_of_recipe(option: str) -> bool:
    return option.partition(".")[0] not in MAY_CHANGE_ON_RESUME | {"model", "data", "steps", "lr", "seed"}


def _alike(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two rows' configurations agree, in what both say of it."""
    before, after = (dict(leaves(_config(row))) for row in (old, new))
    return all(before[key] == after[key] for key in before.keys() & after.keys() if key not in PLACE)


def _config(row: dict[str, Any]) -> dict[str, Any]:
    return row.get("config") or {}


def _method(setting: str, name: str, variant: str, runs: list[Run]) -> Method:
    finished = [run for run in runs if run.finished]
    tried = dict.fromkeys(run.rate for run in finished)
    rates = [Rate(rate, tuple(run for run in finished if run.rate == rate)) for rate in tried]
    rates.sort(key=lambda rate: settled_first(list(map(_badness, rate.runs))))
    return Method(name, tuple(runs), tuple(rates), setting, variant)


def baseline(methods: list[Method], setting: str = "") -> Rate | None:
    """The best rate of the method that all others of the setting are compared with."""
    found = (method.best for method in methods if (method.name, method.setting) == (BASELINE, setting))
    return next(found, None)


def _badness(run: Run) -> float:
    """A log perplexity, or a score turned round; infinite where the run diverged."""
    if run.score is not None:
        return -run.score
    return math.inf if run.perplexity is None else math.log(run.perplexity)


def _rank(rate: Rate | None) -> tuple[bool, float]:
    """A diverged rate comes after every finite one, and no finished run at all comes last."""
    return (True, math.inf) if rate is None else (False, fmean(map(_badness, rate.runs)))


def _run(label: str, log: _Log | None, row: dict[str, Any] | None = None) -> Run:
    """A run from its log and, where the benchmark wrote one, its row; the row's numbers count where both have them.

    Raises:
        UserError: what either of them says is not of the kind that a run writes.
    """
    try:
        return _as_written(label, log or _curves(row or {}), row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"run {label!r}: its log or row is not as it was written ({error})") from None


def _as_written(label: str, log: _Log, row: dict[str, Any] | None) -> Run:
    start, outcome = (row or {}) | log.start, log.end | (row or {})
    memory = start.get("memory") or {}
    rate = _number((start.get("config") or {}).get("lr"))
    shared = ("config", "data", "parameters", "tokens", "versions", "hardware", "commit")
    facts = {name: start.get(name) for name in shared}
    costs = {name: (row or {}).get(name) for name in ("step_time", "step_share", "reference", "memory")}
    if log.restarts:
        step, done = log.restarts[-1]
        facts["restarted"] = f"{words.plural(len(log.restarts), 'time')}; after step {step:,}: {done}"
    config = start.get("config") or {}
    model, task = start.get("size") or config.get("model"), start.get("task")
    table = outcome.get("table", outcome.get("suite"))  # what older rows call it
    return Run(
        label=str(start.get("label", label)),
        method=_name(row or {}) or _trained(start),
        table=table and str(table),
        size=model and Path(str(model)).name,
        task=task and str(task),
        steps=int(config.get("steps") or outcome.get("steps") or 0) or None,
        hardware=machine(start.get("hardware") or {}),
        setting="",
        variant="",
        rate=_number((row or {}).get("lr")) or rate,
        finished=bool(outcome),
        last_step=int(outcome.get("step") or outcome.get("steps") or log.last_step),
        perplexity=_perplexity(outcome.get("perplexity")),
        legacy_perplexity=_number(outcome.get("legacy_perplexity")),
        score=_number(outcome.get("score")),
        eval_tokens=_number(outcome.get("eval_tokens")),
        weights_bytes=_number(outcome.get("weights_bytes", memory.get("weights"))),
        state_bytes=_number(outcome.get("state_bytes", memory.get("state"))),
        hidden_state_bytes=_number(outcome.get("hidden_state_bytes", memory.get("hidden_state"))),
        step_time_ratio=_number(outcome.get("step_time_ratio")),
        seconds=_number(outcome.get("seconds")),
        tokens_per_second=_number(outcome.get("tokens_per_second")),
        train=tuple(log.train),
        evals=tuple(log.evals),
        restarts=tuple(log.restarts),
        diagnostics=_by_quantity(log.looks),
        measured={name: value for name, leaf in leaves(costs) if (value := _number(leaf)) is not None},
        facts=as_facts(facts),
        row=row if row is not None else {key: value for key, value in (log.start | log.end).items() if key != "event"},
    )


def _name(row: dict[str, Any]) -> str:
    """The method, or what an experiment varies in its place."""
    bits = row.get("state_bits")
    varied = [row.get("layers"), row.get("arm"), bits and f"{bits} bits"]
    return row["method"] if "method" in row else ", ".join(str(part) for part in varied if part)


def _label(row: dict[str, Any]) -> str:
    """What tells a row from the others of its file."""
    numbers = [f"{key} {row[key]}" for key in ("lr", "seed", "steps") if row.get(key) is not None]
    return " ".join(map(str, filter(None, [_name(row), row.get("size"), row.get("task"), *numbers])))


def machine(hardware: dict[str, Any]) -> str | None:
    """What counts for the speed."""
    if accelerator := hardware.get("accelerator"):
        return str(accelerator)
    threads = hardware.get("threads")
    parts = [str(hardware.get("cpu") or ""), words.plural(threads, "thread") if isinstance(threads, int) else ""]
    return ", ".join(filter(None, parts)) or None


def _curves(row: dict[str, Any]) -> _Log:
    """Those that a row carries."""
    curve = row.get("curve") or {}
    return _Log(
        train=[(int(step), _number(loss)) for step, loss in curve.get("train", ())],
        evals=[(int(step), _number(loss)) for step, loss in curve.get("eval", ())],
        restarts=[(int(step), str(done)) for step, done in curve.get("restarts", ())],
    )


def _trained(start: dict[str, Any]) -> str:
    """The method, and what sets the run apart from one of dense weights: the two are not runs of one method."""
    config = start.get("config") or {}
    layers, restarts = config.get("layers"), config.get("restarts")
    parts = [start.get("method", "unknown"), layers and layers.get("name"), restarts and "restarts"]
    return " + ".join(part for part in parts if part)


def _read_log(path: Path) -> _Log:
    log = _Log()
    for number, event in jsonl.read(path):
        try:
            step = int(event["step"]) if event["event"] != "start" else 0
            match event["event"]:
                case "start":
                    log = _Log(start=event)
                case "resume":
                    log.resume(step)
                case "train":
                    log.train.append((step, _number(event["loss"])))
                case "eval":
                    log.evals.append((step, _number(event["loss"])))
                case "restart":
                    log.restarts.append((step, in_words(event)))
                case "diagnostics":
                    for record in event["parameters"]:
                        values = {key: _number(value) for key, value in record.items() if key != "name"}
                        log.looks += [(step, key, str(record["name"]), value) for key, value in values.items()]
                case "end":
                    log.end = event
            log.last_step = step
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}: an incomplete event ({error})") from None
    return log


def _by_quantity(looks: list[tuple[int, str, str, float | None]]) -> dict[str, dict[str, list[Point]]]:
    curves: dict[str, dict[str, list[Point]]] = {}
    for step, quantity, parameter, value in looks:
        curves.setdefault(quantity, {}).setdefault(parameter, []).append((step, value))
    return curves


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _perplexity(value: object) -> float | None:
    number = _number(value)
    if number is not None and number < 1:
        raise ValueError(f"a perplexity of {number:g}")
    return number


def leaves(value: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``{"a": {"b": 1}}`` as ``("a.b", 1)``; an empty object inside is a leaf."""
    if isinstance(value, dict) and (value or not prefix):
        for name, inner in value.items():
            yield from leaves(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value


def as_facts(values: dict[str, Any]) -> dict[str, str]:
    """The leaves as texts. What is None at the top is left out, deeper it is a value."""
    return {name: words.fact(leaf) for name, leaf in leaves({key: it for key, it in values.items() if it is not None})}
