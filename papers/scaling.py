"""Loss against compute in the papers' tables: does perplexity depend "mostly on total compute, not on configuration"?

    python -m papers.scaling                              # the tables
    python -m papers.scaling --out results/scaling        # and published.md, scale.svg, galore.svg

That is the closing observation of arXiv 2505.22922, from notes on it. Compute is 6 N D (`gossamer.bench.scaling`), N
counted on our models of the same shapes, D with padding. 6 N D is too much for `lora` and `relora`, whose frozen
matrices take no gradient of their own. A factor that all sizes of a table share, in D or in the loss (dividing by one
batch too many is nearly one), moves no exponent.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from gossamer.bench import Table
from gossamer.bench.scaling import Law, compute, draw, fit, matrix_parameters
from gossamer.layers import Parametrization
from gossamer.memory import meta_model
from papers import efficient_pretraining, galore
from papers.pretraining import STEPS, SYSTEMS


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


def curves(table: Table) -> list[Curve]:
    """Every method of a table, ours or not; what is not in `SYSTEMS` has dense weights."""
    found = []
    for method in dict.fromkeys(method for method, _ in table.perplexities):
        cells = {size: claim.value for (name, size), claim in table.perplexities.items() if name == method}
        computes = (_compute(size, layers_of(method, size)) for size in cells)
        found.append(Curve(method, tuple(cells), tuple(computes), tuple(cells.values())))
    return found


def layers_of(method: str, size: str) -> Parametrization | None:
    return SYSTEMS[method](size).layers if method in SYSTEMS else None


def _compute(size: str, layers: Parametrization | None) -> float:
    """With `STEPS` of 512 rows of 256 tokens, padding included, as all these papers train."""
    return compute(matrix_parameters(meta_model(size, layers, torch.bfloat16)), STEPS[size] * 512 * 256)


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
    yield "# Loss against compute in published tables"
    yield ""
    yield "Made by `python -m papers.scaling --out results/scaling`. Perplexities as printed; intervals are of 95 %."
    scale, table2, benchmark = efficient_pretraining.scale, galore.table2, efficient_pretraining.benchmark
    dense = {table.title: [it for it in curves(table) if not _is_thin(it)] for table in (scale, table2)}
    for title, lines in dense.items():
        yield from ("", f"## {title}: dense weights, each method's own law", "")
        yield "| method | exponent | 95 % | residual of the loss | |"
        yield "|---|---|---|---|---|"
        fitted = [(name, law, "sizes") for name, law in laws(lines).items()]
        for name, law, of in (*fitted, ("one law for all", common(lines), "runs")):
            low, high = law.interval
            yield f"| {name} | {law.exponent:.4f} | {low:.4f} to {high:.4f} | {law.residual:.2%} | {law.points} {of} |"
    yield from ("", f"## {scale.title}: what compute explains", "")
    yield from _explained(dense[scale.title])
    yield from ("", "## Low-rank weights against the dense law, at their own compute", "")
    yield "| table | method | size | compute / dense | perplexity | dense law there, 95 % of one more run | |"
    yield "|---|---|---|---|---|---|---|"
    yield from _beside(table2, dense[table2.title][0])
    (full_rank,) = (it for it in dense[scale.title] if it.name == "stable-spam")  # the benchmark's own, by its 1B
    yield from _beside(benchmark, full_rank)


def _is_thin(curve: Curve) -> bool:
    return layers_of(curve.name, curve.sizes[0]) is not None


def _explained(dense: Sequence[Curve]) -> Iterator[str]:
    parts, law = shares(dense), common(dense)
    yield f"Of the variance of log loss over {len(dense)} methods and {len(dense[0].sizes)} sizes:"
    yield ""
    for name, what in (
        ("law", "along one law of compute"),
        ("size", "the sizes' departure from it"),
        ("method", "the methods' constant differences"),
        ("rest", "neither"),
    ):
        yield f"- {parts[name]:.1%} {what}"
    yield ""
    yield "| size | compute | best | worst | worst / best | the same gain by compute |"
    yield "|---|---|---|---|---|---|"
    for index, size in enumerate(dense[0].sizes):
        ranked = sorted((curve.perplexities[index], curve.name) for curve in dense)
        (best, first), (worst, last) = ranked[0], ranked[-1]
        sides = f"{first} {best:.2f} | {last} {worst:.2f} | {worst / best:.3f}"
        yield f"| {size} | {dense[0].computes[index]:.2e} | {sides} | x {worth(best, worst, law):.1f} |"


def _beside(table: Table, dense: Curve) -> Iterator[str]:
    """The thin methods of a table, and what the law of a dense one says of their compute."""
    law = fit(dense.computes, dense.losses)
    for curve in filter(_is_thin, curves(table)):
        for size, c, perplexity in zip(curve.sizes, curve.computes, curve.perplexities, strict=True):
            middle, (low, high) = (float(np.exp(law.loss(c))), np.exp(law.band(c, of_a_run=True)))
            said = f"{middle:.2f} ({low:.2f} to {high:.2f}) | {'inside' if low <= perplexity <= high else 'outside'}"
            ratio = c / dense.computes[dense.sizes.index(size)]
            yield f"| {table.title} | {curve.name} | {size} | {ratio:.2f} | {perplexity:.2f} | {said} |"


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
        for name, table in (("scale", efficient_pretraining.scale), ("galore", galore.table2)):
            lines = {it.name: list(zip(it.computes, it.losses, strict=True)) for it in curves(table)}
            figure = go.Figure(draw(lines)).update_layout(template="plotly_white", width=900, height=620)
            figure.write_image(options.out / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
