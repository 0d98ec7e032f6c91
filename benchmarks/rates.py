"""The report's learning-rate plot of a benchmark's folder, as a picture beside its rows.

python benchmarks/rates.py results/sweep_lr
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import plotly.graph_objects as go
import tyro

from gossamer.bench import plots, reading


@dataclass(frozen=True)
class Rates:
    """Draw `rates.svg` from `rows.jsonl`."""

    folder: Annotated[Path, tyro.conf.Positional]


def main(options: Rates) -> None:
    methods = reading.load(options.folder)
    figure = go.Figure(plots.rates(methods, plots.styles_of(methods)))
    figure.update_layout(template="plotly_white", width=800, height=450).write_image(options.folder / "rates.svg")


if __name__ == "__main__":
    main(tyro.cli(Rates))
