"""torchtitan: its container of optimizers, one `gossamer.Optimizer` for each part of the model.

config.optimizer = GossamerOptimizers.Config(method=gossamer.LoRAPre(rank=128), lr=1e-3)   # of a Trainer.Config
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn
from torchtitan.components.checkpointer.utils import canonical_fqn  # pyright: ignore[reportMissingImports]
from torchtitan.components.optimizer import OptimizersContainer  # pyright: ignore[reportMissingImports]

from gossamer.errors import UserError
from gossamer.optim import Method, Optimizer, param_groups
from gossamer.optim.groups import Rules
from gossamer.optim.methods.adamw import AdamW


class GossamerOptimizers(OptimizersContainer[Optimizer]):
    """Stands where torchtitan's own container does: schedules, flat checkpoints and logs are torchtitan's.

    Parameters are chosen by `gossamer.param_groups`, from the model part, in place of torchtitan's list of patterns.

    Raises:
        UserError: `param_groups` or `optimizer_factory_kwargs_by_name`, which are for torchtitan's optimizers; whatever
            `gossamer.param_groups` and `gossamer.Optimizer` refuse.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        method: Method = field(default_factory=AdamW)
        """Trains the hidden matrices."""
        fallback: Method = field(default_factory=AdamW)
        """Trains everything else: embeddings, output head, norms."""
        rules: Rules = ()
        """(regular expression, method) pairs, searched in the names of parameters."""
        lr: float = 1e-3
        """Peak learning rate."""
        fallback_lr: float | None = None
        """Peak learning rate of everything else; None: the same."""
        weight_decay: float = 0.0
        """Decoupled, of every parameter."""
        rounding: Literal["stochastic", "nearest"] = "stochastic"
        """How bf16 weights are written."""
        seed: int = 0
        """Of the optimizer's random numbers."""
        implementation: Literal["auto", "reference", "fused"] = "auto"  # pyright: ignore
        """As `gossamer.Optimizer` means it."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        for name in ("param_groups", "optimizer_factory_kwargs_by_name"):
            if getattr(config, name):
                raise UserError(f"GossamerOptimizers: {name} would be ignored; allowed: method, fallback and rules")
        self.model_parts, self.optimizers = model_parts, []
        for part in model_parts:
            groups = param_groups(
                part, config.method, fallback=config.fallback, fallback_lr=config.fallback_lr, rules=config.rules
            )
            for group in groups:  # as without activation checkpointing, which puts a word into names
                group["param_names"] = [canonical_fqn(name) for name in group["param_names"]]
            options = {
                key: getattr(config, key) for key in ("lr", "weight_decay", "rounding", "seed", "implementation")
            }
            opt = Optimizer(groups, **options)
            opt.register_load_state_dict_pre_hook(_with_names)
            self.optimizers.append(opt)
        params = [param for opt in self.optimizers for _, param, _ in opt.members()]
        self._validate_params(params)
        self._post_init(params)


def _with_names(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """torchtitan finds a parameter's state by its name and drops the names: they are the optimizer's own."""
    groups = [
        {**saved, "param_names": group["param_names"], "why": group["why"]}
        for saved, group in zip(state_dict["param_groups"], opt.param_groups, strict=True)
    ]
    return {**state_dict, "param_groups": groups}
