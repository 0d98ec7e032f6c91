"""Gradient release: the bits of an ordinary step, one gradient at a time; an error where it would be another step."""

from __future__ import annotations

import copy
import io
import json
import math
import shutil
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig

import gossamer
from gossamer import AdamW, GradientRelease, Optimizer, UserError, layers, param_groups, release_gradients
from gossamer.data import DataConfig
from gossamer.distributed import World
from gossamer.evaluate import token_loss
from gossamer.memory import predict
from gossamer.models import build_model
from gossamer.optim.diagnostics import Diagnostics
from gossamer.train import Pretrain, pretrain
from gossamer.train.gradients import gradients_of

METHODS = sorted(gossamer.methods())
DTYPES = [torch.float32, torch.bfloat16]
SIZE, ROWS = 8, 6


class Net(nn.Module):
    """An embedding, three matrices of which two are alike, vectors, a head with a bias; perhaps checkpointed."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, SIZE)
        self.blocks = nn.ModuleList([nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE + 4)])
        self.norm = nn.LayerNorm(SIZE + 4)
        self.head = nn.Linear(SIZE + 4, 12)
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            if self.reentrant is None:
                x = torch.tanh(block(x))
            else:
                x = torch.tanh(checkpoint(block, x, use_reentrant=self.reentrant))
        return self.head(self.norm(x))


def net(dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    torch.manual_seed(3)
    return Net(**options).to(dtype)


def optimizer(model: nn.Module, method: str = "adamw", **options: Any) -> Optimizer:
    chosen = gossamer.methods()[method].cls
    made = chosen(rank=2) if "rank" in chosen.__dataclass_fields__ else chosen()
    return Optimizer(param_groups(model, made), **{"lr": 0.02, "weight_decay": 0.1, "seed": 5, **options})


def loss_of(model: nn.Module, step: int, micro: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(100 * step + micro)
    tokens, targets = torch.randint(12, (2, ROWS), generator=draw)
    return nn.functional.cross_entropy(model(tokens).float(), targets)


def assert_same(one: Any, other: Any) -> None:
    """Nested dicts and lists with equal leaves, tensors to the bit."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def assert_same_end(one: nn.Module, opt: Optimizer, other: nn.Module, opt_other: Optimizer) -> None:
    """The same weights and the same state, to the bit, and weights that moved at all."""
    start = net(next(one.parameters()).dtype).state_dict()
    assert any(not torch.equal(start[name], tensor) for name, tensor in one.state_dict().items() if name in start)
    assert_same(dict(one.state_dict()), dict(other.state_dict()))
    assert_same(opt.state_dict()["state"], opt_other.state_dict()["state"])


def ordinary(
    model: nn.Module, opt: Optimizer, steps: range = range(4), micros: int = 1, clip: float | None = None
) -> list[Tensor]:
    """The reference: gradients of all parameters, clipped, stepped after the backward pass. Returns the norms."""
    norms = []
    for step in steps:
        for micro in range(micros):
            loss_of(model, step, micro).backward()
        if clip is not None:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), clip))
        opt.step()
        opt.zero_grad()
    return norms


def free_as_you_go(
    model: nn.Module, opt: Optimizer, released: GradientRelease, steps: range = range(4), micros: int = 1
) -> None:
    for step in steps:
        for micro in range(micros):
            last = micro == micros - 1
            with nullcontext() if last else released.accumulate():
                loss_of(model, step, micro).backward()
        assert all(p.grad is None for p in model.parameters())
        opt.step()


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_bits_are_those_of_an_ordinary_step(method: str, dtype: torch.dtype, implementation: str) -> None:
    ours, theirs = net(dtype), net(dtype)
    opt, reference = (optimizer(model, method, implementation=implementation) for model in (ours, theirs))
    free_as_you_go(ours, opt, release_gradients(ours, opt))
    ordinary(theirs, reference)
    assert_same_end(ours, opt, theirs, reference)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_saved_run_continues_to_the_same_bits(method: str, dtype: torch.dtype) -> None:
    """Saved between two released steps, loaded into a new optimizer, released again; clipped by the step before."""
    ours, theirs = net(dtype), net(dtype)
    opt, whole = optimizer(ours, method), optimizer(theirs, method)
    free_as_you_go(theirs, whole, release_gradients(theirs, whole, max_norm=0.5, clip="previous"))
    free_as_you_go(ours, opt, release_gradients(ours, opt, max_norm=0.5, clip="previous"), range(2))
    file = io.BytesIO()
    torch.save({"model": ours.state_dict(), "optimizer": opt.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    fresh = net(dtype)
    again = optimizer(fresh, method, lr=9.0)
    released = release_gradients(fresh, again, max_norm=0.5, clip="previous")
    fresh.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])  # after the release, which must not step by the groups of before
    free_as_you_go(fresh, again, released, range(2, 4))
    assert_same_end(fresh, again, theirs, whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulated_gradients_step_in_the_last_pass(dtype: torch.dtype) -> None:
    ours, theirs = net(dtype), net(dtype)
    opt, reference = optimizer(ours), optimizer(theirs)
    free_as_you_go(ours, opt, release_gradients(ours, opt), micros=3)
    ordinary(theirs, reference, micros=3)
    assert_same_end(ours, opt, theirs, reference)


def test_a_parameter_without_a_gradient_in_the_last_pass_still_steps() -> None:
    """An expert that only an earlier micro-batch used; one that none used stays, and nothing of it is counted."""

    def run(opt: Optimizer, model: nn.ModuleList, accumulate: Callable[[], Any]) -> None:
        x = torch.linspace(-1, 1, 4).reshape(1, 4)
        for used in ((0, 1), (0, 2), (1, 2)):
            with accumulate():
                model[used[0]](x).square().sum().backward()
            model[used[1]](x).square().sum().backward()
            opt.step()
            opt.zero_grad()

    def experts() -> nn.ModuleList:
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])

    ours, theirs = experts(), experts()
    opt, reference = optimizer(ours), optimizer(theirs)
    run(opt, ours, release_gradients(ours, opt).accumulate)
    run(reference, theirs, nullcontext)
    assert_same(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert_same(opt.state_dict()["state"], reference.state_dict()["state"])
    assert {int(state["step"]) for state in opt.state.values()} == {2} and len(opt.state) == 6


def test_every_learning_rate_is_that_of_the_step() -> None:
    ours, theirs = net(), net()
    opt, reference = optimizer(ours), optimizer(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a scheduler that thinks it was called too early
        for model, one in ((ours, opt), (theirs, reference)):
            scheduler = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 / (1 + step))
            if one is opt:
                release_gradients(model, one)
            for step in range(4):
                loss_of(model, step).backward()
                one.step()
                one.zero_grad()
                scheduler.step()
    assert_same_end(ours, opt, theirs, reference)


@pytest.mark.parametrize("scope", ["all", "factors"])
def test_restarts(scope: Any) -> None:
    ends = []
    for release in (True, False):
        model = nn.Sequential(net())
        layers.apply(model, layers.LowRank(rank=2), targets=["blocks"])
        opt = optimizer(model)
        if release:
            release_gradients(model, opt)
        restarter = gossamer.Restarter(gossamer.Restarts(every=2, scope=scope), model, opt)
        events = []
        for step in range(1, 6):
            loss_of(model, step).backward()
            opt.step()
            opt.zero_grad()
            events.append(restarter(step))
        assert events[1] is not None
        ends.append((dict(model.state_dict()), opt.state_dict()["state"], events))
    assert_same(ends[0][:2], ends[1][:2])
    assert ends[0][2] == ends[1][2]


@pytest.mark.parametrize("method", ["adamw", "lora-pre", "galore"])
def test_diagnostics_see_the_same(method: str) -> None:
    ours, theirs = net(torch.bfloat16), net(torch.bfloat16)
    opt, reference = optimizer(ours, method), optimizer(theirs, method)
    looks = [Diagnostics(one, names=["blocks"], every=2) for one in (opt, reference)]
    free_as_you_go(ours, opt, release_gradients(ours, opt))
    ordinary(theirs, reference)
    by_name = [{record["name"]: record for record in look.records} for look in looks]
    assert len(by_name[0]) == 6 and by_name[0] == by_name[1]
    assert_same_end(ours, opt, theirs, reference)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    ours, theirs = net(reentrant=reentrant), net(reentrant=reentrant)
    opt, reference = optimizer(ours), optimizer(theirs)
    released = release_gradients(ours, opt, max_norm=0.1)
    for step in range(4):  # a graph of checkpoints is kept and run twice
        loss = loss_of(ours, step)
        with released.measure():
            loss.backward(retain_graph=True)
        loss.backward()
        opt.step()
    ordinary(theirs, reference, clip=0.1)
    assert_same_end(ours, opt, theirs, reference)


class Tied(nn.Module):
    """One weight used twice; through reentrant checkpoints, if asked."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, SIZE), nn.Linear(SIZE, 12, bias=False)
        self.middle = nn.Linear(SIZE, SIZE)
        self.head.weight = self.embed.weight
        self.reentrant = reentrant

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.reentrant:
            x = checkpoint(self.middle, checkpoint(self.middle, x, use_reentrant=True), use_reentrant=True)
        return self.head(self.middle(x))


def test_a_tied_weight_steps_once_by_the_sum_of_its_gradients() -> None:
    models = []
    for release in (True, False):
        torch.manual_seed(0)
        model = Tied()
        opt = optimizer(model)
        if release:
            free_as_you_go(model, opt, release_gradients(model, opt))
        else:
            ordinary(model, opt)
        assert {int(state["step"]) for state in opt.state.values()} == {4}
        models.append(dict(model.state_dict()))
    assert_same(*models)


def test_a_weight_in_two_reentrant_checkpoints_is_refused() -> None:
    """Each is a backward pass of its own, and the second would run on a weight that has moved."""
    model = Tied(reentrant=True)
    release_gradients(model, optimizer(model))
    with pytest.raises(UserError, match=r"'middle.*' has stepped .* two reentrant checkpoints"):
        loss_of(model, 0).backward()


def test_a_penalty_on_gradients() -> None:
    """Gradients of gradients: the inner ones are nobody's `.grad` and step nothing."""

    def penalized(model: nn.Module, step: int) -> Tensor:
        loss = loss_of(model, step)
        inner = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return loss + sum(g.square().sum() for g in inner)

    ours, theirs = net(), net()
    opt, reference = optimizer(ours), optimizer(theirs)
    release_gradients(ours, opt)
    for step in range(3):
        for model, one in ((ours, opt), (theirs, reference)):
            penalized(model, step).backward()
            one.step()
            one.zero_grad()
    assert_same_end(ours, opt, theirs, reference)


def test_a_parameter_that_comes_later_steps_at_the_end() -> None:
    """Unfrozen, or a new group: without a hook, but clipped and stepped with the others."""
    ends = []
    for release in (True, False):
        model = net()
        extra = nn.Parameter(torch.ones(12))
        opt = optimizer(model)
        model.embed.weight.requires_grad_(False)
        released = release_gradients(model, opt, max_norm=0.1) if release else None
        model.embed.weight.requires_grad_(True)
        opt.add_param_group({"params": [("extra", extra)]})
        for step in range(3):
            loss = loss_of(model, step) + (extra * torch.arange(12.0)).sum()
            if released is not None:
                with released.measure():
                    loss.backward(retain_graph=True)
                assert extra.grad is None
            loss.backward()
            if released is None:
                nn.utils.clip_grad_norm_([*model.parameters(), extra], 0.1)
            opt.step()
            opt.zero_grad()
        ends.append([dict(model.state_dict()), extra.data, opt.state_dict()["state"]])
    assert not torch.equal(ends[0][1], torch.ones(12))
    assert_same(*ends)


# --- one gradient at a time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_no_two_layers_have_gradients_at_once(max_norm: float | None) -> None:
    """Counted at every gradient that arrives, in the measuring pass too."""
    model = net()
    opt = optimizer(model)
    names = {param: name.rpartition(".")[0] for name, param in model.named_parameters()}
    alive: list[set[str]] = []
    for watched in names:
        watched.register_post_accumulate_grad_hook(
            lambda _: alive.append({names[p] for p in names if p.grad is not None})
        )
    released = release_gradients(model, opt, max_norm=max_norm)
    loss = loss_of(model, 0)
    if max_norm is not None:
        with released.measure():
            loss.backward(retain_graph=True)
    loss.backward()
    assert len(alive) == (1 if max_norm is None else 2) * len(names)
    assert all(len(layers) == 1 for layers in alive)


# --- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("max_norm", [0.1, 100.0, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_passes_clip_as_torch_does(dtype: torch.dtype, max_norm: float, micros: int) -> None:
    ours, theirs = net(dtype), net(dtype)
    opt, reference = optimizer(ours), optimizer(theirs)
    released, norms = release_gradients(ours, opt, max_norm=max_norm), []
    for step in range(4):
        for micro in range(micros - 1):
            with released.accumulate():
                loss_of(ours, step, micro).backward()
        loss = loss_of(ours, step, micros - 1)
        with released.measure():
            loss.backward(retain_graph=True)
        norms.append(released.norm)
        loss.backward()
        opt.step()
        assert torch.equal(released.norm, norms[-1])
    assert_same(norms, ordinary(theirs, reference, micros=micros, clip=max_norm))
    assert_same_end(ours, opt, theirs, reference)


@pytest.mark.parametrize("clip", ["two-pass", "previous"])
def test_gradients_that_all_wait_are_clipped_exactly(clip: str) -> None:
    """With every pass under `accumulate()` nothing has stepped when the step ends: the norm is there."""
    ours, theirs = net(), net()
    opt, reference = optimizer(ours), optimizer(theirs)
    released = release_gradients(ours, opt, max_norm=0.1, clip=clip)
    for step in range(4):
        with released.accumulate():
            loss_of(ours, step).backward()
        opt.step()
        opt.zero_grad()
    ordinary(theirs, reference, clip=0.1)
    assert_same_end(ours, opt, theirs, reference)


def test_the_step_before_gives_the_norm() -> None:
    """Against a straight-line loop that scales by the norm of the step before, and the first step not at all."""
    ours, theirs = net(), net()
    opt, reference = optimizer(ours), optimizer(theirs)
    released, norms = release_gradients(ours, opt, max_norm=0.5, clip="previous"), []
    assert float(released.norm) == 0
    previous = torch.zeros(())
    for step in range(5):
        loss_of(ours, step).backward()
        opt.step()
        norms.append(released.norm)

        loss_of(theirs, step).backward()
        norm = nn.utils.get_total_norm(p.grad for p in theirs.parameters() if p.grad is not None)
        for param in theirs.parameters():
            assert param.grad is not None
            param.grad *= torch.clamp(0.5 / (previous + 1e-6), max=1.0)
        reference.step()
        reference.zero_grad()
        assert torch.equal(norms[-1], norm)
        previous = norm
    assert min(norms) > 0.5  # so that every step but the first was scaled
    assert_same_end(ours, opt, theirs, reference)


def test_a_measured_first_step_is_clipped_exactly_under_previous() -> None:
    ours, theirs = net(), net()
    opt, reference = optimizer(ours), optimizer(theirs)
    released = release_gradients(ours, opt, max_norm=0.1, clip="previous")
    loss = loss_of(ours, 0)
    with released.measure():
        loss.backward(retain_graph=True)
    loss.backward()
    opt.step()
    ordinary(theirs, reference, range(1), clip=0.1)
    assert_same_end(ours, opt, theirs, reference)


def test_measuring_alone_changes_nothing() -> None:
    model = net()
    opt = optimizer(model)
    released = release_gradients(model, opt, max_norm=1.0)
    with released.accumulate():
        loss_of(model, 0).backward()
    held = [copy.copy(p.grad) for p in model.parameters()]
    with pytest.raises(ZeroDivisionError), released.measure():
        loss_of(model, 1).backward()
        raise ZeroDivisionError
    with released.measure():
        loss_of(model, 1).backward()
    assert not opt.state
    assert_same(held, [p.grad for p in model.parameters()])
    assert_same(dict(net().state_dict()), dict(model.state_dict()))


def test_a_removed_release_leaves_an_ordinary_optimizer() -> None:
    ours, theirs = net(), net()
    opt, reference = optimizer(ours), optimizer(theirs)
    release_gradients(ours, opt).remove()
    ordinary(ours, opt)
    ordinary(theirs, reference)
    assert_same_end(ours, opt, theirs, reference)
    assert "_step_supports_amp_scaling" not in vars(opt)
    loss_of(ours, 0).backward()
    assert all(p.grad is not None for p in ours.parameters())
    release_gradients(ours, opt)  # and it can be had again


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(words: str) -> Any:
    """A UserError of one line."""
    return pytest.raises(UserError, match=rf"^release_gradients: [^\n]*{words}[^\n]*$")


def test_a_second_pass_that_was_not_announced() -> None:
    """The known bug of others: a step on every micro-batch."""
    model = net()
    opt = optimizer(model)
    released = release_gradients(model, opt)
    loss_of(model, 0).backward()
    before = copy.deepcopy(model.state_dict())
    with refused(r"'head.*' has stepped and got another gradient.*accumulate\(\)"):
        loss_of(model, 1).backward()
    assert_same(dict(before), dict(model.state_dict()))  # nothing of the second one was applied
    with refused("has stepped"):
        opt.step()
    opt.zero_grad()
    with released.accumulate(), refused("has stepped"):
        loss_of(model, 1).backward()
    opt.zero_grad()
    opt.step()
    loss_of(model, 1).backward()


def test_a_graph_that_is_kept_cannot_step_twice() -> None:
    model = net()
    opt = optimizer(model)
    release_gradients(model, opt)
    loss = loss_of(model, 0)
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # autograd's own guard
        loss.backward()


def test_calls_that_do_not_fit() -> None:
    model = net()
    opt = optimizer(model)
    with refused("max_norm is -1.0; allowed: a number > 0"):
        release_gradients(model, opt, max_norm=-1.0)
    with refused("max_norm is nan"):
        release_gradients(model, opt, max_norm=math.nan)
    with refused(r"clip is 'two-passes' \(did you mean 'two-pass'\?\); allowed: two-pass, previous"):
        release_gradients(model, opt, clip="two-passes")
    with refused("the optimizer is AdamW; allowed: gossamer.Optimizer"):
        release_gradients(model, torch.optim.AdamW(model.parameters()))  # pyright: ignore
    with refused("'head.weight' gets a gradient that nothing would free"):
        release_gradients(model, Optimizer([p for n, p in model.named_parameters() if n != "head.weight"]))
    released = release_gradients(model, opt)
    with refused("released already; call remove"):
        release_gradients(model, opt)
    with refused("max_norm is None"):
        _ = released.norm
    with refused("max_norm is None"), released.measure():
        pass
    with refused("cannot stand within one another"), released.accumulate(), released.accumulate():
        pass
    with refused(r"allowed: step\(\)"):
        opt.step(lambda: loss_of(model, 0))
    loss_of(model, 0).backward()
    opt.step(None)


def test_two_passes_want_a_measured_norm() -> None:
    model = net()
    opt = optimizer(model)
    released = release_gradients(model, opt, max_norm=1.0)
    with refused(r"clip is 'two-pass' and the norm of this step is not known"):
        loss_of(model, 0).backward()
    assert not opt.state
    opt.zero_grad()
    loss = loss_of(model, 0)
    with released.measure():
        loss.backward(retain_graph=True)
    loss.backward()
    with refused(r"measure\(\) after parameters have stepped"), released.measure():
        pass
    opt.step()
    with refused("not known"):  # a norm is of one step
        loss_of(model, 0).backward()


def test_two_passes_that_differ() -> None:
    """Dropout that drew another mask: the gradients that stepped are not those that were measured."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8))
    opt = optimizer(model)
    released = release_gradients(model, opt, max_norm=1.0)
    x = torch.ones(2, 8)
    with torch.random.fork_rng(), released.measure():
        model(x).square().sum().backward()
    model(x).square().sum().backward()  # the same numbers once more
    opt.step()
    with released.measure():
        model(x).square().sum().backward()
    model(x).square().sum().backward()
    with refused(r"the norm was \S+ under measure\(\) and \S+ in the pass that stepped"):
        opt.step()


def test_a_scaler_is_refused() -> None:
    model = net()
    opt = optimizer(model)
    release_gradients(model, opt)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with refused("a GradScaler unscales"):
        scaler.step(opt)


def test_a_step_hook_is_called_once_a_step() -> None:
    model = net()
    opt = optimizer(model)
    release_gradients(model, opt)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    for step in range(2):
        loss_of(model, step).backward()
        opt.step()
    assert calls == ["before", "after"] * 2


# --- pretraining ------------------------------------------------------------------------------------------------------


def pretrained(tiny: Path, out: Path, **changes: Any) -> tuple[list[dict[str, Any]], bytes, bytes]:
    """What the log says of steps, and the last checkpoint's weights and state."""
    text = DataConfig(str(tiny / "train.txt"), str(tiny / "valid.txt"), vocab_size=300, seq_len=32)
    defaults = {"model": str(tiny / "config.json"), "device": "cpu", "batch_size": 4, "steps": 6, "eval_tokens": 100}
    method = changes.pop("method", gossamer.methods()["lora-pre"].cls(rank=4))
    pretrain(Pretrain(method, data=text, out=out, **(defaults | changes)), quiet=True)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    log = [{key: v for key, v in line.items() if key != "seconds"} for line in lines if line["event"] == "train"]
    last = out / "checkpoints" / "step-00000006"
    return (
        log,
        (last / "model.safetensors").read_bytes(),
        (last / "optimizer.safetensors").read_bytes(),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"clip": 0.2},
        {"clip": 0.2, "micro_batch_size": 1},
        {"clip": 0.0},
        {"clip": 0.2, "checkpointing": True},
        {"clip": 0.2, "layers": layers.SLTrain(rank=4), "restarts": gossamer.Restarts(every=2), "method": AdamW()},
    ],
    ids=["clip", "micro", "no clip", "checkpointing", "sltrain"],
)
def test_pretraining_ends_with_the_same_bits(tiny: Path, tmp_path: Path, changes: dict[str, Any], dtype: str) -> None:
    ours = pretrained(tiny, tmp_path / "ours", release_gradients=True, dtype=dtype, **changes)
    theirs = pretrained(tiny, tmp_path / "theirs", dtype=dtype, **changes)
    assert min(event["grad_norm"] for event in theirs[0]) > 0.2  # so that every step is clipped, where one is
    assert_same(ours, theirs)


def test_pretraining_by_the_norm_of_the_step_before_resumes_exactly(tiny: Path, tmp_path: Path) -> None:
    changes = {"release_gradients": True, "clip_by": "previous", "clip": 0.2}
    ours = pretrained(tiny, tmp_path / "ours", save_every=2, keep_last=3, **changes)
    shutil.copytree(tmp_path / "ours", tmp_path / "resumed")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-0000000{step}")
    assert_same(pretrained(tiny, tmp_path / "resumed", save_every=2, keep_last=3, resume=True, **changes), ours)
    exact = pretrained(tiny, tmp_path / "exact", **(changes | {"clip_by": "two-pass"}))
    assert ours[0][0] == exact[0][0]  # only the first step is not clipped
    assert ours[1] != exact[1]


@pytest.mark.parametrize("first", [True, False])
def test_a_run_may_begin_or_end_releasing_when_it_resumes(tiny: Path, tmp_path: Path, first: bool) -> None:
    changes = {"save_every": 3, "clip": 0.2}
    whole = pretrained(tiny, tmp_path / "run", release_gradients=first, **changes)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert_same(pretrained(tiny, tmp_path / "run", release_gradients=not first, resume=True, **changes), whole)


@pytest.mark.parametrize("clip_by", ["two-pass", "previous"])
def test_a_loss_that_is_not_finite_moves_nothing(
    tiny: Path, tmp_path: Path, clip_by: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gossamer.evaluate import token_loss

    models: list[nn.Module] = []
    before: list[dict[str, Tensor]] = []

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        models.append(model)
        before.append(copy.deepcopy(model.state_dict()))
        return token_loss(model, inputs, targets) * (math.nan if len(models) == 3 else 1)

    monkeypatch.setattr("gossamer.train.pretraining.token_loss", loss)
    with pytest.raises(UserError, match=r"^step 3: the loss is nan and the gradient norm is .*; stopped "):
        pretrained(tiny, tmp_path / "run", release_gradients=True, clip_by=clip_by)
    assert len(models) == 3
    assert_same(dict(before[2]), dict(models[2].state_dict()))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip_by": "previous"}, "clip_by: 'previous' without gradients that are released and clipped"),
        ({"clip_by": "previous", "release_gradients": True, "clip": 0.0}, "add --release-gradients, with --clip above"),
        (
            {"on_nonfinite": "skip", "release_gradients": True, "clip": 0.0},
            "on_nonfinite: 'skip' with gradients that are",
        ),
        ({"compile": True, "release_gradients": True}, "release_gradients: a compiled model .* leave out --compile"),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Pretrain(AdamW(), **changes)


def test_replicas_are_refused() -> None:
    model = net()
    config = Pretrain(AdamW(), release_gradients=True)
    with refused("2 processes with --parallel ddp, which keeps all gradients"):
        gradients_of(config, model, optimizer(model), World(0, 2, torch.device("cpu")))


# --- memory -----------------------------------------------------------------------------------------------------------


class Gradients(TorchDispatchMode):
    """The most bytes at once of tensors of the shapes of weights (or of their transposes) that operators made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        shapes = {tuple(p.shape) for p in model.parameters() if p.requires_grad}
        self.shapes = shapes | {shape[::-1] for shape in shapes}
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for tensor in out if isinstance(out, tuple | list) else (out,):
            fits = isinstance(tensor, Tensor) and tuple(tensor.shape) in self.shapes
            if fits and tensor.untyped_storage()._cdata not in self.weights:  # else a view of one
                self.alive[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_predicted_gradients_are_those_that_are_there_at_once(
    tied: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real gradients of a real model, counted as they come; what a step makes of that shape is left out."""
    monkeypatch.setattr(Optimizer, "step_members", lambda *_: None)
    config = LlamaConfig(
        hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=300, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias, use_cache=False,
    )  # fmt: skip
    model = build_model(config, dtype=torch.float32, device="cpu", seed=0)
    for release in (True,) if tied else (True, False):  # held ones of a tied weight are predicted without sums
        opt = optimizer(model)
        handle = release_gradients(model, opt) if release else None
        inputs, targets = torch.randint(300, (2, 1, 11))  # no activation has a weight's shape
        loss = token_loss(model, inputs, targets)
        with Gradients(model) as counted:
            loss.backward()
        assert counted.peak == predict(model, AdamW(), release_gradients=release).gradients
        opt.zero_grad()
        if handle is not None:
            handle.remove()
    assert predict(model, AdamW(), release_gradients=True).gradients == 4 * 300 * 40 * (3 if tied else 1)
