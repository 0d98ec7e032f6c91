"""One process or many, started by `torchrun`: the training loop asks here and never for a rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gossamer.errors import UserError, first_line


@dataclass(frozen=True)
class World:
    """The processes that train together; `size` is 1 without `torchrun`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and checkpoints."""
        return self.rank == 0

    def share(self, total: int) -> slice:
        """This process's part of `total` rows."""
        if total % self.size:
            raise UserError(f"batch_size: {total} rows cannot be split evenly over {self.size} processes")
        part = total // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def parallel(self, model: nn.Module) -> nn.Module:
        """`model`, with its gradients averaged over processes."""
        # buffers are the same by construction; sending the indices of sparse weights with every step would be slow
        return DistributedDataParallel(model, broadcast_buffers=False) if self.size > 1 else model

    @contextlib.contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Reduce gradients in the last micro-batch of a step only."""
        with contextlib.nullcontext() if last or self.size == 1 else model.no_sync():  # pyright: ignore
            yield


def start(device: str) -> World:
    """Join the processes that `torchrun` started, if it did. `device` is "auto", "cpu" or "cuda"."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: {device!r} is unknown; allowed: auto, cpu, cuda")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise UserError(f"device: {device!r} was asked for, but torch {torch.__version__} sees no CUDA device here")
    rank, size, local_rank = _launched()
    local = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(local)
    if size > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if use_cuda else "gloo")
        except (RuntimeError, ValueError) as error:
            raise UserError(f"torchrun: cannot join the other processes: {first_line(error)}") from error
    return World(rank, size, local)


def _launched() -> tuple[int, int, int]:
    """This process's rank, how many there are, and its rank on this machine: 0, 1, 0 without `torchrun`."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 1, 0
    size = _variable("WORLD_SIZE", 1)
    rank = _variable("RANK", 0)
    if rank >= size:
        raise UserError(f"torchrun: RANK is {rank}, but WORLD_SIZE is {size}")
    if size > 1:
        if not os.environ.get("MASTER_ADDR"):
            raise UserError("torchrun: MASTER_ADDR is not set, but WORLD_SIZE is above 1; start with torchrun")
        _variable("MASTER_PORT", 1)
    return rank, size, _variable("LOCAL_RANK", 0) if "LOCAL_RANK" in os.environ else 0


def _variable(name: str, least: int) -> int:
    """A whole number that `torchrun` sets."""
    text = os.environ.get(name)
    if text is None:
        raise UserError(
            f"torchrun: {name} is not set, but others of its variables are; start with torchrun, or unset them"
        )
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"torchrun: {name} is {text!r}; allowed: an integer >= {least}")
    return int(text)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put_(param: Tensor, value: Tensor) -> None:
    """Copy the whole `value` into a parameter that may be sharded or replicated; every process takes the first one's.

    What each process computed for itself may differ in the last bit where their hardware or libraries do.
    """
    value = value.to(param.dtype)
    if isinstance(param, DTensor):
        param.copy_(distribute_tensor(value, param.device_mesh, param.placements))
        return
    if dist.is_initialized():
        value = value.contiguous()
        dist.broadcast(value, src=0)
    param.copy_(value)
