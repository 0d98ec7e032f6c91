"""Weight refactorization and momentum reset, apart or together: when, what is touched, and proof that it happened.

restarter = gossamer.Restarter(gossamer.Restarts(every=200), model, optimizer)
for step in range(1, steps + 1):
    ...
    optimizer.step()
    if (event := restarter(step)) is not None:
        print(event)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from gossamer import linalg
from gossamer.errors import UserError
from gossamer.layers import factored
from gossamer.optim import Optimizer
from gossamer.optim.contract import MOMENTS, check_choice, hash63, moment_of

RESETS: dict[str | None, tuple[str, ...]] = {"moments": MOMENTS, "first": ("m",), "second": ("v",), None: ()}


@dataclass(frozen=True)
class Restarts:
    """Every so many steps: write low-rank weights in fresh factors, forget momentum, let the learning rate recover.

    Paper: arXiv 2505.22922, Section 4. Deviations from its code, where one flag meant all of it: each part has its own
    switch; the optimizer is kept, so that step counts, schedules and random streams go on; no step is lost before the
    reset; nothing happens after the last step of a run.
    """

    every: int = 200
    """Steps between restarts."""
    refactorize: bool = True
    """Balance the factors of low-rank layers (`relora` merges instead, `loro` takes its exact step)."""
    reset: Literal["moments", "first", "second"] | None = "moments"
    """Which moments start again from zero; None keeps them."""
    scope: Literal["factors", "all"] = "factors"
    """Whose moments: those of low-rank layers, or of every parameter, which is what the paper's code does."""
    recovery_steps: int = 10
    """Steps over which the learning rate rises again; `every` if that is fewer."""
    schedule: Literal["paper", "none"] = "paper"
    """paper: the learning rate rises linearly from 0 after each restart. none: it does not notice."""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"restarts: every is {self.every}; allowed: an integer >= 1")
        if self.recovery_steps < 1:
            raise UserError(f"restarts: recovery_steps is {self.recovery_steps}; allowed: an integer >= 1")
        check_choice(
            "restarts",
            reset=(str(self.reset), tuple(map(str, RESETS))),
            scope=(self.scope, ("factors", "all")),
            schedule=(self.schedule, ("paper", "none")),
        )
        if not self.refactorize and self.reset is None:
            raise UserError("restarts: refactorize is False and reset is None: a restart would do nothing")


class Restarter:
    """Call it after every optimizer step with that step's number; it acts on every `config.every`-th.

    Args:
        seed: of what a restart draws (`relora` draws new adapters).

    Raises:
        UserError: the restart would touch nothing: no low-rank layer to refactorize or in scope, or no such moment; an
            optimizer that is not `gossamer.Optimizer`.
    """

    def __init__(self, config: Restarts, model: nn.Module, optimizer: Optimizer, *, seed: int = 0) -> None:
        self.config, self.optimizer, self.seed = config, optimizer, seed
        if not isinstance(optimizer, Optimizer):
            raise UserError(f"restarts: the optimizer is {type(optimizer).__name__}; allowed: gossamer.Optimizer")
        self.layers = dict(factored(model))
        if not self.layers and (config.refactorize or config.scope == "factors"):
            raise UserError(
                "restarts: the model has no low-rank layers; for a reset alone: refactorize=False, scope='all' "
                "(--restarts.no-refactorize --restarts.scope all)"
            )
        members = list(self._members())
        kept = {moment_of(key) for _, p, group in members for key in group["method"].init(p.detach().to("meta"))}
        self.moments = [moment for moment in RESETS[config.reset] if moment in kept]
        if config.reset is not None and not self.moments:
            raise UserError(f"restarts: reset is {config.reset!r}, but no parameter in scope keeps such a moment")
        self.resume(0)

    def _members(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
        """The optimizer's parameters that are in scope."""
        own = {id(param) for layer in self.layers.values() for param in layer.parameters()}
        return (m for m in self.optimizer.members() if self.config.scope == "all" or id(m[1]) in own)

    def resume(self, step: int) -> None:
        """Go on after `step`, when model and optimizer are as they were then."""
        if self.config.refactorize and (step + 1) % self.config.every == 0:
            for layer in self.layers.values():
                layer.remember()

    @linalg.without_autocast()
    def __call__(self, step: int) -> dict[str, Any] | None:
        """The restart after `step`, counted from 1, if one is due: what it touched, as plain data.

        Returns None or a dict: `layers` rewritten, `change` (the largest relative change of a layer's product or, where
        it is merged, of its weight, Frobenius norm; None without layers), the `moments` that were reset, of how many
        `parameters` and `tensors`, `norm_before` and `norm_after` of all of them together.
        """
        if step < 1:
            raise UserError(f"restarts: step is {step}; allowed: the optimizer's steps so far, from 1")
        event = self._restart(step) if step % self.config.every == 0 else None
        self.resume(step)
        return event

    def _restart(self, step: int) -> dict[str, Any]:
        changes = []
        for name, layer in self.layers.items() if self.config.refactorize else ():
            generator = torch.Generator().manual_seed(hash63(self.seed, "restart", name, step))
            changes.append(layer.restart(generator).change)
        event: dict[str, Any] = {
            "layers": len(changes),
            "change": float(torch.stack(changes).max()) if changes else None,
        }
        if self.moments:
            reset = self.optimizer.reset([name for name, _, _ in self._members()], self.moments)
            event |= {
                "moments": self.moments,
                "parameters": reset.parameters,
                "tensors": reset.tensors,
                "norm_before": reset.norm,
                "norm_after": reset.norm_after,
            }
        return event


def in_words(event: dict[str, Any]) -> str:
    """What a restart did, from its event."""
    done = []
    if event.get("layers"):
        done.append(f"{_count(event, 'layers')} rewritten, largest change of W {_brief(event['change'])}")
    if moments := event.get("moments"):
        what = f"{_count(event, 'tensors')} of {_count(event, 'parameters')}"
        norms = f"{_brief(event['norm_before'])} → {_brief(event['norm_after'])}"
        done.append(f"{' and '.join(moments)} reset: {what}, norm {norms}")
    return "; ".join(done)


def _count(event: dict[str, Any], key: str) -> str:
    return f"{event[key]} {key if event[key] != 1 else key.removesuffix('s')}"


def _brief(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
