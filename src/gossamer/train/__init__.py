"""The training loop and what it writes."""

from gossamer.train.config import Pretrain, Training
from gossamer.train.finetuning import Finetune, finetune
from gossamer.train.loop import Result, train
from gossamer.train.pretraining import pretrain

__all__ = ["Finetune", "Pretrain", "Result", "Training", "finetune", "pretrain", "train"]
