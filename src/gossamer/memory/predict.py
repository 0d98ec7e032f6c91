"""Weights, gradients and optimizer state, counted by the code that takes them, on tensors that take no memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gossamer.models import build_model, resolve_config
from gossamer.optim.contract import Method, entry_of
from gossamer.optim.groups import Rules, param_groups
from gossamer.optim.optimizer import COUNTERS, init_state, num_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Line:
    """One group of parameters; everything in bytes."""

    group: str
    method: str
    parameters: int
    weights: int
    gradients: int
    state: int
    """The method's tensors."""
    counters: int
    """The driver's counters, 12 bytes a parameter tensor."""


@dataclass(frozen=True)
class Memory:
    """A prediction: lines that add up. Everything in bytes."""

    lines: tuple[Line, ...]

    @property
    def parameters(self) -> int:
        return sum(line.parameters for line in self.lines)

    @property
    def weights(self) -> int:
        return sum(line.weights for line in self.lines)

    @property
    def gradients(self) -> int:
        return sum(line.gradients for line in self.lines)

    @property
    def state(self) -> int:
        """Everything the optimizer holds after one step, counters included."""
        return sum(line.state + line.counters for line in self.lines)

    @property
    def hidden_state(self) -> int:
        """The state of hidden matrices alone, without counters: what a low-rank method compresses."""
        return sum(line.state for line in self.lines if line.group in HIDDEN)


HIDDEN = ("hidden matrix", "rank >= min(m, n): dense")


def predict(
    model: nn.Module | PretrainedConfig | str,
    method: Method,
    *,
    fallback: Method | None = None,
    rules: Rules = (),
    dtype: torch.dtype = torch.bfloat16,
) -> Memory:
    """Bytes of weights, gradients and optimizer state, by group of parameters.

    Args:
        model: a module, whose own dtypes count; or a `transformers` configuration, a size such as "1b", or a path of a
            configuration, built on the meta device in `dtype`.
        method, fallback, rules: as for `gossamer.param_groups`.
        dtype: of weights and gradients, unless `model` is a module.
    """
    if isinstance(model, str):
        model = resolve_config(model)
    if not isinstance(model, nn.Module):
        model = build_model(model, dtype=dtype, device="meta", seed=0)
    groups: dict[tuple[str, str], list[tuple[Method, Tensor]]] = {}
    for group in param_groups(model, method, fallback=fallback, rules=rules):
        name = entry_of(group["method"]).name
        for why, param in zip(group["why"], group["params"], strict=True):
            groups.setdefault((why, name), []).append((group["method"], param.to("meta")))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    lines = [_line(why, name, members) for (why, name), members in groups.items()]
    if frozen:
        lines.append(Line("frozen", "-", sum(p.numel() for p in frozen), num_bytes(frozen), 0, 0, 0))
    return Memory(tuple(lines))


def _line(why: str, name: str, members: list[tuple[Method, Tensor]]) -> Line:
    params = [param for _, param in members]
    states = [init_state(method, param) for method, param in members]
    counters = num_bytes(state.pop(counter) for state in states for counter in COUNTERS)
    weights = num_bytes(params)
    state = sum(num_bytes(state.values()) for state in states)
    return Line(why, name, sum(p.numel() for p in params), weights, weights, state, counters)
