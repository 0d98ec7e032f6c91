"""accelerate: a loop of its own, and the sharding (FSDP2) that it and `transformers.Trainer` do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from torch import nn
from torch.utils.data import DataLoader

import gossamer
from tests.integrations.conftest import every_method, llama, one_each, rows, same, same_state

STEPS, HALF, ACCUMULATE = 6, 3, 2


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """accelerate's state is shared by all its objects in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(folder: Path, dtype: torch.dtype, resume: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The whole run, saved in the middle, or its second half."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    methods, layers = every_method()
    model = llama(dtype, num_hidden_layers=layers)
    groups = gossamer.param_groups(model, gossamer.AdamW(), rules=one_each(model, methods))
    opt = gossamer.Optimizer(groups, lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, STEPS)
    torch.manual_seed(2)
    # a loader draws a number whenever it starts; not from the stream that dropout continues
    loader = DataLoader(rows(), batch_size=2, generator=torch.Generator())
    model, opt, schedule, data = accelerator.prepare(model, opt, schedule, loader)
    done = 0
    if resume:
        accelerator.load_state(str(folder))
        data, done = accelerator.skip_first_batches(data, HALF * ACCUMULATE), HALF
    for batch in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            schedule.step()
            opt.zero_grad()
        if accelerator.sync_gradients:
            done += 1
            if done == HALF and not resume:
                accelerator.save_state(str(folder))
    assert done == STEPS
    return accelerator.unwrap_model(model), opt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    (whole, opt), (resumed, other) = (trained(tmp_path, dtype, resume) for resume in (False, True))
    same(whole, resumed)
    same_state(opt, other)
    counts = [int(state["step"]) for state in opt.state.values()]
    assert counts == [STEPS] * len(list(whole.parameters()))  # once an accumulated gradient


def test_parameters_may_be_replaced_before_the_first_step() -> None:
    """accelerate shards a model (FSDP2) after the optimizer was made, and gives that the new parameters."""
    results = []
    for switch in (False, True):
        model = llama(attention_dropout=0.0)
        opt = gossamer.Optimizer(gossamer.param_groups(model, gossamer.LoRAPre(rank=4)), lr=1e-2)
        if switch:
            old = {name: param.data_ptr() for name, param in model.named_parameters()}
            for group in opt.param_groups:  # as accelerate does, so that the old ones can be freed
                for i, param in enumerate(group["params"]):
                    group["params"][i] = torch.empty(1)
                    group["params"][i].data_ptr = param.data_ptr()
            replacement = llama(attention_dropout=0.0)
            new = dict(replacement.named_parameters())
            fsdp2_switch_optimizer_parameters(opt, {old[name]: new[name] for name in old})
            model = replacement
        for row in rows(3):
            loss = model(**{key: value[None] for key, value in row.items()}).loss
            loss.backward()
            opt.step()
            opt.zero_grad()
        results.append((model, opt))
    (whole, opt), (switched, other) = results
    same(whole, switched)
    same_state(opt, other)
    assert opt.plan() == other.plan()
