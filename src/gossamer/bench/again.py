"""The command that trains a run again, from the configuration in its row."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

from gossamer.bench.reading import leaves
from gossamer.errors import UserError
from gossamer.layers import PARAMETRIZATIONS
from gossamer.optim.contract import find
from gossamer.restarts import Restarts
from gossamer.train import Finetune, Pretrain

NAMED = ("method", "layers")
"""Parts that an option of their own chooses by name."""
ELSEWHERE = ("out", "resume")
"""What says nothing about the numbers."""


def command(config: dict[str, Any]) -> str | None:
    """`gossamer pretrain` or `finetune` with what differs from today's defaults.

    None: this version has no such run, because the configuration is of another one.
    """
    try:
        return shlex.join(_words(config))
    except (AttributeError, KeyError, TypeError, UserError):
        return None


def _words(config: dict[str, Any]) -> Iterator[str]:
    kind = Finetune if "adapter" in config else Pretrain
    parts: dict[str, Any] = {"method": find(config["method"]["name"]).cls()}
    if config.get("layers"):
        parts["layers"] = PARAMETRIZATIONS[config["layers"]["name"]]()
    if config.get("restarts"):
        parts["restarts"] = Restarts()
    # as a row has it: tuples are lists, paths are texts
    defaults = dict(leaves(json.loads(json.dumps(kind(**parts).to_json()))))
    yield from ("gossamer", kind.__name__.lower())
    for name in NAMED:
        if config.get(name):
            yield from (f"--{name}", config[name]["name"])
    for name, value in leaves(config):
        part, _, rest = name.partition(".")
        if name in ELSEWHERE or (part in NAMED and rest == "name"):
            continue
        if value != defaults[name] or name == "restarts.every":  # which turns restarts on
            yield from _option(rest if part == "data" and rest else name, value)


def _option(name: str, value: Any) -> Iterator[str]:
    *parts, last = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        yield "--" + ".".join([*parts, last if value else f"no-{last}"])
    else:
        yield "--" + ".".join([*parts, last])
        yield from map(str, value) if isinstance(value, list) else [str(value)]
