"""A model and rows for the training loops of others, and every registered method in one model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.distributed import whole
from gossamer.optim.contract import build

VOCABULARY, LENGTH = 64, 12


def llama(dtype: torch.dtype = torch.float32, num_hidden_layers: int = 2, attention_dropout: float = 0.1) -> Any:
    """A Llama of hidden size 32, the same one each time, with random numbers in its forward pass."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attention_dropout=attention_dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (count, LENGTH), generator=draw)
    return [{"input_ids": row, "labels": row} for row in ids]


def every_method() -> tuple[list[gossamer.Method], int]:
    """Each registered method, of rank 4 and with refreshes that a few steps see, and the layers that give each a
    matrix of its own."""
    made = []
    for name, entry in gossamer.methods().items():
        sizes = {"rank": 4, "update_proj_gap": 2, "reset_gap": 2}
        made.append(build(name, **{key: sizes[key] for key in sizes if key in entry.cls.__dataclass_fields__}))
    return made, -(-len(made) // 7)  # a decoder layer has seven matrices


def one_each(model: nn.Module, methods: list[gossamer.Method]) -> list[tuple[str, gossamer.Method]]:
    """Rules that give each method a hidden matrix of `model`."""
    groups = gossamer.param_groups(model, gossamer.AdamW())
    hidden = [name for group in groups for name, why in zip(group["param_names"], group["why"], strict=True)
              if why == "hidden matrix"]  # fmt: skip
    assert len(hidden) >= len(methods)
    return [(f"^{name}$", method) for name, method in zip(hidden, methods, strict=False)]


def same(ours: nn.Module, theirs: nn.Module) -> None:
    """Bit for bit, and not for want of a difference to find."""
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(whole(value), whole(state[key])), key


def same_state(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer) -> None:
    one, other = (getattr(opt, "optimizer", opt).state_dict() for opt in (ours, theirs))
    assert one["state"].keys() == other["state"].keys() and one["state"]
    for index, state in one["state"].items():
        for key, value in state.items():
            assert torch.equal(whole(value), whole(other["state"][index][key])), (index, key)
            assert value.dtype == other["state"][index][key].dtype, (index, key)
    assert [group["lr"] for group in one["param_groups"]] == [group["lr"] for group in other["param_groups"]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()
