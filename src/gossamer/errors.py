"""The one error a user is meant to read: a single line that says what is wrong, where, and what is allowed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input. The command line prints its text as one line and exits with code 2."""


class Diverged(UserError):
    """A loss, a gradient or a weight that is not finite ended a run: bad input to one who trains, a result to one who
    compares."""


class Pruned(UserError):
    """A run was ended because what it had reached was not worth going on with."""


def first_line(error: Exception) -> str:
    """An error's message, short enough to quote in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def matching(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """The names in which a regular expression is found. A `UserError` that begins with `what` if it is not one."""
    try:
        return [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"{what}: {pattern!r} is not a regular expression: {first_line(error)}") from None


def nearest(word: str, allowed: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"``, or nothing where no allowed word is close to ``word``."""
    match = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
