"""What LoRA-Pre's equations promise in the limits, in float64.

At full rank LoRA-Pre is *not* AdamW: the simultaneous update multiplies in G M^+ G (no average at all), and the second
moment averages |g| and squares it. What does hold, and is tested: the first moment of the sequential form is the exact
average once its factors are of full rank; with beta1 = beta2 = 0 both forms are AdamW; for a gradient that is constant
both moments, and so the step, are AdamW's at any rank that holds the gradient.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import gossamer
from gossamer import AdamW, LoRAPre, LoRAPreStable
from gossamer.linalg import damped_pinv
from gossamer.optim.contract import Context, Method, State

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def step(method: Method, state: State, grad: Tensor, t: int) -> Tensor:
    return method.update(
        grad, state, Context(t, t, t, 0.0, torch.zeros_like(grad), torch.Generator().manual_seed(0), 0)
    )


def product(state: State, name: str = "m") -> Tensor:
    return state[f"{name}_B"] @ state[f"{name}_A"]


def warm(method: LoRAPre, shape: tuple[int, int], steps: int = 30) -> tuple[State, int]:
    """A state whose factors have full rank, and the number of steps it took."""
    state = method.init(torch.zeros(shape, dtype=F64))
    for t in range(1, steps + 1):
        step(method, state, randn(*shape, seed=t), t)
    return state, steps


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)], ids=["tall", "wide", "square"])
def test_simultaneous_product_identity(shape: tuple[int, int]) -> None:
    """B'A' = (1-g)^2 M + g(1-g)(P_B G + G P_A) + g^2 G M^+ G, exact for full-rank factors without damping."""
    method = LoRAPre(rank=3, damping=0.0)
    state, t = warm(method, shape)
    b, a, m, g = state["m_B"].clone(), state["m_A"].clone(), product(state), randn(*shape, seed=99)
    gamma = 1 - 0.9**0.5
    step(method, state, g, t + 1)
    b_inv, a_inv = torch.linalg.pinv(b), torch.linalg.pinv(a)
    expected = (1 - gamma) ** 2 * m + gamma * (1 - gamma) * (b @ b_inv @ g + g @ a_inv @ a)
    expected += gamma**2 * g @ a_inv @ b_inv @ g
    # the pseudo-inverses amplify rounding by the condition of the factors, some 1e3 here; damping's floor is 2e-15
    assert torch.allclose(product(state), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)], ids=["tall", "wide", "square"])
def test_sequential_product_identity_and_bound(shape: tuple[int, int]) -> None:
    """B'A' = beta M + g(1-g) G P_A + g P_B' G, so |B'A'| <= beta |M| + (1 - beta) |G|."""
    method = LoRAPre(rank=3, damping=0.0, updates="sequential")
    state, t = warm(method, shape)
    a, m, g = state["m_A"].clone(), product(state), randn(*shape, seed=99)
    gamma, beta = 1 - 0.9**0.5, 0.9
    step(method, state, g, t + 1)
    b = state["m_B"]
    expected = beta * m + gamma * (1 - gamma) * g @ torch.linalg.pinv(a) @ a + gamma * b @ torch.linalg.pinv(b) @ g
    assert torch.allclose(product(state), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    for bounded in (method, LoRAPreStable(rank=3)):  # the damping of the stable preset only shrinks the projectors
        state, t = warm(bounded, shape)
        for seed in range(20):
            before, g = product(state).norm(), randn(*shape, seed=seed)
            t += 1
            step(bounded, state, g, t)
            assert product(state).norm() <= (beta * before + (1 - beta) * g.norm()) * (1 + 1e-9)


def test_full_rank_sequential_first_moment_is_the_exact_average() -> None:
    """Square, r = m = n: both projectors are the identity, so B'A' = beta M + (1 - beta) G at every step."""
    method = LoRAPre(rank=6, damping=0.0, updates="sequential")
    state = method.init(torch.zeros(6, 6, dtype=F64))
    average, signal = torch.zeros(6, 6, dtype=F64), randn(6, 6, seed=1) + 3 * torch.eye(6, dtype=F64)
    for t in range(1, 60):
        grad = signal + 0.1 * randn(6, 6, seed=t)  # a signal keeps B away from the singular matrices
        step(method, state, grad, t)
        average = 0.9 * average + 0.1 * grad if t > 1 else product(state).clone()  # step 1 starts from B = 0
        assert torch.allclose(product(state), average, rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", [LoRAPre(rank=3), LoRAPreStable(rank=3)], ids=["paper", "stable"])
def test_beta_zero_is_adamw(method: LoRAPre) -> None:
    """With beta1 = beta2 = 0 nothing of the past enters: the step is g / (|g| + eps)."""
    method = type(method)(rank=3, betas=(0.0, 0.0))
    dense = AdamW(betas=(0.0, 0.0))
    state, reference = method.init(torch.zeros(8, 5, dtype=F64)), dense.init(torch.zeros(8, 5, dtype=F64))
    for t in range(1, 6):
        g = randn(8, 5, seed=t)
        assert torch.allclose(step(method, state, g, t), step(dense, reference, g, t), rtol=1e-12)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)], ids=["tall", "wide", "square"])
def test_constant_gradient_becomes_adamw(shape: tuple[int, int]) -> None:
    """A constant gradient of rank r is held exactly, and so is |g| when it has rank r too."""
    g = randn(shape[0], 1, seed=1) @ randn(1, shape[1], seed=2)  # rank one, and so is |g|
    for method in (LoRAPre, LoRAPreStable):
        method = method(rank=1, damping=0.0, betas=(0.5, 0.5))  # 0.84^200 of the start is left
        state = method.init(torch.zeros(shape, dtype=F64))
        for t in range(1, 200):
            direction = step(method, state, g, t)
        # damping's floor of 10 eps soft-thresholds the product relatively by about 1e-14
        assert torch.allclose(product(state), g, rtol=1e-6)
        assert torch.allclose(product(state, "v"), g.abs(), rtol=1e-6)
        assert torch.allclose(direction, g.sign(), rtol=1e-5)


@pytest.mark.parametrize("t", [2, 3, 10, 100])
def test_exact_bias_correction_sums_to_one(t: int) -> None:
    """Where the tracker holds the average of t - 1 gradients |g| = 1, v_hat is 1; as printed it is not."""
    g, beta1, beta2 = torch.ones(8, 5, dtype=F64), 0.9, 0.999
    mass = 1 - beta2 ** ((t - 1) / 2)
    v_hat = {}
    for method in (LoRAPre(rank=1, betas=(beta1, beta2)), LoRAPreStable(rank=1, betas=(beta1, beta2))):
        state = method.init(torch.zeros(8, 5, dtype=F64))  # m_B = 0, so m = (1 - beta1) g and the direction shows v
        state["v_B"].fill_(mass)
        state["v_A"].fill_(1.0)
        direction = step(method, state, g, t)
        v_hat[type(method)] = float((((1 - beta1) / (1 - beta1**t)) / direction.mean()) ** 2)
    assert v_hat[LoRAPreStable] == pytest.approx(1.0, rel=1e-6)
    printed = (beta2 * mass**2 + 1 - beta2) / (1 - beta2**t)
    assert v_hat[LoRAPre] == pytest.approx(printed, rel=1e-6) and printed < 0.8


def test_gauge_equivariance_without_damping() -> None:
    """(B, A) -> (B R, R^-1 A) commutes with the update, so the scale of the first A does not matter."""
    for updates in ("simultaneous", "sequential"):
        method = LoRAPre(rank=3, damping=0.0, updates=updates)
        one, t = warm(method, (8, 6))
        gauge = randn(3, 3, seed=5) + 2 * torch.eye(3, dtype=F64)
        two = {**{k: v.clone() for k, v in one.items()}}
        two["m_B"], two["m_A"] = one["m_B"] @ gauge, torch.linalg.solve(gauge, one["m_A"])
        for s in range(5):
            g = randn(8, 6, seed=50 + s)
            step(method, one, g, t + 1 + s)
            step(method, two, g, t + 1 + s)
        assert torch.allclose(product(one), product(two), rtol=0, atol=1e-7 * float(product(one).abs().max()))


def test_damping_soft_thresholds_the_singular_values() -> None:
    """At a constant target the fixed point is the truncation with every singular value lowered by the damping."""
    u, v = torch.linalg.qr(randn(8, 3, seed=1))[0], torch.linalg.qr(randn(6, 3, seed=2))[0]
    g = u @ torch.diag(torch.tensor([3.0, 1.0, 0.2], dtype=F64)) @ v.T
    for updates in ("simultaneous", "sequential"):
        method = LoRAPre(rank=3, damping=0.5, updates=updates, betas=(0.5, 0.5))
        state = method.init(torch.zeros(8, 6, dtype=F64))
        for t in range(1, 300):
            step(method, state, g, t)
        assert torch.allclose(
            torch.linalg.svdvals(product(state))[:3], torch.tensor([2.5, 0.5, 0.0], dtype=F64), atol=1e-3
        )


def test_zero_gradients_decay_the_product() -> None:
    for method in (LoRAPre(rank=3), LoRAPreStable(rank=3)):
        state, t = warm(method, (8, 6))
        m, v = product(state), product(state, "v")
        for s in range(10):
            step(method, state, torch.zeros(8, 6, dtype=F64), t + 1 + s)
        assert torch.allclose(product(state), 0.9**10 * m) and torch.allclose(product(state, "v"), 0.95**5 * v)


def test_zero_gradients_do_not_kill_the_factors() -> None:
    """Printed, both factors underflow to zero and stay there: 0.71^400 is below the smallest fp32 number."""
    for method in (LoRAPre, LoRAPreStable):
        method = method(rank=3, betas=(0.5, 0.5))
        state = method.init(torch.zeros(8, 6))
        for t in range(1, 431):
            step(method, state, randn(8, 6, seed=t).float() * (t <= 30), t)
        assert product(state).count_nonzero() == 0
        g = randn(8, 6, seed=77).float()
        for t in range(431, 434):
            step(method, state, g, t)
        assert product(state).norm() > 0.3 * g.norm()  # a dense average of three: 0.875, of which rank 3 holds a part


def test_sequential_follows_a_reversal_and_simultaneous_does_not() -> None:
    """A tracked component of the simultaneous form cannot change sign (it is squared); the sequential one can."""
    signal = randn(12, 1, seed=1) @ randn(1, 9, seed=2)
    cosine = {}
    for updates in ("simultaneous", "sequential"):
        method = LoRAPre(rank=4, updates=updates, damping=1e-3, damping_mode="relative")
        state = method.init(torch.zeros(12, 9, dtype=F64))
        for t in range(1, 101):
            sign = 1 if t <= 90 else -1
            step(method, state, sign * signal + 0.3 * randn(12, 9, seed=t), t)
        m = product(state)
        cosine[updates] = float((m * -signal).sum() / m.norm() / signal.norm())
    assert cosine["sequential"] > 0.8
    assert cosine["simultaneous"] < 0.5


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_stable_is_invariant_to_the_gradients_scale(scale: float) -> None:
    directions = []
    for s in (1.0, scale):
        method = LoRAPreStable(rank=3, eps=0.0)
        state = method.init(torch.zeros(8, 6, dtype=F64))
        directions.append([step(method, state, s * randn(8, 6, seed=t), t) for t in range(1, 20)])
    for one, other in zip(*directions, strict=True):
        assert torch.allclose(one, other, rtol=1e-6)


def test_pinv_survives_rank_deficiency() -> None:
    """fp32, rank one, no damping: Cholesky of the bare Gram matrix breaks down; ours stays finite and fits."""
    x = torch.randn(30, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 8)
    for scale in (1e-30, 1e-3, 1.0, 1e30):
        inverse = damped_pinv(x * scale, 0.0, relative=False)
        assert inverse.isfinite().all()
        # Floor 10 eps trace: the fit is short by a relative 10 eps, the rest is fp32 rounding of the ill-posed solve
        assert torch.allclose(x @ (inverse * scale) @ x, x, atol=1e-2 * float(x.abs().max()))
    assert torch.equal(damped_pinv(torch.zeros(5, 2), 0.0, relative=True), torch.zeros(2, 5))


@pytest.mark.parametrize("relative", [False, True])
def test_pinv_is_the_damped_normal_equation(relative: bool) -> None:
    x = randn(2, 9, 4)
    gram = x.mT @ x
    shift = 0.3 * (gram.diagonal(dim1=-2, dim2=-1).mean(-1) if relative else torch.ones(2, dtype=F64))
    expected = torch.linalg.solve(gram + shift[:, None, None] * torch.eye(4, dtype=F64), x.mT)
    assert torch.allclose(damped_pinv(x, 0.3, relative=relative), expected, rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-2, 1e-10, 1e-20, 1e-30])
def test_pinv_of_a_tiny_matrix_is_damped_to_nothing(scale: float) -> None:
    """(X^T X + lambda)^-1 X^T is X^T / lambda where X^T X is far below lambda, in fp32 as in exact arithmetic."""
    x = scale * randn(9, 4)
    exact = torch.linalg.solve(x.mT @ x + 1e-6 * torch.eye(4, dtype=F64), x.mT)
    # rounding of the Gram matrix, times its condition of up to ||X||^2 / lambda at the largest scale
    assert torch.allclose(damped_pinv(x.float(), 1e-6, relative=False).double(), exact, rtol=2e-2, atol=0)


@pytest.mark.parametrize("zeros", [100, 400, 600, 1200])
@pytest.mark.parametrize("method", [LoRAPre(rank=3), LoRAPreStable(rank=3)], ids=["printed", "stable"])
def test_a_long_silence_does_no_harm(method: LoRAPre, zeros: int) -> None:
    """An expert that got no tokens: B decays by beta a step; what comes back is a step like the others, in fp32."""
    if method.updates == "simultaneous" and zeros < 600:
        pytest.skip("the printed form's own quadratic term: steps of thousands, in exact arithmetic too")
    largest = {}
    state = method.init(torch.zeros(8, 6))
    for t in range(1, 61 + zeros):
        silent = 30 < t <= 30 + zeros
        direction = step(method, state, randn(8, 6, seed=t).float() * (not silent), t)
        largest[t] = float(direction.abs().max())
    before, after = max(largest[t] for t in range(20, 31)), max(largest[t] for t in range(31 + zeros, 61 + zeros))
    assert after < 5 * max(before, 2.0)


def test_gammas_are_the_coupled_ones_unless_given() -> None:
    coupled = (1 - 0.9**0.5, 1 - 0.95**0.25)
    methods = [LoRAPre(rank=2), LoRAPre(rank=2, gammas=coupled), LoRAPre(rank=2, gammas=(0.2, 0.2))]
    states = [method.init(torch.zeros(7, 5, dtype=F64)) for method in methods]
    for t in range(1, 6):
        for method, state in zip(methods, states, strict=True):
            step(method, state, randn(7, 5, seed=t), t)
    assert torch.equal(product(states[0]), product(states[1])) and not torch.allclose(
        product(states[0]), product(states[2])
    )
    with pytest.raises(gossamer.UserError, match="gammas are"):
        LoRAPre(gammas=(2.0, 0.1))


@pytest.mark.parametrize("method", [LoRAPre(rank=4), LoRAPreStable(rank=4)], ids=["printed", "stable"])
def test_columns_without_gradient_are_moved_by_what_is_left_of_the_first_factor(method: LoRAPre) -> None:
    """A weakness: m and sqrt(v) are both what remains of the random A there, and their quotient is anything."""
    state, dense = (it.init(torch.zeros(16, 40, dtype=F64)) for it in (method, AdamW()))
    moved = []
    for t in range(1, 101):
        grad = randn(16, 40, seed=t)
        grad[:, :5] = 0
        moved.append(float(step(method, state, grad, t)[:, :5].abs().max()))
        assert not step(AdamW(), dense, grad, t)[:, :5].any()
    assert moved[0] == 0 and max(moved) > 50
