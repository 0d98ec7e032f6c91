"""Scalable Parameter and Memory Efficient Pretraining for LLM, Glentis et al., arXiv 2505.22922; and the group's SCALE.

The README of SCALE (arXiv 2506.16659) has the same models, data and token counts.

    gossamer reproduce papers/efficient_pretraining.py::benchmark --sizes 60m --dry-run
"""

from __future__ import annotations

from gossamer.bench import Claim, Order, Table
from papers import SECOND_HAND, pairs
from papers.pretraining import SIZES, SYSTEMS, runs

_SOURCE = "notes on arXiv 2505.22922"
_AGREED = f"{SECOND_HAND}; agrees with the README of SCALE"
BATCHES = 102
"""Of the group's evaluations up to 1B: 512 rows each."""

benchmark = Table(
    title="2505.22922, and every system of this library by its recipe",
    sizes=SIZES,
    methods=tuple(SYSTEMS),
    run=runs("2505.22922"),
    perplexities={
        ("stable-spam", "1b"): Claim(
            13.97, _SOURCE, f"{_AGREED}; called full-rank, in the manner of Stable-SPAM", BATCHES
        ),
        ("sltrain-restarts", "1b"): Claim(14.37, _SOURCE, SECOND_HAND, BATCHES),
        ("low-rank-restarts", "1b"): Claim(15.013, _SOURCE, SECOND_HAND, BATCHES),
        ("fira", "1b"): Claim(15.098, _SOURCE, _AGREED, BATCHES),
        ("galore", "1b"): Claim(15.573, _SOURCE, _AGREED, BATCHES),
    },
    orders=(
        Order(("stable-spam", "low-rank-restarts", "low-rank"), _SOURCE),
        Order(("stable-spam", "sltrain-restarts", "sltrain"), _SOURCE),
    ),
)

_README = "README of SCALE, arXiv 2506.16659"
PERPLEXITIES, GIGABYTES = pairs(
    SIZES,
    {
        "adamw": ((30.05, 0.35), (23.13, 0.81), (18.77, 2.21), (16.52, 8.04)),
        "stable-spam": ((28.77, 0.35), (22.20, 0.81), (16.80, 2.21), (13.97, 8.04)),
        "muon": ((28.86, 0.23), (22.20, 0.54), (16.70, 1.47), (14.18, 5.36)),
        "galore": ((34.58, 0.28), (25.31, 0.61), (19.37, 1.59), (15.57, 4.76)),
        "fira": ((30.34, 0.28), (22.96, 0.61), (16.82, 1.59), (15.10, 4.76)),
        "SWAN": ((30.00, 0.25), (22.83, 0.46), (17.14, 1.00), (14.42, 3.20)),
        "apollo": ((30.94, 0.28), (22.93, 0.61), (16.75, 1.59), (14.20, 4.76)),
        "apollo-mini": ((31.85, 0.25), (23.63, 0.46), (17.11, 1.00), (14.13, 3.20)),
        "SCALE": ((30.81, 0.15), (22.57, 0.32), (16.32, 0.80), (14.25, 2.81)),
    },
    _README,
    batches=dict.fromkeys(SIZES, BATCHES),
)
scale = Table(
    title="SCALE",
    sizes=SIZES,
    methods=("adamw", "stable-spam", "muon", "galore", "fira", "apollo", "apollo-mini"),
    run=runs("SCALE"),
    perplexities=PERPLEXITIES,
    gigabytes=GIGABYTES,
)

_PERPLEXITIES_7B, _GIGABYTES_7B = pairs(
    ("7b",),
    {"apollo": ((13.02, 16.14),), "apollo-mini": ((13.09, 14.53),), "SCALE": ((12.59, 13.74),)},
    _README,
)
scale_7b = Table(
    title="SCALE, 7B",
    sizes=("7b",),
    methods=("apollo", "apollo-mini", "muon"),
    run=runs("SCALE, 7B"),
    perplexities=_PERPLEXITIES_7B | {("muon", "7b"): Claim(12.72, "notes on arXiv 2506.16659", SECOND_HAND)},
    gigabytes=_GIGABYTES_7B | {("muon", "7b"): Claim(26.95, "notes on arXiv 2506.16659", SECOND_HAND)},
)
