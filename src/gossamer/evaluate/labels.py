"""The loss of classifiers and regressors, and their predictions on labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.data import Batch
from gossamer.distributed import World
from gossamer.evaluate.metrics import METRICS


class Rows(Protocol):
    """Rows in the order of a file."""

    num_rows: int
    labels: np.ndarray

    def batch(self, position: int, size: int, seed: int | None) -> Batch: ...


@dataclass(frozen=True)
class LabelScore:
    """How well labels were predicted."""

    loss: float
    """Mean cross entropy in nats, or mean squared error where the label is a number."""
    metrics: dict[str, float]
    tokens: int
    """Examples."""
    batches: int

    @property
    def score(self) -> float:
        """The mean of the metrics, as GLUE means a task's score."""
        return fmean(self.metrics.values())

    def numbers(self) -> dict[str, float]:
        """For the log."""
        return {"loss": self.loss, **self.metrics, "score": self.score}

    def __str__(self) -> str:
        named = ", ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"{named} over {self.tokens:,} examples (loss {self.loss:.4f})"


def label_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Summed over rows: cross entropy in nats of int64 labels, squared error of fp32 ones; fp32 scalar."""
    logits = model(**batch.inputs).logits.float()
    if batch.targets.is_floating_point():
        return F.mse_loss(logits.squeeze(-1), batch.targets, reduction="sum")
    return F.cross_entropy(logits, batch.targets, reduction="sum")


@torch.no_grad()
def predict_labels(model: nn.Module, rows: Rows, size: int, world: World) -> Tensor:
    """(num_rows, outputs) fp64 logits on the CPU, the same on every process, `size` rows at a time."""
    was_training = model.training
    model.eval()
    parts: dict[int, Tensor] = {}
    starts = range(0, rows.num_rows, size)
    for index in range(world.rank, -(-len(starts) // world.size) * world.size, world.size):
        # past the end the last batch again: a sharded model's forward pass needs every process
        start = starts[min(index, len(starts) - 1)]
        logits = model(**rows.batch(start, size, None).to(world.device).inputs).logits.double()
        if index < len(starts):
            parts[start] = logits
    width: Any = model.config.num_labels  # pyright: ignore
    logits = torch.zeros(rows.num_rows, width, dtype=torch.float64, device=world.device)
    for start, part in parts.items():
        logits[start : start + len(part)] = part
    model.train(was_training)
    return world.sum(logits).cpu()


def score_labels(logits: Tensor, labels: np.ndarray, metrics: Sequence[str], batches: int = 1) -> LabelScore:
    """Loss and metrics of (rows, outputs) logits; a single output is a number, several are classes."""
    targets = torch.from_numpy(labels.astype(np.float64))
    if logits.shape[1] == 1:
        predicted, loss = logits[:, 0], F.mse_loss(logits[:, 0], targets)
    else:
        predicted, loss = logits.argmax(1).double(), F.cross_entropy(logits, targets.long())
    found = {name: METRICS[name](predicted.numpy(), targets.numpy()) for name in metrics}
    return LabelScore(float(loss), found, len(labels), batches)
