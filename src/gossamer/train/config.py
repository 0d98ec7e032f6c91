"""What a training run is: declared here, once, and the command line is these dataclasses."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tyro

from gossamer.data import DataConfig
from gossamer.errors import UserError
from gossamer.layers import LORO, Parametrization, ReLoRA, name_of
from gossamer.optim.contract import Method, describe
from gossamer.optim.methods.adamw import AdamW
from gossamer.restarts import Restarts
from gossamer.train.schedule import Schedule

M = TypeVar("M", bound=Method)
L = TypeVar("L", bound=Parametrization | None)
R = TypeVar("R", bound=Restarts | None)

PLACE = {"out", "resume", "device", "micro_batch_size"}
"""Options that say where a run is made and in what portions: they change the rounding of what it finds, and what is
drawn on a device (projections, stochastic rounding) or for a portion (dropout)."""
MAY_CHANGE_ON_RESUME = PLACE | {"checkpointing", "compile", "eval_every", "eval_tokens", "save_every", "keep_last",
                                "trackers", "diagnose", "diagnose_every", "parallel", "timeout", "async_save",
                                "on_nonfinite", "release_gradients"}  # fmt: skip


@dataclass(frozen=True)
class Training(Generic[M, R]):
    """What every run has, whatever it learns."""

    method: M
    """How hidden matrices are trained."""
    restarts: R = None  # pyright: ignore[reportAssignmentType]
    """Weight refactorization and momentum reset; None: never."""
    out: Path = Path("runs/training")
    """Folder of the log and the checkpoints."""
    resume: bool = False
    """Continue from the newest sound checkpoint in `out`; from the start if there is none."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Rows an optimizer step sees, over all processes."""
    micro_batch_size: int | None = None
    """Rows of one forward pass in one process; None: all of its rows at once."""
    lr: float = 1e-3
    """Peak learning rate."""
    fallback: AdamW = field(default_factory=AdamW)
    """What trains everything else: embeddings, output head, norms, biases."""
    fallback_lr: float | None = None
    """Peak learning rate of everything else; None: the same."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup: float = 0.1
    """Part of the steps over which the learning rate rises."""
    decay: Literal["cosine", "linear"] = "cosine"
    """How it falls afterwards."""
    min_lr_ratio: float = 0.1
    """Learning rate of the last step, as a part of the peak."""
    clip: float = 1.0
    """Largest global gradient norm; 0 does not clip."""
    release_gradients: bool = False
    """Step each parameter in the backward pass and free its gradient, so that not all are held at once. Micro-batches
    hold them all until the last one."""
    clip_by: Literal["two-pass", "previous"] = "two-pass"
    """The norm that clips released gradients: this step's, which takes a second backward pass, or the step's before."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights, gradients and activations. Optimizer state is fp32 either way."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """How bf16 weights are written."""
    device: str = "auto"
    """auto, cpu or cuda."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """How several processes share the work: each holds the whole model, or its rows of every parameter and state."""
    timeout: float = 600.0
    """Seconds after which a process that the others wait for counts as lost."""
    checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    compile: bool = False
    """Run the model through torch.compile."""
    seed: int = 0
    """Of the weights, the data order and the optimizer's random numbers."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: int = 2
    """Checkpoints to keep."""
    async_save: bool = False
    """Write checkpoints beside the training, out of a copy in the CPU's memory."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a loss or a gradient that is not finite does: stops the run, or makes it pass over that step."""
    diagnose: tuple[str, ...] = ()
    """Regular expressions of parameters' names: log how well their moments, updates and subspaces do."""
    diagnose_every: int = 10
    """Steps between two such looks."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Where to send the numbers, beside the JSONL log."""

    def __post_init__(self) -> None:
        whole = ("steps", "batch_size", "keep_last", "diagnose_every")
        for name in whole:
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} is too small; allowed: an integer >= 1")
        for name in ("eval_every", "save_every", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name}: {getattr(self, name)} is out of range; allowed: finite numbers >= 0")
        for name in ("lr", "fallback_lr", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}: {value} is out of range; allowed: finite numbers > 0")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: {self.seed} is out of range; allowed: 0 to 2^63 - 1")
        for name in ("warmup", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: {getattr(self, name)} is not a part; allowed: 0 to 1")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise UserError(f"micro_batch_size: {self.micro_batch_size} is too small; allowed: an integer >= 1")
        if self.clip_by != "two-pass" and not (self.release_gradients and self.clip):
            raise UserError(
                f"clip_by: {self.clip_by!r} without gradients that are released and clipped, which are clipped by this "
                "step's norm; add --release-gradients, with --clip above 0"
            )
        if self.release_gradients and self.on_nonfinite == "skip" and (self.clip_by != "two-pass" or not self.clip):
            raise UserError(
                "on_nonfinite: 'skip' with gradients that are released before their norm is known; allowed: 'stop', or "
                "--clip above 0 by two-pass"
            )
        if self.release_gradients and self.compile:
            raise UserError("release_gradients: a compiled model hands over all gradients at once; leave out --compile")
        for name in ("compile", "diagnose"):
            if self.parallel == "fsdp2" and getattr(self, name):
                raise UserError(f"{name}: not with --parallel fsdp2, which shards the parameters; allowed: ddp")

    def schedule(self) -> Schedule:
        """The learning rate over the run."""
        warmup, restarts = round(self.warmup * self.steps), self.restarts
        if restarts is None or restarts.schedule == "none":
            return Schedule(self.steps, warmup, self.min_lr_ratio, decay=self.decay)
        recovery = min(restarts.recovery_steps, restarts.every)
        return Schedule(self.steps, warmup, self.min_lr_ratio, restarts.every, recovery, self.decay)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the method's name."""
        return {**asdict(self), "out": str(self.out), "method": describe(self.method)}


@dataclass(frozen=True)
class Pretrain(Training[M, R], Generic[M, L, R]):
    """Pre-train a causal language model."""

    layers: L = None  # pyright: ignore[reportAssignmentType]
    """What hidden linear layers are replaced by; None: nothing."""
    layer_targets: tuple[str, ...] = ()
    """Regular expressions of the linear layers to replace; none: every hidden one."""
    model: str = "9m"
    """A size (tiny, 9m .. 13b), or a Hugging Face config.json or a folder with one."""
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)
    out: Path = Path("runs/pretrain")
    """Folder of the log and the checkpoints."""
    eval_tokens: int = 100_000
    """Validation tokens of one evaluation, the same ones each time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_tokens < 1:
            raise UserError(f"eval_tokens: {self.eval_tokens} is too small; allowed: an integer >= 1")
        if self.layer_targets and self.layers is None:
            raise UserError("layer_targets: there are no layers to replace them by; add --layers")
        if isinstance(self.layers, ReLoRA | LORO) and (self.restarts is None or not self.restarts.refactorize):
            raise UserError(
                f"layers: {name_of(self.layers)} lives by its restarts; add --restarts.every (and leave refactorize on)"
            )

    def to_json(self) -> dict[str, Any]:
        layers = None if self.layers is None else {"name": name_of(self.layers), **asdict(self.layers)}
        return {**super().to_json(), "layers": layers}


def check_resumable(saved: dict[str, Any], config: Training[Any, Any]) -> None:
    """Refuse to continue a run under another configuration."""
    was, is_ = saved["method"]["name"], config.to_json()["method"]["name"]
    if was != is_:
        raise UserError(f"resume: the checkpoint was made by method {was!r}, this run asks for {is_!r}")
    for key, old, value in differences(saved, config):
        if key.split(".")[0] not in MAY_CHANGE_ON_RESUME:
            raise UserError(f"resume: {key} was {old!r} in the checkpoint and is {value!r} now; use another --out")


def same_run(saved: dict[str, Any], config: Training[Any, Any]) -> bool:
    """Whether a run was made under this configuration, wherever it was made."""
    return all(key in PLACE for key, _, _ in differences(saved, config))


def fingerprint(config: Training[Any, Any]) -> str:
    """What tells this configuration from others, wherever it is made: eight hexadecimal digits."""
    said = {key: value for key, value in _flatten(config.to_json()).items() if key not in PLACE}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]


def differences(saved: dict[str, Any], config: Training[Any, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Option, old and new value wherever a saved configuration is another than this one.

    What the version that saved it did not know has its default.
    """
    parts = {part.name: getattr(config, part.name) for part in fields(config)}
    defaults: dict[str, Any] = {name: type(it)() for name, it in parts.items() if is_dataclass(it)}
    unsaid = _flatten(type(config)(**defaults).to_json())
    before, after = _flatten(saved), _flatten(config.to_json())
    for key in before | after:
        known = key.split(".")[0] in before  # as None: it had no such part
        old, value = before.get(key, None if known else unsaid.get(key)), after.get(key)
        if old != value:
            yield key, old, value


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
