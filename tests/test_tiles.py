"""What the CPU's twins are made of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.kernels.adam_step import adam_step, adam_step_ref
from gossamer.kernels.product import product, product_ref
from gossamer.optim import sweep


@pytest.fixture
def medium() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(33, 7, 50), (1, 4, 9), (64, 50, 3), (5, 1, 1)])
def test_product(m: int, k: int, n: int, transposed: bool) -> None:
    """fp32 sums of k <= 50 terms: a rounding of each is at most 50 * 6e-8 of the largest."""
    x, y = normal(m, k), normal(n, k, seed=1).mT if transposed else normal(k, n, seed=1)
    torch.testing.assert_close(product(x, y), product_ref(x.double(), y.double()).float(), rtol=1e-5, atol=1e-5)


def test_product_of_bf16_numbers_only_where_torch_says_so(medium: None) -> None:
    x, y = normal(64, 256), normal(256, 32, seed=1)
    exact = x.double() @ y.double()
    error = float((product(x, y) - exact).norm() / exact.norm())
    assert 1e-4 < error < 6e-3  # an operand's rounding is up to 2^-9, a root mean square of 2^-9 / sqrt(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_step(dtype: torch.dtype) -> None:
    """The same operations in another order: a few roundings of the dtype apart."""
    shape = (13, 37)
    ours, theirs = ([normal(*shape, seed=i, dtype=dtype) for i in range(4)] for _ in range(2))
    for tensors, step in ((ours, adam_step), (theirs, adam_step_ref)):
        tensors[3].square_()
        step(*tensors, 0.01, 0.999, 1e-6)
    tolerance = 20 * torch.finfo(dtype).eps
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [1e15, 1e25, 1e38])
@pytest.mark.parametrize("name", ["lora-pre", "mlorc", "gossamer"])
def test_guards_bite_where_the_reference_s_do(name: str, scale: float) -> None:
    """A gradient far from anything alive takes the guarded path: weights stay finite, as near as fp32 is."""
    weights = []
    for implementation in ("auto", "reference"):
        p = nn.Parameter(normal(12, 20))
        opt = gossamer.Optimizer(
            [{"params": [p], "method": gossamer.methods()[name].cls(rank=4)}], lr=1e-3, implementation=implementation
        )
        for seed in range(3):
            p.grad = normal(12, 20, seed=seed + 1) * (scale if seed == 1 else 1.0)
            opt.step()
        assert bool(p.isfinite().all())
        weights.append(p.detach())
    assert (weights[0] - weights[1]).abs().max() < 1e-3


def test_a_nan_gradient_reaches_the_weight() -> None:
    """It is the trainer's business to skip such a step; to hide it is nobody's."""
    for name in ("lora-pre", "mlorc", "gossamer"):
        p = nn.Parameter(normal(6, 8))
        opt = gossamer.Optimizer([{"params": [p], "method": gossamer.methods()[name].cls(rank=2)}])
        p.grad = normal(6, 8)
        p.grad[2, 3] = torch.nan
        opt.step()
        assert bool(p[2, 3].isnan()), name


@pytest.mark.parametrize("layout", ["weight", "gradient"])
@pytest.mark.parametrize("tile", [16, 10**6], ids=["tiles", "tile"])
@pytest.mark.parametrize(
    "method",
    [
        gossamer.LoRAPre(rank=2),
        gossamer.AdamW(),
        gossamer.AdamW(state_bits=16),
        gossamer.Gossamer(rank=2, second="dense"),
    ],
    ids=["factors", "dense", "bf16", "both"],
)
def test_layouts_that_are_not_rows(
    method: gossamer.Method, tile: int, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transposed memory: written and read as what it stands for. fp32 sums in another order are 1e-5 apart."""
    monkeypatch.setattr(sweep, "TILE", tile)
    stored, plain = normal(8, 6), normal(6, 8, seed=1)
    results = []
    for strided in (True, False):
        weight = stored.clone().mT if strided and layout == "weight" else stored.mT.contiguous()
        p = nn.Parameter(weight)
        opt = gossamer.Optimizer([{"params": [p], "method": method}], lr=1e-2)
        for step in range(3):
            p.grad = plain.mT.contiguous().mT if strided and layout == "gradient" else plain.clone()
            opt.step()
            if step == 1:  # as of a checkpoint whose state lay as the weight does
                saved = opt.state_dict()
                saved["state"][0] = {
                    k: v.mT.contiguous().mT if v.ndim == 2 else v for k, v in saved["state"][0].items()
                }
                opt.load_state_dict(saved)
        results.append([p.detach().contiguous(), *(v for v in opt.state[p].values() if v.ndim == 2)])
    for strided, plainly in zip(*results, strict=True):
        assert strided.is_contiguous()
        torch.testing.assert_close(strided, plainly, rtol=1e-5, atol=1e-5)
