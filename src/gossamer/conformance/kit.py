"""All facts, and what each of them says of an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gossamer.conformance import facts, processes
from gossamer.conformance.subject import NotApplicable, Subject
from gossamer.conformance.table import Table, Verdict
from gossamer.errors import first_line


@dataclass(frozen=True)
class Fact:
    """One thing that is so or not. `try_` returns what was measured (empty: nothing to measure), or raises."""

    name: str
    try_: Callable[[Subject], str]

    @property
    def sentence(self) -> str:
        return " ".join((self.try_.__doc__ or "").split())

    def judge(self, subject: Subject) -> Verdict:
        """Whatever the optimizer raises is its failure."""
        try:
            return Verdict(self.name, "pass", self.try_(subject))
        except NotApplicable as reason:
            return Verdict(self.name, "not applicable", str(reason))
        except AssertionError as error:
            return Verdict(self.name, "fail", first_line(error), error)
        except Exception as error:
            return Verdict(self.name, "fail", f"{type(error).__name__}: {first_line(error)}", error)


FACTS = {
    name.replace("_", "-"): Fact(name.replace("_", "-"), function)
    for room in (facts, processes)
    for name, function in vars(room).items()
    if getattr(function, "__module__", None) == room.__name__ and hasattr(function, "is_fact")
}
"""By name, in the order of the table's columns."""


def check(optimizer: str, **arguments: Any) -> Table:
    """Try every fact on an optimizer.

    Args:
        optimizer: `module:Attr` or `path/to/file.py:Attr`; a class, or a function that returns an optimizer, called
            with the list of the model's parameters (with the model, if its first argument is called `model`).
        arguments: given to it by keyword; JSON values, since other processes are given them too.

    Raises:
        UserError: there is no such class or function. What goes wrong in it is a fact that fails.
    """
    subject = Subject(optimizer, arguments)
    _ = subject.factory
    return Table(subject.label, tuple(fact.judge(subject) for fact in FACTS.values()))
