"""Gossamer: train large language models with optimizer state as thin as gossamer.

import gossamer
opt = gossamer.Optimizer(gossamer.param_groups(model, gossamer.LoRAPre(rank=128)), lr=1e-3)
print(opt.plan())
"""

from gossamer.errors import UserError
from gossamer.optim import (
    AdamW,
    Context,
    Entry,
    LoRAPre,
    LoRAPreStable,
    Method,
    Optimizer,
    Plan,
    PlanRow,
    State,
    param_groups,
    register,
)
from gossamer.optim.contract import methods

__version__ = "0.1.0"
__all__ = [
    "AdamW",
    "Context",
    "Entry",
    "LoRAPre",
    "LoRAPreStable",
    "Method",
    "Optimizer",
    "Plan",
    "PlanRow",
    "State",
    "UserError",
    "methods",
    "param_groups",
    "register",
]
