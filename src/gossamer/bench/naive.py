"""The papers' equations, written down matrix by matrix: what a fused step is to be faster than.

Each function is an algorithm box in the most direct PyTorch, in the order in which it is printed. What makes it naive:
moments are rebuilt, and directions made, as full matrices; every expression is a new tensor; matrices are stepped one
after another. Products are associated so that thin ones come first, and nothing is computed that the equations do not
ask for. A method's reference, which is held to the same numbers, may do less: it leaves out what cancels (MLorc's SVD
of a matrix that is not cut), works in place, and guards against overflow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.optim.contract import Context, Method, describe, hash63
from gossamer.rows import HERE

State = dict[str, Any]


def lora_pre(method: Any, grad: Tensor, state: State, ctx: Context) -> Tensor:
    """Wang et al. 2026, Algorithm 1, with the damping on the diagonals of the r x r matrices that are inverted."""
    t, (beta1, beta2), (m, n), r = ctx.step, method.betas, grad.shape, method.rank
    if t == 1:
        for name in "mv":
            first = torch.randn(r, n, dtype=grad.dtype, generator=ctx.generator) * method.init_std
            state[name] = grad.new_zeros(m, r), first
    (m_b, m_a), (v_b, v_a) = state["m"], state["v"]
    first = beta1 * (m_b @ m_a) + (1 - beta1) * grad
    second = beta2 * (v_b @ v_a) ** 2 + (1 - beta2) * grad**2
    damping = method.damping * torch.eye(r, dtype=grad.dtype)
    for name, target, gamma in (("m", grad, 1 - beta1**0.5), ("v", grad.abs(), 1 - beta2**0.25)):
        b, a = state[name]
        new_b = (1 - gamma) * b + gamma * (target @ a.mT @ torch.linalg.inv(a @ a.mT + damping))
        new_a = (1 - gamma) * a + gamma * (torch.linalg.inv(b.mT @ b + damping) @ b.mT @ target)
        state[name] = new_b, new_a
    return method.scale * _adam(first, second, method, t)


def mlorc(method: Any, grad: Tensor, state: State, ctx: Context) -> Tensor:
    """Shen et al. 2026, Algorithm 1, with Algorithm 3 as the compression."""
    beta1, beta2 = method.betas
    m, v = (1 - beta1) * grad, (1 - beta2) * grad**2
    if ctx.step > 1:
        u, s, vh = state["m"]
        m = beta1 * (u @ torch.diag(s) @ vh) + m
        u, s, vh = state["v"]
        past = u @ torch.diag(s) @ vh
        below = past < 0
        if below.any():
            past = torch.where(below, past[below].abs().mean(), past)
        v = beta2 * past + v
    for name, moment in (("m", m), ("v", v)):
        width = min(method.rank + method.oversampling, *moment.shape)
        # drawn as the transpose, so that the numbers are the reference's
        sketch = torch.randn(width, moment.shape[1], dtype=moment.dtype, generator=ctx.generator).mT
        q = torch.linalg.qr(moment @ sketch).Q
        for _ in range(method.power_iterations):
            q = torch.linalg.qr(moment @ torch.linalg.qr(moment.mT @ q).Q).Q
        u, s, vh = torch.linalg.svd(q.mT @ moment, full_matrices=False)
        state[name] = q @ u[:, : method.rank], s[: method.rank], vh[: method.rank]
    return _adam(m, v, method, ctx.step)


def gossamer(method: Any, grad: Tensor, state: State, ctx: Context) -> Tensor:
    """docs/methods/gossamer.md, with the default second moment, row and column means."""
    t, (beta1, beta2), (m, n), r = ctx.step, method.betas, grad.shape, method.rank
    if t == 1:
        b, w = grad.new_zeros(m, r), torch.randn(r, n, dtype=grad.dtype, generator=ctx.generator)
        a, rows, columns = torch.zeros_like(w), grad.new_zeros(m), grad.new_zeros(n)
    else:
        b, a, rows, columns = (state[key] for key in ("b", "a", "rows", "columns"))
        w = a
    w = torch.linalg.qr(w.mT).Q.mT
    average = beta1 * (b @ a) + (1 - beta1) * grad
    rest = grad - b @ (b.mT @ grad)
    outside = rest - rest @ w.mT @ w
    mass, own = 1 - beta1**t, (1 - beta2) / (1 - beta2**t)
    first = (average + method.tail * (mass - (1 - beta1)) * outside) / mass
    square = grad**2
    second = own * square
    if t > 1:
        history = torch.outer(rows, columns) / rows.mean() / (1 - beta2 ** (t - 1))
        second = (1 - own) * history + second
    new_b = torch.linalg.qr(average @ w.mT).Q
    state.update(
        b=new_b,
        a=new_b.mT @ average,
        rows=beta2 * rows + (1 - beta2) * square.mean(1),
        columns=beta2 * columns + (1 - beta2) * square.mean(0),
    )
    return first / (second.sqrt() + method.eps)


def galore(method: Any, grad: Tensor, state: State, ctx: Context) -> Tensor:
    """Zhao et al. 2024, Algorithm 2; a wide matrix as its transpose, here and below."""
    tall = grad if len(grad) >= grad.shape[1] else grad.mT
    _refresh(method, tall, state, ctx)
    step = method.scale * (_projected_adam(method, tall @ state["basis"], state, ctx) @ state["basis"].mT)
    return step if tall is grad else step.mT


def fira(method: Any, grad: Tensor, state: State, ctx: Context) -> Tensor:
    """Chen et al. 2025, Algorithm 1, with the residual and the order of the authors' code."""
    tall = grad if len(grad) >= grad.shape[1] else grad.mT
    _refresh(method, tall, state, ctx)
    low, basis = tall @ state["basis"], state["basis"]
    direction = _projected_adam(method, low, state, ctx)
    gain = direction.norm(dim=1, keepdim=True) / (low.norm(dim=1, keepdim=True) + 1e-8)
    residual = _limited((tall - method.scale * (low @ basis.mT)) * gain, method, state, ctx)
    step = method.scale * (direction @ basis.mT) + residual
    return step if tall is grad else step.mT


def apollo(method: Any, grad: Tensor, state: State, ctx: Context) -> Tensor:
    """Zhu et al. 2025, Algorithm 1: of the projection only a seed is kept."""
    tall = grad if len(grad) >= grad.shape[1] else grad.mT
    generator = torch.Generator().manual_seed(hash63(ctx.key, (ctx.step - 1) // method.update_proj_gap))
    basis = torch.randn(tall.shape[1], method.rank, dtype=grad.dtype, generator=generator) / method.rank**0.5
    low = tall @ basis
    direction = _projected_adam(method, low, state, ctx)
    gain = direction.norm(dim=1, keepdim=True) / (low.norm(dim=1, keepdim=True) + 1e-8)
    step = method.scale**0.5 * _limited(tall * gain, method, state, ctx)
    return step if tall is grad else step.mT


EQUATIONS: dict[str, Callable[[Any, Tensor, State, Context], Tensor]] = {
    "lora-pre": lora_pre,
    "mlorc": mlorc,
    "gossamer": gossamer,
    "galore": galore,
    "fira": fira,
    "apollo": apollo,
}
"""By the name of the method; all but its ranks, schedules and constants has the default."""


class Naive(torch.optim.Optimizer):
    """Step matrices on a CPU by a method's equations. It draws what `step.make_optimizer`'s does."""

    def __init__(self, method: Method, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1e-3})
        self.method, self.direction = method, EQUATIONS[describe(method)["name"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        (group,) = self.param_groups
        for index, param in enumerate(group["params"]):
            state = self.state[param]
            t = state["step"] = state.get("step", 0) + 1
            name = f"param.{index}"
            generator = torch.Generator().manual_seed(hash63(0, name, t))
            ctx = Context(t, t, t, group["lr"], param, generator, hash63(0, name), HERE)
            param.sub_(group["lr"] * self.direction(self.method, param.grad, state, ctx))


def _adam(m: Tensor, v: Tensor, method: Any, t: int) -> Tensor:
    beta1, beta2 = method.betas
    return m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + method.eps)


def _refresh(method: Any, tall: Tensor, state: State, ctx: Context) -> None:
    if (ctx.step - 1) % method.update_proj_gap == 0:
        state["basis"] = torch.linalg.svd(tall, full_matrices=False).Vh[: method.rank].mT


def _projected_adam(method: Any, low: Tensor, state: State, ctx: Context) -> Tensor:
    beta1, beta2 = method.betas
    zero = torch.zeros_like(low)
    state["m"] = beta1 * state.get("m", zero) + (1 - beta1) * low
    state["v"] = beta2 * state.get("v", zero) + (1 - beta2) * low**2
    return _adam(state["m"], state["v"], method, ctx.step)


def _limited(direction: Tensor, method: Any, state: State, ctx: Context) -> Tensor:
    """Held to a growth of its norm, which is compared without the bias correction."""
    beta1, beta2 = method.betas
    size = direction.norm() * (1 - beta1**ctx.step) / (1 - beta2**ctx.step) ** 0.5
    if "norm" in state:
        excess = torch.clamp(size / (state["norm"] + 1e-8), min=method.growth_limit) / method.growth_limit
        direction, size = direction / excess, size / excess
    state["norm"] = size
    return direction
