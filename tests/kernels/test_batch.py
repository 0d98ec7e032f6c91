"""What launches need: tables, stacks, numbers; and that nothing between them waits for the device."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

sys.path.insert(0, str(Path(__file__).parent))
from batches import DECAY, LR, Run, error

import gossamer
from gossamer.optim import factors
from gossamer.optim.batch import Batch
from gossamer.optim.contract import Context, build
from gossamer.optim.methods.lora_pre import LoRAPre
from gossamer.optim.optimizer import init_state
from tests.conformance.test_no_sync import NoHostCopies, NoHostReads


def make(name: str, rank: int = 3) -> Any:
    fields: dict[str, Any] = {"rank": rank} if "rank" in gossamer.methods()[name].cls.__dataclass_fields__ else {}
    return build(name, **fields)


def launched(name: str) -> bool:
    return hasattr(gossamer.methods()[name].cls, "launch_") and make(name).can_launch(torch.empty(8, 8))


LAUNCHED = list(filter(launched, gossamer.methods()))


@pytest.mark.parametrize("name", LAUNCHED)
def test_nothing_is_read_on_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a later step, all but the kernels themselves, which the interpreter would have to read for."""
    run = Run(make(name), (24, 40), torch.bfloat16)
    run.launch()
    batch = run.batch(rounding="stochastic")
    launched: list[object] = []
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *a, **k: launched.append(self))
    with NoHostReads(), NoHostCopies():
        run.method.launch_(batch)
    assert launched


class Operators(TorchDispatchMode):
    """Counts those that compute or copy."""

    VIEWS = frozenset((
        "view", "expand", "slice", "select", "unbind", "transpose", "unsqueeze", "detach", "_unsafe_view", "t",
        "as_strided", "split", "empty", "empty_like", "lift_fresh",
    ))  # fmt: skip
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.removeprefix("aten::") not in self.VIEWS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "most"), [("adamw", 20), ("lora-pre", 140), ("lora-pre-stable", 155)])
def test_operators_beside_the_kernels(name: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/kernels.md says of them."""
    run = Run(make(name), (24, 40), torch.bfloat16)
    run.launch()
    batch = run.batch()
    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: lambda *a, **k: None)
    with Operators() as operators:
        run.method.launch_(batch)
    assert operators.count <= most


@pytest.mark.parametrize("rank", [3, 70])
@pytest.mark.parametrize("name", LAUNCHED)
def test_nothing_stays_on_the_cpu(name: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which computes nothing but refuses operands of another: all that kernels take is on it."""
    method = make(name, rank)
    params = [torch.empty(96, 88, dtype=torch.bfloat16, device="meta") for _ in range(2)]
    contexts = [Context(2, 2, 2, LR, p, None, 77) for p in params]  # pyright: ignore
    taken: list[Tensor] = []

    def take(*arguments: object, **constants: object) -> None:
        taken.extend(x for x in arguments if isinstance(x, Tensor))

    monkeypatch.setattr(InterpretedFunction, "__getitem__", lambda self, grid: take)
    for lr in (LR, torch.full((), LR, device="meta")):
        states = [init_state(method, p) for p in params]
        method.launch_(
            Batch(
                params=params, grads=params, states=states, contexts=contexts, lr=lr, weight_decay=DECAY,
                maximize=False, rounding="stochastic",
            )
        )  # fmt: skip
    assert {x.device.type for x in taken} == {"meta"}


def test_tables_are_kept_while_tensors_stay() -> None:
    run = Run(LoRAPre(rank=4), (8, 8), torch.float32)
    batch, later = run.batch(), run.batch()
    assert batch.pointers(batch.params) is later.pointers(later.params)
    assert batch.tables.weights.tolist() == [p.data_ptr() for p in run.params]


@pytest.mark.parametrize(
    ("shape", "dtype", "aligned"),
    [
        ((4, 8), torch.bfloat16, True),
        ((4, 12), torch.bfloat16, False),
        ((4, 12), torch.float32, True),
        ((7,), torch.float32, False),
    ],
)
def test_rows_at_multiples_of_16_bytes(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> None:
    run = Run(LoRAPre(rank=4) if len(shape) == 2 else make("adamw"), shape, dtype)
    assert run.batch().tables.aligned == aligned
    shifted = [torch.zeros(g.numel() + 1, dtype=dtype)[1:].view(shape) for g in run.params]
    assert not run.batch(shifted).tables.aligned


def test_numbers() -> None:
    """Exact: fp64 rounded to fp32 once."""
    run = Run(LoRAPre(rank=4), (8, 8), torch.float32)
    batch = run.batch(maximize=True)
    run.states[1]["v_step"].fill_(7)
    batch = run.batch(maximize=True)
    table = batch.numbers(0.1, batch.counter("v_step"), batch.rates, batch.decay, batch.sign)
    expected = [[0.1, 2.0, LR, 1 - LR * DECAY, -1.0], [0.1, 8.0, LR, 1 - LR * DECAY, -1.0]]
    assert torch.equal(table, torch.tensor(expected, dtype=torch.float64).float())
    assert torch.equal(table, run.batch(lr=torch.tensor(LR, dtype=torch.float64)).numbers(
        0.1, batch.counter("v_step"), batch.rates, batch.decay, -1.0))  # fmt: skip


def test_seeds_are_whole_and_differ() -> None:
    """By parameter and step, and fp32 holds them."""
    run, seen = Run(LoRAPre(rank=4), (8, 8), torch.float32, layers=16), []
    for _ in range(20):
        seeds = run.batch().seeds
        assert torch.equal(seeds.float().double(), seeds.round())
        seen += seeds.tolist()
    assert len(set(seen)) == 16 * 20


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
def test_keep_is_the_references(value: float) -> None:
    run = Run(LoRAPre(rank=4), (8, 6), torch.float32, layers=3)
    new = {name: (torch.ones(3, 8, 4), torch.ones(3, 4, 6)) for name in "mv"}
    new["v"][1][1, 2, 3] = value
    new["v"][0][1, 2, 3] = 2.0
    expected = Run(LoRAPre(rank=4), (8, 6), torch.float32, layers=3).states
    run.batch().keep_(**new)
    for i, state in enumerate(expected):
        factors.keep_(state, **{name: (b[i], a[i]) for name, (b, a) in new.items()})
        assert all(torch.equal(state[key], run.states[i][key]) for key in ("m_B", "m_A", "v_B", "v_A"))
    assert run.states[0]["m_B"].all() and not run.states[1]["m_B"].any()


def test_the_optimizer_launches() -> None:
    """18 matrices of one shape, more than go into one launch, and their biases: the reference's steps to 1e-5.

    That is fp32's rounding times a condition number of 100; eps keeps denominators from zero.
    """
    weights = {}
    for implementation in ("auto", "reference"):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(18)))
        groups = gossamer.param_groups(model, LoRAPre(rank=4, eps=0.1))
        lr = torch.tensor(LR)
        opt = gossamer.Optimizer(groups, lr=lr, weight_decay=DECAY, implementation=implementation)
        kinds = {row.implementation for row in opt.plan()}
        assert kinds == {"kernels" if implementation == "auto" else "reference"}
        for step in range(3):
            lr.fill_(LR / (step + 1))
            model(torch.randn(8, 16)).square().mean().backward()
            opt.step()
            opt.zero_grad()
        weights[implementation] = [p.detach() for p in model.parameters()]
    assert max(map(error, weights["auto"], weights["reference"])) < 1e-5
