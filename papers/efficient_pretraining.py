"""Scalable Parameter and Memory Efficient Pretraining for LLM, Glentis et al., arXiv 2505.22922; and the group's SCALE.

The README of SCALE (arXiv 2506.16659) has the same models, data and token counts.
"""

from __future__ import annotations

from papers import Published, PublishedTable, cells

SIZES = ("60m", "130m", "350m", "1b")
TOKENS = {"60m": 1.4e9, "130m": 2.6e9, "350m": 7.8e9, "1b": 13.1e9, "7b": 19.7e9}
"""Token slots, padding included: steps times 512 rows times 256."""
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512}
"""Of every low-rank method."""

MAIN = PublishedTable(
    name="2505.22922, 1B",
    source="notes on arXiv 2505.22922; full-rank, Fira and GaLore agree with the README of SCALE",
    reliability="second-hand",
    cells={
        "Full": {"1b": Published(13.97)},
        "SLTrain-restarts": {"1b": Published(14.37)},
        "Low-Rank-restarts": {"1b": Published(15.013)},
        "Fira": {"1b": Published(15.098)},
        "GaLore": {"1b": Published(15.573)},
    },
)

SCALE = PublishedTable(
    name="SCALE",
    source="README of SCALE, arXiv 2506.16659",
    reliability="verified",
    cells=cells(
        SIZES,
        {
            "Full": ((30.05, 0.35), (23.13, 0.81), (18.77, 2.21), (16.52, 8.04)),
            "Stable-SPAM": ((28.77, 0.35), (22.20, 0.81), (16.80, 2.21), (13.97, 8.04)),
            "Muon": ((28.86, 0.23), (22.20, 0.54), (16.70, 1.47), (14.18, 5.36)),
            "GaLore": ((34.58, 0.28), (25.31, 0.61), (19.37, 1.59), (15.57, 4.76)),
            "Fira": ((30.34, 0.28), (22.96, 0.61), (16.82, 1.59), (15.10, 4.76)),
            "SWAN": ((30.00, 0.25), (22.83, 0.46), (17.14, 1.00), (14.42, 3.20)),
            "APOLLO": ((30.94, 0.28), (22.93, 0.61), (16.75, 1.59), (14.20, 4.76)),
            "APOLLO-Mini": ((31.85, 0.25), (23.63, 0.46), (17.11, 1.00), (14.13, 3.20)),
            "SCALE": ((30.81, 0.15), (22.57, 0.32), (16.32, 0.80), (14.25, 2.81)),
        },
    ),
)

SCALE_7B = PublishedTable(
    name="SCALE, 7B",
    source="README of SCALE, arXiv 2506.16659; Muon from notes",
    reliability="verified",
    cells={
        "APOLLO": {"7b": Published(13.02, 16.14)},
        "APOLLO-Mini": {"7b": Published(13.09, 14.53)},
        "SCALE": {"7b": Published(12.59, 13.74)},
        "Muon": {"7b": Published(12.72, 26.95, "second-hand")},
    },
)
