"""Files of one JSON object a line, to which a killed process may have written half a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gossamer.errors import UserError


def read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The file's objects with their line numbers; a torn last line is passed over, unless it lacks its newline alone.

    Raises:
        UserError: any other line is not a JSON object.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return
            raise UserError(f"{path}, line {number}: not a JSON object ({error})") from None
        yield number, value


def mend(path: Path) -> None:
    """Make the file end with a whole line, so that it can be appended to: cut a torn one, complete one without newline.

    Nothing else is written anew; a file that is not there is left so.
    """
    content = path.read_bytes() if path.exists() else b""
    last = content.rpartition(b"\n")[2]
    if not last:
        return
    try:
        json.loads(last)
    except (ValueError, RecursionError):
        with path.open("r+b") as file:
            file.truncate(len(content) - len(last))
    else:
        with path.open("ab") as file:
            file.write(b"\n")
