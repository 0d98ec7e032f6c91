"""Thin adapters to other people's training loops. Most loops need none: `gossamer.Optimizer` is a torch optimizer."""

from gossamer.integrations.peft import save_peft
from gossamer.integrations.trainer import for_trainer

__all__ = ["for_trainer", "save_peft"]
