"""The tracker's launches against `update`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from batches import LR, Run, copied, error

from gossamer.optim.contract import build

SHAPES = {"tall": (72, 24), "wide": (24, 72), "square": (32, 32), "odd": (37, 21), "row": (1, 24), "column": (24, 1)}
CASES = {
    "rows-columns": ("gossamer", {}),
    "rows-columns, no tail": ("gossamer", {"tail": 0.0}),
    "square": ("gossamer", {"second": "square"}),
    "absolute": ("gossamer", {"second": "absolute", "tail": 0.5}),
    "lion": ("gossamer-lion", {}),
    "lion, no tail": ("gossamer-lion", {"tail": 0.0}),
}


def pair(case: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32, rank: int = 4) -> tuple[Run, Run]:
    name, fields = CASES[case]
    method = build(name, rank=rank, **fields)
    return Run(method, shape, dtype), Run(method, shape, dtype)


def assert_close(mine: Run, theirs: Run, tolerance: float) -> None:
    """Factors by their products, means as they are."""
    for name in ("m", "v"):
        if f"{name}_B" in mine.states[0]:
            for x, y in zip(mine.products(name), theirs.products(name), strict=True):
                assert error(x, y) < tolerance
    for key in ("v_rows", "v_columns"):
        if key in mine.states[0]:
            for x, y in zip(mine.states, theirs.states, strict=True):
                assert error(x[key], y[key]) < 1e-6  # sums of squares, whatever the operands are


@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "climb"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_launch_is_update(case: str, shape: str, maximize: bool) -> None:
    """Over five steps, a zero gradient among them; the same first frames, and fp32 sums in another order.

    2e-5 of the products: the condition of a subspace in noise, some tens, times rounding. Weights are compared after
    two steps, to a hundredth of one: without a gradient a second moment next to zero may be all that divides a step.
    """
    mine, theirs = pair(case, SHAPES[shape])
    for step in range(5):
        mine.launch(maximize=maximize)
        theirs.update(maximize=maximize)
        if step < 2:
            for x, y in zip(mine.params, theirs.params, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
    assert_close(mine, theirs, 2e-5)


@pytest.mark.parametrize("rank", [1, 16, 20, 64])
@pytest.mark.parametrize("case", ["rows-columns", "square"])
def test_other_ranks(case: str, rank: int) -> None:
    mine, theirs = pair(case, (72, 80), rank=rank)
    for _ in range(3):
        mine.launch()
        theirs.update()
    assert_close(mine, theirs, 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_bf16(case: str) -> None:
    """Frames are rounded to bf16, 2^-9; the subspace turns by that times its condition, at every step."""
    mine, theirs = pair(case, (72, 24), torch.bfloat16)
    for _ in range(5):
        mine.launch()
        theirs.update()
    assert_close(mine, theirs, 0.03)


@pytest.mark.parametrize("case", CASES)
def test_either_way_through_a_checkpoint(case: str) -> None:
    mine, theirs = pair(case, (40, 24))
    for run in (mine, theirs):
        run.update()
        run.launch()
    other, _ = pair(case, (40, 24))
    other.params, other.states, other.steps = [p.clone() for p in mine.params], copied(mine.states), mine.steps
    for _ in range(2):
        mine.update()
        other.launch()
    assert_close(other, mine, 2e-5)


def test_a_subspace_outgrows_its_first_gradient() -> None:
    """One of rank one leaves room: the completed columns take up what comes later."""
    mine, _ = pair("rows-columns", (40, 24))
    mine.launch([torch.zeros(40, 24).index_fill(0, torch.tensor([7]), 1.0) for _ in mine.params])
    generator = torch.Generator().manual_seed(5)
    signal = torch.randn(40, 4, generator=generator) @ torch.randn(4, 24, generator=generator)
    for _ in range(60):
        mine.launch([signal for _ in mine.params])
    for product in mine.products("m"):
        assert error(product, signal) < 0.01  # 0.9^60 of the first gradient is left


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, 1e25], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_factors_stay_finite(case: str, value: float) -> None:
    """Those of that matrix stay as they were, only NaN reaches a weight, and no other takes a step of more than 20."""
    mine, _ = pair(case, (40, 24))
    mine.launch()
    before = copied(mine.states)
    grads, params = mine.gradients(), [p.clone() for p in mine.params]
    grads[0][2, 3] = value
    mine.launch(grads)
    for key, tensor in mine.states[0].items():
        if key.endswith(("_A", "_B")):
            assert torch.equal(tensor, before[0][key])
            assert not torch.equal(mine.states[1][key], before[1][key])
    bad = mine.params[0].isfinite().logical_not().nonzero().tolist()
    assert bad == ([[2, 3]] if value != value else [])
    assert (mine.params[0] - params[0]).nan_to_num().abs().max() < 20 * LR


def test_what_cannot_be_launched() -> None:
    param = torch.zeros(40, 24)
    assert build("gossamer").can_launch(param) and build("gossamer-lion").can_launch(param.bfloat16())  # pyright: ignore
    assert not build("gossamer", second="dense").can_launch(param)  # pyright: ignore
    assert not build("gossamer", eps=0.0).can_launch(param)  # pyright: ignore
    assert not build("gossamer").can_launch(torch.zeros(40))  # pyright: ignore
