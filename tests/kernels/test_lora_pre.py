"""LoRA-Pre's kernels against their references, and its launches against `update`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from batches import Run, copied, error

from gossamer.kernels import Tables, lora_pre, primitives
from gossamer.optim.methods.lora_pre import LoRAPre, LoRAPreStable

SHAPES = {
    "tall": (88, 40),
    "wide": (40, 88),
    "square": (64, 64),
    "odd": (37, 69),  # rows at no multiple of 16 bytes, as Llama-1B's 5461
    "row": (1, 24),
    "column": (24, 1),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS = 2


def addresses(tensors: list[Tensor]) -> Tensor:
    return torch.tensor([t.data_ptr() for t in tensors])


def tables(weights: list[Tensor], grads: list[Tensor], stochastic: bool = False) -> Tables:
    (m, n), dtype = weights[0].shape, weights[0].dtype
    aligned = n * weights[0].element_size() % 16 == 0
    return Tables(addresses(weights), addresses(grads), (m, n), dtype, grads[0].dtype, aligned, stochastic)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(shape: tuple[int, int], rank: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Any, Any]:
    """Weights, gradients, and what `rows` and `columns` take after them, with outputs full of NaN."""
    (m, n), size = shape, primitives.padded_rank(rank)
    weights = [draw(m, n, seed=i).to(dtype) for i in range(LAYERS)]
    grads = [draw(m, n, seed=10 + i).to(dtype) for i in range(LAYERS)]
    left = [lora_pre.padded(draw(LAYERS, m, rank, seed=20 + i), m, size, dtype) for i in range(4)]
    right = [lora_pre.padded(draw(LAYERS, rank, n, seed=30 + i), size, lora_pre.stride(n), dtype) for i in range(2)]
    # own_m, own_v, eps, decay, rate, seed: others for every layer
    numbers = torch.tensor([[0.1 * (i + 1), 0.2, 0.3, 0.99, 0.01 * (i + 1), 1234.0 + i] for i in range(LAYERS)])
    inside = [torch.full((LAYERS, m, size), torch.nan) for _ in range(2)]
    below = [torch.full((LAYERS, size, lora_pre.stride(n)), torch.nan) for _ in range(2)]
    rows = (numbers, left[0], right[0], left[1], right[1], *inside)
    return weights, grads, rows, (left[2], left[3], *below)


def fresh(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("together", [True, False], ids=["one grid", "two launches"])
def test_kernels_are_their_references(shape: str, dtype: str, together: bool) -> None:
    """Both get the same operands, so fp32 sums in another order remain: 1e-5 of sums of a hundred numbers below 10.

    A bf16 weight is rounded to nearest, where such a difference may tip it to the next number, one in 128.
    """
    weights, grads, rows, columns = operands(SHAPES[shape], 4, DTYPES[dtype])
    expected_rows, expected_columns, expected = fresh(rows), fresh(columns), [w.clone() for w in weights]
    lora_pre.rows_ref(expected, grads, *expected_rows, stochastic=False)
    lora_pre.columns_ref(grads, *expected_columns)
    if together:
        lora_pre.launch(tables(weights, grads), rows=rows, columns=columns)
    else:
        lora_pre.launch(tables(weights, grads), rows=rows)
        lora_pre.launch(tables(weights, grads), columns=columns)
    n = SHAPES[shape][1]
    for mine, theirs in zip((*rows[5:], *columns[2:]), (*expected_rows[5:], *expected_columns[2:]), strict=True):
        torch.testing.assert_close(mine[..., :n], theirs[..., :n], rtol=1e-5, atol=1e-4)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "fp32" else {"rtol": 1 / 128, "atol": 1e-3}
    torch.testing.assert_close(weights, expected, **tolerance)


@pytest.mark.parametrize("rank", [5, 16, 24, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ranks(rank: int, dtype: str) -> None:
    """Padded and whole ones; the tolerance as above."""
    weights, grads, rows, columns = operands((80, 72), rank, DTYPES[dtype])
    expected_rows, expected_columns, expected = fresh(rows), fresh(columns), [w.clone() for w in weights]
    lora_pre.rows_ref(expected, grads, *expected_rows, stochastic=False)
    lora_pre.columns_ref(grads, *expected_columns)
    lora_pre.launch(tables(weights, grads), rows=rows, columns=columns)
    for mine, theirs in zip((*rows[5:], *columns[2:]), (*expected_rows[5:], *expected_columns[2:]), strict=True):
        torch.testing.assert_close(mine[..., :72], theirs[..., :72], rtol=1e-5, atol=1e-4)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "fp32" else {"rtol": 1 / 128, "atol": 1e-3}
    torch.testing.assert_close(weights, expected, **tolerance)


def test_stochastic_weights_are_right_in_the_mean() -> None:
    """Over 40 seeds and 1,920 weights, in units of the gap between bf16 numbers: the error of one has a standard
    deviation of at most 0.5, that of the mean 0.002; five of those."""
    weights, grads, rows, _ = operands((40, 24), 4, torch.bfloat16)
    exact = [w.float() for w in weights]
    lora_pre.rows_ref(exact, grads, *fresh(rows), stochastic=False)
    gap, total = [2.0 ** (e.abs().log2().floor() - 7) for e in exact], torch.zeros(())
    for seed in range(40):
        stepped = [w.clone() for w in weights]
        rows[0][:, -1] = torch.tensor([3.0 * seed, 3.0 * seed + 1])
        lora_pre.launch(tables(stepped, grads, stochastic=True), rows=rows)
        errors = [(s.float() - e) / g for s, e, g in zip(stepped, exact, gap, strict=True)]
        assert max(float(e.abs().max()) for e in errors) < 1.001  # up or down, and the kernel's own rounding
        total += torch.stack(errors).mean() / 40
    assert abs(float(total)) < 0.01


def test_three_pieces_hold_an_fp32_number() -> None:
    """24 bits are three times eight: exactly."""
    x = draw(2, 30, 4, seed=0) * 10.0 ** torch.arange(-8, 8).view(1, 1, -1)[..., ::4]
    assert torch.equal(lora_pre.padded(x, 30, 16, torch.float32).double().sum(1)[..., :4], x.double())


CASES = [
    pytest.param(LoRAPre, {}, id="paper"),
    pytest.param(LoRAPre, {"updates": "sequential"}, id="sequential"),
    pytest.param(LoRAPre, {"bias_correction": "exact", "scale": 0.25}, id="exact"),
    pytest.param(LoRAPre, {"damping_mode": "relative", "damping": 1e-2, "gammas": (0.3, 0.2)}, id="relative"),
    pytest.param(LoRAPreStable, {}, id="stable"),
]
# eps keeps denominators from zero, where a rounding error of v is magnified without bound
EPS = 0.1


@pytest.mark.parametrize("shape", ["tall", "odd", "row", "column"])
@pytest.mark.parametrize(("cls", "fields"), CASES)
def test_launch_is_update(cls: Any, fields: dict[str, object], shape: str) -> None:
    """Four steps in fp32, a zero gradient among them: 1e-5 is fp32's rounding times a condition number of 100."""
    method = cls(rank=4, eps=EPS, **fields)
    mine, theirs = Run(method, SHAPES[shape], torch.float32), Run(method, SHAPES[shape], torch.float32)
    for _ in range(4):
        mine.launch()
        theirs.update()
    assert max(map(error, mine.params, theirs.params)) < 1e-5
    for name in "mv":
        assert max(map(error, mine.products(name), theirs.products(name))) < 1e-5


@pytest.mark.parametrize("cls", [LoRAPre, LoRAPreStable])
@pytest.mark.parametrize("shape", ["tall", "odd"])
def test_launch_is_update_in_bf16(cls: Any, shape: str) -> None:
    """bf16 operands round to one in 512, and four steps add up to some of those; the weights' own numbers are no finer.

    The same kernel meets 1e-5 above, so 1e-2 hides no wrong formula.
    """
    method = cls(rank=4, eps=EPS)
    mine, theirs = Run(method, SHAPES[shape], torch.bfloat16), Run(method, SHAPES[shape], torch.bfloat16)
    for _ in range(4):
        mine.launch()
        theirs.update()
    assert max(map(error, mine.params, theirs.params)) < 1e-2
    for name in "mv":
        assert max(map(error, mine.products(name), theirs.products(name))) < 1e-2


def test_climbs() -> None:
    method = LoRAPre(rank=4, eps=EPS)
    mine, theirs = Run(method, (40, 24), torch.float32), Run(method, (40, 24), torch.float32)
    for _ in range(4):
        mine.launch(maximize=True)
        theirs.update(maximize=True)
    assert max(map(error, mine.params, theirs.params)) < 1e-5  # as in descent


def test_ranks_beyond_the_cholesky_kernel() -> None:
    """r = 72 is factorised by torch; bf16, so the tolerance is that of bf16 above."""
    method = LoRAPreStable(rank=72, eps=EPS)
    mine, theirs = (Run(method, (96, 80), torch.bfloat16, layers=2) for _ in range(2))
    for _ in range(3):
        mine.launch()
        theirs.update()
    assert max(map(error, mine.params, theirs.params)) < 1e-2


@pytest.mark.parametrize("first", ["launch", "update"])
def test_checkpoints_go_either_way(first: str) -> None:
    """The state is the reference's: two steps of one, then two of the other, are four of either."""
    method = LoRAPreStable(rank=4, eps=EPS)
    mixed, whole = Run(method, (40, 24), torch.float32), Run(method, (40, 24), torch.float32)
    for step in range(4):
        whole.update()
        (mixed.launch if (first == "launch") == (step < 2) else mixed.update)()
    assert max(map(error, mixed.params, whole.params)) < 1e-5
    assert mixed.states[0].keys() == whole.states[0].keys()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of overflows that are meant
@pytest.mark.parametrize("cls", [LoRAPre, LoRAPreStable])
@pytest.mark.parametrize("size", [1e20, 3e38, float("inf")])
def test_huge_gradients_leave_weights_finite_and_factors_as_they_were(cls: Any, size: float) -> None:
    run = Run(cls(rank=4), (40, 24), torch.float32)
    run.launch()
    grads = run.gradients()
    grads[1].fill_(size)
    before = copied(run.states)
    run.launch(grads)
    assert all(p.isfinite().all() for p in run.params)
    for key in ("m_B", "m_A", "v_B", "v_A"):
        assert run.states[1][key].isfinite().all()
        assert not torch.equal(run.states[0][key], before[0][key])  # the others went on
        if size > 1e38:
            assert torch.equal(run.states[1][key], before[1][key])


def test_nan_is_passed_on_to_its_own_weight_alone() -> None:
    run = Run(LoRAPre(rank=4), (40, 24), torch.bfloat16)
    grads = run.gradients()
    grads[1][3, 5] = torch.nan
    run.launch(grads, rounding="stochastic")
    assert run.params[1].isnan().sum() == 1 and run.params[1][3, 5].isnan()
    assert all(tensor.isfinite().all() for state in run.states for tensor in state.values())


def test_a_zero_gradient_shrinks_b_and_keeps_a() -> None:
    run = Run(LoRAPre(rank=4), (40, 24), torch.float32)
    run.launch()
    before = copied(run.states)
    run.launch([torch.zeros_like(p) for p in run.params])
    for old, new in zip(before, run.states, strict=True):
        assert torch.equal(old["m_A"], new["m_A"]) and torch.equal(old["v_A"], new["v_A"])
        torch.testing.assert_close(new["m_B"], 0.9 * old["m_B"])  # torch's own tolerance: one product


def test_the_launches_of_two_steps_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes from step to step is in tensors: a launch, repeated after they are rewritten, is the next step.

    So a CUDA graph of one step is one of every step. The launches are recorded, then played with other weights,
    gradients and numbers in the tables.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    kernel = lora_pre.both

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **kwargs: Any) -> None:
                calls.append(((grid, *args), kwargs))
                kernel[grid](*args, **kwargs)

            return launch

    monkeypatch.setattr(lora_pre, "both", Recorder())
    one, two = Run(LoRAPre(rank=4), (40, 24), torch.float32), Run(LoRAPre(rank=4), (40, 24), torch.float32)
    one.launch()
    for _ in range(3):
        two.launch()
    (first, options), (other, other_options) = calls[0], calls[-1]
    plain = [x for x in first if not isinstance(x, Tensor)]
    assert plain == [x for x in other if not isinstance(x, Tensor)] and options == other_options

    weights, grads, rows, columns = operands((40, 24), 4, torch.float32)
    expected_rows, expected_columns, expected = fresh(rows), fresh(columns), [w.clone() for w in weights]
    lora_pre.rows_ref(expected, grads, *expected_rows, stochastic=False)
    lora_pre.columns_ref(grads, *expected_columns)
    # copies are rewritten: tables of addresses are kept, and would lead later steps astray
    again = [x.clone() if isinstance(x, Tensor) else x for x in first[1:]]
    for mine, theirs in zip(again, (addresses(weights), addresses(grads), *rows, *columns), strict=False):
        if isinstance(mine, Tensor):
            mine.copy_(theirs)
    kernel[first[0]](*again, **options)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)  # as for the kernels above


def test_who_can_launch() -> None:
    method = LoRAPre(rank=100)
    bf16 = {"dtype": torch.bfloat16}
    assert method.can_launch(torch.empty(200, 200, **bf16)) and method.can_launch(torch.empty(200, 60))
    assert not method.can_launch(torch.empty(200, 200))  # fp32 takes three times the room
    assert not method.can_launch(torch.empty(200, 200, **bf16).mT[:, ::2])
    assert not method.can_launch(torch.empty(20, 20, dtype=torch.float64))
    assert not method.can_launch(torch.empty(0, 20)) and not method.can_launch(torch.empty(4, 5, 6))
    assert not LoRAPre(rank=4, eps=0.0).can_launch(torch.empty(20, 20))


def test_a_gradient_that_is_not_contiguous() -> None:
    method = LoRAPre(rank=4, eps=EPS)
    mine, theirs = Run(method, (40, 24), torch.float32), Run(method, (40, 24), torch.float32)
    grads = mine.gradients()
    mine.launch([g.mT.contiguous().mT for g in grads])
    theirs.launch(grads)
    assert all(map(torch.equal, mine.params, theirs.params))
