"""MLorc's launches against `update`."""

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
    "mlorc": ("mlorc", {}),
    "mlorc, one power iteration": ("mlorc", {"power_iterations": 1}),
    "mlorc-lion": ("mlorc-lion", {}),
    "mlorc-lion, two power iterations": ("mlorc-lion", {"power_iterations": 2}),
}


def pair(case: str, shape: tuple[int, int], dtype: torch.dtype = torch.float32, rank: int = 4) -> tuple[Run, Run]:
    name, fields = CASES[case]
    method = build(name, rank=rank, **fields)
    return Run(method, shape, dtype), Run(method, shape, dtype)


def assert_close(mine: Run, theirs: Run, tolerance: float) -> None:
    for name in ("m", "v"):
        if f"{name}_B" in mine.states[0]:
            for x, y in zip(mine.products(name), theirs.products(name), strict=True):
                assert error(x, y) < tolerance


@pytest.mark.parametrize("maximize", [False, True], ids=["descend", "climb"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_launch_is_update(case: str, shape: str, maximize: bool) -> None:
    """Over five steps, a zero gradient among them; the same test matrices, and fp32 sums in another order.

    2e-5 of the products: the condition of a sketch of noise, some tens, times rounding. Weights are compared after two
    steps, to a hundredth of one: later some entry of v is next to zero, and either kept or floored.
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
def test_other_ranks(rank: int) -> None:
    mine, theirs = pair("mlorc", (72, 80), rank=rank)
    for _ in range(3):
        mine.launch()
        theirs.update()
    assert_close(mine, theirs, 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_bf16(case: str) -> None:
    """Test matrices are rounded to bf16, 2^-9, and so are others; the subspace turns by that times the condition."""
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
    assert build("mlorc").can_launch(param) and build("mlorc-lion").can_launch(param.bfloat16())  # pyright: ignore
    assert not build("mlorc", oversampling=2).can_launch(param)  # pyright: ignore
    assert not build("mlorc", eps=0.0).can_launch(param)  # pyright: ignore
    assert not build("mlorc").can_launch(param.double())  # pyright: ignore
    assert not build("mlorc", rank=300).can_launch(torch.zeros(400, 400))  # pyright: ignore
