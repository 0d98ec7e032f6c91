"""What the fine-tuning papers' runs have in common: a plan that can be read first, a training run, its evaluation."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from gossamer.bench import Evaluate, evaluate_model
from gossamer.errors import UserError
from gossamer.evaluate import token_loss
from gossamer.layers import adapt
from gossamer.memory import activations, meta_model, predict
from gossamer.train import Finetune, finetune

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Run:
    """One cell of a table."""

    config: Finetune[Any, Any]
    evaluation: Evaluate
    """Of the last checkpoint; its `model` and `out` are filled in."""
    shape: PretrainedConfig | str
    """The model's, so that its memory can be told without its weights."""
    examples: int
    """Trained on, if the dataset has as many."""


@dataclass(frozen=True)
class Options:
    """Start a run, or say what it would be."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """One run for each."""
    model: str | None = None
    """A folder, or another hub name than the paper's."""
    data: str | None = None
    """A local copy of the training data."""
    test_data: tuple[str, ...] = ()
    """Local copies of the evaluation's data, one for each task."""
    out: Path = Path("runs/papers")
    """Folder of the runs."""
    examples: int | None = None
    """Instead of the paper's, to try the machinery; then the default number is held out."""
    limit: int | None = None
    """Questions of a task, likewise."""
    max_new_tokens: int | None = None
    """Tokens of an answer, likewise."""
    device: str = "auto"
    """auto, cpu or cuda."""
    allow_code_execution: bool = False
    """Run the programs that the model writes (HumanEval)."""
    dry_run: bool = False
    """Print the plan, memory and token counts, and train nothing."""


def plan(run: Run) -> dict[str, Any]:
    """What a run resolves to: its configuration, bytes of memory, and at most how many tokens; nothing is loaded."""
    config = run.config
    model = meta_model(run.shape, None, config.width)
    if config.adapter.kind is not None:
        adapt(model, config.adapter)
    memory = predict(model, config.method, fallback=config.fallback, implementation="auto")
    length, rows = config.data.max_length or 512, config.micro_batch_size or config.batch_size
    kept = activations(model, rows, length, config.checkpointing, loss=token_loss)
    epochs = config.epochs or 1.0
    steps = round(epochs * run.examples / config.batch_size)
    return {
        "config": config.to_json(),
        "evaluation": {name: getattr(run.evaluation, name) for name in ("tasks", "template", "max_new_tokens")},
        "parameters": memory.parameters,
        "trained": [f"{line.group}: {line.method}, {line.parameters:,}" for line in memory.lines],
        "bytes": {
            **{name: getattr(memory, name) for name in ("weights", "gradients", "state")},
            "activations": kept,
            "step": memory.step.transient,
        },
        "steps": steps,
        "token_slots_at_most": steps * config.batch_size * length,
    }


def start(run: Run, options: Options) -> list[dict[str, Any]]:
    """Train and evaluate once a seed, or print the plan; returns a row for each evaluation.

    A run that was stopped goes on; rows go to `results.jsonl` in the run's folder.
    """
    exam = replace(run.evaluation, data=options.test_data)
    examples = options.examples or run.examples
    held_out = run.config.data.valid_examples if options.examples is None else None
    data = replace(run.config.data, data=options.data, examples=examples, valid_examples=held_out)
    config = replace(run.config, model=options.model or run.config.model, data=data, device=options.device, resume=True)
    if options.dry_run:
        said = plan(replace(run, config=config, examples=examples))
        print(json.dumps(said, indent=2))
        total = sum(said["bytes"].values())
        print(f"{total / 2**30:.2f} GiB in all; {said['steps']:,} steps; seeds {', '.join(map(str, options.seeds))}")
        return []
    needs_code = [task for task in exam.tasks if task in ("humaneval", "mbpp")]
    if needs_code and not options.allow_code_execution:  # better now than after the training
        raise UserError(f"{needs_code[0]} runs programs that the model writes; --allow-code-execution permits it")
    rows = []
    for seed in options.seeds:
        own = replace(config, seed=seed, out=options.out / run.config.out.name / f"seed-{seed}")
        finetune(own, label=f"{run.config.out.name} seed {seed}")
        last = sorted((own.out / "checkpoints").iterdir())[-1]
        scored = evaluate_model(
            replace(
                exam,
                model=str(last),
                out=own.out,
                limit=options.limit,
                max_new_tokens=options.max_new_tokens or exam.max_new_tokens,
                device=options.device,
                allow_code_execution=options.allow_code_execution,
            )
        )
        for row in scored:
            print(f"seed {seed}: {row['task']}: {row['scores']}")
        rows += scored
    return rows


C = TypeVar("C", bound=Options)


def command(cell: type[C], make: Callable[[C], Run], module: str, argv: list[str] | None) -> int:
    """The command line of a paper's runs; returns the exit code."""
    options = tyro.cli(cell, args=argv)
    try:
        start(make(options), options)
    except UserError as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2
    return 0


def known(name: str, names: Sequence[str], what: str) -> None:
    """Refuse a name that is not among `names`."""
    if name not in names:
        raise UserError(f"{what}: unknown {name!r}; known: {', '.join(names)}")
