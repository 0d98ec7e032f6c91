"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from gossamer.errors import UserError, first_line
from gossamer.layers import dense_state_dict, factored
from gossamer.optim.diagnostics import Diagnostics

MANIFEST, LAYERS = "manifest.json", "layers.safetensors"


class Checkpoints:
    """The folder `<run>/checkpoints`: one folder a step, each published by a rename once all its bytes are on disk.

    A checkpoint holds `model.safetensors` and `config.json` (which `transformers` loads), `layers.safetensors` if some
    layers are low-rank (the weights as they are trained; `model.safetensors` is dense then), the tokenizer's files,
    `optimizer.pt` (tensors and plain data: loads with `weights_only=True`), `diagnostics.pt` likewise if there are any,
    `training.json` (step, configuration, schedule), the random states, and a manifest with the digest of every file.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder, self.keep_last = folder / "checkpoints", keep_last

    def steps(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        diagnostics: Diagnostics | None,
        training: dict[str, Any],
        save_tokenizer: Callable[[Path], None],
    ) -> Path:
        """Write and publish the checkpoint of `step`, then delete those beyond `keep_last`.

        Raises:
            UserError: the disk is full or not writable. Nothing is published then, and nothing older is touched.
        """
        final, draft = self.folder / f"step-{step:08d}", self.folder / f".draft-{step:08d}"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            if any(factored(model)):  # `transformers` loads the dense model that it stands for
                with _no_progress_bar():
                    model.save_pretrained(draft, state_dict=dense_state_dict(model))  # pyright: ignore
                safetensors.torch.save_model(model, str(draft / LAYERS))
            else:
                safetensors.torch.save_model(model, str(draft / "model.safetensors"), metadata={"format": "pt"})
                model.config.save_pretrained(draft)  # pyright: ignore
            save_tokenizer(draft)
            torch.save(optimizer.state_dict(), draft / "optimizer.pt")
            if diagnostics is not None:
                torch.save(diagnostics.state_dict(), draft / "diagnostics.pt")
            torch.save(_random_states(), draft / "random.pt")
            (draft / "training.json").write_text(json.dumps(training, indent=2))
            # safetensors makes its files readable by the owner alone, others follow the umask
            for path in draft.glob("*.safetensors"):
                path.chmod((draft / "training.json").stat().st_mode)
            files = sorted(path for path in draft.rglob("*") if path.is_file())
            manifest = {str(path.relative_to(draft)): _digest(path) for path in files}
            (draft / MANIFEST).write_text(json.dumps(manifest, indent=2))
            for path in (*files, draft / MANIFEST, draft):
                _sync(path)
            if final.exists():  # a resumed run arrives at the step again
                shutil.rmtree(final)
            draft.rename(final)
            _sync(self.folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise UserError(
                f"checkpoint: cannot save step {step} in {self.folder}: {first_line(error)}; {self.last_good()}"
            ) from error
        for path in self.steps():
            if path.name > final.name:  # the run was continued from before it: it is damaged, or about to be made again
                shutil.rmtree(path)
        for old in self.steps()[: -self.keep_last]:
            shutil.rmtree(old)
        return final

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


def read_training(path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run: step, seconds, tokens, data fingerprint, schedule, configuration."""
    return json.loads((path / "training.json").read_text())


def restore(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    diagnostics: Diagnostics | None,
    device: torch.device,
) -> None:
    """Put a checkpoint's weights, optimizer state, diagnostics and random states where they were."""
    weights = path / LAYERS if (path / LAYERS).exists() else path / "model.safetensors"
    safetensors.torch.load_model(model, str(weights), device=str(device))
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"))
    if diagnostics is not None and (path / "diagnostics.pt").exists():  # else they begin here
        diagnostics.load_state_dict(torch.load(path / "diagnostics.pt", weights_only=True, map_location="cpu"))
    states = torch.load(path / "random.pt", weights_only=True)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _random_states() -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if not isinstance(manifest, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError):
        return f"{MANIFEST} is missing or unreadable"
    for name, digest in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} does not have the digest it was written with"
    return None


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


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
