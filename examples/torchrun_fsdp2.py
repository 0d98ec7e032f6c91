"""FSDP2: shard the model, then make the optimizer; it steps each process's rows and saves with everybody's.

torchrun --nproc-per-node 2 examples/torchrun_fsdp2.py [--text FILE] [--steps N] [--folder FOLDER] [--resume]
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig

import gossamer

parser = argparse.ArgumentParser()
parser.add_argument("--text", type=Path, default=Path(__file__), help="what to learn, byte by byte")
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--folder", type=Path, default=Path("runs/torchrun_fsdp2"))
parser.add_argument("--resume", action="store_true", help="from --folder")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    torch.cuda.set_device(rank % torch.cuda.device_count())

torch.manual_seed(0)  # the same weights everywhere; only shards of them stay
sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **sizes)).to(device)
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
opt = gossamer.Optimizer(gossamer.param_groups(model, gossamer.LoRAPre(rank=16)), lr=3e-3)

data = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long().unfold(0, 64, 8)
first = 0
if args.resume:
    weights, state = get_state_dict(model, opt)
    saved = {"model": weights, "opt": state, "step": 0}
    dcp.load(saved, checkpoint_id=args.folder)
    set_state_dict(model, opt, model_state_dict=saved["model"], optim_state_dict=saved["opt"])
    first = saved["step"]
for step in range(first, args.steps):
    chosen = torch.randint(len(data), (8 * size,), generator=torch.Generator().manual_seed(step))[rank::size]
    loss = model(input_ids=data[chosen].to(device), labels=data[chosen].to(device)).loss
    loss.backward()
    opt.step()
    opt.zero_grad()
    if rank == 0:
        print(f"step {step + 1} loss {loss.item():.3f}")
weights, state = get_state_dict(model, opt)
dcp.save({"model": weights, "opt": state, "step": args.steps}, checkpoint_id=args.folder)
dist.destroy_process_group()
