"""Putting low-rank layers into a model, and taking them out again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gossamer.errors import UserError
from gossamer.layers.contract import FactoredLinear, Parametrization, merge, weight
from gossamer.optim.contract import hash63
from gossamer.optim.groups import hidden_linears


def apply(
    model: nn.Module, parametrization: Parametrization, targets: str | Sequence[str] = (), *, seed: int = 0
) -> list[str]:
    """Replace hidden linear layers of `model` in place; returns the names of those replaced.

    Bias, dtype, device and training mode are kept. Build the optimizer afterwards: the parameters are others.

    Args:
        targets: regular expressions, searched in the layers' names; none: every hidden linear layer, as
            `gossamer.param_groups` means it (never embeddings or the output head).
        seed: a layer's random numbers depend on (seed, its name) alone.

    Raises:
        UserError: a target that matches no hidden linear layer, a model without any, a layer too small for the rank,
            layers that share one weight.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    linears = {name: linear for name, linear in hidden_linears(model) if name}  # no name: the model itself
    if not linears:
        raise UserError(f"layers: {type(model).__name__} has no hidden nn.Linear to replace")
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in linears):
            raise UserError(f"layers: target {pattern!r} matches no hidden linear layer; there is {', '.join(linears)}")
    chosen = {n: linear for n, linear in linears.items() if not patterns or any(re.search(p, n) for p in patterns)}
    replaced: dict[nn.Module, nn.Module] = {}
    owners: dict[int, str] = {}
    for name, linear in chosen.items():
        if (other := owners.setdefault(id(linear.weight), name)) != name:
            raise UserError(f"layers: {other} and {name} share one weight, which factors would not; leave both out")
        generator = torch.Generator().manual_seed(hash63(seed, "layers", name))
        try:
            replaced[linear] = parametrization.wrap(linear, generator)
        except UserError as error:
            raise UserError(f"{error} ({name}); leave it out by targets") from error
    _replace(model, replaced)
    return list(chosen)


def factored(model: nn.Module) -> Iterator[tuple[str, FactoredLinear]]:
    """Every low-rank layer of a model with its name."""
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            yield name, module


def merge_all(model: nn.Module) -> list[str]:
    """Replace every low-rank layer in place by the dense one it stands for; returns their names.

    Raises:
        UserError: `model` is itself such a layer: there is no place to put the dense one.
    """
    layers = dict(factored(model))
    if "" in layers:
        raise UserError(
            f"merge_all: {type(model).__name__} is a layer, not a model; layers.merge returns its dense one"
        )
    _replace(model, {module: merge(module) for module in layers.values()})
    return list(layers)


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of the dense model that `model` stands for, as the plain class of the model loads it.

    model.save_pretrained(folder, state_dict=layers.dense_state_dict(model))
    """
    state = dict(model.state_dict())
    everywhere = model.named_modules(remove_duplicate=False)  # a layer in two places has two names
    for name, module in [(n, m) for n, m in everywhere if isinstance(m, FactoredLinear)]:
        for key in module.state_dict():
            if key != "bias":
                del state[f"{name}.{key}"]
        state[f"{name}.weight"] = weight(module)
    return state


def _replace(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> None:
    """Everywhere: a layer that stands in two places of the model is replaced in both."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                setattr(parent, name, replaced[child])
