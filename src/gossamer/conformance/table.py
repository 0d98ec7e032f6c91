"""What came of the facts: for a terminal, as a table of several optimizers, as plain data."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

from gossamer.errors import UserError

CELLS = {"pass": "ok", "fail": "FAIL", "not applicable": "–"}


@dataclass(frozen=True)
class Verdict:
    """What came of one fact."""

    fact: str
    outcome: Literal["pass", "fail", "not applicable"]
    detail: str = ""
    """What was measured, what went wrong, or why it does not apply: one line."""
    error: Exception | None = None

    @property
    def cell(self) -> str:
        return self.detail if self.outcome == "pass" and self.detail else CELLS[self.outcome]

    def to_json(self) -> dict[str, str]:
        return {"fact": self.fact, "outcome": self.outcome, "detail": self.detail}


@dataclass(frozen=True)
class Table:
    """One optimizer's verdicts, in the order of the facts."""

    label: str
    verdicts: tuple[Verdict, ...]

    @property
    def failures(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.outcome == "fail"]

    def __str__(self) -> str:
        """The table's row standing upright, one fact a line."""
        width = max(len(verdict.fact) for verdict in self.verdicts)
        lines = [
            f"{v.fact:<{width}}  {v.cell:<8}  {'' if v.outcome == 'pass' else v.detail}".rstrip() for v in self.verdicts
        ]
        return "\n".join([self.label, *lines])

    def to_json(self) -> dict[str, Any]:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["gossamer"] = metadata.version("gossamer")
        return {"optimizer": self.label, "facts": [v.to_json() for v in self.verdicts], "versions": versions}

    @staticmethod
    def from_json(row: dict[str, Any]) -> Table:
        return Table(row["optimizer"], tuple(Verdict(**fact) for fact in row["facts"]))

    def write(self, path: Path) -> None:
        """To a .md file, anew, or as one more line of a .jsonl file."""
        check_suffix(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            path.write_text(markdown([self]))
        else:
            with path.open("a") as file:
                file.write(json.dumps(self.to_json()) + "\n")


def check_suffix(path: Path) -> None:
    if path.suffix not in (".md", ".jsonl"):
        raise UserError(f"table: cannot write {path}; allowed: a name that ends with .md or .jsonl")


def markdown(tables: Sequence[Table]) -> str:
    """A row an optimizer, a column a fact; below, what failed and why the rest does not apply."""
    columns = [verdict.fact for verdict in tables[0].verdicts]
    lines = ["| optimizer | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for table in tables:
        cells = {verdict.fact: verdict.cell for verdict in table.verdicts}
        lines.append("| " + " | ".join([f"`{table.label}`", *(cells[column] for column in columns)]) + " |")
    for title, outcome in (("FAIL", "fail"), ("–", "not applicable")):
        found: defaultdict[str, list[str]] = defaultdict(list)
        for table in tables:
            for verdict in table.verdicts:
                if verdict.outcome == outcome:
                    found[f"{verdict.fact}: {verdict.detail}".replace("|", "\\|")].append(f"`{table.label}`")
        lines += ["", f"{title}:", ""] if found else []
        lines += [f"- {what} ({', '.join(labels)})" for what, labels in found.items()]
    return "\n".join(lines) + "\n"
