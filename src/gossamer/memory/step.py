"""What one optimizer step takes beside weights, gradients and state: counted by taking it on tensors without data.

The optimizer's own `step` runs on meta tensors that say of themselves that they are on a CPU, so that it goes the ways
it goes there. Each storage that an operator makes is followed until it is gone; views of one count once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.optim.contract import Method
from gossamer.optim.optimizer import Optimizer, init_state
from gossamer.optim.sweep import Sweep

CPU = torch.device("cpu")


class Kind(NamedTuple):
    """Parameters that a step treats alike."""

    method: Method
    shape: torch.Size
    dtype: torch.dtype


class Step(NamedTuple):
    """At most, in bytes, above what stays when the step is over."""

    transient: int
    """In an ordinary step."""
    first: int
    """In the first step, where projectors are computed; a later refresh of them takes no more."""


def count_step(kinds: Mapping[Kind, int], implementation: str) -> tuple[dict[Kind, Step], int]:
    """What a step on a CPU takes for each kind of parameter, and the bytes of the buffers that the optimizer keeps.

    The reference steps one parameter after another, so one of each kind is counted; a fused twin takes all of a kind.
    Not counted: what an operator's kernel allocates and frees inside, such as LAPACK's workspace.

    Args:
        kinds: how many parameters there are of each, in the model's order.
        implementation: as for `gossamer.Optimizer`.
    """
    for kind in kinds:
        _make_constants(kind.method, len(kind.shape), kind.dtype, implementation)
    together = implementation != "reference"
    params = {kind: [_hollow(kind) for _ in range(number if together else 1)] for kind, number in kinds.items()}
    groups = [{"params": members, "method": kind.method} for kind, members in params.items()]
    found: dict[Kind, Step] = {}
    with _few_tiles(), _OnCpu(), _NoData() as run:
        optimizer = Optimizer(groups, implementation=implementation)
        for _, param, group in optimizer.members():
            optimizer.state[param].update(init_state(group["method"], param))
        with Alive() as alive:
            for members in params.values():  # makes the buffers, for however many parameters they are
                _step(optimizer, members[:1], alive)
            scratch = alive.bytes
            for kind, members in params.items():
                run.number = 1
                first = _step(optimizer, members, alive)
                run.number = 2
                found[kind] = Step(_step(optimizer, members, alive), first)
    return found, scratch


class Alive(TorchDispatchMode):
    """Follows the bytes of storages that operators made within the block and that are still held."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[StorageWeakRef, int] = {}
        self._bound = 0  # on `bytes`, which takes long to find
        self.peak = 0
        """The most since the block began, or since this was last set."""

    @property
    def bytes(self) -> int:
        self._sizes = {storage: size for storage, size in self._sizes.items() if not storage.expired()}
        self._bound = sum(self._sizes.values())
        return self._bound

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if _returns_its_arguments(func):
            return out
        given = _storages(args)  # not every view says that it is one
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self._sizes[StorageWeakRef(storage)] = storage.nbytes()
                self._bound += storage.nbytes()
                if self._bound > self.peak:
                    self.peak = max(self.peak, self.bytes)
        return out


class _Look(NamedTuple):
    """All that there is to a tensor without data."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _NoData(TorchDispatchMode):
    """Sends what is made to the meta device, leaves out what only writes, and says `number` where a value is read.

    The driver reads one value before a step: how many came before. Operators whose arguments look as they did before
    are not asked again what their results look like: that takes longer than all the rest.
    """

    number = 1

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[Any, _Look | tuple[_Look, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return float(self.number)
        if (written := _written(func)) is not None:
            return written(args, kwargs)
        if kwargs.get("device") == CPU:
            kwargs = {**kwargs, "device": "meta"}
        args = tuple(map(_without_data, args))
        key = (func, *map(_look, args), *((name, _look(value)) for name, value in kwargs.items()))
        if (made := self._known.get(key)) is None:
            out = func(*args, **kwargs)
            if _is_new(out, args):
                self._known[key] = tuple(map(_look, out)) if isinstance(out, tuple) else _look(out)
            return out
        return _empty(made) if isinstance(made, _Look) else tuple(map(_empty, made))


class _OnCpu(TorchFunctionMode):
    """Every tensor says that it is on a CPU, and refuses to say where: there is nothing for compiled code to read."""

    ANSWERS: Mapping[Any, Any] = {
        Tensor.device.__get__: CPU,  # pyright: ignore
        Tensor.is_cpu.__get__: True,  # pyright: ignore
        Tensor.is_meta.__get__: False,  # pyright: ignore
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.data_ptr:
            raise RuntimeError("count_step: data_ptr() of a tensor without data; leave this to operators of torch")
        return self.ANSWERS[func] if func in self.ANSWERS else func(*args, **kwargs or {})


@contextmanager
def _few_tiles() -> Iterator[None]:
    """Leave out tiles that are like the one before them and the one after: a large model has a hundred thousand."""
    rows = Sweep.rows

    def ends(self: Sweep) -> Iterator[slice]:
        every = list(rows(self))
        yield from every[:2]
        yield from every[2:][-1:]

    Sweep.rows = ends
    try:
        yield
    finally:
        Sweep.rows = rows


@cache
def _make_constants(method: Method, dimensions: int, dtype: torch.dtype, implementation: str) -> None:
    """Step a real parameter: constants that a method makes once and keeps (8-bit codes) must not be without data."""
    param = nn.Parameter(torch.ones((2,) * dimensions, dtype=dtype))
    param.grad = torch.ones_like(param)
    Optimizer([{"params": [param], "method": method}], implementation=implementation).step()


def _hollow(kind: Kind) -> nn.Parameter:
    return nn.Parameter(torch.empty(kind.shape, dtype=kind.dtype, device="meta"))


def _step(optimizer: Optimizer, params: list[nn.Parameter], alive: Alive) -> int:
    """Step these parameters; returns the peak of what was gone afterwards."""
    for param in params:
        param.grad = torch.empty_like(param)
    alive.peak = alive.bytes
    optimizer.step()
    peak = alive.peak - alive.bytes
    for param in params:
        param.grad = None
    return peak


def _look(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Look(value.shape, value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(_look, value))
    return type(value), None if isinstance(value, torch.Generator) else value  # 1 is not 1.0


def _without_data(value: Any) -> Any:
    """A constant's stand-in."""
    has_data = isinstance(value, Tensor) and value.untyped_storage().device == CPU
    return _empty(_look(value)) if has_data else value


def _empty(look: _Look) -> Tensor:
    return torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device="meta")


def _is_new(out: Any, args: Any) -> bool:
    """Whether an operator's results are tensors of their own, with nothing between or behind their entries."""
    given = _storages(args)
    return all(
        isinstance(tensor, Tensor)
        and tensor.untyped_storage()._cdata not in given
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        for tensor in (out if isinstance(out, tuple) else (out,))
    )


def _storages(args: Any) -> set[int]:
    return {arg.untyped_storage()._cdata for arg in args if isinstance(arg, Tensor)}


@cache
def _returns_its_arguments(func: Any) -> bool:
    return all(result.alias_info is not None for result in func._schema.returns)


@cache
def _written(func: Any) -> Callable[[Any, Any], Any] | None:
    """For an operator that only writes into one of its arguments: what finds that argument, which is its result."""
    schema = func._schema
    results = [result.alias_info for result in schema.returns]
    if torch.Tag.inplace_view in func.tags or not all(alias and alias.is_write for alias in results):
        return None
    if not results:  # lists are written into, or nothing is
        return lambda args, kwargs: None
    places = [
        (index, argument)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if len(places) != 1:
        return None
    ((index, argument),) = places
    if argument.kwarg_only:
        return lambda args, kwargs: kwargs[argument.name]
    return lambda args, kwargs: args[index]
