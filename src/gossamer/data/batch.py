"""What one step of training takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100
"""The target where nothing is to be predicted (``torch.nn.functional.cross_entropy``'s ``ignore_index``)."""


@dataclass(frozen=True)
class Batch:
    """Rows of examples and what is to be predicted of them."""

    inputs: dict[str, Tensor]
    """What the model is called with, by argument: `input_ids` (rows, length) int64 and any others, a row each."""
    targets: Tensor
    """(rows, length) int64: the token after each, or -100 where nothing is to be predicted; or (rows,): labels."""

    @property
    def count(self) -> int:
        """Targets that a loss is summed over."""
        return int((self.targets != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Tokens that are predicted, or, where whole rows have labels, read."""
        return self.count if self.targets.ndim > 1 else int(self.inputs["attention_mask"].sum())

    def rows(self, part: slice) -> Batch:
        return Batch({name: tensor[part] for name, tensor in self.inputs.items()}, self.targets[part])

    def split(self, size: int) -> list[Batch]:
        """Batches of `size` rows, the last one of what is left."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.targets), size)]

    def to(self, device: torch.device) -> Batch:
        return Batch({name: tensor.to(device) for name, tensor in self.inputs.items()}, self.targets.to(device))
