"""Which parameter is trained by which method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.models.gpt2 import GPT2ForSequenceClassification

from gossamer import AdamW, LoRAPre, LoRAPreStable, Optimizer, UserError, param_groups

METHOD = LoRAPre(rank=2)


def llama(tied: bool) -> nn.Module:
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    # 16 positions and a hidden size of 16: a rule by shape would take the position embedding for a hidden matrix
    return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def classifier() -> nn.Module:
    return GPT2ForSequenceClassification(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, num_labels=5))


def reasons(model: nn.Module) -> dict[str, str]:
    groups = param_groups(model, METHOD)
    return {name: why for group in groups for name, why in zip(group["param_names"], group["why"], strict=True)}


@pytest.mark.parametrize("make", [lambda: llama(False), lambda: llama(True), gpt2, classifier])
def test_every_trainable_parameter_exactly_once(make: Callable[[], nn.Module]) -> None:
    model = make()
    next(model.parameters()).requires_grad_(False)
    groups = param_groups(model, METHOD)
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    Optimizer(groups)  # and the optimizer takes them


@pytest.mark.parametrize(("tied", "count"), [(False, 14), (True, 14)])
def test_llama(tied: bool, count: int) -> None:
    why = reasons(llama(tied))
    hidden = [name for name, reason in why.items() if reason == "hidden matrix"]
    assert len(hidden) == count and all("self_attn" in name or "mlp" in name for name in hidden)
    assert why["model.embed_tokens.weight"] == "embedding"
    assert why.get("lm_head.weight") == (None if tied else "output head")
    assert why["model.norm.weight"] == "1-D"


def test_gpt2_conv1d_and_tied_head() -> None:
    why = reasons(gpt2())
    hidden = {name.split(".", 3)[3] for name, reason in why.items() if reason == "hidden matrix"}
    assert hidden == {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert why["transformer.wte.weight"] == why["transformer.wpe.weight"] == "embedding"


def test_heads_are_found_by_name_where_the_model_does_not_say() -> None:
    assert reasons(classifier())["score.weight"] == "output head"

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 30)
            self.table = nn.Parameter(torch.zeros(8, 8))

    why = reasons(Plain())
    assert why["lm_head.weight"] == "output head" and why["body.weight"] == "hidden matrix"
    assert why["table"] == "not the weight of a linear layer"


def test_names_do_not_outvote_the_model() -> None:
    """RWKV's attention calls its last projection `output`; its head is another module."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.output, self.unembed = nn.Linear(6, 6, bias=False), nn.Linear(6, 9, bias=False)

        def get_output_embeddings(self) -> nn.Module:
            return self.unembed

    assert reasons(Named()) == {"output.weight": "hidden matrix", "unembed.weight": "output head"}


def test_rules_win_in_order() -> None:
    stable = LoRAPreStable(rank=3)
    groups = param_groups(llama(False), METHOD, rules=[(r"layers\.0\.mlp", stable), (r"mlp|lm_head", AdamW(eps=1e-6))])
    chosen = {name: (g["method"], w) for g in groups for name, w in zip(g["param_names"], g["why"], strict=True)}
    assert chosen["model.layers.0.mlp.up_proj.weight"] == (stable, r"rule 'layers\\.0\\.mlp'")
    assert chosen["model.layers.1.mlp.up_proj.weight"][0] == AdamW(eps=1e-6)
    assert chosen["lm_head.weight"] == (AdamW(eps=1e-6), "rule 'mlp|lm_head'")
    assert chosen["model.layers.1.self_attn.q_proj.weight"][0] == METHOD


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([("nothing_like_it", AdamW())], ("'nothing_like_it'", "matches no")),
        ([("mlp", AdamW()), ("mlp.up", AdamW())], ("'mlp.up'",)),  # an earlier rule leaves it nothing
        ([("norm", METHOD)], ("'norm'", "1-D", "lora-pre")),
    ],
)
def test_bad_rules(rules: list, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        param_groups(llama(False), METHOD, rules=rules)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_lists_among_a_methods_fields_are_taken_for_tuples() -> None:
    betas: Any = [0.9, 0.95]
    model, thin = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), LoRAPre(rank=2, betas=betas)
    groups = param_groups(model, thin, fallback=AdamW(betas=betas), rules=[("^1.weight", thin)])
    assert [group["method"].betas for group in groups] == [(0.9, 0.95)] * len(groups)


def test_same_parameter_twice_and_none_at_all() -> None:
    p = nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(UserError, match="same parameter"):
        param_groups([("a", p), ("b", p)], METHOD)
    with pytest.raises(UserError, match="no trainable parameter"):
        param_groups([], METHOD)


def test_bare_parameters() -> None:
    groups = param_groups([nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4))], METHOD)
    assert [(g["method"], g["param_names"]) for g in groups] == [(METHOD, ["param.0"]), (AdamW(), ["param.1"])]
    assert isinstance(Optimizer([nn.Parameter(torch.zeros(4, 4))]).param_groups[0]["method"], AdamW)
