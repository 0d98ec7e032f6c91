"""What the commands print, and a benchmark that trains nothing twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.bench import SUITES, Recipe, presets, recipes, runner
from gossamer.bench.reading import load
from gossamer.bench.recipes import write_preset
from gossamer.cli import main
from gossamer.data import DataConfig
from gossamer.memory import predict
from gossamer.optim.contract import build, methods
from gossamer.train import pretraining

Bench = Callable[..., int]


def numbers(line: str) -> list[int]:
    """The numbers of a table's row, in order."""
    return [int(cell.replace(",", "")) for cell in re.findall(r"(?<=\s)\d[\d,]*(?=\s)", line)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_prints_what_predict_counts(tiny: Path, capsys: pytest.CaptureFixture[str], dtype: str) -> None:
    model = str(tiny / "config.json")
    assert main(["memory", "--method", "lora-pre", "--method.rank", "4", "--model", model, "--dtype", dtype]) == 0
    printed = capsys.readouterr().out.splitlines()
    width, lora_pre = getattr(torch, dtype), build("lora-pre", rank=4)
    for label, method in (("lora-pre", lora_pre), ("adamw", gossamer.AdamW())):
        memory, fused = (predict(model, method, dtype=width, implementation=way) for way in ("reference", "auto"))
        row = next(line for line in printed if f"total with {label}" in line)
        sizes = memory.parameters, memory.weights, memory.gradients, memory.state
        assert numbers(row) == [*sizes, memory.step.transient, fused.step.transient]
    memory, fused = (predict(model, lora_pre, dtype=width, implementation=way) for way in ("reference", "auto"))
    rows = [numbers(line) for line in printed]
    for line, twin in zip(memory.lines, fused.lines, strict=True):
        sizes = line.parameters, line.weights, line.gradients, line.state
        assert [*sizes, line.step.transient, twin.step.transient] in rows
    hidden = memory.lines[0].step.transient, fused.lines[0].step.transient
    assert memory.lines[0].method == "lora-pre" and 0 < hidden[1] < hidden[0]
    (said,) = (line for line in printed if line.startswith("a step takes"))
    kept = [memory.step.transient, memory.step.first, *fused.step, fused.scratch]
    assert re.findall(r"[\d.]+ MiB", said) == [f"{size / 2**20:.1f} MiB" for size in kept]


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    first_column = [line.strip("│┃| ").split()[:1] for line in capsys.readouterr().out.splitlines()]
    assert len(methods()) >= 2
    for name in methods():
        assert [name] in first_column


def test_pretrain_prints_where_its_log_is(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", *small, "--method=adamw", "--out", str(tmp_path / "run")]) == 0
    log = Path(capsys.readouterr().out.strip())
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "end"
    assert main(["report", str(tmp_path / "run")]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert "adamw" in page.read_text()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == gossamer.__version__


# --- bench ------------------------------------------------------------------------------------------------------------


PRESETS = presets("quick")


def smaller(recipe: Recipe) -> Recipe:
    """The same for a model of 32 by 32 and a run of four steps."""
    restarts = recipe.restarts and replace(recipe.restarts, every=3, recovery_steps=1)
    return replace(recipe, layers=replace(recipe.layers, rank=4), restarts=restarts)  # pyright: ignore


@pytest.fixture
def quick(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """`gossamer bench quick` with a suite of a second, into tmp_path/bench."""
    text = DataConfig(str(tiny / "train.txt"), vocab_size=300, seq_len=32)
    suite = replace(
        SUITES["quick"],
        model=str(tiny / "config.json"),
        data=text,
        steps=4,
        batch_size=4,
        eval_tokens=100,
        evals=2,
    )
    monkeypatch.setitem(SUITES, "quick", suite)
    monkeypatch.setattr(recipes, "PRESETS", tmp_path / "presets.jsonl")
    recipes.PRESETS.write_text("")
    for recipe in PRESETS.values():
        write_preset("quick", smaller(recipe) if recipe.layers else recipe, {})
    monkeypatch.chdir(tmp_path)

    def run(*options: str, out: str = "bench", methods: Sequence[str] = ("lora-pre",)) -> int:
        return main(["bench", "quick", "--out", out, "--methods", *methods, "--rounds", "1", *options])

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def train_nothing(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a finished run is trained again")


def test_bench_trains_compares_and_remembers(
    quick: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bench"
    assert quick() == 0
    printed = capsys.readouterr().out
    assert "adamw" in printed and "lora-pre" in printed
    assert Path(printed.split()[-1]).resolve() == (folder / "report.html").resolve()
    page = (folder / "report.html").read_text()
    assert "lora-pre" in page and "</html>" in page
    made = rows(folder)
    assert [row["method"] for row in made] == ["adamw", "lora-pre"]  # the reference first
    for row in made:
        preset = PRESETS[row["method"]]
        assert (row["table"], row["lr"], row["seed"], row["steps"]) == ("quick", preset.lr, 0, 4)
        log = [json.loads(line) for line in (folder / row["log"]).read_text().splitlines()]
        assert [event["step"] for event in log if event["event"] == "eval"] == [2, 4]
        assert log[-1]["perplexity"] == row["perplexity"] > 1
        memory = predict(str(row["config"]["model"]), build(**row["config"]["method"]), dtype=torch.float32)
        assert (row["state_bytes"], row["hidden_state_bytes"]) == (memory.state, memory.hidden_state)
        assert row["step_time_ratio"] > 0 and row["tokens_per_second"] > 0

    before = (folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr(runner, "pretrain", train_nothing)
    monkeypatch.setattr(runner, "probe", train_nothing)
    assert quick() == 0
    assert (folder / "rows.jsonl").read_bytes() == before
    assert "lora-pre" in capsys.readouterr().out


def test_bench_tries_every_rate_with_every_seed(quick: Bench, tmp_path: Path) -> None:
    assert quick("--lrs", "1e-3", "1e-2", "--seeds", "0", "1", "--steps", "2") == 0
    made = rows(tmp_path / "bench")
    tried = [(row["method"], row["lr"], row["seed"]) for row in made]
    assert tried == [(name, lr, seed) for name in ("adamw", "lora-pre") for lr in (1e-3, 1e-2) for seed in (0, 1)]
    assert len({row["perplexity"] for row in made if row["method"] == "adamw"}) == 4
    assert all(row["steps"] == 2 for row in made)
    assert len(list((tmp_path / "bench").rglob("log.jsonl"))) == 8


def test_bench_continues_where_it_was_stopped(
    quick: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, calls, token_loss = tmp_path / "bench", iter(range(1, 1000)), pretraining.token_loss

    def stop_at_seventh(*args: Any) -> torch.Tensor:
        if next(calls) == 7:  # step 3 of the second run
            raise KeyboardInterrupt
        return token_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "token_loss", stop_at_seventh)
        assert quick() == 130
    assert capsys.readouterr().err.splitlines()[-1] == "gossamer: interrupted"
    first = rows(folder)
    assert [row["method"] for row in first] == ["adamw"]
    assert quick() == 0
    made = rows(folder)
    assert made[0] == first[0] and [row["method"] for row in made] == ["adamw", "lora-pre"]
    log = [json.loads(line) for line in (folder / made[1]["log"]).read_text().splitlines()]
    assert [event["step"] for event in log if event["event"] == "resume"] == [2]
    assert [event["step"] for event in log if event["event"] == "train"] == [1, 2, 3, 4]


def test_bench_trains_anew_what_was_made_otherwise(quick: Bench, tmp_path: Path) -> None:
    assert quick("--steps", "2") == 0
    assert quick("--steps", "3") == 0
    made = rows(tmp_path / "bench")
    assert [row["steps"] for row in made] == [2, 2, 3, 3]
    assert quick("--steps", "3") == 0
    assert rows(tmp_path / "bench") == made


@pytest.mark.parametrize("how", ["another spelling", "moved"])
def test_bench_knows_its_folder_by_any_path(
    quick: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A finished run must not be deleted and trained again because its folder is called something else."""
    assert quick("--steps", "1") == 0
    out = tmp_path / "bench"
    if how == "moved":
        out = out.rename(tmp_path / "elsewhere")
    before = (out / "rows.jsonl").read_bytes()
    monkeypatch.setattr(runner, "pretrain", train_nothing)
    assert quick("--steps", "1", out=str(out)) == 0
    assert (out / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize("lost", [40, 1])
def test_bench_survives_a_torn_row(quick: Bench, tmp_path: Path, lost: int) -> None:
    """Torn within the row, or between the row and its newline."""
    assert quick("--steps", "1") == 0
    path = tmp_path / "bench" / "rows.jsonl"
    path.write_text(path.read_text()[:-lost])
    assert quick("--steps", "1", "--seeds", "0", "1") == 0
    tried = sorted((row["method"], row["seed"]) for row in rows(tmp_path / "bench"))
    assert tried == [("adamw", 0), ("adamw", 1), ("lora-pre", 0), ("lora-pre", 1)]


LOW_RANK = {
    # name: layers, and whether it restarts
    "low-rank": ("low-rank", False),
    "low-rank-restarts": ("low-rank", True),
    "relora": ("relora", True),
    "sltrain": ("sltrain", False),
    "sltrain-restarts": ("sltrain", True),
}


def test_bench_trains_low_rank_weights_beside_methods(
    quick: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bench"
    assert quick(methods=["lora-pre", *LOW_RANK]) == 0
    made = {row["method"]: row for row in rows(folder)}
    assert list(made) == sorted([*LOW_RANK, "lora-pre", "adamw"])  # adamw is first in the alphabet, too
    for name, (layers, restarts) in LOW_RANK.items():
        row, config = made[name], made[name]["config"]
        assert row["label"] == f"config {name} lr {PRESETS[name].lr:g} seed 0"
        assert config["method"]["name"] == "adamw" and config["layers"]["name"] == layers
        assert (config["restarts"] is not None) == restarts
        assert row["step_time_ratio"] > 0
        log = [json.loads(line) for line in (folder / row["log"]).read_text().splitlines()]
        assert [event["step"] for event in log if event["event"] == "restart"] == [3] * restarts
        memory = log[0]["memory"]
        assert row["weights_bytes"] == memory["weights"] and row["state_bytes"] == memory["state"]
        assert row["state_bytes"] < made["adamw"]["state_bytes"]
        # a frozen dense matrix beside the product costs weights, the product in its place saves them
        assert (row["weights_bytes"] < made["adamw"]["weights_bytes"]) == (layers != "relora")
    assert {method.name for method in load(folder)} == set(made)

    monkeypatch.setattr(runner, "pretrain", train_nothing)
    assert quick(methods=["lora-pre", *LOW_RANK]) == 0


def test_bench_continues_low_rank_weights_with_the_same_bits(
    quick: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, token_loss = iter(range(1, 1000)), pretraining.token_loss

    def stop_at_eighth(*args: Any) -> torch.Tensor:
        if next(calls) == 8:  # step 4 of the second run, after the restart and before a checkpoint has it
            raise KeyboardInterrupt
        return token_loss(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "token_loss", stop_at_eighth)
        assert quick(methods=["sltrain-restarts"]) == 130
    assert quick(methods=["sltrain-restarts"]) == 0
    assert quick(methods=["sltrain-restarts"], out="whole") == 0
    (_, resumed), (_, whole) = rows(tmp_path / "bench"), rows(tmp_path / "whole")
    assert resumed["perplexity"] == whole["perplexity"]
    log = [json.loads(line) for line in (tmp_path / "bench" / resumed["log"]).read_text().splitlines()]
    assert [event["step"] for event in log if event["event"] in ("resume", "restart")] == [2, 3]


def test_bench_trains_other_layers_anew(quick: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quick("--steps", "2", methods=["low-rank"]) == 0
    first = presets("quick")["low-rank"]
    write_preset("quick", replace(first, layers=replace(first.layers, alpha=8.0)), {})  # pyright: ignore
    assert quick("--steps", "2", methods=["low-rank"]) == 0
    made = rows(tmp_path / "bench")
    assert [(row["method"], (row["config"]["layers"] or {}).get("alpha")) for row in made] == [
        ("adamw", None),
        ("low-rank", 32.0),
        ("low-rank", 8.0),
    ]
