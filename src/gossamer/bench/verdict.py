"""What runs say about a claim, by arithmetic that is stated: intervals of log perplexities at 95 %.

A cell is its finished runs at one learning rate, a log perplexity x_i a seed, n of them, mean x and sample deviation s.

- Against a published perplexity p, which is one run of its authors: `x +- t(n - 1) s sqrt(1 + 1/n)`, where one more run
  of ours would lie. The repositories divide the loss of b batches by b + 1, so that log p is taken times (b + 1) / b;
  where b is not known, anywhere from `LEAST_BATCHES` up. What overlaps agrees; else ours is better or worse.
- Two cells of ours: the interval of the mean difference over the seeds that both have, `d +- t(n - 1) s_d / sqrt(n)`. A
  seed is one order of the text and one draw of what is not replaced, which moves all methods alike: differences vary
  by far less than perplexities. "a before b" holds where all of the interval lies below the claim's margin, and is
  refuted where all of it lies above.

One seed has no deviation, and so no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, variance

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text
from scipy.special import stdtrit

from gossamer.bench import words
from gossamer.bench.claim import Cell, Claim, Finished, Table, cell

LEVEL = 0.95
LEAST_BATCHES = 102
"""Of a paper's evaluation that does not say: ten million tokens, where three quarters of the slots are no padding, in
the largest batches of its recipe, 512 rows of 256."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


def of_one_more(values: Sequence[float]) -> Interval:
    """Where one more value like these, at least two, lies."""
    n = len(values)
    half = student(n - 1) * math.sqrt(variance(values) * (1 + 1 / n))
    return Interval(fmean(values) - half, fmean(values) + half)


def of_mean(values: Sequence[float]) -> Interval:
    """Where the mean of which these, at least two, are samples lies."""
    half = student(len(values) - 1) * math.sqrt(variance(values) / len(values))
    return Interval(fmean(values) - half, fmean(values) + half)


def against_published(perplexities: Sequence[float | None], claim: Claim) -> str:
    """Ours, one a seed, None where a run diverged, beside a paper's: a verdict in words."""
    if (logs := _logs(perplexities)) is None:
        return "diverged"
    if len(logs) < 2:
        return "one seed: no verdict" if logs else "no run"
    ours, theirs = of_one_more(logs), unbiased(claim)
    if ours.high < theirs.low:
        return "ours is better"
    return "ours is worse" if ours.low > theirs.high else "agrees"


def unbiased(claim: Claim) -> Interval:
    """Where the log perplexity lies that its authors would have printed had they divided by the number of batches."""
    fewest, most = (LEAST_BATCHES, math.inf) if claim.batches is None else (claim.batches, claim.batches)
    return Interval(math.log(claim.value) * (1 + 1 / most), math.log(claim.value) * (1 + 1 / fewest))


def of_order(better: Mapping[int, float | None], worse: Mapping[int, float | None], margin: float) -> str:
    """Whether the first method's perplexities, by seed, are no higher than the second's: a verdict in words."""
    if not better or not worse:
        return "no run"
    if (common := len(better.keys() & worse.keys())) < 2:
        return f"{words.plural(common, 'seed')} in common: no verdict"
    diverged = None in better.values(), None in worse.values()
    if any(diverged):
        return (
            "both diverged" if all(diverged) else "refuted: it diverged" if diverged[0] else "holds: the other diverged"
        )
    differences = [
        math.log(a / b) for seed in better.keys() & worse.keys() if (a := better[seed]) and (b := worse[seed])
    ]
    interval = of_mean(differences)
    word = "holds" if interval.high < margin else "refuted" if interval.low > margin else "undecided"
    return f"{word}: {interval.low:+.4f} to {interval.high:+.4f}"


def _logs(perplexities: Sequence[float | None]) -> list[float] | None:
    finite = [math.log(value) for value in perplexities if value is not None]
    return finite if len(finite) == len(perplexities) else None


def student(freedom: float) -> float:
    """What a standard error is multiplied by for an interval of `LEVEL`: the quantile of Student's t."""
    return float(stdtrit(freedom, (1 + LEVEL) / 2))


ARITHMETIC = (
    "verdicts, in log perplexity, 95 %: a published number, freed of its division by one batch too many, against where "
    "one more run of ours would lie; an order by the interval of the mean difference, seed by seed"
)


def show(table: Table, sizes: Sequence[str], methods: Sequence[str], finished: Finished, console: Console) -> None:
    """Ours beside the paper's, cell by cell; then the orders."""
    grid = Grid(title=table.title)
    for column in ("size", "method", "rate (of)", "n", "perplexity", "legacy", "published", "verdict", "caveats"):
        grid.add_column(column, justify="left" if column in ("size", "method", "verdict", "caveats") else "right")
    for size in sizes:
        cells = {method: cell(size, method, finished) for method in methods}
        for method in sorted(methods, key=lambda method: _rank(cells[method])):
            grid.add_row(size, *_line(method, cells[method], table.perplexities.get((method, size))))
    console.print(grid)
    for line in orders(table, sizes, finished):
        console.print(Text(line))
    console.print(Text(ARITHMETIC))


def orders(table: Table, sizes: Sequence[str], finished: Finished) -> Iterator[str]:
    """Each order that is claimed, size by size, with its verdict."""
    for size in sizes:
        for order in table.orders:
            for better, worse in pairwise(order.methods):
                a, b = (cell(size, method, finished).by_seed for method in (better, worse))
                within = f" within {order.margin:g}" if order.margin else ""
                verdict = of_order(a, b, order.margin)
                yield f"{size}: {better} before {worse}{within} ({order.source}): {verdict}"


def _line(method: str, found: Cell, claim: Claim | None) -> list[str]:
    published = [f"{claim.value:.2f}", against_published(found.all_of("perplexity"), claim)] if claim else []
    caveats = claim.caveats if claim else ""
    if not found.rows:
        return [method, "", "0", "", "", *(published or ["", ""]), caveats]
    lr = f"{found.rows[0]['lr']:g} ({found.rates})"
    ours = [_spread(found.all_of(name)) for name in ("perplexity", "legacy_perplexity")]
    return [method, lr, str(len(found.rows)), *ours, *(published or ["", ""]), caveats]


def _spread(perplexities: Sequence[float | None]) -> str:
    values = [value for value in perplexities if value is not None]
    if len(values) < len(perplexities):
        return "diverged"
    return f"{fmean(values):.2f}" + (f" ± {math.sqrt(variance(values)):.2f}" if len(values) > 1 else "")


def _rank(found: Cell) -> float:
    values = found.all_of("perplexity")
    whole = [value for value in values if value is not None]
    return fmean(whole) if whole and len(whole) == len(values) else math.inf
