"""What a benchmark runs, and how it takes the time of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gossamer import LoRAPre, Optimizer
from gossamer.bench import Bench, presets
from gossamer.bench import probe as probing
from gossamer.bench.probe import probe
from gossamer.data import DataConfig
from gossamer.errors import UserError
from gossamer.layers import ReLoRA
from gossamer.memory import predict
from gossamer.optim.contract import methods
from gossamer.optim.methods.adamw import AdamW
from gossamer.optim.methods.lion import Lion
from gossamer.restarts import Restarts
from gossamer.train import Pretrain

LOW_RANK = {"low-rank", "low-rank-restarts", "relora", "sltrain", "sltrain-restarts"}


def test_everything_with_a_preset_runs_the_reference_first() -> None:
    names = [recipe.name for recipe in Bench().recipes()]
    assert set(names) == set(presets("quick")) and len(names) == len(set(names))
    assert names[0] == "adamw" and names[1:] == sorted(names[1:])
    assert set(names) >= LOW_RANK and set(names) - LOW_RANK <= set(methods())


@pytest.mark.parametrize("name", sorted(LOW_RANK))
def test_low_rank_weights_are_chosen_by_name(name: str) -> None:
    reference, recipe = Bench(methods=(name,)).recipes()
    assert (reference.name, reference.layers, reference.restarts) == ("adamw", None, None)
    assert recipe == presets("quick")[name] and recipe.name == name
    assert recipe.layers is not None and isinstance(recipe.method, AdamW)


@pytest.mark.parametrize(("word", "meant"), [("lowrank", "low-rank"), ("sl-train", "sltrain"), ("adam", "adamw")])
def test_an_unknown_name_gets_the_nearest(word: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"'{word}' has no preset for quick .did you mean '{meant}'.*; known: .*relora"):
        Bench(methods=(word,)).recipes()


def test_what_does_not_fit_is_left_out_of_a_probe(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(probing, "_reference", full)
    config = Pretrain(LoRAPre(rank=4), model=str(tiny / "config.json"), batch_size=2, data=DataConfig(seq_len=16))
    found = probe(config, torch.device("cpu"), rounds=1)
    assert set(found) == {"memory"} and found["memory"]["predicted"]["weights"] > 0
    assert found["memory"]["peak"] is None or found["memory"]["peak"]["step"] > 0


@pytest.mark.parametrize("layers", [None, ReLoRA(rank=4)], ids=["dense", "relora"])
def test_a_probe_is_of_what_is_trained(tiny: Path, layers: ReLoRA | None) -> None:
    restarts = layers and Restarts(every=2)
    config = Pretrain(
        LoRAPre(rank=4), layers=layers, restarts=restarts, model=str(tiny / "config.json"), batch_size=4,
        micro_batch_size=2, data=DataConfig(seq_len=32), fallback=Lion(),
    )  # fmt: skip
    found = probe(config, torch.device("cpu"), rounds=2)
    passes = found["step_time"] / found["step_share"] - found["step_time"]
    assert passes > 0 and found["step_time_ratio"] > 0
    reference = found["reference"]
    assert reference["tokens_per_second"] == pytest.approx(4 * 32 * reference["step_share"] / reference["step_time"])
    predicted, peak = found["memory"]["predicted"], found["memory"]["peak"]
    memory = predict(
        str(tiny / "config.json"), config.method, fallback=config.fallback, layers=layers, dtype=torch.float32
    )
    assert {name: predicted[name] for name in ("weights", "gradients", "state")} == {
        name: getattr(memory, name) for name in ("weights", "gradients", "state")
    }
    # whole pages of a process that has done other things: that it is there, not how much
    assert set(peak) == {"forward", "backward", "step"} and max(peak.values()) > 0


def test_the_reference_is_adamw_on_the_dense_model(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[set[str], torch.optim.Optimizer]] = []
    steps = probing._Steps

    def watched(model: nn.Module, optimizer: torch.optim.Optimizer, *batch: torch.Tensor) -> Any:
        made.append(({name for name, _ in model.named_parameters()}, optimizer))
        return steps(model, optimizer, *batch)

    monkeypatch.setattr(probing, "_Steps", watched)
    config = Pretrain(
        AdamW(), layers=ReLoRA(rank=4), restarts=Restarts(every=2), model=str(tiny / "config.json"), batch_size=2,
        data=DataConfig(seq_len=16),
    )  # fmt: skip
    probe(config, torch.device("cpu"), rounds=1)
    (ours, own), (theirs, rival), _ = made
    assert any("base" in name for name in ours) and not any("base" in name for name in theirs)
    assert type(rival) is torch.optim.AdamW and isinstance(own, Optimizer)
