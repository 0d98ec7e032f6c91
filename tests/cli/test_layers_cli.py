"""Layers and restarts on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.cli import main

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that has to fail; returns the one line it says."""

    def run(*argv: str) -> str:
        code = main([*argv])
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert code == 2, captured
        assert captured.out == "" and len(lines) == 1 and lines[0].startswith("gossamer: "), captured
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--layers low-ran", "layers: unknown 'low-ran' (did you mean 'low-rank'?); known: low-rank, sltrain"),
        ("--layers=xyzzy", "layers: unknown 'xyzzy'; known: "),
        ("--layers", "layers: no name given; known: low-rank"),
        ("--layers sltrain --layers.dense 0.1", "(did you mean --layers.density?)"),
        ("--layers low-rank --layers.density 0.1", "--layers.density"),
        ("--layers.rank 4", "--layers.rank"),
        ("--layers low-rank --layers.rank four", "--layers.rank: invalid literal for int()"),
        ("--layers low-rank --layers.rank 0", "low-rank: rank is 0; allowed: an integer >= 1"),
        ("--layers sltrain --layers.density 2", "sltrain: density is 2.0; allowed: 0 < density <= 1"),
        ("--layers low-rank --layers.init svd", "--layers.init"),
        ("--layers relora", "layers: relora lives by its restarts; add --restarts.every"),
        ("--layers loro", "layers: loro lives by its restarts"),
        ("--layers relora --restarts.every 20 --restarts.no-refactorize", "layers: relora lives by its restarts"),
        ("--layer-targets mlp", "layer_targets: there are no layers to replace them by; add --layers"),
        ("--restarts.every 0", "restarts: every is 0; allowed: an integer >= 1"),
        ("--restarts 5", "restarts: an option without a value of its own; --restarts.every N turns restarts on"),
        ("--restarts.evry 20", "(did you mean --restarts.every?)"),
        ("--restarts.every 20 --restarts.scope some", "--restarts.scope"),
        ("--restarts.no-refactorize --restarts.reset None", "a restart would do nothing"),
    ],
)
def test_one_line(fails: Fails, argv: str, said: str) -> None:
    assert said in fails("pretrain", *argv.split())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--restarts.every 20", "restarts: the model has no low-rank layers; for a reset alone: "),
        ("--restarts.no-refactorize", "(--restarts.no-refactorize --restarts.scope all)"),
        ("--restarts.scope all", "restarts: the model has no low-rank layers"),
        ("--layers low-rank", "rank is 128, too much for 14 layers, such as"),
        ("--layers low-rank --layers.rank 4 --layer-targets mpl", "target 'mpl' matches no hidden linear layer"),
    ],
)
def test_values_that_only_a_run_can_judge(fails: Fails, small: list[str], tmp_path: Path, argv: str, said: str) -> None:
    """Judged before anything is written, too."""
    assert said in fails("pretrain", *small, "--out", str(tmp_path / "run"), *argv.split())
    assert not (tmp_path / "run").exists()


def start_event(out: Path) -> dict:
    return json.loads((out / "log.jsonl").read_text().splitlines()[0])


def test_what_the_options_mean(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--layers sltrain --layers.rank 4 --layers.density 0.1 --layer-targets mlp q_proj --restarts.every 2"
    options += " --restarts.recovery-steps 1 --restarts.reset first --restarts.scope all --restarts.schedule none"
    argv = ["pretrain", *small, "--method", "adamw", "--out", str(tmp_path), *options.split()]
    assert main(argv) == 0
    config = start_event(tmp_path)["config"]
    assert config["layers"] == {"name": "sltrain", "rank": 4, "alpha": 32.0, "density": 0.1, "init": "paper"}
    assert config["layer_targets"] == ["mlp", "q_proj"]
    assert config["restarts"] == {
        "every": 2, "refactorize": True, "reset": "first", "scope": "all", "recovery_steps": 1, "schedule": "none",
    }  # fmt: skip
    said = capsys.readouterr().err
    assert "sltrain in place of 8 layers" in said
    assert "step 2: restart: 8 layers rewritten, largest change of W " in said and " → 0" in said


def test_a_reset_alone(small: list[str], tmp_path: Path) -> None:
    options = "--restarts.no-refactorize --restarts.scope all --restarts.every 2 --restarts.recovery-steps 1"
    assert main(["pretrain", *small, "--method", "adamw", "--out", str(tmp_path), *options.split()]) == 0
    config = start_event(tmp_path)["config"]
    assert config["layers"] is None and config["restarts"]["refactorize"] is False
    assert '"event": "restart", "step": 2' in (tmp_path / "log.jsonl").read_text()


def test_help_of_layers_and_restarts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--layers", "sltrain", "--restarts.every", "20", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("--layers.density", "--restarts.scope", "--layer-targets", "sltrain"))
