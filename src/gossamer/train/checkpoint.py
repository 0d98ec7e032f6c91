"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gossamer.distributed import World, storage
from gossamer.errors import UserError, first_line
from gossamer.layers import plain, stand_ins
from gossamer.optim import Optimizer
from gossamer.optim.diagnostics import Diagnostics
from gossamer.train.config import Training, check_resumable

MANIFEST = "manifest.json"
NEEDED = ("config.json", "model.safetensors", "random.safetensors", "training.json")
"""What no checkpoint is without."""


class Parts(NamedTuple):
    """What of a run lives in tensors."""

    model: nn.Module
    optimizer: Optimizer
    diagnostics: Diagnostics | None


class Checkpoints:
    """The folder `<run>/checkpoints`: one folder a step, each published by a rename once all its bytes are on disk.

    Tensors lie in plain safetensors files that any number of processes reads (`gossamer.distributed.storage`):
    `model`, which with `config.json` and the tokenizer's files is what `transformers` loads; `layers` if some layers
    are low-rank or have adapters (the weights as they are trained; `model` is dense then); `optimizer`; `groups`, what
    its groups hold in tensors, and `diagnostics` if there are any; `random`, the state of each process's generators.
    Everything else is in `training.json`, and a manifest has the digest of every file. Nothing is pickled.

    Args:
        model: before it is sharded.
    """

    def __init__(self, folder: Path, keep_last: int, world: World, model: nn.Module) -> None:
        self.folder, self.keep_last, self.world = folder / "checkpoints", keep_last, world
        self.stand_ins = {name: copy.deepcopy(module).to("meta") for name, module in stand_ins(model)}
        self._in_flight: tuple[int, Callable[[], None]] | None = None

    def steps(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def save(
        self, step: int, parts: Parts, training: dict[str, Any], save_tokenizer: Callable[[Path], None], *, behind: bool
    ) -> None:
        """Write the checkpoint of `step`, publish it, then delete those beyond `keep_last`. `settle` says when.

        Args:
            training: what is no tensor, as plain data.
            behind: return when the tensors are copied to the CPU, and do the rest beside the training.

        Raises:
            UserError: the disk is full or not writable. Nothing is published then, and nothing older is touched.
        """
        assert self._in_flight is None, "settle first"
        draft = self.folder / f".draft-{step:08d}"
        saved = parts.optimizer.state_dict()["param_groups"]
        groups = [{key: value for key, value in group.items() if not isinstance(value, Tensor)} for group in saved]

        def begin() -> None:
            with self._guard(step):
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
                parts.model.config.save_pretrained(draft)  # pyright: ignore
                save_tokenizer(draft)
                (draft / "training.json").write_text(json.dumps({**training, "step": step, "groups": groups}, indent=2))

        self.world.from_main(begin)
        tensors = {f"{self._weights}/{name}": tensor for name, tensor in _weights(parts.model).items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in _state(parts.optimizer)}
        if parts.diagnostics is not None:
            kept = parts.diagnostics.state_dict().items()
            tensors |= {f"diagnostics/{name}/{key}": tensor for name, state in kept for key, tensor in state.items()}
        for index, group in enumerate(saved):
            tensors |= {f"groups/{index}/{key}": value for key, value in group.items() if isinstance(value, Tensor)}
        tensors |= {f"random/{name}": tensor for name, tensor in self.world.random_states().items()}

        def finish() -> None:
            self._publish(draft, self.folder / f"step-{step:08d}")

        with self._guard(step):
            if behind:
                self._in_flight = step, storage.save_behind(draft, tensors, finish, self.world.background)
            else:
                storage.save(draft, tensors, finish)
                self._in_flight = step, lambda: None

    def settle(self) -> tuple[int, Path] | None:
        """Wait for the save that is under way, if one is; its step and folder.

        Raises:
            UserError: it failed.
        """
        if self._in_flight is None:
            return None
        (step, wait), self._in_flight = self._in_flight, None
        with self._guard(step):
            wait()
        return step, self.folder / f"step-{step:08d}"

    def settle_after(self, error: UserError) -> None:
        """Wait for the save that is under way when a run ends by `error`; if it fails, too, both are one error."""
        try:
            self.settle()
        except UserError as other:
            raise UserError(f"{error}; {other}") from error

    @property
    def _weights(self) -> str:
        return "layers" if self.stand_ins else "model"

    def _publish(self, draft: Path, final: Path) -> None:
        if self.stand_ins:
            self._write_dense(draft)
        files = sorted(path for path in draft.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(draft)): _digest(path) for path in files}
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2))
        for path in (*files, draft / MANIFEST, draft):
            _sync(path)
        if final.exists():  # a resumed run arrives at the step again
            shutil.rmtree(final)
        draft.rename(final)
        _sync(self.folder)
        for path in self.steps():
            if path.name > final.name:  # the run was continued from before it: it is damaged, or about to be made again
                shutil.rmtree(path)
        for old in self.steps()[: -self.keep_last]:
            shutil.rmtree(old)

    def _write_dense(self, draft: Path) -> None:
        """The dense model that `layers` stands for, made of that file's tensors, a layer at a time."""
        with safe_open(draft / "layers.safetensors", "pt") as file:

            def dense(name: str, module: nn.Module, key: str) -> Tensor:
                own = {key: file.get_tensor(f"{name}.{key}") for key in module.state_dict()}
                module.load_state_dict(own, assign=True)
                made = plain(module)[key]
                module.to("meta")
                return made

            inner = {f"{name}.{key}" for name, module in self.stand_ins.items() for key in module.state_dict()}
            rows: list[Any] = []
            for name in set(file.keys()) - inner:
                rows.append((name, *_kind(file.get_tensor(name)), partial(file.get_tensor, name)))
            for name, module in self.stand_ins.items():
                for key, tensor in plain(module).items():
                    rows.append((f"{name}.{key}", *_kind(tensor), partial(dense, name, module, key)))
            storage.write_file(draft / "model.safetensors", rows)

    @contextlib.contextmanager
    def _guard(self, step: int) -> Iterator[None]:
        """Storage that fails is one line, and leaves no draft."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            if self.world.is_main:
                shutil.rmtree(self.folder / f".draft-{step:08d}", ignore_errors=True)
            raise UserError(
                f"checkpoint: cannot save step {step} in {self.folder}: {first_line(error)}; {self.last_good()}"
            ) from error

    def last_good(self) -> str:
        """A phrase for error messages."""
        steps = self.steps()
        return f"the last checkpoint is {steps[-1]}" if steps else "there is no earlier checkpoint"

    def newest_sound(self, say: Callable[[str], None]) -> Path | None:
        """The newest checkpoint whose every byte is as written; damaged newer ones are named through `say`.

        Returns None where there is none at all.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        steps = self.steps()
        for path in reversed(steps):
            if (damage := _damage(path)) is None:
                return path
            say(f"checkpoint {path} is damaged ({damage}); trying the one before it")
        if steps:
            raise UserError(f"resume: all {len(steps)} checkpoints in {self.folder} are damaged")
        return None

    def open(
        self, config: Training[Any, Any], source: str, data: str, say: Callable[[str], None]
    ) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from and what it says of its run; None to start afresh.

        Args:
            source: of the training rows, as the user wrote it. data: their fingerprint.

        Raises:
            UserError: there are checkpoints and the run is not to resume, or not this one, or on other data.
        """
        if not (config.resume or self.world.restarted):
            if self.steps():
                raise UserError(f"out: {config.out} holds the checkpoints of a run; add --resume, or use another --out")
            return None
        found = self.world.from_main(lambda: self.newest_sound(say))
        say(f"resuming from {found}" if found else f"no checkpoint in {config.out}: from the start")
        if found is None:
            return None
        with reading(found):
            training = json.loads((found / "training.json").read_text())
            check_resumable(training["config"], config)
            if training["data"] != data:
                raise UserError(f"resume: the training data of {source} has changed since {found} was written")
        return found, training

    def restore(self, path: Path, parts: Parts, training: dict[str, Any]) -> None:
        """Put a checkpoint's weights, optimizer state, diagnostics and random states where they were.

        Raises:
            UserError: it is of another model or optimizer.
        """
        weights, there = _weights(parts.model), storage.names(path)
        fresh: dict[Tensor, dict[str, Tensor]] = {}
        tensors = {f"{self._weights}/{name}": tensor for name, tensor in weights.items()}
        for name, param, group in parts.optimizer.members():
            if f"optimizer/{name}/step" in there:  # else it never had a gradient
                fresh[param] = parts.optimizer.fresh_state(name, param, group)
                tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in fresh[param].items()}
        storage.load(path, tensors)
        # what modules derive from a buffer they derive again where it is loaded the usual way
        parts.model.load_state_dict({name: weights[name] for name, _ in _buffers(parts.model)}, strict=False)
        groups = training["groups"]
        for index, values in _by_owner(path / "groups.safetensors").items():
            groups[int(index)] |= values
        # which would copy the state: there would be two for a moment
        parts.optimizer.load_state_dict({"state": {}, "param_groups": groups})
        parts.optimizer.state.update(fresh)
        if parts.diagnostics is not None and (kept := _by_owner(path / "diagnostics.safetensors")):  # else they begin
            parts.diagnostics.load_state_dict(kept)
        self.world.set_random_states(safetensors.torch.load_file(path / "random.safetensors"))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What a checkpoint holds beside what `save` wrote makes its readers raise anything: say where it is."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(
            f"resume: {path} is not as it was saved: {type(error).__name__}: {first_line(error)}"
        ) from error


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers; those with two names under the first."""
    state, first = model.state_dict(keep_vars=True), {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name].detach() for name in first.values()}


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The persistent ones."""
    saved = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def _state(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, param, _ in optimizer.members():
        for key, tensor in optimizer.state.get(param, {}).items():
            yield f"{name}/{key}", tensor


def _by_owner(path: Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by what stands in front of their names' last slash; none if there is no such file."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in (safetensors.torch.load_file(path) if path.exists() else {}).items():
        owner, _, key = name.rpartition("/")
        found.setdefault(owner, {})[key] = tensor
    return found


def _kind(tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
    return tensor.shape, tensor.dtype


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = dict(json.loads((path / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST}
    for name in sorted({*NEEDED, *manifest} - files):
        return f"{name} is missing"
    for name in sorted(files):
        if _digest(path / name) != manifest.get(name):
            return f"{name} does not have the digest it was written with"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _sync(path: Path) -> None:
    """Have the file's or folder's bytes on the disk before anything that relies on them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
