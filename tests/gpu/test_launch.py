"""Launches on a device: the reference's steps, no waiting, one graph for all steps, nothing of the weight's size."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from batches import DECAY, LR, Run, error

import gossamer
from gossamer.optim.contract import build
from gossamer.optim.methods.adamw import AdamW
from gossamer.optim.methods.lora_pre import LoRAPre, LoRAPreStable

SHAPES = {"tall": (1024, 384), "wide": (384, 1024), "odd": (333, 1365)}  # the last at no multiple of 16 bytes
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Of weights and products after four steps: fp32's rounding times Gram matrices' condition numbers of some hundreds;
bf16's rounding of operands and weights, one in 256, some of them added up."""


def make(name: str, rank: int = 16) -> Any:
    fields: dict[str, Any] = {"rank": rank} if "rank" in gossamer.methods()[name].cls.__dataclass_fields__ else {}
    return build(name, **fields)


def launched(name: str) -> bool:
    return hasattr(gossamer.methods()[name].cls, "launch_") and make(name).can_launch(torch.empty(8, 8))


LAUNCHED = list(filter(launched, gossamer.methods()))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [4, 32, 64])
@pytest.mark.parametrize("cls", [LoRAPre, LoRAPreStable])
def test_lora_pre_launches_its_updates(cls: Any, rank: int, shape: str, dtype: torch.dtype) -> None:
    method = cls(rank=rank, eps=0.1)  # which keeps denominators from zero, where rounding is magnified
    mine, theirs = (Run(method, SHAPES[shape], dtype, device="cuda") for _ in range(2))
    for _ in range(4):
        mine.launch()
        theirs.update()
    assert max(map(error, mine.params, theirs.params)) < TOLERANCES[dtype]
    for name in "mv":
        assert max(map(error, mine.products(name), theirs.products(name))) < TOLERANCES[dtype]


def test_rank_128() -> None:
    """The largest, whose Gram matrices torch factorises."""
    mine, theirs = (Run(LoRAPreStable(rank=128, eps=0.1), (768, 512), torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(4):
        mine.launch()
        theirs.update()
    assert max(map(error, mine.params, theirs.params)) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("shape", [(), (4097,), (1000, 768)], ids=str)
def test_adamw_launches_its_updates(shape: tuple[int, ...]) -> None:
    """fp32, a few roundings a step."""
    mine, theirs = (Run(AdamW(), shape, torch.float32, device="cuda") for _ in range(2))
    for _ in range(5):
        mine.launch()
        theirs.update()
    assert max(map(error, mine.params, theirs.params)) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", LAUNCHED)
def test_nothing_waits_for_the_device(name: str, dtype: torch.dtype) -> None:
    run = Run(make(name), (256, 384), dtype, device="cuda")
    for _ in range(2):
        run.launch()  # compiles
    batch = run.batch(rounding="stochastic")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.method.launch_(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# the others draw random numbers at every step, from a generator that a graph does not know
@pytest.mark.parametrize("name", ["adamw", "lora-pre", "lora-pre-stable"])
def test_a_graph_of_one_step_is_every_step(name: str) -> None:
    """Captured once and replayed, with the learning rate, the counters and the gradients changed in place: bit for bit
    the launches one by one, which add in a fixed order."""
    dtype, shape = torch.bfloat16, (256, 384)
    one, many = (Run(make(name), shape, dtype, device="cuda") for _ in range(2))
    lr = torch.tensor(LR, device="cuda")
    held = [torch.empty_like(p) for p in many.params]
    options: dict[str, Any] = {"rounding": "stochastic", "lr": lr}

    def hold() -> list[torch.Tensor]:
        for mine, new in zip(held, one.gradients(), strict=True):
            mine.copy_(new)
        return held

    for _ in range(2):
        one.launch(rounding="stochastic", lr=lr)
        many.launch(hold(), **options)
    graph = torch.cuda.CUDAGraph()
    batch = many.batch(held, **options)
    for state in many.states:
        for counter in ("step", "m_step", "v_step"):
            state[counter] -= 1  # the graph counts
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for state in many.states:
            for counter in ("step", "m_step", "v_step"):
                state[counter] += 1
        many.method.launch_(batch)
    for step in range(3):
        lr.fill_(LR / (step + 1))
        one.launch(rounding="stochastic", lr=lr)
        hold()
        graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, one.params, many.params))
    for mine, theirs in zip(one.states, many.states, strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", [name for name in LAUNCHED if name != "adamw"])
def test_nothing_of_the_weights_size_is_made(name: str) -> None:
    """At 4096 x 4096, thin factors of rank 4, copied and padded to 16, are each less than a sixteenth of the weight."""
    method = make(name, rank=4)
    run = Run(method, (4096, 4096), torch.bfloat16, layers=1, device="cuda")
    for _ in range(2):
        run.launch()
    batch = run.batch()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    method.launch_(batch)
    assert torch.cuda.max_memory_allocated() - before < run.params[0].nbytes / 2


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_optimizer_launches(name: str) -> None:
    """What `plan` says, and weights that move by about the learning rate and stay finite."""
    model = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 96)).to("cuda", torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    opt = gossamer.Optimizer(gossamer.param_groups(model, make(name)), lr=LR, weight_decay=DECAY)
    assert {row.implementation for row in opt.plan()} == {"kernels"}
    for _ in range(3):
        model(torch.randn(8, 96, device="cuda", dtype=torch.bfloat16)).square().mean().backward()
        opt.step()
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all() and 0 < float((new - old).float().abs().mean()) < 10 * LR
