"""Running what a table or a suite asks for: a row a finished run, and no run twice, however many processes work."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from gossamer.bench.claim import Run
from gossamer.bench.probe import probe
from gossamer.bench.suite import Bench
from gossamer.distributed import World, of_main
from gossamer.errors import Diverged, Pruned
from gossamer.evaluate import Score
from gossamer.restarts import in_words
from gossamer.train import Pretrain, jsonl, pretrain
from gossamer.train.config import same_run

POINTS = 100
"""Of a curve of training losses in a row, at most."""
PATIENCE = 2.0
"""Seconds between two looks at what other processes have finished."""

Wanted = Callable[[Sequence[dict[str, Any]]], Iterable[Run]]
"""Of the rows that there are, the runs that are to be made, the next one first, asked for one by one; what has been
found may ask for more."""
Watch = Callable[[Run, int, Score], str | None]
"""Told of an evaluation, by the step after which it was made; may say why the run is not worth going on with."""


class Rows:
    """A file of rows to which several processes add, each by runs that it alone holds.

    A held run is a locked file; the lock goes with its process, however that ends.
    """

    def __init__(self, path: Path, runs: Path) -> None:
        self.path, self.runs = path, runs
        self._held: dict[str, TextIO] = {}

    def read(self) -> list[dict[str, Any]]:
        """All of them, the newest last. A line torn by a kill is passed over; its run is made again."""
        return [row for _, row in jsonl.read(self.path)] if self.path.exists() else []

    def append(self, row: dict[str, Any]) -> None:
        with self.alone() as file:
            jsonl.mend(self.path)
            file.write(json.dumps(row) + "\n")

    def take(self, wanted: Wanted) -> tuple[Run | None, bool]:
        """The first run that is wanted, not there and held by nobody, held from now on; and whether any is missing.

        One may be missing and none be free: others make the last ones, and what they find may ask for more.
        """
        rows, missing = self.read(), False
        for run in wanted(rows):
            if _is_there(run, rows):
                continue
            missing = True
            if self._hold(run):
                if not _is_there(run, self.read()):  # may have been finished since
                    return run, True
                self.release(run)
        return None, missing

    def release(self, run: Run) -> None:
        file = self._held.pop(run.label)
        Path(file.name).unlink()
        file.close()

    def _hold(self, run: Run) -> bool:
        self.runs.mkdir(parents=True, exist_ok=True)
        path = self.runs / f"{run.folder}.lock"
        file = path.open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
        except OSError:
            held = False
        if held:
            self._held[run.label] = file
        else:
            file.close()
        return held

    @contextmanager
    def alone(self) -> Iterator[TextIO]:
        """The file, to append to; what no two processes may do at the same time, to it or beside it, is done within."""
        with self.path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def work(wanted: Wanted, rows: Rows, *, device: str, rounds: int, keep: bool, watch: Watch | None = None) -> None:
    """Make what is wanted, run by run; under `torchrun` all processes make each together.

    A run that was stopped goes on; one that diverged is a row without a perplexity; one that `watch` ended is no row.

    Args:
        rounds: of timed steps. keep: checkpoints of finished runs.
    """
    rows.path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        run, missing = of_main(device, lambda _: rows.take(wanted))
        if not missing:
            return
        if run is None:
            time.sleep(PATIENCE)
            continue
        config = replace(run.config, out=rows.runs / run.folder, resume=True, device=device)
        try:
            pretrain(config, label=run.label, watch=watch and partial(watch, run))
        except Pruned:
            of_main(device, partial(_drop, rows, run, config))
        except Diverged as error:
            of_main(device, partial(_finish, rows, run, config, rounds, keep, str(error)))
        else:
            of_main(device, partial(_finish, rows, run, config, rounds, keep, None))


def _finish(
    rows: Rows,
    run: Run,
    config: Pretrain[Any, Any, Any],
    rounds: int,
    keep: bool,
    diverged: str | None,
    world: World,
) -> None:
    rows.append(_row(run, config, probe(config, world.device, rounds=rounds), diverged, rows.path.parent))
    if not keep:
        shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
    rows.release(run)


def _drop(rows: Rows, run: Run, config: Pretrain[Any, Any, Any], world: World) -> None:
    shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
    rows.release(run)


def _is_there(run: Run, rows: Iterable[dict[str, Any]]) -> bool:
    return any(row["label"] == run.label and same_run(row["config"], run.config) for row in rows)


def _row(
    run: Run, config: Pretrain[Any, Any, Any], probed: dict[str, Any], diverged: str | None, folder: Path
) -> dict[str, Any]:
    log = config.out / "log.jsonl"
    events = [event for _, event in jsonl.read(log)]
    begun, last = events[0], events[-1]
    of = {kind: [event for event in events if event["event"] == kind] for kind in ("train", "eval", "restart")}
    tokens = of["train"][-1]["tokens"] if of["train"] else 0
    seconds = of["train"][-1]["seconds"] if of["train"] else 0.0
    score = {} if diverged else last
    return {
        "table": run.table,
        "label": run.label,
        "size": run.size,
        "method": run.method,
        "lr": config.lr,
        "fallback_lr": config.fallback_lr,
        "seed": config.seed,
        "steps": config.steps,
        "tokens": tokens,
        "perplexity": score.get("perplexity"),
        "legacy_perplexity": score.get("legacy_perplexity"),
        "loss": score.get("loss"),
        "eval_tokens": score.get("eval_tokens"),
        "diverged": diverged,
        **{f"{part}_bytes": begun["memory"][part] for part in ("state", "hidden_state", "weights")},
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        **probed,
        "curve": {
            "train": _means([(event["step"], event["loss"]) for event in of["train"]]),
            "eval": [(event["step"], event["loss"]) for event in of["eval"]],
            "restarts": [(event["step"], in_words(event)) for event in of["restart"]],
        },
        "log": os.path.relpath(log, folder),
        **{key: begun[key] for key in ("config", "versions", "hardware", "commit", "time")},
    }


def _means(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `POINTS` of them: means of equal stretches, each at its last step."""
    length = -(-len(points) // POINTS) or 1
    stretches = [points[index : index + length] for index in range(0, len(points), length)]
    return [(stretch[-1][0], fmean(loss for _, loss in stretch)) for stretch in stretches]


def bench(options: Bench) -> Path:
    """Train what is missing of a suite, append its rows to `<folder>/rows.jsonl`, and return the folder."""
    folder, runs = options.folder, options.runs()
    rows = Rows(folder / "rows.jsonl", folder)
    work(lambda _: runs, rows, device="auto", rounds=options.rounds, keep=True)
    return folder
