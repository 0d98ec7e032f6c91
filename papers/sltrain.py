"""Han et al., SLTrain, NeurIPS 2024, arXiv 2406.02214."""

from __future__ import annotations

from dataclasses import dataclass

from papers import PublishedTable, cells

SIZES = ("60m", "130m", "350m", "1b")
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512}


@dataclass(frozen=True)
class Script:
    """What the authors' script for a size sets; weight decay 0, no clipping."""

    alpha: float
    density: float
    lr: float
    steps: int
    warmup: int
    """Steps."""


SCRIPTS = {
    "60m": Script(alpha=32, density=0.03, lr=3e-3, steps=11_000, warmup=1_100),
    "130m": Script(alpha=16, density=0.03, lr=3e-3, steps=22_000, warmup=2_200),
    "350m": Script(alpha=16, density=0.03, lr=3e-3, steps=65_000, warmup=6_500),
    "1b": Script(alpha=8, density=0.03, lr=3e-3, steps=140_000, warmup=10_000),
}
"""From the authors' repository. verified"""

TABLE_2 = PublishedTable(
    name="SLTrain, Table 2",
    source="arXiv 2406.02214, Table 2",
    reliability="from memory",
    cells=cells(
        SIZES,
        {
            "Full": ((34.06, 0.35), (24.36, 0.81), (18.80, 2.21), (15.56, 8.04)),
            "Low-Rank": ((78.18, 0.24), (45.51, 0.57), (37.41, 1.11), (142.5, 3.66)),
            "ReLoRA": ((37.04, 0.36), (29.37, 0.84), (29.08, 1.85), (18.33, 6.34)),
            "GaLore": ((34.88, 0.28), (25.36, 0.61), (18.95, 1.59), (15.64, 4.76)),
            "SLTrain": ((34.15, 0.26), (26.04, 0.60), (19.42, 1.24), (16.14, 4.16)),
        },
    ),
)

PARAMETERS = {
    "Full": (58e6, 134e6, 368e6, 1339e6),
    "Low-Rank": (43e6, 94e6, 185e6, 609e6),
    "ReLoRA": (58e6, 134e6, 368e6, 1339e6),
    "GaLore": (58e6, 134e6, 368e6, 1339e6),
    "SLTrain": (44e6, 97e6, 194e6, 646e6),
}
"""Table 2, one number for each of `SIZES`. from memory"""
