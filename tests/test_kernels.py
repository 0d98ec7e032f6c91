"""The Triton kernels without a GPU: interpreted, each file of `tests/kernels` in a process of its own; and compiled."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import triton

from benchmarks import compile_kernels as gate

FILES = sorted(Path(__file__).with_name("kernels").glob("test_*.py"))
VARIANTS = gate.variants()
HARDEST = {(v.name, v.constants.get("WEIGHT"), v.constants.get("ALIGNED")): v for v in VARIANTS}
"""The last of each kind: that with the largest rank."""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_interpreted(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout


def test_every_variant_has_its_row() -> None:
    """`python benchmarks/compile_kernels.py` writes them."""
    assert sorted(map(gate.key, VARIANTS)) == sorted(gate.committed())


def test_the_page_shows_the_rows() -> None:
    assert gate.table(gate.committed().values()) in gate.PAGE.read_text()


def test_no_committed_variant_spills() -> None:
    assert [row for row in gate.committed().values() if row.stack] == []


@pytest.mark.parametrize("variant", HARDEST.values(), ids=["-".join(map(str, kind)) for kind in HARDEST])
def test_compiled(variant: gate.Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stack, and no more instructions than the row says: half of one is the table's rounding and some."""
    row = gate.committed()[gate.key(variant)]
    if triton.__version__ != row.triton:
        pytest.skip(f"the rows are of Triton {row.triton}, this is {triton.__version__}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = gate.measure(variant)
    assert found.stack == 0
    for loop, count in row.instructions.items():
        assert found.instructions[loop] <= count + 0.5


def test_a_spill_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 128 in the tiles of rank 16: too much for 255 registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    small = next(v for v in VARIANTS if v.name == "lora_pre.both" and v.constants["R"] == 16 and len(v.loops) == 2)
    assert gate.measure(dataclasses.replace(small, constants={**small.constants, "R": 128, "CN": 64})).stack > 0
