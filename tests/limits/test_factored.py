"""Exact facts about MLorc, Gossamer's tracker and LoRA-Pre Muon, in fp64.

1e-9: a relative 1e-12 from the factorisations, times the 1e3 by which Adam's quotient may amplify it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gossamer
from gossamer.optim import factors, rules
from gossamer.optim.contract import Context, Method, State
from gossamer.rows import HERE, finish

SHAPES = {"tall": (14, 6), "wide": (6, 14), "square": (8, 8)}
BETAS = (0.9, 0.95)


def gradients(shape: tuple[int, int], steps: int = 30) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    signal = torch.randn(shape, dtype=torch.float64, generator=generator)
    return [signal + torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(steps)]


def step(method: Method, state: State, grad: Tensor, t: int) -> Tensor:
    context = Context(t, t, t, 0.0, torch.zeros_like(grad), torch.Generator().manual_seed(t), 0)
    return method.update(grad, state, context)


def pair(name: str, rank: int) -> tuple[Method, Method]:
    """A compressed method and its dense parent."""
    return {
        "mlorc": lambda: (gossamer.MLorc(rank=rank, betas=BETAS), gossamer.AdamW(betas=BETAS)),
        "mlorc-lion": lambda: (gossamer.MLorcLion(rank=rank, betas=BETAS), gossamer.Lion(betas=BETAS)),
        "mlorc-muon": lambda: (gossamer.MLorcMuon(rank=rank), gossamer.Muon()),
        "gossamer dense": lambda: (gossamer.Gossamer(rank=rank, second="dense"), gossamer.AdamW(betas=BETAS)),
        "gossamer square": lambda: (gossamer.Gossamer(rank=rank, second="square"), gossamer.AdamW(betas=BETAS)),
        "gossamer-lion": lambda: (gossamer.GossamerLion(rank=rank, betas=BETAS), gossamer.Lion(betas=BETAS)),
        "gossamer-muon": lambda: (gossamer.GossamerMuon(rank=rank), gossamer.Muon()),
    }[name]()


PAIRS = ["mlorc", "mlorc-lion", "mlorc-muon", "gossamer dense", "gossamer square", "gossamer-lion", "gossamer-muon"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", PAIRS)
def test_full_rank_is_the_parent(name: str, shape: tuple[int, int]) -> None:
    compressed, parent = pair(name, min(shape))
    param = torch.zeros(shape, dtype=torch.float64)
    states = [method.init(param) for method in (compressed, parent)]
    for t, grad in enumerate(gradients(shape), 1):
        ours, theirs = (step(m, s, grad, t) for m, s in zip((compressed, parent), states, strict=True))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["mlorc", "gossamer dense", "gossamer square"])
def test_gradients_of_rank_one_need_rank_one(name: str) -> None:
    """All gradients c_t u v^T: the first moment has rank one, and so has the second, c_t^2 u^2 (v^2)^T."""
    compressed, parent = pair(name, 1)
    u, v = gradients((9, 5), 1)[0][:, :1], gradients((5, 9), 1)[0][:1]
    param = torch.zeros(9, 9, dtype=torch.float64)
    states = [method.init(param) for method in (compressed, parent)]
    for t in range(1, 20):
        grad = (-1.0) ** (t // 4) * (1 + t % 3) * u @ v
        ours, theirs = (step(m, s, grad, t) for m, s in zip((compressed, parent), states, strict=True))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_without_memory_every_rank_is_the_parent(shape: tuple[int, int]) -> None:
    """beta = 0: only this gradient counts, and it is never compressed."""
    for compressed in (gossamer.MLorc(rank=1, betas=(0, 0), eps=0), gossamer.Gossamer(rank=1, betas=(0, 0), eps=0)):
        param = torch.zeros(shape, dtype=torch.float64)
        states = compressed.init(param)
        for t, grad in enumerate(gradients(shape, 5), 1):
            torch.testing.assert_close(step(compressed, states, grad, t), grad.sign(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_tracked_average_is_a_projection(shape: tuple[int, int], rank: int) -> None:
    """B'A' = B'B'^T (beta B A + (1 - beta) g): never larger than the average, B' orthonormal, also after zeros."""
    state = gossamer.Gossamer(rank=rank).init(torch.zeros(shape, dtype=torch.float64))
    b, a = state["m_B"], state["m_A"]
    for t, grad in enumerate(gradients(shape), 1):
        grad = grad * (t % 7 > 1)
        average = 0.9 * b @ a + 0.1 * grad
        w = factors.frame({"m_A": a}, "m", torch.Generator().manual_seed(0))
        b, a = factors.follow(b, a, w, grad, 0.9)
        torch.testing.assert_close(b.mT @ b, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(b @ a, b @ b.mT @ average, rtol=0, atol=1e-12)
        assert (b @ a).norm() <= average.norm() * (1 + 1e-12)


def test_tracked_average_is_exact_when_the_rank_suffices() -> None:
    """Gradients in a fixed subspace of rank 3: the factors hold the exact average from the first step on."""
    left, right = gradients((12, 3), 1)[0], gradients((3, 10), 1)[0]
    method = gossamer.Gossamer(rank=3)
    param = torch.zeros(12, 10, dtype=torch.float64)
    state, exact = method.init(param), param.clone()
    for t, core in enumerate(gradients((3, 3)), 1):
        step(method, state, left @ core @ right, t)
        exact.lerp_(left @ core @ right, 0.1)
        torch.testing.assert_close(factors.product(state, "m"), exact, rtol=1e-9, atol=1e-9)


def test_tracker_follows_a_reversal_and_does_not_see_the_scale() -> None:
    method, param = gossamer.Gossamer(rank=2), torch.zeros(10, 8, dtype=torch.float64)
    target = gradients((10, 2), 1)[0] @ gradients((2, 8), 1)[0]
    for scale in (1.0, 1e-12, 1e12):
        state = method.init(param)
        for t in range(1, 41):
            step(method, state, scale * target, t)
        for t in range(41, 51):  # 0.9^10 of the old sign, 1 - 0.9^10 of the new
            step(method, state, -scale * target, t)
        expected = (0.9**10 * (1 - 0.9**40) - (1 - 0.9**10)) * scale * target
        torch.testing.assert_close(factors.product(state, "m"), expected, rtol=1e-9, atol=1e-9 * scale)


def test_tail_makes_up_for_what_the_subspace_cannot_hold() -> None:
    """A constant gradient, one of four directions tracked: with tail 1 the momentum is dense, without it 0.1 of it."""
    u, _, vh = torch.linalg.svd(gradients((4, 4), 1)[0])
    values = torch.tensor([4.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    grad = u * values @ vh
    for tail, weight in ((1.0, 1.0), (0.0, 0.1), (0.5, 0.55)):
        method = gossamer.Gossamer(rank=1, second="dense", tail=tail)
        state = method.init(grad)
        for t in range(1, 300):
            direction = step(method, state, grad, t)
        m = direction * grad.abs()  # the second moment of a constant gradient is its square
        expected = values * torch.tensor([1.0, weight, weight, weight], dtype=torch.float64)
        torch.testing.assert_close(u.mT @ m @ vh.mT, expected.diag(), rtol=0, atol=1e-6)  # eps / |g|


def test_muon_fixed_point() -> None:
    """A constant gradient g of rank r: LoRA-Pre Muon's momentum settles at mu g / (1 - mu) + g, as Muon's own sum."""
    grad = gradients((9, 2), 1)[0] @ gradients((2, 7), 1)[0]
    method = gossamer.LoRAPreMuon(rank=2, updates="sequential", damping=1e-12, damping_mode="relative")
    state = method.init(grad)
    for t in range(1, 600):
        step(method, state, grad, t)
    torch.testing.assert_close(factors.product(state, "m"), grad / (1 - method.momentum), rtol=1e-6, atol=1e-6)


def test_floor_of_a_second_moment() -> None:
    x = torch.tensor([[-1.0, 2.0], [0.0, -3.0]])
    assert torch.equal(factors.nonnegative(x), torch.tensor([[2.0, 2.0], [0.0, 2.0]]))
    assert torch.equal(factors.nonnegative(x.abs()), x.abs())


@pytest.mark.parametrize("method", [gossamer.MLorc, gossamer.MLorcLion, gossamer.MLorcMuon])
def test_mlorc_keeps_the_best_approximation_with_power_iterations(method: type) -> None:
    """Many power iterations: what is kept has the error of the truncated SVD."""
    compressed = method(rank=3, power_iterations=50)
    (grad,) = gradients((12, 9), 1)
    state = compressed.init(grad)
    step(compressed, state, grad, 1)
    kept = factors.product(state, "m")
    values = torch.linalg.svdvals(grad)
    share = values[:3].square().sum() / values.square().sum()
    scale = (kept * grad).sum() / grad.square().sum() / share  # 1 - beta of the method at hand
    assert kept.norm() == pytest.approx(float(scale * values[:3].norm()), rel=1e-6)


def test_muon_directions_have_the_shape_factor() -> None:
    (grad,) = gradients((16, 4), 1)
    original, matched = (finish(rules.orthogonalize(grad, adjust), HERE) for adjust in rules.ADJUSTMENTS)
    assert torch.allclose(original, 5 * matched * 0.5)


def test_a_zero_first_gradient_does_not_choose_the_subspace() -> None:
    """Then a gradient that is zero in its first r rows and columns: a coordinate frame would never see it."""
    method = gossamer.Gossamer(rank=2)
    (grad,) = gradients((8, 6), 1)
    grad[:2] = 0
    grad[:, :2] = 0
    state = method.init(grad)
    step(method, state, torch.zeros_like(grad), 1)
    for t in range(2, 60):
        step(method, state, grad, t)
    best = torch.linalg.svdvals(grad)[:2].norm()
    # rel: of the first steps, when the subspace is still on its way, 0.9^50 is left
    assert float(factors.product(state, "m").norm()) == pytest.approx(float(best * (1 - 0.9**58)), rel=2e-2)


@pytest.mark.parametrize("outlier", [100.0, 1000.0])
def test_one_large_entry_moves_its_row_and_column(outlier: float) -> None:
    """A weakness of the tail: what lies outside the subspace is spread over entries whose v knows nothing of it."""
    tracker, cut, dense = gossamer.Gossamer(rank=8), gossamer.Gossamer(rank=8, tail=0.0), gossamer.AdamW(betas=BETAS)
    states = [method.init(torch.zeros(64, 64, dtype=torch.float64)) for method in (tracker, cut, dense)]
    for t, grad in enumerate(gradients((64, 64)), 1):
        if t == 30:
            grad[5, 7] = outlier
        largest = [float(step(*pair, grad, t).abs().max()) for pair in zip((tracker, cut, dense), states, strict=True)]
    assert largest[0] > outlier / 40 and max(largest[1:]) < 3
