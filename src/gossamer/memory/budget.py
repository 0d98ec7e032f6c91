"""What fits: every method and every parametrization at every rank, by the memory that training takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gossamer.errors import UserError
from gossamer.layers import PARAMETRIZATIONS
from gossamer.memory.activations import Loss, activations
from gossamer.memory.predict import Memory, meta_model, predict
from gossamer.models import resolve_config
from gossamer.optim.contract import Method, methods
from gossamer.optim.groups import default_fallback, hidden_linears

if TYPE_CHECKING:
    from transformers import PretrainedConfig

RANKS = (32, 64, 128, 256, 512, 1024)
UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Size:
    """An amount of memory as it was written: "24GiB" is 24 times 2^30 bytes, "24GB" 24 times 10^9."""

    number: float
    unit: str

    @property
    def bytes(self) -> float:
        return self.number * UNITS[self.unit]

    def show(self, size: float) -> str:
        """Another amount, in bytes, in the same unit: without it, to two digits behind the point."""
        return f"{size / UNITS[self.unit]:,.2f}"

    def __str__(self) -> str:
        return f"{self.number:g} {self.unit}"


def parse_size(text: str, what: str) -> Size:
    """A number with a unit.

    Raises:
        UserError: anything else; also "24G", which half of its writers mean as 2^30 and half as 10^9. Names `what`.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+) ?([A-Za-z]+)", text.strip())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise UserError(f"{what}: {text!r} is not an amount; allowed: a number > 0 with one of {', '.join(UNITS)}")
    return Size(float(found[1]), found[2])


@dataclass(frozen=True)
class Candidate:
    """One way to train a model; everything in bytes."""

    method: str
    layers: str
    """A name in `gossamer.layers.PARAMETRIZATIONS`, or "-": the model's own."""
    rank: int | None
    """Of the layers, or else of the method; None: there is none to choose."""
    weights: int
    gradients: int
    state: int
    activations: int
    step: int
    """The most that an optimizer step takes at once."""
    released: bool
    """Whether parameters step, one by one, while activations are there, or when these are gone."""

    @property
    def total(self) -> int:
        passing = self.activations + self.step if self.released else max(self.activations, self.step)
        return self.weights + self.gradients + self.state + passing

    def __str__(self) -> str:
        name = self.method if self.layers == "-" else f"{self.layers} with {self.method}"
        return name if self.rank is None else f"{name} at rank {self.rank}"


def candidates(
    model: PretrainedConfig | str,
    batch_size: int,
    seq_len: int,
    checkpointing: bool = False,
    *,
    loss: Loss,
    dtype: torch.dtype = torch.bfloat16,
    release_gradients: bool = False,
) -> list[Candidate]:
    """Every method, and every parametrization trained by AdamW, smallest total first; steps by the reference.

    At their defaults but for the rank: those of `RANKS` below the model's hidden size, and for a method its own default
    too. Layers have no rank above their smallest side.

    Args: as for `activations`; `release_gradients` as for `predict`.
    """
    config = resolve_config(model) if isinstance(model, str) else model
    plain = meta_model(config, None, dtype)
    sizes = batch_size, seq_len, checkpointing
    kept = activations(plain, *sizes, loss=loss)
    ranks = [rank for rank in RANKS if rank < config.get_text_config().hidden_size]
    found: list[Candidate] = []
    for name, entry in methods().items():
        for method, rank in _at_ranks(entry.cls, ranks):
            memory = predict(plain, method, release_gradients=release_gradients)
            found.append(_candidate(name, "-", rank, memory, kept, release_gradients))
    smallest = min((min(linear.weight.shape) for _, linear in hidden_linears(plain)), default=0)
    for name, cls in PARAMETRIZATIONS.items():
        for rank in (rank for rank in ranks if rank <= smallest):
            built = meta_model(config, cls(rank=rank), dtype)
            kept = activations(built, *sizes, loss=loss)
            memory = predict(built, default_fallback(), release_gradients=release_gradients)
            found.append(_candidate("adamw", name, rank, memory, kept, release_gradients))
    return sorted(found, key=lambda candidate: candidate.total)


def _candidate(method: str, layers: str, rank: int | None, memory: Memory, kept: int, released: bool) -> Candidate:
    step = memory.scratch + max(memory.step)
    return Candidate(method, layers, rank, memory.weights, memory.gradients, memory.state, kept, step, released)


def _at_ranks(cls: type[Any], ranks: list[int]) -> Iterator[tuple[Method, int | None]]:
    """A method of this class at its own rank and at each of these; once if it has none."""
    own = getattr(cls, "rank", None)
    if own is None:
        yield cls(), None
        return
    for rank in sorted({own, *ranks}):
        yield cls(rank=rank), rank
