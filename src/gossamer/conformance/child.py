"""One of the two processes: `python -m gossamer.conformance.child RANK FOLDER OPTIMIZER ARGUMENTS TASK...`"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gossamer.conformance.subject import Subject
from gossamer.conformance.trial import Model, precise, train, uneven
from gossamer.errors import first_line


def work(subject: Subject, task: str) -> Any:
    """The whole weights after four steps, or for `half` weights and state after two."""
    model = precise(uneven() if task == "uneven" else Model(), subject)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = subject.build(model)
    train(model, optimizer, range(2 if task == "half" else 4))
    if task != "half":
        return _whole(model)
    options = StateDictOptions(full_state_dict=True)
    return {"model": _whole(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}


def _whole(model: Model) -> dict[str, Tensor]:
    return {name: param.full_tensor().detach() for name, param in model.named_parameters()}  # pyright: ignore


def main(rank: int, folder: Path, name: str, arguments: dict[str, Any], tasks: list[str]) -> int:
    torch.set_num_threads(1)
    meeting = f"file://{folder.resolve()}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    for task in tasks:
        try:
            torch.save(work(Subject(name, arguments), task), folder / f"{rank}-{task}.pt")
        except Exception as error:
            draft = folder / f"{rank}.draft"
            draft.write_text(f"{type(error).__name__}: {first_line(error)}")
            draft.rename(folder / f"{rank}.error")
            return 1
    dist.barrier()  # else one leaves while the other still reads from it
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    rank, folder, name, arguments, *tasks = sys.argv[1:]
    code = main(int(rank), Path(folder), name, json.loads(arguments), tasks)
    os._exit(code)  # an interpreter that ends in the ordinary way waits for the other process
