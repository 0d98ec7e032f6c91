"""A checkpoint of `gossamer pretrain` is a model and a tokenizer of `transformers`, whatever its layers were."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer import Restarts, layers
from gossamer.data import DataConfig
from gossamer.models import build_model, resolve_config
from gossamer.optim.contract import build
from gossamer.train import Pretrain, pretrain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", layers.PARAMETRIZATIONS)
def test_low_rank_layers_open_as_a_dense_model(tiny: Path, tmp_path: Path, name: str, dtype: str) -> None:
    parametrization = layers.PARAMETRIZATIONS[name](rank=4)
    model, text = str(tiny / "config.json"), str(tiny / "train.txt")
    config = Pretrain(
        build("adamw"),
        layers=parametrization,
        restarts=Restarts(2, recovery_steps=1),
        model=model,
        data=DataConfig(text, str(tiny / "valid.txt"), vocab_size=300, seq_len=32),
        out=tmp_path,
        batch_size=2,
        steps=3,
        eval_tokens=100,
        dtype=dtype,  # pyright: ignore
        device="cpu",
    )
    pretrain(config, quiet=True)
    folder = tmp_path / "checkpoints" / "step-00000003"

    ours = build_model(resolve_config(model), dtype=getattr(torch, dtype), device="cpu", seed=1).eval()
    layers.apply(ours, parametrization)
    safetensors.torch.load_model(ours, folder / "layers.safetensors")
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == ours.dtype and not any(layers.factored(theirs))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Seven green lamps under the old stone.", return_tensors="pt")["input_ids"]
    wide = [copy.deepcopy(model).double().eval() for model in (ours, theirs)]
    layers.merge_all(ours)
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)
        here, there = (model(input_ids=ids).logits for model in wide)
    # the factors against their product, rounded once: half an eps for each of fourteen matrices
    assert float((here - there).norm()) < 7 * torch.finfo(theirs.dtype).eps * float(there.norm())
