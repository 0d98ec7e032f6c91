"""Han et al., SLTrain, NeurIPS 2024, arXiv 2406.02214."""

from __future__ import annotations

from gossamer.bench import Table
from papers import FROM_MEMORY, pairs
from papers.pretraining import SIZES, runs

PERPLEXITIES, GIGABYTES = pairs(
    SIZES,
    {
        "adamw": ((34.06, 0.35), (24.36, 0.81), (18.80, 2.21), (15.56, 8.04)),
        "low-rank": ((78.18, 0.24), (45.51, 0.57), (37.41, 1.11), (142.5, 3.66)),
        "relora": ((37.04, 0.36), (29.37, 0.84), (29.08, 1.85), (18.33, 6.34)),
        "galore": ((34.88, 0.28), (25.36, 0.61), (18.95, 1.59), (15.64, 4.76)),
        "sltrain": ((34.15, 0.26), (26.04, 0.60), (19.42, 1.24), (16.14, 4.16)),
    },
    "arXiv 2406.02214, Table 2",
    FROM_MEMORY,
)
table2 = Table(
    title="SLTrain, Table 2",
    sizes=SIZES,
    methods=("adamw", "low-rank", "relora", "galore", "sltrain"),
    run=runs("SLTrain, Table 2"),
    perplexities=PERPLEXITIES,
    gigabytes=GIGABYTES,
)
"""The authors' scripts train for 11,000, 22,000, 65,000 and 140,000 steps, the 1B one with 10,000 of warm-up."""
