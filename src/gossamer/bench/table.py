"""The results by method as texts, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.bench import words
from gossamer.bench.reading import Method, Rate, baseline, load
from gossamer.bench.words import MISSING

if TYPE_CHECKING:
    from rich.table import Table


def cells(method: Method, reference: Rate | None) -> dict[str, str]:
    """The results table's texts for one method, by column. What was not measured is a dash."""
    best = method.best

    def show(form: Callable[[float], str], name: str) -> str:
        value = best.mean(name) if best else None
        return MISSING if value is None else form(value)

    def over_baseline(name: str) -> str:
        ours, theirs = (rate.mean(name) if rate else None for rate in (best, reference))
        return words.ratio(ours / theirs) if ours is not None and theirs else MISSING

    ratio = legacy = MISSING
    tried = f"of {words.plural(len(method.rates), 'rate')}, {words.plural(len(best.runs), 'seed')}" if best else ""
    if best is None:
        perplexity = f"unfinished, step {max(run.last_step for run in method.runs):,}"
    elif best.score is not None:
        perplexity = words.score(100 * best.score, best.sd)
        if reference and reference.score:
            ratio = f"{best.score / reference.score:.3f}"
    elif best.perplexity is None:
        perplexity = "diverged"
    else:
        perplexity = words.perplexity(best.perplexity, best.sd)
        legacy = show(words.perplexity, "legacy_perplexity")
        if reference and reference.perplexity:
            ratio = f"{best.perplexity / reference.perplexity:.3f}"
    return {
        "method": method.title,
        "rate": MISSING if best is None or best.rate is None else words.rate(best.rate),
        "tried": tried,
        "perplexity": perplexity,
        "perplexity ratio": ratio,
        "weights": show(words.mib, "weights_bytes"),
        "state": show(words.mib, "state_bytes"),
        "memory ratio": over_baseline("memory_bytes"),
        "hidden": show(words.mib, "hidden_state_bytes"),
        "hidden ratio": over_baseline("hidden_state_bytes"),
        "step time": show(words.ratio, "step_time_ratio"),
        "seconds": show(words.seconds, "seconds"),
        "speed": show("{:,.0f}".format, "tokens_per_second"),
        "legacy": legacy,
    }


def summary_table(directory: Path) -> Table:
    """The results below ``directory`` as a table for the terminal, the lowest perplexity first."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    methods = load(directory)
    table = Table(box=SIMPLE, padding=(0, 0, 0, 1))  # fits eighty columns
    table.add_column("Method")
    shown = {
        "rate": "Rate",
        "perplexity": "Perplexity",
        "perplexity ratio": "÷ AdamW",
        "weights": "Weights\nMiB",
        "state": "State\nMiB",
        "step time": "Step time\n÷ AdamW",
    }
    for title in shown.values():
        table.add_column(title, justify="right", no_wrap=True)
    for method in methods:
        texts = cells(method, baseline(methods, method.setting))
        # as Text, so that brackets in a name are not markup
        table.add_row(*(Text(texts[name]) for name in ("method", *shown)))
    return table
