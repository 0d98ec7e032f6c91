"""Restarts on two processes: every one ends with the same bits, and a sharded model stays sharded.

The processes run this same file, from the bottom.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import environment, finish, free_port, on, start
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gossamer import layers
from gossamer.data import DataConfig
from gossamer.layers import PARAMETRIZATIONS, FactoredLinear
from gossamer.optim.contract import build
from gossamer.restarts import Restarts
from gossamer.train import Pretrain, pretrain

CHILD = Path(__file__).parents[1] / "cli" / "child.py"
NAMES = list(PARAMETRIZATIONS)
SHAPES = {"tall": (11, 5), "wide": (5, 11), "square": (7, 7)}
"""No side is even: two processes have rows of different number."""

State = dict[str, Tensor]


def wrapped(name: str, shape: tuple[int, int], dtype: torch.dtype) -> FactoredLinear:
    """A layer of rank 3, whose factors have three rows, in the middle of training."""
    cls = PARAMETRIZATIONS[name]
    fields = {"rank": 3, "alpha": 1.5, "density": 0.3}
    parametrization: Any = cls(**{key: fields[key] for key in fields if key in cls.__dataclass_fields__})
    draw = torch.Generator().manual_seed(4)
    linear = nn.Linear(shape[1], shape[0], bias=True, dtype=dtype)
    with torch.no_grad():
        for param in linear.parameters():
            param.copy_(torch.randn(param.shape, generator=draw))
        module = parametrization.wrap(linear, torch.Generator().manual_seed(0))
        for factor in (module.B, module.A):
            factor.copy_(torch.randn(factor.shape, generator=draw))
    return module


@torch.no_grad()
def step_and_restart(module: FactoredLinear, error: float = 0.0) -> float:
    """What an optimizer might do, with this process's rounding error, and the restart; returns the reported change."""
    module.remember()
    for factor in (module.B, module.A):
        factor.mul_(1.25 + error)
        factor.add_(0.5)
    return float(module.restart(torch.Generator().manual_seed(7)).change)


def expected(name: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[State, float]:
    """The same in one process."""
    module = wrapped(name, shape, dtype)
    change = step_and_restart(module)
    return {key: value.clone() for key, value in module.state_dict().items()}, change


# ---- what the processes do -------------------------------------------------------------------------------------------


def replicated(rank: int) -> dict[str, Any]:
    """Each has the whole layer; the second one's rounding differs."""
    results = {}
    for name in NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            module = wrapped(name, (11, 5), dtype)
            step_and_restart(module, error=0.01 * rank)
            results[f"{name} {dtype}"] = module.state_dict()
    return results


def sharded(rank: int) -> dict[str, Any]:
    """Each has a part of every parameter."""
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for name in NAMES:
        for kind, shape in SHAPES.items():
            for dtype in (torch.float32, torch.bfloat16):
                model = nn.Sequential(wrapped(name, shape, dtype))
                fully_shard(model, mesh=mesh)
                (module,) = model
                assert isinstance(module, FactoredLinear) and isinstance(module.B, DTensor)
                placements = {key: p.placements for key, p in model.named_parameters() if isinstance(p, DTensor)}
                local = module.B.to_local().shape[0]
                change = step_and_restart(module)
                after = {key: p.placements for key, p in model.named_parameters() if isinstance(p, DTensor)}
                assert placements == after and len(after) == len(list(model.parameters()))
                assert module.B.to_local().shape[0] == local == (shape[0] + 1 - rank) // 2
                state = module.state_dict()
                full = {key: v.full_tensor() if isinstance(v, DTensor) else v for key, v in state.items()}
                results[f"{name} {kind} {dtype}"] = full, change
    return results


def merged(rank: int) -> dict[str, Any]:
    """The dense weight of a sharded layer, and what the layer computes."""
    mesh, results = init_device_mesh("cpu", (2,)), {}
    for name in NAMES:
        model = nn.Sequential(wrapped(name, (11, 5), torch.float32))
        fully_shard(model, mesh=mesh)
        y = model(torch.ones(2, 5))
        y.sum().backward()
        grads = {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None}
        results[name] = y.detach(), grads, layers.dense_state_dict(model)["0.weight"]
    return results


# ---- what comes of it ------------------------------------------------------------------------------------------------


def on_two(work: Callable[[int], dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What `work` returned in each of two processes."""
    return on(2, Path(__file__), work.__name__, folder)


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


def test_replicas_end_with_the_first_ones_bits(tmp_path: Path) -> None:
    first, second = on_two(replicated, tmp_path)
    for name in NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            key = f"{name} {dtype}"
            assert_same(first[key], second[key])
            assert_same(first[key], expected(name, (11, 5), dtype)[0])


def test_a_sharded_model_stays_sharded_and_has_the_same_bits(tmp_path: Path) -> None:
    for results in on_two(sharded, tmp_path):
        for name in NAMES:
            for kind, shape in SHAPES.items():
                for dtype in (torch.float32, torch.bfloat16):
                    state, change = expected(name, shape, dtype)
                    assert_same(results[f"{name} {kind} {dtype}"][0], state)
                    # of matrices in another layout: a few roundings of fp32, which is all that some changes are
                    assert results[f"{name} {kind} {dtype}"][1] == pytest.approx(change, rel=1e-3, abs=1e-6)


def test_a_sharded_model_computes_and_merges_as_a_whole_one(tmp_path: Path) -> None:
    for results in on_two(merged, tmp_path):
        for name in NAMES:
            module = wrapped(name, (11, 5), torch.float32)
            y, grads, dense = results[name]
            here = module(torch.ones(2, 5))
            here.sum().backward()
            # the mean over two processes of the same number is that number
            assert torch.equal(y, here)
            for key, param in module.named_parameters():
                assert param.grad is None or torch.equal(grads[f"0.{key}"], param.grad)
            assert torch.equal(dense, layers.weight(module)), name


@pytest.mark.parametrize("name", ["sltrain", "relora", "loro"])
def test_two_processes_train_as_one(tiny: Path, small: list[str], tmp_path: Path, name: str) -> None:
    """Through restarts. 1e-5: sums over the batch in another order, 6e-8, which Adam's division amplifies."""
    one, two = tmp_path / "one", tmp_path / "two"
    cls, port = PARAMETRIZATIONS[name], free_port()
    text = DataConfig(str(tiny / "train.txt"), str(tiny / "valid.txt"), vocab_size=300, seq_len=32)
    options = {"model": str(tiny / "config.json"), "device": "cpu", "batch_size": 4, "steps": 5, "eval_tokens": 100}
    restarts, parametrization = Restarts(2, recovery_steps=1), cls(rank=4)
    pretrain(
        Pretrain(build("adamw"), layers=parametrization, restarts=restarts, data=text, out=one, **options),  # pyright: ignore
        quiet=True,
    )
    argv = ["pretrain", *small, "--valid", str(tiny / "valid.txt"), "--method", "adamw", "--steps", "5"]
    argv += ["--layers", name, "--layers.rank", "4", "--restarts.every", "2", "--restarts.recovery-steps", "1"]
    children = []
    for rank in range(2):
        child = {"argv": [*argv, "--out", str(two)], "environment": environment(rank, port)}
        child |= {"errors": str(tmp_path / str(rank)), "largest_file": None, "die_at_sync": None}
        children.append(start(CHILD, options=child))
    assert finish(children) == [0, 0], (tmp_path / "0").read_text()
    losses, changes = [], []
    for out in (one, two):
        events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append([event["loss"] for event in events if event["event"] in ("train", "eval")])
        changes.append([event["norm_before"] for event in events if event["event"] == "restart"])
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(changes[0]) == 2 and changes[1] == pytest.approx(changes[0], rel=1e-3)


def child(work: str, rank: int, variables: dict[str, str], file: str) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        torch.save(globals()[work](rank), file)
    finally:
        dist.destroy_process_group()


if __name__ == "__child__":
    child(*globals()["options"])
