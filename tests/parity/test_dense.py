"""The dense methods against torch where torch has them, else against straight lines from their papers in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import gossamer
from gossamer.optim.contract import Context, Method, build

Array = NDArray[np.float64]
MATRICES = {"tall": (12, 7), "wide": (7, 12), "square": (9, 9), "four to one": (16, 4)}
SHAPES = {**MATRICES, "vector": (11,), "scalar": (), "one": (1, 1), "4-D": (4, 3, 5, 2)}


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def race(
    name: str,
    shape: tuple[int, ...],
    rival: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    dtype: torch.dtype = torch.float32,
    steps: int = 30,
    fields: dict[str, object] | None = None,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """The weights that ours and torch's optimizer make of the same gradients."""
    mine = nn.Parameter(randn(*shape, seed=0, dtype=dtype))
    theirs = nn.Parameter(mine.detach().clone())
    ours = gossamer.Optimizer([{"params": [mine], "method": build(name, **fields or {})}], **options)
    other = rival([theirs])
    for step in range(steps):
        mine.grad = randn(*shape, seed=step + 1, dtype=dtype) * (1 + step % 3)
        theirs.grad = mine.grad.clone()
        ours.step()
        other.step()
    return mine.detach(), theirs.detach()


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", MATRICES.values(), ids=MATRICES)
def test_muon_is_torch(shape: tuple[int, int], adjust: str, nesterov: bool) -> None:
    mine, theirs = race(
        "muon",
        shape,
        lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust),
        fields={"adjust_lr_fn": adjust, "nesterov": nesterov},
        lr=0.02,
        weight_decay=0.1,
    )
    factor = max(1, shape[0] / shape[1]) ** 0.5 if adjust == "original" else 0.2 * max(shape) ** 0.5
    if factor in (1, 2):
        assert torch.equal(mine, theirs)
    else:  # (lr factor) O against lr (factor O): one fp32 rounding of a step, and one of the weight, in each of 30
        assert float((mine - theirs).abs().max()) < 30 * 2 * torch.finfo(torch.float32).eps * float(mine.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize(
    ("fields", "theirs"),
    [
        ({}, {}),
        ({"d": 2.0, "beta2_decay": -0.5}, {"d": 2.0, "beta2_decay": -0.5}),
        ({"eps": (1e-3, 0.5)}, {"eps": (1e-3, 0.5)}),  # both floors are reached
    ],
    ids=["defaults", "clip and decay", "floors"],
)
@pytest.mark.parametrize("lr", [0.01, 0.5], ids=["lr", "1 / sqrt(t)"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adafactor_is_torch(
    shape: tuple[int, ...], lr: float, fields: dict[str, object], theirs: dict, dtype: torch.dtype
) -> None:
    ours, rival = race(
        "adafactor",
        shape,
        lambda p: torch.optim.Adafactor(p, lr=lr, weight_decay=0.1, foreach=False, **theirs),
        dtype=dtype,
        fields=fields,
        lr=lr,
        weight_decay=0.1,
    )
    # the same operations in another order: a few roundings a step, which relative steps carry on
    assert torch.allclose(ours, rival, rtol=30 * 10 * torch.finfo(dtype).eps, atol=30 * 10 * torch.finfo(dtype).eps)


def test_adafactor_with_a_learning_rate_of_zero_or_a_tensor() -> None:
    method, grad, param = build("adafactor"), randn(5, 4, seed=1), randn(5, 4, seed=2)
    directions = [
        method.update(grad, method.init(param), context(step=9, param=param)._replace(lr=lr))
        for lr in (0.0, 0.1, torch.tensor(0.1), 0.5, torch.tensor(0.5))
    ]
    assert all(bool(d.isfinite().all()) for d in directions)
    assert torch.equal(directions[0], directions[1]) and torch.equal(directions[1], directions[2])
    assert torch.allclose(directions[3], directions[0] / 1.5) and torch.allclose(directions[3], directions[4])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_adamw_is_torch_over_shapes(shape: tuple[int, ...]) -> None:
    mine, theirs = race(
        "adamw",
        shape,
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=False),
        lr=0.01,
        weight_decay=0.1,
    )
    # a few units in the last place of a step of about lr, and one of the weight, in each of 30 steps
    assert float((mine - theirs).abs().max()) < 30 * 10 * torch.finfo(torch.float32).eps * 0.1


# ---- the papers, line by line; no code shared with the library -------------------------------------------------------


def context(step: int, param: Tensor, m_step: int | None = None, v_step: int | None = None) -> Context:
    return Context(step, m_step or step, v_step or step, 0.0, param, torch.Generator().manual_seed(0), 0)


def directions(method: Method, gradients: list[Array]) -> list[Array]:
    param = torch.zeros(gradients[0].shape, dtype=torch.float64)
    state = method.init(param)
    return [
        method.update(torch.from_numpy(g.copy()), state, context(t, param)).numpy() for t, g in enumerate(gradients, 1)
    ]


def noise(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Array]:
    draw = np.random.default_rng(seed)
    signal = draw.normal(size=shape)
    return [signal + draw.normal(size=shape) for _ in range(steps)]


def lion(gradients: list[Array]) -> list[Array]:
    m, out = np.zeros_like(gradients[0]), []
    for g in gradients:
        out.append(np.sign(0.9 * m + 0.1 * g))
        m = 0.99 * m + 0.01 * g
    return out


def spam(gradients: list[Array], gap: int, warmup: int, threshold: float) -> list[Array]:
    beta1, beta2, eps, out = 0.9, 0.999, 1e-6, []
    for index, g in enumerate(gradients):
        age = index % gap + 1
        if age == 1:
            m, v = np.zeros_like(g), np.zeros_like(g)
        clipped = g.copy()
        for place in np.ndindex(g.shape):
            if v[place] > 0 and g[place] ** 2 > threshold * v[place]:
                clipped[place] = np.sign(g[place]) * np.sqrt(threshold * v[place])
        m = beta1 * m + (1 - beta1) * clipped
        v = beta2 * v + (1 - beta2) * clipped**2
        scale = 1.0
        if index >= gap and age <= warmup:
            scale = 0.5 * (1 - np.cos(np.pi * age / (warmup + 1)))
        out.append(scale * (m / (1 - beta1**age)) / (np.sqrt(v / (1 - beta2**age)) + eps))
    return out


def stable_spam(gradients: list[Array], gap: int) -> list[Array]:
    beta1, beta2, eps, gamma1, gamma2, gamma3 = 0.9, 0.999, 1e-8, 0.7, 0.9, 0.999
    track, norm, square, out = 0.0, 0.0, 0.0, []
    for t, g in enumerate(gradients, 1):
        age = (t - 1) % gap + 1
        if age == 1:
            m, v = np.zeros_like(g), np.zeros_like(g)
        top = np.max(np.abs(g))
        track = gamma3 * track + (1 - gamma3) * top
        limit = track / (1 - gamma3**t)
        g = np.where(np.abs(g) > limit, g / top * limit if top > 0 else g, g)
        z = np.sqrt(np.sum(g**2))
        norm = gamma1 * norm + (1 - gamma1) * z
        square = gamma2 * square + (1 - gamma2) * z**2
        if z > 0:
            g = g / z * (norm / (1 - gamma1**t)) / (np.sqrt(square / (1 - gamma2**t)) + eps)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        out.append((m / (1 - beta1**age)) / (np.sqrt(v / (1 - beta2**age)) + eps))
    return out


def adam_mini(gradients: list[Array], blocks: list[slice]) -> list[Array]:
    beta1, beta2, eps, out = 0.9, 0.999, 1e-8, []
    m, v = np.zeros_like(gradients[0]), [0.0] * len(blocks)
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        step = np.zeros_like(g)
        for index, block in enumerate(blocks):
            v[index] = beta2 * v[index] + (1 - beta2) * np.mean(g[block] * g[block])
            step[block] = m[block] / (1 - beta1**t) / (np.sqrt(v[index] / (1 - beta2**t)) + eps)
        out.append(step)
    return out


def same(ours: list[Array], theirs: list[Array]) -> None:
    for t, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        # float64 on both sides: the 1e-6 is for 40 steps of roundings, through a root
        assert np.allclose(one, other, rtol=1e-6, atol=1e-9), f"step {t}: {np.abs(one - other).max()}"


PAPER_SHAPES = {"tall": (12, 7), "wide": (7, 12), "vector": (11,), "3-D": (4, 3, 5)}


@pytest.mark.parametrize("shape", PAPER_SHAPES.values(), ids=PAPER_SHAPES)
def test_lion_is_its_two_lines(shape: tuple[int, ...]) -> None:
    gradients = noise(shape, 40)
    for one, other in zip(directions(build("lion"), gradients), lion(gradients), strict=True):
        assert np.array_equal(one, other)


def spiky(shape: tuple[int, ...], steps: int) -> list[Array]:
    """Gradients with an entry that spikes, one that is always zero, one that wakes up late, and a step of zeros."""
    gradients = noise(shape, steps)
    for t, g in enumerate(gradients):
        g.flat[0] *= 1e4 if t % 13 == 12 else 1.0
        g.flat[1] = 0.0
        g.flat[2] *= t > 6
        g *= t != 20
    return gradients


@pytest.mark.parametrize("shape", PAPER_SHAPES.values(), ids=PAPER_SHAPES)
def test_spam_is_its_equations(shape: tuple[int, ...]) -> None:
    gradients = spiky(shape, 40)
    ours = directions(build("spam", reset_gap=15, warmup=6, threshold=100.0), gradients)
    same(ours, spam(gradients, 15, 6, 100.0))


@pytest.mark.parametrize("shape", PAPER_SHAPES.values(), ids=PAPER_SHAPES)
def test_stable_spam_is_its_equations(shape: tuple[int, ...]) -> None:
    gradients = spiky(shape, 40)
    same(directions(build("stable-spam", reset_gap=15), gradients), stable_spam(gradients, 15))


@pytest.mark.parametrize(
    ("blocks", "shape", "slices"),
    [
        ("row", (12, 7), [slice(i, i + 1) for i in range(12)]),
        ("tensor", (12, 7), [slice(None)]),
        (3, (12, 7), [slice(0, 4), slice(4, 8), slice(8, 12)]),
        ("row", (11,), [slice(None)]),
        ("row", (4, 3, 5), [slice(i, i + 1) for i in range(4)]),
    ],
)
def test_adam_mini_is_its_equations(blocks: str | int, shape: tuple[int, ...], slices: list[slice]) -> None:
    gradients = noise(shape, 40)
    same(directions(build("adam-mini", blocks=blocks), gradients), adam_mini(gradients, slices))
