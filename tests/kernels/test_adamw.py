"""AdamW's kernel against its reference, and its launches against `update`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from batches import Run, error

from gossamer.kernels import Tables, adamw
from gossamer.optim.methods.adamw import AdamW, AdamW8bit

SHAPES = [(), (1,), (7,), (1024,), (2500,), (30, 41), (3, 4, 5)]
BETAS, BOUND = (0.9, 0.99), 1e15


def tensors(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "stochastic"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
def test_kernel_is_its_reference(shape: tuple[int, ...], dtype: torch.dtype, stochastic: bool) -> None:
    """The same operations, some of them fused: a rounding or two of fp32; bf16 may tip to the next number."""
    weights, grads = tensors(shape, dtype, 0), tensors(shape, dtype, 1)
    ms, vs = tensors(shape, torch.float32, 2), [v.abs() for v in tensors(shape, torch.float32, 3)]
    numbers = torch.tensor([[1.0, 1.5, 2.0, 1e-3, 0.99, 0.01 * (i + 1), 77.0 + i] for i in range(3)])
    expected = [[t.clone() for t in group] for group in (weights, ms, vs)]
    adamw.adamw_ref(
        expected[0], grads, expected[1], expected[2], numbers, 0.1, 0.99, 0.01, BOUND, stochastic=stochastic
    )
    where = [torch.tensor([t.data_ptr() for t in group]) for group in (weights, grads, ms, vs)]
    adamw.step(
        Tables(where[0], where[1], shape, dtype, dtype, False, stochastic), where[2], where[3], numbers, BETAS, BOUND
    )
    torch.testing.assert_close(ms, expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vs, expected[2], rtol=1e-6, atol=1e-6)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1 / 64, "atol": 1e-4}
    torch.testing.assert_close(weights, expected[0], **tolerance)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("shape", [(), (2500,), (30, 41)], ids=str)
def test_launch_is_update(shape: tuple[int, ...], maximize: bool) -> None:
    """fp32, five steps: a few roundings."""
    mine, theirs = Run(AdamW(), shape, torch.float32), Run(AdamW(), shape, torch.float32)
    for _ in range(5):
        mine.launch(maximize=maximize)
        theirs.update(maximize=maximize)
    assert max(map(error, mine.params, theirs.params)) < 1e-6
    for key in "mv":
        assert max(error(a[key], b[key]) for a, b in zip(mine.states, theirs.states, strict=True)) < 1e-6


def test_launch_is_update_in_bf16() -> None:
    """To nearest: fp32's roundings rarely tip a bf16 number, so nearly all weights are the same ones."""
    mine, theirs = Run(AdamW(), (30, 41), torch.bfloat16), Run(AdamW(), (30, 41), torch.bfloat16)
    for _ in range(5):
        mine.launch()
        theirs.update()
    same = torch.stack([(a == b).float().mean() for a, b in zip(mine.params, theirs.params, strict=True)])
    assert same.min() > 0.99


def test_small_steps_are_not_lost() -> None:
    """Steps of 1e-3 on weights of 1 with numbers 2^-7 apart: lost to nearest, right in the mean stochastically.

    2500 weights of standard deviation at most half a number, 0.004, have a mean within 5 x 8e-5 of the truth.
    """
    drifts = {}
    for rounding in ("nearest", "stochastic"):
        run = Run(AdamW(), (2500,), torch.bfloat16, layers=1)
        run.params[0].fill_(1.25)
        for _ in range(4):
            run.launch([torch.ones_like(run.params[0])], rounding=rounding)
        drifts[rounding] = 1.25 - float(run.params[0].float().mean())
    expected = 1.25 - (1.25 * 0.999**4 - 0.01 * sum(0.999**i for i in range(4)))
    assert abs(drifts["stochastic"] - expected) < 4 * 4e-4
    assert abs(drifts["nearest"] - expected) > 4 * 4e-4


def test_huge_gradients_keep_the_moments_finite() -> None:
    run = Run(AdamW(), (30, 41), torch.bfloat16)
    for size in (1e30, -3e38, torch.inf):
        run.launch([torch.full_like(p, size) for p in run.params], rounding="stochastic")
    assert all(p.isfinite().all() for p in run.params)
    assert all(state[key].isfinite().all() for state in run.states for key in "mv")


def test_who_can_launch() -> None:
    assert AdamW().can_launch(torch.empty(())) and AdamW().can_launch(torch.empty(3, 4, 5, dtype=torch.bfloat16))
    assert not AdamW(state_bits=16).can_launch(torch.empty(8)) and not AdamW8bit().can_launch(torch.empty(8))
    assert not AdamW().can_launch(torch.empty(8, dtype=torch.float64))
    assert not AdamW(eps=0.0).can_launch(torch.empty(8)) and not AdamW().can_launch(torch.empty(8, 8)[:, ::2])
