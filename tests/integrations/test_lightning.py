"""Lightning: automatic optimization, which calls `step` with a closure, and Lightning's own checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import gossamer
from tests.integrations.conftest import every_method, llama, one_each, rows, same, same_state

STEPS, HALF, ACCUMULATE = 6, 3, 2
CLIP = 0.5
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no logger configured|.*`log_every_n_steps`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
]


class Lit(lightning.LightningModule):
    """Every registered method trains a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.methods, layers = every_method()
        self.model = llama(num_hidden_layers=layers, attention_dropout=0.0)  # Lightning saves no random states
        self.batches = 0

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        self.batches += 1
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        groups = gossamer.param_groups(self.model, gossamer.AdamW(), rules=one_each(self.model, self.methods))
        opt = gossamer.Optimizer(groups, lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, STEPS)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trained(folder: Path, precision: Any, resume: bool) -> tuple[Lit, torch.optim.Optimizer]:
    """The whole run, saved in the middle, or its second half."""
    module = Lit()
    trainer = lightning.Trainer(
        max_epochs=2,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        precision=precision,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True),
    )
    # whole epochs: Lightning begins one from its start unless the loader itself can be resumed
    loader = DataLoader(rows(2 * HALF * ACCUMULATE), batch_size=2)
    trainer.fit(module, loader, ckpt_path=str(folder / f"step={HALF}.ckpt") if resume else None, weights_only=True)
    (opt,) = trainer.optimizers
    assert trainer.global_step == STEPS and module.batches == ACCUMULATE * (HALF if resume else STEPS)
    return module, opt


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32-true", torch.float32), ("bf16-true", torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, precision: Any, dtype: torch.dtype) -> None:
    (whole, opt), (resumed, other) = (trained(tmp_path, precision, resume) for resume in (False, True))
    same(whole, resumed)
    same_state(opt, other)
    assert {param.dtype for param in whole.parameters()} == {dtype}
    counts = [int(state["step"]) for state in opt.state.values()]
    assert counts == [STEPS] * len(list(whole.parameters()))  # once an accumulated gradient
    assert opt.param_groups[0]["lr"] == pytest.approx(1e-3)  # the schedule's last


def test_it_is_the_plain_loop(tmp_path: Path) -> None:
    """Accumulated and clipped by hand, in fp32: Lightning's closure and clipping happen before the step, not after."""
    lit, _ = trained(tmp_path, "32-true", resume=False)
    plain = Lit()
    made = plain.configure_optimizers()
    opt, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    loader = DataLoader(rows(2 * HALF * ACCUMULATE), batch_size=2)
    for _ in range(2):
        for index, batch in enumerate(loader):
            (plain.training_step(batch) / ACCUMULATE).backward()
            if index % ACCUMULATE == ACCUMULATE - 1:
                in_order = [param for group in opt.param_groups for param in group["params"]]  # of the norm's sum
                assert torch.nn.utils.clip_grad_norm_(in_order, CLIP) > CLIP
                opt.step()
                schedule.step()
                opt.zero_grad()
    same(lit, plain)
