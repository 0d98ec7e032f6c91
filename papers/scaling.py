"""Loss against compute in the papers' tables: does perplexity depend "mostly on total compute, not on configuration"?

    python -m papers.scaling                              # the tables
    python -m papers.scaling --out results/scaling        # and published.md, scale.svg, galore.svg

That is the closing observation of arXiv 2505.22922, from notes on it. Compute is 6 N D (`gossamer.bench.scaling`), N
counted on our models of the same shapes, D as the paper prints it: SCALE's counts padding, GaLore's does not. A factor
that all sizes of a table share, in D or in the loss (dividing by one batch too many is nearly one), moves no exponent.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from gossamer.bench.scaling import Law, compute, draw, fit, matrix_parameters
from gossamer.layers import LoRA, LowRank, Parametrization, ReLoRA, SLTrain
from gossamer.memory import meta_model
from papers import PublishedTable
from papers.efficient_pretraining import MAIN, SCALE
from papers.efficient_pretraining import TOKENS as SLOTS
from papers.galore import RANKS, TABLE_2, TOKENS

LAYERS: dict[str, type[Any]] = {
    "Low-Rank": LowRank,
    "Low-Rank-restarts": LowRank,
    "LoRA": LoRA,
    "ReLoRA": ReLoRA,
    "SLTrain-restarts": SLTrain,
}
"""Of the methods whose weights are not dense. 6 N D is too much for LoRA and ReLoRA, whose frozen matrices have no
gradient of their own: 4 N D there, so a third of the compute of most of their N."""


@dataclass(frozen=True)
class Curve:
    """A method of a table over its sizes."""

    name: str
    sizes: tuple[str, ...]
    computes: tuple[float, ...]
    perplexities: tuple[float, ...]

    @property
    def losses(self) -> list[float]:
        return [math.log(perplexity) for perplexity in self.perplexities]


def curves(table: PublishedTable, tokens: Mapping[str, float]) -> list[Curve]:
    """Every method of a table."""
    found = []
    for method, cells in table.cells.items():
        layers = LAYERS.get(method)
        computes = [_compute(size, layers and layers(RANKS[size]), tokens[size]) for size in cells]
        perplexities = tuple(cell.perplexity for cell in cells.values())
        found.append(Curve(method, tuple(cells), tuple(computes), perplexities))
    return found


def _compute(size: str, layers: Parametrization | None, tokens: float) -> float:
    return compute(matrix_parameters(meta_model(size, layers, torch.bfloat16)), tokens)


def laws(dense: Sequence[Curve]) -> dict[str, Law]:
    return {curve.name: fit(curve.computes, curve.losses) for curve in dense}


def common(dense: Sequence[Curve]) -> Law:
    """One law through all methods."""
    return fit([it for curve in dense for it in curve.computes], [it for curve in dense for it in curve.losses])


def shares(dense: Sequence[Curve]) -> dict[str, float]:
    """The parts of the variance of log loss, over methods that were all trained with the same computes; their sum is 1.

    `law`: along the common power law. `size`: what the means of the sizes depart from it by. `method`: constant
    differences of methods. `rest`: a method being better at one size than at another, and chance.
    """
    y = np.log([curve.losses for curve in dense])  # (methods, sizes)
    mean, sizes = y.mean(), y.mean(0) - y.mean()
    law = np.log(common(dense).loss(dense[0].computes)) - mean
    methods = y.mean(1, keepdims=True) - mean
    squares = {
        "law": len(y) * (law**2).sum(),
        "size": len(y) * ((sizes - law) ** 2).sum(),
        "method": y.shape[1] * (methods**2).sum(),
        "rest": ((y - mean - sizes - methods) ** 2).sum(),
    }
    return {name: float(value / ((y - mean) ** 2).sum()) for name, value in squares.items()}


def worth(better: float, worse: float, law: Law) -> float:
    """How many times the compute the law asks for to come from the worse perplexity to the better one."""
    return (math.log(worse) / math.log(better)) ** (1 / law.exponent)


def report() -> Iterator[str]:
    """The tables, as lines of Markdown."""
    scale, galore = curves(SCALE, SLOTS), curves(TABLE_2, TOKENS)
    galore_dense = [curve for curve in galore if curve.name not in LAYERS]
    yield "# Loss against compute in published tables"
    yield ""
    yield "Made by `python -m papers.scaling --out results/scaling`. Perplexities as printed; intervals are of 95 %."
    for table, dense in ((SCALE, scale), (TABLE_2, galore_dense)):
        yield from ("", f"## {table.name}: dense weights, each method's own law ({table.reliability})", "")
        yield "| method | exponent | 95 % | residual of the loss | |"
        yield "|---|---|---|---|---|"
        for name, law in laws(dense).items():
            low, high = law.interval
            noted = f"{law.points} sizes"
            yield f"| {name} | {law.exponent:.4f} | {low:.4f} to {high:.4f} | {law.residual:.2%} | {noted} |"
        law = common(dense)
        low, high = law.interval
        noted = f"{law.points} runs"
        yield f"| one law for all | {law.exponent:.4f} | {low:.4f} to {high:.4f} | {law.residual:.2%} | {noted} |"
    yield from ("", f"## {SCALE.name}: what compute explains", "")
    parts = shares(scale)
    yield "Of the variance of log loss over nine methods and four sizes: " + ", ".join(
        f"{parts[name]:.1%} {what}"
        for name, what in (
            ("law", "lies along one law of compute"),
            ("size", "is the sizes' departure from it"),
            ("method", "is the methods' constant difference"),
            ("rest", "is neither"),
        )
    ) + "."  # fmt: skip
    yield ""
    yield "| size | compute | best | worst | worst / best | the same gain by compute |"
    yield "|---|---|---|---|---|---|"
    law = common(scale)
    for index, size in enumerate(scale[0].sizes):
        ranked = sorted((curve.perplexities[index], curve.name) for curve in scale)
        (best, first), (worst, last) = ranked[0], ranked[-1]
        c = scale[0].computes[index]
        yield (
            f"| {size} | {c:.2e} | {first} {best:.2f} | {last} {worst:.2f} | {worst / best:.3f} | "
            f"x {worth(best, worst, law):.1f} |"
        )
    yield from ("", "## Low-rank weights against the dense law, at their own compute", "")
    yield "| table | method | size | compute / dense | perplexity | dense law there, 95 % of one more run | |"
    yield "|---|---|---|---|---|---|---|"
    (stable_spam,) = (curve for curve in scale if curve.name == "Stable-SPAM")  # its 1B is the `Full` of `MAIN`
    for table, of, dense in ((TABLE_2, galore, galore[0]), (MAIN, curves(MAIN, SLOTS), stable_spam)):
        law = fit(dense.computes, dense.losses)
        for curve in of:
            if curve.name not in LAYERS:
                continue
            for size, c, perplexity in zip(curve.sizes, curve.computes, curve.perplexities, strict=True):
                middle, (low, high) = law.loss(c), law.band(c, of_a_run=True)
                inside = "inside" if low <= math.log(perplexity) <= high else "outside"
                ratio = c / dense.computes[dense.sizes.index(size)]
                yield (
                    f"| {table.name} ({table.reliability}) | {curve.name} | {size} | {ratio:.2f} | {perplexity:.2f} | "
                    f"{np.exp(middle):.2f} ({np.exp(low):.2f} to {np.exp(high):.2f}) | {inside} |"
                )


@dataclass(frozen=True)
class Options:
    """Fit the published tables and print what comes out."""

    out: Path | None = None
    """A folder for the tables and two pictures."""


def main(options: Options) -> int:
    """Returns the exit code."""
    text = "\n".join(report())
    print(text)
    if options.out is not None:
        import plotly.graph_objects as go

        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "published.md").write_text(text + "\n")
        for name, table, tokens in (("scale", SCALE, SLOTS), ("galore", TABLE_2, TOKENS)):
            lines = {it.name: list(zip(it.computes, it.losses, strict=True)) for it in curves(table, tokens)}
            figure = go.Figure(draw(lines)).update_layout(template="plotly_white", width=900, height=620)
            figure.write_image(options.out / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
