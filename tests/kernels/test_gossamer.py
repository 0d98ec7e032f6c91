"""The tracker's launches against `update`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from batches import SHAPES, Run, assert_alike, assert_either_way, assert_launch_is_update, assert_stays_finite, error

from gossamer.optim.contract import build

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


@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "climb"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_launch_is_update(case: str, shape: str, maximize: bool) -> None:
    """Over five steps, a zero gradient among them; the same first frames, and fp32 sums in another order.

    2e-5 of the products: the condition of a subspace in noise, some tens, times rounding. Weights are compared after
    two steps, to a hundredth of one: without a gradient a second moment next to zero may be all that divides a step.
    """
    assert_launch_is_update(*pair(case, SHAPES[shape]), maximize)


@pytest.mark.parametrize("rank", [1, 16, 20, 64])
@pytest.mark.parametrize("case", ["rows-columns", "square"])
def test_other_ranks(case: str, rank: int) -> None:
    assert_alike(*pair(case, (72, 80), rank=rank), steps=3, tolerance=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_bf16(case: str) -> None:
    """Frames are rounded to bf16, 2^-9; the subspace turns by that times its condition, at every step."""
    assert_alike(*pair(case, (72, 24), torch.bfloat16), steps=5, tolerance=0.03)


@pytest.mark.parametrize("case", CASES)
def test_either_way_through_a_checkpoint(case: str) -> None:
    assert_either_way(*pair(case, (40, 24)))


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
    assert_stays_finite(pair(case, (40, 24))[0], value)


def test_what_cannot_be_launched() -> None:
    param = torch.zeros(40, 24)
    assert not build("gossamer").can_launch(torch.empty(2**16, 2**15, device="meta"))  # 32 bits do not count them
    assert build("gossamer").can_launch(param) and build("gossamer-lion").can_launch(param.bfloat16())  # pyright: ignore
    assert not build("gossamer", second="dense").can_launch(param)  # pyright: ignore
    assert not build("gossamer", eps=0.0).can_launch(param)  # pyright: ignore
    assert not build("gossamer").can_launch(torch.zeros(40))  # pyright: ignore
