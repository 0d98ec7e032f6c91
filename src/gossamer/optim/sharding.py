"""A parameter of which other processes hold rows: how its method steps it, and where its state lies.

"sharded"   the method is given my rows, and asks `ctx.rows` about the others
"owner"     the same, but one question is about the whole matrix, which one process answers
"whole"     the method does not know rows: every process gathers the gradient and does all the work
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from gossamer.optim.contract import Method, State, entry_of

# gossamer.distributed is imported where a DTensor was seen: without one nothing of it is needed


def is_placed(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """The part of a tensor that lies here; it shares memory."""
    return tensor.to_local() if is_placed(tensor) else tensor


def blank(param: Tensor) -> Tensor:
    """An ordinary tensor on the meta device, of the whole parameter's shape and dtype."""
    return torch.empty(param.shape, dtype=param.dtype, device="meta")


def layout_of(name: str, param: Tensor, key: int) -> Any:
    """`distributed.shards.layout`."""
    if not is_placed(param):
        return None
    from gossamer.distributed.shards import layout

    return layout(name, param, key)


@cache
def dims_of_rows(method: Method, shape: tuple[int, ...]) -> Mapping[str, int | None] | None:
    """`distributed.shards.dims_of_rows` of a method's state; None if it cannot be given some rows of this shape."""
    from gossamer.distributed.shards import dims_of_rows

    return dims_of_rows(method.init, shape) if entry_of(method).by_rows else None


def how(method: Method, shape: tuple[int, ...]) -> str:
    """How a DTensor is stepped: the module's first words."""
    if dims_of_rows(method, shape) is None:
        return "whole"
    return "owner" if hasattr(method, "parts") else "sharded"


def fresh(method: Method, param: Tensor, layout: Any) -> State:
    """A method's fresh state as DTensors on the parameter's mesh."""
    dims = dims_of_rows(method, tuple(param.shape))
    if dims is None:
        whole = method.init(torch.empty(param.shape, dtype=param.dtype, device=local(param).device))
        return {key: layout.wrap(tensor, tensor.shape, None) for key, tensor in whole.items()}
    return {key: layout.zeros(tensor, dims[key]) for key, tensor in method.init(blank(param)).items()}


def putter(name: str, method: Method, param: Tensor) -> Callable[[str, Tensor], Tensor]:
    """What copies a tensor of a saved state, by its key, to where it belongs: to the parameter's device or mesh."""
    layout = layout_of(name, param, 0)
    if layout is None:
        return lambda _, value: value.to(param.device, copy=True, memory_format=torch.contiguous_format)
    dims = dims_of_rows(method, tuple(param.shape)) or {}
    return lambda key, value: layout.put(value, dims.get(key))


def norm(tensor: Tensor) -> Tensor:
    """Euclidean, of the whole tensor, in float64."""
    found: Any = tensor.double().norm()
    return found.full_tensor() if is_placed(found) else found
