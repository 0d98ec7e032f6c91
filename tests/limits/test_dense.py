"""What the dense methods promise in their limits, and what 8 bits keep of a moment."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer import UserError
from gossamer.optim import rules, stores
from gossamer.optim.contract import Context, Method, State, build
from gossamer.rows import HERE, finish

F64 = torch.float64
CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def step(method: Method, state: State, grad: Tensor, t: int, **steps: int) -> Tensor:
    context = Context(t, t, t, 0.0, torch.zeros_like(grad), torch.Generator().manual_seed(0), 0)
    return method.update(grad, state, context._replace(**steps))


def directions(method: Method, gradients: list[Tensor]) -> list[Tensor]:
    state = method.init(torch.zeros_like(gradients[0]))
    return [step(method, state, grad, t) for t, grad in enumerate(gradients, 1)]


def equal(one: list[Tensor], other: list[Tensor], atol: float = 1e-12) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=atol)


def noise(*shape: int, steps: int = 30) -> list[Tensor]:
    return [randn(*shape, seed=seed) for seed in range(steps)]


# ---- methods ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (7,), ()])
def test_spam_without_bound_and_reset_is_adamw(shape: tuple[int, ...]) -> None:
    gradients = noise(*shape)
    unbounded = build("spam", threshold=float("inf"), reset_gap=10**9)
    equal(directions(unbounded, gradients), directions(build("adamw", eps=1e-6), gradients))


def test_spam_between_two_resets_is_a_young_adamw() -> None:
    gradients = noise(6, 5, steps=20)
    method = build("spam", threshold=float("inf"), reset_gap=10, warmup=0)
    equal(directions(method, gradients)[10:], directions(build("adamw", eps=1e-6), gradients[10:]))


def test_spam_warms_up_after_a_reset_and_not_before_the_first() -> None:
    ones = [torch.ones(3, 3, dtype=F64)] * 24  # Adam's step of a constant gradient is 1 whatever the age
    sizes = [float(d.mean()) for d in directions(build("spam", reset_gap=12, warmup=6), ones)]
    assert sizes[:12] == pytest.approx([1.0] * 12, rel=1e-5)
    assert sizes[12] == pytest.approx(0.5 * (1 - torch.cos(torch.tensor(torch.pi / 7)).item()), rel=1e-4)
    assert all(a < b for a, b in itertools.pairwise(sizes[12:19])) and sizes[18] == pytest.approx(1.0)


def test_spam_does_not_freeze_what_it_has_not_seen() -> None:
    """An entry whose gradient is zero for 30 steps: the printed formula would clip it to zero for ever after."""
    gradients = noise(4, 4, steps=40)
    for t, grad in enumerate(gradients):
        grad[0] *= t >= 30
    late = directions(build("spam", reset_gap=10**9), gradients)[30:]
    assert all(bool((d[0] != 0).all()) for d in late) and float(late[-1][0].abs().mean()) > 0.1


def test_spam_outlives_a_spike_and_adamw_does_not() -> None:
    """A spike of 1e6: AdamW's second moment of that entry is 1e9 for a thousand steps, SPAM's some six times the usual.

    After 50 steps v holds 5 % of its share, so the bound is sqrt(5000 * 0.05) = 16 times the usual size, and v grows by
    0.001 * 16^2 / 0.05 = 5 times itself.
    """
    gradients = [torch.ones(4, 4, dtype=F64) + grad for grad in noise(4, 4, steps=150)]
    gradients[50][0, 0] = 1e6
    spam, adamw = (directions(build(name), gradients)[-1][0, 0].abs() for name in ("spam", "adamw"))
    assert float(adamw) < 1e-3 and float(spam) > 0.1


@pytest.mark.parametrize("name", ["spam", "stable-spam"])
def test_a_reset_from_outside_does_not_shift_the_schedule(name: str) -> None:
    method, gradients = build(name, reset_gap=10), noise(4, 4, steps=24)
    state = method.init(torch.zeros(4, 4, dtype=F64))
    for t, grad in enumerate(gradients, 1):
        if t == 7:
            state["m"].zero_()
            state["v"].zero_()
        age = t if t < 7 else t - 6
        step(method, state, grad, t, m_step=age, v_step=age)
        if t in (11, 21):  # the first step of a period: m is a tenth of one corrected gradient
            assert torch.allclose(state["m"].square() / 100 * 10, state["v"], rtol=1e-9)


def test_stable_spam_is_invariant_to_the_scale_of_all_gradients() -> None:
    gradients = noise(6, 5)
    large = [1e6 * grad for grad in gradients]
    # eps = 1e-8 in two denominators, against norms of 5
    equal(directions(build("stable-spam"), large), directions(build("stable-spam"), gradients), atol=1e-6)


def test_stable_spam_limits() -> None:
    """With gamma1 = gamma2 = 0 the norm is its own average: every gradient is normalised. Then it is AdamW of those."""
    gradients = noise(6, 5)
    method = build("stable-spam", gamma1=0.0, gamma2=0.0, gamma3=0.0, reset_gap=10**9, eps=0.0)
    normalised = [grad / grad.norm() for grad in gradients]
    equal(directions(method, gradients), directions(build("adamw", eps=0.0), normalised))


def test_stable_spam_bounds_the_norm_of_a_spike() -> None:
    gradients = noise(4, 4, steps=60)
    gradients[50] *= 1e6
    after = directions(build("stable-spam"), gradients)[50:]
    assert all(float(d.abs().max()) < 5 for d in after) and float(after[-1].norm()) > 0.3


def test_adam_mini_with_blocks_of_one_entry_is_adamw() -> None:
    gradients = noise(12, 1)
    equal(directions(build("adam-mini"), gradients), directions(build("adamw"), gradients))


def test_adam_mini_partitions_are_nested() -> None:
    gradients = noise(12, 5)
    rows, many = directions(build("adam-mini"), gradients), directions(build("adam-mini", blocks=12), gradients)
    equal(rows, many)
    equal(
        directions(build("adam-mini", blocks="tensor"), gradients), directions(build("adam-mini", blocks=1), gradients)
    )
    assert build("adam-mini").init(torch.empty(12, 5))["v"].shape == (12,)
    assert build("adam-mini", blocks=4).init(torch.empty(12, 5))["v"].shape == (4,)


def test_adafactor_of_a_rank_one_square_is_unfactored() -> None:
    """If g^2 has rank one its means hold all of it: V = g^2, and the first step is rms(W) sign(g)."""
    grad = torch.outer(randn(6).abs() + 0.1, randn(5, seed=1).abs() + 0.1) * randn(6, 5, seed=2).sign()
    param, method = 3 * randn(6, 5, seed=3), build("adafactor")
    context = Context(1, 1, 1, 0.0, param, torch.Generator(), 0)
    expected = param.square().mean().sqrt() * grad.sign()
    assert torch.allclose(method.update(grad, method.init(param), context), expected, rtol=1e-12)


def test_muon_with_a_power_of_the_identity() -> None:
    """Of a scaled orthogonal matrix every singular value is moved alike, whatever the scale."""
    q = torch.linalg.qr(randn(8, 8))[0]
    (small,), (large,) = directions(build("muon"), [1e-5 * q]), directions(build("muon"), [1e5 * q])
    ratio = small @ q.mT
    assert torch.allclose(small, large, atol=1e-9)
    assert torch.allclose(ratio, ratio[0, 0] * torch.eye(8, dtype=F64), atol=1e-9) and 0.6 < float(ratio[0, 0]) < 1.3


@pytest.mark.parametrize("shape", [(24, 6), (6, 24), (9, 9)])
def test_orthogonalize_scales_by_the_shape(shape: tuple[int, int]) -> None:
    m = randn(*shape)
    plain, matched = (finish(rules.orthogonalize(m, adjust), HERE) for adjust in rules.ADJUSTMENTS)
    singular = torch.linalg.svdvals(plain) / max(1, shape[0] / shape[1]) ** 0.5
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3
    assert 0.2 * 0.6 < float(matched.square().mean().sqrt()) < 0.2 * 1.3
    assert finish(rules.orthogonalize(m.float(), "original"), HERE).dtype is torch.float32


@pytest.mark.parametrize(
    "name", ["adamw", "adamw-8bit", "spam", "stable-spam", "adam-mini", "adafactor", "lion", "muon"]
)
def test_huge_gradients_keep_the_moments_finite(name: str) -> None:
    """An infinite second moment would never come down again: its parameter would stand still for good."""
    method, state = build(name), build(name).init(torch.zeros(6, 5))
    for t in range(1, 4):
        huge = step(method, state, 1e38 * randn(6, 5, seed=t).clamp(-3, 3).float(), t)
        assert bool(huge.isfinite().all()) and float(huge.abs().max()) < 10
    assert all(bool(value.isfinite().all()) for value in state.values())


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("lion", {"betas": (0.9, 1.0)}, ("lion", "beta2 is 1.0")),
        ("muon", {"momentum": -0.1}, ("muon", "-0.1")),
        ("muon", {"adjust_lr_fn": "orginal"}, ("'original'?", "match_rms_adamw")),
        ("adafactor", {"d": 0.5}, ("d is 0.5", "d >= 1")),
        ("adafactor", {"beta2_decay": 0.8}, ("beta2_decay is 0.8", "<= 0")),
        ("spam", {"threshold": 0.0}, ("threshold is 0.0", "> 0")),
        ("spam", {"reset_gap": 0}, ("reset_gap is 0", ">= 1")),
        ("stable-spam", {"gamma1": 1.0}, ("1.0", "gamma < 1")),
        ("adam-mini", {"blocks": "rows"}, ("'rows'", "'row'?", "tensor")),
        ("adam-mini", {"blocks": 0}, ("blocks is 0", ">= 1")),
        ("adamw", {"state_bits": 4}, ("state_bits is 4", "32, 16, 8")),
    ],
)
def test_bad_values_are_one_line(name: str, fields: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        build(name, **fields)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_blocks_that_do_not_divide_the_rows() -> None:
    with pytest.raises(UserError, match=r"blocks is 5 for shape \(12, 7\); allowed: divisors of 12"):
        build("adam-mini", blocks=5).init(torch.empty(12, 7, device="meta"))


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def through(x: Tensor, name: str) -> Tensor:
    """What is left of x after a write and a read."""
    state = stores.moments(x, name, bits=8)
    stores.write_(state, **{name: x})
    return stores.read(state, name)


@pytest.mark.parametrize("signed", [True, False])
def test_codebook(signed: bool) -> None:
    book = stores.codebook(signed, F64, CPU)
    assert len(book.unique()) == 256 and bool((book.diff() > 0).all())
    assert 0.0 in book and book[-1] == 1.0 and book[0] == (-book[-2] if signed else 0.0)
    positive = book[book > 0]
    assert len(positive) == (128 if signed else 255) and float(positive[0]) == (5.5e-7 if signed else 3.25e-7)
    for k in range(7):  # each decade has twice the numbers of the one below
        decade = positive[(positive > 10.0 ** (-k - 1)) & (positive < 10.0**-k)]
        assert len(decade) == 2 ** (6 - k if signed else 7 - k)
    if signed:
        assert torch.equal(book[:127], -positive[:-1].flip(0))  # symmetric but for 1


@pytest.mark.parametrize("shape", [(40, 33), (256,), (257,), (16, 32), (3,), (), (1, 1), (5, 7, 11)])
@pytest.mark.parametrize("name", ["m", "v", "m_inner"])
def test_codes_keep_zero_and_the_largest_entry(shape: tuple[int, ...], name: str) -> None:
    for sign in (1, -1) if name != "v" else (1,):
        x = sign * randn(*shape) if name != "v" else randn(*shape).square()
        flat = x.reshape(-1)
        flat[2:4] = 0.0
        back = through(x, name).reshape(-1)
        assert bool((back[2:4] == 0).all())
        rows = len(x) if x.ndim > 1 else 1  # blocks run within a row
        blocks, kepts = ([b for row in t.reshape(rows, -1) for b in row.split(stores.BLOCK)] for t in (flat, back))
        for block, kept in zip(blocks, kepts, strict=True):
            at = block.abs().argmax()
            assert kept[at] == block[at]
            # half the gap between two neighbours of the codebook: 0.45 / 64 of the block's largest entry at most (0.45
            # / 128 unsigned), and, down to 1e-6 of it, half of a bin that is less than its lower end's 9 / parts times
            error, top = (block - kept).abs(), float(block.abs().max())
            assert float(error.max()) <= (0.9 / 128 if name != "v" else 0.9 / 256) * top * (1 + 1e-9)
            decade = (block.abs() > 0.1 * top) & (block.abs() <= top)
            assert float((error / block.abs().clamp_min(1e-300))[decade].max()) <= (
                0.071 if name != "v" else 0.036
            )  # 9 / 128, 9 / 256


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_codes_of_the_negative_are_the_same(dtype: torch.dtype) -> None:
    x = randn(50, 31, dtype=dtype)
    assert torch.equal(through(-x, "m"), -through(x, "m"))
    assert torch.equal(through(through(x, "m"), "m"), through(x, "m"))  # what codes can hold is held


def test_nearest() -> None:
    book, x = stores.codebook(True, F64, CPU), torch.linspace(-0.999, 1.0, 256, dtype=F64)
    best = (x[:, None] - book).abs().amin(1)
    assert torch.allclose((through(x, "m") - x).abs(), best, rtol=0, atol=1e-16)


def test_a_second_moment_does_not_vanish() -> None:
    x = torch.full((64,), 1e-12, dtype=torch.float32)
    x[0], x[1] = 1.0, 0.0
    kept = through(x, "v")
    assert kept[0] == 1 and kept[1] == 0 and bool((kept[2:] == torch.tensor(3.25e-7)).all())
    assert bool((through(x, "m")[2:] == 0).all())  # a first moment may


def test_fresh_codes_are_zero_and_read_as_zero() -> None:
    state = stores.moments(torch.empty(33, 10, dtype=torch.bfloat16), "m", "v", bits=8)
    assert all(not bool(t.any()) for t in state.values())
    assert state["m_codes"].dtype is torch.uint8 and state["m_scale"].dtype is torch.float32
    for name in ("m", "v"):
        assert torch.equal(stores.read(state, name), torch.zeros(33, 10))
    other = stores.moments(torch.empty(33, 10), "m", bits=8, shape=(4, 10))
    assert stores.read(other, "m").shape == (4, 10)
    assert stores.moments(torch.empty(33, 10), "m", bits=32, shape=(4, 10))["m"].shape == (4, 10)


def test_32_bits_are_the_tensor_itself() -> None:
    state = stores.moments(torch.empty(5, 4), "m", bits=32)
    m = stores.read(state, "m")
    assert m is state["m"]
    stores.write_(state, m=m.add_(1))
    assert torch.equal(state["m"], torch.ones(5, 4))


@pytest.mark.parametrize(("m", "n"), [(512, 512), (100, 33), (5461, 2048)])
def test_bytes_per_parameter(m: int, n: int) -> None:
    state = build("adamw-8bit").init(torch.empty(m, n, dtype=torch.bfloat16, device="meta"))
    assert sum(t.numel() * t.element_size() for t in state.values()) == 2 * (m * n + 4 * m * -(-n // 256))


def test_rows_are_encoded_by_themselves() -> None:
    """So a row shard has the codes of the whole."""
    for shape in ((7, 300), (7, 5), (4, 9, 40)):
        x = randn(*shape)
        assert torch.equal(torch.cat([through(x[:3], "m"), through(x[3:3], "m"), through(x[3:], "m")]), through(x, "m"))


def test_8_bit_adamw_follows_adamw() -> None:
    """The same gradients: the directions differ by what the codes lose, and not more as time goes on."""
    method, exact = build("adamw-8bit", betas=(0.9, 0.95)), build("adamw", betas=(0.9, 0.95))
    signal = randn(32, 48)
    gradients = [signal + randn(32, 48, seed=seed + 1) for seed in range(200)]
    errors = [
        float((a - b).norm() / b.norm())
        for a, b in zip(directions(method, gradients), directions(exact, gradients), strict=True)
    ]
    # A block's entries are spread over [0, top] with rms about top / 3, where m's codes have gaps of 0.014 top (above a
    # tenth of top): an error of 0.014 top / sqrt(12) = 0.4 % of top, 1.2 % of the rms. Each step adds one, decayed by
    # beta1: 1.2 % / sqrt(1 - 0.81) = 2.8 %. v: half the gaps, but sums over 1 / sqrt(1 - 0.95^2), 2 % of v, 1 % of its
    # root. Small entries of v err by more; twice the sum of the two covers that.
    assert errors[0] == 0.0 and max(errors) < 2 * (0.028 + 0.01), max(errors)
    assert sum(errors[150:]) < 1.2 * sum(errors[50:100])


def test_8_bit_adamw_trains() -> None:
    """Least squares: the same loss as AdamW to 10 %, where both are far below the start."""
    losses = {}
    for name in ("adamw", "adamw-8bit"):
        a, target, x = randn(80, 40), randn(40, 24, seed=1), nn.Parameter(torch.zeros(40, 24, dtype=F64))
        opt = gossamer.Optimizer([{"params": [x], "method": build(name)}], lr=0.05)
        for _ in range(60):
            opt.zero_grad()
            loss = (a @ x - a @ target).square().mean()
            loss.backward()
            opt.step()
        losses[name] = loss.item()
    assert losses["adamw-8bit"] == pytest.approx(losses["adamw"], rel=0.1) and losses["adamw"] < 4


# ---- 16 bits ---------------------------------------------------------------------------------------------------------

BITS = [name for name, entry in gossamer.methods().items() if "state_bits" in entry.cls.__dataclass_fields__]


@pytest.mark.parametrize("shape", [(40, 33), (33, 40), (24, 24), (7,)])
def test_16_bit_adamw_rounds_its_moments_and_nothing_else(shape: tuple[int, ...]) -> None:
    """Straight down: fp32 moments from the bf16 ones, the direction from those, and each rounded to nearest once."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    method = build("adamw", state_bits=16)
    state = method.init(torch.zeros(shape))
    m, v = torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16)
    for t, grad in enumerate((g.float() for g in noise(*shape, steps=12)), 1):
        direction = step(method, state, grad, t)
        m32 = m.float() + (1 - beta1) * (grad - m.float())
        v32 = beta2 * v.float() + (1 - beta2) * grad**2
        expected = (m32 / (1 - beta1**t)) / ((v32 / (1 - beta2**t)).sqrt() + eps)
        # the same fp32 operations in another order: some 2^-24 of the terms
        assert torch.allclose(direction, expected, rtol=1e-5, atol=1e-6)
        m, v = m32.to(torch.bfloat16), v32.to(torch.bfloat16)
        # where fp32's last bit decides a tie a neighbour is chosen: 2^-8 away
        for key, value in (("m_bf16", m), ("v_bf16", v)):
            assert state[key].dtype is torch.bfloat16 and torch.allclose(state[key], value, rtol=2**-7, atol=0)
            assert float((state[key] != value).double().mean()) < 0.01
        m, v = state["m_bf16"].clone(), state["v_bf16"].clone()


def test_a_16_bit_second_moment_cannot_decay() -> None:
    """From gradients of 1 to a tenth: 0.999 v + 0.001 g^2 is within half a spacing of bf16 from v, 2^-9 v or more.

    In fp32 it goes towards 0.01 as 0.999^t; and with beta2 = 0.95, whose steps are larger than that, in bf16 too.
    """
    gradients = [torch.ones(8, 8)] * 600 + [torch.full((8, 8), 0.1)] * 1000

    def second(bits: int, beta2: float) -> tuple[Tensor, Tensor]:
        method, kept = build("adamw", state_bits=bits, betas=(0.9, beta2)), []
        state = method.init(gradients[0])
        for t, grad in enumerate(gradients, 1):
            step(method, state, grad, t)
            kept += [stores.read(state, "v").clone()] if t in (600, 1600) else []
        return kept[0], kept[1]

    before, after = second(16, 0.999)
    assert bool((before > 0.1).all()) and torch.equal(after, before)
    before, after = second(32, 0.999)
    decayed = 0.01 + (before - 0.01) * 0.999**1000
    assert torch.allclose(after, decayed, rtol=1e-4)  # 1000 roundings of 2^-24
    assert bool((after < 0.5 * before).all())
    before, after = second(16, 0.95)
    assert bool((after < 0.02).all()) and bool((before > 0.9).all())


@pytest.mark.parametrize("name", BITS)
def test_16_bits_are_half(name: str) -> None:
    """Of every moment; whatever else a method keeps is as wide as ever."""
    param = torch.empty(64, 48, device="meta")
    half, full = (build(name, state_bits=bits).init(param) for bits in (16, 32))
    assert {key.removesuffix("_bf16") for key in half} == full.keys()
    for key, tensor in half.items():
        wide = full[key.removesuffix("_bf16")]
        assert tensor.shape == wide.shape and tensor.dtype is (torch.bfloat16 if key.endswith("_bf16") else wide.dtype)
    assert any(key.startswith("m") and key.endswith("_bf16") for key in half)


@pytest.mark.parametrize("name", BITS)
def test_16_bits_of_a_wide_parameter_are_refused(name: str) -> None:
    groups = [{"params": [("w", nn.Parameter(torch.zeros(8, 8, dtype=F64)))], "method": build(name, state_bits=16)}]
    with pytest.raises(
        UserError, match=r"^state_bits: 16 is not enough for a torch\.float64 parameter; allowed: 32, 8$"
    ):
        gossamer.Optimizer(groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BITS)
def test_16_bits_survive_a_checkpoint(name: str, dtype: torch.dtype) -> None:
    fields = {"rank": 4} if "rank" in gossamer.methods()[name].cls.__dataclass_fields__ else {}
    method = build(name, state_bits=16, **fields)

    def run(opt: gossamer.Optimizer, param: nn.Parameter, steps: range) -> None:
        for seed in steps:
            param.grad = randn(24, 16, seed=seed).to(dtype)
            opt.step()

    def optimizer(param: nn.Parameter) -> gossamer.Optimizer:
        return gossamer.Optimizer([{"params": [("w", param)], "method": method}], lr=0.01)

    straight, halved = (nn.Parameter(randn(24, 16, seed=99).to(dtype)) for _ in range(2))
    run(optimizer(straight), straight, range(8))
    first = optimizer(halved)
    run(first, halved, range(4))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = optimizer(halved)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    narrow = [tensor for key, tensor in second.state[halved].items() if key.endswith("_bf16")]
    assert narrow and all(tensor.dtype is torch.bfloat16 and bool(tensor.any()) for tensor in narrow)
    run(second, halved, range(4, 8))
    assert torch.equal(straight, halved)
