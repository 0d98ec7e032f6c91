"""Numbers as a reader says them."""

from __future__ import annotations

import json
from typing import Any

MISSING = "–"
MIB = 2**20


def perplexity(value: float, sd: float | None = None) -> str:
    digits = 2 if value < 100 else 1 if value < 1000 else 0
    return f"{value:,.{digits}f}" + ("" if sd is None else f"\u00a0±\u00a0{sd:,.{digits}f}")


def score(percent: float, sd: float | None = None) -> str:
    return f"score {percent:.1f}" + ("" if sd is None else f"\u00a0±\u00a0{sd:.1f}") + "\u00a0%"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def mib(size: float) -> str:
    if 0 < size < 0.1 * MIB:
        return f"{size / MIB:.2g}"
    digits = 2 if size < 10 * MIB else 1 if size < 1000 * MIB else 0
    return f"{size / MIB:,.{digits}f}"


def seconds(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def rate(value: float) -> str:
    return f"{value:g}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def count(value: float) -> str:
    """A large count as a reader says it: 60.1 million."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def fact(value: Any) -> str:
    """A value of a configuration, or of whatever else a row holds."""
    if isinstance(value, int) and value >= 10_000:
        return f"{value:,}"
    return value if isinstance(value, str) else "none" if value is None else json.dumps(value)
