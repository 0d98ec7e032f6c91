"""Same-shaped parameters trained by `update` or by `launch_`, as the driver would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.optim.batch import Batch
from gossamer.optim.contract import Context, State, hash63
from gossamer.optim.optimizer import COUNTERS, init_state

LR, DECAY = 1e-2, 0.1
SHAPES = {"tall": (72, 24), "wide": (24, 72), "square": (32, 32), "odd": (37, 21), "row": (1, 24), "column": (24, 1)}


class Run:
    """Parameters of one shape, their states, and steps on gradients that depend on the step alone.

    Off the CPU the counters lie on the device, where a graph can advance them.
    """

    def __init__(
        self, method: Any, shape: tuple[int, ...], dtype: torch.dtype, layers: int = 2, device: str = "cpu"
    ) -> None:
        self.method, self.device, generator = method, device, torch.Generator().manual_seed(0)
        self.params = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(layers)]
        self.states = [
            {key: value.to(device) for key, value in init_state(method, param).items()} for param in self.params
        ]
        self.steps = 0

    def gradients(self) -> list[Tensor]:
        """Different at every step and layer; the last layer's is zero at the third step."""
        generator = torch.Generator().manual_seed(1000 + self.steps)
        grads = [torch.randn(p.shape, generator=generator).to(p) for p in self.params]
        if self.steps == 3:
            grads[-1].zero_()
        return grads

    def advance(self) -> list[Context]:
        self.steps += 1
        for state in self.states:
            for counter in COUNTERS:
                state[counter] += 1
        t = self.steps
        return [
            Context(t, t, t, LR, p, torch.Generator(self.device).manual_seed(hash63(0, str(i), t)), hash63(0, str(i)))
            for i, p in enumerate(self.params)
        ]

    def batch(
        self,
        grads: list[Tensor] | None = None,
        *,
        maximize: bool = False,
        rounding: str = "nearest",
        lr: float | Tensor = LR,
    ) -> Batch:
        """The next step's."""
        contexts = self.advance()
        return Batch(
            params=self.params,
            grads=self.gradients() if grads is None else grads,
            states=self.states,
            contexts=contexts,
            lr=lr,
            weight_decay=DECAY,
            maximize=maximize,
            rounding=rounding,
        )

    def launch(self, grads: list[Tensor] | None = None, **options: Any) -> None:
        assert all(self.method.can_launch(p) for p in self.params)
        self.method.launch_(self.batch(grads, **options))

    def update(self, grads: list[Tensor] | None = None, *, maximize: bool = False) -> None:
        contexts = self.advance()
        grads = self.gradients() if grads is None else grads
        for param, grad, state, context in zip(self.params, grads, self.states, contexts, strict=True):
            direction = self.method.update(-grad.float() if maximize else grad.float(), state, context)
            param.copy_((1 - LR * DECAY) * param.float() - LR * direction)

    def products(self, name: str) -> list[Tensor]:
        return [state[f"{name}_B"] @ state[f"{name}_A"] for state in self.states]


def error(mine: Tensor, theirs: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((mine.float() - theirs.float()).norm() / theirs.float().norm().clamp_min(1e-30))


def assert_close(mine: Run, theirs: Run, tolerance: float) -> None:
    """Factors by their products, means as they are."""
    for name in ("m", "v"):
        if f"{name}_B" in mine.states[0]:
            for x, y in zip(mine.products(name), theirs.products(name), strict=True):
                assert error(x, y) < tolerance
    for key in ("v_rows", "v_columns"):
        if key in mine.states[0]:
            for x, y in zip(mine.states, theirs.states, strict=True):
                assert error(x[key], y[key]) < 1e-6  # sums of squares, whatever the operands are


def assert_launch_is_update(mine: Run, theirs: Run, maximize: bool) -> None:
    """Over five steps: weights after two of them, factors at the end."""
    for step in range(5):
        mine.launch(maximize=maximize)
        theirs.update(maximize=maximize)
        if step < 2:
            for x, y in zip(mine.params, theirs.params, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
    assert_close(mine, theirs, 2e-5)


def assert_alike(mine: Run, theirs: Run, steps: int, tolerance: float) -> None:
    """Factors after so many launches and updates."""
    for _ in range(steps):
        mine.launch()
        theirs.update()
    assert_close(mine, theirs, tolerance)


def assert_either_way(mine: Run, other: Run) -> None:
    """What one wrote, by `update` and `launch_`, the other continues by launches as the one does by updates."""
    mine.update()
    mine.launch()
    other.params, other.states, other.steps = [p.clone() for p in mine.params], copied(mine.states), mine.steps
    for _ in range(2):
        mine.update()
        other.launch()
    assert_close(other, mine, 2e-5)


def assert_stays_finite(mine: Run, value: float) -> None:
    """After a gradient with one such entry: that matrix's factors are as before, the others moved on."""
    mine.launch()
    before = copied(mine.states)
    grads, params = mine.gradients(), [p.clone() for p in mine.params]
    grads[0][2, 3] = value
    mine.launch(grads)
    for key, tensor in mine.states[0].items():
        if key.endswith(("_A", "_B")):
            assert torch.equal(tensor, before[0][key])
            assert not torch.equal(mine.states[1][key], before[1][key])
    bad = mine.params[0].isfinite().logical_not().nonzero().tolist()
    assert bad == ([[2, 3]] if value != value else [])
    assert (mine.params[0] - params[0]).nan_to_num().abs().max() < 20 * LR


def copied(states: list[State]) -> list[State]:
    return [{key: value.clone() for key, value in state.items()} for state in states]
