"""The optimizer under test: found by its name, built for a model."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer.errors import UserError, first_line


class NotApplicable(Exception):
    """The fact does not concern this optimizer; the message says why."""


def fact(function: Callable[[Subject], str]) -> Callable[[Subject], str]:
    """Mark a function as a fact: it returns what was measured, or raises; its docstring says what must be so."""
    function.is_fact = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


@dataclass(frozen=True)
class Subject:
    """An optimizer and how it is built.

    Args:
        name: `module:Attr` or `path/to/file.py:Attr`, an optimizer's class or a function that returns one. It is called
            with the list of the model's parameters, or with the model itself if its first argument is called `model`
            (who needs groups makes them from that), and with `arguments`.
        arguments: plain JSON values, given by keyword.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What the table calls it: the attribute and the arguments."""
        given = ", ".join(f"{key}={value}" for key, value in self.arguments.items())
        return self.name.rpartition(":")[2] + (f"({given})" if given else "")

    @cached_property
    def factory(self) -> Callable[..., Any]:
        """Raises `UserError` where the name leads nowhere."""
        place, _, attribute = self.name.rpartition(":")
        if not place or not attribute:
            raise UserError(f"optimizer: {self.name!r} is not module:Attr or path/to/file.py:Attr")
        try:
            module = _load(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        except Exception as error:  # whatever stands in the file
            raise UserError(
                f"optimizer: cannot import {place!r}: {type(error).__name__}: {first_line(error)}"
            ) from error
        found = getattr(module, attribute, None)
        if not callable(found):
            raise UserError(f"optimizer: {place!r} has no class or function {attribute!r}")
        return found

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.factory).parameters

    def build(self, model: nn.Module, **changes: Any) -> torch.optim.Optimizer:
        """The optimizer for `model`, with some arguments changed. Raises whatever its constructor raises."""
        wants_model = next(iter(self._parameters), None) == "model"
        optimizer = self.factory(model if wants_model else list(model.parameters()), **{**self.arguments, **changes})
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UserError(f"optimizer: {self.name} made a {type(optimizer).__name__}, no torch.optim.Optimizer")
        return optimizer

    def build_if_taken(self, model: nn.Module, **changes: Any) -> torch.optim.Optimizer:
        """As `build`, for arguments that it may not have. Raises `NotApplicable` where it has not."""
        unnamed = [name for name in changes if name not in self._parameters]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in self._parameters.values())
        if unnamed and not takes_any:
            raise NotApplicable(f"the constructor takes no {unnamed[0]}")
        try:
            return self.build(model, **changes)
        except (TypeError, ValueError) as error:
            if not unnamed:
                raise
            raise NotApplicable(f"the constructor takes no {unnamed[0]}: {first_line(error)}") from error

    def default(self, name: str) -> Any:
        """The value of an argument that is not changed; None where the signature does not say."""
        known = self._parameters.get(name)
        fallback = None if known is None or known.default is inspect.Parameter.empty else known.default
        return self.arguments.get(name, fallback)


def _load(path: Path) -> Any:
    """The module in a file, under the file's name: found again by pickle, run once."""
    if (loaded := sys.modules.get(path.stem)) is not None and loaded.__file__ == str(path.resolve()):
        return loaded
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module
