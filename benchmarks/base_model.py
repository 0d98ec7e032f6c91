"""A small base model to fine-tune: text, arithmetic and code, mixed into one file, and a run of `gossamer pretrain`.

    python benchmarks/base_model.py --text 'wikipedia/train-*.jsonl.xz'     # writes runs/base/mix.jsonl, then trains
    python benchmarks/base_model.py --text ... --dry-run                    # the file and the command, no training

A document in ten is arithmetic, drawn from the seed; a tenth is the Python standard library; the rest is `--text`. With
the defaults: 1.3 million parameters, 20,000 steps of 4,096 tokens (82 million). Everything is made from the
options and the seed, so the weights need not be kept.
"""

from __future__ import annotations

import json
import random
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from gossamer import AdamW
from gossamer.data import DataConfig
from gossamer.data.sources import STDLIB, open_source
from gossamer.train import Pretrain, pretrain

PROBLEMS = 40
"""Of a document of arithmetic."""


@dataclass(frozen=True)
class Options:
    """Mix and train."""

    text: str
    """Files or globs, as `gossamer pretrain --data` reads them."""
    out: Path = Path("runs/base")
    """Folder of the mixture and the run."""
    documents: int = 40_000
    """Of the mixture."""
    model: str = "tiny"
    """A size, or a configuration."""
    steps: int = 20_000
    batch_size: int = 16
    seq_len: int = 256
    lr: float = 2e-3
    seed: int = 0
    dry_run: bool = False


def arithmetic(draw: random.Random) -> str:
    """A document of sums, differences, products and comparisons."""
    lines = []
    for _ in range(PROBLEMS):
        a, b = draw.randrange(100), draw.randrange(100)
        c, d = draw.randrange(13), draw.randrange(13)
        lines.append(
            draw.choice(
                [
                    f"{a} + {b} = {a + b}",
                    f"{max(a, b)} - {min(a, b)} = {abs(a - b)}",
                    f"{c} * {d} = {c * d}",
                    f"{max(a, b)} is larger than {min(a, b)}." if a != b else f"{a} is {b}.",
                    f"Question: What is {c} times {d}?\nAnswer: {c * d}",
                ]
            )
        )
    return "\n".join(lines)


def mixture(options: Options) -> dict[str, int]:
    """Write `<out>/mix.jsonl`; returns the documents of each kind."""
    draw = random.Random(options.seed)
    share = options.documents // 10
    passed: Counter[str] = Counter()
    kinds = {
        "arithmetic": (arithmetic(draw) for _ in range(share)),
        "code": open_source(STDLIB, "train", "text").documents(passed),
        "text": open_source(options.text, "train", "text").documents(passed),
    }
    most = {"arithmetic": share, "code": share, "text": options.documents - 2 * share}
    found = [(kind, text) for kind, texts in kinds.items() for _, text in zip(range(most[kind]), texts, strict=False)]
    draw.shuffle(found)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "mix.jsonl").open("w") as file:
        for _, text in found:
            file.write(json.dumps({"text": text}) + "\n")
    return dict(Counter(kind for kind, _ in found))


def main(options: Options) -> None:
    print(f"{options.out / 'mix.jsonl'}: {mixture(options)}")
    words = ["gossamer", "pretrain", "--method", "adamw", "--method.betas", "0.9", "0.95", "--model", options.model]
    words += ["--data", str(options.out / "mix.jsonl"), "--seq-len", str(options.seq_len), "--out", str(options.out)]
    words += ["--steps", str(options.steps), "--batch-size", str(options.batch_size), "--lr", str(options.lr)]
    print(shlex.join([*words, "--seed", str(options.seed), "--save-every", "500", "--resume"]))
    if options.dry_run:
        return
    pretrain(
        Pretrain(
            AdamW(betas=(0.9, 0.95)),
            model=options.model,
            data=DataConfig(str(options.out / "mix.jsonl"), seq_len=options.seq_len),
            out=options.out,
            resume=True,
            steps=options.steps,
            batch_size=options.batch_size,
            lr=options.lr,
            save_every=500,
            seed=options.seed,
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
