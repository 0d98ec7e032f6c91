"""The kit's options and its table at the end of a pytest run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.conformance.kit import FACTS
from gossamer.conformance.subject import Subject
from gossamer.conformance.table import Table, Verdict, check_suffix
from gossamer.errors import UserError

VERDICT = "gossamer.verdict"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gossamer.conformance")
    group.addoption(
        "--optimizer",
        help="module:Attr or path/to/file.py:Attr of the optimizer: a class, or a function that returns one. It is "
        "called with the list of the model's parameters, or with the model if its first argument is called `model`.",
    )
    group.addoption(
        "--optimizer-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an argument for it; VALUE is JSON, or else text. May be given several times.",
    )
    group.addoption("--table", type=Path, help="write the table to this .md file, or add it to this .jsonl file")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Judge the options before anything runs."""
    try:
        _ = subject(config).factory
        if (path := config.option.table) is not None:
            check_suffix(path)
    except UserError as error:
        raise pytest.UsageError(str(error)) from None


def subject(config: pytest.Config) -> Subject:
    if config.option.optimizer is None:
        raise UserError("optimizer: none is named; add --optimizer module:Attr")
    arguments: dict[str, Any] = {}
    for given in config.option.optimizer_arg:
        key, equals, value = given.partition("=")
        if not key.isidentifier() or not equals:
            raise UserError(f"optimizer-arg: {given!r} is not KEY=VALUE")
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return Subject(config.option.optimizer, arguments)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [report for group in terminalreporter.stats.values() for report in group]
    found = [value for r in reports for key, value in getattr(r, "user_properties", ()) if key == VERDICT]
    verdicts = {value["fact"]: Verdict(**value) for value in found}
    if not verdicts:
        return
    table = Table(subject(config).label, tuple(verdicts[name] for name in FACTS if name in verdicts))
    terminalreporter.section("gossamer.conformance")
    terminalreporter.line(str(table))
    if config.option.table is not None:
        table.write(config.option.table)
        terminalreporter.line(f"written to {config.option.table}")
