"""The training loop and what it writes."""

from gossamer.train.config import Pretrain
from gossamer.train.loop import Result, pretrain

__all__ = ["Pretrain", "Result", "pretrain"]
