"""What papers published, as data with sources: one file a paper. Nothing in the library imports this.

Perplexities are as printed. All these repositories divide the summed loss by the number of batches plus one, so compare
them with `legacy_perplexity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Reliability = Literal["verified", "second-hand", "from memory"]
"""verified: read in the paper or the authors' repository; second-hand: in notes on it; from memory: not looked up."""


@dataclass(frozen=True)
class Published:
    """One cell of a table."""

    perplexity: float
    gigabytes: float | None = None
    """Weights and optimizer state, in GB of 1e9 bytes."""
    reliability: Reliability | None = None
    """If it is not the table's."""


@dataclass(frozen=True)
class PublishedTable:
    """A table: method, then size (a key of `gossamer.models.SHAPES`), then cell."""

    name: str
    source: str
    reliability: Reliability
    cells: Mapping[str, Mapping[str, Published]]

    def reliability_of(self, method: str, size: str) -> Reliability:
        return self.cells[method][size].reliability or self.reliability


def cells(
    sizes: tuple[str, ...], methods: Mapping[str, tuple[tuple[float, float], ...]]
) -> dict[str, dict[str, Published]]:
    """Rows of (perplexity, gigabytes), one pair for each size."""
    return {
        method: {size: Published(*pair) for size, pair in zip(sizes, pairs, strict=True)}
        for method, pairs in methods.items()
    }


@dataclass(frozen=True)
class ScoreTable:
    """A table of fine-tuned models: model, then method, then task, then per cent."""

    name: str
    source: str
    reliability: Reliability
    scores: Mapping[str, Mapping[str, Mapping[str, float]]]
