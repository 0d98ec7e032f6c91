"""A fused twin takes the reference's steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gossamer
from gossamer.optim import sweep
from gossamer.optim.diagnostics import Diagnostics

from .test_methods import gradients, make

FUSED = [
    name
    for name, entry in gossamer.methods().items()
    if hasattr(entry.cls, "step_") and getattr(entry.cls(), "can_sweep", lambda: True)()
]
SHAPES = {"tall": (37, 10), "wide": (10, 37), "square": (16, 16), "odd": (7, 13), "row": (1, 12), "column": (12, 1)}


def variants(name: str) -> list[dict[str, object]]:
    """Fields that make a twin take another path."""
    fields = gossamer.methods()[name].cls.__dataclass_fields__
    choices = {
        "updates": ("simultaneous", "sequential"),
        "bias_correction": ("paper", "exact"),
        "second": ("rows-columns", "square", "absolute", "dense"),
        "power_iterations": (0, 2),
        "oversampling": (0, 2),
        "residual": ("code", "paper"),
        "scaling": ("channel", "tensor"),
        "growth_limit": (None, 1.01),
        "refresh": ("svd", "warm"),
        "tail": (0.0, 1.0),
        "nesterov": (False, True),
    }
    return [{field: value} for field, values in choices.items() if field in fields for value in values] or [{}]


CASES = [(name, fields) for name in FUSED for fields in variants(name)]


def train(
    method: gossamer.Method,
    implementation: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    steps: range,
    **options: object,
) -> tuple[nn.Parameter, gossamer.Optimizer]:
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    groups = [{"params": [p], "method": method}]
    opt = gossamer.Optimizer(groups, lr=1e-2, implementation=implementation, **options)  # pyright: ignore
    for step, grad in enumerate(gradients(shape, steps.stop)):
        if step in steps:
            p.grad = grad.to(dtype)
            opt.step()
    return p, opt


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "TILE", 40)  # several tiles, the last one smaller


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "fields"), CASES, ids=lambda x: str(x))
def test_twin_is_the_reference(name: str, fields: dict[str, object], shape: str) -> None:
    """In float64, with decay, over refreshes: the same sums in another order."""
    method = make(name, **fields)
    (p, mine), (q, theirs) = (
        train(method, implementation, SHAPES[shape], torch.float64, range(7), weight_decay=0.1)
        for implementation in ("fused", "reference")
    )
    torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert mine.state[p].keys() == theirs.state[q].keys()


@pytest.mark.parametrize("options", [{"maximize": True}, {"rounding": "nearest"}], ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_twin_climbs_and_rounds(name: str, options: dict[str, object]) -> None:
    """bf16 weights: where the direction's rounding tips that of the weight, it is the next number, one in 128."""
    dtype = torch.bfloat16 if "rounding" in options else torch.float64
    p, q = (train(make(name), kind, (37, 10), dtype, range(5), **options)[0] for kind in ("fused", "reference"))
    torch.testing.assert_close(p, q, rtol=1 / 64 if dtype is torch.bfloat16 else 1e-8, atol=1e-3)


@pytest.mark.parametrize("name", FUSED)
def test_checkpoints_go_either_way(name: str) -> None:
    method, shape = make(name), (37, 10)
    expected, _ = train(method, "fused", shape, torch.float64, range(8))
    half, saved = train(method, "reference", shape, torch.float64, range(4))
    p = nn.Parameter(half.detach().clone())
    opt = gossamer.Optimizer([{"params": [p], "method": method}], lr=1e-2, implementation="fused")
    opt.load_state_dict(saved.state_dict())
    assert opt.plan()[0].implementation == "tiles"
    for grad in gradients(shape, 8)[4:]:
        p.grad = grad.double()
        opt.step()
    torch.testing.assert_close(p, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", FUSED)
def test_looking_changes_nothing(name: str) -> None:
    shape = (37, 10)
    expected, _ = train(make(name), "fused", shape, torch.float32, range(4))
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    opt = gossamer.Optimizer([{"params": [p], "method": make(name)}], lr=1e-2, implementation="fused")
    look = Diagnostics(opt, ["."], 1)
    for grad in gradients(shape, 4):
        p.grad = grad
        opt.step()
    assert torch.equal(p, expected) and look.records[0]["update_rms"] > 0


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that was made, not viewed."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in old:
                self.entries = max(self.entries, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("shape", [(64, 48), (48, 64)], ids=["tall", "wide"])
@pytest.mark.parametrize("name", FUSED)
def test_nothing_of_the_weights_size_is_made(name: str, shape: tuple[int, int]) -> None:
    """Between refreshes: two thin factors side by side have 64 x 8 entries, a tile has 48, the weight 3,072."""
    p, opt = train(make(name), "fused", shape, torch.float32, range(2))
    p.grad = gradients(shape, 1)[0]
    with Largest() as largest:
        opt.step()
    assert largest.entries <= 64 * 8
