"""The facts that one process can try. Each is a sentence, its docstring, and the code that tries to refute it."""

from __future__ import annotations

import copy
import io
import pickle
import random
import re
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from gossamer.conformance.subject import NotApplicable, Subject, fact
from gossamer.conformance.trial import (
    Model,
    backward,
    distance,
    leaves,
    require_close,
    require_exact,
    require_tensors,
    train,
    unmoved,
    weights,
)
from gossamer.errors import first_line


def _pair(subject: Subject, dtype: torch.dtype = torch.float32) -> tuple[Model, torch.optim.Optimizer]:
    model = Model().to(dtype)
    return model, subject.build(model)


def _straight(subject: Subject, steps: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model, optimizer = _pair(subject, dtype)
    train(model, optimizer, range(steps))
    return weights(model)


def _half_way(subject: Subject, dtype: torch.dtype = torch.float32) -> tuple[Model, torch.optim.Optimizer]:
    model, optimizer = _pair(subject, dtype)
    train(model, optimizer, range(3))
    return model, optimizer


def _continued(
    subject: Subject, model: Model, load: Callable[[Model, torch.optim.Optimizer], None], dtype=torch.float32
) -> dict[str, Tensor]:
    """Three more steps, by a fresh optimizer on a copy of the model, once `load` has given it its state."""
    model = copy.deepcopy(model)
    optimizer = subject.build(model)
    load(model, optimizer)
    train(model, optimizer, range(3, 6))
    return weights(model)


def _saved(value: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


# ---- saving and loading ----------------------------------------------------------------------------------------------


@fact
def weights_only(subject: Subject) -> str:
    """What `torch.save` wrote of its state, `torch.load(weights_only=True)` reads: it holds no code."""
    saved = _saved(_half_way(subject)[1].state_dict())
    try:
        torch.load(saved, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise AssertionError(f"UnpicklingError: the state holds {named[1] if named else first_line(error)}") from error
    return ""


def _resume(subject: Subject, dtype: torch.dtype) -> str:
    model, optimizer = _half_way(subject, dtype)
    state = torch.load(_saved(optimizer.state_dict()), weights_only=False)
    resumed = _continued(subject, model, lambda _, fresh: fresh.load_state_dict(state), dtype)
    return require_exact(resumed, _straight(subject, 6, dtype), "6 steps and 3 + load + 3")


@fact
def resume_fp32(subject: Subject) -> str:
    """Three steps, saving, loading and three steps end with the bits of six steps, on fp32 weights."""
    return _resume(subject, torch.float32)


@fact
def resume_bf16(subject: Subject) -> str:
    """The same on bf16 weights."""
    return _resume(subject, torch.bfloat16)


@fact
def state_dtype(subject: Subject) -> str:
    """Loading over bf16 weights changes no tensor of the state: fp32 factors, int8 codes and int64 seeds stay so.

    torch's own `load_state_dict` casts all but `step` to the dtype of the parameter.
    """
    model, optimizer = _half_way(subject, torch.bfloat16)
    fresh = subject.build(copy.deepcopy(model))
    fresh.load_state_dict(torch.load(_saved(optimizer.state_dict()), weights_only=False))
    kept, loaded = (dict(leaves(o.state_dict()["state"])) for o in (optimizer, fresh))
    assert kept.keys() == loaded.keys(), f"loading changes which entries there are: {min(kept.keys() ^ loaded.keys())}"
    for path, value in kept.items():
        other = loaded[path]
        if isinstance(value, Tensor):
            assert value.dtype == other.dtype, f"{path} is {value.dtype}, and {other.dtype} once loaded"
            assert torch.equal(value, other), f"{path} has other values once loaded"
    return ""


@fact
def load_by_keyword(subject: Subject) -> str:
    """`load_state_dict(state_dict=...)`: distributed checkpointing calls it by keyword."""
    model, optimizer = _half_way(subject)
    subject.build(copy.deepcopy(model)).load_state_dict(state_dict=optimizer.state_dict())
    return ""


@fact
def dcp_flat(subject: Subject) -> str:
    """Distributed checkpoints with `flatten_optimizer_state_dict=True` save and load it, and resume is exact."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, optimizer = _half_way(subject)
    with tempfile.TemporaryDirectory() as folder:
        flat = get_optimizer_state_dict(model, optimizer, options=options)
        _quietly(state_dict_saver.save, {"optimizer": flat}, folder)

        def load(model: Model, fresh: torch.optim.Optimizer) -> None:
            target = {"optimizer": get_optimizer_state_dict(model, fresh, options=options)}
            _quietly(state_dict_loader.load, target, folder)
            set_optimizer_state_dict(model, fresh, target["optimizer"], options=options)

        resumed = _continued(subject, model, load)
    return require_exact(resumed, _straight(subject, 6), "6 steps and 3 + load + 3")


def _quietly(save_or_load: Callable[..., Any], state: dict[str, Any], folder: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is meant
        save_or_load(state, checkpoint_id=folder, no_dist=True)


@fact
def dcp_full(subject: Subject) -> str:
    """The same with `full_state_dict=True`, in one file that `torch.load(weights_only=True)` reads."""
    options = StateDictOptions(full_state_dict=True)
    model, optimizer = _half_way(subject)
    full = torch.load(_saved(get_optimizer_state_dict(model, optimizer, options=options)), weights_only=True)
    require_tensors(full)
    resumed = _continued(subject, model, lambda m, fresh: set_optimizer_state_dict(m, fresh, full, options=options))
    return require_exact(resumed, _straight(subject, 6), "6 steps and 3 + load + 3")


def _copied(subject: Subject, copied: Callable[[Any], Any]) -> str:
    model, optimizer = _half_way(subject)
    twin, twins = copied((model, optimizer))
    train(twin, twins, range(3, 6))
    still = unmoved(weights(twin), weights(model))
    assert not still, f"steps of the copy move the original's weights, or none: {still[0]}"
    train(model, optimizer, range(3, 6))
    return require_exact(weights(twin), weights(model), "the copy and the original")


@fact
def deepcopy(subject: Subject) -> str:
    """A `copy.deepcopy` of model and optimizer continues with the same bits, and leaves the original alone."""
    return _copied(subject, copy.deepcopy)


@fact
def pickled(subject: Subject) -> str:
    """The same of a pickled pair."""
    return _copied(subject, lambda pair: pickle.loads(pickle.dumps(pair)))


# ---- what a step does ------------------------------------------------------------------------------------------------


@fact
def every_parameter_moves(subject: Subject) -> str:
    """Matrices and vectors alike: none is skipped in silence."""
    still = unmoved(weights(Model()), _straight(subject, 2))
    assert not still, f"two steps leave {', '.join(still)} as they were"
    return ""


@fact
def no_gradient(subject: Subject) -> str:
    """A parameter without gradient is left alone, decay and momentum included."""
    model, optimizer = _half_way(subject)
    before = weights(model)
    backward(model, 3)
    model.up.weight.grad = None
    optimizer.step()
    still = unmoved(before, weights(model))
    assert "up.weight" in still, "a parameter without gradient moves"
    assert still == ["up.weight"], f"{still[-1]} does not move where another parameter has no gradient"
    return ""


@fact
def zero_gradient(subject: Subject) -> str:
    """Gradients of zero make no NaN, and at lr 0 no weight moves: so distributed checkpointing makes the state."""
    for lr in (0.0, None):
        model, optimizer = _pair(subject)
        for group in optimizer.param_groups:
            if lr is not None:
                group["lr"] = torch.tensor(lr) if isinstance(group["lr"], Tensor) else lr
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        before = weights(model)
        optimizer.step()
        moved = distance(before, weights(model))
        assert moved < float("inf"), "a weight is not finite after a gradient of zero"
        for path, value in leaves(optimizer.state_dict()["state"]):
            finite = not (isinstance(value, Tensor) and value.is_floating_point()) or bool(value.isfinite().all())
            assert finite, f"{path} of the state is not finite after a gradient of zero"
        assert lr is None or moved == 0, f"a weight moves by {moved:.1e} at lr 0"
    return ""


@fact
def noncontiguous_gradient(subject: Subject) -> str:
    """Gradients with other strides are the same gradients."""
    model, optimizer = _pair(subject)
    start = weights(model)
    for step in range(3):
        backward(model, step)
        for param in model.parameters():
            assert param.grad is not None
            strided = torch.stack([param.grad, torch.zeros_like(param.grad)], dim=-1)[..., 0]
            param.grad = param.grad.t().contiguous().t() if param.ndim == 2 else strided
        optimizer.step()
    return require_close(weights(model), _straight(subject, 3), start, "contiguous gradients and others")


@fact
def closure(subject: Subject) -> str:
    """`step(closure)` re-evaluates the loss with gradients enabled, returns it, and steps."""
    model, optimizer = _pair(subject)
    before = weights(model)

    def evaluate() -> Tensor:
        model.zero_grad()
        loss = model.loss(0)
        loss.backward()
        return loss

    expected = float(model.loss(0).detach())
    returned: Any = optimizer.step(evaluate)  # pyright: ignore[reportCallIssue, reportArgumentType]: as every loop does
    assert returned is not None, "step(closure) does not return the loss"
    returned = float(torch.as_tensor(returned).detach())
    assert returned == expected, f"step(closure) returns {returned}; the loss is {expected}"
    still = unmoved(before, weights(model))
    assert not still, f"step(closure) leaves {still[0]} as it was"
    return ""


@fact
def optimizer_zero_grad(subject: Subject) -> str:
    """`zero_grad` takes `set_to_none`, both ways."""
    model, optimizer = _pair(subject)
    backward(model, 0)
    optimizer.zero_grad(set_to_none=False)
    zero = [p.grad is not None and not bool(p.grad.any()) for p in model.parameters()]
    assert all(zero), "zero_grad(set_to_none=False) does not fill gradients with zeros"
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters()), "zero_grad(set_to_none=True) leaves gradients"
    return ""


@fact
def global_random_state(subject: Subject) -> str:
    """Neither making nor stepping it draws from, or seeds, the global random numbers of torch and Python."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Model().to(dtype)
        before = torch.get_rng_state(), random.getstate()
        train(model, subject.build(model), range(3))
        assert torch.equal(before[0], torch.get_rng_state()), f"torch's global random state changes ({dtype})"
        assert before[1] == random.getstate(), f"Python's global random state changes ({dtype})"
    return ""


# ---- groups and options ----------------------------------------------------------------------------------------------


@fact
def swapped_parameters(subject: Subject) -> str:
    """It trains the parameters that its groups hold now: accelerate puts others there after it was made."""
    model, other = Model(), Model()
    optimizer = subject.build(model)
    new = dict(zip(model.parameters(), other.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [new[param] for param in group["params"]]
    train(other, optimizer, range(3))
    return require_exact(weights(other), _straight(subject, 3), "swapped parameters and others")


@fact
def late_group(subject: Subject) -> str:
    """`add_param_group` after some steps: the new parameter is trained, and the old ones still are."""
    model, optimizer = _half_way(subject)
    late = nn.Parameter(torch.ones(24, 16))
    named = "param_names" in optimizer.param_groups[0]  # torch wants all or none
    optimizer.add_param_group({"params": [("late", late)] if named else [late]})
    before = weights(model)
    backward(model, 3)
    late.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert not bool((late == 1).all()), "the parameter of a late group does not move"
    still = unmoved(before, weights(model))
    assert not still, f"{still[0]} does not move any more once there is a late group"
    return ""


@fact
def scheduler(subject: Subject) -> str:
    """A scheduler's learning rate is followed: at 0 nothing moves, and then it moves again."""
    model, optimizer = _pair(subject)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step != 2))
    for step in range(4):
        before = weights(model)
        train(model, optimizer, range(step, step + 1))
        still = unmoved(before, weights(model))
        if step == 2:
            moved = distance(before, weights(model))
            assert moved == 0, f"weights move by {moved:.1e} where the scheduler says lr 0"
        else:
            assert not still, f"{still[0]} does not move where the scheduler says lr > 0 (step {step + 1})"
        schedule.step()
    return ""


@fact
def tensor_lr(subject: Subject) -> str:
    """A tensor as learning rate is the same as its number and is followed when it is filled, or it is refused."""
    model, reference = Model(), Model()
    lr = subject.default("lr") or 1e-3
    plain = subject.build_if_taken(reference, lr=lr)
    try:
        rate = torch.tensor(float(lr))
        optimizer = subject.build_if_taken(model, lr=rate)
    except (TypeError, ValueError) as error:
        raise NotApplicable(f"refused: {first_line(error)}") from error
    start = weights(model)
    train(model, optimizer, range(3))
    train(reference, plain, range(3))
    measured = require_close(weights(model), weights(reference), start, "lr as a tensor and as a number")
    before = weights(model)
    for held in [rate, *(group["lr"] for group in optimizer.param_groups if isinstance(group["lr"], Tensor))]:
        held.zero_()
    train(model, optimizer, range(3, 4))
    moved = distance(before, weights(model))
    assert moved == 0, f"weights move by {moved:.1e} where the tensor was filled with 0"
    return measured


def _reaches(subject: Subject, name: str, value: Any) -> str:
    source, changed, usual = Model(), Model(), Model()
    pairs = (changed, subject.build_if_taken(changed, **{name: value})), (usual, subject.build(usual))
    for step in range(3):
        backward(
            source, step
        )  # given to both: else what decay does to one parameter would reach the next one's gradient
        for model, optimizer in pairs:
            for param, given in zip(model.parameters(), source.parameters(), strict=True):
                param.grad = None if given.grad is None else given.grad.clone()
            optimizer.step()
    same = unmoved(weights(changed), weights(usual))
    assert not same, f"{name} {value} changes nothing for {', '.join(same)}"
    return ""


@fact
def weight_decay(subject: Subject) -> str:
    """Where the constructor takes `weight_decay`, it reaches every parameter."""
    return _reaches(subject, "weight_decay", (subject.default("weight_decay") or 0.0) + 0.5)


@fact
def betas(subject: Subject) -> str:
    """Where the constructor takes `betas`, they reach every parameter."""
    usual = subject.default("betas") or (0.9, 0.999)
    return _reaches(subject, "betas", tuple(beta / 2 for beta in usual))


@fact
def maximize(subject: Subject) -> str:
    """Where the constructor takes `maximize`, it is the same as the negated gradient."""
    up, down = Model(), Model()
    ascend, descend = subject.build_if_taken(up, maximize=True), subject.build(down)
    start = weights(up)
    for step in range(3):
        backward(up, step)
        for rising, falling in zip(up.parameters(), down.parameters(), strict=True):
            falling.grad = None if rising.grad is None else -rising.grad
        ascend.step()
        descend.step()
    return require_close(weights(up), weights(down), start, "maximize and the negated gradient")
