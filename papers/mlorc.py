"""MLorc: its fine-tuning runs as the authors' repository starts them.

    python -m papers.mlorc --task math --method mlorc --dry-run               # the plan, memory, tokens
    python -m papers.mlorc --task math --method mlorc                         # three seeds, GSM8K
    python -m papers.mlorc --task code --method mlorc --allow-code-execution  # HumanEval

The paper's tables could not be read, so there is no published number here to compare with. It claims, say notes on it,
that rank 4 matches or exceeds full fine-tuning and is better than other memory-efficient methods throughout, that its
memory is like LoRA's, and that its steps take less time than GaLore's. Of the learning rates only those in `RATES` are
in the repository; others have to be named. Departures: the authors sample one answer (temperature 0.8 and 0.1), here
decoding is greedy; their MLorc leaves one-dimensional parameters untrained and compresses the embedding's moments, here
AdamW trains all that is no hidden matrix.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gossamer
from gossamer.bench import Evaluate
from gossamer.data import TaskConfig
from gossamer.errors import UserError
from gossamer.layers import Adapter
from gossamer.models import resolve_config
from gossamer.train import Finetune
from papers.finetuning import Options, Run, command, known

RATES = {("math", "mlorc"): 1e-4, ("math", "mlorc-lion"): 5e-5, ("code", "mlorc"): 8e-5}
"""Learning rates by task and method, from the committed scripts."""

EXAMPLES, HELD_OUT = 10_000, 1_000
METHODS: dict[str, tuple[Any, Adapter]] = {
    "mlorc": (gossamer.MLorc(rank=4), Adapter()),
    "mlorc-lion": (gossamer.MLorcLion(rank=4), Adapter()),
    "adamw": (gossamer.AdamW(), Adapter()),
    "lion": (gossamer.Lion(betas=(0.95, 0.98)), Adapter()),
    "galore": (gossamer.GaLore(rank=4, update_proj_gap=300), Adapter()),
    "ldadam": (gossamer.LDAdam(rank=4, betas=(0.908, 0.98)), Adapter()),
    "lora": (gossamer.AdamW(), Adapter("lora", rank=4, alpha=16, dropout=0.1)),
    "dora": (gossamer.AdamW(), Adapter("dora", rank=4, alpha=16, dropout=0.1)),
    "gossamer": (gossamer.Gossamer(rank=4), Adapter()),
}
TASKS = {
    "math": (TaskConfig("metamath"), Evaluate(tasks=("gsm8k",), template="alpaca", max_new_tokens=512)),
    "code": (TaskConfig("codefeedback"), Evaluate(tasks=("humaneval",), template="alpaca", max_new_tokens=512)),
}


def run(task: str, method: str, lr: float | None = None) -> Run:
    """Two epochs of 10,000 examples on Llama-2-7B-chat, and one evaluation."""
    known(task, [*TASKS], "task")
    known(method, [*METHODS], "method")
    if lr is None and (task, method) not in RATES:
        raise UserError(f"lr: the repository has no learning rate for {method} on {task}; name one")
    rule, adapter = METHODS[method]
    data, exam = TASKS[task]
    config = Finetune(
        rule,
        model="meta-llama/Llama-2-7b-chat-hf",
        data=TaskConfig(data.task, examples=EXAMPLES, valid_examples=HELD_OUT, max_length=1024),
        adapter=adapter,
        out=Path(f"mlorc-{task}-{method}"),
        epochs=2.0,
        batch_size=32,
        micro_batch_size=1,
        lr=lr or RATES[task, method],
        warmup=0.03,
        decay="linear",
        min_lr_ratio=0.0,
        clip=0.0,
        dtype="bfloat16",
        checkpointing=True,
        save_every=100,
        keep_last=1,
    )
    return Run(config, exam, resolve_config("7b"), EXAMPLES)


@dataclass(frozen=True)
class Cell(Options):
    """A run of MLorc's paper."""

    task: str = "math"
    """math or code."""
    method: str = "mlorc"
    """mlorc, mlorc-lion, adamw, lion, galore, ldadam, lora, dora or gossamer."""
    lr: float | None = None
    """Learning rate; None: the repository's, if it has one."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    return command(Cell, lambda cell: run(cell.task, cell.method, cell.lr), "papers.mlorc", argv)


if __name__ == "__main__":
    sys.exit(main())
