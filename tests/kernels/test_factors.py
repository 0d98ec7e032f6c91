"""The kernels of `kernels.factors` against their references."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from batches import error

from gossamer.kernels import Tables, factors, primitives
from gossamer.kernels.primitives import padded, stride

SHAPES = {
    "tall": (152, 40),
    "wide": (40, 152),
    "square": (64, 64),
    "odd": (37, 53),  # rows at no multiple of 16 bytes, as Llama-1B's 5461
    "row": (1, 24),
    "column": (24, 1),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("none", "rows-columns", "floored", "square", "absolute")
LAYERS, BOUND, EPS = 3, 2.5, 0.1  # some gradients exceed the bound; no step is longer than ten moments


class Case:
    """Operands of both kernels, other ones for each layer, and outputs full of NaN."""

    def __init__(self, shape: tuple[int, int], rank: int, dtype: torch.dtype, kind: str) -> None:
        self.generator = torch.Generator().manual_seed(0)
        (m, n), self.dtype, self.kind = shape, dtype, kind
        depth, width, height = primitives.padded_rank(rank), stride(n), -(-m // 64) * 64
        self.params = [self.draw(m, n).to(dtype) for _ in range(LAYERS)]
        self.grads = [self.draw(m, n).to(dtype) for _ in range(LAYERS)]

        def columns() -> Tensor:
            return padded(self.draw(LAYERS, m, rank), height, depth, dtype)

        def rows() -> Tensor:
            return padded(self.draw(LAYERS, rank, n), depth, width, dtype)

        def empty(*size: int) -> Tensor:
            return torch.full((LAYERS, *size), torch.nan)

        # own_m, own_v, tail, rate, decay, seed
        table = [[0.1 * (i + 1), 0.2, 0.3 * i, 0.01 * (i + 1), 0.99, 1234.0 + i] for i in range(LAYERS)]
        self.numbers = torch.tensor(table)
        v_b, v_a, m_w = columns(), rows(), rows()
        self.sketch = [m_w, rows(), v_b, v_a]
        self.sketch += [empty(m, depth), empty(m, depth), empty(m, depth), empty(m), empty(m, 2)]
        self.update = [columns(), rows().float().sum(1), columns(), m_w, columns(), v_b, v_a, columns()]
        self.update += [self.draw(LAYERS, m).abs(), self.draw(LAYERS, n).abs(), torch.tensor([0.5, 0.7, 0.9])]
        self.update += [empty(depth, width), empty(depth, width), empty(n)]
        aligned = n * dtype.itemsize % 16 == 0
        self.tables = Tables(addresses(self.params), addresses(self.grads), shape, dtype, dtype, aligned, False)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


def fresh(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def assert_same(mine: list[Tensor], theirs: list[Tensor], n: int, dtype: torch.dtype) -> None:
    """fp32 sums of at most some hundred products in another order: 1e-5.

    For bf16 weights what is made in the kernel is rounded to bf16, which the reference does not do, and the interpreter
    cuts it: 2^-7. The same code meets 1e-5 for fp32.
    """
    for x, y in zip(mine, theirs, strict=True):
        x, y = (t[..., :n] if t.ndim == 3 and t.shape[2] == stride(n) else t for t in (x, y))
        assert torch.equal(x.isnan(), y.isnan())  # what a kind does not write
        assert error(x.nan_to_num(), y.nan_to_num()) < (1e-5 if dtype is torch.float32 else 2**-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sketch_is_its_reference(shape: str, dtype: str, kind: str) -> None:
    case = Case(SHAPES[shape], 4, DTYPES[dtype], kind)
    expected = fresh(case.sketch)
    factors.sketch_ref(case.grads, case.numbers, *expected, bound=BOUND, SECOND=kind)
    factors.launch_sketch(case.tables, case.numbers, *case.sketch, bound=BOUND, SECOND=kind)
    assert_same(case.sketch, expected, SHAPES[shape][1], case.dtype)


@pytest.mark.parametrize(
    ("step", "tail"), [(True, False), (True, True), (False, False)], ids=["step", "tail", "no step"]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_update_is_its_reference(shape: str, dtype: str, kind: str, step: bool, tail: bool) -> None:
    """Weights too: for bf16 some go to the next number, 2^-8 away, and the rounded tail of a moment moves some more."""
    case = Case(SHAPES[shape], 4, DTYPES[dtype], kind)
    before, params, expected = fresh(case.params), fresh(case.params), fresh(case.update)
    flags: Any = {"SECOND": kind, "STEP": step, "TAIL": tail}
    factors.update_ref(params, case.grads, case.numbers, *expected, bound=BOUND, eps=EPS, STOCHASTIC=False, **flags)
    factors.launch_update(case.tables, case.numbers, *case.update, bound=BOUND, eps=EPS, **flags)
    assert_same(case.update, expected, SHAPES[shape][1], case.dtype)
    for mine, theirs, old in zip(case.params, params, before, strict=True):
        if dtype == "fp32":
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
        assert error(mine, theirs) < 2**-7
        assert torch.equal(mine, old) != step


@pytest.mark.parametrize("rank", [1, 16, 20, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_ranks(dtype: str, rank: int) -> None:
    case = Case((72, 80), rank, DTYPES[dtype], "floored")
    sketched, updated, params = fresh(case.sketch), fresh(case.update), fresh(case.params)
    flags: Any = {"SECOND": "floored", "STEP": True, "TAIL": True}
    factors.sketch_ref(case.grads, case.numbers, *sketched, bound=BOUND, SECOND="floored")
    factors.update_ref(params, case.grads, case.numbers, *updated, bound=BOUND, eps=EPS, STOCHASTIC=False, **flags)
    factors.launch_sketch(case.tables, case.numbers, *case.sketch, bound=BOUND, SECOND="floored")
    factors.launch_update(case.tables, case.numbers, *case.update, bound=BOUND, eps=EPS, **flags)
    assert_same(case.sketch, sketched, 80, case.dtype)
    assert_same(case.update, updated, 80, case.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nan_reaches_the_weight_and_infinity_does_not(kind: str, dtype: str) -> None:
    case = Case((24, 40), 4, DTYPES[dtype], kind)
    case.grads[0][3, 5], case.grads[0][7, 9] = torch.nan, torch.inf
    factors.launch_update(
        case.tables, case.numbers, *case.update, bound=BOUND, eps=EPS, SECOND=kind, STEP=True, TAIL=False
    )
    found = case.params[0].isnan().nonzero().tolist()
    assert found == [[3, 5]] and not case.params[0].isinf().any()


def test_rounding_is_stochastic_where_it_is_asked_for() -> None:
    """From 1, half of 12,288 steps of 2^-10 each go up, an eighth of the way to the next number, half down, a quarter.

    So a sixteenth of the weights and an eighth should move, with standard errors of 0.002 and 0.003.
    """
    case = Case((64, 64), 4, torch.bfloat16, "none")
    for param in case.params:
        param.fill_(1.0)
    case.numbers[:] = torch.tensor([0.1, 0.0, 0.0, 2.0**-10, 1.0, 77.0])
    flags: Any = {"SECOND": "none", "STEP": True, "TAIL": False}
    tables = case.tables._replace(stochastic=True)
    factors.launch_update(tables, case.numbers, *case.update, bound=BOUND, eps=EPS, **flags)
    params = torch.stack(case.params)
    assert abs((params == 1 + 2**-7).float().mean() - 1 / 16) < 0.008
    assert abs((params == 1 - 2**-8).float().mean() - 1 / 8) < 0.012
