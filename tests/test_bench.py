"""What a benchmark runs, and how it takes the time of a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer import layers
from gossamer.bench import Bench, presets
from gossamer.bench.timing import step_time_ratio
from gossamer.errors import UserError
from gossamer.optim.contract import methods
from gossamer.optim.methods.adamw import AdamW

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


def test_step_time_is_of_what_is_trained() -> None:
    made: list[nn.Module] = []

    def make_model() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
        layers.apply(model, layers.ReLoRA(rank=2))
        made.append(model)
        return model

    assert step_time_ratio(make_model, AdamW(), rounds=2) > 0
    fresh = make_model()
    for model in made[:-1]:
        for (name, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
            assert torch.equal(p, q) != p.requires_grad, name
