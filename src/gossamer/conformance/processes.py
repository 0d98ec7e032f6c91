"""The facts that need two processes: a model sharded by FSDP2, on the CPU, against the same model in one process.

Both processes see the same batch, so that averaging their gradients changes no bit, and what differs is the optimizer.
The weights are float64 where the optimizer takes that.
One pair of processes tries all of them; where one fails, the rest is tried by another pair.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

from gossamer.conformance.subject import NotApplicable, Subject, fact
from gossamer.conformance.trial import Model, precise, require_close, require_tensors, train, uneven, weights

TIMEOUT = 120.0
"""Seconds for a pair of processes, most of which they spend importing."""
TASKS = ("even", "half", "uneven")


class ProcessFailed(Exception):
    """What one of the processes said, or that it said nothing."""


@fact
def fsdp2_even(subject: Subject) -> str:
    """FSDP2 over two processes with equal shards ends where one process does."""
    return _as_one(subject, "even", precise(Model(), subject))


@fact
def fsdp2_uneven(subject: Subject) -> str:
    """The same with shards of different size, and an empty one."""
    return _as_one(subject, "uneven", precise(uneven(), subject))


@fact
def fsdp2_to_one(subject: Subject) -> str:
    """What two processes saved with `full_state_dict=True`, one process loads and goes on as if it had been one."""
    model, straight = precise(Model(), subject), precise(Model(), subject)
    start = weights(model)
    if isinstance(_tried(subject)["even"], ProcessFailed):
        raise NotApplicable("two processes cannot step (fsdp2-even)")
    half: Any = _result(subject, "half")
    require_tensors(half["optimizer"])
    model.load_state_dict(half["model"])
    optimizer = subject.build(model)
    set_optimizer_state_dict(model, optimizer, half["optimizer"], options=StateDictOptions(full_state_dict=True))
    train(model, optimizer, range(2, 4))
    train(straight, subject.build(straight), range(4))
    return require_close(weights(model), weights(straight), start, "2 steps on two processes + 2 on one, and 4 on one")


def _as_one(subject: Subject, task: str, model: Model) -> str:
    start = weights(model)
    train(model, subject.build(model), range(4))
    sharded: dict[str, Tensor] = _result(subject, task)
    return require_close(sharded, weights(model), start, "two processes and one")


def _result(subject: Subject, task: str) -> Any:
    result = _tried(subject)[task]
    if isinstance(result, ProcessFailed):
        raise AssertionError(str(result))
    return result


def _tried(subject: Subject) -> dict[str, Any]:
    return _try_all(subject.name, json.dumps(dict(subject.arguments)))


@cache
def _try_all(name: str, arguments: str) -> dict[str, Any]:
    """By task, what it returned or a `ProcessFailed`."""
    results: dict[str, Any] = {}
    while left := [task for task in TASKS if task not in results]:
        with tempfile.TemporaryDirectory() as folder:
            failure = _run_pair(Path(folder), name, arguments, left)
            for task in left:
                if not (Path(folder) / f"0-{task}.pt").exists() or not (Path(folder) / f"1-{task}.pt").exists():
                    results[task] = failure
                    if task == "even":
                        results["half"] = failure
                    break
                # written by this very code a moment ago; an optimizer's state may hold objects
                results[task] = torch.load(Path(folder) / f"0-{task}.pt", weights_only=False)
    return results


def _run_pair(folder: Path, name: str, arguments: str, tasks: list[str]) -> ProcessFailed:
    """Have two processes write what each task returns into `folder`; the failure is of the first that is not there."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path), "OMP_NUM_THREADS": "1"}
    children = []
    for rank in range(2):
        argv = [sys.executable, "-m", "gossamer.conformance.child", str(rank), str(folder), name, arguments, *tasks]
        with (folder / f"{rank}.out").open("w") as out:
            children.append(subprocess.Popen(argv, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment))
    try:
        begun = time.monotonic()
        while (codes := [child.poll() for child in children]) != [0, 0]:
            if any(codes):  # the other one waits for it in vain
                return ProcessFailed(_said(folder, codes))
            if time.monotonic() - begun > TIMEOUT:
                return ProcessFailed(f"two processes do not end within {TIMEOUT:.0f} s")
            time.sleep(0.05)
        return ProcessFailed("two processes ended well without a result")
    finally:
        for child in children:
            child.kill()
            child.wait()


def _said(folder: Path, codes: Sequence[int | None]) -> str:
    """The last line of a process that was killed or died, else the error of the one that failed first.

    Where one dies, the other may be as quick to raise that the connection is closed: that is not the reason.
    """
    for rank, code in enumerate(codes):
        if code and not (folder / f"{rank}.error").exists():
            last = [line for line in (folder / f"{rank}.out").read_text().splitlines() if line.strip()]
            return f"a process died with code {code}: {last[-1].strip() if last else 'it said nothing'}"
    return min(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns).read_text()
