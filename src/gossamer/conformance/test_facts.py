"""Every fact as a test: `pytest --pyargs gossamer.conformance --optimizer module:Attr`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gossamer.conformance.kit import FACTS
from gossamer.conformance.plugin import VERDICT, subject


@pytest.mark.parametrize("name", FACTS)
def test_fact(name: str, pytestconfig: pytest.Config, record_property: Callable[[str, object], None]) -> None:
    verdict = FACTS[name].judge(subject(pytestconfig))
    record_property(VERDICT, verdict.to_json())
    if verdict.outcome == "not applicable":
        pytest.skip(verdict.detail)
    if verdict.outcome == "fail":
        raise AssertionError(f"{FACTS[name].sentence} But: {verdict.detail}") from verdict.error
