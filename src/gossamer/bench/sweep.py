"""`gossamer sweep`: the learning rate of a method, and its other knobs, looked for within a budget of tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from gossamer.bench import words
from gossamer.bench.plots import Figure, Style, axis, figure_of, styles_of, text_of
from gossamer.bench.reading import Method
from gossamer.bench.recipes import write_preset
from gossamer.bench.runner import work
from gossamer.bench.space import Knob, place
from gossamer.bench.study import Search, Study, Trial
from gossamer.distributed import of_main
from gossamer.errors import UserError

ROUNDS = 5
"""Of timed steps a trial."""
NEAR = 5
"""Trials nearest to the best one, by learning rate, that a parabola is laid through."""
PART_OF_LOSS = 0.01
"""Nats: 1 % of perplexity, by which a learning rate may be worse and still count as good."""


@dataclass(frozen=True)
class Found:
    """The best of a study's finished trials, and what speaks for it."""

    best: Trial
    tried: tuple[tuple[float, float], ...]
    """Learning rates and losses of the trials that share the best one's other choices, in order; infinite: diverged.
    Numbers that are drawn between bounds differ among them."""
    edge: str | None
    """`smallest` or `largest`, where the best rate is that of all tried."""
    vertex: float | None
    """The learning rate at which the parabola through the nearest trials, in log lr, is lowest; None: it has no low."""
    factor: float | None
    """Within this factor of it, the parabola is within 1 % of its lowest perplexity."""


def found_in(trials: Iterable[Trial], knobs: Sequence[Knob]) -> Found | None:
    """The best trial and its evidence; None where none has finished."""
    ended = [trial for trial in trials if trial.state in ("finished", "diverged")]
    finished = [trial for trial in ended if math.isfinite(trial.loss)]
    if not finished:
        return None
    best = min(finished, key=lambda trial: (trial.loss, trial.number))
    chosen = [knob.name for knob in knobs if knob.bounds is None and knob.name != "lr"]
    alike = [trial for trial in ended if all(trial.values[name] == best.values[name] for name in chosen)]
    tried = tuple(sorted((trial.values["lr"], trial.loss) for trial in alike))
    lr, rates = best.values["lr"], [rate for rate, _ in tried]
    edge = "largest" if lr == rates[-1] else "smallest" if lr == rates[0] else None
    near = sorted((abs(math.log(rate / lr)), rate, loss) for rate, loss in tried if math.isfinite(loss))[:NEAR]
    vertex = factor = None
    alone = all(knob.bounds is None for knob in knobs if knob.name != "lr")  # else other numbers move the losses, too
    if alone and len({rate for _, rate, _ in near}) >= 3:
        x, y = np.array([math.log(rate / lr) for _, rate, _ in near]), np.array([loss for *_, loss in near])
        curvature, slope, _ = np.polyfit(x, y, 2)
        if curvature > 0:
            with suppress(OverflowError):  # it is flat
                vertex, factor = (
                    lr * math.exp(-slope / (2 * curvature)),
                    math.exp(math.sqrt(PART_OF_LOSS / curvature)),
                )
    return Found(best, tried, edge, vertex, factor)


def search(options: Search) -> Study:
    """Train the trials that a study lacks, as far as its budget goes; with `write`, write the preset.

    Raises:
        UserError: bad options; nothing to write, because no trial finished or the best learning rate is at the edge.
    """
    study = Study(options)
    work(study.wanted, study.rows, device=options.device, rounds=ROUNDS, keep=False, watch=study.watch)
    if options.write:
        of_main(options.device, lambda _: _write(study))
    return study


def _write(study: Study) -> None:
    found = found_in(study.trials(), study.knobs)
    if found is None:
        raise UserError("write: no trial finished; nothing is written")
    if found.edge is not None:
        raise UserError(
            f"write: the best learning rate, {found.best.values['lr']:g}, is the {found.edge} of those tried; nothing "
            "is written; widen --space in another --out"
        )
    trials = study.trials()
    (row,) = (row for row in study.rows.read() if row["label"].endswith(f" trial {found.best.number}"))
    evidence = {
        "study": str(study.options.folder),
        "space": list(study.options.space),
        "trials": len(trials),
        "tokens": study.spent(),
        "seed": study.options.seed,
        "perplexities": [[lr, _rounded(math.exp(loss))] for lr, loss in found.tried],
        "parabola": found.vertex and {"lr": _rounded(found.vertex), "one_percent_factor": _rounded(found.factor)},
        "versions": {"torch": row["versions"]["torch"]},
        "commit": row["commit"],
        "date": row["time"][:10],
    }
    write_preset(study.options.suite, place(study.recipe, found.best.values), evidence)


def _rounded(value: float | None) -> float | None:
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None


def trials_table(study: Study) -> tuple[Table, list[str]]:
    """The trials, the best first, and what they say."""
    trials, names = study.trials(), [knob.name for knob in study.knobs]
    table = Table(title=f"{study.options.name}: {study.spent():,} of {study.options.tokens:,.0f} tokens")
    for column in ("trial", *names, "perplexity", "tokens"):
        table.add_column(column, justify="right", no_wrap=True)
    for trial in sorted(trials, key=lambda trial: (trial.loss, trial.number)):
        outcome = words.perplexity(trial.perplexity) if trial.state == "finished" else trial.state
        table.add_row(str(trial.number), *(_said(trial.values[name]) for name in names), outcome, f"{trial.tokens:,}")
    lines = []
    found = found_in(trials, study.knobs)
    if found is None:
        return table, ["no trial finished"]
    best = found.best
    values = ", ".join(f"{name} {_said(best.values[name])}" for name in names)
    lines.append(f"best: trial {best.number}, {values}: perplexity {words.perplexity(best.perplexity)}")
    if found.edge is not None:
        lines.append(f"its learning rate is the {found.edge} tried: the best one may lie beyond; widen --space")
    else:
        place = [rate for rate, _ in found.tried].index(best.values["lr"])
        beside = [found.tried[i] for i in (place - 1, place + 1)]
        lines.append("beside it: " + ", ".join(f"lr {rate:g}: {_perplexity(loss)}" for rate, loss in beside))
    if found.vertex is not None and found.factor is not None:
        lines.append(
            f"a parabola through those nearest to it is lowest at lr {found.vertex:.2g}, and within 1 % of perplexity "
            f"up to a factor of {found.factor:.2f} from there"
        )
    return table, lines


def _perplexity(loss: float) -> str:
    return words.perplexity(math.exp(loss)) if math.isfinite(loss) else "diverged"


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def figure(rows: Iterable[Mapping[str, Any]]) -> Figure | None:
    """Perplexity against every knob that the trials of sweeps vary, a panel each; None without a varied one.

    Trials are points, the best one of each sweep is ringed; those that diverged are crosses at the top.
    """
    sweeps: dict[str, list[_Shown]] = {}
    for row in rows:
        if str(row.get("table", "")).startswith("sweep "):
            shown = _Shown(row["label"], _settings(row["config"]), row["perplexity"])
            sweeps.setdefault(f"{row['method']}, {row['size']}", []).append(shown)
    every = [it for trials in sweeps.values() for it in trials]
    varied = [
        knob
        for knob in dict.fromkeys(knob for it in every for knob in it.settings)
        if any(len({json.dumps(it.settings.get(knob)) for it in trials}) > 1 for trials in sweeps.values())
    ]
    seen = [it.perplexity for it in every if it.perplexity is not None]
    if not varied or not seen:
        return None
    styles = styles_of([Method(name, (), ()) for name in sweeps])
    traces, axes, width = [], {}, 1 / len(varied)
    for index, knob in enumerate(varied):
        number = str(index + 1) if index else ""
        for name, trials in sweeps.items():
            there = [it for it in trials if knob in it.settings]
            for trace in _points(knob, name, there, styles[name], max(seen)):
                traces.append(trace | {"xaxis": f"x{number}", "showlegend": trace["showlegend"] and not index})
        values = [it.settings[knob] for it in every if knob in it.settings]
        numbers = all(type(value) in (int, float) and value > 0 for value in values)
        scale = {"type": "log", "tickformat": "~g"} if numbers else {"type": "category"}
        right = (index + 1) * width - (0.04 if index + 1 < len(varied) else 0)
        axes[f"xaxis{number}"] = axis(text_of(knob), domain=[index * width, right], **scale)
    y = axis("validation perplexity", type="log" if max(seen) > 4 * min(seen) else "linear")
    return figure_of(traces, axes.pop("xaxis"), y, **axes)


class _Shown(NamedTuple):
    """A trial as the figure needs it."""

    label: str
    settings: dict[str, Any]
    perplexity: float | None


def _points(knob: str, name: str, trials: list[_Shown], style: Style, top: float) -> Iterator[dict[str, Any]]:
    """A sweep's trials in the panel of a knob: those that finished, and those that diverged."""
    finished = [it for it in trials if it.perplexity is not None]
    best = min(finished, key=lambda it: it.perplexity or math.inf, default=None)
    ring = {"width": [2.5 if it is best else 0 for it in finished]}
    marks = (
        {"size": 9, "symbol": style.symbol, "line": ring},
        {"size": 10, "symbol": "x-thin-open", "line": {"width": 2}},
    )
    diverged = [it for it in trials if it.perplexity is None]
    for kept, mark, said in ((finished, marks[0], "%{y:,.3f}"), (diverged, marks[1], "diverged")):
        if kept:
            yield {
                "mode": "markers",
                "name": text_of(name),
                "legendgroup": text_of(name),
                "showlegend": kept is finished,
                "x": [value if type(value := it.settings[knob]) in (int, float) else json.dumps(value) for it in kept],
                "y": [top if it.perplexity is None else it.perplexity for it in kept],
                "text": [text_of(it.label) for it in kept],
                "marker": {"color": style.colour, **mark},
                "hovertemplate": f"%{{text}}<br>{text_of(knob)} %{{x}}: {said}<extra></extra>",
            }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The learning rate, and the fields of method, layers and restarts by their own names."""
    parts = [config.get(part) or {} for part in ("method", "layers", "restarts")]
    return {"lr": config["lr"]} | {name: value for part in parts for name, value in part.items() if name != "name"}
