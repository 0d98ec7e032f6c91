"""Putting low-rank layers into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gossamer.errors import UserError, matching, nearest
from gossamer.layers.adapters import is_adapted, merged
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
        UserError: a target that is no regular expression or matches no hidden linear layer, a model without any, a
            layer too small for the rank, layers that share one weight.
    """
    patterns = [targets] if isinstance(targets, str) else list(targets)
    linears = {name: linear for name, linear in hidden_linears(model) if name}  # no name: the model itself
    if not linears:
        here = "only low-rank layers" if any(factored(model)) else "no hidden nn.Linear"
        raise UserError(f"layers: {type(model).__name__} has {here} to replace; other kinds of layers are left alone")
    chosen = _chosen(linears, patterns, parametrization.rank)
    replaced: dict[nn.Module, nn.Module] = {}
    owners: dict[int, str] = {}
    for name, linear in chosen.items():
        if (other := owners.setdefault(id(linear.weight), name)) != name:
            raise UserError(f"layers: {other} and {name} share one weight, which factors would not; leave both out")
        generator = torch.Generator().manual_seed(hash63(seed, "layers", name))
        replaced[linear] = parametrization.wrap(linear, generator)
    _replace(model, replaced)
    return list(chosen)


def _chosen(linears: dict[str, nn.Linear], patterns: list[str], rank: int) -> dict[str, nn.Linear]:
    """The layers that targets name, all of them large enough for the rank."""
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    found: set[str] = set()
    for pattern in patterns:
        names = matching(pattern, linears, "layers: target")
        if not names:
            near = nearest(pattern, kinds)
            raise UserError(
                f"layers: target {pattern!r} matches no hidden linear layer{near}; known: {', '.join(kinds)}"
            )
        found.update(names)
    chosen = {name: linear for name, linear in linears.items() if not patterns or name in found}
    small = {name: linear for name, linear in chosen.items() if min(linear.weight.shape) < rank}
    if small:
        name, linear = next(iter(small.items()))
        fits = sorted({n.rpartition(".")[2] for n in chosen} - {n.rpartition(".")[2] for n in small})
        instead = f", or targets without them: '({'|'.join(fits)})$'" if fits else ""
        raise UserError(
            f"layers: rank is {rank}, too much for {len(small)} layers, such as {name} of shape "
            f"{tuple(linear.weight.shape)}; allowed: 1 to {min(min(it.weight.shape) for it in small.values())}{instead}"
        )
    return chosen


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
    _check_model(model)
    layers = dict(factored(model))
    _replace(model, {module: merge(module) for module in layers.values()})
    return list(layers)


def stand_ins(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that a linear one of the plain model became, low-rank or beside an adapter, with its name.

    Args:
        remove_duplicate: whether one that stands in two places comes once, as in `nn.Module.named_modules`.
    """
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, FactoredLinear) or is_adapted(module):
            yield name, module


def plain(module: nn.Module) -> dict[str, Tensor]:
    """`weight` and, where there is one, `bias` of the linear layer that a stand-in stands for. It is left as it is."""
    if not isinstance(module, FactoredLinear):
        return merged(module)
    made = {"weight": weight(module).detach()}
    return made if module.bias is None else {**made, "bias": module.bias.detach()}


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of the dense model that `model` stands for, as the plain class of the model loads it.

    model.save_pretrained(folder, state_dict=layers.dense_state_dict(model))
    """
    _check_model(model)
    state = dict(model.state_dict())
    for name, module in stand_ins(model, remove_duplicate=False):
        for key in module.state_dict():
            del state[f"{name}.{key}"]
        state |= {f"{name}.{key}": tensor for key, tensor in plain(module).items()}
    return state


def _check_model(model: nn.Module) -> None:
    if isinstance(model, FactoredLinear):
        raise UserError(f"layers: {type(model).__name__} is a layer, not a model; layers.merge returns its dense one")


def _replace(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> None:
    """Everywhere: a layer that stands in two places of the model is replaced in both."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                setattr(parent, name, replaced[child])
