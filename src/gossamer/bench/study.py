"""What a sweep tries, and which process trains it.

A study lies in a folder: `study.db` (optuna on SQLite) holds its trials, `rows.jsonl` a row of each finished one. Any
number of processes work on it by the same command. Each asks for a trial while it holds the rows' file, so no two get
the same one and none begins that the budget does not hold; each holds what it trains by a lock that ends with it, so a
trial of a process that died is taken up, from its checkpoint, by the next one that looks.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gossamer.bench.claim import Run
from gossamer.bench.recipes import Recipe, presets
from gossamer.bench.runner import Rows
from gossamer.bench.space import owner_of, parse, place, spread
from gossamer.bench.suite import SUITES
from gossamer.errors import UserError, nearest
from gossamer.evaluate import Score
from gossamer.optim.contract import methods
from gossamer.train import Pretrain
from gossamer.train.config import differences

if TYPE_CHECKING:
    import optuna

STARTUP = 4
"""Trials that cover the space before what was found decides where the next one is, and before any is pruned."""


@dataclass(frozen=True)
class Search:
    """Look for the best learning rate of a method, and for values of its own knobs.

    The same command goes on with a study that was stopped, and joins one that runs. `--tokens` may grow.
    """

    name: Annotated[str, tyro.conf.Positional]
    """A method, or low-rank weights (`low-rank`, `sltrain-restarts`, ...)."""
    tokens: float
    """Training tokens that the whole study may take. A trial begins only if the rest holds all of it."""
    space: tuple[str, ...] = ()
    """What is tried: `lr=1e-4:1e-2` (drawn between the two, by their logarithms), `rank=4,8,16` (each), any field of
    the method, its layers, its restarts. Lists alone are a grid. Without lr: an eighth to eight times the preset's."""
    suite: Literal["quick"] = "quick"
    """Model, data and length of a trial."""
    size: str | None = None
    """Instead of the suite's model: a size, or a Hugging Face config.json or a folder with one."""
    data: str | None = None
    """Instead of the suite's training text, as `gossamer pretrain --data`."""
    tokenizer: str | None = None
    """Instead of the suite's, as `gossamer pretrain --tokenizer`."""
    steps: int | None = None
    """Of a trial, instead of the suite's."""
    evals: int | None = None
    """Evaluations of a trial, evenly spaced, instead of the suite's number; with each a checkpoint is saved."""
    prune: Literal["median"] | None = None
    """median: end a trial that is worse than half of the others were at the same step. None: train each to its end."""
    seed: int = 0
    """Of every trial, and of what is drawn between bounds."""
    out: Path | None = None
    """Folder of the study; None: runs/sweep/<suite>_<size>_<name>."""
    device: str = "auto"
    """auto, cpu or cuda."""
    write: bool = False
    """Write the best value, with its evidence, into the suite's presets."""

    def __post_init__(self) -> None:
        if not 0 < self.tokens < math.inf:
            raise UserError(f"tokens: {self.tokens} is out of range; allowed: finite numbers > 0")
        for name in ("steps", "evals"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name}: {value} is too small; allowed: an integer >= 1")
        if self.prune and (self.evals or SUITES[self.suite].evals) < 2:
            raise UserError("prune: a trial is evaluated once, at its end; add --evals 4")
        elsewhere = [name for name in ("size", "data", "tokenizer", "steps") if getattr(self, name) is not None]
        if self.write and elsewhere:
            raise UserError(
                f"write: a preset of {self.suite} is found on its own model, text and length; leave out "
                f"--{elsewhere[0]}"
            )

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / "sweep" / f"{self.suite}_{self.size_name}_{self.name}"

    @property
    def size_name(self) -> str:
        return Path(self.size or SUITES[self.suite].model).stem


@dataclass(frozen=True)
class Trial:
    """One of a study."""

    number: int
    state: str
    """finished, diverged, pruned or running."""
    values: dict[str, Any]
    loss: float
    """Validation nats per token at the end; infinite where it did not get there."""
    tokens: int
    """Trained on, or claimed."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


class Study:
    """The trials of a sweep, as every process sees them.

    Raises:
        UserError: an unknown name, a bad space, a folder with another study.
    """

    def __init__(self, options: Search) -> None:
        self.options, suite = options, SUITES[options.suite]
        text: Any = {key: value for key in ("data", "tokenizer") if (value := getattr(options, key)) is not None}
        self.suite = replace(
            suite,
            model=options.size or suite.model,
            data=replace(suite.data, **text),
            steps=options.steps or suite.steps,
            evals=options.evals or suite.evals,
        )
        self.rows = Rows(options.folder / "rows.jsonl", options.folder)
        self.recipe, lr = _recipe(options)
        study = None
        if (options.folder / "study.db").exists():
            with self.rows.alone():
                study = self._load()
            if lr is not None and (before := study.user_attrs.get("what")):  # the preset may have been written since
                lr = before["config"]["lr"]
        self.knobs = parse(options.space, self.recipe, lr)
        for knob in self.knobs:
            for value in knob.values:
                self.config({knob.name: value})
        self.cost = self.suite.steps * self.suite.batch_size * self.suite.data.seq_len
        if self.cost > options.tokens:
            raise UserError(f"tokens: {options.tokens:,.0f} do not hold one trial of {self.cost:,}")
        self.grid = all(knob.bounds is None for knob in self.knobs)
        options.folder.mkdir(parents=True, exist_ok=True)
        with self.rows.alone():
            self._study = self._entered(study or self._load())

    def _load(self) -> optuna.Study:
        import optuna
        from sqlalchemy import URL

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        options = self.options
        pruner = optuna.pruners.MedianPruner(STARTUP) if options.prune else optuna.pruners.NopPruner()
        database = URL.create("sqlite", database=str(options.folder / "study.db"))
        storage = optuna.storages.RDBStorage(
            database.render_as_string(), engine_kwargs={"connect_args": {"timeout": 60}}
        )
        return optuna.create_study(storage=storage, study_name="sweep", pruner=pruner, load_if_exists=True)

    def _entered(self, study: optuna.Study) -> optuna.Study:
        """The study, begun if it was not; refused if it is another one."""
        options = self.options
        config, varied = self.config({}), {knob.name for knob in self.knobs}
        space = [[knob.name, knob.bounds, knob.choices] for knob in self.knobs]
        rest = json.loads(json.dumps({"prune": options.prune, "space": space}))
        before = study.user_attrs.get("what")
        if before is None:
            self._begin(study)
            study.set_user_attr("what", {"config": config.to_json(), **rest})
            return study
        changed = [(key, before[key], value) for key, value in rest.items() if before[key] != value]
        # what is varied has the preset's value, which may have been written since
        rest_of = [it for it in differences(before["config"], config) if it[0].rpartition(".")[2] not in varied]
        for key, old, new in [*changed, *rest_of]:
            raise UserError(
                f"out: {options.folder} holds a study with {key} {json.dumps(old)}, not {json.dumps(new)}; use another "
                "--out"
            )
        return study

    def _begin(self, study: optuna.Study) -> None:
        """Line up what is known to be tried: the whole grid, or points that cover the space, the recipe's own first."""
        if self.grid:
            for values in itertools.product(*(knob.choices for knob in self.knobs)):
                named = zip((knob.name for knob in self.knobs), map(json.dumps, values), strict=True)
                study.enqueue_trial(dict(named))
            return
        own = self._own()
        for params in ([] if own is None else [own]) + spread(self.knobs, STARTUP, self.options.seed):
            study.enqueue_trial(params)

    def _own(self) -> dict[str, Any] | None:
        """The recipe's own values, as optuna says them, where they are in the space."""
        own: dict[str, Any] = {}
        for knob in self.knobs:
            value = getattr(*owner_of(knob.name, self.recipe))
            if knob.bounds is not None and knob.bounds[0] <= value <= knob.bounds[1]:
                own[knob.name] = value
            elif value in knob.choices:
                own[knob.name] = json.dumps(value)
        return own if len(own) == len(self.knobs) else None

    def config(self, values: Mapping[str, Any]) -> Pretrain[Any, Any, Any]:
        """What a trial trains."""
        return self.suite.config(place(self.recipe, values), self.options.seed)

    def run(self, trial: optuna.trial.FrozenTrial) -> Run:
        config = self.config(self._values(trial))
        return Run(f"sweep {self.options.name}", self.options.size_name, self.options.name, config, trial=trial.number)

    def _values(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        return {knob.name: knob.value(trial.params[knob.name]) for knob in self.knobs}

    def wanted(self, rows: Sequence[dict[str, Any]]) -> Iterator[Run]:
        """Trials that were begun and are not finished, then new ones, for as long as there are any."""
        from optuna.trial import TrialState

        finished = {row["label"]: row for row in rows}
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            run = self.run(trial)
            if (row := finished.get(run.label)) is None:
                yield run
                continue
            loss = math.inf if row["loss"] is None else row["loss"]
            self._tell(trial.number, int(row["tokens"]), loss)
        while (trial := self._ask()) is not None:
            yield self.run(trial)

    def _tell(self, number: int, tokens: int, loss: float | None) -> None:
        """That a trial has ended, with this loss or pruned; a second process that says so too changes nothing."""
        import optuna

        with self.rows.alone():
            found = self._study.get_trials(deepcopy=False)[number]
            if found.state.is_finished():
                return
            trial = optuna.trial.Trial(self._study, found._trial_id)
            trial.set_user_attr("tokens", tokens)
            self._study.tell(trial, loss, optuna.trial.TrialState.PRUNED if loss is None else None)

    def _ask(self) -> optuna.trial.FrozenTrial | None:
        """A new trial, which then is running; None where the grid is at its end or the budget is."""
        import optuna

        with self.rows.alone():
            trials = self._study.get_trials(deepcopy=False)
            waiting = any(trial.state == optuna.trial.TrialState.WAITING for trial in trials)
            if (self.grid and not waiting) or self.spent() + self.cost > self.options.tokens:
                return None
            # by the number, so that what is drawn depends on the study and not on how often it was stopped
            sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=self.options.seed + len(trials))
            self._study.sampler = sampler
            number = self._study.ask({knob.name: knob.distribution() for knob in self.knobs}).number
            return self._study.get_trials(deepcopy=False)[number]

    def watch(self, run: Run, step: int, score: Score) -> str | None:
        """Report an evaluation to the study; why to prune the trial, if it is to be pruned."""
        import optuna

        assert run.trial is not None
        found = self._study.get_trials(deepcopy=False)[run.trial]
        if found.state.is_finished():
            return "another process has pruned this trial since it was taken up"
        trial = optuna.trial.Trial(self._study, found._trial_id)
        if step not in found.intermediate_values:  # else it was reported before the trial was resumed
            trial.report(score.loss, step)
        if step == self.suite.steps or not trial.should_prune():
            return None
        self._tell(run.trial, step * self.cost // self.suite.steps, None)
        return f"perplexity {score.perplexity:.2f} is worse than half of the trials had here; pruned"

    def trials(self) -> list[Trial]:
        """All that were begun, by number."""
        from optuna.trial import TrialState

        names = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.RUNNING: "running"}
        found = []
        for it in self._study.get_trials(deepcopy=False):
            if it.state not in names:
                continue
            loss = it.value if it.state == TrialState.COMPLETE and it.value is not None else math.inf
            state = "diverged" if it.state == TrialState.COMPLETE and not math.isfinite(loss) else names[it.state]
            tokens = it.user_attrs.get("tokens", self.cost)
            found.append(Trial(it.number, state, self._values(it), loss, tokens))
        return found

    def spent(self) -> int:
        """Tokens of all trials, those of running ones in full."""
        return sum(trial.tokens for trial in self.trials())


def _recipe(options: Search) -> tuple[Recipe, float | None]:
    """What is swept, and the learning rate of its preset, if it has one."""
    known = presets(options.suite)
    if options.name in known:
        return known[options.name], known[options.name].lr
    if options.name in methods():
        return Recipe(options.name, methods()[options.name].cls(), 1.0), None
    names = [*known, *methods()]
    raise UserError(
        f"name: unknown {options.name!r}{nearest(options.name, names)}; known: {', '.join(sorted({*names}))}"
    )
