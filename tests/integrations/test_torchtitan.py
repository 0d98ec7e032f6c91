"""torchtitan's Llama, schedules and checkpoints, with our optimizers in its container.

On two processes, torchrun runs this same file, from the bottom.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard

import gossamer
from gossamer import UserError
from tests.conftest import torchrun
from tests.integrations.conftest import every_method, one_each, same, same_state

pytest.importorskip("torchtitan", reason="pip install torchtitan==0.3.0 (in an environment of its own: old datasets)")

from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry

from gossamer.integrations.torchtitan import GossamerOptimizers

STEPS, HALF = 6, 3
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized"),
    pytest.mark.filterwarnings("ignore:To get the last learning rate computed by the scheduler"),
]


def llama() -> nn.Module:
    """torchtitan's debugging Llama: hidden size 256, six layers of five matrices, a vocabulary of 2048."""
    torch.manual_seed(0)
    config = model_registry("debugmodel").model
    for layer in config.layers:  # its own attention is compiled, which takes longer than all that is tested here
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model = config.build()
    model.init_weights()
    return model


class Run:
    """What torchtitan's trainer builds and saves, without its data and its logs."""

    def __init__(self, **options: Any) -> None:
        self.model = llama()
        if dist.is_initialized():
            for layer in self.model.layers.children():
                fully_shard(layer)
            fully_shard(self.model)
        methods, _ = every_method()
        config = GossamerOptimizers.Config(rules=one_each(self.model, methods), lr=1e-3, fallback_lr=2e-3, **options)
        self.optimizers = config.build(model_parts=[self.model])
        schedule = LRSchedulersContainer.Config(warmup_steps=2, decay_type="cosine")
        self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=STEPS)

    @property
    def states(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizers, "lr_scheduler": self.schedulers}

    def train(self, steps: range) -> None:
        for step in steps:
            tokens = torch.randint(0, 2048, (2, 17), generator=torch.Generator().manual_seed(step))
            self.optimizers.zero_grad()
            logits = self.model(tokens[:, :-1])
            nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
            self.optimizers.step()
            self.schedulers.step()


def check_resume(folder: Path) -> None:
    """Every registered method trains a matrix; saved and loaded by torch.distributed.checkpoint, as torchtitan does."""
    whole, resumed = Run(weight_decay=0.1), Run(weight_decay=0.1)
    alone = not dist.is_initialized()
    whole.train(range(HALF))
    dcp.save(whole.states, checkpoint_id=folder, no_dist=alone)
    whole.train(range(HALF, STEPS))
    dcp.load(resumed.states, checkpoint_id=folder, no_dist=alone)
    resumed.train(range(HALF, STEPS))
    same(whole.model, resumed.model)
    (opt,), (other,) = whole.optimizers, resumed.optimizers
    same_state(opt, other)
    assert {row.method for row in opt.plan()} == set(gossamer.methods())
    assert [int(state["step"]) for state in opt.state.values()] == [STEPS] * len(list(whole.model.parameters()))


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    check_resume(tmp_path)


def test_a_sharded_run_resumes_too(tmp_path: Path) -> None:
    done = torchrun(2, "-m", "tests.integrations.test_torchtitan", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_making_state_to_load_into_moves_no_weight() -> None:
    run = Run(weight_decay=0.1)
    before = copy.deepcopy(run.model)
    run.optimizers.state_dict()  # steps once, with zero gradients and a learning rate of zero
    same(run.model, before)


def test_embeddings_head_and_norms_are_found_in_its_llama() -> None:
    config = GossamerOptimizers.Config(method=gossamer.LoRAPre(rank=8))
    (opt,) = config.build(model_parts=[llama()])
    others = {row.name for row in opt.plan() if row.method == "adamw"}
    assert {name for name in others if "norm" not in name} == {"tok_embeddings.weight", "lm_head.weight"}


def test_names_are_those_without_activation_checkpointing() -> None:
    plain, wrapped = llama(), llama()
    for name, block in list(wrapped.layers.named_children()):
        wrapped.layers[name] = checkpoint_wrapper(block)
    config = GossamerOptimizers.Config(method=gossamer.LoRAPre(rank=8))
    (one,), (other,) = (config.build(model_parts=[model]) for model in (plain, wrapped))
    assert one.plan() == other.plan()


@pytest.mark.parametrize(
    "ignored",
    [
        {"param_groups": [ParamGroupConfig(pattern=".*", optimizer_name="AdamW")]},
        {"optimizer_factory_kwargs_by_name": {"AdamW": {"fused": True}}},
    ],
)
def test_what_would_be_ignored_is_refused(ignored: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(ignored))} would be ignored"):
        GossamerOptimizers.Config(**ignored).build(model_parts=[nn.Linear(4, 4)])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    check_resume(Path(sys.argv[1]))
    dist.destroy_process_group()
