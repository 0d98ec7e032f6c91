"""Zhao et al., GaLore, ICML 2024, arXiv 2403.03507."""

from __future__ import annotations

from papers import PublishedTable, cells

SIZES = ("60m", "130m", "350m", "1b")
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512}
TOKENS = {"60m": 1.1e9, "130m": 2.2e9, "350m": 6.4e9, "1b": 13.1e9}
"""As printed in Table 2. verified"""

TABLE_2 = PublishedTable(
    name="GaLore, Table 2",
    source="arXiv 2403.03507, Table 2",
    reliability="verified",
    cells=cells(
        SIZES,
        {
            "Full": ((34.06, 0.36), (25.08, 0.76), (18.80, 2.06), (15.56, 7.80)),
            "GaLore": ((34.88, 0.24), (25.36, 0.52), (18.95, 1.22), (15.64, 4.38)),
            "Low-Rank": ((78.18, 0.26), (45.51, 0.54), (37.41, 1.08), (142.53, 3.57)),
            "LoRA": ((34.99, 0.36), (33.92, 0.80), (25.58, 1.76), (19.21, 6.17)),
            "ReLoRA": ((37.04, 0.36), (29.37, 0.80), (29.08, 1.76), (18.33, 6.17)),
        },
    ),
)
"""Its memory is computed from nominal parameter counts (60M means 60e6) and rounded parts: no exact count meets it."""

WEIGHTS = {
    "Full": (0.12, 0.25, 0.68, 2.60),
    "GaLore": (0.12, 0.25, 0.68, 2.60),
    "Low-Rank": (0.08, 0.18, 0.36, 1.19),
    "LoRA": (0.20, 0.44, 1.04, 3.79),
    "ReLoRA": (0.20, 0.44, 1.04, 3.79),
}
"""Table 6, GB, one number for each of `SIZES`. verified"""

STATES = {
    "Full": (0.23, 0.51, 1.37, 5.20),
    "GaLore": (0.13, 0.28, 0.54, 1.78),
    "Low-Rank": (0.17, 0.37, 0.72, 2.38),
    "LoRA": (0.17, 0.37, 0.72, 2.38),
    "ReLoRA": (0.17, 0.37, 0.72, 2.38),
}
"""Table 6, GB, one number for each of `SIZES`. verified"""
