"""`gossamer bench step` for the repository: rows in `results/step.jsonl`, table and pictures beside them.

    python benchmarks/step.py                           # 130m, every method and rank of the table, every rival
    python benchmarks/step.py --model 350m --methods lora-pre --ranks 8 32 128 --threads 2
    python benchmarks/step.py --draw                    # table and pictures again, from the rows that are there

A method and rank of 130m takes a minute or two on two cores. Nothing else should run meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import tyro

from gossamer.bench import StepBench, bench_step, plots
from gossamer.bench.step import cells, read_rows, write_markdown


@dataclass(frozen=True)
class Options(StepBench):
    """Time optimizer steps beside rivals."""

    out: Path = Path("results/step.jsonl")
    """Rows are appended here."""
    draw: bool = False
    """Time nothing."""


def main(options: Options) -> None:
    if not options.draw:
        bench_step(options)
    rows = read_rows(options.out)
    write_markdown(*cells(rows), options.out.with_suffix(".md"))
    for rival, figure in plots.step_ratios(rows).items():
        picture = go.Figure(figure).update_layout(template="plotly_white", width=800, height=450, title=f"÷ {rival}")
        picture.write_image(options.out.with_name(f"{options.out.stem}_{rival}.svg"))


if __name__ == "__main__":
    main(tyro.cli(Options))
