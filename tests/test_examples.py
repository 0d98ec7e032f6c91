"""Every file of examples/ runs, learns something, and continues from what it saved."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, torchrun

EXAMPLES = ROOT / "examples"
pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


def losses(output: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<!_)loss'?:? '?(\d+\.\d+)", output)]


Run = Callable[..., list[float]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(name: str, *options: str) -> list[float]:
        """The losses that the example printed, run here: its imports are those of other tests."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return losses(capfd.readouterr().out)

    return run


def test_the_plain_loop(run: Run) -> None:
    seen = run("plain_loop.py", "--steps", "40")
    assert len(seen) == 40 and sum(seen[-5:]) < 0.7 * sum(seen[:5])


def test_trainer(run: Run) -> None:
    seen = run("trainer.py", "--steps", "20")
    assert len(seen) == 4 and seen[-1] < 0.8 * seen[0]
    (more,) = run("trainer.py", "--steps", "25", "--resume")
    assert more < seen[-1]


def test_trl(run: Run) -> None:
    seen = run("trl_sft.py", "--steps", "20")
    assert len(seen) == 4 and seen[-1] < seen[0]


def test_lightning(run: Run) -> None:
    seen = run("lightning_fit.py", "--epochs", "2")
    assert len(seen) == 2 and seen[-1] < seen[0] < 5  # untrained: log 256 = 5.5
    (more,) = run("lightning_fit.py", "--epochs", "3", "--resume")
    assert more < seen[-1]


def test_fsdp2(tmp_path: Path) -> None:
    example, folder = str(EXAMPLES / "torchrun_fsdp2.py"), ("--folder", str(tmp_path))
    done = torchrun(2, example, "--steps", "9", *folder)
    assert done.returncode == 0, done.stderr
    seen = losses(done.stdout)
    assert len(seen) == 9 and sum(seen[-3:]) < 0.9 * sum(seen[:3])
    done = torchrun(2, example, "--steps", "12", "--resume", *folder)
    assert done.returncode == 0, done.stderr
    assert len(more := losses(done.stdout)) == 3 and sum(more) < sum(seen[-3:])


def test_every_example_is_short_and_tested() -> None:
    tested = re.findall(r'"(\w+\.py)"', Path(__file__).read_text())
    for path in EXAMPLES.glob("*"):
        assert path.suffix == ".py" and path.name in tested
        assert len(path.read_text().splitlines()) < 60, path.name
