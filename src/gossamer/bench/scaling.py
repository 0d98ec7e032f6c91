"""How loss falls with compute: a power law a method with its uncertainty, and how the best learning rate moves.

    law = fit([1e15, 4e15, 2e16], [4.1, 3.7, 3.3])
    law.exponent, law.interval              # of L = a C^-exponent; a 95 % interval
    low, high = law.band([1e17])            # where the law itself may lie

C is 6 N D floating-point operations: 2 N a token in the forward pass and 4 N in the backward pass. D counts the tokens
trained on. N counts the numbers in the matrices that a token is multiplied by (`matrix_parameters`): the output head is
among them, the embedding, which is looked up, is not, nor is attention's own product of tokens with tokens.

L, the loss in nats per token, has two parameters here. A third, the loss that no compute removes, cannot be told from
the exponent over the few sizes of a table: four points less three parameters leave one degree of freedom, where the
factor from a standard error to a 95 % interval is 12.7.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from gossamer.bench import words
from gossamer.bench.claim import settled_first
from gossamer.bench.plots import Figure, axis, figure_of, styles_of, text_of
from gossamer.bench.reading import Method
from gossamer.bench.verdict import student
from gossamer.errors import UserError
from gossamer.layers import PARAMETRIZATIONS, FactoredLinear, SLTrainLinear
from gossamer.memory import meta_model
from gossamer.train.config import PLACE

Array = NDArray[np.float64]


def matrix_parameters(model: nn.Module) -> int:
    """N: the numbers in the matrices that a token is multiplied by, on any device, meta too.

    Two thin factors count as such, a frozen matrix beside them too; `sltrain` multiplies by the dense matrix that it
    forms, so that one counts.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, SLTrainLinear):
            total += module.out_features * module.in_features
        elif isinstance(module, nn.Linear | FactoredLinear):
            total += sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 2)
    return total


def compute(matrix_parameters: float, tokens: float) -> float:
    """Floating-point operations of training: 6 N D."""
    return 6.0 * matrix_parameters * tokens


@dataclass(frozen=True)
class Law:
    """L = a C^-exponent, by least squares of log L against log C."""

    exponent: float
    centre: float
    """Mean of log C."""
    height: float
    """The fitted log L there."""
    spread: float
    """Sum of squares of log C about its mean."""
    residual: float
    """Standard deviation of log L about the line, with `points - 2` degrees of freedom."""
    points: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the exponent."""
        half = student(self.points - 2) * self.residual / math.sqrt(self.spread)
        return self.exponent - half, self.exponent + half

    def loss(self, compute: ArrayLike) -> Array:
        """The law's loss, in nats, of each compute, in floating-point operations."""
        return np.exp(self.height - self.exponent * (np.log(compute) - self.centre))

    def band(self, compute: ArrayLike, *, of_a_run: bool = False) -> tuple[Array, Array]:
        """Where the law lies at each compute, from least to most, with 95 % confidence; `of_a_run`: one more run."""
        away = (np.log(compute) - self.centre) ** 2 / self.spread
        half = student(self.points - 2) * self.residual * np.sqrt(of_a_run + 1 / self.points + away)
        return self.loss(compute) * np.exp(-half), self.loss(compute) * np.exp(half)


def fit(compute: ArrayLike, loss: ArrayLike) -> Law:
    """The power law through runs: floating-point operations, and nats per token.

    Raises:
        UserError: fewer than three runs, compute that does not vary, a number that is not finite and positive.
    """
    c, y = np.asarray(compute, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if c.shape != y.shape or c.ndim != 1 or len(c) < 3:
        raise UserError(f"scaling: {c.size} computes and {y.size} losses; allowed: as many of each, at least 3")
    if not (np.isfinite(c).all() and np.isfinite(y).all() and c.min() > 0 and y.min() > 0):
        raise UserError("scaling: a compute or a loss is not finite and positive; leave out what diverged")
    x, y = np.log(c), np.log(y)
    centre, height = x.mean(), y.mean()
    spread = ((x - centre) ** 2).sum()
    if spread == 0:
        raise UserError("scaling: every run has the same compute; allowed: at least two sizes or lengths")
    slope = ((x - centre) * (y - height)).sum() / spread
    left = y - height - slope * (x - centre)
    residual = math.sqrt((left**2).sum() / (len(x) - 2))
    return Law(float(-slope), float(centre), float(height), float(spread), residual, len(x))


class Point(NamedTuple):
    """The best that a method reached with some compute: the lowest mean, of the settings with the most seeds."""

    method: str
    size: str
    matrix_parameters: int
    tokens: int
    loss: float
    lr: float
    tried: tuple[float, ...]
    """Every learning rate that was tried, in order, those that diverged too."""

    @property
    def compute(self) -> float:
        return compute(self.matrix_parameters, self.tokens)


def points(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """The best of every method, size and length, by the data that they share: losses on other data, or of another
    tokenizer, are of another kind.

    A setting of which a seed diverged is a rate that was tried and never the best. Rows of other tasks, which have no
    perplexity, are left out, and rows of a model that is no longer where it was.
    """
    runs: dict[tuple[str, str, str, int, int], dict[str, list[float]]] = {}
    for row in rows:
        config = row.get("config") or {}
        parameters = _of_config(
            config.get("model"), json.dumps(config.get("layers")), tuple(config.get("layer_targets") or ())
        )
        if "perplexity" not in row or parameters is None or not isinstance(config.get("data"), dict):
            continue
        tokens = config["steps"] * config["batch_size"] * config["data"]["seq_len"]
        same = json.dumps(config["data"], sort_keys=True), row["method"], config["model"], parameters, tokens
        setting = json.dumps({**config, **dict.fromkeys((*PLACE, "seed"))}, sort_keys=True)
        perplexity = row["perplexity"] if isinstance(row["perplexity"], int | float) else math.nan
        loss = math.log(perplexity) if math.isfinite(perplexity) else math.inf
        runs.setdefault(same, {}).setdefault(setting, []).append(loss)
    found: dict[str, list[Point]] = {}
    for (data, method, size, parameters, tokens), settings in sorted(runs.items()):
        best = min(settings, key=lambda it: settled_first(settings[it]))
        if math.isfinite(loss := fmean(settings[best])):
            rates = [float(json.loads(setting)["lr"]) for setting in (best, *settings)]
            point = Point(method, size, parameters, tokens, loss, rates[0], tuple(sorted(set(rates))))
            found.setdefault(data, []).append(point)
    return found


@cache
def _of_config(model: str | None, layers: str, layer_targets: tuple[str, ...]) -> int | None:
    """N of a run's configuration; None where the model cannot be had."""
    fields = json.loads(layers)
    parametrization = fields and PARAMETRIZATIONS[fields.pop("name")](**fields)
    try:
        return matrix_parameters(meta_model(model or "", parametrization, torch.float32, layer_targets))
    except UserError:
        return None


def figure(rows: Iterable[Mapping[str, Any]]) -> Figure | None:
    """Loss against compute, both logarithmic: a method's best runs, and its law from three computes on.

    None where no method has runs of two computes on the same data.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, line in _lines(rows).items():
        if len({point.compute for point in line}) > 1:
            curves[name] = [(point.compute, point.loss) for point in line]
    return draw(curves) if curves else None


def draw(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Lines of (floating-point operations, nats), by name; up to three of them with their laws' 95 % bands.

    More bands hide one another: then the intervals of the exponents in the key have to do.
    """
    styles = styles_of([Method(name, (), ()) for name in curves])
    traces: list[dict[str, Any]] = []
    for name, line in curves.items():
        style, label = styles[name], text_of(name)
        computes, losses = zip(*sorted(line), strict=True)
        common = {"legendgroup": label, "line": {"color": style.colour, "width": 1.6, "dash": style.dash}}
        law = fit(computes, losses) if len(set(computes)) > 2 else None
        if law is not None and len(curves) <= 3:
            grid = np.geomspace(computes[0], computes[-1], 40)
            low, high = law.band(grid)
            ends = {"x": [*grid.tolist(), *grid[::-1].tolist()], "y": [*low.tolist(), *high[::-1].tolist()]}
            paint = {"fill": "toself", "fillcolor": style.colour, "opacity": 0.12, "line": {"width": 0}}
            quiet = {"mode": "lines", "showlegend": False, "hoverinfo": "skip", "legendgroup": label}
            traces.append(quiet | ends | paint)
        if law is not None:
            line_of_law = {"x": [computes[0], computes[-1]], "y": law.loss([computes[0], computes[-1]]).tolist()}
            traces.append(common | {"mode": "lines", "showlegend": False, "hoverinfo": "skip"} | line_of_law)
        low, high = law.interval if law else (math.nan, math.nan)
        exponent = f", exponent {law.exponent:.3f} ({low:.3f} to {high:.3f})" if law else ""
        traces.append(
            common
            | {
                "mode": "markers" if law else "lines+markers",
                "name": label + exponent,
                "x": computes,
                "y": losses,
                "text": [words.perplexity(math.exp(loss)) for loss in losses],
                "marker": {"color": style.colour, "size": 8, "symbol": style.symbol},
                "hovertemplate": f"%{{y:.4f}} nats, perplexity %{{text}}, at %{{x:.3g}}<extra>{label}</extra>",
            }
        )
    every = [compute for line in curves.values() for compute, _ in line]
    dtick = 1 if max(every) > 100 * min(every) else "D2"  # at powers of ten, or at 1, 2 and 5
    x = axis("compute 6 N D, floating-point operations", type="log", exponentformat="power", dtick=dtick)
    return figure_of(traces, x, axis("loss, nats per token", type="log", tickformat=".3~g", nticks=8))


def transfer(rows: Iterable[Mapping[str, Any]]) -> Figure | None:
    """The best learning rate against N, both logarithmic, with bars to the neighbours that were tried and lost.

    A hollow mark is a best rate at the edge of what was tried. None where no method has two rates at two sizes.
    """
    traces: list[dict[str, Any]] = []
    lines = {name: sorted(point for point in line if len(point.tried) > 1) for name, line in _lines(rows).items()}
    lines = {name: line for name, line in lines.items() if len({point.size for point in line}) > 1}
    if not lines:
        return None
    styles = styles_of([Method(name, (), ()) for name in lines])
    for name, line in lines.items():
        style, label = styles[name], text_of(name)
        line = sorted(line, key=lambda point: (point.matrix_parameters, point.tokens))
        places = [point.tried.index(point.lr) for point in line]
        inside = [0 < place < len(point.tried) - 1 for point, place in zip(line, places, strict=True)]
        above = [p.tried[min(i + 1, len(p.tried) - 1)] - p.lr for p, i in zip(line, places, strict=True)]
        below = [p.lr - p.tried[max(i - 1, 0)] for p, i in zip(line, places, strict=True)]
        bars = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
        symbols = [style.symbol if there else f"{style.symbol}-open" for there in inside]
        traces.append(
            {
                "mode": "lines+markers",
                "name": label,
                "x": [point.matrix_parameters for point in line],
                "y": [point.lr for point in line],
                "error_y": bars | {"color": style.colour, "thickness": 1, "width": 4},
                "text": [f"{text_of(p.size)}, {p.tokens:,} tokens, {len(p.tried)} rates" for p in line],
                "line": {"color": style.colour, "width": 1.6, "dash": style.dash},
                "marker": {"color": style.colour, "size": 9, "symbol": symbols},
                "hovertemplate": f"%{{y:.3g}}: %{{text}}<extra>{label}</extra>",
            }
        )
    x = axis("matrix parameters N", type="log", tickformat="~s", dtick="D2")
    return figure_of(traces, x, axis("best learning rate", type="log", tickformat="~g", dtick="D2"))


def _lines(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Points by method; by method and what sets their data apart, where runs on several data can be compared."""
    found = {data: line for data, line in points(rows).items() if len({point.compute for point in line}) > 1}
    configs = [json.loads(data) for data in found]
    apart = [key for key in (configs[0] if configs else ()) if len({json.dumps(it.get(key)) for it in configs}) > 1]
    lines: dict[str, list[Point]] = {}
    for config, line in zip(configs, found.values(), strict=True):
        said = "".join(f", {key} {config[key]}" for key in apart)
        for point in line:
            lines.setdefault(point.method + said, []).append(point)
    return lines
