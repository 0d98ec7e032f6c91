"""What a method is, by example.

    @register("sgd", paper="Robbins and Monro 1951", matrix_only=False)
    @dataclass(frozen=True)
    class SGD:
        def init(self, param): return {}
        def update(self, grad, state, ctx): return grad

A method is a frozen dataclass whose fields are its hyperparameters. It answers two questions: which tensors it keeps
for a parameter (`init`), and which direction a gradient means (`update`). Everything else -- learning rate, decay,
rounding of the write, saving, counting -- is the driver's (`optimizer.py`), which knows no method by name.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from gossamer.errors import UserError, nearest
from gossamer.rows import HERE, Rows

State = dict[str, Tensor]
"""What a method keeps for one parameter: flat, tensors only, so that it is saved, counted and sharded as it is.

A key `m` or `m_...` belongs to the first moment, `v` or `v_...` to the second. A fresh moment is all zeros, so that
`Optimizer.reset` can make one fresh; what a method draws at random it draws when `m_step` or `v_step` is 1. Of a method
that is registered `by_rows` the whole fresh state is zero, and a tensor of it has one dimension that grows with the
parameter's rows, or none: it is sharded along that one.
"""

MOMENTS = ("m", "v")


def moment_of(key: str) -> str | None:
    """The moment that a tensor of the state belongs to, or None: a projector, a counter."""
    head = key.partition("_")[0]
    return head if head in MOMENTS else None


class Context(NamedTuple):
    """What the driver tells a method about the step at hand."""

    step: int
    """Counts from 1 for each parameter."""
    m_step: int
    """Counts from 1 since the first moment was last zero: what its bias correction is about."""
    v_step: int
    """The same for the second moment."""
    lr: float | Tensor
    """Scheduled learning rate; the driver multiplies by it, a method only reads it."""
    param: Tensor
    """The parameter, before the step."""
    generator: torch.Generator
    """Random numbers that depend on (seed, parameter name, step) alone, on the parameter's device."""
    key: int
    """63 bits from (seed, parameter name) alone: the same at every step."""
    rows: Rows = HERE
    """What to ask about the rows that lie in other processes: gradient, parameter and state are of mine alone."""


def hash63(*parts: int | str) -> int:
    """A 63-bit seed that depends on the parts alone, on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@runtime_checkable
class Method(Protocol):
    """The contract. Implemented by frozen dataclasses; see the module's example."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def init(self, param: Tensor) -> State:
        """Fresh state for `param`. Depends on its shape, dtype and device alone; must also run on the meta device."""
        ...

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        """Advance `state` in place and return the direction to descend, of the shape of `grad`.

        `grad` is in the arithmetic dtype (fp32, or the parameter's own if wider) and must not be written to.
        """
        ...


@dataclass(frozen=True)
class Entry:
    """One line of the registry."""

    name: str
    cls: type[Any]
    paper: str
    matrix_only: bool
    by_rows: bool

    @property
    def summary(self) -> str:
        """The first line of the method's docstring."""
        return (self.cls.__doc__ or "").strip().splitlines()[0]


_entries: dict[str, Entry] = {}
T = TypeVar("T")


def register(name: str, *, paper: str, matrix_only: bool = True, by_rows: bool = False):
    """Class decorator: make a method known under `name`.

    Args:
        matrix_only: only parameters with two dimensions can be given to it.
        by_rows: it may be given some rows of a parameter, because it asks `ctx.rows` wherever it reduces over rows.
            Where a parameter is sharded, a method that does not say so is given all rows in every process.
    """

    def decorate(cls: type[T]) -> type[T]:
        if name in _entries:
            raise ValueError(f"register: the name {name!r} is taken by {_entries[name].cls.__qualname__}")
        _entries[name] = Entry(name, cls, paper, matrix_only, by_rows)
        return cls

    return decorate


@cache
def _import_all() -> None:
    package = importlib.import_module("gossamer.optim.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def methods() -> dict[str, Entry]:
    """Every registered method by name, in alphabetical order. Imports every file of `methods/`."""
    _import_all()
    return dict(sorted(_entries.items()))


def find(name: str) -> Entry:
    """The method called `name`, or an error that names the nearest one."""
    known = methods()
    if name not in known:
        raise UserError(f"method: unknown {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]


def entry_of(method: object) -> Entry:
    """The registry's line for a method object."""
    for entry in methods().values():
        if entry.cls is type(method):
            return entry
    raise UserError(f"method: {type(method).__qualname__} is not registered; decorate it with @gossamer.register(name)")


def describe(method: Method) -> dict[str, Any]:
    """Name and hyperparameters as plain data, for checkpoints and logs."""
    return {"name": entry_of(method).name, **asdict(method)}


def build(name: str, **hyperparameters: Any) -> Method:
    """The inverse of `describe`. A list from JSON becomes the tuple it was."""
    cls = find(name).cls
    known = [field.name for field in fields(cls)]
    for key in hyperparameters:
        if key not in known:
            raise UserError(f"{name}: unknown hyperparameter {key!r}{nearest(key, known)}; known: {', '.join(known)}")
    return hashable(cls(**hyperparameters))


def hashable(method: Method) -> Method:
    """The method with tuples for the lists among its fields, as JSON and YAML have them: groups go by methods."""
    values: Any = {field.name: getattr(method, field.name) for field in fields(method)}
    lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return replace(method, **lists) if lists else method


def check_decay(method: str, field: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise UserError(f"{method}: {field} is {value}; allowed: 0 <= {field} < 1")


def check_adam(method: str, betas: tuple[float, float], eps: float) -> None:
    """The range checks that every Adam-like method shares."""
    for i, beta in enumerate(betas, 1):
        check_decay(method, f"beta{i}", beta)
    if eps < 0.0:
        raise UserError(f"{method}: eps is {eps}; allowed: eps >= 0")


def check_rank(method: str, rank: int) -> None:
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{method}: rank is {rank}; allowed: an integer >= 1")


def check_choice(method: str, **choices: tuple[str, tuple[str, ...]]) -> None:
    """`check_choice("x", updates=(value, allowed))` for each field given."""
    for field, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f"{method}: {field} is {value!r}{nearest(value, allowed)}; allowed: {', '.join(allowed)}")
