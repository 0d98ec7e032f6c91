"""GaLore, GoLore, Fira, APOLLO and LDAdam against straight-line numpy, written from the papers, sharing no code.

The references keep the papers' two cases apart: P^T G for a wide matrix, G P for a tall one. Where the library draws
random numbers the reference is handed the same ones. Everything is float64, over two refreshes or more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gossamer.optim.contract import Context, Method, build, hash63

Array = NDArray[np.float64]

SHAPES = pytest.mark.parametrize("shape", [(13, 7), (7, 13), (9, 9)], ids=["tall", "wide", "square"])
BETA1, BETA2, EPS, KEY, STEPS, GAP = 0.9, 0.99, 1e-8, 12345678901, 17, 5


def gradients(shape: tuple[int, int]) -> list[Array]:
    random = np.random.default_rng(5)
    signal = random.standard_normal(shape)
    return [signal + random.standard_normal(shape) for _ in range(STEPS)]


def generator(t: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + t)


def gaussian(t: int, shape: tuple[int, int]) -> Array:
    """What the method's own generator gives at step t."""
    return torch.randn(shape, dtype=torch.float64, generator=generator(t)).numpy()


def run(method: Method, grads: list[Array]) -> list[Array]:
    param = torch.zeros(grads[0].shape, dtype=torch.float64)
    state = method.init(param)
    return [
        method.update(torch.from_numpy(g), state, Context(t, t, t, 0.0, param, generator(t), KEY)).numpy()
        for t, g in enumerate(grads, 1)
    ]


def compare(name: str, reference: Callable[..., list[Array]], shape: tuple[int, int], **fields: Any) -> None:
    method = build(name, **{"betas": (BETA1, BETA2), "eps": EPS, **fields})
    grads = gradients(shape)
    for t, (ours, theirs) in enumerate(zip(run(method, grads), reference(grads, **fields), strict=True), 1):
        # float64; 1e-6 of the direction's norm leaves room for what a refresh makes of close singular values
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs), f"step {t}"


def qr(x: Array) -> Array:
    q, r = np.linalg.qr(x)
    return q * np.where(np.diag(r) < 0, -1.0, 1.0)


def singular_basis(g: Array, rank: int) -> Array:
    """s x r; of each vector the entry of largest magnitude is positive."""
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    p = vt[:rank].T if g.shape[0] >= g.shape[1] else u[:, :rank]
    return p * np.sign(p[np.abs(p).argmax(axis=0), np.arange(p.shape[1])])


def power(g: Array, p: Array) -> Array:
    return qr(g.T @ (g @ p)) if g.shape[0] >= g.shape[1] else qr(g @ (g.T @ p))


def refreshes(t: int, staggered: bool) -> bool:
    return t == 1 or (t - 1 + (KEY % GAP if staggered else 0)) % GAP == 0


def new_basis(t: int, g: Array, old: Array | None, rank: int, refresh: str) -> Array:
    if refresh == "svd":
        return singular_basis(g, rank)
    if old is not None:
        return power(g, old)
    p = qr(gaussian(t, (min(g.shape), rank)))
    for _ in range(3):
        p = power(g, p)
    return p


def adam(t: int, m: Array, v: Array, r: Array) -> tuple[Array, Array, Array]:
    m = BETA1 * m + (1 - BETA1) * r
    v = BETA2 * v + (1 - BETA2) * r * r
    return m, v, m / (1 - BETA1**t) / (np.sqrt(v / (1 - BETA2**t)) + EPS)


def galore(
    grads: list[Array],
    *,
    rank: int,
    update_proj_gap: int,
    scale: float = 1.0,
    refresh: str = "svd",
    staggered: bool = False,
) -> list[Array]:
    assert update_proj_gap == GAP
    tall, p, m, v, steps = grads[0].shape[0] >= grads[0].shape[1], None, np.zeros(1), np.zeros(1), []
    for t, g in enumerate(grads, 1):
        if refreshes(t, staggered):
            p = new_basis(t, g, p, rank, refresh)
        assert p is not None
        m, v, n = adam(t, m, v, g @ p if tall else p.T @ g)
        steps.append(scale * (n @ p.T if tall else p @ n))
    return steps


@SHAPES
@pytest.mark.parametrize("refresh", ["svd", "warm"])
@pytest.mark.parametrize("staggered", [False, True], ids=["together", "staggered"])
@pytest.mark.parametrize("rank", [1, 3])
def test_galore(shape: tuple[int, int], rank: int, staggered: bool, refresh: str) -> None:
    compare("galore", galore, shape, rank=rank, update_proj_gap=GAP, scale=0.25, refresh=refresh, staggered=staggered)


def golore(
    grads: list[Array], *, rank: int, update_proj_gap: int, random_after: int, scale: float, staggered: bool
) -> list[Array]:
    assert update_proj_gap == GAP
    tall, p, m, v, steps = grads[0].shape[0] >= grads[0].shape[1], None, np.zeros(1), np.zeros(1), []
    for t, g in enumerate(grads, 1):
        if refreshes(t, staggered):
            late = t > random_after
            new = qr(gaussian(t, (min(g.shape), rank))) if late else singular_basis(g, rank)
            if p is not None:
                m = m @ p.T @ new if tall else new.T @ p @ m
            p = new
        assert p is not None
        m, v, n = adam(t, m, v, g @ p if tall else p.T @ g)
        steps.append(scale * (n @ p.T if tall else p @ n))
    return steps


@SHAPES
@pytest.mark.parametrize("random_after", [0, 8, 100])
@pytest.mark.parametrize("staggered", [False, True], ids=["together", "staggered"])
def test_golore(shape: tuple[int, int], random_after: int, staggered: bool) -> None:
    fields = {"random_after": random_after, "scale": 0.5, "staggered": staggered}
    compare("golore", golore, shape, rank=3, update_proj_gap=GAP, **fields)


def limiter(x: Array, previous: float | None, gamma: float | None) -> tuple[Array, float | None]:
    """The authors' order: acts on a step without bias correction, and remembers the norm it let through."""
    if gamma is None:
        return x, None
    norm = float(np.linalg.norm(x))
    if previous is not None:
        limit = max(norm / (previous + 1e-8), gamma) / gamma
        x, norm = x / limit, norm / limit
    return x, norm


def fira(
    grads: list[Array],
    *,
    rank: int,
    update_proj_gap: int,
    scale: float,
    residual: str,
    growth_limit: float | None = 1.01,
    refresh: str = "svd",
    staggered: bool = False,
) -> list[Array]:
    assert update_proj_gap == GAP
    tall, p, m, v, steps = grads[0].shape[0] >= grads[0].shape[1], None, np.zeros(1), np.zeros(1), []
    previous = None
    for t, g in enumerate(grads, 1):
        if refreshes(t, staggered):
            p = new_basis(t, g, p, rank, refresh)
        assert p is not None
        r = g @ p if tall else p.T @ g
        m = BETA1 * m + (1 - BETA1) * r
        v = BETA2 * v + (1 - BETA2) * r * r
        # the authors' shape of Adam: no correction in psi, all of it in the step size
        step_size = np.sqrt(1 - BETA2**t) / (1 - BETA1**t)
        psi = m / (np.sqrt(v) + EPS * np.sqrt(1 - BETA2**t))
        axis = 1 if tall else 0
        phi = np.linalg.norm(psi, axis=axis, keepdims=True) / (np.linalg.norm(r, axis=axis, keepdims=True) + 1e-8)
        kept = r @ p.T if tall else p @ r
        e = (g - (scale if residual == "code" else 1.0) * kept) * phi
        e, previous = limiter(e, previous, growth_limit)
        steps.append(step_size * (scale * (psi @ p.T if tall else p @ psi) + e))
    return steps


@SHAPES
@pytest.mark.parametrize("residual", ["code", "paper"])
@pytest.mark.parametrize("growth_limit", [None, 1.01, 1.2])
@pytest.mark.parametrize("refresh, staggered", [("svd", False), ("warm", True)], ids=["svd", "warm-staggered"])
def test_fira(shape: tuple[int, int], residual: str, growth_limit: float | None, refresh: str, staggered: bool) -> None:
    fields = {"residual": residual, "growth_limit": growth_limit, "refresh": refresh, "staggered": staggered}
    compare("fira", fira, shape, rank=3, update_proj_gap=GAP, scale=0.25, **fields)


def apollo(
    grads: list[Array],
    *,
    rank: int,
    update_proj_gap: int,
    scale: float,
    scaling: str,
    growth_limit: float | None = 1.01,
) -> list[Array]:
    tall, m, v, steps = grads[0].shape[0] >= grads[0].shape[1], np.zeros(1), np.zeros(1), []
    previous, size = None, min(grads[0].shape)
    for t, g in enumerate(grads, 1):
        source = torch.Generator().manual_seed(hash63(KEY, (t - 1) // update_proj_gap))
        p = torch.randn(size, rank, dtype=torch.float64, generator=source).numpy() / np.sqrt(rank)
        r = g @ p if tall else p.T @ g
        m = BETA1 * m + (1 - BETA1) * r
        v = BETA2 * v + (1 - BETA2) * r * r
        step_size = np.sqrt(1 - BETA2**t) / (1 - BETA1**t)
        psi = m / (np.sqrt(v) + EPS * np.sqrt(1 - BETA2**t))
        axis = None if scaling == "tensor" else 1 if tall else 0
        s = np.linalg.norm(psi, axis=axis, keepdims=True) / (np.linalg.norm(r, axis=axis, keepdims=True) + 1e-8)
        u, previous = limiter(g * s, previous, growth_limit)
        steps.append(step_size * np.sqrt(scale) * u)
    return steps


@SHAPES
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("growth_limit", [None, 1.01, 1.2])
@pytest.mark.parametrize("rank", [1, 3])
def test_apollo(shape: tuple[int, int], scaling: str, growth_limit: float | None, rank: int) -> None:
    fields = {"scaling": scaling, "growth_limit": growth_limit}
    compare("apollo", apollo, shape, rank=rank, update_proj_gap=GAP, scale=2.0, **fields)


@SHAPES
def test_apollo_mini(shape: tuple[int, int]) -> None:
    def mini(grads: list[Array], **_: Any) -> list[Array]:
        return apollo(grads, rank=1, update_proj_gap=200, scale=128.0, scaling="tensor")

    compare("apollo-mini", mini, shape)


def ldadam(grads: list[Array], *, rank: int, rho: float, error_feedback: bool) -> list[Array]:
    tall = grads[0].shape[0] >= grads[0].shape[1]
    e, p, m, v, steps = np.zeros(grads[0].shape), np.zeros((1, 1)), np.zeros((1, 1)), np.zeros((1, 1)), []
    for t, g in enumerate(grads, 1):
        a = g + e
        if t == 1:
            new = singular_basis(a, rank)
            r = a @ new if tall else new.T @ a
            old_part, m_moved, v_moved = np.zeros(a.shape), np.zeros(r.shape), np.zeros(r.shape)
        else:
            m_hat, v_hat = m / (1 - BETA1 ** (t - 1)), v / (1 - BETA2 ** (t - 1))
            b = rho * (m_hat @ p.T if tall else p @ m_hat) + (1 - rho) * a
            new = power(b, p)
            change = new.T @ p  # r x r, new coordinates of the old directions
            r = a @ new if tall else new.T @ a
            m_moved, hat_moved = (m @ change.T, m_hat @ change.T) if tall else (change @ m, change @ m_hat)
            spread = v_hat - m_hat**2
            spread = spread @ (change**2).T if tall else change**2 @ spread
            v_moved = (1 - BETA2 ** (t - 1)) * np.abs(spread + hat_moved**2)
            old_part = m @ p.T if tall else p @ m
        if error_feedback:
            kept, moved = (r @ new.T, m_moved @ new.T) if tall else (new @ r, new @ m_moved)
            e = a - kept + BETA1 / (1 - BETA1) * (old_part - moved)
        m = BETA1 * m_moved + (1 - BETA1) * r
        v = BETA2 * v_moved + (1 - BETA2) * r * r
        n = m / (1 - BETA1**t) / (np.sqrt(v / (1 - BETA2**t)) + EPS)
        p = new
        steps.append(n @ p.T if tall else p @ n)
    return steps


@SHAPES
@pytest.mark.parametrize("error_feedback", [True, False], ids=["feedback", "plain"])
@pytest.mark.parametrize("rank, rho", [(1, 0.908), (3, 0.908), (3, 0.0)])
def test_ldadam(shape: tuple[int, int], rank: int, rho: float, error_feedback: bool) -> None:
    compare("ldadam", ldadam, shape, rank=rank, rho=rho, error_feedback=error_feedback)
