"""`transformers.Trainer` under accelerate's FSDP2, on two processes; torchrun runs this same file, from the bottom.

accelerate shards on accelerators only. Here it is told that its processes on a CPU are such; everything after that is
its own: the swap of the optimizer's parameters, `fully_shard`, distributed checkpoints.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

import gossamer
from gossamer.integrations import for_trainer
from tests.conftest import torchrun
from tests.integrations.conftest import every_method, llama, one_each, rows

STEPS, HALF, ROWS = 4, 2, 4


def trained(folder: Path, processes: int, resume: bool = False) -> Trainer:
    """Every registered method trains a matrix. The same rows a step, whatever the number of processes."""
    methods, layers = every_method()
    model = llama(torch.float64, num_hidden_layers=layers, attention_dropout=0.0)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // processes,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="steps",
        save_steps=HALF,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    groups = for_trainer(args, gossamer.AdamW(), rules=one_each(model, methods))
    trainer = Trainer(model=model, args=args, train_dataset=rows(), optimizer_cls_and_kwargs=groups)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    return trainer


def test_two_processes_train_as_one_and_resume(tmp_path: Path) -> None:
    done = torchrun(2, "-m", "tests.integrations.test_fsdp2", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    whole, resumed = torch.load(tmp_path / "results.pt")
    one = dict(trained(tmp_path / "one", processes=1).model.named_parameters())
    assert one.keys() == whole.keys() == resumed.keys()
    for name, param in one.items():
        assert torch.equal(whole[name], resumed[name]), name
        # sums over the batch in another order, 1e-16, which division by a second moment and an SVD amplify
        assert torch.allclose(param, whole[name], rtol=1e-6, atol=1e-8), name


# ---- one of two processes --------------------------------------------------------------------------------------------


def shard_on_cpu() -> None:
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    start = AcceleratorState.__init__

    def started(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=False,
        )

    AcceleratorState.__init__ = started


def gathered(trainer: Trainer) -> dict[str, Tensor]:
    params = dict(trainer.model.named_parameters())
    assert all(isinstance(param, DTensor) for param in params.values())
    return {name: param.full_tensor() for name, param in params.items()}  # pyright: ignore


if __name__ == "__main__":
    shard_on_cpu()
    folder = Path(sys.argv[1])
    results = [gathered(trained(folder, processes=2, resume=resume)) for resume in (False, True)]
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
