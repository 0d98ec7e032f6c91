"""The model that a run trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gossamer import layers
from gossamer.errors import UserError
from gossamer.models import build_model, check_row, resolve_config
from gossamer.optim import Optimizer, param_groups
from gossamer.train.config import Pretrain, Training


def build(config: Pretrain[Any, Any, Any], vocabulary: int, device: torch.device) -> tuple[nn.Module, list[str]]:
    """The model, in training mode, and the names of the layers that `config.layers` replaced.

    Args:
        vocabulary: of the tokenizer.

    Raises:
        UserError: a vocabulary or rows too large for the model, a rank too large for a layer.
    """
    shape = resolve_config(config.model)
    room = shape.get_text_config().vocab_size
    if vocabulary > room:
        raise UserError(
            f"tokenizer: {config.data.tokenizer!r} has {vocabulary:,} tokens, but model {config.model!r} has room for "
            f"{room:,}"
        )
    check_row("seq_len", config.data.seq_len, shape, config.model)
    model = build_model(shape, dtype=getattr(torch, config.dtype), device=device, seed=config.seed).train()
    if config.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.layers is None:
        return model, []
    return model, layers.apply(model, config.layers, config.layer_targets, seed=config.seed)


def build_optimizer(config: Training[Any, Any], model: nn.Module) -> Optimizer:
    """What steps the parameters of `model`, sharded or not."""
    return Optimizer(
        param_groups(model, config.method, fallback=config.fallback, fallback_lr=config.fallback_lr),
        lr=config.lr,
        weight_decay=config.weight_decay,
        rounding=config.rounding,
        seed=config.seed,
    )
