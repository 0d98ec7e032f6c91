"""`Optimizer.reset`, for every method: what is forgotten, what is kept, and what the next step then is."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer import UserError
from gossamer.optim.contract import MOMENTS, Context, State, build, hash63, moment_of
from gossamer.optim.optimizer import COUNTERS

NAMES = list(gossamer.methods())
SHAPE = (12, 9)
SEED = 3


def fields(name: str) -> dict[str, Any]:
    """Small ranks, and gaps that do not fall due in these tests."""
    known = gossamer.methods()[name].cls.__dataclass_fields__
    return {key: value for key, value in {"rank": 4, "update_proj_gap": 50, "reset_gap": 50}.items() if key in known}


def optimizer(name: str, params: list[nn.Parameter], **options: Any) -> gossamer.Optimizer:
    named = [(f"w{index}", p) for index, p in enumerate(params)]
    group = {"params": named, "method": build(name, **fields(name))}
    return gossamer.Optimizer([group], **{"lr": 1e-2, "seed": SEED, **options})


def param(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradient(step: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + step))


def run(opt: gossamer.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p in params:
            p.grad = gradient(step).to(p.dtype)
        opt.step()


def copy(state: State) -> State:
    return {key: value.clone() for key, value in state.items()}


def stepped(name: str, steps: int = 5, **options: object) -> tuple[gossamer.Optimizer, nn.Parameter]:
    p = param()
    opt = optimizer(name, [p], **options)
    run(opt, [p], range(steps))
    return opt, p


@pytest.mark.parametrize("moments", [("m", "v"), ("m",), ("v",)], ids=["both", "m", "v"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_forgotten_and_what_is_kept(name: str, moments: tuple[str, ...]) -> None:
    opt, p = stepped(name)
    weight, before = p.detach().clone(), copy(opt.state[p])
    done = opt.reset(moments=moments)
    touched = []
    for key, value in opt.state[p].items():
        gone = moment_of(key) in moments and (key not in COUNTERS or key.endswith("_step"))
        assert torch.equal(value, torch.zeros_like(value) if gone else before[key]), key
        assert value.dtype == before[key].dtype
        touched += [before[key]] if gone and key not in COUNTERS else []
    assert float(opt.state[p]["step"]) == 5
    assert all(float(opt.state[p][f"{moment}_step"]) == (0 if moment in moments else 5) for moment in MOMENTS)
    norm = torch.stack([t.double().norm() for t in touched]).norm() if touched else torch.tensor(0.0)
    assert (done.parameters, done.tensors) == (int(bool(touched)), len(touched))
    assert done.norm == pytest.approx(float(norm)) and (done.norm > 0) == bool(touched)
    assert torch.equal(p, weight)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_keeps_a_moment(name: str) -> None:
    """What is not called `m`, `v`, `m_...` or `v_...` would never be reset."""
    keys = build(name, **fields(name)).init(torch.empty(SHAPE, device="meta"))
    assert any(moment_of(key) for key in keys)


@pytest.mark.parametrize("moments", [("m", "v"), ("m",), ("v",)], ids=["both", "m", "v"])
@pytest.mark.parametrize("name", NAMES)
def test_the_next_step_is_one_with_fresh_moments(name: str, moments: tuple[str, ...]) -> None:
    """The same as `update` gives for fresh tensors of the moment, the kept rest, and counters that start at 1.

    Same step, so same random numbers and same refreshes. With all moments reset and nothing else kept (no projector, no
    running norm) the state is a new parameter's, and so this is the first step again.
    """
    opt, p = stepped(name, implementation="reference")  # to the bit
    method = opt.param_groups[0]["method"]
    expected = copy(opt.state[p])
    for key, value in method.init(p).items():
        if moment_of(key) in moments:
            expected[key] = value
    counts = [6, *(1 if moment in moments else 6 for moment in MOMENTS)]
    generator = torch.Generator().manual_seed(hash63(SEED, "w0", 6))
    context = Context(*counts, 1e-2, p, generator, hash63(SEED, "w0"))  # pyright: ignore
    direction = method.update(gradient(5), expected, context)

    before = p.detach().clone()
    opt.reset(moments=moments)
    run(opt, [p], range(5, 6))
    assert torch.equal(p, before.sub_(direction, alpha=1e-2))
    for key, value in opt.state[p].items():
        if key not in COUNTERS:
            assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_reset_and_carry_on_is_finite_and_moves(name: str) -> None:
    opt, p = stepped(name)
    first = float((p.detach() - param(0)).norm())
    for moments in (("m",), ("v",), ("m", "v")):
        opt.reset(moments=moments)
        before = p.detach().clone()
        run(opt, [p], range(5, 9))
        assert bool(p.isfinite().all()) and not torch.equal(p, before)
        other = torch.nn.Parameter(before.clone())
        run(optimizer(name, [other]), [other], range(5, 9))
        if "m" in moments:  # a kept momentum over one gradient's magnitude is long in any Adam
            # as far as the first five steps or a new optimizer went. Under the bias correction of another age a moment
            # would be out by up to sqrt(1 / (1 - 0.999)) = 30
            far = max(float((other.detach() - before).norm()), first)
            assert float((p.detach() - before).norm()) < 2 * far


@pytest.mark.parametrize("name", NAMES)
def test_after_a_reset_a_gradient_of_zero_moves_nothing(name: str) -> None:
    opt, p = stepped(name)
    opt.reset()
    before, p.grad = p.detach().clone(), torch.zeros(SHAPE)
    opt.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("name", NAMES)
def test_named_parameters_only(name: str) -> None:
    params = [param(0), param(1)]
    opt = optimizer(name, params)
    run(opt, params, range(3))
    kept = copy(opt.state[params[0]])
    opt.reset(["w1"])
    assert all(torch.equal(value, kept[key]) for key, value in opt.state[params[0]].items())
    assert all(not bool(value.any()) for key, value in opt.state[params[1]].items() if moment_of(key))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("moments", [("m", "v"), ("m",)], ids=["both", "m"])
@pytest.mark.parametrize("name", NAMES)
def test_resume_after_a_reset_is_exact(name: str, moments: tuple[str, ...], dtype: torch.dtype) -> None:
    straight, halved = param(dtype=dtype), param(dtype=dtype)
    opt = optimizer(name, [straight])
    run(opt, [straight], range(3))
    opt.reset(moments=moments)
    run(opt, [straight], range(3, 7))

    first = optimizer(name, [halved])
    run(first, [halved], range(3))
    first.reset(moments=moments)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = optimizer(name, [halved])
    second.load_state_dict(torch.load(buffer, weights_only=True))
    run(second, [halved], range(3, 7))
    assert torch.equal(straight, halved)


def test_a_parameter_that_was_never_stepped() -> None:
    stepped_one, idle = param(0), param(1)
    opt = optimizer("adamw", [stepped_one, idle])
    stepped_one.grad = gradient(0)
    opt.step()
    done = opt.reset()
    assert (done.parameters, done.tensors) == (1, 2) and idle not in opt.state
    assert opt.reset(["w1"]) == (0, 0, 0.0, 0.0)
    assert opt.reset() == (1, 2, 0.0, 0.0)  # nothing left to forget, the second time


def test_unknown_names_and_moments() -> None:
    opt, p = stepped("adamw")
    before = copy(opt.state[p])
    with pytest.raises(UserError, match=r"no parameter 'w9'.*'w0'"):
        opt.reset(["w0", "w9"])
    with pytest.raises(UserError, match=r"'x'; allowed: m, v"):
        opt.reset(moments=("m", "x"))
    assert all(torch.equal(value, before[key]) for key, value in opt.state[p].items())  # all or nothing


def test_adamw_after_a_reset_is_a_new_adamw() -> None:
    opt, p = stepped("adamw")
    opt.reset()
    fresh_p = nn.Parameter(p.detach().clone())
    fresh = optimizer("adamw", [fresh_p])
    run(opt, [p], range(5, 12))
    run(fresh, [fresh_p], range(5, 12))
    assert torch.equal(p, fresh_p)
