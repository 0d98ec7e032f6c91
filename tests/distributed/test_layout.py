"""Where a state's rows run, found out from `init`; and who works on which matrix. One process is enough to know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer
from gossamer.distributed.owners import Job, assigned
from gossamer.distributed.shards import dims_of_rows
from gossamer.optim.contract import build

BY_ROWS = [name for name, entry in gossamer.methods().items() if entry.by_rows]


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (14, 14), (13, 14), (2, 9)])
@pytest.mark.parametrize("name", BY_ROWS)
def test_rows_of_every_state_are_found(name: str, shape: tuple[int, int]) -> None:
    """Also where the rank is cut by the matrix, and a side of the state has the rows' length by chance."""
    cls = gossamer.methods()[name].cls
    for rank in (4, 12, 14, 200):
        method = build(name, **({"rank": rank} if "rank" in cls.__dataclass_fields__ else {}))
        dims = dims_of_rows(method.init, shape)
        state = method.init(torch.empty(shape, device="meta"))
        assert dims is not None and dims.keys() == state.keys()
        for key, dim in dims.items():
            assert dim is None or state[key].shape[dim] == shape[0]
        largest = max(state, key=lambda key: state[key].numel(), default=None)
        if largest is not None and shape[0] > shape[1]:  # of a tall matrix nothing large is on every process
            assert dims[largest] == 0


def test_states_that_do_not_follow_rows() -> None:
    def of(**sides: Any) -> dict[str, int | None] | None:
        def init(param: Tensor) -> dict[str, Tensor]:
            return {name: param.new_empty(side(*param.shape)) for name, side in sides.items()}

        return dims_of_rows(init, (6, 4))

    assert of(rows=lambda m, n: (m, 3), columns=lambda m, n: (2, n), number=lambda m, n: ()) == {
        "rows": 0,
        "columns": None,
        "number": None,
    }
    assert of(transposed=lambda m, n: (n, m)) == {"transposed": 1}
    assert of(twice=lambda m, n: (2 * m, n)) is None
    assert of(blocks=lambda m, n: (-(-m // 4),)) is None  # which may well grow by one for one row
    assert of(both=lambda m, n: (m, m)) is None
    assert of(flat=lambda m, n: (m * n,)) is None


def test_what_init_refuses_is_not_cut() -> None:
    assert dims_of_rows(gossamer.AdamMini(blocks=3).init, (6, 4)) is None
    assert dims_of_rows(gossamer.AdamMini(blocks="tensor").init, (6, 4)) == {"m": 0, "v": None}
    assert dims_of_rows(gossamer.AdamW8bit().init, (600,)) is None  # a vector is one row of codes
    codes = dims_of_rows(gossamer.AdamW8bit().init, (600, 300))
    assert codes is not None and set(codes.values()) == {0}
    assert dims_of_rows(gossamer.AdamW().init, ()) == {"m": None, "v": None}


def test_matrices_are_dealt_out_by_cost() -> None:
    jobs: list[Any] = [Job(None, None, cost, None) for cost in (5, 9, 2, 7, 2, 1)]  # pyright: ignore
    waves = assigned(jobs, 2)
    assert [[job and job.cost for job in wave] for wave in waves] == [[9, 7], [2, 5], [2, 1]]
    assert assigned(jobs[:1], 3) == [[jobs[0], None, None]]
