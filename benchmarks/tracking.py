"""How well a compressed moment follows the exact one, on the gradients of a real small language model.

    python benchmarks/tracking.py

A Llama with d = 128 and 4 layers learns the Python standard library's text by AdamW for 300 steps. Its 28 hidden
matrices' gradients are shown to every method at every rank as they come; no method has a say in the training. Every
fifth step from the 20th on, each method's moments (`Inspectable.moments`) are compared with the exact averages of the
same gradients: relative error in the Frobenius norm, mean over the steps, geometric mean over the matrices. The floor
is the best approximation of the exact average at that rank, a truncated SVD.

Writes `results/tracking.jsonl` (one row a matrix, method and rank, and the configuration), `results/tracking.md` (the
table) and `results/tracking.svg`. About ten minutes on one core.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
import tyro
from plotly.subplots import make_subplots
from torch import Tensor, nn

import gossamer
from gossamer.data import DataConfig, open_corpus
from gossamer.evaluate import token_loss
from gossamer.models import build_model, resolve_config
from gossamer.optim.contract import Context, Method, State
from gossamer.train import log as logs
from gossamer.train.schedule import Schedule

BETAS = (0.9, 0.95)
FLOOR = "best rank-r"


@dataclass(frozen=True)
class Tracking:
    """Measure how well compressed moments follow the exact ones."""

    steps: int = 300
    """Of training."""
    ranks: tuple[int, ...] = (4, 16, 64)
    """Of 128."""
    first: int = 20
    """The step from which errors count."""
    every: int = 5
    """Steps between two looks."""
    lr: float = 1e-3
    """AdamW's, for hidden matrices; everything else trains at 4e-3."""
    batch_size: int = 16
    """Rows of 128 tokens."""
    seed: int = 0
    out: Path = Path("results")


METHODS: dict[str, tuple[int, Callable[[int], Method]]] = {
    # products with an m x n matrix for one moment in one step, and the method at a rank
    "LoRA-Pre, simultaneous": (2, lambda r: gossamer.LoRAPre(rank=r, betas=BETAS)),
    "LoRA-Pre, sequential": (2, lambda r: gossamer.LoRAPreStable(rank=r, betas=BETAS)),
    "MLorc": (2, lambda r: gossamer.MLorc(rank=r, betas=BETAS)),
    "MLorc, 1 power iteration": (4, lambda r: gossamer.MLorc(rank=r, betas=BETAS, power_iterations=1)),
    "Gossamer, square": (2, lambda r: gossamer.Gossamer(rank=r, betas=BETAS, second="square")),
    "Gossamer, absolute": (2, lambda r: gossamer.Gossamer(rank=r, betas=BETAS, second="absolute")),
    "Gossamer, rows-columns": (2, lambda r: gossamer.Gossamer(rank=r, betas=BETAS, second="rows-columns")),
}


@dataclass
class Watched:
    """One matrix: the exact averages of its gradients, and every method's state."""

    name: str
    param: nn.Parameter
    m: Tensor
    v: Tensor
    states: dict[tuple[str, int], tuple[Any, State]]
    errors: dict[tuple[str, int, str], list[float]] = field(default_factory=dict)

    def see(self, grad: Tensor, step: int, look: bool) -> None:
        self.m.lerp_(grad, 1 - BETAS[0])
        self.v.lerp_(grad.square(), 1 - BETAS[1])
        exact = {"m": self.m / (1 - BETAS[0] ** step), "v": self.v / (1 - BETAS[1] ** step)}
        best = {key: torch.linalg.svd(x, full_matrices=False) for key, x in exact.items()} if look else {}
        for (label, rank), (method, state) in self.states.items():
            generator = torch.Generator().manual_seed(step)
            method.update(grad, state, Context(step, step, step, 0.0, self.param, generator, 0))
            if look:
                self._note(label, rank, exact, method.moments(self.param, state, step, step))
        for rank in {rank for _, rank in self.states} if look else ():
            floor = {key: (u[:, :rank] * s[:rank]) @ vh[:rank] for key, (u, s, vh) in best.items()}
            self._note(FLOOR, rank, exact, {**floor, "v": floor["v"].clamp_min(0)})

    def _note(self, label: str, rank: int, exact: State, found: State) -> None:
        for key, x in exact.items():
            self.errors.setdefault((label, rank, key), []).append(float((found[key] - x).norm() / x.norm()))


def measure(options: Tracking) -> list[dict[str, Any]]:
    corpus = open_corpus(DataConfig(seq_len=128), train_tokens=options.steps * options.batch_size * 128)
    model = build_model(resolve_config("tiny"), dtype=torch.float32, device="cpu", seed=options.seed).train()
    groups = gossamer.param_groups(model, gossamer.AdamW(betas=BETAS), fallback_lr=4e-3)
    optimizer = gossamer.Optimizer(groups, lr=options.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Schedule(options.steps, options.steps // 10, 0.1))
    hidden = [
        (name, param)
        for group in groups
        for name, param, why in zip(group["param_names"], group["params"], group["why"], strict=True)
        if why == "hidden matrix"
    ]
    watched = []
    for name, param in hidden:
        kinds = {(label, rank): make(rank) for label, (_, make) in METHODS.items() for rank in options.ranks}
        states = {key: (method, method.init(param)) for key, method in kinds.items()}
        watched.append(Watched(name, param, torch.zeros_like(param), torch.zeros_like(param), states))
    for step in range(1, options.steps + 1):
        inputs, targets = corpus.train.batch((step - 1) * options.batch_size, options.batch_size, options.seed)
        loss = token_loss(model, inputs, targets) / targets.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        look = step >= options.first and step % options.every == 0
        with torch.no_grad():
            for matrix in watched:
                assert matrix.param.grad is not None
                matrix.see(matrix.param.grad, step, look)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {float(loss):.3f}", flush=True)
    return [
        {"matrix": w.name, "shape": list(w.param.shape), "method": label, "rank": rank, "moment": key, "error": mean(e)}
        for w in watched
        for (label, rank, key), e in w.errors.items()
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def summarise(rows: list[dict[str, Any]]) -> dict[tuple[str, int, str], float]:
    """Geometric means over the matrices."""
    groups: dict[tuple[str, int, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["rank"], row["moment"]), []).append(row["error"])
    return {key: float(torch.tensor(e, dtype=torch.float64).log().mean().exp()) for key, e in groups.items()}


def table(summary: dict[tuple[str, int, str], float], options: Tracking) -> str:
    ranks, lines = options.ranks, []
    for key, title in (("m", "First moment, beta1 = 0.9"), ("v", "Second moment, beta2 = 0.95")):
        lines += [
            f"## {title}",
            "",
            "Relative error; in brackets the ratio to the best approximation of that rank.",
            "",
        ]
        lines += ["| | products with an m x n matrix | " + " | ".join(f"rank {r}" for r in ranks) + " |"]
        lines += ["|---|---|" + "---|" * len(ranks)]
        for label, count in ((FLOOR, "SVD"), *((label, str(n)) for label, (n, _) in METHODS.items())):
            errors = [summary[label, r, key] for r in ranks]
            cells = [f"{e:.4f} ({e / summary[FLOOR, r, key]:.2f})" for e, r in zip(errors, ranks, strict=True)]
            lines.append(f"| {label} | {count} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += ["## What was asked of the tracker's first moment", ""]
    ours = {r: summary["Gossamer, square", r, "m"] for r in ranks}
    for rank, allowed in ((4, 1.3), (16, 1.3), (64, 1.8)):
        if rank in ranks:
            ratio = ours[rank] / summary[FLOOR, rank, "m"]
            lines.append(f"- rank {rank}: {ratio:.3f} times the floor; asked: {allowed}: {_verdict(ratio, allowed)}")
    for rank in ranks:
        ratio = ours[rank] / summary["MLorc, 1 power iteration", rank, "m"]
        lines.append(
            f"- rank {rank}: {ratio:.3f} times MLorc with one power iteration; asked: 1.15: {_verdict(ratio, 1.15)}"
        )
    return "\n".join(lines) + "\n"


def _verdict(ratio: float, allowed: float) -> str:
    return "met" if ratio <= allowed else "missed"


def plot(summary: dict[tuple[str, int, str], float], options: Tracking) -> go.Figure:
    figure = make_subplots(1, 2, subplot_titles=("first moment", "second moment"))
    colours = ("#000000", "#d62728", "#ff9896", "#1f77b4", "#17becf", "#2ca02c", "#98df8a", "#9467bd")
    for label, colour in zip((FLOOR, *METHODS), colours, strict=True):
        for column, key in enumerate(("m", "v"), 1):
            figure.add_scatter(
                x=options.ranks,
                y=[summary[label, r, key] for r in options.ranks],
                name=label,
                legendgroup=label,
                showlegend=column == 1,
                line={"color": colour, "dash": "dot" if label == FLOOR else "solid"},
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", title="rank of 128", tickvals=options.ranks)
    figure.update_yaxes(type="log", title="relative error")
    return figure.update_layout(template="plotly_white", width=1000, height=450)


def main(options: Tracking) -> None:
    rows = measure(options)
    summary = summarise(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    config = {**asdict(options), "out": None, "versions": logs.versions(), "hardware": logs.hardware()}
    lines = [{"benchmark": "tracking", "config": config, "commit": logs.commit()}, *rows]
    (options.out / "tracking.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = "python benchmarks/tracking.py"
    text = f"# Tracking the exact moments\n\n`{command}`: see its first lines for what is measured.\n\n"
    (options.out / "tracking.md").write_text(text + table(summary, options))
    print(table(summary, options))
    plot(summary, options).write_image(options.out / "tracking.svg")


if __name__ == "__main__":
    main(tyro.cli(Tracking))
