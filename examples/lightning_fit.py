"""Lightning: `configure_optimizers` returns the optimizer, and a schedule if there is one.

python examples/lightning_fit.py [--text FILE] [--epochs N] [--out FOLDER] [--resume]
"""

import argparse
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import gossamer

parser = argparse.ArgumentParser()
parser.add_argument("--text", type=Path, default=Path(__file__), help="what to learn, byte by byte")
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--out", type=Path, default=Path("runs/lightning_fit"))
parser.add_argument("--resume", action="store_true", help="from out/last.ckpt")
args = parser.parse_args()

LENGTH = 64
ids = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8).long()
loader = torch.utils.data.DataLoader(ids.unfold(0, LENGTH, LENGTH // 8), batch_size=8)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.model: nn.Module = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **sizes))

    def training_step(self, rows: Tensor, index: int) -> Tensor:
        loss = self.model(input_ids=rows, labels=rows).loss
        if index == len(loader) - 1:
            print(f"epoch {self.current_epoch} loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self):
        opt = gossamer.Optimizer(gossamer.param_groups(self.model, gossamer.LoRAPre(rank=16)), lr=3e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, args.epochs * len(loader))
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


lightning.seed_everything(0)
trainer = lightning.Trainer(
    max_epochs=args.epochs,
    gradient_clip_val=1.0,
    logger=False,
    enable_progress_bar=False,
    callbacks=lightning.pytorch.callbacks.ModelCheckpoint(args.out, save_last=True),
)
trainer.fit(Module(), loader, ckpt_path=args.out / "last.ckpt" if args.resume else None, weights_only=True)
