"""No `update` reads a tensor on the host: on a device each read would stop the queue, and no graph could be captured.

Every operator that an update runs passes a dispatch mode that refuses the ones whose result is a Python value or whose
shape depends on data; what copies a tensor to the host without an operator is refused by its Python name.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gossamer
from gossamer.optim.contract import Context, Method, State, build

READS = {
    "_local_scalar_dense",  # item(), float(), int(), bool(), tolist(), if, while, assert, an int index made of a tensor
    "is_nonzero",
    "item",
    "equal",
    "allclose",
    "nonzero",  # also x[mask]
    "nonzero_numpy",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
    "_assert_async",
}
STEPS = (1, 2, 3, 50, 51, 100, 101, 200, 201, 500, 501)
"""First steps, and those at which gaps of 50, 100, 200 and 500 fall due, counted either way."""


class HostRead(AssertionError):
    pass


class NoHostReads(TorchDispatchMode):
    """Refuses operators whose result, or the shape of it, the host has to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in READS or masked:
            raise HostRead(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


class NoHostCopies(TorchFunctionMode):
    """Refuses what reads a CPU tensor's memory without an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (*args[1:], *(kwargs or {}).values())
        copies = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)
        if func in copies or (func is Tensor.to and "cpu" in [x for x in given if isinstance(x, str)]):
            raise HostRead(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


def run(method: Method, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(shape, generator=generator).to(dtype)
    state = method.init(param)
    for step in STEPS:
        grad = torch.randn(shape, generator=generator).to(torch.promote_types(dtype, torch.float32))
        with NoHostReads(), NoHostCopies():
            method.update(grad, state, Context(step, step, step, 1e-3, param, generator, 7))


def variants() -> list[Any]:
    """Every method with its defaults, and with each other value that a Literal field of it allows."""
    made = []
    for name, entry in gossamer.methods().items():
        base: dict[str, Any] = {"rank": 3} if "rank" in entry.cls.__dataclass_fields__ else {}
        made.append(pytest.param(name, base, id=name))
        for field, choices in literals(entry.cls).items():
            for choice in choices:
                if choice != entry.cls.__dataclass_fields__[field].default:
                    made.append(pytest.param(name, {**base, field: choice}, id=f"{name}-{field}-{choice}"))
        for field, spec in entry.cls.__dataclass_fields__.items():
            if isinstance(spec.default, bool):
                made.append(pytest.param(name, {**base, field: not spec.default}, id=f"{name}-{field}-flipped"))
    return made


def literals(cls: type[Any]) -> dict[str, tuple[Any, ...]]:
    found = {}
    for field, hint in typing.get_type_hints(cls).items():
        for part in (hint, *typing.get_args(hint)):
            if typing.get_origin(part) is typing.Literal:
                found[field] = typing.get_args(part)
    return found


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)], ids=["tall", "wide"])
@pytest.mark.parametrize(("name", "fields"), variants())
def test_update_reads_nothing_on_the_host(name: str, fields: dict[str, Any], shape: tuple[int, int]) -> None:
    run(build(name, **fields), shape)


@pytest.mark.parametrize("name", [name for name, entry in gossamer.methods().items() if not entry.matrix_only])
def test_vectors_and_scalars_neither(name: str) -> None:
    for shape in [(5,), (), (2, 3, 4)]:
        run(build(name), shape, torch.bfloat16)


def test_the_variants_are_there() -> None:
    names = {str(v.id) for v in variants()}
    assert {"lora-pre-updates-sequential", "muon-adjust_lr_fn-match_rms_adamw", "muon-nesterov-flipped"} <= names


# ---- the net has no holes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Toy:
    """A method that does one thing to its gradient."""

    act: Callable[[Tensor], Any]

    def init(self, param: Tensor) -> State:
        return {}

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        self.act(grad)
        return grad


SINS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda g: g.norm().item(),
    "float": lambda g: float(g.sum()),
    "int": lambda g: int(g.argmax()),
    "branch": lambda g: g if g.norm() > 1 else -g,
    "any": lambda g: bool((g > 1).any()),
    "max of a tensor and a number": lambda g: max(1.0, g.norm()),
    "tolist": lambda g: g.tolist(),
    "numpy": lambda g: g.numpy().max(),
    "numpy's functions": lambda g: np.asarray(g),
    "cpu": lambda g: g.cpu(),
    "to cpu": lambda g: g.to("cpu"),
    "mask": lambda g: g[g > 0],
    "assignment by mask": lambda g: g.clone().__setitem__(g > 0, g[0, 0]),
    "nonzero": lambda g: g.nonzero(),
    "where of one argument": lambda g: torch.where(g > 0),
    "masked_select": lambda g: g.masked_select(g > 0),
    "unique": lambda g: g.unique(),
    "equal": lambda g: torch.equal(g, g),
    "allclose": lambda g: torch.allclose(g, g),
    "slice by a tensor": lambda g: g[: g.argmax()],
    "range over a tensor": lambda g: list(range(g.argmax())),
    "format": lambda g: f"{g.sum():.3f}",
}
VIRTUES: dict[str, Callable[[Tensor], Any]] = {
    "where": lambda g: torch.where(g > 0, g, -g),
    "clamp": lambda g: g.norm().clamp_min(1.0),
    "branch on a shape": lambda g: g if g.shape[0] > 3 else -g,
    "gather": lambda g: g.gather(1, g.argmax(1, keepdim=True)),
    "index": lambda g: g[torch.arange(2)],
    "svd, on the CPU: cuSOLVER's reads its convergence back, see gossamer.linalg": lambda g: torch.linalg.svd(
        g, full_matrices=False
    ),
    "qr": lambda g: torch.linalg.qr(g),
    "cholesky": lambda g: torch.linalg.cholesky_ex(g.mT @ g),
    "random": lambda g: torch.randn(g.shape, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("act", SINS.values(), ids=SINS)
def test_a_read_is_caught(act: Callable[[Tensor], Any]) -> None:
    with pytest.raises(HostRead):
        run(Toy(act), (12, 7))


@pytest.mark.parametrize("act", VIRTUES.values(), ids=VIRTUES)
def test_what_stays_on_the_device_passes(act: Callable[[Tensor], Any]) -> None:
    run(Toy(act), (12, 7))
