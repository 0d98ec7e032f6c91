"""What a step takes: counted without data, against the same step on real tensors, and against a process's pages."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

import gossamer
from gossamer import UserError
from gossamer.bench.step import make_optimizer
from gossamer.evaluate import token_loss
from gossamer.memory import Alive, activations, measure_step, measure_training, predict, step
from gossamer.memory.step import Kind, count_step
from gossamer.models import build_model
from gossamer.optim import rules, stores, sweep
from gossamer.optim.optimizer import num_bytes

IMPLEMENTATIONS = ("reference", "auto")
SHAPES = [(60, 16)] * 3 + [(16, 60)] * 2 + [(24, 24)]
TILE = 130  # six to eight tiles of a matrix, the last one smaller


def small(name: str) -> gossamer.Method:
    cls = gossamer.methods()[name].cls
    return cls(rank=min(cls.rank, 4)) if hasattr(cls, "rank") else cls()


def taken(optimizer: gossamer.Optimizer) -> tuple[int, int, int]:
    """Transient, the same in a first step, and scratch of a step on real tensors."""
    with Alive() as alive:

        def peak() -> int:
            alive.peak = alive.bytes
            optimizer.step()
            return alive.peak - alive.bytes

        peak()
        ordinary = peak()
        scratch = alive.bytes - num_bytes(t for state in optimizer.state.values() for t in state.values())
        optimizer.reset()
        for state in optimizer.state.values():
            state["step"].zero_()
        return ordinary, peak(), scratch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", gossamer.methods())
def test_counted_is_what_real_tensors_take(
    name: str, implementation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: the same operators run, on tensors with data and without. Tiles that are left out add nothing."""
    monkeypatch.setattr(sweep, "TILE", TILE)
    method = small(name)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn_like(param)
    groups = [{"params": params, "method": method}]
    real = taken(gossamer.Optimizer(groups, implementation=implementation))
    kinds = Counter(Kind(method, torch.Size(shape), dtype) for shape in SHAPES)
    steps, scratch = count_step(kinds, implementation)
    assert (*map(max, zip(*steps.values(), strict=True)), scratch) == real
    assert real[0] > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["adamw", "galore", "gossamer"])
def test_a_models_step_is_its_largest_parameters(name: str, implementation: str) -> None:
    """Embeddings, norms and hidden matrices, several methods: steps follow one another and share the buffers."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, vocab_size=50
    )  # fmt: skip
    model = build_model(config, dtype=torch.float32, device="cpu", seed=0)
    token_loss(model, *torch.randint(50, (2, 2, 8))).backward()
    memory = predict(config, small(name), dtype=torch.float32, implementation=implementation)
    groups = gossamer.param_groups(model, small(name))
    ordinary, _, scratch = taken(gossamer.Optimizer(groups, implementation=implementation))
    assert (memory.step.transient, memory.scratch) == (ordinary, scratch)
    assert memory.step.transient == max(line.step.transient for line in memory.lines)
    assert memory == predict(model, small(name), implementation=implementation)


@pytest.mark.parametrize(
    ("method", "implementation", "slack"),
    [
        (gossamer.AdamW(), "reference", 1),
        (gossamer.LoRAPre(rank=16), "auto", 1),
        (gossamer.MLorc(rank=16), "reference", 4),
    ],
    ids=["adamw", "lora-pre-fused", "mlorc"],
)
def test_counted_is_what_a_process_takes(method: gossamer.Method, implementation: str, slack: int) -> None:
    """Within 1 MiB: pages that Python and glibc take for themselves, and LAPACK's workspaces, which are not counted and
    are of the size of a few thin factors, 64 KiB each. The weight has 12 MiB, a tile 1 MiB. The reference of MLorc has
    its peak in a product with whole matrices, for which MKL packs operands into some 3 MiB of its own."""
    shapes = [(1024, 1024), (1024, 2048), (1536, 2048)]
    found = measure_step(partial(make_optimizer, method, implementation), shapes, repeats=3)
    kinds = Counter(Kind(method, torch.Size(shape), torch.float32) for shape in shapes)
    steps, scratch = count_step(kinds, implementation)
    transient, _ = map(max, zip(*steps.values(), strict=True))
    assert found.transient == pytest.approx(transient, abs=slack * 2**20)
    assert found.scratch == pytest.approx(scratch, abs=2**20)
    assert transient > 2**20 or scratch > 2**20  # else nothing was compared
    counters = 12 * len(shapes)
    assert found.state == counters + sum(
        num_bytes(method.init(torch.empty(shape, device="meta")).values()) for shape in shapes
    )


WIDE = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 2000,
    "tie_word_embeddings": False,
    "use_cache": False,
}


def test_predicted_training_is_what_a_process_takes(tmp_path: Path) -> None:
    """With gradients released; within a tenth: gradients of activations and kernels' workspaces are not counted."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(WIDE))
    found = measure_training(
        str(path), gossamer.AdamW(), 1, 8, loss=token_loss, release_gradients=True, clip="two-pass"
    )
    kept = activations(str(path), 1, 8, loss=token_loss, dtype=torch.float32)
    held, memory = (
        predict(str(path), gossamer.AdamW(), dtype=torch.float32, implementation="auto", release_gradients=release)
        for release in (False, True)
    )
    assert found.held == pytest.approx(memory.weights + memory.state, rel=0.05)
    assert memory.gradients <= found.transient
    assert found.transient <= 1.1 * (memory.gradients + kept + memory.step.transient) + 2**20  # and pages
    assert found.transient < held.gradients / 2


def test_what_cannot_be_measured_says_why() -> None:
    with pytest.raises(UserError, match=r"measure_training: clip is 'two-pass'; allowed: clip_grad_norm_"):
        measure_training("tiny", gossamer.AdamW(), 1, 8, loss=token_loss, clip="two-pass")
    with pytest.raises(RuntimeError, match=r"its process failed:(?s:.*)unexpected keyword argument 'fsued'"):
        measure_step(partial(torch.optim.AdamW, fsued=True), [(2, 2)])


def test_the_peak_is_of_what_is_alive() -> None:
    before = torch.zeros(100)
    with Alive() as alive:
        before.add_(1)
        x = torch.empty(100)
        y = x.view(10, 10)[2:].mT  # no storage of its own
        assert alive.bytes == alive.peak == 400
        z = y.reshape(-1)  # one: it has to be copied
        assert alive.bytes == 400 + 320
        del x, z
        assert alive.bytes == 400 and alive.peak == 720  # y holds the storage
        del y
        alive.peak = alive.bytes
        assert alive.peak == 0
        torch.zeros(50)
    assert alive.peak == 200 and before.sum() == 100


def test_counting_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants that a method keeps have data, tiles are all there again, and so are devices."""
    stores.codebook.cache_clear()
    step._make_constants.cache_clear()
    kind = Kind(small("galore-8bit"), torch.Size((60, 16)), torch.float32)
    count_step({kind: 1}, "auto")
    assert float(stores.codebook(True, torch.float32, torch.device("cpu")).max()) == 1

    def fail(*args: object) -> None:
        raise KeyError("in the middle")

    rows = sweep.Sweep.rows
    monkeypatch.setattr(step, "init_state", fail)
    with pytest.raises(KeyError):
        count_step({kind: 1}, "auto")
    assert sweep.Sweep.rows is rows and torch.empty(1).device.type == "cpu"


def test_compiled_code_gets_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write to address 0, and the process would be gone."""
    monkeypatch.setattr(rules, "adam", lambda m, v, eps: (m, ctypes.memset(m.data_ptr(), 0, 4))[0])
    with pytest.raises(RuntimeError, match=r"count_step: data_ptr\(\) of a tensor without data"):
        count_step({Kind(gossamer.AdamW(), torch.Size((8, 8)), torch.float32): 1}, "reference")


def test_a_layer_more_costs_a_reference_nothing() -> None:
    """Parameters are stepped one after another: 3 and 30 of a kind have the same peak."""
    kind: Any = Kind(gossamer.AdamW(), torch.Size((40, 40)), torch.float32)
    assert count_step({kind: 3}, "reference") == count_step({kind: 30}, "reference")
