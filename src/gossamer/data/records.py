"""Records with named fields, and where each stands, so that what is wrong with one can be said."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.data.cache import digest, file_digest
from gossamer.data.sources import HUB, open_binary, parse_line, reading
from gossamer.errors import UserError, first_line, nearest

READABLE = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".json", ".parquet")


@dataclass(frozen=True)
class Record:
    """One example as it was written."""

    where: str
    """File and line, for error messages."""
    fields: dict[str, Any]

    def text(self, field: str) -> str:
        """A field's text; numbers count as text.

        Raises:
            UserError: there is no such field, or it holds neither.
        """
        if field not in self.fields:
            known = ", ".join(self.fields) or "none"
            raise UserError(f"{self.where}: no field {field!r}{nearest(field, self.fields)}; it has: {known}")
        value = self.fields[field]
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise UserError(f"{self.where}: field {field!r} is not text but {type(value).__name__}")
        return str(value)


@dataclass(frozen=True)
class Records:
    """Records in a fixed order."""

    name: str
    fingerprint: str
    """Changes when any record, or their order, does."""
    records: list[Record]


def read_records(name: str, split: str = "train") -> Records:
    """All records of a local file (one of `READABLE`), or of a split of `hf:REPO[:CONFIG]`.

    Raises:
        UserError: it cannot be read; a line that is empty or no JSON object is named by its number.
    """
    if name.startswith(HUB):
        return _from_hub(name, split)
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"no such file: {name}; allowed: a file ({', '.join(READABLE)}) or hf:REPO[:CONFIG]")
    if not path.name.lower().endswith(READABLE):
        raise UserError(f"cannot read {name}: unknown kind of file; allowed: {', '.join(READABLE)}")
    with reading(path):
        records = list(_from_file(path))
    if not records:
        raise UserError(f"{path}: no records")
    return Records(name, digest("records", file_digest(path)), records)


def _from_file(path: Path) -> Iterator[Record]:
    if path.suffix.lower() == ".parquet":
        from pyarrow.parquet import read_table

        for number, fields in enumerate(read_table(path).to_pylist(), 1):
            yield Record(f"{path}, row {number}", fields)
    elif path.suffix.lower() == ".json":
        whole = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(whole, list):
            raise UserError(f"{path}: expected a JSON list of objects, not {type(whole).__name__}")
        for number, fields in enumerate(whole, 1):
            if not isinstance(fields, dict):
                raise UserError(f"{path}, item {number}: expected a JSON object, not {type(fields).__name__}")
            yield Record(f"{path}, item {number}", fields)
    else:
        with open_binary(path) as file:
            yield from _lines(path, file)


def _lines(path: Path, lines: Iterable[bytes]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            raise UserError(f"{where}: an empty line; every line has to be a JSON object")
        yield Record(where, parse_line(line, where))


def _from_hub(name: str, split: str) -> Records:
    from datasets import load_dataset

    repo, _, config = name.removeprefix(HUB).partition(":")
    try:
        found: Any = load_dataset(repo, config or None, split=split)
    except Exception as error:  # network, hub and format errors have no common class
        raise UserError(f"cannot open {name}, split {split}: {first_line(error)}") from error
    records = [Record(f"{name}, {split} record {number}", dict(fields)) for number, fields in enumerate(found, 1)]
    return Records(f"{name}, {split}", digest("hub records", repo, config, split, found._fingerprint), records)
