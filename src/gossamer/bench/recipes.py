"""Ways to train hidden matrices, and the presets with which suites run them: data, each with the evidence for it.

`presets.jsonl` has a line for every suite and recipe: the learning rate, the fields in which method, layers and
restarts differ from their defaults, and the evidence. `gossamer sweep --write` writes it. A method without a line is in
no suite.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gossamer.layers import PARAMETRIZATIONS, Parametrization, name_of
from gossamer.optim.contract import Method, build, entry_of
from gossamer.restarts import Restarts
from gossamer.train import jsonl

PRESETS = Path(__file__).with_name("presets.jsonl")


@dataclass(frozen=True)
class Recipe:
    """One way to train hidden matrices, by the name that it has in rows and in the report."""

    name: str
    method: Method
    lr: float
    """Of hidden matrices, or of the factors in their place, where `Bench.lrs` gives no other."""
    layers: Parametrization | None = None
    restarts: Restarts | None = None


def presets(suite: str) -> dict[str, Recipe]:
    """Every method, and every kind of low-rank weights, that has a preset for the suite."""
    found = {}
    for _, line in jsonl.read(PRESETS):
        if line["suite"] == suite:
            layers, restarts = line["layers"], line["restarts"]
            found[line["name"]] = Recipe(
                line["name"],
                build(**line["method"]),
                line["lr"],
                layers and _parametrization(**layers),
                None if restarts is None else Restarts(**restarts),
            )
    return found


def _parametrization(name: str, **hyperparameters: Any) -> Parametrization:
    return PARAMETRIZATIONS[name](**hyperparameters)


def write_preset(suite: str, recipe: Recipe, evidence: Mapping[str, Any]) -> None:
    """Put a recipe, and why it is as it is, in place of the suite's preset of its name, or beside the others."""
    line = {
        "suite": suite,
        "name": recipe.name,
        "lr": recipe.lr,
        "method": {"name": entry_of(recipe.method).name, **_set(recipe.method)},
        "layers": recipe.layers and {"name": name_of(recipe.layers), **_set(recipe.layers)},
        "restarts": None if recipe.restarts is None else _set(recipe.restarts),
        "evidence": evidence,
    }
    with _alone(PRESETS.parent):
        kept = [old for _, old in jsonl.read(PRESETS) if (old["suite"], old["name"]) != (suite, recipe.name)]
        lines = sorted([*kept, line], key=lambda it: (it["suite"], it["name"]))
        draft = PRESETS.with_suffix(".tmp")
        draft.write_text("".join(json.dumps(it) + "\n" for it in lines))
        draft.replace(PRESETS)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No two processes at the same time."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _set(part: Any) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    values = {field.name: getattr(part, field.name) for field in fields(part)}
    return {name: value for name, value in values.items() if value != getattr(type(part)(), name)}
