"""LoRA and DoRA beside the weights of a trained model, through `peft`; to a method they are matrices like others."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import UserError, matching
from gossamer.optim.groups import hidden_linears


@dataclass(frozen=True)
class Adapter:
    """Thin matrices beside frozen weights."""

    kind: Literal["lora", "dora"] | None = None
    """None: every weight is trained."""
    rank: int = 8
    """Of the adapters."""
    alpha: float = 16.0
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = 0.0
    """Of the adapters' inputs."""
    targets: tuple[str, ...] = ()
    """Regular expressions of linear layers' names; none: every hidden one."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"adapter: rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}; "
                "allowed: rank >= 1, alpha > 0, 0 <= dropout < 1"
            )


def adapt(model: nn.Module, adapter: Adapter, *, trained: Sequence[str] = (), seed: int = 0) -> list[str]:
    """Freeze `model` and put adapters beside its linear layers, in place; returns the layers' names.

    The global random state is left as it was.

    Args:
        trained: names of parameters that are trained as they are: a new head.

    Raises:
        UserError: `peft` is not installed, a target that matches no hidden linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("adapter: peft is not installed; pip install 'gossamer[finetune]'") from error
    linears = [name for name, _ in hidden_linears(model) if f"{name}.weight" not in trained]
    for pattern in adapter.targets:
        if not matching(pattern, linears, "adapter.targets"):
            raise UserError(f"adapter.targets: {pattern!r} matches no hidden linear layer")
    chosen = [
        name for name in linears
        if not adapter.targets or any(matching(pattern, [name], "adapter.targets") for pattern in adapter.targets)
    ]  # fmt: skip
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=adapter.dropout,
        use_dora=adapter.kind == "dora",
        target_modules=chosen,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name in trained:
        model.get_parameter(name).requires_grad_(True)
    return chosen


def is_adapted(module: nn.Module) -> bool:
    """Whether it is a linear layer with an adapter of `peft`'s beside it."""
    return type(module).__module__.startswith("peft.") and hasattr(module, "lora_A")


def merged(module: Any) -> dict[str, Tensor]:
    """The state of the linear layer that an adapted one stands for; `module` is left as it is."""
    whole = copy.deepcopy(module)
    whole.merge()
    return dict(whole.base_layer.state_dict())
