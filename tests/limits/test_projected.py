"""What the equations of the projected methods promise in the limits, in float64.

At full rank the projection of GaLore and LDAdam is a rotation of the smaller side, and Adam is not invariant under
rotations: full-rank GaLore is AdamW on the rotated gradients, rotated back, and AdamW itself where the basis is the
identity. Fira's residual is then zero ("paper"), so that Fira is GaLore.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import gossamer
from gossamer import UserError
from gossamer.optim import subspace
from gossamer.optim.contract import Context, Method, State, build, hash63
from gossamer.optim.methods.adamw import AdamW

F64 = torch.float64
NAMES = ["galore", "golore", "fira", "apollo", "apollo-mini", "ldadam"]
PROJECTING = ["galore", "golore", "ldadam"]
"""Those whose direction lies in the span of the basis."""
SHAPES = pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)], ids=["tall", "wide", "square"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def context(grad: Tensor, t: int, key: int = 5, m_step: int | None = None, v_step: int | None = None) -> Context:
    generator = torch.Generator().manual_seed(t)
    return Context(t, m_step or t, v_step or t, 0.0, torch.zeros_like(grad), generator, key)


def step(method: Method, state: State, grad: Tensor, t: int, **steps: int) -> Tensor:
    return method.update(grad, state, context(grad, t, **steps))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    # float64 rounds at 1e-16; a product over a side of ten and a root leave 1e-10 with room
    return bool((a - b).norm() <= tolerance * max(float(b.norm()), 1e-30))


def rotated(grad: Tensor, basis: Tensor) -> Tensor:
    return grad @ basis if grad.shape[0] >= grad.shape[1] else basis.mT @ grad


def back(low: Tensor, basis: Tensor) -> Tensor:
    return low @ basis.mT if low.shape[0] >= low.shape[1] else basis @ low


# --- full rank ---


@SHAPES
@pytest.mark.parametrize("name", ["galore", "golore"])
def test_full_rank_is_adamw_in_rotated_coordinates(name: str, shape: tuple[int, int]) -> None:
    method, parent = build(name, rank=99, scale=1.0, update_proj_gap=100), AdamW()
    param = torch.zeros(shape, dtype=F64)
    state, dense = method.init(param), parent.init(param)
    for t in range(1, 12):
        grad = randn(*shape, seed=t)
        ours = step(method, state, grad, t)
        assert close(ours, back(step(parent, dense, rotated(grad, state["basis"]), t), state["basis"]))


@SHAPES
def test_full_rank_with_the_identity_is_adamw(shape: tuple[int, int]) -> None:
    method, parent = build("galore", rank=99, update_proj_gap=100), AdamW()
    param = torch.zeros(shape, dtype=F64)
    state, dense = method.init(param), parent.init(param)
    for t in range(1, 12):
        if t == 2:  # after the refresh of the first step
            for key in "mv":
                state[key].zero_()
                dense[key].zero_()
            state["basis"].copy_(torch.eye(min(shape), dtype=F64))
        grad = randn(*shape, seed=t)
        ours, theirs = step(method, state, grad, t), step(parent, dense, grad, t)
        assert t == 1 or close(ours, theirs)


@SHAPES
def test_full_rank_fira_is_galore(shape: tuple[int, int]) -> None:
    galore = build("galore", rank=99, scale=0.25, update_proj_gap=3)
    fira = build("fira", rank=99, scale=0.25, update_proj_gap=3, residual="paper")
    param = torch.zeros(shape, dtype=F64)
    states = fira.init(param), galore.init(param)
    for t in range(1, 9):
        grad = randn(*shape, seed=t)
        assert close(step(fira, states[0], grad, t), step(galore, states[1], grad, t))


@SHAPES
def test_full_rank_ldadam_has_no_error(shape: tuple[int, int]) -> None:
    method = build("ldadam", rank=99)
    state = method.init(torch.zeros(shape, dtype=F64))
    for t in range(1, 9):
        step(method, state, randn(*shape, seed=t), t)
        # ten roundings of numbers of order ten, 1e-15 each, times 1 / (1 - beta1)
        assert state["m_error"].norm() < 1e-11


# --- beta = 0, rank 1, nothing at all ---


@SHAPES
def test_without_memory_galore_is_the_sign_of_the_projection(shape: tuple[int, int]) -> None:
    method = build("galore", rank=3, betas=(0.0, 0.0), eps=0.0)
    state, grad = method.init(torch.zeros(shape, dtype=F64)), randn(*shape)
    ours = step(method, state, grad, 1)
    assert close(ours, back(rotated(grad, state["basis"]).sign(), state["basis"]))


@SHAPES
def test_without_memory_apollo_normalises_channels(shape: tuple[int, int]) -> None:
    """|sign(R_j)| = sqrt(r), so channel j is G_j sqrt(r) / |R_j|; over many P, |R_j| is |G_j|."""
    rank = 4000
    method = build("apollo", rank=rank, betas=(0.0, 0.0), eps=0.0, growth_limit=None)
    small = min(shape)
    grad = randn(*shape)
    ours = step(method, method.init(torch.zeros(shape, dtype=F64)), grad, 1)
    dim = 1 if shape[0] >= shape[1] else 0
    expected = grad / grad.norm(dim=dim, keepdim=True) * small**0.5  # r is cut to the smaller side
    ratio = (ours / expected).mean(dim)
    assert torch.allclose(ours / expected, ratio.unsqueeze(dim).expand(shape))  # each channel keeps its direction
    assert float(ratio.min()) > 0.4 and float(ratio.max()) < 2.5  # |R_j| / |G_j| is chi(r) / sqrt(r), r >= 7


@SHAPES
@pytest.mark.parametrize("name", PROJECTING)
def test_rank_one_directions_have_rank_one(name: str, shape: tuple[int, int]) -> None:
    method = build(name, rank=1)
    state = method.init(torch.zeros(shape, dtype=F64))
    for t in range(1, 5):
        direction = step(method, state, randn(*shape, seed=t), t)
        assert int(torch.linalg.matrix_rank(direction)) == 1
    assert state["basis"].shape == (min(shape), 1) and state["m"].shape == state["v"].shape == (max(shape), 1)


@pytest.mark.parametrize("name", ["fira", "apollo", "apollo-mini"])
def test_full_rank_directions_have_full_rank(name: str) -> None:
    method, grad = build(name, rank=1), randn(12, 7)
    assert int(torch.linalg.matrix_rank(step(method, method.init(grad), grad, 1))) == 7


@SHAPES
@pytest.mark.parametrize("name", NAMES)
def test_a_zero_gradient_moves_nothing(name: str, shape: tuple[int, int]) -> None:
    method = build(name)
    zero = torch.zeros(shape, dtype=F64)
    state = method.init(zero)
    for t in range(1, 4):
        assert torch.equal(step(method, state, zero, t), zero)
    assert all(bool(x.isfinite().all()) for x in state.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_wide_matrix_is_a_tall_one_transposed(name: str) -> None:
    method = build(name, rank=3)
    tall, wide = (method.init(torch.zeros(shape, dtype=F64)) for shape in ((12, 7), (7, 12)))
    for t in range(1, 8):
        grad = randn(12, 7, seed=t)
        assert close(step(method, wide, grad.mT.contiguous(), t), step(method, tall, grad, t).mT)


# --- moments ---


@pytest.mark.parametrize("name", NAMES)
def test_moments_age_since_their_reset(name: str) -> None:
    """From the same projector and zero moments, step 7 of a run does what step 2 does: only their own age counts."""
    method = build(name, rank=3, **({} if name == "ldadam" else {"update_proj_gap": 100}))
    late = method.init(torch.zeros(12, 7, dtype=F64))
    for t in range(1, 7):
        step(method, late, randn(12, 7, seed=t), t)
    for key in "mv":
        late[key].zero_()
    early = {key: value.clone() for key, value in late.items()}
    for age in range(1, 5):
        grad = randn(12, 7, seed=50 + age)
        ours = step(method, late, grad, 6 + age, m_step=age, v_step=age)
        assert torch.equal(ours, step(method, early, grad, 1 + age, m_step=age, v_step=age))


@pytest.mark.parametrize("name", NAMES)
def test_resetting_the_second_moment_alone_is_finite_for_huge_gradients(name: str) -> None:
    """m of 1e37 over the root of a v of zero: the largest quotient there is, in fp32."""
    method = build(name, rank=3)
    state = method.init(torch.zeros(12, 7))
    for t in range(1, 5):
        assert step(method, state, 1e37 * randn(12, 7, seed=t).float(), t).isfinite().all()
    state["v"].zero_()
    assert step(method, state, torch.zeros(12, 7), 5, v_step=1).isfinite().all()
    assert step(method, state, torch.full((12, 7), 1e-38), 6, v_step=2).isfinite().all()
    assert all(bool(x.isfinite().all()) for x in state.values())


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)], ids=["tall", "wide"])
def test_golore_rotates_the_first_moment(shape: tuple[int, int]) -> None:
    """At a refresh the old momentum is projected on the new subspace; a basis of the same subspace loses nothing."""
    method = build("golore", rank=3, update_proj_gap=4, random_after=100, betas=(0.9, 0.999))
    param = torch.zeros(shape, dtype=F64)
    state, tall = method.init(param), shape[0] >= shape[1]
    same = randn(*shape, seed=3)[:, :3] @ randn(3, shape[1], seed=4)  # rank 3: every gradient in one subspace
    for t in range(1, 5):
        step(method, state, same * t, t)
    before = subspace.Subspace(state["basis"].clone(), tall).up(state["m"])
    state["basis"].copy_(state["basis"] @ torch.linalg.qr(randn(3, 3)).Q)  # turned within its span ...
    state["m"].copy_(subspace.Subspace(state["basis"], tall).down(before))  # ... and the momentum with it
    step(method, state, same, 5)
    after = subspace.Subspace(state["basis"], tall).up(state["m"])
    assert close(after, 0.9 * before + 0.1 * same)


@SHAPES
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_error_feedback_loses_nothing(shape: tuple[int, int], beta1: float) -> None:
    """U' m' = beta1 U m + (1 - beta1) (g + e - e') at every step; summed up, applied momentum + error = gradients."""
    method = build("ldadam", rank=2, betas=(beta1, 0.99))
    state, tall = method.init(torch.zeros(shape, dtype=F64)), shape[0] >= shape[1]
    applied, total, momentum = (torch.zeros(shape, dtype=F64) for _ in range(3))
    for t in range(1, 15):
        grad, error = randn(*shape, seed=t), state["m_error"].clone()
        step(method, state, grad, t)
        now = subspace.Subspace(state["basis"], tall).up(state["m"])
        assert close(now, beta1 * momentum + (1 - beta1) * (grad + error - state["m_error"]))
        momentum, applied, total = now, applied + now, total + grad
    # sum of U m = sum of (g + e - e') less what is still in the momentum, beta1 / (1 - beta1) U m
    assert close(applied + beta1 / (1 - beta1) * momentum + state["m_error"], total)


def test_ldadam_transports_second_moments_without_loss_within_their_span() -> None:
    """C^2 has rows and columns that sum to 1 where C is a rotation: the sum of a channel's second moments is kept."""
    method = build("ldadam", rank=3, error_feedback=False)
    state, right = method.init(torch.zeros(12, 7, dtype=F64)), torch.linalg.qr(randn(7, 3)).Q
    expected = torch.zeros(12, dtype=F64)
    for t in range(1, 10):
        low = randn(12, 3, seed=t)  # every gradient in one subspace, whose basis turns at every step
        step(method, state, low @ right.mT, t)
        expected = 0.99 * expected + 0.01 * low.square().sum(1)
        assert close(state["v"].sum(1), expected) and bool((state["v"] >= 0).all())


# --- the growth limiter ---


@pytest.mark.parametrize("name", ["fira", "apollo", "apollo-mini"])
def test_the_limited_norm_never_grows_by_more_than_gamma(name: str) -> None:
    method = build(name, rank=3)
    param = torch.zeros(12, 7, dtype=F64)
    state, norms = method.init(param), []
    for t in range(1, 40):
        step(method, state, randn(12, 7, seed=t) * (100.0 if t == 20 else 1.0), t)
        norms.append(float(state["norm"]))
    ratios = [b / a for a, b in pairwise(norms)]
    assert max(ratios) <= 1.01 * (1 + 1e-7)  # the 1e-8 that the papers add to a norm of about 1
    assert min(ratios) < 0.99  # shrinking is free


def test_the_limiter_sees_steps_without_bias_correction() -> None:
    """For a constant gradient Adam's corrected step is constant, the uncorrected one rises at first and is limited."""
    fields = {"rank": 3, "betas": (0.9, 0.999), "update_proj_gap": 100}
    limited, free, grad = build("apollo", **fields), build("apollo", growth_limit=None, **fields), randn(12, 7)
    state, constant = limited.init(grad), float(step(free, free.init(grad), grad, 1).norm())
    allowed = math.inf
    for t in range(1, 60):
        correction = math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        allowed = min(constant / correction, 1.01 * allowed)
        size = float(step(limited, state, grad, t).norm())
        assert math.isclose(size, allowed * correction, rel_tol=1e-5)  # eps and 1e-8 beside numbers of order 1
        assert t != 6 or size < 0.6 * constant


@pytest.mark.parametrize("name", ["fira", "apollo", "apollo-mini"])
def test_a_zero_gradient_does_not_freeze_the_limiter(name: str) -> None:
    """The authors' code remembers the zero norm, and 1.01 a step takes 1,850 steps from 1e-8 to 1."""
    method = build(name, rank=3, betas=(0.0, 0.0))
    state = method.init(torch.zeros(12, 7, dtype=F64))
    step(method, state, torch.zeros(12, 7, dtype=F64), 1)
    assert float(step(method, state, randn(12, 7), 2).norm()) > 0.1


def test_limit_growth_is_the_minimum() -> None:
    for size, previous, expected in ((1.0, 0.0, 1.0), (2.0, 1.0, 0.505), (1.005, 1.0, 1.0), (0.1, 1.0, 1.0)):
        kept = torch.tensor(previous, dtype=F64)
        factor = subspace.limit_growth(torch.tensor([[size]], dtype=F64), kept, 1.01, fresh=False)
        assert math.isclose(float(factor), expected, rel_tol=1e-7)  # the 1e-8 beside a norm of 1
        assert math.isclose(float(kept), size * expected, rel_tol=1e-7)


# --- the basis ---


def test_together_everyone_refreshes_at_the_first_step_and_every_gap() -> None:
    assert [t for t in range(1, 40) if subspace.due(t, 10)] == [1, 11, 21, 31]


def test_staggered_refreshes_are_spread_and_complete() -> None:
    gap, parameters, horizon = 50, 5000, 300
    load = [0] * (horizon + 1)
    for index in range(parameters):
        steps = [t for t in range(1, horizon + 1) if subspace.due(t, gap, hash63(0, f"layer.{index}"))]
        later = [t for t in steps if t > 1]
        assert steps[0] == 1 and 2 <= later[0] <= gap + 1  # the first basis serves no longer than any other
        assert all(b - a == gap for a, b in pairwise(later))
        for t in steps:
            load[t] += 1
    assert load[1] == parameters
    mean, spread = parameters / gap, math.sqrt(parameters / gap)
    # the count of a step is binomial: 100 +- 10; five standard deviations over fifty distinct counts
    assert all(abs(count - mean) < 5 * spread for count in load[2:])


@pytest.mark.parametrize("kind", ["svd", "warm", "random"])
@SHAPES
def test_bases_are_orthonormal(shape: tuple[int, int], kind: subspace.Refresh) -> None:
    for grad in (randn(*shape), randn(*shape)[:, :1] @ randn(1, shape[1]), torch.zeros(shape, dtype=F64)):
        basis = torch.zeros(min(shape), 4, dtype=F64)
        for t in (1, 2):
            basis = subspace.refreshed(basis, grad, context(grad, t), kind)
            assert basis.shape == (min(shape), 4) and close(basis.mT @ basis, torch.eye(4, dtype=F64))


@pytest.mark.parametrize("kind", ["svd", "warm"])
@SHAPES
def test_a_zero_gradient_says_nothing_about_directions(shape: tuple[int, int], kind: subspace.Refresh) -> None:
    """Upstream of an output projection that starts at zero the first gradient is zero: no coordinate is preferred."""
    zero = torch.zeros(shape, dtype=F64)
    first = subspace.refreshed(torch.zeros(min(shape), 4, dtype=F64), zero, context(zero, 1), kind)
    assert bool((first != 0).all())  # a coordinate basis has zeros
    assert torch.equal(subspace.refreshed(first, zero, context(zero, 2), kind), first)


@pytest.mark.parametrize("moments", [("m", "v"), ("m",), ("v",)], ids=["both", "m", "v"])
@pytest.mark.parametrize("method", [gossamer.Fira(rank=4), gossamer.Apollo(rank=4)], ids=["fira", "apollo"])
def test_a_reset_does_not_starve_the_direction(method: gossamer.Method, moments: tuple[str, ...]) -> None:
    """Sizes are limited without bias correction, which a reset starts again: the limiter has to start again too.

    Half: a moment made of a few noisy gradients changes the length by less.
    """
    param = torch.nn.Parameter(torch.zeros(24, 16))
    opt = gossamer.Optimizer([{"params": [("w", param)], "method": method}], lr=1.0)
    generator, lengths = torch.Generator().manual_seed(0), []
    for step in range(1, 431):
        if step == 401:
            opt.reset(moments=moments)
        before, param.grad = param.detach().clone(), torch.randn(24, 16, generator=generator)
        opt.step()
        lengths.append(float((param.detach() - before).norm()))
    assert sum(lengths[405:430]) / 25 > 0.5 * sum(lengths[350:400]) / 50


@SHAPES
def test_warm_refreshes_reach_the_singular_subspace(shape: tuple[int, int]) -> None:
    """The error falls as (sigma_4 / sigma_3)^2 a refresh: here 1 / 100, so 1e-8 after the start and four more."""
    u, v = torch.linalg.qr(randn(shape[0], 7)).Q, torch.linalg.qr(randn(shape[1], 7, seed=1)).Q
    grad = u @ torch.diag(torch.tensor([30.0, 20.0, 10.0, 1.0, 0.5, 0.2, 0.1], dtype=F64)) @ v.mT
    exact = subspace.refreshed(torch.zeros(min(shape), 3, dtype=F64), grad, context(grad, 1), "svd")
    basis = torch.zeros(min(shape), 3, dtype=F64)
    for t in range(1, 6):
        basis = subspace.refreshed(basis, grad, context(grad, t), "warm")
    assert float((basis - exact @ (exact.mT @ basis)).norm()) < 1e-8


def test_random_bases_are_uniform() -> None:
    """E[P P^T] = (r / s) I for the uniform distribution, and no entry of P has a preferred sign."""
    draws = 4000
    zero = torch.zeros(6, 2, dtype=F64)
    bases = torch.stack([subspace.refreshed(zero, zero, context(zero, t), "random") for t in range(draws)])
    mean = (bases @ bases.mT).mean(0)
    # entries of P P^T lie in [-1, 1] with a standard deviation below 0.25: 5 of them over sqrt(4000) is 0.02
    assert torch.allclose(mean, torch.eye(6, dtype=F64) / 3, atol=0.02)
    assert float(bases.mean(0).abs().max()) < 5 * 0.41 / math.sqrt(draws)  # E[P_ij^2] = 1 / s


def test_apollo_keeps_no_projection_and_draws_it_again() -> None:
    method = build("apollo", rank=4, update_proj_gap=10)
    grad = randn(64, 32)
    assert set(method.init(grad)) == {"m", "v", "norm"}
    draws = [method.projection(grad, context(grad, t)) for t in range(1, 22)]  # type: ignore
    assert all(torch.equal(draws[0], p) for p in draws[:10]) and all(torch.equal(draws[10], p) for p in draws[10:20])
    assert not torch.equal(draws[0], draws[10]) and not torch.equal(draws[10], draws[20])
    other = method.projection(grad, context(grad, 1, key=6))  # type: ignore
    assert not torch.equal(draws[0], other)
    entries = torch.stack([draws[0], draws[10], draws[20], other])
    # 512 numbers of variance 1 / 4: the variance of their sample variance is 2 / 512 of its square
    assert abs(float(entries.var()) * 4 - 1) < 5 * math.sqrt(2 / 512)


# --- arithmetic ---


@pytest.mark.parametrize("size", [1e30, 1.0, 1e-30])
def test_norms_survive_numbers_whose_squares_do_not(size: float) -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]]) * size
    assert torch.allclose(subspace.norm(x), torch.tensor([[5.0], [0.0]]) * size, rtol=1e-6)  # fp32
    assert torch.allclose(subspace.whole_norm(x), torch.tensor([[5.0]]) * size, rtol=1e-6)


def test_a_gain_is_finite_whatever_it_divides() -> None:
    """A direction of 1e30 over a projected gradient of zero: times a gradient of 4e9 it must still be a number."""
    gain = subspace.channel_gain(torch.full((3, 2), 1e30), torch.zeros(3, 2))
    assert bool((gain * torch.finfo(torch.float32).max ** 0.25).isfinite().all())


def test_eight_bit_galore_is_near() -> None:
    exact, coded = (build("galore", rank=8, state_bits=bits) for bits in (32, 8))
    param = torch.zeros(96, 64)
    states = exact.init(param), coded.init(param)
    assert set(states[1]) == {"basis", "m_codes", "m_scale", "v_codes", "v_scale"}
    for t in range(1, 20):
        grad = (randn(96, 64) + randn(96, 64, seed=t)).float()
        a, b = step(exact, states[0], grad, t), step(coded, states[1], grad, t)
        assert float((a - b).norm() / a.norm()) < 0.1  # a code has two digits, and the root of v halves its error


@pytest.mark.parametrize(
    "name, fields",
    [
        ("galore", {"rank": 0}),
        ("galore", {"update_proj_gap": 0}),
        ("galore", {"refresh": "SVD"}),
        ("galore", {"state_bits": 4}),
        ("golore", {"random_after": -1}),
        ("fira", {"residual": "exact"}),
        ("fira", {"growth_limit": 0.99}),
        ("apollo", {"scaling": "row"}),
        ("apollo", {"scale": -1.0}),
        ("ldadam", {"rho": 1.0}),
    ],
)
def test_values_out_of_range_are_named(name: str, fields: dict[str, object]) -> None:
    (field, value), *_ = fields.items()
    with pytest.raises(UserError, match=rf"{name}: {field} is {value!r}.*; allowed:"):
        build(name, **fields)
