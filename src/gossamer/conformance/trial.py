"""What every fact is tried on: a small model, steps that are the same each time, and comparisons."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.conformance.subject import NotApplicable, Subject

CLOSE = 1e-3
"""Two ways to the same weights may end this part of the way apart: rounding of sums in another order stays well below,
about 1e-4 where a small second moment divides it, and a step made of a part of the gradient is far above."""


class Model(nn.Module):
    """A tall matrix, a wide one, and vectors.

    Args:
        width, hidden: of the matrices, large enough that optimizers which spare small tensors do not spare these.
        scales: entries of the smallest vector.
    """

    def __init__(self, width: int = 64, hidden: int = 96, scales: int = 2) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.up, self.norm = nn.Linear(width, hidden), nn.LayerNorm(hidden)
            self.down, self.scale = nn.Linear(hidden, width), nn.Parameter(torch.empty(scales))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in self.parameters():  # no zeros: decay must show in every one
                param.copy_(0.3 * torch.randn(param.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.norm(self.up(x)))) * (1 + self.scale.sum())

    def loss(self, step: int) -> Tensor:
        """Of the batch that belongs to a step, whoever asks."""
        weight = self.up.weight
        x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(step)).to(weight.dtype)
        return (self(x) - x.flip(1)).square().mean()


def uneven() -> Model:
    """No side is even, and one vector has a single entry: of two processes one gets fewer rows, or none."""
    return Model(width=63, hidden=97, scales=1)


def precise(model: Model, subject: Subject) -> Model:
    """The model in float64 where the optimizer takes that, so that what is compared is not rounding: in fp32 a sum in
    another order may flip a bit of what is computed in bf16, and Newton-Schulz makes a hundredth of a step of it."""
    try:
        trial = copy.deepcopy(model).double()
        train(trial, subject.build(trial), range(1))
    except Exception:  # whatever it raises, it does not take it
        return model
    return model.double()


def backward(model: Model, step: int) -> None:
    model.zero_grad()  # the optimizer's own zero_grad is a fact of its own
    model.loss(step).backward()


def train(model: Model, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()
    model.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies by name."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of any entry; infinite where one is not finite."""
    worst = max(float((a.double() - other[name].double()).abs().max()) for name, a in one.items())
    return worst if worst < float("inf") else float("inf")


def unmoved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in before.items() if torch.equal(tensor, after[name])]


def require_exact(one: dict[str, Tensor], other: dict[str, Tensor], what: str) -> str:
    """The difference as a cell of the table. Raises `AssertionError` where there is one."""
    apart = distance(one, other)
    assert apart == 0, f"{what}: weights differ by up to {apart:.1e}"
    return "0"


def require_close(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor], what: str) -> str:
    """The same where roundings may differ: against the way from `start`."""
    apart, way = distance(one, other), distance(one, start)
    assert apart <= CLOSE * way, f"{what}: weights differ by up to {apart:.1e}, having moved by {way:.1e}"
    return "0" if apart == 0 else f"{apart:.1e}"


def require_tensors(state: Any) -> None:
    """Raises `NotApplicable` where there are none: torch loads no full state without."""
    if not any(isinstance(value, Tensor) for _, value in leaves(state)):
        raise NotApplicable("its state has no tensors")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value inside dicts, sequences, tensor subclasses and objects, with where it is."""
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from leaves(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}.{index}")
    elif not isinstance(value, Tensor) and hasattr(value, "__dict__"):
        yield from leaves(vars(value), path)
    else:
        yield path.lstrip("."), value
