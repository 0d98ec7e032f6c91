"""A parameter whose rows lie in several processes, as FSDP2 leaves them: DTensors sharded on their first dimension.

Every process of a mesh dimension holds consecutive rows, the last ones fewer or none. Along other mesh dimensions the
parameter is replicated, and replicas do the same work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from gossamer.errors import UserError
from gossamer.rows import HERE, Rows


@dataclass(frozen=True)
class ShardedRows(Rows):
    """The rows of one parameter, of which this process has some. All methods are collective."""

    mesh: DeviceMesh
    axis: int
    """The mesh dimension along which the rows lie."""
    height: int
    """Rows in all processes."""
    owner: int
    """Who gathers the matrix for `whole`."""

    @cached_property
    def group(self) -> dist.ProcessGroup:
        return self.mesh.get_group(self.axis)

    @cached_property
    def counts(self) -> list[int]:
        """The rows of each process."""
        size = self.mesh.size(self.axis)
        return [Shard.local_shard_size_and_offset(self.height, size, rank)[0] for rank in range(size)]

    @cached_property
    def place(self) -> int:
        """Of this process among those that share the rows."""
        return self.mesh.get_local_rank(self.axis)

    @cached_property
    def offset(self) -> int:
        """The first of my rows."""
        return sum(self.counts[: self.place])

    def shape(self, x: Tensor) -> tuple[int, ...]:
        return self.height, *x.shape[1:]

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x

    def hypot(self, norms: Tensor) -> Tensor:
        # fp64: squares of fp32 numbers do not overflow there
        return self.sum(norms.double().square_()).sqrt_().to(norms.dtype)

    def largest(self, x: Tensor) -> Tensor:
        mine = x.abs().amax() if x.numel() else x.new_zeros(())
        found = mine.new_empty(len(self.counts))
        dist.all_gather(list(found.split(1)), mine.reshape(1), group=self.group)
        return found.amax()  # here rather than in the collective, where a NaN may get lost

    def any(self, where: Tensor) -> Tensor:
        return self.sum(where.any().to(torch.int32)) > 0

    def gather(self, x: Tensor) -> Tensor:
        most = self.counts[0]
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        every = x.new_empty(len(self.counts) * most, *x.shape[1:])
        dist.all_gather(list(every.split(most)), padded, group=self.group)
        return every[: self.height]  # only the last rows are ever padding

    def mine(self, x: Tensor) -> Tensor:
        return x[self.offset : self.offset + self.counts[self.place]]

    def whole(self, function: Callable[[Tensor], Tensor], x: Tensor, shape: tuple[int, ...]) -> Tensor:
        matrix = collect([Part(self, x) if rank == self.owner else None for rank in range(len(self.counts))])()
        result = x.new_empty(shape) if matrix is None else function(matrix).contiguous()
        dist.broadcast(result, group_src=self.owner, group=self.group)
        return result


# --- where a parameter and its state lie ---


@dataclass(frozen=True)
class Layout:
    """How a DTensor parameter lies over its mesh."""

    mesh: DeviceMesh
    axis: int | None
    """The mesh dimension along which its rows lie; None if every process has all."""
    device: torch.device
    """Of the parts: under CPU offloading not the mesh's."""
    rows: Rows

    def placements(self, dim: int | None) -> list[Placement]:
        """Of a tensor whose dimension `dim` runs along the parameter's rows; None: every process has all of it."""
        shard = Replicate() if dim is None else Shard(dim)
        return [shard if axis == self.axis else Replicate() for axis in range(self.mesh.ndim)]

    def zeros(self, like: Tensor, dim: int | None) -> DTensor:
        """Of the shape and dtype of `like`, in the mesh."""
        shape = list(like.shape)
        if dim is not None and isinstance(self.rows, ShardedRows):
            shape[dim] = self.rows.counts[self.rows.place]
        mine = torch.zeros(shape, dtype=like.dtype, device=self.device)
        return self.wrap(mine, like.shape, dim)

    def wrap(self, mine: Tensor, shape: Sequence[int], dim: int | None) -> DTensor:
        """The DTensor of this shape of which `mine` is this process's part."""
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            mine, self.mesh, self.placements(dim), run_check=False, shape=torch.Size(shape), stride=strides
        )

    def put(self, value: Tensor, dim: int | None) -> DTensor:
        """A copy of `value`, whole or however it is sharded, with its dimension `dim` along the rows."""
        placements = self.placements(dim)
        if isinstance(value, DTensor) and (value.device_mesh, list(value.placements)) != (self.mesh, placements):
            value = value.full_tensor()
        if not isinstance(value, DTensor):
            value = distribute_tensor(value.to(self.mesh.device_type), self.mesh, placements, src_data_rank=None)
        return self.wrap(value.to_local().to(self.device, copy=True), value.shape, dim)


def layout(name: str, param: Tensor, key: int) -> Layout | None:
    """How a parameter lies over processes; None if it is an ordinary tensor.

    Args:
        key: chooses who owns the matrix where one process must.

    Raises:
        UserError: it is neither replicated nor sharded on its rows, or its gradient lies otherwise.
    """
    if not isinstance(param, DTensor):
        return None
    mesh, axes = param.device_mesh, []
    for axis, placement in enumerate(param.placements):
        if type(placement) is Shard and placement.dim == 0:
            axes.append(axis)
        elif not isinstance(placement, Replicate):
            axes += [axis, axis]
    if len(axes) > 1:
        raise UserError(
            f"Optimizer: {name!r} is placed {_words(param)}; allowed: Shard(0) in one mesh dimension (rows, as FSDP2 "
            "shards), Replicate() in the others"
        )
    if isinstance(param.grad, DTensor) and param.grad.placements != param.placements:
        raise UserError(
            f"Optimizer: the gradient of {name!r} is placed {_words(param.grad)}; allowed: as the parameter, "
            f"{_words(param)}"
        )
    axis = axes[0] if axes else None
    if axis is None or mesh.size(axis) == 1:
        return Layout(mesh, axis, param.to_local().device, HERE)
    rows = ShardedRows(mesh, axis, param.shape[0], key % mesh.size(axis))
    return Layout(mesh, axis, param.to_local().device, rows)


def _words(tensor: DTensor) -> str:
    return "(" + ", ".join(map(repr, tensor.placements)) + ")"


PROBE = 1 << 20
"""No rank that a method was given cuts a matrix whose sides are this long."""
MORE = (0, 1, 7)
"""Rows more than that: what grows with blocks of them does not grow by one for one."""


def dims_of_rows(init: Callable[[Tensor], dict[str, Tensor]], shape: tuple[int, ...]) -> dict[str, int | None] | None:
    """Which dimension of each tensor of a state runs along the parameter's rows, or None where a tensor does not.

    Found out on the meta device, with a matrix scaled up so that no rank is cut, and a few rows more.

    Returns:
        None if the state follows the rows in another way, or cannot be made for any number of them.
    """
    if not shape:  # a number has no rows
        return dict.fromkeys(init(torch.empty((), device="meta")))
    scale = -(-PROBE // min(shape[:2])) if len(shape) == 2 else PROBE
    height, rest = scale * shape[0], (scale * shape[1],) if len(shape) == 2 else shape[1:]
    try:
        base, *taller = (init(torch.empty(height + more, *rest, device="meta")) for more in MORE)
    except UserError:
        return None
    found: dict[str, int | None] = {}
    for key, tensor in base.items():
        shapes = [state[key].shape for state in taller]
        dims = [dim for dim, length in enumerate(tensor.shape) if any(shape[dim] != length for shape in shapes)]
        lengths = [shape[dim] for dim in dims for shape in (tensor.shape, *shapes)]
        if lengths not in ([], [height + more for more in MORE]):
            return None
        found[key] = dims[0] if dims else None
    return found


# --- matrices on their way to one process and back ---


class Part(NamedTuple):
    """My rows of a matrix."""

    rows: ShardedRows
    x: Tensor

    def sizes(self) -> list[int]:
        """Bytes that each process has of it."""
        row = self.x.shape[1:].numel() * self.x.element_size()
        return [count * row for count in self.rows.counts]


Wave = Sequence[Part | None]
"""A matrix for each process to own, or None: my part of each."""


def collect(wave: Wave) -> Callable[[], Tensor | None]:
    """Send every owner its rows. Returns at once; what is returned waits for the matrix that is mine, if one is."""
    parts = [part for part in wave if part is not None]
    sizes = [0 if part is None else part.x.nbytes for part in wave]
    mine = wave[parts[0].rows.place]
    arrived = _exchange([part.x for part in parts], sizes, [0] * len(wave) if mine is None else mine.sizes(), parts[0])

    def matrix() -> Tensor | None:
        received = arrived()
        return None if mine is None else received.view(mine.x.dtype).view(mine.rows.shape(mine.x))

    return matrix


def deliver(wave: Wave, result: Tensor | None) -> Callable[[], list[Tensor | None]]:
    """Send every process its rows of my result, of my matrix's shape and dtype. What is returned waits for mine."""
    like = next(part for part in wave if part is not None)
    mine, sent = wave[like.rows.place], [] if result is None else [result]
    sizes = [0 if part is None else part.x.nbytes for part in wave]
    arrived = _exchange(sent, [0] * len(wave) if mine is None else mine.sizes(), sizes, like)

    def parts() -> list[Tensor | None]:
        received = arrived().split(sizes)  # cloned: a part of another dtype may have left it unaligned
        return [
            None if part is None else some.clone().view(part.x.dtype).view(part.x.shape)
            for part, some in zip(wave, received, strict=True)
        ]

    return parts


def _exchange(tensors: Sequence[Tensor], sizes: list[int], arriving: list[int], like: Part) -> Callable[[], Tensor]:
    """Bytes to all and from all of the group of `like`; what is returned waits for those that arrive."""
    received = torch.empty(sum(arriving), dtype=torch.uint8, device=like.x.device)
    sent = torch.cat([received[:0], *(tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors)])
    work: Any = dist.all_to_all_single(received, sent, arriving, sizes, group=like.rows.group, async_op=True)

    def arrived() -> Tensor:
        work.wait()
        return received

    return arrived
