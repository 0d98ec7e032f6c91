"""What papers published, as data with sources, and the runs behind it: one file a paper. Nothing in the library imports
this; `gossamer reproduce --list` shows it.

Perplexities are as printed. All these repositories divide the summed loss by the number of batches plus one; where the
number of batches follows from the authors' scripts, it is there. A claim without caveats was read in the paper or the
authors' repository.
"""

from __future__ import annotations

from collections.abc import Mapping

from gossamer.bench import Claim

SECOND_HAND = "second-hand: in notes on the paper"
FROM_MEMORY = "from memory: not looked up"

Claims = dict[tuple[str, str], Claim]
"""By method and size."""


def claims(
    sizes: tuple[str, ...],
    rows: Mapping[str, tuple[float, ...]],
    source: str,
    caveats: str = "",
    batches: Mapping[str, int] | None = None,
) -> Claims:
    """Rows of numbers, one for each size; batches by size, as far as they are known."""
    return {
        (method, size): Claim(value, source, caveats, (batches or {}).get(size))
        for method, values in rows.items()
        for size, value in zip(sizes, values, strict=True)
    }


def pairs(
    sizes: tuple[str, ...],
    rows: Mapping[str, tuple[tuple[float, float], ...]],
    source: str,
    caveats: str = "",
    batches: Mapping[str, int] | None = None,
) -> tuple[Claims, Claims]:
    """Rows of (perplexity, gigabytes), one pair for each size; batches of the evaluations by size, as far as known."""
    perplexities, gigabytes = (
        {method: tuple(cell[which] for cell in row) for method, row in rows.items()} for which in (0, 1)
    )
    return claims(sizes, perplexities, source, caveats, batches), claims(sizes, gigabytes, source, caveats)
