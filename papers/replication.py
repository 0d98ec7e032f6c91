"""Our own comparison, at sizes that two cores train: every method and every kind of low-rank weights, each at its own
learning rate.

    gossamer reproduce papers/replication.py::tiny --data "wikipedia/train-*.jsonl.xz,wikinews/train.jsonl.xz"

Whatever is no hidden matrix (embeddings, output head, norms) is trained by one AdamW in all runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gossamer.bench import Recipe, Run, Sweep, Table, presets
from gossamer.data import DataConfig
from gossamer.layers import LORO, LoRA
from gossamer.optim.methods.adamw import AdamW
from gossamer.restarts import Restarts
from gossamer.train import Pretrain

RESTARTS = Restarts(every=50, recovery_steps=5, scope="all")
ADAMW = AdamW(betas=(0.9, 0.95))
RECIPES = presets("quick") | {
    "lora": Recipe("lora", ADAMW, 1e-3, LoRA(rank=32)),
    "loro": Recipe("loro", ADAMW, 5e-4, LORO(rank=32), RESTARTS),
}
"""What is compared: each begins at the rate that it has in `gossamer bench quick`."""

FAMILIES = {
    "full rank": ("adamw", "adamw-8bit", "adam-mini", "adafactor", "lion", "muon", "spam", "stable-spam"),
    "factored momentum": ("lora-pre", "lora-pre-stable", "lora-pre-muon", "mlorc", "mlorc-lion", "mlorc-muon",
                          "gossamer", "gossamer-lion", "gossamer-muon"),
    "projected gradients": ("galore", "galore-8bit", "golore", "fira", "apollo", "apollo-mini", "ldadam"),
    "low-rank weights": ("low-rank", "low-rank-restarts", "sltrain", "sltrain-restarts", "relora", "lora", "loro"),
}  # fmt: skip
"""Methods that save memory in the same way, or not at all."""
ALWAYS = ("adamw", "galore", "lora-pre", "mlorc", "gossamer", "low-rank", "low-rank-restarts", "sltrain",
          "sltrain-restarts")  # fmt: skip
"""What the claims are about: trained with every seed, as is the best of each family."""


def leading(losses: Mapping[str, float]) -> Iterable[str]:
    """The best of each family and those of `ALWAYS`, the best first."""
    families = [[name for name in family if name in losses] for family in FAMILIES.values()]
    best = {min(family, key=losses.__getitem__) for family in families if family}
    return sorted(best | set(ALWAYS) & losses.keys(), key=losses.__getitem__)


def run_tiny(size: str, method: str, seed: int) -> Run:
    """400 steps of 2,048 tokens; a minute or two on one core."""
    recipe = RECIPES[method]
    config = Pretrain(
        method=recipe.method,
        layers=recipe.layers,
        restarts=recipe.restarts,
        model="tiny",
        data=DataConfig("", vocab_size=2048, seq_len=256),
        steps=400,
        batch_size=8,
        lr=recipe.lr,
        fallback=ADAMW,
        fallback_lr=4e-3,
        eval_every=100,
        eval_tokens=100_000,
        save_every=100,
        keep_last=1,
        seed=seed,
    )
    return Run("tiny", size, method, config)


tiny = Table(
    title="every method, d = 128, 4 layers, 0.8 M tokens",
    sizes=("tiny",),
    methods=tuple(RECIPES),
    run=run_tiny,
    sweep=Sweep(factors=(1.0, 2.0, 0.5, 4.0), most=7, leading=leading),
)
