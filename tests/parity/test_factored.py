"""MLorc, Gossamer's tracker and LoRA-Pre Muon against straight lines in numpy that share no code with the library.

Everything is fp64: what differs is the order of sums and the LAPACK driver, 1e-12 in one step. 1e-6 leaves room for 25
steps of feedback, and for the discontinuity of MLorc's floor, which no entry of these streams comes near enough to.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import gossamer
from gossamer.optim.contract import Context, Method

Array = NDArray[np.float64]

SHAPES = {"tall": (13, 7), "wide": (7, 13), "square": (9, 9)}
STEPS = 25


def stream(shape: tuple[int, int], seed: int = 0) -> list[Array]:
    random = np.random.default_rng(seed)
    signal = random.standard_normal(shape)
    return [np.sin(0.3 * t) * signal + random.standard_normal(shape) for t in range(STEPS)]


def directions(method: Method, gradients: list[Array]) -> list[Array]:
    param = torch.zeros(gradients[0].shape, dtype=torch.float64)
    state, out = method.init(param), []
    for t, g in enumerate(gradients, 1):
        out.append(method.update(torch.from_numpy(g), state, Context(t, t, t, 0.0, param, generator(t), 0)).numpy())
    return out


def generator(t: int) -> torch.Generator:
    return torch.Generator().manual_seed(t)


def check(ours: list[Array], theirs: list[Array]) -> None:
    for t, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=f"step {t}")


def newton_schulz(x: Array) -> Array:
    """Five quintic steps, in fp64."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        if x.shape[0] > x.shape[1]:
            gram = x.T @ x
            x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
        else:
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


# MLorc --------------------------------------------------------------------------------------------------------------


class Sketches:
    """The Gaussian matrices that the step's generator gives, in the order of the paper: M's first, then V's."""

    def __init__(self, t: int, n: int, width: int) -> None:
        self.generator, self.shape = generator(t), (width, n)

    def draw(self) -> Array:
        return torch.randn(self.shape, dtype=torch.float64, generator=self.generator).numpy().T


def rsvd(x: Array, rank: int, power_iterations: int, sketch: Array) -> Array:
    """The rank-r approximation itself: Algorithm 3 with an explicit SVD, whatever p is."""
    q, _ = np.linalg.qr(x @ sketch)
    for _ in range(power_iterations):
        z, _ = np.linalg.qr(x.T @ q)
        q, _ = np.linalg.qr(x @ z)
    u, s, vh = np.linalg.svd(q.T @ x, full_matrices=False)
    return q @ u[:, :rank] @ np.diag(s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("power_iterations", [0, 1])
@pytest.mark.parametrize("oversampling", [0, 2])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mlorc_adamw(shape: tuple[int, int], oversampling: int, power_iterations: int) -> None:
    rank, beta1, beta2, eps = 3, 0.9, 0.99, 1e-8
    method = gossamer.MLorc(
        rank=rank, oversampling=oversampling, power_iterations=power_iterations, betas=(beta1, beta2), eps=eps
    )
    gradients = stream(shape)
    m, v, expected = np.zeros(shape), np.zeros(shape), []
    for t, g in enumerate(gradients, 1):
        sketches = Sketches(t, shape[1], rank + oversampling)
        m = beta1 * m + (1 - beta1) * g
        if (v < 0).any():
            v = np.where(v < 0, np.abs(v[v < 0]).mean(), v)
        v = beta2 * v + (1 - beta2) * g**2
        expected.append(m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps))
        m = rsvd(m, rank, power_iterations, sketches.draw())
        v = rsvd(v, rank, power_iterations, sketches.draw())
    check(directions(method, gradients), expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mlorc_lion(shape: tuple[int, int]) -> None:
    rank, beta1, beta2 = 3, 0.95, 0.98
    m, expected, gradients = np.zeros(shape), [], stream(shape)
    for t, g in enumerate(gradients, 1):
        expected.append(np.sign(beta1 * m + (1 - beta1) * g))
        m = rsvd(beta2 * m + (1 - beta2) * g, rank, 0, Sketches(t, shape[1], rank).draw())
    check(directions(gossamer.MLorcLion(rank=rank), gradients), expected)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mlorc_muon(shape: tuple[int, int], nesterov: bool) -> None:
    rank, mu = 3, 0.95
    m, expected, gradients = np.zeros(shape), [], stream(shape)
    for t, g in enumerate(gradients, 1):
        m = mu * m + (1 - mu) * g
        step = newton_schulz((1 - mu) * g + mu * m if nesterov else m)
        expected.append(step * np.sqrt(max(1, shape[0] / shape[1])))
        m = rsvd(m, rank, 0, Sketches(t, shape[1], rank).draw())
    check(directions(gossamer.MLorcMuon(rank=rank, nesterov=nesterov), gradients), expected)


# Gossamer -----------------------------------------------------------------------------------------------------------


class Straight:
    """The tracked average as one dense matrix: projected on Y's columns, with W from its own SVD. No factors."""

    def __init__(self, shape: tuple[int, int], rank: int, decay: float) -> None:
        self.x, self.rank, self.decay = np.zeros(shape), rank, decay
        self.rows = self.columns = np.zeros((0, 0))

    def follow(self, target: Array, frame: Array) -> None:
        """`frame` (r, n): random rows to start from; used at the first step only."""
        if not self.x.any():
            self.rows = np.linalg.qr(frame.T)[0]
            self.columns = np.zeros((self.x.shape[0], self.rank))
        average = self.decay * self.x + (1 - self.decay) * target
        q, _ = np.linalg.qr(average @ self.rows)
        self.x, self.columns = q @ (q.T @ average), q
        self.rows = np.linalg.svd(self.x)[2][: self.rank].T

    def outside(self, g: Array, frame: Array) -> Array:
        rows = self.rows if self.rows.size else np.linalg.qr(frame.T)[0]
        columns = self.columns if self.columns.size else np.zeros((g.shape[0], self.rank))
        left = np.eye(g.shape[0]) - columns @ columns.T
        return left @ g @ (np.eye(g.shape[1]) - rows @ rows.T)


@pytest.mark.parametrize("tail", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("second", ["rows-columns", "square", "absolute", "dense"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gossamer(shape: tuple[int, int], second: str, tail: float) -> None:
    rank, beta1, beta2, eps = 3, 0.9, 0.95, 1e-8
    gradients, expected = stream(shape), []
    first = Straight(shape, rank, beta1)
    other = Straight(shape, rank, beta2**0.5 if second == "absolute" else beta2)
    dense = np.zeros(shape)
    for t, g in enumerate(gradients, 1):
        frames = Sketches(t, shape[1], rank)
        frame, frame_v = frames.draw().T, frames.draw().T
        mass = 1 - beta1**t
        tail_weight = tail * (mass - (1 - beta1))
        m = (beta1 * first.x + (1 - beta1) * g + tail_weight * first.outside(g, frame)) / mass
        history = {
            "dense": dense,
            "rows-columns": np.outer(dense.mean(1), dense.mean(0)) / max(dense.mean(), 1e-300),
            "square": np.where(other.x < 0, np.abs(other.x[other.x < 0]).mean() if (other.x < 0).any() else 0, other.x),
            "absolute": other.x,
        }[second]
        if second == "absolute":
            history = (history / (1 - beta2 ** (max(t - 1, 1) / 2))) ** 2
        else:
            history = history / (1 - beta2 ** max(t - 1, 1))
        own = (1 - beta2) / (1 - beta2**t)
        expected.append(m / (np.sqrt((1 - own) * history + own * g**2) + eps))
        first.follow(g, frame)
        other.follow(np.abs(g) if second == "absolute" else g**2, frame_v)
        dense = beta2 * dense + (1 - beta2) * g**2
    method = gossamer.Gossamer(rank=rank, betas=(beta1, beta2), eps=eps, second=second, tail=tail)
    check(directions(method, gradients), expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gossamer_lion(shape: tuple[int, int]) -> None:
    rank, beta1, beta2 = 3, 0.9, 0.99
    gradients, expected, m = stream(shape), [], Straight(shape, rank, beta2)
    for t, g in enumerate(gradients, 1):
        frame = Sketches(t, shape[1], rank).draw().T
        tail = beta1 * (1 - beta2 ** (t - 1))
        expected.append(np.sign(beta1 * m.x + (1 - beta1) * g + tail * m.outside(g, frame)))
        m.follow(g, frame)
    check(directions(gossamer.GossamerLion(rank=rank, tail=1.0), gradients), expected)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gossamer_muon(shape: tuple[int, int], nesterov: bool) -> None:
    """A dense momentum that kept H from the start would add mu (1 - mu^(t-1)) H, and mu times that under Nesterov."""
    rank, mu = 3, 0.95
    gradients, expected, m = stream(shape), [], Straight(shape, rank, mu)
    for t, g in enumerate(gradients, 1):
        frame = Sketches(t, shape[1], rank).draw().T
        now = mu * m.x + (1 - mu) * g + mu * (1 - mu ** (t - 1)) * m.outside(g, frame)
        step = newton_schulz((1 - mu) * g + mu * now if nesterov else now)
        expected.append(step * np.sqrt(max(1, shape[0] / shape[1])))
        m.follow(g, frame)
    check(directions(gossamer.GossamerMuon(rank=rank, nesterov=nesterov, tail=1.0), gradients), expected)


# LoRA-Pre Muon ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", ["simultaneous", "sequential"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lora_pre_muon(shape: tuple[int, int], updates: str) -> None:
    rank, mu, damping = 3, 0.95, 1e-3
    gamma = 1 - mu**0.5
    b, a = (
        np.zeros((shape[0], rank)),
        0.02 * torch.randn(rank, shape[1], dtype=torch.float64, generator=generator(1)).numpy(),
    )
    gradients, expected = stream(shape), []

    def ridge(gram: Array) -> Array:
        if not gram.any():
            return np.zeros_like(gram)
        return np.linalg.inv(gram + damping * np.trace(gram) / rank * np.eye(rank))

    for g in gradients:
        expected.append(newton_schulz(mu * b @ a + g) * np.sqrt(max(1, shape[0] / shape[1])))
        target = g / (1 - mu)
        new_b = (1 - gamma) * b + gamma * target @ a.T @ ridge(a @ a.T)
        base = new_b if updates == "sequential" else b
        a = (1 - gamma) * a + gamma * ridge(base.T @ base) @ base.T @ target
        b = new_b
    method = gossamer.LoRAPreMuon(rank=rank, momentum=mu, damping=damping, damping_mode="relative", updates=updates)
    check(directions(method, gradients), expected)
