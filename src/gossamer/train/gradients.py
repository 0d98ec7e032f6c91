"""The gradients of an optimizer step: held until it ends, or released as they come. Both clip and say their norm."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from gossamer.distributed import World, whole
from gossamer.errors import UserError
from gossamer.optim import Optimizer, release_gradients
from gossamer.train.config import Training


class Held:
    """All of them until the optimizer steps."""

    stopped = "before the update"
    """Where a run stops whose norm is not finite."""
    averaged_at_once = False
    """Whether each micro-batch's gradients are averaged over processes, rather than the sum of all."""

    def __init__(self, model: nn.Module, clip: float) -> None:
        self.model, self.clip = model, clip

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def norm(self) -> float:
        """Of all of them, before they are clipped, which this does."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        return float(whole(nn.utils.clip_grad_norm_(parameters, self.clip or math.inf)))


class Released:
    """Each until its parameter has stepped, in the backward pass of the last micro-batch."""

    averaged_at_once = True  # a norm that is measured before the last pass has to see the others' rows

    def __init__(self, model: nn.Module, optimizer: Optimizer, clip: float, clip_by: str, world: World) -> None:
        self.world = world
        self.two_passes = clip > 0 and clip_by == "two-pass"
        way = "two-pass" if self.two_passes else "previous"  # which measures in passing, and scales nothing by inf
        self.released = release_gradients(model, optimizer, max_norm=clip or math.inf, clip=way)
        self.stopped = "before the update" if self.two_passes else "and some weights may have moved"

    def backward(self, loss: Tensor, last: bool) -> None:
        if not last:
            with self.released.accumulate():
                loss.backward()
            return
        if self.two_passes:
            with self.released.measure():
                loss.backward(retain_graph=True)
        if not self.world.any(not math.isfinite(loss.detach() + self.released.norm)):
            loss.backward()  # else nothing of this step has moved

    def norm(self) -> float:
        return float(self.released.norm)


def gradients_of(config: Training[Any, Any], model: nn.Module, optimizer: Optimizer, world: World) -> Held | Released:
    """How this run treats them.

    Raises:
        UserError: to be released where every process holds the whole model.
    """
    if not config.release_gradients:
        return Held(model, config.clip)
    if world.size > 1 and config.parallel == "ddp":
        raise UserError(
            f"release_gradients: {world.size} processes with --parallel ddp, which keeps all gradients to average; "
            "allowed: fsdp2, or one process"
        )
    return Released(model, optimizer, config.clip, config.clip_by, world)
