"""Tasks of EleutherAI's `lm-eval`, through its own interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.errors import UserError, first_line, nearest


@dataclass(frozen=True)
class HarnessResult:
    """What `lm-eval` found."""

    metrics: dict[str, float]
    """By `task/metric,filter`."""
    samples: list[dict[str, Any]]
    versions: dict[str, Any]
    """Of the tasks, and of the library."""


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None,
    batch_size: int,
    num_fewshot: int | None,
    limit: int | None,
    seed: int = 0,
) -> HarnessResult:
    """Score `model` on tasks by their names.

    Args:
        folder: of one's own tasks' YAML files; None: the library's tasks.
        num_fewshot: examples before each question; None: as the task says.

    Raises:
        UserError: the library is not installed, a task it does not know, data that it cannot get.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("lm-eval is not installed; pip install 'gossamer[eval]'") from error
    manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=folder is None)
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(f"task: lm-eval knows no {name!r}{nearest(name, manager.all_tasks)}")
    try:
        score: Any = lm_eval.simple_evaluate  # which its stubs take for another function
        found = score(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),  # pyright: ignore
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except Exception as error:  # a task's own files, data sets, metrics: anything may be amiss
        raise UserError(f"lm-eval: {', '.join(tasks)}: {first_line(error)[:200]}") from error
    metrics = {
        f"{task}/{name}": float(value)
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, int | float) and "stderr" not in name and name != "sample_len"
    }
    samples = [{"task": task, **sample} for task, its in found["samples"].items() for sample in its]
    return HarnessResult(metrics, samples, {**found["versions"], "lm_eval": lm_eval.__version__})
