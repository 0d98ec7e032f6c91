"""MLorc's launches against `update`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from batches import (
    SHAPES,
    Run,
    assert_alike,
    assert_close,
    assert_either_way,
    assert_launch_is_update,
    assert_stays_finite,
)

from gossamer.optim.contract import build

CASES = {
    "mlorc": ("mlorc", {}),
    "mlorc, one power iteration": ("mlorc", {"power_iterations": 1}),
    "mlorc-lion": ("mlorc-lion", {}),
    "mlorc-lion, two power iterations": ("mlorc-lion", {"power_iterations": 2}),
}


def pair(case: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32, rank: int = 4) -> tuple[Run, Run]:
    name, fields = CASES[case]
    method = build(name, rank=rank, **fields)
    return Run(method, shape, dtype), Run(method, shape, dtype)


@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "climb"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_launch_is_update(case: str, shape: str, maximize: bool) -> None:
    """Over five steps, a zero gradient among them; the same test matrices, and fp32 sums in another order.

    2e-5 of the products: the condition of a sketch of noise, some tens, times rounding. Weights are compared after two
    steps, to a hundredth of one: later some entry of v is next to zero, and either kept or floored.
    """
    assert_launch_is_update(*pair(case, SHAPES[shape]), maximize)


@pytest.mark.parametrize("rank", [1, 16, 20, 64])
def test_other_ranks(rank: int) -> None:
    assert_alike(*pair("mlorc", (72, 80), rank=rank), steps=3, tolerance=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_bf16(case: str) -> None:
    """Test matrices are rounded to bf16, 2^-9, and so are others; the subspace turns by that times the condition."""
    assert_alike(*pair(case, (72, 24), torch.bfloat16), steps=5, tolerance=0.03)


@pytest.mark.parametrize("case", CASES)
def test_either_way_through_a_checkpoint(case: str) -> None:
    assert_either_way(*pair(case, (40, 24)))


@pytest.mark.parametrize("case", CASES)
def test_rank_one_gradients_lose_nothing(case: str) -> None:
    """Of rank one and zero elsewhere: the rest of the factors is completed, and the moments stay what they are."""
    mine, theirs = pair(case, (40, 24))
    for i in range(4):
        grads = [torch.zeros(40, 24).index_fill(0, torch.tensor([7]), 0.5 + i) for _ in mine.params]
        mine.launch(grads)
        theirs.update(grads)
    assert_close(mine, theirs, 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, 1e25], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_state_stays_finite(case: str, value: float) -> None:
    """The factors of that matrix stay as they were, only NaN reaches a weight, and no step is longer than 20."""
    assert_stays_finite(pair(case, (40, 24))[0], value)


def test_what_cannot_be_launched() -> None:
    param = torch.zeros(40, 24)
    assert build("mlorc").can_launch(param) and build("mlorc-lion").can_launch(param.bfloat16())  # pyright: ignore
    assert not build("mlorc", oversampling=2).can_launch(param)  # pyright: ignore
    assert not build("mlorc", eps=0.0).can_launch(param)  # pyright: ignore
    assert not build("mlorc").can_launch(param.double())  # pyright: ignore
    assert not build("mlorc", rank=300).can_launch(torch.zeros(400, 400))  # pyright: ignore
