"""One process or many, started by `torchrun`: the training loop asks here and never for a rank."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from gossamer.distributed.pulse import Pulse
from gossamer.errors import UserError, first_line

T = TypeVar("T")

_groups = itertools.count()
"""Every process of a run joins as often as the others."""


@dataclass(frozen=True)
class World:
    """The processes that train together; `size` is 1 without `torchrun`."""

    rank: int
    size: int
    device: torch.device
    restarted: bool = False
    """Whether `torchrun` started these processes anew after others had died."""
    pulse: Pulse | None = field(default=None, compare=False)

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

    def turns(self, total: int) -> range:
        """This process's part of `total` pieces of work: every `size`-th."""
        return range(self.rank, total, self.size)

    def most(self, here: int) -> int:
        """The largest of all processes' numbers."""
        value = torch.tensor(here, device=self.device)
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return bool(self.sum(torch.tensor(float(here), device=self.device)))

    def from_main(self, do: Callable[[], T]) -> T:
        """What `do` returns on the main process, which alone calls it; its `UserError` is raised on every one."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = do()
            except UserError as error:
                outcome[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]

    @cached_property
    def background(self) -> dist.ProcessGroup | None:
        """All processes again, on the CPU, for a thread beside the training; None for a process alone."""
        return dist.new_group(backend="gloo") if self.size > 1 else None  # pyright: ignore[reportReturnType]

    def seed(self, seed: int) -> None:
        """Seed torch's global generator: in each process differently, as dropout on other rows has to be."""
        torch.manual_seed((seed + self.rank) % 2**63)

    def random_states(self) -> dict[str, Tensor]:
        """Of torch's global generators here, named by process."""
        states = {f"{self.rank}.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states[f"{self.rank}.cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def set_random_states(self, states: dict[str, Tensor]) -> None:
        """Go on from there; a process that was not there when they were taken goes on from its seed."""
        if (cpu := states.get(f"{self.rank}.cpu")) is not None:
            torch.set_rng_state(cpu)
        if self.device.type == "cuda" and (cuda := states.get(f"{self.rank}.cuda")) is not None:
            torch.cuda.set_rng_state(cuda, self.device)

    def parallel(self, model: nn.Module, how: str) -> nn.Module:
        """`model`, with its gradients averaged over processes.

        Args:
            how: "ddp", every process holds the whole model, or "fsdp2", its rows of every parameter, which are gathered
                a decoder layer at a time. The parameters of `model` are replaced then.
        """
        if self.size == 1:
            return model
        if how == "ddp":
            # buffers are the same by construction; sending the indices of sparse weights with every step would be slow
            return DistributedDataParallel(model, broadcast_buffers=False)
        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in _decoder_layers(model):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)  # pyright: ignore[reportReturnType]

    @contextlib.contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Reduce gradients in the last micro-batch of a step only."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one process met ends all of them, each with one line that says which process it was."""
        if self.pulse is None:
            yield
            return
        with self.pulse:
            try:
                yield
            except Exception as error:
                # a collective raises RuntimeError when its peers are gone or late; then they know why, and not this one
                reason = self.pulse.reason() if isinstance(error, RuntimeError) else None
                self.pulse.leave(reason or f"process {self.rank} of {self.size}: {first_line(error)}")
                if reason is None:
                    raise
                raise UserError(reason) from error


def _decoder_layers(model: nn.Module) -> list[nn.Module]:
    """What transformers says must lie together on one device."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def start(device: str, timeout: float = 600.0) -> World:
    """Join the processes that `torchrun` started, if it did.

    Args:
        device: "auto", "cpu" or "cuda". timeout: seconds after which a process that others wait for counts as lost.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: {device!r} is unknown; allowed: auto, cpu, cuda")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise UserError(f"device: {device!r} was asked for, but torch {torch.__version__} sees no CUDA device here")
    rank, size, local_rank = _launched()
    if use_cuda and size > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError("torchrun: LOCAL_RANK is not set, which says which GPU is whose; start with torchrun")
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"torchrun: LOCAL_RANK is {local_rank}, but there are {torch.cuda.device_count()} CUDA devices here; "
            "allowed: a process a device"
        )
    local = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(local)
    if size == 1 or dist.is_initialized():
        return World(rank, size, local)
    patience = timedelta(seconds=timeout)
    life = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    # NCCL ends the process from another thread and says little: leave the pulse time to speak first
    limit = patience + timedelta(seconds=60) if use_cuda else patience
    backend = "nccl" if use_cuda else "gloo"
    try:
        store, rank, size = next(rendezvous("env://", timeout=patience))
        # torchrun's store still holds the addresses of those that died, and of this process when it joined before
        store = PrefixStore(f"life {life}, group {next(_groups)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"torchrun: cannot join the other processes: {first_line(error)}") from error
    return World(rank, size, local, life > 0, Pulse(store, rank, size, timeout))


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


def of_main(device: str, do: Callable[[World], T]) -> T:
    """What `do` returns on the main process, which alone calls it, for all of them; they meet for it and part again."""
    try:
        world = start(device)
        return world.from_main(lambda: do(world))
    finally:
        stop()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
