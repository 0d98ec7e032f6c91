"""The conformance kit's table: every method of ours beside other people's optimizers.

    python benchmarks/conformance.py                  # rows in results/conformance.jsonl, tables in docs/conformance.md
    python benchmarks/conformance.py --only galore    # of names that contain it
    python benchmarks/conformance.py --draw           # the tables again

Other people's optimizers are not dependencies: those that are not installed are named and left out.

    pip install --no-deps torchao galore-torch bitsandbytes pytorch_optimizer torch-optimi heavyball adv_optm

On two busy cores 5 to 20 seconds each; torchao and heavyball compile first, in each process, which takes minutes.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import tyro

import gossamer
from gossamer.bench.step import what_runs
from gossamer.conformance import FACTS, Table, check, markdown
from gossamer.train import jsonl

PAGE = Path("docs/conformance.md")
MARK = "<!-- what follows is written by benchmarks/conformance.py -->\n"
RANK = 4
HERE = "benchmarks/conformance.py"


@dataclass(frozen=True)
class Peer:
    """Somebody's optimizer: `name` as `check` takes it, `package` as pip knows it."""

    name: str
    package: str
    arguments: dict[str, Any]


def low_rank_groups(params: list[torch.nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    """Matrices with the options that GaLore made usual, and the rest."""
    matrices = [p for p in params if p.ndim == 2]
    return [{"params": matrices, "rank": RANK, **options}, {"params": [p for p in params if p.ndim != 2]}]


def GaLoreAdamW(params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0):
    from galore_torch import GaLoreAdamW  # pyright: ignore[reportMissingImports]

    groups = low_rank_groups(params, update_proj_gap=200, scale=0.25, proj_type="std")
    return GaLoreAdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, no_deprecation_warning=True)


def _of_pytorch_optimizer(name: str) -> Callable[..., Any]:
    def make(params, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, maximize=False):
        cls = getattr(importlib.import_module("pytorch_optimizer"), name)
        groups = low_rank_groups(params, update_proj_gap=200, scale=0.25, projection_type="std")
        return cls(groups, lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize)

    return make


GaLore, Fira = _of_pytorch_optimizer("GaLore"), _of_pytorch_optimizer("Fira")

PEERS = (
    Peer("torch.optim:AdamW", "torch", {}),
    Peer("torch.optim:SGD", "torch", {"lr": 0.01, "momentum": 0.9}),
    Peer("torch.optim:Adafactor", "torch", {}),
    Peer("torchao.optim:AdamW8bit", "torchao", {}),
    Peer(f"{HERE}:GaLoreAdamW", "galore-torch", {}),
    Peer(f"{HERE}:GaLore", "pytorch_optimizer", {}),
    Peer(f"{HERE}:Fira", "pytorch_optimizer", {}),
    Peer("adv_optm:AdamW_adv", "adv_optm", {"nnmf_factor": True}),
    Peer("optimi:AdamW", "torch-optimi", {"lr": 1e-3}),
    Peer("heavyball:AdamW", "heavyball", {}),
)


@dataclass(frozen=True)
class Options:
    """Try every fact on every optimizer."""

    only: str = ""
    out: Path = Path("results/conformance.jsonl")
    draw: bool = False
    """Try nothing."""


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def ours() -> list[Peer]:
    return [
        Peer(
            "gossamer.conformance:method",
            "gossamer",
            {"name": name, **({"rank": RANK} if "rank" in entry.cls.__dataclass_fields__ else {})},
        )
        for name, entry in gossamer.methods().items()
    ]


def label(peer: Peer, table: Table) -> str:
    return peer.arguments["name"] if peer.package == "gossamer" else f"{peer.package} {table.label}"


def measure(options: Options) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    jsonl.mend(options.out)
    for peer in (*ours(), *PEERS):
        if options.only not in f"{peer.package} {peer.name} {peer.arguments.get('name', '')}":
            continue
        if (version := installed(peer.package)) is None:
            print(f"{peer.name}: {peer.package} is not installed: left out", flush=True)
            continue
        table = check(peer.name, **peer.arguments)
        row = {
            "optimizer": label(peer, table),
            "name": peer.name,
            "arguments": peer.arguments,
            "package": [peer.package, version],
            "facts": table.to_json()["facts"],
            **what_runs(),
        }
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['optimizer']}: {', '.join(v.fact for v in table.failures) or 'nothing fails'}", flush=True)


def draw(options: Options) -> None:
    """The newest row of each optimizer, ours first, below the mark of the page."""
    rows = {row["optimizer"]: row for _, row in jsonl.read(options.out)}
    order = [label(peer, Table(peer.name.rpartition(":")[2], ())) for peer in ours()]
    mine = [Table.from_json(rows[name]) for name in order if name in rows]
    theirs = [Table.from_json(row) for name, row in rows.items() if name not in order]
    packages = sorted({" ".join(row["package"]) for row in rows.values() if row["package"][0] != "gossamer"})
    newest = max(rows.values(), key=lambda row: row["time"])
    python = newest["versions"]["python"]
    ran = f"{newest['time'][:10]}, commit {newest['commit']}, Python {python}, {', '.join(packages)}."
    facts = "\n".join(f"- `{fact.name}`: {fact.sentence}" for fact in FACTS.values())
    parts = ["## The facts\n", facts, ""]
    for title, tables in (("## Ours\n", mine), ("## Other people's\n", theirs)):
        parts += [title, markdown(tables)] if tables else []
    parts.append(ran)
    head = PAGE.read_text().partition(MARK)[0]
    PAGE.write_text(head + MARK + "\n" + "\n".join(parts) + "\n")


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    if not chosen.draw:
        measure(chosen)
    draw(chosen)
