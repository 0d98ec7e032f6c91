"""Our own comparison, at sizes that two cores train: every method and every kind of low-rank weights, each at its own
learning rate.

    gossamer reproduce papers/replication.py::tiny --data "wikipedia/train-*.jsonl.xz,wikinews/train.jsonl.xz"

then `ranks` and `small`, which take their learning rates from what `tiny` found, and `floor`.

Whatever is no hidden matrix (embeddings, output head, norms) is trained by one AdamW in all runs. Its rate is high: the
sooner the embeddings are learnt, the more of so short a run is about the matrices that the methods differ in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import gossamer
from gossamer.bench import Follow, Order, Recipe, Run, Suite, Sweep, Table
from gossamer.data import DataConfig
from gossamer.layers import LORO, LoRA, LowRank, ReLoRA, SLTrain
from gossamer.models import SHAPES
from gossamer.restarts import Restarts

STEPS = 600
RANK = 32
"""Of every low-rank method but APOLLO-Mini: a quarter of d, as in the papers at 60M."""
RESTARTS = Restarts(every=100, recovery_steps=10, scope="all")
BETAS = (0.9, 0.95)
ADAMW = gossamer.AdamW(betas=BETAS)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("adafactor", gossamer.Adafactor(), 0.015),
        Recipe("adam-mini", gossamer.AdamMini(betas=BETAS), 4e-4),
        Recipe("adamw", ADAMW, 4e-4),
        Recipe("adamw-8bit", gossamer.AdamW8bit(betas=BETAS), 4e-4),
        Recipe("apollo", gossamer.Apollo(rank=RANK, betas=BETAS, update_proj_gap=50), 3e-3),
        Recipe("apollo-mini", gossamer.ApolloMini(betas=BETAS, update_proj_gap=50), 1e-3),
        Recipe("fira", gossamer.Fira(rank=RANK, betas=BETAS), 2e-3),
        Recipe("galore", gossamer.GaLore(rank=RANK, betas=BETAS), 6e-4),
        Recipe("galore-8bit", gossamer.GaLore8bit(rank=RANK, betas=BETAS), 6e-4),
        Recipe("golore", gossamer.GoLore(rank=RANK, betas=BETAS, random_after=STEPS * 4 // 5), 6e-4),
        Recipe("gossamer", gossamer.Gossamer(rank=RANK), 4e-4),
        Recipe("gossamer-lion", gossamer.GossamerLion(rank=RANK), 2e-4),
        Recipe("gossamer-muon", gossamer.GossamerMuon(rank=RANK), 5e-3),
        Recipe("ldadam", gossamer.LDAdam(rank=RANK), 6e-4),
        Recipe("lion", gossamer.Lion(), 2e-4),
        Recipe("lora-pre", gossamer.LoRAPre(rank=RANK), 2e-4),
        Recipe("lora-pre-muon", gossamer.LoRAPreMuon(rank=RANK), 5e-3),
        Recipe("lora-pre-stable", gossamer.LoRAPreStable(rank=RANK), 2e-4),
        Recipe("low-rank", ADAMW, 2.5e-4, LowRank(rank=RANK)),
        Recipe("low-rank-restarts", ADAMW, 2.5e-4, LowRank(rank=RANK), RESTARTS),
        Recipe("mlorc", gossamer.MLorc(rank=RANK, power_iterations=1, betas=BETAS), 4e-4),
        Recipe("mlorc-lion", gossamer.MLorcLion(rank=RANK, power_iterations=1), 2e-4),
        Recipe("mlorc-muon", gossamer.MLorcMuon(rank=RANK, power_iterations=1), 5e-3),
        Recipe("muon", gossamer.Muon(), 5e-3),
        Recipe("relora", ADAMW, 1e-3, ReLoRA(rank=RANK), RESTARTS),
        Recipe("sltrain", ADAMW, 2e-3, SLTrain(rank=RANK)),
        Recipe("sltrain-restarts", ADAMW, 2e-3, SLTrain(rank=RANK), RESTARTS),
        Recipe("spam", gossamer.SPAM(betas=BETAS), 4e-4),
        Recipe("stable-spam", gossamer.StableSPAM(betas=BETAS), 4e-4),
        Recipe("lora", ADAMW, 1e-3, LoRA(rank=RANK)),
        Recipe("loro", ADAMW, 5e-4, LORO(rank=RANK), RESTARTS),
    )
}
"""What is compared, by name, and the rate at which each begins."""

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


_BENCHMARK, _LORA_PRE = "arXiv 2505.22922", "arXiv 2602.24283"
_LATER = "asked after `tiny` was seen"
ORDERS = (
    Order(("adamw", "low-rank-restarts", "low-rank"), _BENCHMARK),
    Order(("adamw", "sltrain-restarts", "sltrain"), _BENCHMARK),
    Order(("lora-pre", "galore"), _LORA_PRE),
    Order(("lora-pre", "adamw"), _LORA_PRE),
    Order(("gossamer", "lora-pre"), "ours"),
    Order(("gossamer", "mlorc"), "ours"),
    Order(("lora-pre-stable", "lora-pre"), _LATER),
    Order(("lora-pre-stable", "galore"), _LATER),
    Order(("lora-pre-stable", "adamw"), _LATER),
    Order(("ldadam", "sltrain", "galore"), _LATER),
    Order(("ldadam", "adamw"), _LATER),
    Order(("sltrain", "adamw"), _LATER),
    Order(("adafactor", "adamw"), _LATER),
)


def _run(table: str, recipe: Recipe, size: str, seed: int, method: str | None = None) -> Run:
    """614,400 tokens of the text that `--data` names."""
    suite = Suite(
        size,
        DataConfig("", vocab_size=SHAPES[size].vocab, seq_len=256),
        steps=STEPS,
        batch_size=4,
        fallback_lr=0.016,
        eval_tokens=50_000,
        evals=2,
    )
    config = replace(suite.config(recipe, seed), fallback=ADAMW)
    return Run(table, size, method or recipe.name, config)


def run_tiny(size: str, method: str, seed: int) -> Run:
    """Two minutes on one core."""
    return _run("tiny", RECIPES[method], size, seed)


def run_floor(size: str, method: str, seed: int) -> Run:
    """AdamW at a rate that moves no hidden matrix."""
    return _run("floor", Recipe(method, ADAMW, 1e-12), size, seed)


floor = Table(
    title="hidden matrices left as they were drawn: what all methods begin from",
    sizes=("tiny", "small"),
    methods=("frozen",),
    run=run_floor,
)

tiny = Table(
    title="every method, d = 128, 4 layers, 0.6 M tokens",
    sizes=("tiny",),
    methods=tuple(RECIPES),
    run=run_tiny,
    orders=ORDERS,
    sweep=Sweep(factors=(2.0, 4.0, 1.0, 8.0), most=6, leading=leading),
)

_EIGHTH = f"{_LORA_PRE}, Figure 2: an eighth of the rank is enough"
RANKS = (4, 8, 16, 32, 64, 128)


def _without_rank(method: str) -> str:
    return method.rpartition("-r")[0]


def run_rank(size: str, method: str, seed: int) -> Run:
    """`galore-r16` is GaLore at rank 16; of d = 128."""
    recipe = RECIPES[_without_rank(method)]
    ranked: Any = replace(recipe.method, rank=int(method.rpartition("-r")[2]))  # pyright: ignore
    return _run("ranks", replace(recipe, method=ranked), size, seed, method)


ranks = Table(
    title="LoRA-Pre and GaLore by rank, from the two rates that were best in `tiny`",
    sizes=("tiny",),
    methods=tuple(f"{method}-r{rank}" for rank in RANKS for method in ("lora-pre", "galore")),
    run=run_rank,
    orders=tuple(Order((f"lora-pre-r{rank // 8}", f"galore-r{rank}"), _EIGHTH, 0.01) for rank in (32, 64, 128)),
    follows=Follow("tiny", "tiny", rates=2, method_of=_without_rank),
    sweep=Sweep(most=4),
)
"""An eighth of the rank is enough if perplexity rises by less than 1 %. At rank 128 both are AdamW."""


def run_small(size: str, method: str, seed: int) -> Run:
    """Ten minutes on one core; ranks are a quarter of d, as in `tiny`."""
    recipe = RECIPES[method]
    parts: dict[str, Any] = {
        name: replace(part, rank=2 * RANK)  # pyright: ignore
        for name in ("method", "layers")
        if getattr(part := getattr(recipe, name), "rank", None) == RANK
    }
    return _run("small", replace(recipe, **parts), size, seed)


small = Table(
    title="the leading six of `tiny` and AdamW, d = 256, 8 layers, 0.6 M tokens, from the two rates that were best",
    sizes=("small",),
    methods=tuple(RECIPES),
    run=run_small,
    orders=ORDERS,
    follows=Follow("tiny", "tiny", rates=2, leading=6, always=("adamw",)),
    sweep=Sweep(most=4),
)
"""Rates do not carry over: what is best at d = 128 is too high here, so that the next ones are tried as well."""
