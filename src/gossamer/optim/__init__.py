"""The optimizers: methods, the groups they train, and the driver."""

from gossamer.optim.contract import Context, Entry, Method, State, register
from gossamer.optim.groups import param_groups
from gossamer.optim.optimizer import Optimizer, Plan, PlanRow, Reset
from gossamer.optim.release import GradientRelease, release_gradients

__all__ = [
    "Context",
    "Entry",
    "GradientRelease",
    "Method",
    "Optimizer",
    "Plan",
    "PlanRow",
    "Reset",
    "State",
    "param_groups",
    "register",
    "release_gradients",
]
