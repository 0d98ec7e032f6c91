"""The tables of docs/index.md and docs/choose.md: from committed rows, and counted by `gossamer.memory`.

    python benchmarks/pages.py

Each stands between two marks in its page; `tests/test_docs_site.py` makes them again and compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

import gossamer
from gossamer.bench import words
from gossamer.bench.reading import Method, load
from gossamer.bench.words import MISSING
from gossamer.evaluate import token_loss
from gossamer.layers import LoRA, SLTrain, apply
from gossamer.memory import Candidate, activations, meta_model, predict
from gossamer.models import resolve_config

ROOT = Path(__file__).parent.parent
GIB = 2**30

CARDS = (8, 12, 16, 24, 48, 80)
"""GiB."""
TOKENS = 1024
"""Of the one row of a forward pass."""
OURS = ("60m", "130m", "350m", "1b", "3b", "7b", "13b")


def _shape(hidden: int, intermediate: int, layers: int, heads: int, tied: bool = True) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
    }


_GEMMA = {"model_type": "gemma3_text", "vocab_size": 262144, "num_key_value_heads": 1, "head_dim": 256}
_LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
_QWEN = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}

PUBLISHED: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "Gemma 3 270M": (268_098_176, _GEMMA | _shape(640, 2048, 18, 4)),
    "Qwen3 0.6B": (596_049_920, _QWEN | _shape(1024, 3072, 28, 16)),
    "Gemma 3 1B": (999_885_952, _GEMMA | _shape(1152, 6912, 26, 4)),
    "Llama 3.2 1B": (1_235_814_400, _LLAMA | _shape(2048, 8192, 16, 32)),
    "Qwen3 1.7B": (1_720_574_976, _QWEN | _shape(2048, 6144, 28, 16)),
    "Llama 3.2 3B": (3_212_749_824, _LLAMA | _shape(3072, 8192, 28, 24)),
    "Qwen3 4B": (4_022_468_096, _QWEN | _shape(2560, 9728, 36, 32)),
    "Llama 3 8B": (8_030_261_248, _LLAMA | _shape(4096, 14336, 32, 32, tied=False)),
    "Qwen3 8B": (8_190_735_360, _QWEN | _shape(4096, 12288, 36, 32, tied=False)),
}
"""Shapes of models on the Hugging Face hub, each with the number of parameters of its published weights, which the
configuration has to give (`test_shapes_have_the_published_sizes`)."""

MODELS = (*OURS, *PUBLISHED)


def config_of(model: str) -> PretrainedConfig:
    if model in OURS:
        return resolve_config(model)
    values = dict(PUBLISHED[model][1])
    return AutoConfig.for_model(values.pop("model_type"), **values)


@dataclass(frozen=True)
class Way:
    """A way to train: a column of the cards' tables."""

    name: str
    method: Callable[[int], gossamer.Method]
    """Given the rank."""
    prepare: Callable[[nn.Module, int], object] = lambda model, rank: None
    """What is done to the dense model before, given the rank."""


def rank_of(config: PretrainedConfig) -> int:
    """The library's own, 128, or a quarter of the hidden size where that is less."""
    return min(128, config.hidden_size // 4)


def _sltrain(model: nn.Module, rank: int) -> None:
    apply(model, SLTrain(rank=rank))


def _adapters(model: nn.Module, rank: int) -> None:
    model.requires_grad_(False)
    apply(model, LoRA(rank=16))


WAYS = (
    Way("`adamw`", lambda rank: gossamer.AdamW()),
    Way("`adamw-8bit`", lambda rank: gossamer.AdamW8bit()),
    Way("`gossamer`", lambda rank: gossamer.Gossamer(rank=rank)),
    Way("`sltrain`", lambda rank: gossamer.AdamW(), _sltrain),
    Way("`lora`", lambda rank: gossamer.AdamW(), _adapters),
)
HELPS = (("", False, False), (" c", True, False), (" cr", True, True))
"""What is done besides: nothing, checkpointing, released gradients, too."""


@cache
def totals(model: str) -> dict[str, list[float]]:
    """Bytes that training `model` takes, in each of `WAYS` with each of `HELPS`."""
    config, found = config_of(model), {}
    rank = rank_of(config)
    prepared: dict[object, tuple[nn.Module, dict[bool, int]]] = {}
    for way in WAYS:
        if way.prepare not in prepared:
            built = meta_model(config, None, torch.bfloat16)
            way.prepare(built, rank)
            kept = {again: activations(built, 1, TOKENS, again, loss=token_loss) for again in (False, True)}
            prepared[way.prepare] = built, kept
        built, kept = prepared[way.prepare]
        found[way.name] = []
        for _, again, released in HELPS:
            memory = predict(built, way.method(rank), release_gradients=released)
            sizes = memory.weights, memory.gradients, memory.state, kept[again], max(memory.step)
            found[way.name].append(Candidate(way.name, "-", rank, *sizes, released).total)
    return found


def room(config: PretrainedConfig) -> float:
    """Bytes to leave free: 1 GiB for the device's context and fragmentation; and the logits with their gradient, each
    once in bf16 and once in fp32, which `gossamer.memory` does not count."""
    return GIB + 12 * config.vocab_size * TOKENS


def card_line(card: int, model: str) -> tuple[str, ...] | None:
    """How `model` trains on a card of so many GiB, in each of `WAYS`; None: in none of them."""
    left = card * GIB - room(config_of(model))
    cells = []
    for sizes in totals(model).values():
        fits = [f"{size / GIB:.1f}{mark}" for size, (mark, *_) in zip(sizes, HELPS, strict=True) if size <= left]
        cells.append(fits[0] if fits else MISSING)
    return None if set(cells) == {MISSING} else (model, *cells)


def card_table(card: int) -> str:
    lines = [line for model in MODELS if (line := card_line(card, model)) is not None]
    return table(("model", *(way.name for way in WAYS)), lines)


def home_table() -> str:
    """Every run of the quick suite, at its preset: the least state first."""
    lines = []
    for method in sorted(load(ROOT / "results" / "quick"), key=_state):
        if (best := method.best) is None or best.perplexity is None:
            continue
        perplexity = words.perplexity(best.perplexity, best.sd)
        numbers = (best.mean("hidden_state_bytes"), best.mean("memory_bytes"))
        mib = (MISSING if number is None else words.mib(number) for number in numbers)
        time = best.mean("step_time_ratio")
        lines.append((page_of(method.name), *mib, perplexity, MISSING if time is None else words.ratio(time)))
    header = ("method", "state of hidden layers, MiB", "weights and state, MiB", "perplexity", "step ÷ `torch` AdamW's")
    return table(header, lines)


def _state(method: Method) -> float:
    return (method.best and method.best.mean("hidden_state_bytes")) or 0.0


def page_of(name: str) -> str:
    """A link to the page of a method or of a layer, or the name alone."""
    for folder in ("methods", "layers"):
        page = f"{folder}/{name.removesuffix('-restarts')}.md"
        if (ROOT / "docs" / page).exists():
            return f"[`{name}`]({page})"
    return f"`{name}`"


def between_marks(page: Path) -> dict[str, str]:
    """The tables that stand in a page, by name."""
    return dict(MARKED.findall(page.read_text()))


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ("---", *("---:" for _ in header[1:]))
    return "\n".join(map(row, (header, rule, *lines)))


TABLES: Mapping[str, Callable[[], str]] = {
    "quick": home_table,
    **{f"{card} GiB": partial(card_table, card) for card in CARDS},
}
"""By the name in the mark above a table."""

MARKED = re.compile(r"(?<=<!-- benchmarks/pages.py: )(.+?) -->\n\n(.*?)\n\n(?=<!-- end -->)", re.DOTALL)


def main() -> None:
    for page in (ROOT / "docs" / "index.md", ROOT / "docs" / "choose.md"):
        page.write_text(MARKED.sub(lambda found: f"{found[1]} -->\n\n{TABLES[found[1]]()}\n\n", page.read_text()))


if __name__ == "__main__":
    main()
