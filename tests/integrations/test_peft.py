"""LoRA layers of ours, saved in the format of the peft library and opened by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

import gossamer
from gossamer import UserError, layers
from gossamer.integrations import save_peft
from tests.integrations.conftest import llama, rows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")


def adapted(**targets: layers.LoRA) -> Any:
    """A frozen model whose layers have LoRA factors, trained a little."""
    model = llama(torch.float64, attention_dropout=0.0)
    model.requires_grad_(False)
    for target, parametrization in targets.items():
        layers.apply(model, parametrization, target)
    opt = gossamer.Optimizer(gossamer.param_groups(model, gossamer.LoRAPre(rank=2)), lr=1e-2)
    for row in rows(4):
        model(**{key: value[None] for key, value in row.items()}).loss.backward()
        opt.step()
        opt.zero_grad()
    return model.eval()


@pytest.mark.parametrize(
    "targets",
    [
        {"q_proj": layers.LoRA(rank=4, alpha=8.0), "down_proj": layers.LoRA(rank=4, alpha=8.0)},
        {"q_proj": layers.LoRA(rank=4, alpha=8.0), "down_proj": layers.LoRA(rank=3, alpha=5.0)},
    ],
    ids=["one rank", "two ranks"],
)
def test_peft_opens_our_adapter(tmp_path: Path, targets: dict[str, layers.LoRA]) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    llama(torch.float64).save_pretrained(base)
    ours = adapted(**targets)
    names = save_peft(ours, folder, str(base))
    assert len(names) == 4 and {name.rpartition(".")[2] for name in names} == set(targets)
    dense = AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(dense, folder).eval()
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base).eval()(input_ids=ids).logits
        here, there = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    # they scale after the second product and not before it: a rounding of float64 each layer
    assert torch.allclose(here, there, rtol=0, atol=1e-13)
    assert float((here - plain).abs().max()) > 1e-3
    assert peft.PeftConfig.from_pretrained(folder).base_model_name_or_path == str(base)
    merged = theirs.merge_and_unload()
    layers.merge_all(ours)
    for (name, one), (_, other) in zip(ours.named_parameters(), merged.named_parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-14), name


def test_the_folder_holds_the_factors_and_nothing_else(tmp_path: Path) -> None:
    model = adapted(q_proj=layers.LoRA(rank=4))
    save_peft(model, tmp_path, "base")
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(4, 32), (32, 4)} and len(tensors) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize(
    ("parametrization", "frozen", "message"),
    [
        (None, True, "has no LoRA layer"),
        (layers.ReLoRA(rank=4), True, "q_proj is a ReLoRALinear"),
        (layers.SLTrain(rank=4), True, "q_proj is a SLTrainLinear"),
        (layers.LoRA(rank=4), False, r"model.embed_tokens.weight and \d+ more are trained"),
    ],
)
def test_what_an_adapter_cannot_hold_is_refused(
    tmp_path: Path, parametrization: Any, frozen: bool, message: str
) -> None:
    model = llama()
    model.requires_grad_(not frozen)
    if parametrization is not None:
        layers.apply(model, parametrization, "q_proj")
    with pytest.raises(UserError, match=message):
        save_peft(model, tmp_path / "adapter", "base")
    assert not (tmp_path / "adapter").exists()
