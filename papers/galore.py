"""Zhao et al., GaLore, ICML 2024, arXiv 2403.03507.

gossamer reproduce papers/galore.py::table2 --sizes 60m --methods adamw galore --dry-run
"""

from __future__ import annotations

from gossamer.bench import Table
from papers import pairs
from papers.pretraining import SIZES, runs

PERPLEXITIES, GIGABYTES = pairs(
    SIZES,
    {
        "adamw": ((34.06, 0.36), (25.08, 0.76), (18.80, 2.06), (15.56, 7.80)),
        "galore": ((34.88, 0.24), (25.36, 0.52), (18.95, 1.22), (15.64, 4.38)),
        "low-rank": ((78.18, 0.26), (45.51, 0.54), (37.41, 1.08), (142.53, 3.57)),
        "lora": ((34.99, 0.36), (33.92, 0.80), (25.58, 1.76), (19.21, 6.17)),
        "relora": ((37.04, 0.36), (29.37, 0.80), (29.08, 1.76), (18.33, 6.17)),
    },
    "arXiv 2403.03507, Table 2",
    batches={"60m": 204, "1b": 407},
)
table2 = Table(
    title="GaLore, Table 2",
    sizes=SIZES,
    methods=("adamw", "galore", "low-rank", "lora", "relora", "lora-pre", "gossamer"),
    run=runs("GaLore, Table 2"),
    perplexities=PERPLEXITIES,
    gigabytes=GIGABYTES,
)
"""Its memory is computed from nominal parameter counts (60M means 60e6) and rounded parts: no exact count meets it."""
