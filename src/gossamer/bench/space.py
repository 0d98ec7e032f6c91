"""What a sweep varies: knobs of a recipe by the names of their fields, as `--space` writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.bench.recipes import Recipe
from gossamer.errors import UserError, nearest

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Knob:
    """What is varied: one of a list of values, or a number between bounds, drawn by its logarithm (from 0: evenly)."""

    name: str
    bounds: tuple[float, float] | None
    choices: tuple[Any, ...] = ()

    @property
    def values(self) -> tuple[Any, ...]:
        """Every choice, or both bounds; of decimal numbers without 0, which is never drawn."""
        if self.bounds is None:
            return self.choices
        return tuple(bound for bound in self.bounds if isinstance(bound, int) or bound)

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """For optuna. Choices go by their JSON, since a database has no lists."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.bounds is None:
            return CategoricalDistribution([json.dumps(value) for value in self.choices])
        low, high = self.bounds
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=low > 0)
        return FloatDistribution(low, high, log=low > 0)

    def value(self, said: Any) -> Any:
        """What is trained with, of what optuna said; three digits of a number that it drew are enough."""
        if self.bounds is None:
            found = json.loads(said)
            return tuple(found) if isinstance(found, list) else found
        return said if isinstance(said, int) else float(f"{said:.3g}")

    def at(self, part: float) -> Any:
        """What optuna would say of the value at this part, 0 to 1, of the way."""
        if self.bounds is None:
            return json.dumps(self.choices[int(part * len(self.choices))])
        low, high = self.bounds
        value = low * (high / low) ** part if low > 0 else low + (high - low) * part
        return round(value) if isinstance(low, int) and isinstance(high, int) else value


def spread(knobs: Sequence[Knob], count: int, seed: int) -> list[dict[str, Any]]:
    """Points that cover every knob's range evenly, as optuna says them: a Latin hypercube.

    A handful of independent draws would leave gaps, and fall on one another.
    """
    draw = np.random.default_rng(seed)
    parts = {knob.name: (draw.permutation(count) + 0.5) / count for knob in knobs}
    return [{knob.name: knob.at(float(parts[knob.name][index])) for knob in knobs} for index in range(count)]


def parse(space: Sequence[str], recipe: Recipe, lr: float | None) -> tuple[Knob, ...]:
    """The knobs that `--space` names; `lr`, the preset's if there is one, makes up for a learning rate left out.

    Raises:
        UserError: a name that the recipe does not have, or has twice; a value that is of another type or refused.
    """
    knobs = {}
    for text in space:
        name, equals, values = text.partition("=")
        if not (name and equals and values):
            raise UserError(f"space: {text!r}; allowed: NAME=LOW:HIGH, or NAME=VALUE,VALUE,...")
        if name in knobs:
            raise UserError(f"space: {name} is there twice")
        knobs[name] = _knob(name, values, recipe)
    if "lr" not in knobs:
        if lr is None:
            raise UserError(f"space: {recipe.name} has no preset to look around; add lr=LOW:HIGH")
        knobs["lr"] = Knob("lr", (lr / 8, lr * 8))
    return tuple(knobs.values())


def _knob(name: str, values: str, recipe: Recipe) -> Knob:
    like = getattr(*owner_of(name, recipe))
    low, colon, high = values.partition(":")
    if colon and "[" not in values:
        if isinstance(like, bool | str | tuple):
            raise UserError(f"space: {name} is no number, {values!r} cannot be its bounds; allowed: {name}=VALUE,...")
        bounds = _typed(name, _json(low), like), _typed(name, _json(high), like)
        if not 0 <= bounds[0] < bounds[1] < math.inf:
            raise UserError(f"space: {name}={values}; allowed: 0 <= LOW < HIGH")
        return _placed(Knob(name, bounds), recipe)
    try:
        found = json.loads(f"[{values}]")
    except ValueError:
        found = values.split(",")
    choices = tuple(_typed(name, value, like) for value in found)
    if len(set(choices)) < len(choices):
        raise UserError(f"space: {name}={values} has a value twice")
    return _placed(Knob(name, None, choices), recipe)


def _placed(knob: Knob, recipe: Recipe) -> Knob:
    """The knob, whose values the recipe takes."""
    for value in knob.values:
        place(recipe, {knob.name: value})
    return knob


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _typed(name: str, value: Any, like: Any) -> Any:
    """The value as the field has it; what is None by default may be anything."""
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if like is not None and type(value) is not type(like):
        raise UserError(f"space: {name} is {value!r}; allowed: values like {like!r}")
    return value


def owner_of(name: str, recipe: Recipe) -> tuple[Any, str]:
    """The part of a recipe that has this field."""
    if name == "lr":
        return recipe, name
    parts = [part for part in (recipe.method, recipe.layers, recipe.restarts) if part is not None]
    known = {field.name: part for part in parts for field in fields(part)}
    owners = [part for part in parts if name in part.__dataclass_fields__]
    if not owners:
        raise UserError(
            f"space: {recipe.name} has no {name!r}{nearest(name, ['lr', *known])}; known: lr, {', '.join(known)}"
        )
    if len(owners) > 1:
        raise UserError(f"space: {name} is a field of {' and of '.join(type(part).__name__ for part in owners)}")
    return owners[0], name


def place(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values of its knobs.

    Raises:
        UserError: a value that its owner refuses.
    """
    for name, value in values.items():
        owner, field = owner_of(name, recipe)
        if name == "lr":
            if not 0 < value < math.inf:
                raise UserError(f"space: lr is {value}; allowed: finite numbers > 0")
            recipe = replace(recipe, lr=value)
        else:
            part = next(it for it in ("method", "layers", "restarts") if getattr(recipe, it) is owner)
            recipe = replace(recipe, **{part: replace(owner, **{field: value})})
    return recipe
