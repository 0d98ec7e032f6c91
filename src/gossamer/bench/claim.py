"""A table of a paper: what it claims, as data with sources, and the runs that stand behind a claim, as a function."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gossamer.train import Pretrain


@dataclass(frozen=True)
class Claim:
    """A published number."""

    value: float
    source: str
    """Where it is printed."""
    caveats: str = ""
    """What a reader has to know who compares with it: not looked up, not tuned, another accounting."""


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
    trial: int | None = None
    """Its number, where more than the learning rate and the seed tells the runs of a cell apart."""

    @property
    def label(self) -> str:
        """Its name in rows: a table has one run of a name."""
        name = f"{self.size} {self.method} lr {self.config.lr:g} seed {self.config.seed}"
        return name if self.trial is None else f"{name} trial {self.trial}"

    @property
    def folder(self) -> str:
        return self.label.replace(" ", "-")

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
    seeds: int = 3
    """Of a cell, from 0 on."""

    def wanted(
        self, sizes: Sequence[str], methods: Sequence[str], seeds: int, finished: Mapping[str, dict[str, Any]]
    ) -> Iterator[Run]:
        """The runs of these cells, so far as what is finished tells which they are: cheap and broad ones first."""
        for size in sizes:
            first = {method: self.run(size, method, 0) for method in methods}
            tried = {method: self._rates(run.config.lr) for method, run in first.items()}
            for place in range(len(self.sweep.factors)):
                for method, run in first.items():
                    yield run.at(tried[method][place])
            losses: dict[str, dict[float, float]] = {}
            for method, run in first.items():
                while (found := losses_of(run, tried[method], finished)) and (more := self._next_rate(found)):
                    tried[method].append(more)
                    yield run.at(more)
                losses[method] = found
            if not all(losses.values()):
                continue
            best = {method: min(found, key=lambda lr: (found[lr], lr)) for method, found in losses.items()}
            leading = self.sweep.leading({method: losses[method][lr] for method, lr in best.items()})
            for seed in range(1, seeds):
                for method in leading:
                    yield self.run(size, method, seed).at(best[method])

    def _rates(self, lr: float) -> list[float]:
        return [_rounded(lr * factor) for factor in self.sweep.factors]

    def _next_rate(self, found: Mapping[float, float]) -> float | None:
        if len(found) >= self.sweep.most:
            return None
        lowest, highest = min(found), max(found)
        best = min(found, key=lambda lr: (found[lr], lr))
        return _rounded(lowest / 2) if best == lowest else _rounded(highest * 2) if best == highest else None


def losses_of(run: Run, rates: Sequence[float], finished: Mapping[str, dict[str, Any]]) -> dict[float, float]:
    """The final validation loss at each rate, infinite where the run diverged; empty until all are finished."""
    rows = [finished.get(run.at(lr).label) for lr in rates]
    if None in rows:
        return {}
    return {lr: math.inf if row["loss"] is None else row["loss"] for lr, row in zip(rates, rows, strict=True) if row}


def _rounded(lr: float) -> float:
    return float(f"{lr:.6g}")  # as in labels
