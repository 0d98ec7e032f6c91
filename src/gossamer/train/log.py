"""What a run says: a JSONL log always, a progress bar or plain lines for the reader, trackers if asked for."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gossamer.errors import UserError
from gossamer.memory import Memory
from gossamer.train import jsonl


class RunLog:
    """Append events to `<folder>/log.jsonl`, one JSON object a line; numbers that are not finite become null."""

    def __init__(self, folder: Path, *, resume_step: int | None) -> None:
        """With `resume_step`, what the log says about later steps is cut off: they are about to happen again."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        kept = _until(self.path, resume_step) if resume_step is not None and self.path.exists() else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(event) + "\n" for event in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a")

    def write(self, event: str, **fields: Any) -> None:
        self._file.write(json.dumps(_finite({"event": event, **fields})) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _until(path: Path, step: int) -> list[dict[str, Any]]:
    kept = []
    for number, event in jsonl.read(path):
        if not isinstance(event.get("event"), str) or not isinstance(event.get("step", 0), int):
            raise UserError(f"{path}, line {number}: not an event of a run")
        if event["event"] != "end" and event.get("step", 0) <= step:
            kept.append(event)
    return kept


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value


class Display:
    """A rich progress bar on a terminal, a plain line now and then elsewhere, nothing where `quiet`."""

    def __init__(self, title: str, steps: int, *, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._title, self._steps, self._every = title, steps, max(1, steps // 20)
        self._bar: Progress | None = None

    def start(self, done: int) -> None:
        """Begin to count, `done` steps being there already."""
        self._started, self._done = time.monotonic(), done
        if self._console.is_terminal and not self._console.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[numbers]}"), console=self._console)
            self._task = self._bar.add_task(self._title, total=self._steps, completed=done, numbers="")
            self._bar.start()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, loss: float, tokens_per_second: float, memory: int) -> None:
        numbers = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {memory / 2**20:,.0f} MiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step == self._steps:
            left = (time.monotonic() - self._started) / (step - self._done) * (self._steps - step)
            self.say(f"step {step}/{self._steps}  {numbers}  {left:.0f} s left")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


Tracker = Callable[[int, dict[str, float]], None]


def start_trackers(names: Sequence[str], folder: Path, config: dict[str, Any]) -> list[Tracker]:
    """One function of (step, numbers) for each name."""
    return [_TRACKERS[name](folder, config) for name in names]


def _wandb(folder: Path, config: dict[str, Any]) -> Tracker:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("trackers: wandb is not installed; pip install wandb") from error
    run = wandb.init(project="gossamer", name=folder.name, dir=str(folder), config=config)
    return lambda step, numbers: run.log(numbers, step=step)


def _tensorboard(folder: Path, config: dict[str, Any]) -> Tracker:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise UserError("trackers: tensorboard is not installed; pip install tensorboard") from error
    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", json.dumps(config))

    def log(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


_TRACKERS = {"wandb": _wandb, "tensorboard": _tensorboard}


class Journal:
    """What a run's main process writes down: its log, and the numbers that trackers get."""

    def __init__(
        self, folder: Path, trackers: Sequence[str], config: dict[str, Any], *, resume_step: int | None
    ) -> None:
        self._log = RunLog(folder, resume_step=resume_step)
        self._trackers = start_trackers(trackers, folder, config)

    def write(self, event: str, step: int, **fields: Any) -> None:
        self._log.write(event, step=step, **fields)
        numbers = {f"{event}/{key}": float(v) for key, v in fields.items() if isinstance(v, (int, float))}
        for tracker in self._trackers:
            tracker(step, numbers)

    def close(self) -> None:
        self._log.close()


def what_runs(memory: Memory) -> dict[str, Any]:
    """The start event's facts that are not the run's own choice: time, machine, libraries, sizes."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
        "parameters": memory.parameters,
        "memory": {name: getattr(memory, name) for name in ("weights", "gradients", "state", "hidden_state")},
    }


def versions() -> dict[str, str]:
    """What ran: Python and the libraries that decide the numbers."""
    names = ("gossamer", "torch", "numpy", "transformers", "tokenizers")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def hardware() -> dict[str, Any]:
    """Where it ran."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def commit() -> str | None:
    """The commit of the checkout this package lies in, with "+" if it has changes; None outside one."""
    here = Path(__file__).parent.parent  # the whole package: all of it makes the numbers
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno", "."], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + "+" * bool(dirty.stdout.strip()) if head.returncode == 0 else None


def memory_in_use(device: torch.device) -> int:
    """Bytes: the allocator's peak on an accelerator, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
