"""LoRA-Pre against a straight-line transcription of its equations that shares no code with the library."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gossamer import LoRAPre
from gossamer.optim.contract import Context

Array = NDArray[np.float64]


def straight_line(
    gradients: list[Array], a_m: Array, a_v: Array, *, sequential: bool, exact: bool, damping: float, relative: bool
) -> list[Array]:
    """Algorithm 1, line by line, with beta = (0.9, 0.95), eps = 1e-8, in numpy."""
    beta1, beta2, eps = 0.9, 0.95, 1e-8
    g1, g2 = 1 - np.sqrt(beta1), 1 - beta2**0.25
    m_shape, r = gradients[0].shape, a_m.shape[0]
    m_b, v_b = np.zeros((m_shape[0], r)), np.zeros((m_shape[0], r))
    m_a, v_a = a_m.copy(), a_v.copy()

    def ridge(gram: Array) -> Array:
        trace = np.trace(gram)
        if trace == 0:
            return np.zeros_like(gram)
        shift = max(damping * trace / r if relative else damping, 10 * np.finfo(np.float64).eps * trace)
        return np.linalg.inv(gram + shift * np.eye(r))

    steps = []
    for t, g in enumerate(gradients, 1):
        m = beta1 * m_b @ m_a + (1 - beta1) * g
        low = v_b @ v_a
        new_m_b = (1 - g1) * m_b + g1 * g @ m_a.T @ ridge(m_a @ m_a.T)
        base = new_m_b if sequential else m_b
        new_m_a = (1 - g1) * m_a + g1 * ridge(base.T @ base) @ base.T @ g
        size = np.abs(g)
        new_v_b = (1 - g2) * v_b + g2 * size @ v_a.T @ ridge(v_a @ v_a.T)
        base = new_v_b if sequential else v_b
        new_v_a = (1 - g2) * v_a + g2 * ridge(base.T @ base) @ base.T @ size
        m_b, m_a, v_b, v_a = new_m_b, new_m_a, new_v_b, new_v_a

        m_hat = m / (1 - beta1**t)
        if exact:
            a = (1 - beta2) / (1 - beta2**t)
            old = (low / (1 - beta2 ** ((t - 1) / 2))) ** 2 if t > 1 else 0.0
            v_hat = a * g**2 + (1 - a) * old
        else:
            v_hat = (beta2 * low**2 + (1 - beta2) * g**2) / (1 - beta2**t)
        steps.append(m_hat / (np.sqrt(v_hat) + eps))
    return steps


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("exact", [False, True], ids=["paper", "exact"])
@pytest.mark.parametrize("sequential", [False, True], ids=["simultaneous", "sequential"])
@pytest.mark.parametrize("shape", [(13, 7), (7, 13), (9, 9)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("rank", [1, 3])
def test_straight_line(shape: tuple[int, int], rank: int, sequential: bool, exact: bool, relative: bool) -> None:
    method = LoRAPre(
        rank=rank,
        updates="sequential" if sequential else "simultaneous",
        bias_correction="exact" if exact else "paper",
        damping=1e-3,
        damping_mode="relative" if relative else "absolute",
    )
    random = np.random.default_rng(rank)
    signal = random.standard_normal(shape)
    gradients = [signal + random.standard_normal(shape) for _ in range(25)]
    param = torch.zeros(shape, dtype=torch.float64)
    state, ours, first = method.init(param), [], {}
    for t, g in enumerate(gradients, 1):
        generator = torch.Generator().manual_seed(3)
        if t == 1:  # the same first A, drawn as the method draws it
            probe = torch.Generator().manual_seed(3)
            first = {k: torch.empty_like(state[k]).normal_(0, 0.02, generator=probe).numpy() for k in ("m_A", "v_A")}
        ours.append(method.update(torch.from_numpy(g), state, Context(t, t, t, 0.0, param, generator, 0)).numpy())
    theirs = straight_line(
        gradients, first["m_A"], first["v_A"], sequential=sequential, exact=exact, damping=1e-3, relative=relative
    )
    for t, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        # float64; 1e-6 leaves room for what 25 ill-conditioned solves make of 1e-16
        assert np.allclose(one, other, rtol=1e-6, atol=1e-6), f"step {t}"
