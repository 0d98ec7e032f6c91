"""Finite gradients, of whatever size, in whatever order: nothing that is not finite reaches a weight or the state."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import gossamer
from gossamer.optim import rules
from gossamer.optim.contract import build

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
KINDS = ("zero", "usual", "small", "tiny", "huge", "rank one", "zero rows", "one entry", "mixed sizes", "constant")


def gradient(kind: str, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """fp32: what is finite here is finite in the three dtypes."""
    usual = torch.randn(shape, generator=generator)
    rows, columns = usual[:, :1], usual[:1, :]
    if kind == "zero rows":
        return usual * (rows > 0)
    if kind == "one entry":
        only = torch.zeros(shape)
        only[-1, 0] = 3.0
        return only
    if kind == "mixed sizes":
        return usual * 10.0 ** (12 * rows.clamp(-2, 2) + 6 * columns.clamp(-2, 2))
    return {
        "zero": torch.zeros(shape),
        "usual": usual,
        "small": 1e-12 * usual,
        "tiny": 1e-38 * usual,
        "huge": 1e37 * usual,
        "rank one": rows @ columns,
        "constant": torch.ones(shape),
    }[kind]


cases = st.tuples(
    st.tuples(st.integers(1, 24), st.integers(1, 24)),
    st.integers(1, 26),
    st.sampled_from(DTYPES),
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 3)), min_size=2, max_size=5),
    st.booleans(),
    st.sampled_from((2, 2, 1, 0)),
)


def fields(name: str, rank: int, shape: tuple[int, int]) -> dict[str, Any]:
    """Ranks up to the smaller side and past it, and gaps that fall due within a dozen steps."""
    known = gossamer.methods()[name].cls.__dataclass_fields__
    given = {"rank": min(rank, min(shape) + 1), "update_proj_gap": 4, "reset_gap": 5, "warmup": 2}
    return {key: value for key, value in given.items() if key in known}


def check(name: str) -> None:
    """Run 40 cases, the same at every call."""

    @settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def stays_finite(case: tuple[Any, ...]) -> None:
        shape, rank, dtype, runs, tied, ndim = case
        ndim = 2 if gossamer.methods()[name].matrix_only else ndim
        part = (slice(None),) * ndim + (0,) * (2 - ndim)
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(shape, generator=generator)[part].to(dtype))
        opt = gossamer.Optimizer([{"params": [p], "method": build(name, **fields(name, rank, shape))}], lr=1e-3)
        for kind, count in runs:
            grad = gradient(kind, shape, generator)
            for _ in range(count):
                p.grad = (grad if tied else gradient(kind, shape, generator))[part].to(dtype)
                opt.step()
                assert bool(p.isfinite().all()), f"{kind}: a weight"
                for key, value in opt.state[p].items():
                    assert bool(value.isfinite().all()), f"{kind}: {key}"

    stays_finite()


@pytest.mark.parametrize("name", gossamer.methods())
def test_nothing_non_finite(name: str) -> None:
    check(name)


@pytest.mark.parametrize(("guard", "name"), [("gradient_bound", "adamw"), ("projected_bound", "galore")])
def test_it_would_be_noticed(monkeypatch: pytest.MonkeyPatch, guard: str, name: str) -> None:
    """Without the guards against overflow huge gradients end in an infinity."""
    monkeypatch.setattr(rules, guard, lambda *_: math.inf)
    with pytest.raises(AssertionError, match="huge"):
        check(name)
