"""The optimizers: methods, the groups they train, and the driver."""

from gossamer.optim.contract import Context, Entry, Method, State, register
from gossamer.optim.groups import param_groups
from gossamer.optim.optimizer import Optimizer, Plan, PlanRow, Reset

__all__ = [
    "Context",
    "Entry",
    "Method",
    "Optimizer",
    "Plan",
    "PlanRow",
    "Reset",
    "State",
    "param_groups",
    "register",
]
