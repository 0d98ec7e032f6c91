"""The time of one optimizer step, in pairs with rivals in the same run: rows, a table, pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from html import escape
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from torch import nn

from gossamer.bench import naive, plots
from gossamer.bench.page import SAVE, Page, Rows, filters, plain_table
from gossamer.bench.reading import facets_of_row, step_setting
from gossamer.bench.timing import Pairs, time_pairs
from gossamer.bench.words import MISSING
from gossamer.errors import UserError, nearest
from gossamer.kernels import native
from gossamer.memory import meta_model
from gossamer.memory.measure import MakeOptimizer
from gossamer.optim import Optimizer, param_groups
from gossamer.optim.contract import Method, describe, find
from gossamer.optim.groups import hidden_linears
from gossamer.optim.methods.adamw import AdamW
from gossamer.train import jsonl
from gossamer.train.log import commit, hardware, versions

if TYPE_CHECKING:
    from rich.table import Table

Shapes = list[tuple[int, ...]]

RANKS = {
    "lora-pre": (8, 32, 128),
    "mlorc": (4, 32),
    "gossamer": (4, 32, 128),
    "galore": (128,),
    "fira": (128,),
    "apollo": (128,),
}
"""What runs if nothing is named; another method runs at its default rank."""

MOST_THREADS = 1024
BYTES_A_WEIGHT = 32
"""Of two optimizers at once, each with weights, gradients and two moments in fp32."""

REFERENCE, ADAMW, NAIVE = "reference", "adamw", "naive"


@dataclass(frozen=True)
class Rival:
    """What a step is compared with."""

    make: MakeOptimizer
    dtype: torch.dtype


@dataclass(frozen=True)
class StepBench:
    """Time the optimizer step over a model's hidden matrices, each step back to back with a rival's.

    Rivals: `naive`, the paper's equations with whole matrices (of six methods, on a CPU, in fp32); `reference`, the
    method as it reads here; `adamw`, torch's fused AdamW in fp32; `adamw-8bit`, torchao's, if it is installed; on a GPU
    also `adamw-bf16`, torch's fused AdamW with weights and moments in bf16, and `adamw-bf16-fp32`, ours with bf16
    weights and fp32 moments. No projector is computed within a timed step.
    """

    methods: tuple[str, ...] = ()
    """None named: lora-pre, mlorc, gossamer, galore, fira, apollo."""
    ranks: tuple[int, ...] = ()
    """For each method; none given: 4 to 128 as the tables in docs/performance.md."""
    rivals: tuple[str, ...] = ()
    """None named: all there are."""
    model: str = "130m"
    """A size (tiny, 9m .. 13b), or a Hugging Face config.json or a folder with one."""
    layers: int | None = None
    """Decoder layers to time at most; never more than 60 % of the free memory holds."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and gradients."""
    device: Literal["cpu", "cuda"] = "cpu"
    implementation: Literal["auto", "reference", "fused"] = "auto"
    """What is timed, as for `gossamer.Optimizer`."""
    rounds: int | None = None
    """Pairs; None: 20 on a CPU, 50 on a GPU."""
    threads: int | None = None
    """Of torch on a CPU; None: its own choice."""
    seed: int = 0
    """Of weights and gradients."""
    out: Path = Path("runs/step.jsonl")
    """Rows are appended here, and a page of all that are there is written beside."""

    def __post_init__(self) -> None:
        for name in ("layers", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} is too small; allowed: an integer >= 1")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise UserError(f"threads: {self.threads} is too large; allowed: 1 to {MOST_THREADS}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device: there is no CUDA device here; allowed: cpu")
        known = [
            *all_rivals(AdamW(), self.device, torch.float32),
            *([NAIVE] if (self.device, self.dtype) == ("cpu", "float32") else []),
        ]
        for name in self.rivals:
            if name not in known:
                raise UserError(
                    f"rivals: {name!r} is not here{nearest(name, known)}; known: {', '.join(known)}, with torchao "
                    "installed adamw-8bit, on a GPU adamw-bf16 and adamw-bf16-fp32"
                )
        if NAIVE in self.rivals and (unwritten := sorted(set(self.methods) - set(naive.EQUATIONS))):
            raise UserError(
                f"rivals: {NAIVE!r} is not written for {unwritten[0]!r}; allowed methods: {', '.join(naive.EQUATIONS)}"
            )

    def cases(self) -> list[Method]:
        """The methods, each at its ranks, with a projector that stays."""
        found = []
        for name in self.methods or RANKS:
            cls = find(name).cls
            fields = {"update_proj_gap": 1 << 30} if hasattr(cls, "update_proj_gap") else {}
            ranks = self.ranks or RANKS.get(name, (getattr(cls, "rank", None),))
            found += [cls(**fields, rank=rank) for rank in ranks] if hasattr(cls, "rank") else [cls(**fields)]
        return found


def bench_step(options: StepBench) -> list[dict[str, Any]]:
    """Time every method against every rival; appends one row a pair of them to `options.out`, and returns the rows."""
    dtype = getattr(torch, options.dtype)
    shapes, layers = hidden_shapes(options.model)
    a_layer = len(shapes) // layers
    weights = sum(nn.Parameter(torch.empty(shape, device="meta")).numel() for shape in shapes[:a_layer])
    room = int(0.6 * _free_memory(options.device) / (BYTES_A_WEIGHT * weights))
    if room < 1:
        raise UserError(f"model: one decoder layer of {options.model!r} does not fit into 60 % of the free memory")
    timed = min(layers, room, options.layers or layers)
    shapes = shapes[: timed * a_layer]
    side = min(map(min, shapes))
    for method in options.cases():
        rank = getattr(method, "rank", None)
        if rank is not None and rank >= side:
            raise UserError(f"ranks: {rank} is not below the smallest side of {options.model!r}, {side}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    jsonl.mend(options.out)
    rows = []
    with _threads(options.threads):
        for method in options.cases():
            ours = Rival(partial(make_optimizer, method, options.implementation), dtype)
            sample = nn.Parameter(torch.empty(shapes[0], dtype=dtype, device=options.device))
            (plan,) = make_optimizer(method, options.implementation, [sample]).plan()
            rivals = all_rivals(method, options.device, dtype)
            for name in options.rivals or rivals:
                if name == plan.implementation == REFERENCE:  # it has no twin here
                    continue
                row = {
                    "method": plan.method,
                    "rank": plan.rank,
                    "implementation": plan.implementation,
                    **_time(ours, rivals[name], shapes, options),
                    "rival": name,
                    "model": options.model,
                    "layers": layers,
                    "layers_timed": timed,
                    "weights_timed": timed * weights,
                    "dtype": options.dtype,
                    "device": options.device,
                    "seed": options.seed,
                    "fields": describe(method),
                    **what_runs(),
                }
                rows.append(row)
                with options.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return rows


def what_runs() -> dict[str, Any]:
    """Time, libraries, machine and commit: what every row carries."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions(), "torchao": _torchao_version()},
        "hardware": hardware(),
        "compiled_sweep": native.library() is not None,
        "commit": commit(),
    }


def hidden_shapes(model: str) -> tuple[Shapes, int]:
    """The shapes of a model's hidden matrices, layer after layer, and the number of its decoder layers."""
    built = meta_model(model, None, torch.float32)
    shapes = [tuple(linear.weight.shape) for _, linear in hidden_linears(built)]
    return shapes, built.config.num_hidden_layers  # pyright: ignore


def make_optimizer(method: Method, implementation: str, params: list[nn.Parameter]) -> Optimizer:
    return Optimizer(param_groups(params, method), implementation=implementation)


def all_rivals(method: Method, device: str, dtype: torch.dtype) -> dict[str, Rival]:
    """By name. Each has its own dtype: `adamw` is in fp32 whatever is timed."""
    fused = partial(torch.optim.AdamW, fused=True)
    rivals = {ADAMW: Rival(fused, torch.float32), REFERENCE: Rival(partial(make_optimizer, method, REFERENCE), dtype)}
    if device == "cpu" and dtype is torch.float32 and describe(method)["name"] in naive.EQUATIONS:
        rivals = {NAIVE: Rival(partial(naive.Naive, method), dtype), **rivals}
    if _torchao_version() is not None:
        from torchao.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        rivals["adamw-8bit"] = Rival(AdamW8bit, dtype)
    if device == "cuda":
        rivals["adamw-bf16"] = Rival(fused, torch.bfloat16)
        rivals["adamw-bf16-fp32"] = Rival(partial(make_optimizer, AdamW(), "auto"), torch.bfloat16)
    return rivals


def _torchao_version() -> str | None:
    try:
        return metadata.version("torchao")
    except metadata.PackageNotFoundError:
        return None


def _free_memory(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time(ours: Rival, theirs: Rival, shapes: Shapes, options: StepBench) -> dict[str, Any]:
    rounds = options.rounds or (50 if options.device == "cuda" else 20)
    mine, others = (_optimizer(side, shapes, options) for side in (ours, theirs))
    pairs = time_pairs(mine.step, others.step, rounds=rounds, device=options.device)
    return summary(pairs)


def _optimizer(side: Rival, shapes: Shapes, options: StepBench) -> torch.optim.Optimizer:
    """Over weights and gradients that are the same for everyone."""
    generator = torch.Generator(options.device).manual_seed(options.seed)
    params = []
    for shape in shapes:
        numbers = torch.randn(2, *shape, generator=generator, device=options.device)
        param = nn.Parameter(numbers[0].mul_(0.02).to(side.dtype, copy=True))
        param.grad = numbers[1].mul_(1e-3).to(side.dtype, copy=True)
        params.append(param)
    return side.make(params)


def summary(pairs: Pairs) -> dict[str, Any]:
    """Of the pairs' ratios: median, least and greatest; of either side's milliseconds: the median."""
    return {
        "ratio": pairs.ratio,
        "ratio_min": min(pairs.ratios),
        "ratio_max": max(pairs.ratios),
        "pairs": len(pairs.ours),
        "milliseconds": 1e3 * median(pairs.ours),
        "rival_milliseconds": 1e3 * median(pairs.theirs),
    }


# --- what is shown ---

CASE = ("method", "rank", "implementation")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return latest(row for _, row in jsonl.read(path))


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last row of each method, rank and rival in each setting."""
    found = {}
    for row in rows:
        found[(_line_of(row), row["rival"])] = row
    return list(found.values())


def _line_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells the lines of a table from one another."""
    return *(row[key] for key in CASE), step_setting(row)


def cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table: one line a method, rank and setting; a ratio is its median (least to greatest)."""
    rivals = list(dict.fromkeys(row["rival"] for row in rows))
    header = ["method", "rank", "step", "setting", "ms"]
    header += [title for rival in rivals for title in (f"÷ {rival}", f"{rival} ms")]
    lines: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(_line_of(row), {})[row["rival"]] = row
    body = []
    for (method, rank, implementation, setting), by_rival in lines.items():
        ms = median(row["milliseconds"] for row in by_rival.values())
        line = [method, str(rank or MISSING), implementation, setting, f"{ms:,.1f}"]
        for rival in rivals:
            row = by_rival.get(rival)
            line += [_ratio(row), f"{row['rival_milliseconds']:,.1f}"] if row else [MISSING, MISSING]
        body.append(line)
    return header, body


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"


def step_table(rows: Sequence[dict[str, Any]]) -> Table:
    """For the terminal."""
    from rich.table import Table

    header, body = cells(rows)
    table = Table(title="one optimizer step; ratios are medians of pairs, with the least and the greatest")
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index in (0, 2, 3) else "right", no_wrap=index != 3)
    for line in body:
        table.add_row(*line)
    return table


def write_markdown(header: Sequence[str], body: Sequence[Sequence[str]], path: Path) -> None:
    lines = [header, ["---"] * len(header), *body]
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def page_of(rows: Sequence[dict[str, Any]], title: str, name: str) -> Page:
    """Table and pictures of the rows, and the rows to take along in a file called `name`."""
    header, body = cells(rows)
    figures = plots.step_ratios(rows)
    facets = {_line_of(row): facets_of_row(row) for row in rows}
    parts = [f"<h1>{escape(title)}</h1>", '<p class="lead">One optimizer step; ratios are medians of pairs, with the '
             "least and the greatest.</p>", *filters(facets.values()), SAVE]  # fmt: skip
    parts += plain_table(header, body, list(facets.values()))
    for rival in figures:
        parts += [f"<h2>÷ {escape(rival)}</h2>", f'<div class="plot" id="{escape(rival)}"></div>']
    return Page(title, parts, figures, Rows(name, list(rows), [facets_of_row(row) for row in rows]))


def write_page(out: Path) -> Path:
    """The page of the rows in a file, one that needs nothing but itself. Returns its path."""
    return page_of(read_rows(out), "Gossamer: one optimizer step", out.stem).write(out.with_suffix(".html"))
