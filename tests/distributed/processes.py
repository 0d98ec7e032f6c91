"""Scripts in processes of their own, which join a group."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import types
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["gossamer.cli", "transformers.models.llama.modeling_llama", "tokenizers"]
    + [f"torch.distributed.{part}" for part in ("fsdp", "checkpoint.state_dict", "tensor.debug")]
)


def start(script: Path, **names: Any) -> BaseProcess:
    """`script` with `names` in its globals, in a process of its own."""
    child = processes.Process(target=runpy.run_path, args=(str(script), names, "__child__"))
    with pytest.MonkeyPatch.context() as patch:  # else the child looks for pytest's own main program first
        patch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
        child.start()
    return child


def finish(children: list[BaseProcess]) -> list[int | None]:
    for child in children:
        child.join(120)
        if child.exitcode is None:
            child.kill()
    return [child.exitcode for child in children]


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def environment(rank: int, port: str, size: int = 2) -> dict[str, str]:
    own = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return own | {name: os.environ[name] for name in ("GOSSAMER_CACHE", "OMP_NUM_THREADS")}


def on(size: int, script: Path, work: str, folder: Path) -> list[Any]:
    """What a script made of `work` in each of `size` processes; see the end of such a script."""
    port = free_port()
    files = [folder / f"{rank}.pt" for rank in range(size)]
    children = [
        start(script, options=(work, rank, environment(rank, port, size), str(files[rank]))) for rank in range(size)
    ]
    assert finish(children) == [0] * size
    return [torch.load(file) for file in files]
