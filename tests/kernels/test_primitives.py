"""Rounding, and the Cholesky factors of many small matrices."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels.cholesky import cholesky_inverse, cholesky_inverse_ref
from gossamer.kernels.primitives import full_precision, narrow, round_bf16_ref


@triton.jit
def _narrow(x, key, out, seed, SIZE: tl.constexpr, STOCHASTIC: tl.constexpr):
    index = tl.arange(0, SIZE)
    value = narrow(tl.load(x + index), tl.load(key + index), seed, tl.bfloat16, STOCHASTIC)
    tl.store(out + index, value)


def rounded(x: Tensor, key: Tensor, seed: int, *, stochastic: bool = True) -> Tensor:
    out = torch.empty_like(x, dtype=torch.bfloat16)
    _narrow[(1,)](x, key, out, seed, x.numel(), stochastic)
    return out


def normal(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


SPECIAL = torch.tensor([
    0.0, -0.0, 1.0, -2.5, torch.inf, -torch.inf, 3.4e38, -3.4e38, 3.3895313892515355e38, 1e-30, -1e-37, 1.5,
])  # fmt: skip


def test_rounding_is_its_reference() -> None:
    x, key = torch.cat((normal(500, 0), SPECIAL)), torch.cat((normal(500, 1), SPECIAL.flip(0)))
    for seed in (0, 7, 16777212 * 7919 % 2**31):
        assert torch.equal(rounded(x, key, seed), round_bf16_ref(x, key, torch.tensor(seed, dtype=torch.int32)))


def test_what_bf16_represents_is_kept() -> None:
    x = torch.cat((normal(506, 0).bfloat16().float(), SPECIAL[:6]))
    assert torch.equal(rounded(x, normal(512, 1), 5).float(), x)


@pytest.mark.parametrize("stochastic", [True, False])
def test_no_rounding_makes_an_infinity_or_loses_a_nan(stochastic: bool) -> None:
    """Bits of NaN in all ways that hardware makes them: the carry of a dither would turn the first into -0."""
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001 | 0x10000], dtype=torch.int32).view(torch.float32)
    largest = torch.full((60,), torch.finfo(torch.float32).max)
    for seed in range(50):
        out = rounded(torch.cat((nans, largest)), normal(64, seed), seed, stochastic=stochastic)
        assert out[:4].isnan().all() and out[4:].isfinite().all()


def test_nearest_is_torchs() -> None:
    x = normal(4096, 0)
    assert torch.equal(rounded(x, x, 0, stochastic=False), x.bfloat16())


@pytest.mark.parametrize("key", ["noise", "zero"])
def test_rounding_is_unbiased(key: str) -> None:
    """The mean of 200 roundings of each of 4096 numbers, a bf16 step being 1.

    Its error has a standard deviation of at most 0.5 / sqrt(200) a number and 0.0006 over all: five of those. With a
    key that is zero, as momentum is where no gradient came, the number's own bits and the seed must do.
    """
    x = 1 + normal(4096, 0).abs() % 1  # between 1 and 2 a step is 2^-7
    total = torch.zeros(4096)
    for seed in range(200):
        noise = normal(4096, 1000 + seed) if key == "noise" else torch.zeros(4096)
        total += round_bf16_ref(x, noise, torch.tensor(seed * 7919, dtype=torch.int32)).float()
    bias = (total / 200 - x) * 2**7
    assert abs(float(bias.mean())) < 0.003
    assert float(bias.std()) < 0.05  # each number by itself: 0.029 if its 200 dithers are uniform


@pytest.mark.parametrize("allowed", ["highest", "high"])
def test_what_the_model_may_is_what_it_may_after(allowed: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == allowed
        assert torch.backends.cuda.matmul.allow_tf32 == (allowed == "high")
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("r", [1, 3, 4, 16, 33, 64])
def test_cholesky_is_its_reference(r: int) -> None:
    """Condition numbers up to 1e3, times fp32's rounding, 6e-8, times r: 1e-3 is far above, and far below a bug."""
    x = torch.randn(3, r, 2 * r, generator=torch.Generator().manual_seed(0))
    a = x @ x.mT / (2 * r) + 0.01 * torch.eye(r)
    (lower, inverse), (expected, expected_inverse) = cholesky_inverse(a), cholesky_inverse_ref(a)
    torch.testing.assert_close(lower, expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(inverse, expected_inverse, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lower @ lower.mT, a, rtol=1e-5, atol=1e-5)  # backward stable: some roundings


def test_a_singular_matrix_has_no_nan() -> None:
    a = torch.zeros(2, 8, 8)
    a[0, 0, 0] = 1.0
    lower, inverse = cholesky_inverse(a)
    assert lower.isfinite().all() and inverse.isfinite().all()


def test_nan_stays_in_its_own_matrix() -> None:
    a = torch.eye(8).repeat(3, 1, 1)
    a[1, 2, 2] = torch.nan
    lower, inverse = cholesky_inverse(a)
    assert lower[1].isnan().any() and inverse[1].isnan().any()
    assert torch.equal(lower[[0, 2]], a[[0, 2]]) and torch.equal(inverse[[0, 2]], a[[0, 2]])
