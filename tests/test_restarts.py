"""Restarts: when they happen, what they touch and report, and that a run with them resumes to the same bits."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import gossamer
from gossamer import Restarter, Restarts, UserError, layers
from gossamer.data import DataConfig
from gossamer.layers import LORO, PARAMETRIZATIONS, LoRA, LowRank, ReLoRA, SLTrain
from gossamer.models import build_model, resolve_config
from gossamer.optim.contract import build, moment_of
from gossamer.train import Pretrain, pretrain
from gossamer.train.build import build as build_run_model
from gossamer.train.schedule import Schedule

Event = dict[str, Any]
CHILD = Path(__file__).parent / "cli" / "child.py"

# ---- the learning rate -----------------------------------------------------------------------------------------------


def test_the_rate_around_restarts() -> None:
    """N = 1000, T = 200, R = 10, 100 steps of warm-up.

    The curve at the tenth update after a restart, 0.1 + 0.9 (1 + cos(pi 110/900)) / 2 = 0.9672, in tenths; update 400
    is the one before the second restart, and no update is spent at a rate of nearly zero.
    """
    rate = Schedule(1000, 100, 0.1, every=200, recovery=10)
    first = [0.9729, 0.0967, 0.1934, 0.2902, 0.3869, 0.4836, 0.5803, 0.6771, 0.7738, 0.8705, 0.9672, 0.9666]
    second = [0.7750, 0.0761, 0.1523, 0.2284, 0.3045, 0.3806, 0.4568, 0.5329, 0.6090, 0.6851, 0.7613, 0.7599]
    # written out with four digits
    assert [rate(update - 1) for update in range(200, 212)] == pytest.approx(first, abs=5e-5)
    assert [rate(update - 1) for update in range(400, 412)] == pytest.approx(second, abs=5e-5)
    assert [rate(0), rate(49), rate(99)] == pytest.approx([0.01, 0.5, 1.0])
    assert rate(999) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [0, 100, 195, 205, 450])
@pytest.mark.parametrize("recovery", [1, 10, 200])
def test_the_rate_is_the_curve_but_for_recoveries(warmup: int, recovery: int) -> None:
    """Never above it, back on it with the last update of a recovery; before the first restart there is none."""
    rate, curve = Schedule(1000, warmup, 0.1, 200, recovery), Schedule(1000, warmup, 0.1)
    for step in range(1000):
        recovering = step >= 200 and step % 200 < recovery - 1
        assert 0 < rate(step) <= curve(step) + 1e-15
        assert recovering or abs(rate(step) - curve(step)) < 1e-15  # times R / R, which may round
    for start in range(200, 1000, 200):  # linear
        rates = [rate(start + i) for i in range(recovery)]
        assert rates == pytest.approx([rates[-1] * (i + 1) / recovery for i in range(recovery)])


def test_which_schedule_a_run_has(tiny: Path, tmp_path: Path) -> None:
    plain = make(tiny, tmp_path, steps=100, warmup=0.2)
    with_restarts = dataclasses.replace(plain, layers=LowRank(4), restarts=Restarts(every=20, recovery_steps=5))
    unmoved = dataclasses.replace(with_restarts, restarts=Restarts(every=20, schedule="none"))
    assert plain.schedule() == unmoved.schedule() == Schedule(100, 20, 0.1)
    assert with_restarts.schedule() == Schedule(100, 20, 0.1, 20, 5)


# ---- settings and what they refuse -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"every": 0}, "restarts: every is 0; allowed: an integer >= 1"),
        ({"every": -5}, "restarts: every is -5"),
        ({"recovery_steps": 0}, "restarts: recovery_steps is 0; allowed: an integer >= 1"),
        ({"reset": "moment"}, "reset is 'moment' (did you mean 'moments'?); allowed: moments, first, second, None"),
        ({"scope": "factor"}, "scope is 'factor' (did you mean 'factors'?); allowed: factors, all"),
        ({"schedule": "cosine"}, "schedule is 'cosine'"),
        ({"refactorize": False, "reset": None}, "a restart would do nothing"),
    ],
)
def test_bad_settings_are_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        Restarts(**fields)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_recovery_that_the_schedule_ignores_may_be_long() -> None:
    assert Restarts(every=5, schedule="none").recovery_steps == 10


@pytest.mark.parametrize("name", ["relora", "loro"])
@pytest.mark.parametrize("restarts", [None, Restarts(refactorize=False)])
def test_layers_that_live_by_restarts(tiny: Path, tmp_path: Path, name: str, restarts: Restarts | None) -> None:
    with pytest.raises(UserError, match=rf"^layers: {name} lives by its restarts; add --restarts\.every"):
        make(tiny, tmp_path, layers=PARAMETRIZATIONS[name](4), restarts=restarts)


# ---- what a restart touches ------------------------------------------------------------------------------------------


def model_of(parametrization: Any | None, seed: int = 0) -> nn.Sequential:
    """Two low-rank layers with biases (0, 2) and one dense layer with (4)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5))
    if parametrization is not None:
        layers.apply(model, parametrization, "[02]")
    return model


def optimizer(model: nn.Module, name: str = "adamw", **options: Any) -> gossamer.Optimizer:
    return gossamer.Optimizer(gossamer.param_groups(model, build(name)), lr=1e-2, **options)


def train(model: nn.Module, opt: gossamer.Optimizer, steps: range, restarter: Restarter | None = None) -> list[Event]:
    """The events of the restarts."""
    events = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 12, generator=generator), torch.randn(8, 5, generator=generator)
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
        if restarter is not None and (event := restarter(step)) is not None:
            events.append(event)
    return events


def moments(opt: gossamer.Optimizer) -> dict[str, Tensor]:
    """Every moment, as `parameter.moment`."""
    return {
        f"{name}.{key}": value.clone()
        for name, param, _ in opt.members()
        for key, value in opt.state[param].items()
        if moment_of(key) and not key.endswith("_step")
    }


@pytest.mark.parametrize("reset", ["moments", "first", "second", None])
@pytest.mark.parametrize("scope", ["factors", "all"])
@pytest.mark.parametrize("refactorize", [True, False])
def test_what_is_touched_and_what_is_said(refactorize: bool, scope: Any, reset: Any) -> None:
    if not refactorize and reset is None:
        pytest.skip("refused: it would do nothing")
    model = model_of(SLTrain(rank=3, alpha=3, density=0.1))
    opt = optimizer(model)
    config = Restarts(4, refactorize=refactorize, reset=reset, scope=scope, recovery_steps=1)
    restarter = Restarter(config, model, opt)
    assert train(model, opt, range(1, 4), restarter) == []
    before = {}

    def remember(*_: Any) -> None:
        before.update(moments=moments(opt), weights={k: v.clone() for k, v in model.state_dict().items()})

    opt.register_step_post_hook(remember)
    (event,) = train(model, opt, range(4, 5), restarter)

    gone = {"moments": "mv", "first": "m", "second": "v", None: ""}[reset]
    touched = {key for key in before["moments"] if key[-1] in gone and (scope == "all" or key[0] in "02")}
    for key, value in moments(opt).items():
        assert torch.equal(value, torch.zeros_like(value) if key in touched else before["moments"][key]), key
    assert all(float(state["step"]) == 4 for state in opt.state.values())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before["weights"][key])}
    assert changed == ({"0.B", "0.A", "2.B", "2.A"} if refactorize else set())

    expected: Event = {"layers": 2 if refactorize else 0, "change": event["change"]}
    assert (event["change"] is None) if not refactorize else (0 < event["change"] < 1e-5)
    if reset is not None:
        norm = torch.stack([before["moments"][key].double().norm() for key in touched]).norm()
        expected |= {
            "moments": list(gone),
            "parameters": len({key.rpartition(".")[0] for key in touched}),
            "tensors": len(touched),
            "norm_before": pytest.approx(float(norm)),
            "norm_after": 0.0,
        }
        # A, B, values and bias of two layers; all: and weight and bias of a third
        assert event["parameters"] == (8 if scope == "factors" else 10) and event["norm_before"] > 0
    assert event == expected and json.loads(json.dumps(event)) == event


def test_when_restarts_happen() -> None:
    model = model_of(LowRank(3))
    opt = optimizer(model)
    restarter = Restarter(Restarts(every=3, recovery_steps=1), model, opt)
    assert [step for step in range(1, 11) if restarter(step) is not None] == [3, 6, 9]


def test_no_low_rank_layers() -> None:
    model = model_of(None)
    for config in (Restarts(), Restarts(refactorize=False), Restarts(scope="all")):
        with pytest.raises(UserError, match=r"no low-rank layers; for a reset alone: refactorize=False, scope='all'"):
            Restarter(config, model, optimizer(model))


@pytest.mark.parametrize(("method", "reset"), [("lion", "second"), ("muon", "second"), ("adafactor", "first")])
def test_a_moment_that_nothing_keeps(method: str, reset: Any) -> None:
    """All but biases are trained by `method`; and biases are out of scope where there are none."""
    model = nn.Sequential(nn.Linear(12, 12, bias=False), nn.Tanh(), nn.Linear(12, 5))
    layers.apply(model, LowRank(3), "0")
    known = f"restarts: reset is {reset!r}, but no parameter in scope keeps such a moment"
    with pytest.raises(UserError, match=f"^{known}$"):
        Restarter(Restarts(reset=reset), model, optimizer(model, method))
    Restarter(Restarts(reset="moments"), model, optimizer(model, method))  # both, as far as there are any


def test_a_reset_alone_of_a_dense_model() -> None:
    """After it AdamW is a new AdamW."""
    model, fresh = model_of(None), model_of(None)
    opt = optimizer(model)
    restarter = Restarter(Restarts(4, refactorize=False, scope="all", recovery_steps=1), model, opt)
    (event,) = train(model, opt, range(1, 5), restarter)
    assert event["layers"] == 0 and event["change"] is None and event["parameters"] == 6
    fresh.load_state_dict(model.state_dict())
    train(model, opt, range(5, 8), restarter)
    train(fresh, optimizer(fresh), range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


def test_relora_merges_and_begins_anew() -> None:
    model: Any = model_of(ReLoRA(rank=3, alpha=3))
    opt = optimizer(model)
    restarter = Restarter(Restarts(4, recovery_steps=1), model, opt, seed=5)
    weights: list[Tensor] = []
    opt.register_step_post_hook(lambda *_: weights.append(layers.weight(model[0])))
    (event,) = train(model, opt, range(1, 5), restarter)
    # one rounding of fp32 each
    torch.testing.assert_close(model[0].base.data, weights[-1], rtol=1e-6, atol=1e-7)
    assert not bool(model[0].B.any()) and event["layers"] == 2 and event["change"] < 1e-7
    assert not bool(moments(opt)["0.A.m"].any()) and not bool(moments(opt)["0.B.v"].any())
    train(model, opt, range(5, 8), restarter)
    assert bool((model[0].B != 0).all())


def test_what_relora_draws_depends_on_seed_name_and_step() -> None:
    def drawn(seed: int, step: int, layer: int) -> Tensor:
        model: Any = model_of(ReLoRA(rank=3))
        opt = optimizer(model)
        restarter = Restarter(Restarts(2, recovery_steps=1, reset=None), model, opt, seed=seed)
        torch.manual_seed(time.monotonic_ns())
        restarter(step)
        return model[layer].A.data[:, :12].clone() * model[layer].in_features ** 0.5

    assert torch.equal(drawn(1, 2, 0), drawn(1, 2, 0))
    assert not any(torch.equal(drawn(1, 2, 0), drawn(*other)) for other in ((2, 2, 0), (1, 4, 0), (1, 2, 2)))


def test_loro_takes_the_exact_step_of_the_step_before_the_restart() -> None:
    from gossamer.layers.loro import exact_step

    model: Any = model_of(LORO(rank=3))
    opt = optimizer(model)
    restarter = Restarter(Restarts(3, recovery_steps=1), model, opt)
    train(model, opt, range(1, 3), restarter)
    b, a = model[0].B.data.clone(), model[0].A.data.clone()
    seen = []
    opt.register_step_post_hook(lambda *_: seen.append((b - model[0].B.data, a - model[0].A.data)))
    (event,) = train(model, opt, range(3, 4), restarter)
    new_b, new_a = exact_step(b, a, *seen[0])
    assert torch.equal(model[0].B, new_b) and torch.equal(model[0].A, new_a)
    assert event["change"] > 1e-3 and model[0].before is None


def test_lora_is_refactorized() -> None:
    model: Any = model_of(LoRA(rank=3, alpha=3))
    opt, before = optimizer(model), model[0].base.data.clone()
    (event,) = train(model, opt, range(1, 3), Restarter(Restarts(2, recovery_steps=1), model, opt))
    gram = model[0].B.data.mT @ model[0].B.data
    # some hundred roundings of fp32 of its largest entry
    torch.testing.assert_close(gram, model[0].A.data @ model[0].A.data.mT, rtol=0, atol=1e-5 * float(gram.max()))
    assert event["change"] < 1e-5 and torch.equal(model[0].base, before)


# ---- runs ------------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Any, Restarts | None]] = {
    "low-rank": (LowRank(rank=4, alpha=4), Restarts(4, recovery_steps=2)),
    "sltrain": (SLTrain(rank=4, alpha=4, density=0.1), Restarts(4, recovery_steps=2)),
    "sltrain, all": (SLTrain(rank=4, alpha=4, density=0.1), Restarts(4, recovery_steps=2, scope="all")),
    "lora": (LoRA(rank=4, alpha=4), None),
    "relora": (ReLoRA(rank=4, alpha=4), Restarts(4, recovery_steps=2)),
    "loro": (LORO(rank=4), Restarts(4, recovery_steps=2, scope="all")),
    "dense": (None, Restarts(4, refactorize=False, scope="all", recovery_steps=2)),
}


def make(tiny: Path, out: Path, kind: str | None = None, **changes: Any) -> Pretrain[Any, Any, Any]:
    text = DataConfig(str(tiny / "train.txt"), str(tiny / "valid.txt"), vocab_size=300, seq_len=32)
    defaults: dict[str, Any] = {"model": str(tiny / "config.json"), "device": "cpu", "batch_size": 4, "steps": 10}
    if kind is not None:
        defaults["layers"], defaults["restarts"] = KINDS[kind]
    method = changes.pop("method", gossamer.AdamW())
    return Pretrain(method, data=text, out=out, **(defaults | {"eval_tokens": 100} | changes))


def events(out: Path, *kinds: str) -> list[Event]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["event"] in kinds]


def losses(out: Path) -> list[float]:
    return [event["loss"] for event in events(out, "train")]


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08d}"


def assert_same_end(one: Path, other: Path, step: int) -> None:
    a, b = checkpoint(one, step), checkpoint(other, step)
    for file in a.glob("*.safetensors"):
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name
    kinds = ("train", "eval", "restart")
    assert events(one, *kinds) == events(other, *kinds)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_a_run_resumes_to_the_same_bits(tiny: Path, tmp_path: Path, kind: str) -> None:
    """Restarts at steps 2, 4, 6: from just before one (3: LORO has to have remembered then), and from just after."""
    whole, config = tmp_path / "whole", make(tiny, tmp_path / "whole", kind, steps=7, save_every=3, keep_last=9)
    config = dataclasses.replace(config, restarts=dataclasses.replace(config.restarts, every=2))
    pretrain(config, quiet=True)
    assert [event["step"] for event in events(whole, "restart")] == [2, 4, 6]
    for last, later in ((3, (6, 7)), (6, (7,))):
        out = Path(shutil.copytree(whole, tmp_path / str(last)))
        for step in later:
            shutil.rmtree(checkpoint(out, step))
        pretrain(dataclasses.replace(config, out=out, resume=True), quiet=True)
        assert events(out, "resume")[0]["step"] == last
        assert_same_end(whole, out, 7)


def test_a_run_killed_between_two_restarts_ends_with_the_same_bits(
    tiny: Path, small: list[str], tmp_path: Path
) -> None:
    """In bf16, whose rounding is drawn too."""
    whole, broken, errors = tmp_path / "whole", tmp_path / "broken", tmp_path / "errors"
    config = make(tiny, whole, "sltrain", steps=30, save_every=5, dtype="bfloat16")
    pretrain(config, quiet=True)
    argv = ["pretrain", *small, "--valid", str(tiny / "valid.txt"), "--method", "adamw", "--steps", "30"]
    argv += [
        "--save-every",
        "5",
        "--dtype",
        "bfloat16",
        "--layers",
        "sltrain",
        "--layers.rank",
        "4",
        "--layers.alpha",
        "4",
    ]
    argv += ["--layers.density", "0.1", "--restarts.every", "4", "--restarts.recovery-steps", "2", "--out", str(broken)]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["gossamer.cli", "transformers.models.llama.modeling_llama", "tokenizers"])
    environment = {name: os.environ[name] for name in ("GOSSAMER_CACHE", "OMP_NUM_THREADS")}
    options = {"argv": argv, "environment": environment, "errors": str(errors)}
    options |= {"largest_file": None, "die_at_sync": None}
    child = processes.Process(target=runpy.run_path, args=(str(CHILD), {"options": options}))
    with pytest.MonkeyPatch.context() as patch:  # else the child looks for pytest's own main program first
        patch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
        child.start()
    log, patience = broken / "log.jsonl", time.monotonic() + 150
    while child.is_alive() and time.monotonic() < patience:  # after the restart of step 8, before that of step 12
        if log.exists() and '"train", "step": 9,' in log.read_text():
            break
        time.sleep(0.001)
    child.kill()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL, errors.read_text()
    assert len(losses(broken)) < 30, "the run was over before it was killed"
    pretrain(dataclasses.replace(config, out=broken, resume=True), quiet=True)
    assert_same_end(whole, broken, 30)
    assert [event["step"] for event in events(broken, "restart")] == list(range(4, 30, 4))


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SLTrain with restarts at steps 4 and 8. Copy it before changing it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    pretrain(make(tiny, out, "sltrain"), quiet=True)
    return out


def test_the_log_tells_of_restarts(finished: Path) -> None:
    """At their place: after the step, before whatever comes next; none after the last step."""
    start, *rest = events(finished, "start", "train", "restart")
    assert len(start["replaced"]) == 14 and start["config"]["layers"]["name"] == "sltrain"
    assert start["config"]["restarts"]["every"] == 4
    order = [(event["event"], event["step"]) for event in rest]
    expected = [("train", step) for step in range(1, 11)]
    expected.insert(4, ("restart", 4))
    expected.insert(9, ("restart", 8))
    assert order == expected
    for event in events(finished, "restart"):
        assert event["layers"] == 14 and 0 < event["change"] < 1e-5
        assert event["moments"] == ["m", "v"] and (event["parameters"], event["tensors"]) == (42, 84)
        assert event["norm_before"] > 0 and event["norm_after"] == 0
    rates = [event["lr"] / 1e-3 for event in rest if event["event"] == "train"]
    assert rates == pytest.approx([Schedule(10, 1, 0.1, 4, 2)(step) for step in range(10)])


def test_no_restart_after_the_last_step(tiny: Path, tmp_path: Path) -> None:
    pretrain(make(tiny, tmp_path, "sltrain", steps=8), quiet=True)
    assert [event["step"] for event in events(tmp_path, "restart")] == [4]


def test_the_support_is_never_changed(tiny: Path, finished: Path, tmp_path: Path) -> None:
    fresh, _ = build_run_model(make(tiny, tmp_path, "sltrain"), 300, torch.device("cpu"))
    saved = safetensors.torch.load_file(checkpoint(finished, 10) / "layers.safetensors")
    indices = {name: buffer for name, buffer in fresh.named_buffers() if name.endswith("indices")}
    assert len(indices) == 14 and all(torch.equal(saved[name], buffer) for name, buffer in indices.items())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dense"])
def test_transformers_loads_a_checkpoint(tiny: Path, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    config = make(tiny, tmp_path, kind, steps=5)
    pretrain(config, quiet=True)
    theirs, info = AutoModelForCausalLM.from_pretrained(checkpoint(tmp_path, 5), output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not list(layers.factored(theirs))
    ours, _ = build_run_model(config, 300, torch.device("cpu"))
    safetensors.torch.load_model(ours, checkpoint(tmp_path, 5) / "layers.safetensors")
    plain = build_model(resolve_config(config.model), dtype=torch.float32, device="cpu", seed=0)
    ids = torch.arange(64).view(2, 32)
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits for model in (ours, theirs, plain)]
    # two products instead of one: some tens of roundings of 6e-8
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    assert float((logits[0] - logits[2]).abs().max()) > 1e-3  # and it is not what every model says


def test_four_combinations_are_four_trajectories(tiny: Path, tmp_path: Path) -> None:
    """The same until the first restart, then all different; and each one again the same."""
    curves = {}
    for refactorize, reset, again in itertools.product((True, False), ("moments", None), (False, True)):
        none = not refactorize and reset is None
        restarts = None if none else Restarts(3, refactorize=refactorize, reset=reset, schedule="none")
        out = tmp_path / f"{refactorize}-{reset}-{again}"
        pretrain(make(tiny, out, layers=LowRank(rank=4, alpha=4), restarts=restarts, steps=8), quiet=True)
        assert again is False or losses(out) == curves[refactorize, reset]
        curves[refactorize, reset] = losses(out)
    assert len({tuple(curve[:3]) for curve in curves.values()}) == 1
    for one, other in itertools.combinations(curves.values(), 2):
        # refactorization and reset leave the function as it is, up to rounding: seen from the second step after on
        assert one[3] == pytest.approx(other[3], rel=1e-5)
        assert max(abs(a - b) for a, b in zip(one[4:], other[4:], strict=True)) > 1e-4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"restarts": None}, "resume: restarts"),
        ({"restarts": Restarts(5, recovery_steps=2)}, "resume: restarts.every was 4 in the checkpoint and is 5 now"),
        ({"restarts": Restarts(4, recovery_steps=2, scope="all")}, "resume: restarts.scope was 'factors'"),
        ({"restarts": Restarts(4, recovery_steps=2, reset=None)}, "resume: restarts.reset was 'moments'"),
        ({"layers": None, "restarts": None}, "resume: restarts.every was 4 in the checkpoint and is None now"),
        ({"layers": SLTrain(rank=5, alpha=4, density=0.1)}, "resume: layers.rank was 4 in the checkpoint and is 5 now"),
        ({"layers": LowRank(rank=4, alpha=4)}, "resume: layers.name was 'sltrain' in the checkpoint and is 'low-rank'"),
        ({"layer_targets": ("mlp",)}, "resume: layer_targets was"),
    ],
)
def test_a_run_is_not_resumed_as_another(tiny: Path, finished: Path, changes: dict[str, Any], said: str) -> None:
    log = (finished / "log.jsonl").read_bytes()
    with pytest.raises(UserError) as caught:
        pretrain(make(tiny, finished, "sltrain", resume=True, **changes), quiet=True)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert (finished / "log.jsonl").read_bytes() == log


def test_a_dense_run_is_not_resumed_with_layers(tiny: Path, tmp_path: Path) -> None:
    pretrain(make(tiny, tmp_path, steps=2), quiet=True)
    with pytest.raises(UserError, match=r"^resume: (restarts|layers)\b.* was None in the checkpoint"):
        pretrain(make(tiny, tmp_path, "sltrain", steps=2, resume=True), quiet=True)


def test_a_dense_run_needs_no_scope_to_be_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model has no low-rank layers"):
        pretrain(make(tiny, tmp_path / "run", restarts=Restarts()), quiet=True)
    assert not (tmp_path / "run").exists()


def test_some_layers_only(tiny: Path, tmp_path: Path) -> None:
    config = make(tiny, tmp_path, "low-rank", layer_targets=(r"\.mlp\.", "q_proj"), steps=5)
    pretrain(config, quiet=True)
    replaced = events(tmp_path, "start")[0]["replaced"]
    assert len(replaced) == 8 and all("mlp" in name or "q_proj" in name for name in replaced)
    assert events(tmp_path, "restart")[0]["layers"] == 8


def test_a_compressed_optimizer_over_low_rank_layers(tiny: Path, tmp_path: Path) -> None:
    """Its own states are reset like any other's, and the run goes on downwards."""
    restarts = Restarts(4, recovery_steps=1)
    config = make(tiny, tmp_path, layers=LowRank(rank=8, alpha=8), restarts=restarts, lr=5e-3)
    pretrain(dataclasses.replace(config, method=gossamer.LoRAPre(rank=4)), quiet=True)
    assert events(tmp_path, "restart")[0]["norm_before"] > 0 == events(tmp_path, "restart")[0]["norm_after"]
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_what_a_loop_of_ones_own_gets_wrong() -> None:
    model = model_of(LORO(3))
    opt = optimizer(model)
    restarter = Restarter(Restarts(every=3), model, opt)
    with pytest.raises(UserError, match="restarts: step is 0; allowed: the optimizer's steps so far, from 1"):
        restarter(0)
    with pytest.raises(UserError, match=r"was not remembered; call restarter\.resume\(step\) first"):
        restarter(3)  # as after a checkpoint of step 2
    with pytest.raises(UserError, match=r"the optimizer is AdamW; allowed: gossamer\.Optimizer"):
        Restarter(Restarts(every=3), model, torch.optim.AdamW(model.parameters()))  # pyright: ignore


def test_a_parameter_that_comes_later_is_in_scope_too() -> None:
    model, more = model_of(LowRank(3)), nn.Linear(3, 3)
    opt = optimizer(model)
    restarter = Restarter(Restarts(1, scope="all", recovery_steps=1), model, opt)
    opt.add_param_group({"params": [("more", more.weight)]})
    more.weight.grad = torch.ones(3, 3)
    opt.step()
    event = restarter(1)
    assert event is not None and event["parameters"] == 1 and event["norm_before"] > 0
    assert not bool(opt.state[more.weight]["m"].any())
