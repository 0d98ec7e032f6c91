"""The same numbers on many processes. One group of each size does everything, `shard_cases.py` says what."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import shard_cases as cases
import torch
from processes import on
from shard_cases import NAMES, SHAPES, STRANGER, VARIANTS
from torch import Tensor

import gossamer

METHODS = gossamer.methods()
BY_ROWS = [name for name in NAMES if METHODS[name].by_rows]
SCRIPT = Path(cases.__file__)
RTOL = 1e-9
"""float64: sums over rows in another order, 1e-16, which divisions by roots of young second moments amplify."""
ELEMENTWISE = ("adamw", "adamw-8bit", "lion", "spam")
"""No number depends on two entries, but for the scale of 8-bit codes, which is in a row: the same bits."""
DOCS = Path(__file__).parents[2] / "docs" / "distributed.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


def world(folder: Path, size: int, work: str) -> list[dict[str, Any]]:
    here = folder / f"world-{len(list(folder.iterdir()))}"
    here.mkdir()
    return on(size, SCRIPT, work, here)


@pytest.fixture(scope="module")
def on_one(folder: Path) -> list[dict[str, Any]]:
    return world(folder, 1, f"agrees:1 checkpoints:0-2::{folder}/a")


@pytest.fixture(scope="module")
def on_two(folder: Path, on_one: Any) -> list[dict[str, Any]]:
    more = "traffic many parallel extremes rounding asked_for_state resets refusals"
    return world(folder, 2, f"agrees:2 checkpoints:2-4:{folder}/a:{folder}/b {more}")


@pytest.fixture(scope="module")
def on_four(folder: Path, on_two: Any) -> list[dict[str, Any]]:
    return world(folder, 4, f"agrees:4 agrees:2x2 checkpoints:4-6:{folder}/b:{folder}/c")


@pytest.fixture(scope="module")
def on_one_again(folder: Path, on_four: Any) -> list[dict[str, Any]]:
    return world(folder, 1, f"checkpoints:6-8:{folder}/c:{folder}/d")


def close(ours: Tensor, theirs: Tensor, **more: Any) -> None:
    size = float(theirs.abs().nan_to_num(0.0).amax())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=RTOL * size, **more)


GROUPS = {"1": "on_one", "2": "on_two", "4": "on_four", "2x2": "on_four"}
CASES = [
    (kind, name, shape)
    for kind, shapes in SHAPES.items()
    for name in [*NAMES, STRANGER, *(VARIANTS if kind == "2" else ())]
    for shape, sides in shapes.items()
    if (len(sides) == 2 if name == STRANGER else cases.takes(name, sides))
]


@pytest.mark.parametrize(("kind", "name", "shape"), CASES)
def test_many_are_one(kind: str, name: str, shape: str, request: pytest.FixtureRequest) -> None:
    """Through a zero gradient and refreshes, with empty and uneven shards."""
    results = [found[f"agrees{kind}"][name, shape] for found in request.getfixturevalue(GROUPS[kind])]
    for ours, one, how, keys in results:
        assert torch.equal(ours, results[0][0]) and keys == results[0][3]
        if name in ELEMENTWISE:
            assert torch.equal(ours, one)
        close(ours, one)
        whole = name in (STRANGER, "adam-mini blocks") or (name == "adamw-8bit" and shape == "vector")
        if whole or not METHODS[name.split()[0]].by_rows:
            assert how == "whole"
        else:
            assert how == ("owner" if hasattr(METHODS[name.split()[0]].cls, "parts") else "sharded")


@pytest.mark.parametrize("name", NAMES)
def test_many_matrices_at_once(name: str, on_two: Any) -> None:
    for found in on_two:
        for ours, one in zip(*found["many"][name], strict=True):
            close(ours, one)


@pytest.fixture(scope="module")
def straight() -> list[dict[str, Tensor]]:
    """Weights of one process after four steps, and after eight."""
    found = []
    for steps in (4, 8):
        net = cases.Forest()
        cases.train(net, cases.gardener(net), range(steps))
        found.append(cases.weights(net))
    return found


def of(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    assert len({key.split()[0] for key in found}) == 6  # three layers with biases
    return found


@pytest.mark.parametrize("name", NAMES)
def test_fsdp2_and_ddp_train_as_one(name: str, on_two: Any, straight: Any) -> None:
    """Also where the optimizer was built before the model was sharded and given the new parameters, as accelerate."""
    for found in on_two:
        for ours in found["parallel"]:
            for key, value in of(name, straight[0]).items():
                # the gradient is an average of two, rounded otherwise: 1e-16, amplified by young second moments
                torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-8)
        same(of(name, found["parallel"][2]), of(name, on_two[0]["parallel"][2]))  # replicas have the same bits


# --- traffic ---


def traffic(on_two: Any, name: str, kind: str) -> list[int]:
    """fp32 numbers of an ordinary step and of one with a refresh: what each process sends an owner or gets back, its
    own rows too, together with what is summed, gathered or shared."""
    (first, second) = (found["traffic"][name, kind] for found in on_two)
    assert [shared for _, shared in first] == [shared for _, shared in second]
    return [math.ceil(one[0] + other[0] + one[1]) for one, other in zip(first, second, strict=True)]


def table() -> dict[str, list[int]]:
    """The page's numbers: of each method, of a tall matrix at an ordinary step and at a refresh, then of a wide one."""
    rows = re.findall(r"^\| `([\w-]+)` \|([\d, |]+)\|$", DOCS.read_text(), flags=re.MULTILINE)
    return {name: [int(cell.replace(",", "")) for cell in cells.split("|")] for name, cells in rows}


@pytest.mark.parametrize("name", BY_ROWS)
def test_traffic_is_what_the_page_says(name: str, on_two: Any) -> None:
    assert [count for kind in cases.TRAFFIC for count in traffic(on_two, name, kind)] == table()[name]


@pytest.mark.parametrize("kind", cases.TRAFFIC)
@pytest.mark.parametrize("name", BY_ROWS)
def test_traffic_is_bounded(name: str, kind: str, on_two: Any) -> None:
    """Thin factors, and never the gradient; of Muon the matrix there and back, each half as wide as fp32."""
    m, n = cases.TRAFFIC[kind]
    ordinary, refresh = traffic(on_two, name, kind)
    thin = 4 * cases.RANK * (m + n)
    if hasattr(METHODS[name].cls, "parts"):
        assert ordinary <= thin + m * n
    else:
        assert ordinary <= thin < m * n
        assert refresh <= thin + m * n


# --- checkpoints ---


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_exact_and_reshard(
    name: str, on_one: Any, on_two: Any, on_four: Any, on_one_again: Any, straight: Any
) -> None:
    """One process, two, four, one: loaded bits are saved bits, and the weights those of a run that never stopped."""
    saved: dict[str, Tensor] = {}
    for step, group in zip(("0-2", "2-4", "4-6", "6-8"), (on_one, on_two, on_four, on_one_again), strict=True):
        for found in group:
            if saved:
                same(of(name, found[f"checkpoints{step}"]["loaded"]), saved)
            after, *again = (of(name, tensors) for tensors in found[f"checkpoints{step}"]["parts"])
            for tensors in again:
                same(tensors, after)
        saved = of(name, group[0][f"checkpoints{step}"]["saved"])
    for key, value in of(name, straight[1]).items():
        torch.testing.assert_close(saved[key], value, rtol=1e-6, atol=1e-8)  # as above


@pytest.mark.parametrize("name", NAMES)
def test_asking_for_state_is_no_step(name: str, on_two: Any) -> None:
    """Distributed checkpointing makes state by a step of lr 0 and zero gradients: nothing moves, nothing is counted."""
    for found in on_two:
        one, other = found["asked_for_state"]
        same(of(name, one), of(name, other))


# --- the rest ---


@pytest.mark.parametrize("kind", ["nan", "huge"])
@pytest.mark.parametrize("name", NAMES)
def test_processes_decide_alike(name: str, kind: str, on_two: Any) -> None:
    """Where the rows of one process alone hold what a guard is against."""
    for found in on_two:
        ours, one, shared = found["extremes"][name, kind]
        close(ours, one, equal_nan=True)
        for key, value in on_two[0]["extremes"][name, kind][2].items():
            assert torch.equal(shared[key].nan_to_num(7.0), value.nan_to_num(7.0)), key


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_bf16_to_nearest_has_the_same_bits(name: str, on_two: Any) -> None:
    for found in on_two:
        assert torch.equal(*found["rounding"][name])


@pytest.mark.parametrize("name", NAMES)
def test_shards_round_by_numbers_of_their_own(name: str, on_two: Any) -> None:
    """Rows that are alike, of two processes, a step of 1e-3 from one: 0.996 and 1 are the nearest bf16 numbers."""
    weight = on_two[0]["rounding"][f"{name} stochastic"]
    first, second = weight[:4], weight[4:]
    assert torch.equal(weight, on_two[1]["rounding"][f"{name} stochastic"])
    if weight.float().unique().numel() > 1:  # a step small enough to be rounded either way
        assert not torch.equal(first, second)


def test_some_methods_do_round_either_way(on_two: Any) -> None:
    assert on_two[0]["rounding"]["lion stochastic"].float().unique().numel() == 2


@pytest.mark.parametrize("name", NAMES)
def test_resets(name: str, on_two: Any) -> None:
    for found in on_two:
        (ours, weight), (one, alone) = found["resets"][name]
        assert ours[:2] == one[:2] and ours[2] == pytest.approx(one[2], rel=RTOL) and ours[3] == one[3] == 0
        close(weight, alone)


@pytest.mark.parametrize(
    ("key", "words"),
    {
        "columns": ("'w' is placed (Shard(dim=1))", "Shard(0)"),
        "partial": ("'w' is placed (Partial(sum))", "Replicate()"),
        "observed": ("'w' is a DTensor", "observers"),
    }.items(),
)
def test_refusals(key: str, words: tuple[str, ...], on_two: Any) -> None:
    for found in on_two:
        text = found["refusals"][key]
        assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened", "ds_id"])
def test_flattened_parameters_are_refused(mark: str) -> None:
    flat = torch.nn.Parameter(torch.ones(12))
    setattr(flat, mark, True)
    attempts = [lambda: gossamer.Optimizer([{"params": [flat], "method": gossamer.Gossamer()}])]
    attempts.append(lambda: gossamer.param_groups([flat], gossamer.Gossamer()))
    for attempt in attempts:
        with pytest.raises(gossamer.UserError, match=r"flattened.*FSDP2") as error:
            attempt()
        assert "\n" not in str(error.value)


def test_parameters_flattened_later_are_refused() -> None:
    """DeepSpeed ZeRO puts one vector in the place of all parameters, or of one."""
    for count in (1, 2):
        params = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(count)]
        opt = gossamer.Optimizer([{"params": params, "method": gossamer.Gossamer(rank=2)}])
        flat = torch.nn.Parameter(torch.ones(12 * count))
        flat.grad = torch.ones_like(flat)
        opt.param_groups[0]["params"] = [flat]
        with pytest.raises(gossamer.UserError, match=r"1-D|replaced by 1"):
            opt.step()
