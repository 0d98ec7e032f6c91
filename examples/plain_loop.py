"""Your own loop: two lines make the optimizer, everything else is what you have.

python examples/plain_loop.py [--text FILE] [--steps N] [--folder FOLDER]

Saves half-way and continues from what it saved, to show that nothing else needs to be remembered.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import gossamer

parser = argparse.ArgumentParser()
parser.add_argument("--text", type=Path, default=Path(__file__), help="what to learn, byte by byte")
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--folder", type=Path, default=Path("runs/plain_loop"))
args = parser.parse_args()
CONTEXT, WIDTH = 16, 64
data = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long()


def build() -> tuple[nn.Module, gossamer.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    torch.manual_seed(0)
    hidden = [nn.Flatten(), nn.Linear(CONTEXT * WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH), nn.LayerNorm(WIDTH)]
    model = nn.Sequential(nn.Embedding(256, WIDTH), *hidden)
    model.lm_head = nn.Linear(WIDTH, 256)  # a last name that says it is the output head
    opt = gossamer.Optimizer(gossamer.param_groups(model, gossamer.LoRAPre(rank=16)), lr=2e-3, weight_decay=0.01)
    return model, opt, torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, args.steps)


def train(model: nn.Module, opt: gossamer.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler, steps: range):
    for step in steps:
        starts = torch.randint(len(data) - CONTEXT, (64,), generator=torch.Generator().manual_seed(step))
        rows = torch.stack([data[start : start + CONTEXT + 1] for start in starts])
        loss = nn.functional.cross_entropy(model(rows[:, :-1]), rows[:, -1])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        opt.zero_grad()
        print(f"step {step + 1} loss {loss.item():.3f}")


model, opt, schedule = build()
print(opt.plan())
train(model, opt, schedule, range(args.steps // 2))
args.folder.mkdir(parents=True, exist_ok=True)
names = ("model", "opt", "schedule")
saved = {name: part.state_dict() for name, part in zip(names, (model, opt, schedule), strict=True)}
torch.save(saved, args.folder / "half.pt")

model, opt, schedule = build()  # another process, another day
saved = torch.load(args.folder / "half.pt", weights_only=True)
for name, part in zip(names, (model, opt, schedule), strict=True):
    part.load_state_dict(saved[name])
train(model, opt, schedule, range(args.steps // 2, args.steps))
