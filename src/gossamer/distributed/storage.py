"""Tensors in plain safetensors files, written and read by many processes at once, each its own part.

    save(folder, {"optimizer/layer.weight.m": tensor, ...})     # folder/optimizer.safetensors holds "layer.weight.m"
    load(folder, {"optimizer/layer.weight.m": other, ...})      # of whatever number of processes and placement

`torch.distributed.checkpoint` plans who writes and who reads what; only the storage is ours. Its own ends in a
`.metadata` file that is a pickle, which runs code when it is opened. Here the processes write their rows into one file
of whole tensors, in place: the layout follows from the shapes, so that no process gathers anything, the file says
nothing of how many wrote it, and any reader of safetensors opens it. The file system has to let processes write
different parts of one file, as local disks, NFS, Lustre and GPFS do.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

from gossamer.errors import UserError, first_line

# one process is no mistake here
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)

Layout = dict[str, tuple[str, int]]
"""Of each tensor: its file's name and the byte at which it begins there."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(folder: Path, tensors: dict[str, Tensor], finish: Callable[[], None]) -> None:
    """Write `tensors`, named "file/name", into `folder`, then call `finish` on the first process.

    Sharded tensors are written by whoever holds the rows, others by one process. Every process calls this with the same
    names; it returns when all is done, and raises on all of them what any of them met.
    """
    try:
        state_dict_saver.save(tensors, storage_writer=_Writer(folder, finish), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise _cause(error) from None


def save_behind(
    folder: Path, tensors: dict[str, Tensor], finish: Callable[[], None], group: dist.ProcessGroup | None
) -> Callable[[], None]:
    """As `save`, from a thread, out of a copy on the CPU that is made first.

    Args:
        group: of all processes, on the CPU, used by nothing else; None for a process alone.

    Returns a function that waits for the end and raises what any process met.
    """
    writer = _Writer(folder, finish)
    future = state_dict_saver.async_save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    assert isinstance(future, Future)

    def wait() -> None:
        try:
            future.result()
        except CheckpointException as error:
            raise _cause(error) from None

    return wait


def load(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read into `tensors` in place, each process the part that it holds, from what any number of processes saved.

    Raises:
        UserError: a tensor is missing, or has another shape or dtype.
    """
    there = {key: (tuple(md.size), md.properties.dtype) for key, md in _Reader(folder).metadata()}
    for key, tensor in tensors.items():
        ours = tuple(tensor.shape), tensor.dtype
        if there.get(key) != ours:
            raise UserError(f"{folder}: {key} is {_show(there.get(key))} there and {_show(ours)} here")
    try:
        state_dict_loader.load(tensors, storage_reader=_Reader(folder), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise _cause(error) from None


def names(folder: Path) -> set[str]:
    """Of the tensors in `folder`, as "file/name"."""
    return {name for name, _ in _Reader(folder).metadata()}


def write_file(path: Path, tensors: Iterable[tuple[str, torch.Size, torch.dtype, Callable[[], Tensor]]]) -> None:
    """A safetensors file of tensors that are made when it is their turn, and of which one is held at a time."""
    rows = list(tensors)
    layout = _lay_out(path, {name: (shape, dtype) for name, shape, dtype, _ in rows})
    with path.open("r+b") as file:
        for name, _, _, make in rows:
            _pwrite(file.fileno(), _bytes(make()), layout[name][1])


class _Writer(StorageWriter):
    """Where torch puts its tensors."""

    def __init__(self, folder: Path, then: Callable[[], None]) -> None:
        self.folder, self.then = folder, then

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the first process: make the files, of their full size, and tell everyone what begins where."""
        files: dict[str, dict[str, tuple[torch.Size, torch.dtype]]] = {}
        for item in itertools.chain.from_iterable(plan.items for plan in plans):
            data = item.tensor_data
            assert data is not None, f"{item.index.fqn} is no tensor"
            stem, _, name = item.index.fqn.partition("/")
            files.setdefault(stem, {})[name] = data.size, data.properties.dtype
        layout: Layout = {}
        for stem, tensors in files.items():
            places = _lay_out(self.folder / f"{stem}.safetensors", tensors)
            layout |= {f"{stem}/{name}": place for name, place in places.items()}
        return [replace(plan, storage_data=layout) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[Any]]:
        layout: Layout = plan.storage_data
        by_file = sorted(plan.items, key=lambda item: layout[item.index.fqn])
        for file, items in itertools.groupby(by_file, lambda item: layout[item.index.fqn][0]):
            # for writing alone: then a client of NFS sends the bytes it was given and not the page around them
            descriptor = os.open(self.folder / file, os.O_WRONLY)
            try:
                for item in items:
                    data = item.tensor_data
                    assert data is not None
                    content = _bytes(planner.resolve_data(item))  # pyright: ignore[reportArgumentType]
                    width = data.properties.dtype.itemsize
                    begin, done = layout[item.index.fqn][1], 0
                    for start, length in _runs(data.chunk, data.size):
                        _pwrite(descriptor, content[done : done + length * width], begin + start * width)
                        done += length * width
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        future = torch.futures.Future()
        future.set_result([])
        return future

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """On the first process, when every process has written all of its own."""
        self.then()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # found by no name, only given


class _Reader(StorageReader):
    """Where torch finds them: every safetensors file of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def reset(self, checkpoint_id: Any = None) -> None: ...

    def metadata(self) -> Iterator[tuple[str, TensorStorageMetadata]]:
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    piece = file.get_slice(name)
                    size = torch.Size(piece.get_shape())
                    whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
                    properties = TensorProperties(DTYPES[piece.get_dtype()])
                    yield f"{path.stem}/{name}", TensorStorageMetadata(properties, size, [whole])

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(dict(self.metadata()))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None: ...

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        stem_of = lambda item: item.storage_index.fqn.partition("/")[0]  # noqa: E731
        for stem, items in itertools.groupby(sorted(plan.items, key=stem_of), stem_of):
            with safe_open(self.folder / f"{stem}.safetensors", "pt") as file:
                for item in items:
                    name = item.storage_index.fqn.partition("/")[2]
                    slices = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    target = planner.resolve_tensor(item)
                    target.copy_(file.get_slice(name)[slices] if slices else file.get_tensor(name))
                    planner.commit_tensor(item, target)
        future = torch.futures.Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def _lay_out(path: Path, tensors: dict[str, tuple[torch.Size, torch.dtype]]) -> Layout:
    """Make a safetensors file of its full size, without the data; widest entries first, so that all are aligned."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (size, dtype) in sorted(tensors.items(), key=lambda row: (-row[1][1].itemsize, row[0])):
        if dtype not in NAMES:
            raise UserError(f"{path}: {name} is {dtype}; allowed: {', '.join(map(str, NAMES))}")
        start, end = end, end + math.prod(size) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: (path.name, 8 + len(text) + header[name]["data_offsets"][0]) for name in tensors}


def _runs(chunk: ChunkStorageMetadata, size: torch.Size) -> Iterator[tuple[int, int]]:
    """Where a chunk's entries lie in the whole tensor: (first, number) of each contiguous run, in the chunk's order."""
    if 0 in chunk.sizes:
        return
    cut = len(size)
    while cut > 0 and chunk.sizes[cut - 1] == size[cut - 1]:
        cut -= 1
    inner = max(cut - 1, 0)  # this dimension and those behind it lie together
    length = math.prod(chunk.sizes[inner:])
    for outer in itertools.product(*map(range, chunk.sizes[:inner])):
        place = [o + i for o, i in zip(chunk.offsets, (*outer, *[0] * (len(size) - inner)), strict=True)]
        yield sum(p * math.prod(size[d + 1 :]) for d, p in enumerate(place)), length


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _pwrite(descriptor: int, content: memoryview, place: int) -> None:
    while content:  # a disk that fills up may take a part of it first
        written = os.pwrite(descriptor, content, place)
        content, place = content[written:], place + written


def _cause(error: CheckpointException) -> BaseException:
    """What the first process that failed met."""
    rank, (cause, _) = min(error.failures.items())
    if len(error.failures) == 1 and rank > 0 and isinstance(cause, OSError | SafetensorError):
        return OSError(f"process {rank}: {first_line(cause)}")
    return cause


def _show(found: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return f"{found[1]} of shape {found[0]}" if found else "missing"
