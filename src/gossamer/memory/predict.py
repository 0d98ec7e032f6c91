"""What training holds but activations, counted by the code that takes it, on tensors that take no memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gossamer.errors import UserError
from gossamer.layers import Parametrization, apply
from gossamer.memory.step import Kind, Step, count_step
from gossamer.models import build_model, resolve_config
from gossamer.optim.contract import Method, entry_of
from gossamer.optim.groups import HIDDEN, Rules, param_groups
from gossamer.optim.optimizer import COUNTERS, init_state, num_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FROZEN, BUFFERS = "frozen", "buffers"
"""The groups of what is kept without being trained."""


@dataclass(frozen=True)
class Line:
    """One group of parameters, or the model's buffers; everything in bytes."""

    group: str
    method: str
    parameters: int
    weights: int
    gradients: int
    state: int
    """The method's tensors."""
    counters: int
    """The driver's counters, 12 bytes a parameter tensor."""
    step: Step
    """The most that a step takes at once for parameters of this group."""


@dataclass(frozen=True)
class Memory:
    """A prediction: lines that add up, but for their steps, which follow one another. Everything in bytes."""

    lines: tuple[Line, ...]
    scratch: int
    """Buffers that the optimizer keeps from step to step, beside state."""
    gradients: int
    """Held at once."""

    @property
    def parameters(self) -> int:
        return sum(line.parameters for line in self.lines)

    @property
    def weights(self) -> int:
        """Everything of the model that a checkpoint holds: parameters, frozen ones too, and persistent buffers."""
        return sum(line.weights for line in self.lines)

    @property
    def state(self) -> int:
        """Everything the optimizer holds after one step, counters included."""
        return sum(line.state + line.counters for line in self.lines)

    @property
    def step(self) -> Step:
        """The most that a step takes at once, beside all that is there before and after it."""
        return _largest(line.step for line in self.lines)

    @property
    def hidden_state(self) -> int:
        """The state of hidden layers alone, without counters: what a low-rank method compresses."""
        return sum(line.state for line in self.lines if line.group in HIDDEN)


def predict(
    model: nn.Module | PretrainedConfig | str,
    method: Method,
    *,
    fallback: Method | None = None,
    rules: Rules = (),
    layers: Parametrization | None = None,
    layer_targets: Sequence[str] = (),
    dtype: torch.dtype = torch.bfloat16,
    implementation: str = "reference",
    release_gradients: bool = False,
) -> Memory:
    """Bytes of weights, gradients and optimizer state, by group of parameters, and what a step on a CPU takes besides.

    Frozen parameters and persistent buffers (the indices of sparse layers; not rotary frequencies, which are made anew)
    are lines of their own, without gradients and state.

    Args:
        model: a module, which is counted as it is; or a `transformers` configuration, a size such as "1b", or a path of
            a configuration, built on the meta device in `dtype`.
        method, fallback, rules: as for `gossamer.param_groups`.
        layers, layer_targets: what replaces hidden linear layers, and which, as for `gossamer.layers.apply`, unless
            `model` is a module.
        dtype: of weights and gradients, unless `model` is a module.
        implementation: of the step, as for `gossamer.Optimizer`.
        release_gradients: by `gossamer.release_gradients`, without accumulation. Held at once are then those of
            one layer, the parameters that one module holds itself: the largest. A gradient of a weight that
            several modules share is there all the while, and thrice when autograd adds up two of its parts.
    """
    model = meta_model(model, layers, dtype, layer_targets)
    groups: dict[tuple[str, str], list[tuple[Method, Tensor]]] = {}
    for group in param_groups(model, method, fallback=fallback, rules=rules):
        name = entry_of(group["method"]).name
        for why, param in zip(group["why"], group["params"], strict=True):
            groups.setdefault((why, name), []).append((group["method"], param))
    kinds = Counter(_kind(*member) for members in groups.values() for member in members)
    steps, scratch = _steps(kinds, implementation)
    lines = [_line(why, name, members, steps) for (why, name), members in groups.items()]
    if frozen := [p for p in model.parameters() if not p.requires_grad]:
        lines.append(Line(FROZEN, "-", sum(p.numel() for p in frozen), num_bytes(frozen), 0, 0, 0, Step(0, 0)))
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    saved = model.state_dict()
    if buffers := [saved[name] for name, _ in model.named_buffers() if name in saved.keys() - parameters]:
        lines.append(Line(BUFFERS, "-", 0, num_bytes(buffers), 0, 0, 0, Step(0, 0)))
    gradients = _of_one_layer(model) if release_gradients else sum(line.gradients for line in lines)
    return Memory(tuple(lines), scratch, gradients)


def meta_model(
    model: nn.Module | PretrainedConfig | str,
    layers: Parametrization | None,
    dtype: torch.dtype,
    layer_targets: Sequence[str] = (),
) -> nn.Module:
    """The module itself, or what a configuration, a size or a path describes, built on the meta device.

    Raises:
        UserError: `layers` for a module: putting them into it is the caller's business.
    """
    if isinstance(model, nn.Module):
        if layers is not None:
            raise UserError("layers: a module is counted as it is; put layers into it by gossamer.layers.apply first")
        return model
    config = resolve_config(model) if isinstance(model, str) else model
    built = build_model(config, dtype=dtype, device="meta", seed=0)
    if layers is not None:
        apply(built, layers, layer_targets)
    return built


def _line(why: str, name: str, members: list[tuple[Method, Tensor]], steps: dict[Kind, Step]) -> Line:
    weights = num_bytes(param for _, param in members)
    sizes = [_state_bytes(method, param.shape, param.dtype) for method, param in members]
    state, counters = (sum(column) for column in zip(*sizes, strict=True))
    step = _largest(steps[_kind(*member)] for member in members)
    return Line(why, name, sum(param.numel() for _, param in members), weights, weights, state, counters, step)


def _of_one_layer(model: nn.Module) -> int:
    layers = [[p for p in module.parameters(recurse=False) if p.requires_grad] for module in model.modules()]
    uses = Counter(param for layer in layers for param in layer)
    shared = [num_bytes([param]) for param, number in uses.items() if number > 1]
    return sum(shared) + max([*map(num_bytes, layers), *(2 * size for size in shared)])


def _kind(method: Method, param: Tensor) -> Kind:
    return Kind(method, param.shape, param.dtype)


def _largest(steps: Iterable[Step]) -> Step:
    return Step(*map(max, zip(*steps, strict=True)))


def _steps(kinds: Mapping[Kind, int], implementation: str) -> tuple[dict[Kind, Step], int]:
    found, scratch = {}, 0
    # the reference's parameters have nothing in common, so what is known of one model's is known of another's
    for part in [{kind: 1} for kind in kinds] if implementation == "reference" else [kinds]:
        steps, own = _counted(tuple(part.items()), implementation)
        found, scratch = found | steps, max(scratch, own)
    return found, scratch


@cache
def _counted(kinds: tuple[tuple[Kind, int], ...], implementation: str) -> tuple[dict[Kind, Step], int]:
    return count_step(dict(kinds), implementation)


@cache  # layers repeat, and so do the methods of a search
def _state_bytes(method: Method, shape: torch.Size, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of the method's tensors and of the driver's counters for one parameter."""
    state = init_state(method, torch.empty(shape, dtype=dtype, device="meta"))
    counters = num_bytes(state.pop(counter) for counter in COUNTERS)
    return num_bytes(state.values()), counters
