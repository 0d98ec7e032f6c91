"""Gradient release on two processes: the bits of an ordinary sharded step, or a refusal.

The processes run this same file, from the bottom.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from gossamer import AdamW, Optimizer, UserError, param_groups, release_gradients
from tests.distributed.test_restarts import environment, finish, free_port, start

STEPS = 4
CLIP = 0.3
CASES = {
    "plain": (1, None, "two-pass"),
    "accumulated": (3, None, "two-pass"),
    "two-pass": (1, CLIP, "two-pass"),
    "accumulated, two-pass": (3, CLIP, "two-pass"),
    "previous": (1, CLIP, "previous"),
}
"""Micro-batches, the largest norm, and where the norm is from."""


def net() -> nn.Sequential:
    """No side is even: two processes have rows of different number."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 5), nn.Tanh(), nn.Linear(5, 3))


def sharded() -> tuple[nn.Sequential, Optimizer]:
    model, mesh = net(), init_device_mesh("cpu", (2,))
    fully_shard(model[2], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, optimizer(model)


def optimizer(model: nn.Module) -> Optimizer:
    return Optimizer(param_groups(model, AdamW()), lr=0.02, weight_decay=0.1)


def loss_of(model: nn.Module, step: int, micro: int) -> Tensor:
    """Of this process's half of the rows."""
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(100 * step + micro))
    return model(x.chunk(2)[dist.get_rank()]).square().mean()


def run(release: bool, micros: int, max_norm: float | None, clip: str) -> tuple[list[Tensor], list[Tensor]]:
    """The whole weights at the end, and the norms."""
    model, opt = sharded()
    released = release_gradients(model, opt, max_norm=max_norm, clip=clip) if release else None
    norms, previous = [], torch.zeros(())
    for step in range(STEPS):
        for micro in range(micros):
            last, loss = micro == micros - 1, loss_of(model, step, micro)
            if released is not None and last and max_norm is not None and clip == "two-pass":
                with released.measure():
                    loss.backward(retain_graph=True)
            with nullcontext() if last or released is None else released.accumulate():
                loss.backward()
        if released is not None:
            assert all(p.grad is None for p in model.parameters())
            opt.step()
            norms += [released.norm] if max_norm is not None else []
            continue
        if max_norm is not None:
            total: Any = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            norms.append(total.full_tensor())
            nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norms[-1] if clip == "two-pass" else previous)
            previous = norms[-1]
        opt.step()
        opt.zero_grad()
    return [p.full_tensor().detach() for p in model.parameters() if isinstance(p, DTensor)], norms


# ---- what the processes do -------------------------------------------------------------------------------------------


def work() -> dict[str, Any]:
    results: dict[str, Any] = {name: [run(release, *case) for release in (True, False)] for name, case in CASES.items()}

    whole = net()
    with pytest.raises(UserError) as error:
        release_gradients(nn.parallel.DistributedDataParallel(whole), optimizer(whole))
    results["replicated"] = str(error.value)

    opt = optimizer(whole)
    release_gradients(whole, opt)
    replica = nn.parallel.DistributedDataParallel(whole)  # later, where only the step can tell
    with pytest.raises(UserError) as error:
        loss_of(replica, 0, 0).backward()
        opt.step()
    results["replicated later"] = str(error.value)

    model, opt = sharded()
    released = release_gradients(model, opt, max_norm=CLIP)
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)  # gradients wait unreduced, and the first reduction takes them
    loss_of(model, 0, 0).backward()
    model.set_requires_gradient_sync(True)
    loss = loss_of(model, 0, 1)
    with released.measure():
        loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(UserError) as error:
        opt.step()
    results["unreduced"] = str(error.value)
    return results


def child(rank: int, variables: dict[str, str], file: str) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        torch.save(work(), file)
    finally:
        dist.destroy_process_group()


# ---- what comes of it ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder, port = tmp_path_factory.mktemp("release"), free_port()
    files = [folder / f"{rank}.pt" for rank in range(2)]
    children = [
        start(Path(__file__), options=(rank, environment(rank, port), str(file))) for rank, file in enumerate(files)
    ]
    assert finish(children) == [0, 0]
    return [torch.load(file) for file in files]


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_ends_with_the_same_bits(results: list[dict[str, Any]], case: str) -> None:
    """As `fully_shard` without release: after-gradient hooks come when shards are reduced, in one order everywhere."""
    (ours, our_norms), (theirs, their_norms) = results[0][case]
    assert len(ours) == 6 and len(our_norms) == len(their_norms) == (0 if CASES[case][1] is None else STEPS)
    for one, other, begun in zip(ours, theirs, net().parameters(), strict=True):
        assert torch.equal(one, other) and not torch.equal(one, begun)
    assert all(map(torch.equal, our_norms, their_norms))
    for one, other in zip(ours, results[1][case][0][0], strict=True):
        assert torch.equal(one, other)


def test_replicas_are_refused(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert "the model is DistributedDataParallel" in found["replicated"] and "fully_shard" in found["replicated"]
        assert "has stepped and got another gradient" in found["replicated later"]


def test_gradients_that_wait_unreduced_cannot_be_measured_first(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert "under measure() and" in found["unreduced"] and "gradient reduction" in found["unreduced"]


if __name__ == "__child__":
    child(*globals()["options"])
