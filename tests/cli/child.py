"""The command line in a process that may die; `tests/test_train.py` runs this file with `options` in its globals."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from gossamer.cli import main
from gossamer.train import checkpoint


def child(
    argv: list[str], environment: dict[str, str], errors: str, largest_file: int | None, die_at_sync: int | None
) -> int:
    """Run `argv` with stdout and stderr in the file `errors`."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if die_at_sync is not None:
        left, sync = iter(range(die_at_sync - 1)), checkpoint._sync

        def count_down(path: Path) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)

        checkpoint._sync = count_down
    return main(argv)


options: dict[str, Any] = globals()["options"]
sys.exit(child(**options))
