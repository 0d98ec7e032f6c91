"""Gossamer: train large language models with optimizer state as thin as gossamer.

    import gossamer
    opt = gossamer.Optimizer(gossamer.param_groups(model, gossamer.LoRAPre(rank=128)), lr=1e-3)
    print(opt.plan())

The class of every registered method is here under its own name.
"""

from typing import Any

from gossamer.errors import UserError
from gossamer.optim import (
    Context,
    Entry,
    GradientRelease,
    Method,
    Optimizer,
    Plan,
    PlanRow,
    Reset,
    State,
    param_groups,
    register,
    release_gradients,
)
from gossamer.optim.contract import methods
from gossamer.restarts import Restarter, Restarts

__version__ = "0.1.0"
__all__ = [
    "Context",
    "Entry",
    "GradientRelease",
    "Method",
    "Optimizer",
    "Plan",
    "PlanRow",
    "Reset",
    "Restarter",
    "Restarts",
    "State",
    "UserError",
    "methods",
    "param_groups",
    "register",
    "release_gradients",
]


def _classes() -> dict[str, type[Any]]:
    return {entry.cls.__name__: entry.cls for entry in methods().values()}


def __getattr__(name: str) -> Any:
    """The registry is the only list of methods: a new file of `optim/methods` is here without a line here."""
    if not name.startswith("_") and (cls := _classes().get(name)) is not None:
        return cls
    raise AttributeError(f"module 'gossamer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_classes()])
