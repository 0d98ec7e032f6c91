"""Gossamer: train large language models with optimizer state as thin as gossamer.

import gossamer
opt = gossamer.Optimizer(gossamer.param_groups(model, gossamer.LoRAPre(rank=128)), lr=1e-3)
print(opt.plan())
"""

from gossamer.errors import UserError
from gossamer.optim import *  # noqa: F403
from gossamer.optim import __all__ as _optim
from gossamer.optim.contract import methods

__version__ = "0.1.0"
__all__ = ["UserError", "methods", *_optim]
