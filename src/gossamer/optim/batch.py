"""Same-shaped parameters that step together, in a handful of kernel launches.

A method that can do so offers, beside `update`, its readable reference:

    def can_launch(self, param):          # whether the kernels take this parameter
    def launch_(self, batch):             # one step of all of them, state and weights

It advances every state as `update` does, and writes every weight itself. A number that changes from step to step enters
a kernel through a table on the device, computed there from the counters and the learning rate; nothing is read back.
So the launches of one step are those of every other, and a CUDA graph can hold them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn

from gossamer.kernels import Tables
from gossamer.optim.contract import Context, State

LARGEST_RANK = {torch.bfloat16: 128, torch.float32: 64}
"""Up to which a compiled kernel keeps all it works on in registers, by the dtypes of the weights that kernels step."""


def fits(param: Tensor, rank: int = 0) -> bool:
    """Whether kernels take this parameter: dense, in one piece, of a dtype they know; with a rank, a matrix
    of fewer than 2^31 entries."""
    plain = type(param) in (Tensor, nn.Parameter) and param.is_contiguous() and param.numel() > 0
    largest = LARGEST_RANK.get(param.dtype, -1)
    return plain and rank <= largest and (rank == 0 or (param.ndim == 2 and param.numel() < 2**31))


def aligned(tensors: list[Tensor], width: int) -> bool:
    """Whether the hardware can take all in pieces of 16 bytes, in rows of this width."""
    return all(t.data_ptr() % 16 == 0 and width * t.element_size() % 16 == 0 for t in tensors)


def largest(x: Tensor) -> Tensor:
    """(L,): the largest magnitude in each matrix of a stack; NaN where one is."""
    return torch.linalg.vector_norm(x, torch.inf, (1, 2))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """L parameters of one group, shape, dtype and device, at their own steps.

    It holds the tables that its launches read: a captured graph lives no longer than its batch.
    """

    params: list[Tensor]
    """Each contiguous."""
    grads: list[Tensor]
    """As autograd left them, of one dtype, fp32 or bf16."""
    states: list[State]
    """With the counters already advanced to this step."""
    contexts: list[Context]
    lr: float | Tensor
    weight_decay: float
    maximize: bool
    rounding: str
    """"stochastic" or "nearest"."""

    @property
    def shape(self) -> torch.Size:
        return self.params[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def sign(self) -> float:
        """What the gradients are to be multiplied by."""
        return -1.0 if self.maximize else 1.0

    @cached_property
    def gradients(self) -> list[Tensor]:
        """The gradients, each contiguous: one that is not is copied."""
        return [grad.contiguous() for grad in self.grads]

    def pointers(self, tensors: list[Tensor]) -> Tensor:
        """(L,) int64 on the device: where each tensor begins. The caller keeps the tensors."""
        return self._table(tensor.data_ptr() for tensor in tensors)

    @cached_property
    def _held(self) -> list[Tensor]:
        return []

    def _table(self, numbers: Iterable[int]) -> Tensor:
        self._held.append(_table(tuple(numbers), self.device))
        return self._held[-1]

    @property
    def tables(self) -> Tables:
        """What the kernels are told of weights and gradients."""
        width = self.shape[-1] if self.shape else 1
        return Tables(
            self.pointers(self.params),
            self.pointers(self.gradients),
            tuple(self.shape),
            self.dtype,
            self.grads[0].dtype,
            aligned([*self.params, *self.gradients], width),
            self.rounding == "stochastic" and self.dtype is torch.bfloat16,
        )

    def of(self, *keys: str) -> list[Tensor]:
        """The state's tensors of these keys: all parameters of the first, then all of the second."""
        return [state[key] for key in keys for state in self.states]

    def stack(self, *keys: str) -> Tensor:
        """A copy of the state's tensors of these keys, of one shape: (keys L, ...), in the order of `of`."""
        return torch.stack(self.of(*keys))

    def scatter(self, key: str, stacked: Tensor) -> None:
        """Copy a stack (L, ...) back into the states."""
        torch._foreach_copy_(self.of(key), list(stacked.unbind()))  # pyright: ignore

    def keep_(self, **factors: tuple[Tensor, Tensor]) -> None:
        """`factors.keep_` on stacks B (L, m, r) and A (L, r, n): for each parameter all new factors, or none."""
        bounds = [largest(b) * largest(a) * b.shape[2] for b, a in factors.values()]
        sound = torch.stack(bounds).isfinite().all(0)[:, None, None]
        for name, pair in factors.items():
            for key, new in zip((f"{name}_B", f"{name}_A"), pair, strict=True):
                self.scatter(key, torch.where(sound, new, self.stack(key)))

    @cached_property
    def _counters(self) -> Tensor:
        return _moved(torch.stack(self.of(*COUNTERS)), self.device).view(len(COUNTERS), -1).double()

    def counter(self, name: str) -> Tensor:
        """(L,) fp64 on the device: "step", "m_step" or "v_step". Wide, since 1 - beta^t cancels."""
        return self._counters[COUNTERS.index(name)]

    def numbers(self, *columns: float | Tensor) -> Tensor:
        """(L, k) fp32 on the device: the table a kernel reads. A column is (L,), or () or a number for all."""
        return torch.stack([self._column(column) for column in columns], 1).float()

    def _column(self, column: float | Tensor) -> Tensor:
        length = len(self.params)
        if isinstance(column, Tensor) and column.device == self.device:
            return column.double().expand(length)
        return torch.full((length,), float(column), dtype=torch.float64, device=self.device)

    @property
    def decay(self) -> Tensor:
        """(L,) fp64: what a weight is multiplied by before its step."""
        return 1 - self.rates * self.weight_decay

    @cached_property
    def rates(self) -> Tensor:
        """(L,) fp64: the learning rate."""
        return self._column(self.lr)

    @property
    def seeds(self) -> Tensor:
        """(L,) fp64, integers below 2^24, which fp32 holds: what the rounding of this step draws from."""
        keys = self._table(context.key % _PRIME for context in self.contexts)
        return (keys + self.counter("step") * 7919) % _PRIME


COUNTERS = ("step", "m_step", "v_step")
_PRIME = 16777213
"""The largest prime below 2^24."""


@lru_cache(maxsize=1 << 12)
def _table(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept from step to step while tensors stay where they are."""
    return _moved(torch.tensor(numbers, dtype=torch.int64), device)


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """On the device, in a way that does not wait for it."""
    return (x.pin_memory() if device.type == "cuda" and not x.is_cuda else x).to(device, non_blocking=True)
