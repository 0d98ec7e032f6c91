"""`transformers.Trainer`, TRL's `SFTTrainer`, and peft's adapters under them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import gossamer
from gossamer import UserError
from gossamer.integrations import for_trainer
from tests.integrations.conftest import every_method, llama, one_each, rows, same, same_state

STEPS = 6


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(**{**given, **options})


def trained(folder: Path, model: nn.Module, method: Any, resume: str | None = None, **options: Any) -> Trainer:
    groups = options.pop("groups", {})
    args = arguments(folder, **options)
    trainer = Trainer(
        model=model, args=args, train_dataset=rows(), optimizer_cls_and_kwargs=for_trainer(args, method, **groups)
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every registered method trains a matrix; accumulation, clipping, decay, a schedule and dropout are on."""
    methods, layers = every_method()
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = llama(dtype, num_hidden_layers=layers)
        model.config.attention_dropout = 0.1
        options = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "weight_decay": 0.1}
        groups = {"rules": one_each(model, methods), "fallback_lr": 2e-2}
        runs.append(trained(tmp_path, model, gossamer.AdamW(), resume, groups=groups, **options))
    whole, resumed = runs
    assert resumed.state.global_step == STEPS and len(whole.optimizer.optimizer.state) == len(list(model.parameters()))
    same(whole.model, resumed.model)
    same_state(whole.optimizer, resumed.optimizer)
