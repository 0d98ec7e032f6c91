"""What every registered method must do. A new method is tested here by being registered."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.memory import predict
from gossamer.optim.contract import Context, build, describe
from gossamer.optim.optimizer import init_state, num_bytes

SHAPES = {"tall": (24, 10), "wide": (10, 24), "square": (16, 16), "row": (1, 12), "small": (3, 3)}
RANK = 4
NAMES = list(gossamer.methods())


def make(name: str, **fields: object) -> gossamer.Method:
    cls = gossamer.methods()[name].cls
    if "rank" in cls.__dataclass_fields__:
        fields.setdefault("rank", RANK)
    return build(name, **fields)


def param(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def often(name: str) -> dict[str, object]:
    """Fields with which a few steps see every refresh and reset that the method has."""
    known = gossamer.methods()[name].cls.__dataclass_fields__
    return {field: 3 for field in ("update_proj_gap", "reset_gap") if field in known}


def optimizer(name: str, params: list[nn.Parameter], **options: object) -> gossamer.Optimizer:
    method = options.pop("method", None) or make(name)
    return gossamer.Optimizer([{"params": params, "method": method}], **{"lr": 1e-2, **options})


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    signal = torch.randn(shape, generator=generator)
    return [signal + torch.randn(shape, generator=generator) for _ in range(steps)]


def run(opt: gossamer.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for p in params:
        for step, grad in enumerate(gradients(tuple(p.shape), steps.stop)):
            if step in steps:
                p.grad = grad.to(p.dtype)
                opt.step()
        p.grad = None


@pytest.mark.parametrize("name", NAMES)
def test_is_a_documented_frozen_dataclass(name: str) -> None:
    entry = gossamer.methods()[name]
    assert entry.cls.__dataclass_params__.frozen
    assert entry.paper and entry.summary.endswith(".")
    assert describe(build(**describe(entry.cls()))) == describe(entry.cls())
    hash(entry.cls())  # groups are keyed by method


@pytest.mark.parametrize("name", NAMES)
def test_descends_on_a_matrix_problem(name: str) -> None:
    """Least squares ||A X - Y||^2 from X = 0: a tenth of the first loss within 300 steps of decaying size."""
    generator = torch.Generator().manual_seed(3)
    a, target = torch.randn(40, 20, generator=generator), torch.randn(20, 12, generator=generator)
    y, x = a @ target, nn.Parameter(torch.zeros(20, 12))
    opt = optimizer(name, [x], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.01, 300)
    losses = []
    for _ in range(300):
        opt.zero_grad()
        loss = (a @ x - y).square().mean()
        loss.backward()
        opt.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_resume_is_exact(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    method = make(name, **often(name))
    straight = [param(shape, dtype)]
    run(optimizer(name, straight, method=method), straight, range(8))

    halved = [param(shape, dtype)]
    first = optimizer(name, halved, method=method)
    run(first, halved, range(5))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = optimizer(name, halved, method=method)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for key, value in first.state[halved[0]].items():
        assert second.state[halved[0]][key].dtype == value.dtype
        assert second.state[halved[0]][key].data_ptr() != value.data_ptr()
    run(second, halved, range(5, 8))
    assert torch.equal(straight[0], halved[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_meta_init_counts_what_is_held(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    p = param(shape, dtype)
    opt = optimizer(name, [p])
    predicted = init_state(make(name), torch.empty(shape, dtype=dtype, device="meta"))
    run(opt, [p], range(1))
    held = opt.state[p]
    assert {k: (v.shape, v.dtype) for k, v in predicted.items()} == {k: (v.shape, v.dtype) for k, v in held.items()}
    assert sum(row.state_bytes for row in opt.plan()) + 12 == num_bytes(held.values())


@pytest.mark.parametrize("name", NAMES)
def test_predicted_bytes_of_a_model(name: str) -> None:
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    opt = gossamer.Optimizer(gossamer.param_groups(model, make(name)))
    model(torch.arange(5)).sum().backward()
    memory = predict(model, make(name))
    assert memory.gradients == num_bytes(p.grad for p in model.parameters() if p.grad is not None)
    opt.step()
    assert memory.state == sum(num_bytes(state.values()) for state in opt.state.values())
    assert memory.weights == num_bytes(model.parameters())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_zero_gradient_with_zero_lr_changes_nothing(name: str, shape: tuple[int, int]) -> None:
    """The first step that distributed checkpointing takes to allocate state."""
    for dtype in (torch.float32, torch.bfloat16):
        p = param(shape, dtype)
        before, opt = p.detach().clone(), optimizer(name, [p], lr=0.0, weight_decay=0.1)
        p.grad = torch.zeros_like(p)
        opt.step()
        assert torch.equal(p, before)
        assert all(bool(value.isfinite().all()) for value in opt.state[p].values())


@pytest.mark.parametrize(
    "kind", ["zero then normal", "reversing", "huge", "tiny", "rank one", "one spike", "one infinity"]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_no_nonfinite_weight(name: str, shape: tuple[int, int], kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    p = param(shape)
    opt = optimizer(name, [p])
    for step in range(60):
        noise = torch.randn(shape, generator=generator)
        p.grad = {
            "zero then normal": noise * (step >= 40),
            "reversing": (-1) ** (step // 5) * torch.ones(shape) + 0.1 * noise,
            "huge": 1e37 * noise,
            "tiny": 1e-38 * noise,
            "rank one": noise[:, :1] * noise[:1, :],
            "one spike": noise * (1e36 if step == 30 else 1.0),
            "one infinity": noise.index_fill(0, torch.tensor([shape[0] - 1]), float("inf")) if step == 30 else noise,
        }[kind]
        opt.step()
        assert bool(p.isfinite().all()), f"step {step}"


@pytest.mark.parametrize("name", NAMES)
def test_rank_beyond_the_matrix(name: str) -> None:
    if "rank" not in gossamer.methods()[name].cls.__dataclass_fields__:
        groups = gossamer.param_groups([param((5, 3))], make(name))
        assert groups[0]["why"] == ["hidden matrix"]
        return
    method = make(name, rank=3)
    state = method.init(torch.empty(5, 3))
    assert torch.isfinite(method.update(torch.ones(5, 3), state, context(param((5, 3))))).all()
    (group,) = gossamer.param_groups([param((5, 3))], method)
    assert group["why"] == ["rank >= min(m, n): dense"] and isinstance(group["method"], gossamer.AdamW)


def context(p: Tensor, step: int = 1) -> Context:
    return Context(step, step, step, 0.01, p, torch.Generator().manual_seed(0), 0)


@pytest.mark.parametrize("name", NAMES)
def test_update_leaves_the_gradient_and_the_parameter(name: str) -> None:
    p, method = param((12, 9)), make(name)
    state, before = method.init(p), p.detach().clone()
    for step, grad in enumerate(gradients((12, 9), 3), 1):
        given = grad.clone()
        direction = method.update(given, state, context(p, step))
        assert direction.shape == p.shape and torch.equal(given, grad) and torch.equal(p, before)


@pytest.mark.parametrize("name", NAMES)
def test_closure_runs_with_gradients(name: str) -> None:
    p = param((6, 5))
    opt = optimizer(name, [p])

    def closure() -> Tensor:
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = float(p.square().sum())
    assert float(opt.step(closure)) == pytest.approx(before)
    assert float(p.square().sum()) < before


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_is_for_the_model(name: str, implementation: str) -> None:
    """A step within it has the bits of one without."""
    found = []
    for enabled in (False, True):
        p = param((24, 10))
        opt = optimizer(name, [p], method=make(name, **often(name)), implementation=implementation)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            run(opt, [p], range(4))
        found.append([p.detach(), *opt.state[p].values()])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_hooks_run(name: str) -> None:
    p, calls = param((6, 5)), []
    opt = optimizer(name, [p])
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    opt.register_state_dict_pre_hook(lambda *_: calls.append("save"))
    opt.register_state_dict_post_hook(lambda *_: calls.append("saved"))
    opt.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    opt.register_load_state_dict_post_hook(lambda *_: calls.append("loaded"))
    p.grad = torch.ones_like(p)
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert calls == ["pre", "post", "save", "saved", "load", "loaded"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", NAMES)
def test_copies_are_alive_and_apart(name: str, copied) -> None:
    p = param((6, 5))
    opt = optimizer(name, [p])
    run(opt, [p], range(3))
    twin = copied(opt)
    (q,) = twin.param_groups[0]["params"]
    q.grad = gradients((6, 5), 1)[0]
    twin.step()
    p.grad = gradients((6, 5), 1)[0]
    assert not torch.equal(p, q)
    opt.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("name", NAMES)
def test_maximize_is_the_negated_gradient(name: str) -> None:
    up, down = param((6, 5)), param((6, 5))
    ascend, descend = optimizer(name, [up], maximize=True), optimizer(name, [down])
    for grad in gradients((6, 5), 4):
        up.grad, down.grad = grad.clone(), -grad
        ascend.step()
        descend.step()
    assert torch.equal(up, down)


@pytest.mark.parametrize("name", NAMES)
def test_tensor_lr_schedules_and_late_groups(name: str) -> None:
    plain, tensor = param((6, 5)), param((6, 5))
    a, b = optimizer(name, [plain], lr=0.02), optimizer(name, [tensor], lr=torch.tensor(0.02))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (a, b)]
    for opt, p, schedule in zip((a, b), (plain, tensor), schedules, strict=True):
        for grad in gradients((6, 5), 4):
            p.grad = grad
            opt.step()
            schedule.step()
    assert torch.allclose(plain, tensor, rtol=1e-6, atol=1e-7)  # one fp32 rounding of lr * direction apart
    late = param((4, 9), seed=2)
    a.add_param_group({"params": [late], "method": make(name)})
    before, late.grad, plain.grad = late.detach().clone(), torch.ones(4, 9), None
    untouched = plain.detach().clone()
    a.step()
    assert not torch.equal(late, before) and torch.equal(plain, untouched)


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_is_left_alone(name: str) -> None:
    p = param((12, 9), torch.bfloat16)
    opt = optimizer(name, [p])
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(opt, [p], range(3))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("name", NAMES)
def test_random_stream_is_of_seed_name_and_step(name: str) -> None:
    """Neither the order of parameters nor their company changes what one of them draws."""
    alone, first, second = param((12, 9), torch.bfloat16), param((8, 7), seed=1), param((12, 9), torch.bfloat16)
    single = gossamer.Optimizer([{"params": [("w", alone)], "method": make(name)}], lr=1e-2)
    both = gossamer.Optimizer([{"params": [("other", first), ("w", second)], "method": make(name)}], lr=1e-2)
    for grad, other in zip(gradients((12, 9), 4), gradients((8, 7), 4), strict=True):
        alone.grad, second.grad, first.grad = grad.bfloat16(), grad.bfloat16(), other
        single.step()
        both.step()
    assert torch.equal(alone, second)


@pytest.mark.parametrize("name", [name for name in NAMES if "basis" in build(name).init(torch.zeros(8, 6))])
def test_a_basis_is_taken_from_the_first_gradient_that_is_not_zero(name: str) -> None:
    """The first factor's gradient is zero where the second one begins at zero."""
    late, prompt = (nn.Parameter(torch.ones(8, 6)) for _ in range(2))
    for p, zeros in ((late, 3), (prompt, 0)):
        opt = gossamer.Optimizer([{"params": [("w", p)], "method": build(name, rank=2)}], lr=1e-2)
        for seed in [None] * zeros + [0, 1, 2]:
            p.grad = (
                torch.zeros(8, 6) if seed is None else torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
            )
            opt.step()
    assert torch.equal(late, prompt)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("name", [name for name in NAMES if "lion" in name])
def test_a_sign_passes_nan_on(name: str, implementation: str) -> None:
    p = nn.Parameter(torch.ones(8, 6))
    group = {"params": [("w", p)], "method": build(name)}
    p.grad = torch.ones(8, 6).index_fill(0, torch.tensor([2]), float("nan"))
    gossamer.Optimizer([group], lr=1e-2, implementation=implementation).step()
    assert p[2].isnan().all()
