"""What was measured: runs from logs and rows, aggregated by method and learning rate."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from gossamer.bench import words
from gossamer.errors import UserError
from gossamer.restarts import in_words
from gossamer.train import jsonl

BASELINE = "adamw"

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
    facts: dict[str, str]

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
    def sd(self) -> float | None:
        """The sample standard deviation of the score or the perplexity over seeds, where there are at least two."""
        values = self._whole("score") or self._whole("perplexity")
        return stdev(values) if len(values) >= 2 else None

    def _whole(self, name: str) -> list[float]:
        """One of :class:`Run`'s numbers of each run; nothing where any run lacks it."""
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
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
    """Every run below ``directory``, by method, the highest score or the lowest perplexity first.

    A run is a ``log.jsonl`` at any depth, a row of ``directory/rows.jsonl``, or the two together where the row names
    the log. Of rows with the same label the last one counts, and a log that only a superseded row names is left out.

    Raises:
        UserError: there is nothing to read, or a line that is not a whole event or row.
    """
    logs = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("log.jsonl"))}
    rows: dict[str, dict[str, Any]] = {}
    named: set[str] = set()
    rows_path = directory / "rows.jsonl"
    for number, row in jsonl.read(rows_path) if rows_path.is_file() else ():
        if not all(isinstance(row.get(key), str) for key in ("label", "method")):
            raise UserError(f"{rows_path}, line {number}: a row needs 'label' and 'method', both text")
        if not isinstance(row.get("log", ""), str):
            raise UserError(f"{rows_path}, line {number}: 'log' is not the name of a file")
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


def baseline(methods: list[Method]) -> Rate | None:
    """The best rate of the method that all others are compared with."""
    return next((method.best for method in methods if method.name == BASELINE), None)


def _rank(rate: Rate | None) -> tuple[bool, float]:
    """By score or perplexity: a diverged rate comes after every finite one, and no finished run at all comes last."""
    if rate is None:
        return True, math.inf
    if rate.score is not None:
        return False, -rate.score
    return False, math.inf if rate.perplexity is None else rate.perplexity


def _run(label: str, log: _Log, row: dict[str, Any] | None = None) -> Run:
    """A run from its log and, where the benchmark wrote one, its row; the row's numbers count where both have them.

    Raises:
        UserError: what either of them says is not of the kind that a run writes.
    """
    try:
        return _as_written(label, log, row)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"run {label!r}: its log or row is not as it was written ({error})") from None


def _as_written(label: str, log: _Log, row: dict[str, Any] | None) -> Run:
    start, outcome = (row or {}) | log.start, log.end | (row or {})
    memory = start.get("memory") or {}
    rate = _number((start.get("config") or {}).get("lr"))
    facts = {name: start.get(name) for name in ("config", "data", "parameters", "versions", "hardware", "commit")}
    if log.restarts:
        step, done = log.restarts[-1]
        facts["restarted"] = f"{words.plural(len(log.restarts), 'time')}; after step {step:,}: {done}"
    return Run(
        label=str(start.get("label", label)),
        method=str((row or {}).get("method") or _trained(start)),
        table=outcome.get("table"),
        rate=_number((row or {}).get("lr")) or rate,
        finished=bool(outcome),
        last_step=int(outcome.get("step") or outcome.get("steps") or log.last_step),
        perplexity=_number(outcome.get("perplexity")),
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
        facts=dict(_flatten(facts)),
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
