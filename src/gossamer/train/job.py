"""What the loop does not decide: where a batch comes from, the model, its loss, how it is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from gossamer.data import Batch
from gossamer.distributed import World


class Outcome(Protocol):
    """What an evaluation finds."""

    @property
    def tokens(self) -> int:
        """How much was scored: tokens, or the examples of a classifier."""
        ...

    @property
    def batches(self) -> int: ...

    def numbers(self) -> dict[str, float]:
        """For the log; `loss` is one of them, and `score` (larger is better) or `perplexity` ranks runs."""
        ...

    def __str__(self) -> str:
        """For people, to follow the word "validation"."""
        ...


class Job(Protocol):
    """One kind of training."""

    model: nn.Module
    """In training mode, on its device."""
    replaced: list[str]
    """Names of the layers that others stand for."""
    source: str
    """The training data, as the user wrote it."""
    fingerprint: str
    """Changes when any training batch may."""
    description: dict[str, Any]
    """The data for machines (json-able): sources, counts, fingerprints."""
    introduction: list[str]
    """The same for people, a line each, with what else is to be said before the first step."""

    def batch(self, position: int, size: int, seed: int) -> Batch:
        """Rows `position .. position + size` of an endless order that the seed alone decides."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed loss of what `batch.count` counts, a fp32 scalar; `model` may be a wrapped `self.model`."""
        ...

    def evaluate(self, batch_size: int, micro_batch_size: int, world: World) -> Outcome: ...

    def save_tokenizer(self, folder: Path) -> None: ...
