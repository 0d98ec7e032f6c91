"""Perplexity over exactly the tokens that were predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.data import IGNORED, TokenStream
from gossamer.distributed import World


@dataclass(frozen=True)
class Score:
    """The loss of a model on a validation stream."""

    loss: float
    """Mean nats a token, every token with the same weight."""
    legacy_loss: float
    """What the published repositories report: the sum of the batches' mean losses over their number plus one."""
    tokens: int
    batches: int

    @property
    def perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def legacy_perplexity(self) -> float:
        """Comparable with the papers' tables at the same batch size, and too low by a factor of exp(loss / (n + 1))."""
        return _exp(self.legacy_loss)

    def numbers(self) -> dict[str, float]:
        """For the log."""
        return {"loss": self.loss, "perplexity": self.perplexity, "legacy_perplexity": self.legacy_perplexity}

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:.3f} over {self.tokens:,} tokens (legacy {self.legacy_perplexity:.3f})"


def token_loss(model: nn.Module, inputs: Tensor, targets: Tensor, **others: Tensor) -> Tensor:
    """Summed cross entropy in nats of `targets` (rows, length) given `inputs` (rows, length); fp32 scalar.

    `others` are further inputs of the model, such as `position_ids`.
    """
    logits = model(input_ids=inputs, **others).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")


@torch.no_grad()
def evaluate(
    model: nn.Module, stream: TokenStream, *, rows: int, batch_size: int, micro_batch_size: int, world: World
) -> Score:
    """Score `model` on the first `rows` rows of `stream`, in file order.

    Args:
        batch_size: rows of one batch of the legacy number; the loss does not depend on it.
        micro_batch_size: rows of one forward pass.
    """
    was_training = model.training
    model.eval()
    starts = range(0, rows, batch_size)
    sums = torch.zeros(len(starts), 2, dtype=torch.float64, device=world.device)  # a batch's nats and tokens
    turns = world.turns(len(starts))
    passes = sum(math.ceil(min(batch_size, rows - starts[index]) / micro_batch_size) for index in turns)
    more = world.most(passes) - passes  # agreed on first: a sharded model's forward pass needs every process
    for index in turns:
        inputs, targets = stream.batch(starts[index], min(batch_size, rows - starts[index]), None)
        for x, y in zip(inputs.split(micro_batch_size), targets.split(micro_batch_size), strict=True):
            y = y.to(world.device)
            sums[index, 0] += token_loss(model, x.to(world.device), y)
            sums[index, 1] += (y != IGNORED).sum()
    inputs, targets = stream.batch(0, 1, None)
    for _ in range(more):
        token_loss(model, inputs.to(world.device), targets.to(world.device))
    nats, counts = world.sum(sums).cpu().unbind(1)
    model.train(was_training)
    means = nats / counts.clamp_min(1)
    return Score(
        loss=float(nats.sum() / counts.sum()),
        legacy_loss=float(means.sum()) / (len(starts) + 1),
        tokens=int(counts.sum()),
        batches=len(starts),
    )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
