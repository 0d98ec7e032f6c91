"""The optimizers: methods, the groups they train, and the driver."""

from gossamer.optim.contract import Context, Entry, Method, State, register
from gossamer.optim.groups import param_groups
from gossamer.optim.methods.adamw import AdamW
from gossamer.optim.methods.lora_pre import LoRAPre, LoRAPreStable
from gossamer.optim.optimizer import Optimizer, Plan, PlanRow

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
    "param_groups",
    "register",
]
