"""What a run's training steps take, beside torch's AdamW on the dense model: seconds and bytes, in a few steps."""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gossamer.bench.timing import WARM_UP, stopwatch
from gossamer.evaluate import token_loss
from gossamer.memory import activations, meter, predict
from gossamer.train import Pretrain
from gossamer.train.build import build, build_optimizer

T = TypeVar("T")


@dataclass(frozen=True)
class _Steps:
    """A model that can be trained step by step on random tokens of one micro-batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    inputs: Tensor
    targets: Tensor

    def forward(self) -> Tensor:
        return token_loss(self.model, self.inputs, self.targets) / self.targets.numel()

    def passes(self) -> None:
        self.forward().backward()

    def step(self) -> None:
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.zero_grad()


def probe(config: Pretrain[Any, Any, Any], device: torch.device, *, rounds: int) -> dict[str, Any]:
    """Time `rounds` training steps and as many of the reference, in turn; then one step's peaks, beside predictions.

    The reference is `torch.optim.AdamW` at its defaults on the dense model. Times are medians. Peaks are of everything
    that the model and its training brought, on a CPU in resident pages, None where the system does not count them.
    What does not fit on the device is left out, as both models at a time may not: the run is worth more than its times.
    """
    micro = config.micro_batch_size or config.batch_size
    times = _if_it_fits(lambda: _times(config, device, micro, rounds)) or {}
    peak = _if_it_fits(lambda: _peaks(config, device, micro))
    return {**times, "memory": {"predicted": _predicted(config, micro), "peak": peak}}


def _if_it_fits(measure: Callable[[], T]) -> T | None:
    try:
        return measure()
    except torch.OutOfMemoryError:
        return None


def _times(config: Pretrain[Any, Any, Any], device: torch.device, micro: int, rounds: int) -> dict[str, Any]:
    both = _ours(config, device, micro), _reference(config, device, micro)
    seconds = stopwatch(device)
    passes: tuple[list[float], list[float]] = ([], [])
    steps: tuple[list[float], list[float]] = ([], [])
    for index in range(WARM_UP + rounds):
        for which in (0, 1)[:: -1 if index % 2 else 1]:
            trained = both[which]
            passes[which].append(seconds(trained.passes))
            steps[which].append(seconds(trained.step))
            trained.clear()
    parts = config.batch_size // micro
    found = []
    for which in (0, 1):
        step = statistics.median(steps[which][WARM_UP:])
        whole = parts * statistics.median(passes[which][WARM_UP:]) + step
        tokens = config.batch_size * config.data.seq_len
        found.append({"tokens_per_second": tokens / whole, "step_time": step, "step_share": step / whole})
    ratios = [ours / theirs for ours, theirs in zip(*(times[WARM_UP:] for times in steps), strict=True)]
    ours, reference = found
    return {
        "step_time": ours["step_time"],
        "step_share": ours["step_share"],
        "step_time_ratio": statistics.median(ratios),
        "reference": reference,
    }


def _ours(config: Pretrain[Any, Any, Any], device: torch.device, micro: int) -> _Steps:
    model, _ = build(config, 0, device)
    return _Steps(model, build_optimizer(config, model), *_tokens(model, config, device, micro))


def _reference(config: Pretrain[Any, Any, Any], device: torch.device, micro: int) -> _Steps:
    model, _ = build(replace(config, layers=None, layer_targets=(), restarts=None), 0, device)
    return _Steps(model, torch.optim.AdamW(model.parameters()), *_tokens(model, config, device, micro))


def _tokens(model: Any, config: Pretrain[Any, Any, Any], device: torch.device, micro: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary = model.config.get_text_config().vocab_size
    inputs, targets = torch.randint(vocabulary, (2, micro, config.data.seq_len), generator=generator).to(device)
    return inputs, targets


def _predicted(config: Pretrain[Any, Any, Any], micro: int) -> dict[str, int]:
    """Bytes: what `gossamer memory` predicts for this run."""
    model, _ = build(config, 0, torch.device("meta"))
    memory = predict(model, config.method, fallback=config.fallback, implementation="auto")
    kept = activations(model, micro, config.data.seq_len, config.checkpointing, loss=token_loss)
    sizes = {name: getattr(memory, name) for name in ("weights", "gradients", "state")}
    return {**sizes, "activations": kept, "step": memory.step.transient + memory.scratch}


def _peaks(config: Pretrain[Any, Any, Any], device: torch.device, micro: int) -> dict[str, int] | None:
    if device.type == "cpu" and not sys.platform.startswith("linux"):
        return None
    found: dict[str, int] = {}
    memory = meter(device)
    memory.settle()
    gc.freeze()  # what is there already need not be looked through again before each phase
    before = memory.now()

    def peak_of(phase: str, work: Callable[[], Any]) -> Any:
        memory.settle()
        memory.reset_peak()
        result = work()
        found[phase] = memory.peak() - before
        return result

    try:
        trained = _ours(config, device, micro)
        for _ in range(WARM_UP):
            trained.passes()
            trained.step()
            trained.clear()
        loss = peak_of("forward", trained.forward)
        peak_of("backward", loss.backward)
        peak_of("step", trained.step)
    finally:
        gc.unfreeze()
    return found
