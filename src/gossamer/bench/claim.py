"""A table of a paper: what it claims, as data with sources, and the runs that stand behind a claim, as a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from gossamer.train import Pretrain
from gossamer.train.config import fingerprint

LEVEL_WITH = 0.01
"""Nats: losses of one seed that differ by less do not say which learning rate is the better one."""

Finished = Mapping[str, dict[str, Any]]
"""Rows of finished runs, by label."""


@dataclass(frozen=True)
class Claim:
    """A published number."""

    value: float
    source: str
    """Where it is printed."""
    caveats: str = ""
    """What a reader has to know who compares with it: not looked up, not tuned, another accounting."""
    batches: float | None = None
    """Of a perplexity: n of the evaluation, whose summed losses were divided by n + 1; infinite where they were divided
    by n, None where nobody knows."""


@dataclass(frozen=True)
class Order:
    """A claim that methods rank, the lowest perplexity first, each pair of neighbours being a statement of its own."""

    methods: tuple[str, ...]
    source: str
    margin: float = 0.0
    """How far above the next one's a log perplexity may be and still count as no worse."""


@dataclass(frozen=True)
class Run:
    """One training run of a table or a suite."""

    table: str
    size: str
    method: str
    config: Pretrain[Any, Any, Any]
    """All that is trained, but for the folder it is trained in."""
    caveats: str = ""
    """What of it is not the paper's."""
    trial: int | None = None
    """Its number, where more than the learning rate and the seed tells the runs of a cell apart."""

    @property
    def label(self) -> str:
        """Its name in rows: under one configuration, a table has one run of a name."""
        name = f"{self.size} {self.method} lr {self.config.lr:g} seed {self.config.seed}"
        return name if self.trial is None else f"{name} trial {self.trial}"

    @property
    def folder(self) -> str:
        """Of its log and its checkpoints: nothing that another configuration left is in it."""
        return f"{self.label} {fingerprint(self.config)}".replace(" ", "-")

    def at(self, lr: float) -> Run:
        """The same at another learning rate of hidden matrices."""
        return replace(self, config=replace(self.config, lr=lr))


@dataclass(frozen=True)
class Sweep:
    """Which learning rates of a cell are tried, and which cells get more seeds."""

    factors: tuple[float, ...] = (1.0,)
    """Of the run's own rate, in the order in which they are tried, with seed 0."""
    most: int = 1
    """Rates, at most: while the best one is the smallest or the largest, the next by a factor of 2 is tried as well."""
    leading: Callable[[Mapping[str, float]], Iterable[str]] = list
    """Which methods, of all with their losses at their best rates, the other seeds are for."""


@dataclass(frozen=True)
class Follow:
    """Cells that begin where another table of the same file ended, at the learning rates that were best there."""

    table: str
    """One that follows none itself."""
    size: str
    """Of the other table's models."""
    rates: int
    """Best ones of each method."""
    leading: int | None = None
    """Only so many methods, the best there with seed 0; None: all."""
    always: tuple[str, ...] = ()
    """What runs whatever its place there, as a baseline does."""
    method_of: Callable[[str], str] = str
    """The other table's method whose rates a method takes."""

    def rates_of(self, methods: Sequence[str], before: Finished) -> dict[str, list[float]]:
        """Learning rates, the best first, of each method that is to run; of each the other table has finished runs."""
        found = {method: _by_rate(self.size, self.method_of(method), before) for method in methods}
        ranked = {
            method: _ranked({lr: fmean(map(_loss, rows)) for lr, rows in rates.items()})
            for method, rates in found.items()
        }
        if self.leading is not None:
            ordered = sorted(methods, key=lambda it: _loss(found[it][ranked[it][0]][0]))
            methods = [it for place, it in enumerate(ordered) if place < self.leading or it in self.always]
        return {method: ranked[method][: self.rates] for method in methods}


@dataclass(frozen=True)
class Table:
    """A table of results: its cells are methods by sizes, and each may carry what was published."""

    title: str
    sizes: tuple[str, ...]
    """Of models."""
    methods: tuple[str, ...]
    run: Callable[[str, str, int], Run]
    """The training of (size, method, seed)."""
    perplexities: Mapping[tuple[str, str], Claim] = field(default_factory=dict)
    """By method and size: legacy perplexities, as papers print them. Methods that are not ours have no runs."""
    gigabytes: Mapping[tuple[str, str], Claim] = field(default_factory=dict)
    """By method and size: weights and optimizer state, in GB of 1e9 bytes."""
    orders: tuple[Order, ...] = ()
    """Claimed at every size."""
    sweep: Sweep = Sweep()
    follows: Follow | None = None
    """Where the learning rates come from, if not from the runs and the factors of `sweep`."""
    seeds: int = 3
    """Of a cell, from 0 on."""

    def wanted(
        self, sizes: Sequence[str], methods: Sequence[str], seeds: int, finished: Finished, before: Finished
    ) -> Iterator[Run]:
        """The runs of these cells, so far as what is finished tells which they are: cheap and broad ones first.

        Args:
            before: what the table that this one follows has found.
        """
        for size in sizes:
            if self.follows is not None:
                tried = self.follows.rates_of(methods, before)
            else:
                rates = {method: self.run(size, method, 0).config.lr for method in methods}
                tried = {method: [_rounded(lr * it) for it in self.sweep.factors] for method, lr in rates.items()}
            for place in range(max(map(len, tried.values()))):
                for method, lrs in tried.items():
                    if place < len(lrs):
                        yield self.run(size, method, 0).at(lrs[place])
            found: dict[str, dict[float, float]] = {}
            for method, lrs in tried.items():
                first = self.run(size, method, 0)
                while (losses := _losses(first, lrs, finished)) and (more := self._next_rate(losses)):
                    lrs.append(more)
                    yield first.at(more)
                found[method] = losses
            if not all(found.values()):
                continue
            leading = list(self.sweep.leading({method: min(losses.values()) for method, losses in found.items()}))
            for seed in range(1, seeds):
                for method in leading:
                    yield self.run(size, method, seed).at(_ranked(found[method])[0])
            for method in leading:
                yield from self._beside_it(size, method, seeds, found[method], finished)

    def _beside_it(
        self, size: str, method: str, seeds: int, losses: Mapping[float, float], finished: Finished
    ) -> Iterator[Run]:
        """The other seeds at the next best rates: at those that are level with the best one, and while the seeds bring
        the mean of the rate before above the next."""
        for lr, following in pairwise(ranked := _ranked(losses)):
            rows = [finished.get(self.run(size, method, seed).at(lr).label) for seed in range(seeds)]
            if not all(rows) or losses[following] == math.inf:
                return
            if losses[following] > max(losses[ranked[0]] + LEVEL_WITH, fmean(_loss(row) for row in rows if row)):
                return
            for seed in range(1, seeds):
                yield self.run(size, method, seed).at(following)

    def most_runs(self, seeds: int) -> int:
        """Of a cell: if all rates are tried, with all seeds."""
        rates = len(self.sweep.factors) if self.follows is None else self.follows.rates
        return max(rates, self.sweep.most) * seeds

    def _next_rate(self, losses: Mapping[float, float]) -> float | None:
        if len(losses) >= self.sweep.most:
            return None
        best, lowest, highest = _ranked(losses)[0], min(losses), max(losses)
        return _rounded(lowest / 2) if best == lowest else _rounded(highest * 2) if best == highest else None


@dataclass(frozen=True)
class Cell:
    """The finished runs of a method at one size, at its best learning rate."""

    rows: tuple[dict[str, Any], ...]
    """One a seed."""
    rates: int
    """Learning rates tried."""

    @property
    def by_seed(self) -> dict[int, float | None]:
        """Perplexities; None where a run diverged."""
        return {row["seed"]: row["perplexity"] for row in self.rows}

    def all_of(self, name: str) -> list[float | None]:
        """A number of each run; None where it diverged."""
        return [row[name] for row in self.rows]


def cell(size: str, method: str, finished: Finished) -> Cell:
    """What is there of a cell, at the rate that comes first by `settled_first`."""
    rates = _by_rate(size, method, finished)
    if not rates:
        return Cell((), 0)
    best = min(rates, key=lambda lr: (*settled_first(list(map(_loss, rates[lr]))), lr))
    return Cell(tuple(rates[best]), len(rates))


def settled_first(losses: Sequence[float]) -> tuple[bool, int, float]:
    """A sort key of settings by their runs' losses, infinite where a run diverged, the best first.

    Diverged settings come last; then those with the most seeds are first, and of these the lowest mean.
    """
    return math.inf in losses, -len(losses), fmean(losses)


def _ranked(losses: Mapping[float, float]) -> list[float]:
    """Learning rates, the best first, of equals the smallest."""
    return sorted(losses, key=lambda lr: (losses[lr], lr))


def _losses(run: Run, rates: Sequence[float], finished: Finished) -> dict[float, float]:
    """At each rate the final validation loss; empty until all are there."""
    rows = [finished.get(run.at(lr).label) for lr in rates]
    return {} if None in rows else {lr: _loss(row) for lr, row in zip(rates, rows, strict=True) if row}


def _by_rate(size: str, method: str, finished: Finished) -> dict[float, list[dict[str, Any]]]:
    """The rows of a cell at each rate, by seed."""
    rates: dict[float, list[dict[str, Any]]] = {}
    for row in sorted(finished.values(), key=lambda row: row["seed"]):
        if (row["size"], row["method"]) == (size, method):
            rates.setdefault(row["lr"], []).append(row)
    return rates


def _loss(row: dict[str, Any]) -> float:
    """Infinite where the run diverged."""
    return math.inf if row["loss"] is None else row["loss"]


def _rounded(lr: float) -> float:
    return float(f"{lr:.6g}")  # as in labels
