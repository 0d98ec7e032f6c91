"""The compiled sweep computes what its reference does, and the twins that use it take the references' steps."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer.errors import UserError
from gossamer.kernels import native
from gossamer.kernels.native import Past, Product, Reading, Step
from gossamer.memory.step import Kind, count_step

SHAPES = ((1, 1), (3, 17), (13, 5), (97, 65), (100, 256), (200, 273), (33, 530))
RANKS = (1, 3, 4, 8, 9, 16, 33, 50, 70, 128, 200)


@pytest.fixture(scope="module", autouse=True)
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not any(map(shutil.which, native.COMPILERS)):
        pytest.skip("there is no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_CACHE", str(tmp_path_factory.mktemp("native")))
        native.library.cache_clear()
        assert native.library() is None, "nothing is compiled unasked"
        native.build()
        native.library.cache_clear()
        yield
    native.library.cache_clear()


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def normal(*shape: int, seed: int, transposed: bool = False) -> Tensor:
    x = torch.randn(shape[::-1] if transposed else shape, generator=torch.Generator().manual_seed(seed))
    return x.T if transposed else x


def pair(shape: tuple[int, int], r: int, seed: int) -> Product:
    return Product(normal(shape[0], r, seed=seed), normal(r, shape[1], seed=seed + 1, transposed=True), r**-0.5)


def reading(shape: tuple[int, int], r: int, **more: Any) -> Reading:
    """All products, with thin operands of ranks about r and of either memory layout."""
    m, n = shape
    right = normal(n, r, seed=1, transposed=True), normal(n, r + 1, seed=2)
    left = normal(m, r, seed=3), normal(m, r + 2, seed=4, transposed=True)
    if more.get("target") is None:
        right, left = (right[0], None), (left[0], None)
    return Reading(right=right, left=left, **more)


def double(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double()
    if isinstance(x, Product):
        return Product(*map(double, x))
    if isinstance(x, tuple):
        return tuple(map(double, x))
    if isinstance(x, Reading | Past | Step):
        return replace(x, **{field.name: double(getattr(x, field.name)) for field in fields(x)})
    return x


def check(shape: tuple[int, int], reading: Reading, grad: Tensor | None = None) -> None:
    """Against float64: sums of up to 530 fp32 terms err by less than 530 eps = 6e-5 of the terms' magnitudes."""
    grad = normal(*shape, seed=9) if grad is None else grad
    ours, theirs = normal(*shape, seed=8), normal(*shape, seed=8).double()
    found = native.sweep(grad, ours, reading, 0.1, 0.9)
    expected = native.sweep_ref(grad.double(), theirs, double(reading), 0.1, 0.9)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
    for a, b in zip((*found.right, *found.left), (*expected.right, *expected.left), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            size = float(b.nan_to_num().abs().max())
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * size, equal_nan=True)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_ranks(shape: tuple[int, int], r: int, threads: int) -> None:
    """More threads than rows, too."""
    step = Step("adam", pair(shape, r + 1, 30), gain=0.7, eps=0.1)
    check(shape, reading(shape, r, target="magnitude", past=Past(pair(shape, r, 20), "squared"), step=step))


@pytest.mark.parametrize("kind", ["plain", "squared", "floored"])
def test_every_kind(kind: Any) -> None:
    shape, r = (61, 83), 5
    b, a, scale = pair(shape, r, 20)
    if kind == "plain":  # must not be negative, for its root is taken
        b, a = b.abs(), a.abs()
    past = Past(Product(b, a, scale), kind, floor=0.3)
    adam, sign = Step("adam", pair(shape, 7, 30), gain=0.7, eps=0.1), Step("sign", pair(shape, 7, 30))
    for target, step in product((None, "magnitude", "square", "second"), (None, adam, sign)):
        check(shape, reading(shape, r, target=target, past=past, step=step))


def test_parts_may_be_left_out() -> None:
    shape = (40, 90)
    check(shape, Reading(step=Step("sign", pair(shape, 3, 30))))
    check(shape, Reading(right=(None, normal(90, 3, seed=1)), target="square"))
    check(shape, Reading(left=(normal(40, 3, seed=1), None)))


def test_nan_and_infinity_go_where_they_would() -> None:
    shape, r = (30, 40), 3
    grad = normal(*shape, seed=9)
    grad[7, 11], grad[20, 39] = torch.nan, torch.inf
    past = Past(pair(shape, r, 20), "squared")
    check(shape, reading(shape, r, target="second", past=past, step=Step("adam", pair(shape, r, 30), eps=0.1)), grad)


@pytest.mark.parametrize("target", ["second", "square"])
@pytest.mark.parametrize("r", [9, 70])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_floor_is_found(shape: tuple[int, int], r: int, target: Any, threads: int) -> None:
    """The reference's float64 product may have another sign only where it is within 1e-6 of zero: none is here.

    About half of the entries are below zero, and in the last shapes some rows of a strip have none.
    """
    b, a, scale = pair(shape, 6, 20)
    past = Past(Product(b.abs() if shape[0] > 100 else b, a + 0.7, scale), "floored")
    assert bool((past.product.b.double() @ past.product.a.double()).abs().min() > 1e-6)
    asked = Reading(right=(None, normal(shape[1], r, seed=1)), target=target, past=past)
    check(shape, asked)
    grad, weight = normal(*shape, seed=9), normal(*shape, seed=8)
    ours = native.sweep(grad, weight, asked, 0.0, 1.0).floor
    theirs = native.sweep_ref(grad.double(), weight.double(), double(asked), 0.0, 1.0).floor
    assert ours == pytest.approx(theirs, rel=1e-5) and (ours or shape == (1, 1))


def test_gradients_and_directions_are_cut() -> None:
    """Entries beyond the bound count as the bound; a first moment and a direction stay finite, and NaN stays NaN."""
    shape, r = (40, 90), 3
    grad = normal(*shape, seed=9)
    grad[3, 4], grad[5, 80], grad[39, 0] = 1e30, -torch.inf, torch.nan
    check(shape, reading(shape, r, bound=2.0), grad)
    past = Past(pair(shape, r, 20), "squared")
    infinite = Product(normal(40, 1, seed=1) * 1e30, normal(1, 90, seed=2) * 1e30)
    for step in (Step("adam", infinite, gain=1e-20, eps=1e-30), Step("adam", pair(shape, r, 30), gain=1e30, eps=1e-3)):
        ours, theirs = normal(*shape, seed=8), normal(*shape, seed=8)  # fp32 both: in float64 nothing overflows
        native.sweep(grad, ours, Reading(past=past, step=step), 0.1, 0.9)
        native.sweep_ref(grad, theirs, Reading(past=past, step=step), 0.1, 0.9)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, equal_nan=True)
        assert int(ours.isnan().sum()) == 1 and 1e16 < float(ours.nan_to_num().abs().max()) < 1e19


@pytest.mark.parametrize("scale", [1e15, 1e25, 1e38])
@pytest.mark.parametrize("name", ["lora-pre", "mlorc", "gossamer"])
def test_guards_bite_where_the_tiles_do(name: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of huge gradients among others: weights are finite, and as the steps of lr 1e-3 in tiles, to fp32."""
    weights = []
    for library in (native.library, lambda: None):
        monkeypatch.setattr(native, "library", library)
        p = nn.Parameter(normal(12, 20, seed=0))
        groups = [{"params": [p], "method": gossamer.methods()[name].cls(rank=4)}]
        opt = gossamer.Optimizer(groups, lr=1e-3)
        for seed in range(3):
            p.grad = normal(12, 20, seed=seed + 1) * (scale if seed == 1 else 1.0)
            opt.step()
        weights.append(p.detach())
    assert bool(weights[0].isfinite().all())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-3)


def test_the_same_again(threads: int) -> None:
    """Bit for bit, for a number of threads."""
    shape, r = (200, 273), 9
    asked = reading(shape, r, target="magnitude", past=Past(pair(shape, r, 20), "squared"))
    first, *others = (native.sweep(normal(*shape, seed=9), normal(*shape, seed=8), asked, 0, 1) for _ in range(5))
    for other in others:
        assert all(map(torch.equal, (*first.right, *first.left), (*other.right, *other.left)))


def test_autograd_sees_the_write() -> None:
    """A weight that backward still needs must not change unnoticed."""
    weight = nn.Parameter(normal(4, 5, seed=1))
    loss = (weight**2).sum()
    native.sweep(normal(4, 5, seed=2), weight, Reading(step=Step("sign", pair((4, 5), 2, 30))), 0.1, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("lora-pre", {}),
    ("lora-pre-stable", {}),
    ("mlorc", {}),
    ("mlorc", {"power_iterations": 1, "oversampling": 2}),
    ("mlorc-lion", {}),
    ("gossamer", {}),
    ("gossamer", {"second": "square"}),
    ("gossamer", {"second": "absolute", "tail": 0.0}),
    ("gossamer-lion", {}),
]


def train(name: str, options: dict[str, Any], dtype: torch.dtype, implementation: str) -> tuple[Tensor, dict[str, Any]]:
    p = nn.Parameter(normal(70, 90, seed=0).to(dtype))
    method = gossamer.methods()[name].cls(rank=6, **options)
    opt = gossamer.Optimizer(
        [{"params": [p], "method": method}], lr=1e-2, weight_decay=0.1, implementation=implementation
    )
    left, right = normal(70, 3, seed=1), normal(3, 90, seed=2)
    for step in range(6):
        p.grad = (left @ right + normal(70, 90, seed=10 + step)).to(dtype)
        opt.step()
    return p.detach(), opt.state[p]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_twin_is_the_reference(name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to the reference's float64 steps as its own fp32 ones: products, up to 4 times their distance.

    Both are a few roundings away, in another order; the factor is for chance. What a sign or the floor of a second
    moment makes of an entry near zero is left out: the weights' median error is compared, and the products' norm.
    """
    readings: list[Reading] = []
    run = native.sweep

    def spy(grad: Tensor, weight: Tensor, reading: Reading, *args: Any) -> native.Products:
        readings.append(reading)
        return run(grad, weight, reading, *args)

    monkeypatch.setattr(native, "sweep", spy)
    exact, state = train(name, options, torch.float64, "reference")
    weights, states = zip(*(train(name, options, torch.float32, kind) for kind in ("fused", "reference")), strict=True)
    assert sum(reading.step is not None for reading in readings) == 6, "every step is the library's"
    ours, theirs = (float((weight - exact).abs().median()) for weight in weights)
    assert ours < 4 * theirs
    for moment in "mv":
        if f"{moment}_B" in state:
            product = state[f"{moment}_B"] @ state[f"{moment}_A"]
            ours, theirs = (
                float((one[f"{moment}_B"].double() @ one[f"{moment}_A"].double() - product).norm()) for one in states
            )
            assert ours < 4 * theirs, moment


@pytest.mark.parametrize("name", ["lora-pre", "mlorc", "gossamer"])
def test_it_climbs_where_it_is_to_climb(name: str) -> None:
    """Along the steps that the negated gradients would take: fp32 roundings of three steps of 1e-2 apart."""
    weights = []
    for sign in (1.0, -1.0):
        p = nn.Parameter(normal(70, 90, seed=0))
        groups = [{"params": [p], "method": gossamer.methods()[name].cls(rank=6)}]
        opt = gossamer.Optimizer(groups, lr=1e-2, maximize=sign > 0)
        for step in range(3):
            p.grad = sign * normal(70, 90, seed=10 + step)
            opt.step()
        weights.append(p.detach())
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4)


def test_memory_is_counted_on_its_way_too() -> None:
    """The scratch is a block of two threads' rows and copies of thin factors, not a tile."""
    kind = Kind(gossamer.LoRAPre(rank=8), torch.Size((768, 768)), torch.float32)
    found, scratch = count_step({kind: 2}, "auto")
    shape, r = (768, 768), 8
    needed: list[int] = []
    asked = Reading(
        right=(normal(768, r, seed=1), normal(768, r, seed=1)),
        left=(normal(768, r, seed=1), normal(768, r, seed=1)),
        target="magnitude",
        past=Past(pair(shape, r, 20), "squared"),
        step=Step("adam", pair(shape, r, 30)),
    )

    def buffer(count: int) -> Tensor:
        needed.append(4 * count)
        return torch.empty(count)

    native.sweep(normal(*shape, seed=1), normal(*shape, seed=2), asked, 0.0, 1.0, buffer)
    assert scratch == needed[0] < 2**20
    assert found[kind].transient < 2**20


def test_build_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FLAGS", ("--no-such-flag",))
    with pytest.raises(UserError, match="cannot compile"):
        native.build()
    assert not native.library_path().exists()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no C\\+\\+ compiler on PATH; allowed: g\\+\\+, clang\\+\\+"):
        native.build()


def test_command_says_where_it_is() -> None:
    done = subprocess.run([sys.executable, "-m", "gossamer.kernels"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(native.library_path()) and done.stderr == ""
