"""What is compared: a model, data, a length; `recipes` has what is trained on them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gossamer.bench.claim import Run
from gossamer.bench.recipes import Recipe, presets
from gossamer.data import DataConfig
from gossamer.errors import UserError, nearest
from gossamer.train import Pretrain


@dataclass(frozen=True)
class Suite:
    """What every run of a benchmark shares."""

    model: str
    data: DataConfig
    steps: int
    batch_size: int
    fallback_lr: float
    """Of embeddings, output head and norms, by the same AdamW in every run: methods differ in hidden matrices alone."""
    eval_tokens: int
    evals: int
    """Evaluations and checkpoints of a run, evenly spaced; the last one counts."""

    def config(self, recipe: Recipe, seed: int) -> Pretrain[Any, Any, Any]:
        """What a run of the recipe trains."""
        every = -(-self.steps // self.evals)
        return Pretrain(
            method=recipe.method,
            layers=recipe.layers,
            restarts=recipe.restarts,
            model=self.model,
            data=self.data,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=recipe.lr,
            fallback_lr=self.fallback_lr,
            eval_every=every,
            eval_tokens=self.eval_tokens,
            save_every=every,
            keep_last=1,
            seed=seed,
        )


SUITES = {
    # a Llama with d = 128 on the standard library's text: minutes on two cores
    "quick": Suite(
        "tiny",
        DataConfig(seq_len=128),
        steps=200,
        batch_size=8,
        fallback_lr=4e-3,
        eval_tokens=100_000,
        evals=1,
    ),
}
"""By the name that the command line knows."""


@dataclass(frozen=True)
class Bench:
    """Train every method and every kind of low-rank weights that has a preset for the suite, and compare them.

    Finished runs are kept in `rows.jsonl`: the same command again trains only what is missing.
    """

    suite: Annotated[Literal["quick"], tyro.conf.Positional] = "quick"
    """Model, data and length."""
    out: Path | None = None
    """Folder of the runs and the report; None: runs/<suite>."""
    methods: tuple[str, ...] = ()
    """Methods, and low-rank weights (`low-rank`, `sltrain-restarts`, ...); none named: all that have a preset. `adamw`,
    the reference, always runs."""
    lrs: tuple[float, ...] = ()
    """Learning rates of hidden matrices to try for every method; none given: each method's preset."""
    seeds: tuple[int, ...] = (0,)
    """One run for each."""
    steps: int | None = None
    """Instead of the suite's."""
    rounds: int = 20
    """Training steps, ours and torch's AdamW's in turn, by which their times are compared."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps: {self.steps} is too small; allowed: an integer >= 1")
        for lr in self.lrs:
            if not 0 < lr < math.inf:
                raise UserError(f"lrs: {lr} is out of range; allowed: finite numbers > 0")
        if not self.seeds or self.rounds < 1:
            raise UserError(f"seeds: {self.seeds}, rounds: {self.rounds}; allowed: at least one of each")

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.suite

    def recipes(self) -> list[Recipe]:
        """What to run, the reference first."""
        known = presets(self.suite)
        for name in self.methods:
            if name not in known:
                raise UserError(
                    f"methods: {name!r} has no preset for {self.suite}{nearest(name, known)}; known: {', '.join(known)}"
                )
        chosen = {"adamw", *self.methods} if self.methods else set(known)
        return sorted((known[name] for name in chosen), key=lambda recipe: (recipe.name != "adamw", recipe.name))

    def runs(self) -> list[Run]:
        """Every recipe at every learning rate with every seed."""
        suite = SUITES[self.suite]
        suite, size = replace(suite, steps=self.steps or suite.steps), Path(suite.model).stem
        return [
            Run(self.suite, size, recipe.name, suite.config(replace(recipe, lr=lr), seed))
            for recipe in self.recipes()
            for lr in self.lrs or (recipe.lr,)
            for seed in self.seeds
        ]
