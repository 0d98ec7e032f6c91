"""Sweeps: what is tried, by how many processes, within which budget, and what is made of it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.bench import SUITES, presets, recipes, runner
from gossamer.bench.recipes import Recipe, write_preset
from gossamer.bench.space import Knob, parse, place, spread
from gossamer.bench.study import Search, Study, Trial
from gossamer.bench.sweep import figure, found_in, trials_table
from gossamer.cli import main
from gossamer.data import DataConfig
from gossamer.errors import UserError
from gossamer.layers import LowRank
from gossamer.optim.contract import build, methods
from gossamer.optim.methods.adamw import AdamW
from gossamer.restarts import Restarts
from gossamer.train import pretraining

COST = 4 * 4 * 32
"""Tokens of a trial of the suite below."""

Run = Callable[..., int]


@pytest.fixture
def suite(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick suite in less than a second, presets of its own, and the folder in which commands are given."""
    text = DataConfig(str(tiny / "train.txt"), vocab_size=300, seq_len=32)
    small = replace(
        SUITES["quick"], model=str(tiny / "config.json"), data=text, steps=4, batch_size=4, eval_tokens=100, evals=2
    )
    monkeypatch.setitem(SUITES, "quick", small)
    monkeypatch.setattr(recipes, "PRESETS", tmp_path / "presets.jsonl")
    (tmp_path / "presets.jsonl").write_text("")
    write_preset("quick", Recipe("adamw", AdamW(), 1e-3), {"rows": "none"})
    write_preset("quick", Recipe("low-rank", AdamW(), 1e-3, LowRank(rank=4), Restarts(every=3)), {"rows": "none"})
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def sweep(suite: None, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`gossamer sweep adamw` with a budget in trials, into tmp_path/study; without timings, which take longest here."""
    monkeypatch.setattr(runner, "probe", lambda *args, **options: {})

    def run(*options: str, trials: float = 3, name: str = "adamw", out: str = "study") -> int:
        return main(["sweep", name, "--tokens", str(trials * COST), "--out", out, *options])

    return run


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def train_nothing(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a finished trial is trained again")


# --- the space --------------------------------------------------------------------------------------------------------

RECIPE = Recipe("low-rank", AdamW(), 1e-3, LowRank(rank=4), Restarts(every=3))


def test_a_space_is_of_the_recipes_own_fields() -> None:
    space = [
        "lr=1e-4:1e-2",
        "rank=2,4",
        "betas=[0.9,0.95],[0.9,0.999]",
        "every=2:9",
        "reset=first,second",
        "eps=0:1e-6",
    ]
    knobs = parse(space, RECIPE, 1e-3)
    assert knobs == (
        Knob("lr", (1e-4, 1e-2)),
        Knob("rank", None, (2, 4)),
        Knob("betas", None, ((0.9, 0.95), (0.9, 0.999))),
        Knob("every", (2, 9)),
        Knob("reset", None, ("first", "second")),
        Knob("eps", (0.0, 1e-6)),
    )
    values = {knob.name: knob.value(knob.at(0.99)) for knob in knobs}
    placed = place(RECIPE, values)
    assert (placed.lr, placed.layers) == (9.55e-3, LowRank(rank=4))
    assert placed.method == AdamW(betas=(0.9, 0.999), eps=9.9e-7)
    assert placed.restarts == Restarts(every=9, reset="second")


def test_a_learning_rate_left_out_is_looked_for_around_the_presets() -> None:
    assert parse(["rank=2,4"], RECIPE, 8e-3)[1] == Knob("lr", (1e-3, 64e-3))


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("lr", "'lr'; allowed: NAME=LOW:HIGH, or NAME=VALUE,VALUE"),
        ("=3", "allowed: NAME=LOW:HIGH"),
        ("rnk=3,4", "low-rank has no 'rnk' (did you mean 'rank'?); known: lr, betas"),
        ("rank=0,4", "low-rank: rank is 0"),
        ("rank=0:8", "low-rank: rank is 0"),
        ("rank=2.5", "rank is 2.5; allowed: values like 4"),
        ("rank=many", "rank is 'many'; allowed: values like 4"),
        ("rank=0:4:8", "rank is '4:8'"),
        ("rank=8:4", "rank=8:4; allowed: 0 <= LOW < HIGH"),
        ("rank=4,4", "rank=4,4 has a value twice"),
        ("lr=0,1e-3", "lr is 0.0; allowed: finite numbers > 0"),
        ("lr=-1e-3:1", "allowed: 0 <= LOW < HIGH"),
        ("lr=1e-3:Infinity", "allowed: 0 <= LOW < HIGH"),
        ("betas=0.9:0.99", "betas is no number"),
        ("betas=[0.9,1.5]", "beta2 is 1.5"),
        ("refactorize=0:1", "refactorize is no number"),
        ("refactorize=1,0", "refactorize is 1; allowed: values like True"),
        ("init=none", "init is 'none'"),
    ],
)
def test_a_bad_space_is_one_line(space: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse([space], RECIPE, 1e-3)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_other_bad_input_is_one_line(suite: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, said in (
        ("adamw --tokens 0", "tokens: 0.0 is out of range"),
        ("adamw", "--tokens"),
        ("adamv --tokens 1e9", "name: unknown 'adamv' (did you mean 'adamw'?)"),
        (f"adamw --tokens {COST - 1}", f"tokens: {COST - 1} do not hold one trial of {COST}"),
        ("lion --tokens 1e9", "lion has no preset to look around; add lr=LOW:HIGH"),
        ("adamw --tokens 1e9 --evals 1 --prune median", "prune: a trial is evaluated once, at its end; add --evals"),
        ("adamw --tokens 1e9 --evals 0", "evals: 0 is too small"),
        ("adamw --tokens 1e9 --steps 9 --write", "write: a preset of quick is found on its own model, text and length"),
        ("adamw --tokens 1e9 --steps 0", "steps: 0 is too small"),
        ("adamw --tokens 1e9 --space lr=1e-3 lr=1e-2", "space: lr is there twice"),
        ("adamw --tokens 1e9 --seed -1", "seed: -1 is out of range"),
    ):
        assert main(["sweep", *words.split()]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line, words
    assert not (tmp_path / "runs").exists()


def test_the_first_trials_cover_every_knob() -> None:
    knobs = [Knob("lr", (1e-4, 1e-2)), Knob("scale", (0.0, 1.0)), Knob("rank", None, (2, 4)), Knob("every", (1, 1000))]
    points = spread(knobs, 4, seed=0)
    assert sorted(point["lr"] for point in points) == pytest.approx(
        [1e-4 * 100**part for part in (1 / 8, 3 / 8, 5 / 8, 7 / 8)]
    )
    assert sorted(point["scale"] for point in points) == pytest.approx([1 / 8, 3 / 8, 5 / 8, 7 / 8])
    assert sorted(point["rank"] for point in points) == ["2", "2", "4", "4"]
    assert sorted(point["every"] for point in points) == [2, 13, 75, 422]  # by the logarithm, rounded
    assert points != spread(knobs, 4, seed=1)


# --- studies ----------------------------------------------------------------------------------------------------------


def test_a_sweep_keeps_to_its_budget_and_remembers(
    sweep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(trials=2.9) == 0
    printed = capsys.readouterr().out
    assert f"{2 * COST:,} of {2.9 * COST:,.0f} tokens" in printed and "best: trial" in printed
    made = rows(tmp_path / "study")
    assert [row["label"].rpartition(" ")[2] for row in made] == ["0", "1"]
    assert made[0]["lr"] == 1e-3  # the preset's own comes first
    assert all(row["tokens"] == COST and row["table"] == "sweep adamw" for row in made)
    assert not list((tmp_path / "study").rglob("checkpoints"))

    with monkeypatch.context() as patch:
        patch.setattr(runner, "pretrain", train_nothing)
        assert sweep(trials=2.9) == 0
    assert sweep(trials=3) == 0  # a larger budget goes on
    assert rows(tmp_path / "study")[:2] == made and len(rows(tmp_path / "study")) == 3


def test_trials_do_not_depend_on_how_often_a_study_was_stopped(sweep: Run, tmp_path: Path) -> None:
    """Beyond the first ones, too, which are lined up at the start."""
    assert sweep(trials=6, out="whole") == 0
    for trials in (4, 6):
        assert sweep(trials=trials, out="parts") == 0
    whole, parts = ([(row["lr"], row["loss"]) for row in rows(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts and len({lr for lr, _ in whole}) == 6


def test_a_grid_is_tried_once_and_ends(sweep: Run, tmp_path: Path) -> None:
    assert sweep("--space", "lr=1e-3,2e-3", "rank=2,4", name="low-rank", trials=100) == 0
    tried = [(row["lr"], row["config"]["layers"]["rank"]) for row in rows(tmp_path / "study")]
    assert tried == [(1e-3, 2), (1e-3, 4), (2e-3, 2), (2e-3, 4)]
    drawn = figure(rows(tmp_path / "study"))
    assert drawn is not None
    assert [drawn["layout"][axis]["title"]["text"] for axis in ("xaxis", "xaxis2")] == ["lr", "rank"]
    assert [(trace["x"], trace["xaxis"]) for trace in drawn["data"]] == [
        ([1e-3, 1e-3, 2e-3, 2e-3], "x"),
        ([2, 4, 2, 4], "x2"),
    ]


def test_another_study_is_refused(sweep: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep("--space", "lr=1e-3", trials=1) == 0
    capsys.readouterr()
    for options, said in (
        (("--space", "lr=2e-3"), "holds a study with space"),
        (("--space", "lr=1e-3", "--steps", "2"), "holds a study with steps 4, not 2"),
        (("--space", "lr=1e-3", "--prune", "median"), 'holds a study with prune null, not "median"'),
    ):
        assert sweep(*options) == 2
        assert said in capsys.readouterr().err


def test_a_stopped_trial_goes_on_from_its_checkpoint(
    sweep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, token_loss = iter(range(1, 1000)), pretraining.token_loss

    def stop_at_third(*args: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return token_loss(*args)

    options = "--space", "lr=1e-3"
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "token_loss", stop_at_third)
        assert sweep(*options) == 130
    assert sweep(*options) == 0
    (row,) = rows(tmp_path / "study")
    log = [json.loads(line) for line in (tmp_path / "study" / row["log"]).read_text().splitlines()]
    assert [event["step"] for event in log if event["event"] == "resume"] == [2]
    assert sweep(*options, out="whole") == 0
    assert rows(tmp_path / "whole")[0]["loss"] == row["loss"]


def test_a_trial_that_diverges_is_a_result(
    sweep: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Any, **others: Any) -> Any:
        if config.lr == 2e-3:
            monkeypatch.setattr(pretraining, "token_loss", lambda *args: token_loss(*args) * math.nan)
        else:
            monkeypatch.setattr(pretraining, "token_loss", token_loss)
        return pretrain(config, **others)

    token_loss, pretrain = pretraining.token_loss, runner.pretrain
    monkeypatch.setattr(runner, "pretrain", train)
    assert sweep("--space", "lr=1e-3,2e-3", trials=9) == 0
    printed = capsys.readouterr().out
    assert "diverged" in printed and "best: trial 0" in printed
    first, second = rows(tmp_path / "study")
    assert first["diverged"] is None and second["perplexity"] is None and "nan" in second["diverged"]
    drawn = figure([first, second])
    assert drawn is not None
    assert [trace["marker"]["symbol"] for trace in drawn["data"]] == ["circle", "x-thin-open"]
    assert drawn["data"][1]["y"] == [first["perplexity"]]


def test_trials_are_pruned_only_where_the_study_says_so(
    sweep: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four good rates, then one that learns nothing: worse than the median from the first evaluation on."""
    grid = "--space", "lr=3e-3,4e-3,5e-3,6e-3,1e-9", "betas=[0.9,0.95]"
    assert sweep(*grid, trials=99, out="whole") == 0
    assert len(rows(tmp_path / "whole")) == 5
    assert sweep(*grid, "--prune", "median", trials=99, out="pruned") == 0
    printed = capsys.readouterr().out
    kept = rows(tmp_path / "pruned")
    assert [row["lr"] for row in kept] == [3e-3, 4e-3, 5e-3, 6e-3]
    assert [row["loss"] for row in kept] == [row["loss"] for row in rows(tmp_path / "whole")[:4]]
    assert f"{int(4.5 * COST):,} of" in printed and "pruned" in printed  # half of its tokens were not taken
    log = next((tmp_path / "pruned").glob("*lr-1e-09*/log.jsonl")).read_text()
    assert json.loads(log.splitlines()[-1])["step"] == 2


def test_processes_share_a_study_and_take_up_what_a_dead_one_left(tiny: Path, tmp_path: Path) -> None:
    """One is killed in its second trial; two go on: no trial twice, none lost, the killed one from its checkpoint."""
    shape = json.loads((tiny / "config.json").read_text()) | {"vocab_size": 2048, "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    out, steps, trials = tmp_path / "study", 16, 4
    cost = steps * 8 * 128
    command = [sys.executable, "-m", "gossamer", "sweep", "adamw", "--size", str(tmp_path / "config.json"), "--data",
               str(tiny / "train.txt"), "--steps", str(steps), "--evals", "16", "--tokens", str((trials + 0.5) * cost),
               "--out", str(out), "--device", "cpu"]  # fmt: skip

    def log_of(trial: int) -> list[dict[str, Any]]:
        found = [path.read_text().splitlines() for path in out.glob(f"*-trial-{trial}-*/log.jsonl")]
        return [json.loads(line) for lines in found for line in lines[:-1]]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    first = start()
    deadline = time.monotonic() + 120
    while not any(event["event"] == "checkpoint" and event["step"] >= 3 for event in log_of(1)):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.02)
    first.kill()
    first.communicate()
    assert len(rows(out)) == 1
    both = [start(), start()]
    for process in both:
        printed, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
        assert f"{trials * cost:,} of" in printed  # each waits for the other's last one
    made = rows(out)
    assert sorted(int(row["label"].rpartition(" ")[2]) for row in made) == list(range(trials))
    assert all(row["tokens"] == cost for row in made)
    assert any(event["event"] == "resume" and event["step"] >= 3 for event in log_of(1))
    assert [event["step"] for event in log_of(1) if event["event"] == "train"] == list(range(1, steps + 1))


# --- what is found ----------------------------------------------------------------------------------------------------


def trial(number: int, lr: float, loss: float, **values: Any) -> Trial:
    return Trial(number, "finished" if math.isfinite(loss) else "diverged", {"lr": lr, **values}, loss, 10)


def test_the_parabola_is_that_of_the_losses() -> None:
    """3 + 0.1 log(lr / 2e-3)^2: lowest at 2e-3, and 0.01 nats up at a factor of exp(sqrt(0.1))."""
    rates = [2.5e-4, 5e-4, 1e-3, 3e-3, 6e-3, 1e-2]
    trials = [trial(i, lr, 3 + 0.1 * math.log(lr / 2e-3) ** 2) for i, lr in enumerate(rates)]
    found = found_in([*trials, trial(9, 1e-1, math.inf)], [Knob("lr", (1e-4, 1e-1))])
    assert found is not None and found.best.number == 3 and found.edge is None
    assert found.vertex == pytest.approx(2e-3) and found.factor == pytest.approx(math.exp(math.sqrt(0.1)))


def test_evidence_is_of_trials_that_differ_in_the_rate_alone() -> None:
    trials = [trial(0, 1e-3, 3.0, rank=4), trial(1, 2e-3, 3.1, rank=4), trial(2, 5e-4, 3.3, rank=8)]
    found = found_in(trials, [Knob("lr", None, (5e-4, 1e-3, 2e-3)), Knob("rank", None, (4, 8))])
    assert found is not None
    assert found.tried == ((1e-3, 3.0), (2e-3, 3.1)) and found.edge == "smallest" and found.vertex is None


@pytest.mark.parametrize(("losses", "edge"), [((3, 2, 1), "largest"), ((1, 2, 3), "smallest"), ((2, 1, 3), None),
                                              ((2, 1, math.inf), None)])  # fmt: skip
def test_the_edge_is_of_what_was_tried(losses: tuple[float, ...], edge: str | None) -> None:
    found = found_in([trial(i, 10.0**i, loss) for i, loss in enumerate(losses)], [Knob("lr", (1, 100))])
    assert found is not None and found.edge == edge


def test_nothing_is_found_where_nothing_finished() -> None:
    assert found_in([trial(0, 1e-3, math.inf)], [Knob("lr", (1e-4, 1))]) is None
    assert figure([]) is None and figure([{"table": "tiny", "label": "x"}]) is None


def test_a_parabola_is_laid_through_trials_that_differ_in_the_learning_rate_alone() -> None:
    knobs = [Knob("lr", (1e-4, 1e-2)), Knob("damping", (1e-8, 1e-2))]
    trials = [
        Trial(i, "finished", {"lr": 1e-3 * 2**i, "damping": 10.0 ** -(2 + i % 3)}, 3.0 + i % 3, 100) for i in range(6)
    ]
    found = found_in(trials, knobs)
    assert found and (found.vertex, found.factor) == (None, None) and len(found.tried) == 6
    flat = [
        Trial(i, "finished", {"lr": 2e-3 ** (1 + i / 100)}, loss, 9) for i, loss in enumerate((3.0, 3 - 1e-15, 3.0))
    ]
    found = found_in(flat, knobs[:1])
    assert found and (found.vertex, found.factor) == (None, None)


def test_write_puts_the_best_value_and_why_where_presets_live(
    sweep: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = "--space", "lr=1e-5,3e-3,10.0"
    before = presets("quick")
    assert sweep(*grid, "--write", trials=9) == 0
    after = presets("quick")
    assert after["adamw"] == replace(before["adamw"], lr=3e-3) and after["low-rank"] == before["low-rank"]
    lines = {line["name"]: line for line in map(json.loads, recipes.PRESETS.read_text().splitlines())}
    evidence = lines["adamw"]["evidence"]
    assert evidence["perplexities"][1] == [3e-3, pytest.approx(rows(tmp_path / "study")[1]["perplexity"], rel=1e-3)]
    assert (evidence["trials"], evidence["tokens"], evidence["seed"]) == (3, 3 * COST, 0)
    assert evidence["study"] == "study" and evidence["space"] == [grid[1]]

    kept = recipes.PRESETS.read_text()
    assert sweep(*grid, trials=9) == 0 and recipes.PRESETS.read_text() == kept  # the study is still the same one
    assert sweep("--space", "lr=1e-5,3e-3", "--write", trials=9, out="edge") == 2
    assert "the best learning rate, 0.003, is the largest of those tried; nothing is" in capsys.readouterr().err
    assert recipes.PRESETS.read_text() == kept


def test_a_study_stays_where_it_was_begun_when_its_preset_is_written(sweep: Run, tmp_path: Path) -> None:
    """Without `--space`, the range is around the preset's rate: that of the day on which it was begun."""
    assert sweep(trials=2) == 0
    (own, _), name = rows(tmp_path / "study"), "adamw"
    write_preset("quick", replace(presets("quick")[name], lr=7e-3), {"rows": "none"})
    assert sweep(trials=3) == 0
    study = Study(Search(name, tokens=3 * COST, out=tmp_path / "study"))
    assert study.knobs == (Knob("lr", (own["lr"] / 8, own["lr"] * 8)),) and len(study.trials()) == 3


def test_the_table_says_how_far_a_study_is(sweep: Run, suite: None) -> None:
    assert sweep("--space", "lr=1e-3,2e-3", trials=1) == 0
    table, lines = trials_table(Study(Search("adamw", tokens=COST, space=("lr=1e-3,2e-3",), out=Path("study"))))
    assert table.row_count == 1
    assert lines[1] == "its learning rate is the largest tried: the best one may lie beyond; widen --space"


# --- presets ----------------------------------------------------------------------------------------------------------


def test_presets_are_of_what_there_is_and_survive_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = recipes.PRESETS.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    before = presets("quick")
    assert len(before) == len(lines) and {line["suite"] for line in lines} == set(SUITES)
    monkeypatch.setattr(recipes, "PRESETS", tmp_path / "presets.jsonl")
    recipes.PRESETS.write_text("")
    for line in reversed(lines):
        write_preset(line["suite"], before[line["name"]], line["evidence"])
    assert recipes.PRESETS.read_text() == text
    for name, recipe in before.items():
        assert name in methods() or recipe.layers is not None
        if recipe.layers is None:
            assert recipe.method == build(**next(line["method"] for line in lines if line["name"] == name))


def test_evidence_of_presets_is_where_it_says() -> None:
    root = Path(__file__).parent.parent
    for line in map(json.loads, recipes.PRESETS.read_text().splitlines()):
        evidence = line["evidence"]
        if evidence is None or "rows" not in evidence:
            continue
        there = {
            (row["lr"], round(row["perplexity"], 2))
            for path in evidence["rows"].split(", ")
            for row in map(json.loads, (root / path).read_text().splitlines())
            if row["method"] == line["name"]
        }
        assert {tuple(pair) for pair in evidence["perplexities"]} <= there, line["name"]
