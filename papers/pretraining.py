"""The recipe that the papers on C4 share (GaLore's), and every system under it.

C4, T5's tokenizer, one document a row of 256 tokens, truncated or padded; 512 rows a step; bf16; 10 % warm-up, cosine
to 10 %; no weight decay, no clipping. Learning rates are the authors' where they are known: `System.known`. States are
fp32 here, bf16 in the papers' code, where a second moment cannot decay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gossamer
from gossamer.bench import Run
from gossamer.data import DataConfig
from gossamer.layers import LORO, LoRA, LowRank, Parametrization, ReLoRA, SLTrain
from gossamer.optim.contract import Method
from gossamer.restarts import Restarts
from gossamer.train import Pretrain

SIZES = ("60m", "130m", "350m", "1b")
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512}
"""Of every low-rank method."""
STEPS = {"60m": 11_000, "130m": 20_000, "350m": 60_000, "1b": 100_000, "7b": 150_000}
"""Times 131,072 token slots, padding included: 1.4, 2.6, 7.9, 13.1 and 19.7 billion. Counted without padding they are
the papers' 1.1, 2.2, 6.4 billion; some say 10,000 steps at 60M."""
MICRO = {"60m": 128, "130m": 64, "350m": 32, "1b": 16, "7b": 4}
"""Rows of one forward pass: ours, so that activations take a few GB."""
ALPHAS = {"60m": 32.0, "130m": 16.0, "350m": 16.0, "1b": 8.0}
"""Of SLTrain, from the scripts of its authors."""
RESTARTS = Restarts(every=200, recovery_steps=10, scope="all")
"""Of arXiv 2505.22922: the gap that it found best."""


@dataclass(frozen=True)
class System:
    """One way to train hidden matrices of a size."""

    method: Method
    lr: float
    known: bool
    """Whether the learning rate is the authors' for this recipe; else it is our first guess."""
    layers: Parametrization | None = None
    restarts: Restarts | None = None
    fallback_lr: float | None = None


def _galore(size: str) -> System:
    return System(gossamer.GaLore(rank=RANKS[size], update_proj_gap=200, scale=0.25), 1e-2, True)


def _golore(size: str) -> System:
    late = round(0.8 * STEPS[size])  # as the authors' C4 script: 8,000 of 10,000 steps
    return System(gossamer.GoLore(rank=RANKS[size], update_proj_gap=200, scale=1.0, random_after=late), 1e-3, True)


def _fira(size: str) -> System:
    scale = 0.0625 if size == "1b" else 0.25
    return System(gossamer.Fira(rank=RANKS[size], update_proj_gap=200, scale=scale), 1e-2, True)


def _apollo(size: str) -> System:
    return System(gossamer.Apollo(rank=256 if size == "7b" else RANKS[size], update_proj_gap=200), 1e-2, True)


def _low_rank(size: str, restarts: Restarts | None = None) -> System:
    return System(gossamer.AdamW(), 1.5e-3, size == "60m" and restarts is None, LowRank(RANKS[size]), restarts)


def _sltrain(size: str, restarts: Restarts | None = None) -> System:
    return System(gossamer.AdamW(), 3e-3, restarts is None, SLTrain(RANKS[size], alpha=ALPHAS[size]), restarts)


def _loro(size: str) -> System:
    hidden = {"60m": 512, "130m": 768, "350m": 1024, "1b": 2048}[size]
    layers, restarts = LORO(RANKS[size]), Restarts(every=500, scope="all")
    return System(gossamer.AdamW(eps=1e-6), 1e-2 * RANKS[size] / hidden, True, layers, restarts, fallback_lr=1e-2)


SYSTEMS: dict[str, Callable[[str], System]] = {
    "adamw": lambda size: System(gossamer.AdamW(), 1e-3, False),
    "stable-spam": lambda size: System(gossamer.StableSPAM(), 1e-3, False),
    "muon": lambda size: System(gossamer.Muon(), 5e-3, False, fallback_lr=1e-3),
    "lora-pre": lambda size: System(gossamer.LoRAPre(rank=RANKS[size], scale=0.25), 1e-2, False),
    "lora-pre-muon": lambda size: System(gossamer.LoRAPreMuon(rank=RANKS[size]), 5e-3, False, fallback_lr=1e-3),
    "mlorc": lambda size: System(gossamer.MLorc(rank=RANKS[size]), 1e-3, False),
    "mlorc-lion": lambda size: System(gossamer.MLorcLion(rank=RANKS[size]), 1e-4, False, fallback_lr=1e-3),
    "galore": _galore,
    "golore": _golore,
    "fira": _fira,
    "apollo": _apollo,
    "apollo-mini": lambda size: System(gossamer.ApolloMini(update_proj_gap=200), 1e-2, True),
    "lora": lambda size: System(gossamer.AdamW(), 1e-3, False, LoRA(RANKS[size])),
    "relora": lambda size: System(
        gossamer.AdamW(), 1e-3, False, ReLoRA(RANKS[size]), replace(RESTARTS, scope="factors")
    ),
    "low-rank": _low_rank,
    "low-rank-restarts": partial(_low_rank, restarts=RESTARTS),
    "sltrain": _sltrain,
    "sltrain-restarts": partial(_sltrain, restarts=RESTARTS),
    "loro": _loro,
    "gossamer": lambda size: System(gossamer.Gossamer(rank=RANKS[size]), 1e-3, False),
}
"""By name of the method or of the low-rank weights."""


def runs(table: str) -> Callable[[str, str, int], Run]:
    """The trainings of a table by this recipe."""

    def run(size: str, method: str, seed: int) -> Run:
        system = SYSTEMS[method](size)
        config: Pretrain[Any, Any, Any] = Pretrain(
            method=system.method,
            layers=system.layers,
            restarts=system.restarts,
            model=size,
            data=DataConfig("hf:allenai/c4:en", tokenizer="t5-base", seq_len=256, packing=False),
            steps=STEPS[size],
            batch_size=512,
            micro_batch_size=MICRO[size],
            lr=system.lr,
            fallback_lr=system.fallback_lr,
            clip=0.0,
            dtype="bfloat16",
            eval_every=1000,
            eval_tokens=10_000_000,
            save_every=1000,
            keep_last=1,
            seed=seed,
        )
        return Run(table, size, method, config, "" if system.known else "learning rate")

    return run
