"""Tables of papers: what they list, plan and train, and what is said of their claims."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from scipy import stats

from benchmarks import replication as pages
from gossamer.bench import Claim, Follow, Run, Sweep, Table, outlook, presets, runner
from gossamer.bench.claim import cell
from gossamer.bench.reading import load, read_published, write_published
from gossamer.bench.reproduce import tables_in
from gossamer.bench.verdict import against_published, of_mean, of_one_more, of_order
from gossamer.cli import main
from gossamer.data import DataConfig
from gossamer.optim.methods.adamw import AdamW
from gossamer.train import Pretrain
from papers import galore, replication
from papers.pretraining import SYSTEMS

ROOT = Path(__file__).parent.parent
TABLES = {
    f"papers/{path.name}::{name}": table
    for path in sorted((ROOT / "papers").glob("*.py"))
    for name, table in tables_in(path).items()
}

STAND_IN = """
from dataclasses import replace

from gossamer import AdamW, Lion
from gossamer.bench import Claim, Order, Run, Sweep, Table
from gossamer.data import DataConfig
from gossamer.layers import LowRank
from gossamer.restarts import Restarts
from gossamer.train import Pretrain

RECIPES = {{
    "adamw": (AdamW(), 1e-3, None, None),
    "lion": (Lion(), 1e18, None, None),
    "low-rank-restarts": (AdamW(), 1e-3, LowRank(rank=4), Restarts(every=2, recovery_steps=1)),
}}

def run(size, method, seed):
    rule, lr, layers, restarts = RECIPES[method]
    text = DataConfig("", vocab_size=300, seq_len=32)
    return Run("stand-in", size, method, Pretrain(
        rule, layers=layers, restarts=restarts, model={model!r}, data=text, steps=4, batch_size=4, lr=lr,
        warmup=0.0, clip=0.0, eval_every=2, eval_tokens=100, save_every=2, seed=seed))

table = Table(
    title="a stand-in", sizes=("nano",), methods=tuple(RECIPES), run=run, seeds=2, sweep=Sweep((1.0, 16.0), 2),
    perplexities={{("adamw", "nano"): Claim(2.0, "nowhere", "made up"), ("swan", "nano"): Claim(3.0, "nowhere")}},
    orders=(Order(("adamw", "lion"), "nowhere"), Order(("low-rank-restarts", "adamw"), "nowhere", 0.5)),
)
"""


@pytest.fixture
def stand_in(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The words of a command for a table of three methods that train for four steps."""
    (tmp_path / "stand_in.py").write_text(STAND_IN.format(model=str(tiny / "config.json")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["gossamer.bench.reproduce"], "ROUNDS", 1)  # the package's name is the function
    text = str(tiny / "train.txt")
    return lambda *words: ["reproduce", "stand_in.py::table", "--data", text, "--device", "cpu", *words]


def rows(name: str = "table") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"results/stand_in_{name}/rows.jsonl").read_text().splitlines()]


def shown(printed: str, method: str) -> list[str]:
    """The cells of a method's line."""
    (line,) = [line for line in printed.splitlines() if f"│ {method} " in line]
    return [part.strip() for part in line.strip("│").split("│")]


# --- training ---------------------------------------------------------------------------------------------------------


def test_a_table_is_trained_and_judged(
    stand_in: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(stand_in()) == 0
    printed = capsys.readouterr().out
    made = rows()
    tried = [(row["method"], row["lr"], row["seed"]) for row in made]
    rates = {"adamw": 1e-3, "lion": 1e18, "low-rank-restarts": 1e-3}
    assert tried[:6] == [(method, lr * factor, 0) for factor in (1, 16) for method, lr in rates.items()]  # broad first
    assert [(method, seed) for method, _, seed in tried[6:]] == [(method, 1) for method in rates]
    for row in made:
        assert (row["table"], row["size"]) == ("stand-in", "nano")
        assert row["label"] == f"nano {row['method']} lr {row['lr']:g} seed {row['seed']}"
        assert set(row["reference"]) == {"tokens_per_second", "step_time", "step_share"}
        assert 0 < row["step_share"] < 1 and row["step_time"] > 0
        assert set(row["memory"]["predicted"]) == {"weights", "gradients", "state", "activations", "step"}
        assert row["memory"]["peak"] is None or set(row["memory"]["peak"]) == {"forward", "backward", "step"}
        assert {"config", "versions", "hardware", "commit", "time"} <= set(row)
        if row["method"] == "lion":
            assert (row["perplexity"], row["legacy_perplexity"], row["loss"]) == (None, None, None)
            assert "the loss is" in row["diverged"] and row["tokens"] < 4 * 4 * 32
    whole = next(row for row in made if row["method"] == "low-rank-restarts")
    assert whole["tokens"] == 4 * 4 * 32 and whole["perplexity"] > whole["legacy_perplexity"] > 1
    assert [step for step, _ in whole["curve"]["train"]] == [1, 2, 3, 4]
    assert [step for step, _ in whole["curve"]["eval"]] == [2, 4]
    assert [step for step, _ in whole["curve"]["restarts"]] == [2]
    assert not list(Path("runs").rglob("checkpoints")) and not list(Path("runs").rglob("*.lock"))

    assert shown(printed, "adamw")[3] == "2" and shown(printed, "adamw")[6:] == ["2.00", "ours is worse", "made up"]
    assert shown(printed, "lion")[4] == "diverged"
    assert "adamw before lion (nowhere): holds: the other diverged" in printed
    assert re.search(r"low-rank-restarts before adamw within 0.5 \(nowhere\): \w+: [+-]", printed)

    monkeypatch.setattr(runner, "pretrain", lambda *_, **__: pytest.fail("a finished run is trained again"))
    assert main(stand_in()) == 0
    assert rows() == made
    assert capsys.readouterr().out == printed
    assert main(stand_in("--methods", "adamw,lion", "--no-train")) == 0
    assert "low-rank" not in capsys.readouterr().out.split("verdicts")[0].split("stand-in")[1].split("nano: ")[0]


def test_two_processes_share_a_table_after_one_was_killed(stand_in: Callable[..., list[str]]) -> None:
    words = [sys.executable, "-m", "gossamer", *stand_in("--methods", "adamw")]
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    start: Callable[[], subprocess.Popen[str]] = lambda: subprocess.Popen(  # noqa: E731
        words, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    first = start()
    runs = Path("runs/stand_in_table")
    deadline = time.monotonic() + 120
    while not list(runs.glob("nano-adamw-lr-0.001-seed-0-*/checkpoints/*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert list(runs.glob("*.lock"))  # of a dead process
    both = [start(), start()]
    for process in both:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    labels = [row["label"] for row in rows()]
    assert len(labels) == len(set(labels)) == 3  # two rates with one seed, one with another
    assert not list(runs.glob("*.lock"))


def test_rows_of_another_text_or_recipe_do_not_count(
    stand_in: Callable[..., list[str]], tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def seeds(*words: str) -> str:
        assert main([*words, "--methods", "adamw", "--no-train"]) == 0
        return shown(capsys.readouterr().out, "adamw")[3]

    assert main(stand_in("--methods", "adamw")) == 0
    capsys.readouterr()
    table = ["reproduce", "stand_in.py::table"]
    assert seeds(*stand_in()) == "2" and seeds(*table) == "2"  # no text is named: that of the newest row
    assert seeds(*stand_in("--micro-batch-size", "2")) == "2"
    assert seeds(*table, "--data", str(tiny / "valid.txt")) == "0"
    # the first of its runs trained again on another text: that row is the newest
    again = rows()[0]
    again["config"]["data"]["data"] = str(tiny / "valid.txt")
    with Path("results/stand_in_table/rows.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    assert seeds(*table) == "1"
    assert seeds(*stand_in()) == "2"  # theirs are still there
    assert seeds(*table, "--tokenizer", "other.json") == "0"
    path = Path("stand_in.py")
    path.write_text(path.read_text().replace("steps=4", "steps=2"))
    assert seeds(*stand_in()) == "0"


def test_a_configuration_has_a_folder_of_its_own(tmp_path: Path) -> None:
    run, rows = table_of(("a",)).run("tiny", "a", 0), runner.Rows(tmp_path / "rows.jsonl", tmp_path / "runs")
    option: dict[str, Any]
    for option, same in (({"micro_batch_size": 2, "device": "cpu", "out": Path("x")}, True), ({"steps": 7}, False)):
        other = replace(run, config=replace(run.config, **option))
        assert other.label == run.label and (other.folder == run.folder) == same
        assert rows.take(lambda _: [run]) == (run, True)
        assert rows.take(lambda _, it=other: [it]) == ((None, True) if same else (other, True))  # held, or not
        rows.release(run)


# --- which runs -------------------------------------------------------------------------------------------------------


def bowl(best: float) -> Callable[[Run], dict[str, Any]]:
    """Finishes a run with a loss that is lowest at a learning rate."""

    def finish(run: Run) -> dict[str, Any]:
        loss = abs(run.config.lr / best - 1) + abs(best / run.config.lr - 1)
        size, method, lr, seed = run.size, run.method, run.config.lr, run.config.seed
        return {"size": size, "method": method, "lr": lr, "seed": seed, "loss": loss, "perplexity": 1 + loss}

    return finish


def complete(table: Table, finish: Callable[[Run], dict[str, Any]], before: Any = None) -> dict[str, dict[str, Any]]:
    finished: dict[str, dict[str, Any]] = {}
    while new := [
        run
        for run in table.wanted(table.sizes, table.methods, table.seeds, finished, before or {})
        if run.label not in finished
    ]:
        finished[new[0].label] = finish(new[0])
    return finished


def table_of(names: tuple[str, ...], **others: Any) -> Table:
    def run(size: str, method: str, seed: int) -> Run:
        return Run("t", size, method, Pretrain(AdamW(), lr=1e-3, seed=seed, data=DataConfig("")))

    return Table("t", ("tiny",), names, run, **others)


@pytest.mark.parametrize(("best", "rates"), [(1e-3, 4), (4e-3, 5), (2.5e-4, 6), (1.0, 7), (1e-9, 7)])
def test_rates_extend_while_the_best_is_at_the_edge(best: float, rates: int) -> None:
    finished = complete(table_of(("a",), sweep=Sweep((1.0, 2.0, 0.5, 4.0), 7), seeds=1), bowl(best))
    tried = sorted(row["lr"] for row in finished.values())
    assert len(tried) == rates
    assert all(high == pytest.approx(2 * low) for low, high in itertools.pairwise(tried))
    if rates < 7:
        assert tried[0] < best < tried[-1]


def test_a_rate_that_diverges_is_never_the_best() -> None:
    def finish(run: Run) -> dict[str, Any]:
        row = bowl(1.0)(run)
        return row | {"loss": None, "perplexity": None} if run.config.lr > 1e-3 else row

    finished = complete(table_of(("a",), sweep=Sweep((1.0, 2.0), 7), seeds=2), finish)
    assert cell("tiny", "a", finished).rows[0]["lr"] == 1e-3
    assert [row["seed"] for row in cell("tiny", "a", finished).rows] == [0, 1]


def test_seeds_are_for_the_leading_at_their_best_rate() -> None:
    sweep = Sweep((1.0, 2.0), 2, leading=lambda losses: sorted(losses, key=losses.__getitem__)[:1])
    finish = bowl(2e-3)
    finished = complete(
        table_of(("a", "b"), sweep=sweep, seeds=3),
        lambda run: (row := finish(run)) | {"loss": row["loss"] + (run.method == "a")},
    )
    seeds = [(row["method"], row["lr"], row["seed"]) for row in finished.values() if row["seed"]]
    assert seeds == [("b", 2e-3, 1), ("b", 2e-3, 2)]


def test_a_best_rate_that_other_seeds_do_not_bear_out_gives_way_to_the_next() -> None:
    """At 2e-3 the first seed was lucky; at 4e-3 all are as unlucky; at 1e-3 they are as good as the first one."""
    losses = {2e-3: (1.0, 5.0, 1.1), 4e-3: (1.2, 9.0, None), 1e-3: (1.3, 1.2, 1.1), 8e-3: (None, 1.0, 1.0)}

    def finish(run: Run) -> dict[str, Any]:
        loss = losses[run.config.lr][run.config.seed]
        return bowl(1.0)(run) | {"loss": loss, "perplexity": loss}

    finished = complete(table_of(("a",), sweep=Sweep((1.0, 2.0, 4.0, 8.0), 4), seeds=3), finish)
    assert [(row["lr"], row["seed"]) for row in finished.values() if row["seed"]] == [
        (lr, seed) for lr in (2e-3, 4e-3, 1e-3) for seed in (1, 2)
    ]
    assert cell("tiny", "a", finished).by_seed == {0: 1.3, 1: 1.2, 2: 1.1}
    del finished["tiny a lr 0.001 seed 2"]
    assert cell("tiny", "a", finished).rows[0]["lr"] == 2e-3  # that one has more seeds


def test_rates_that_one_seed_does_not_tell_apart_get_the_others() -> None:
    losses = {2e-3: (2.0, 1.9, 1.9), 1e-3: (2.009, 1.8, 1.8), 4e-3: (2.011, 1.0, 1.0), 5e-4: (3.0, 1.0, 1.0)}

    def finish(run: Run) -> dict[str, Any]:
        return bowl(1.0)(run) | {"loss": losses[run.config.lr][run.config.seed]}

    finished = complete(table_of(("a",), sweep=Sweep((1.0, 2.0, 4.0, 0.5), 4), seeds=3), finish)
    assert {row["lr"] for row in finished.values() if row["seed"]} == {2e-3, 1e-3}
    assert cell("tiny", "a", finished).rows[0]["lr"] == 1e-3


def test_a_table_follows_another() -> None:
    before = complete(table_of(("a", "b", "c"), sweep=Sweep((1.0, 2.0, 0.5), 3), seeds=1), bowl(5e-4))
    before |= {label: row | {"loss": 9.0} for label, row in before.items() if row["method"] == "b"}
    follow = Follow("t", "tiny", rates=2, leading=1, always=("c-r4",), method_of=lambda it: it.removesuffix("-r4"))
    after = complete(table_of(("a-r4", "b-r4", "c-r4"), follows=follow, seeds=1), bowl(1.0), before)
    assert [(row["method"], row["lr"]) for row in after.values()] == [
        (method, lr) for lr in (5e-4, 1e-3) for method in ("a-r4", "c-r4")
    ]


def test_a_table_waits_for_the_one_it_follows(
    stand_in: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("stand_in.py")
    path.write_text(
        path.read_text().replace("import Claim, ", "import Claim, Follow, ")
        + "\nsecond = replace(table, follows=Follow('table', 'nano', rates=1), sweep=Sweep())\n"
    )
    assert main(stand_in("--methods", "adamw", "--seeds", "1")) == 0
    follow = [word.replace("::table", "::second") for word in stand_in("--seeds", "1")]
    capsys.readouterr()
    assert main(follow) == 2
    assert "best ones of table, which lacks 4 runs on this text, such as 'nano lion" in capsys.readouterr().err
    assert main([*follow, "--methods", "adamw"]) == 0
    assert [row["lr"] for row in rows("second")] == [min(rows(), key=lambda row: row["loss"])["lr"]]


def test_the_replication_has_every_method() -> None:
    """Whatever has a preset is compared, and belongs to one family."""
    names = set(presets("quick"))
    assert names < set(replication.tiny.methods) and {"lora", "loro"} < set(replication.tiny.methods)
    assert sorted(name for family in replication.FAMILIES.values() for name in family) == sorted(replication.RECIPES)
    fallbacks = {
        (config.fallback, config.fallback_lr, config.data, config.steps)
        for method in replication.tiny.methods
        for config in [replication.tiny.run("tiny", method, 0).config]
    }
    assert len(fallbacks) == 1
    losses = dict.fromkeys(replication.RECIPES, 2.0) | {"muon": 1.0, "lion": 1.5}
    chosen = list(replication.leading(losses))
    assert chosen[0] == "muon" and set(replication.ALWAYS) < set(chosen) and "lion" not in chosen


def test_the_committed_tables_are_of_the_committed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tables = sorted(pages.RESULTS.glob("replication_*/table.md"))
    assert tables
    for path in tables:
        name = path.parent.name.removeprefix("replication_")
        assert path.read_text() == pages.page(name, load(path.parent)), "python -m benchmarks.replication makes it"


def test_the_committed_rows_name_no_place_on_one_machine() -> None:
    paths = sorted((ROOT / "results").rglob("*.json*"))
    assert paths
    for path in paths:
        assert '"/' not in path.read_text(), f"{path}: a path that begins at the root"


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_textbook() -> None:
    a, b = [3.30, 3.32, 3.37], [3.40, 3.41, 3.45]
    theirs = stats.ttest_rel(a, b).confidence_interval(0.95)
    ours = of_mean([x - y for x, y in zip(a, b, strict=True)])
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-9)  # both in float64
    one_more = of_one_more([1.0, 2.0, 3.0])  # t(2) at 97.5 % is 4.30265 in every table
    assert (one_more.low, one_more.high) == pytest.approx(
        (2 - 4.30265 * (4 / 3) ** 0.5, 2 + 4.30265 * (4 / 3) ** 0.5), abs=1e-5
    )
    many = of_one_more([NormalDist().inv_cdf((i + 0.5) / 20_000) for i in range(20_000)])
    assert many.high == pytest.approx(1.96, abs=5e-3)  # the normal limit, and the grid's own error of 1e-3


def test_verdicts() -> None:
    seeds, exact = (30.0, 30.2, 29.8), math.inf
    assert against_published(seeds, Claim(30.5, "", batches=exact)) == "agrees"
    assert against_published(seeds, Claim(34.0, "", batches=exact)) == "ours is better"
    assert against_published(seeds, Claim(26.0, "", batches=exact)) == "ours is worse"
    assert against_published((30.0,), Claim(30.0, "")) == "one seed: no verdict"
    assert against_published((30.0, None), Claim(30.0, "")) == "diverged"
    assert against_published((), Claim(30.0, "")) == "no run"
    # Printed by an evaluation that divides the loss of 102 batches by 103: perplexity 30.0 becomes 29.03.
    sure = (30.0, 30.001, 29.999)
    printed = 30.0 ** (102 / 103)
    assert against_published(sure, Claim(printed, "", batches=102)) == "agrees"
    assert against_published(sure, Claim(printed, "", batches=204)) == "ours is worse"
    assert against_published(sure, Claim(30.0, "", batches=102)) == "ours is better"
    for value in (printed, 29.5, 30.0):  # of an evaluation nobody knows, anything between counts
        assert against_published(sure, Claim(value, "")) == "agrees"
    assert against_published(sure, Claim(30.1, "")) == "ours is better"
    assert against_published(sure, Claim(28.9, "")) == "ours is worse"

    better, worse = {0: 20.0, 1: 20.1, 2: 19.9}, {0: 22.0, 1: 22.1, 2: 21.9}
    assert of_order(better, worse, 0.0).startswith("holds")
    assert of_order(worse, better, 0.0).startswith("refuted")
    assert of_order(worse, better, 0.2).startswith("holds")  # log(22 / 20) is 0.095
    assert of_order(better, {0: 20.05, 1: 20.0, 2: 19.95}, 0.0).startswith("undecided")
    assert of_order({0: 20.0}, worse, 0.0) == "1 seed in common: no verdict"
    assert of_order({3: 20.0, 4: 20.0}, worse, 0.0) == "0 seeds in common: no verdict"
    assert of_order({}, worse, 0.0) == "no run"
    assert of_order({0: 20.0}, {0: None}, 0.0) == "1 seed in common: no verdict"
    assert of_order({0: 20.0, 1: None}, worse, 0.0) == "refuted: it diverged"
    assert of_order(worse, {0: 20.0, 1: None}, 0.0) == "holds: the other diverged"
    # Seeds that are far apart, and move both alike: what counts is how far the two are apart with each.
    assert of_order({0: 20.0, 1: 30.0, 2: 40.0}, {0: 20.2, 1: 30.3, 2: 40.4}, 0.0) == "holds: -0.0100 to -0.0100"


# --- the papers -------------------------------------------------------------------------------------------------------


def test_list_names_every_table_and_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["reproduce", "--list"]) == 0
    printed = capsys.readouterr().out
    for name, table in TABLES.items():
        assert f"{name}  {table.title}\n  sizes    {' '.join(table.sizes)}\n" in printed
        assert f"  methods  {' '.join(table.methods)}\n" in printed
    assert main(["reproduce", "papers/galore.py", "--list"]) == 0
    assert capsys.readouterr().out.count("::") == 1


def test_every_system_has_its_row() -> None:
    assert TABLES["papers/efficient_pretraining.py::benchmark"].methods == tuple(SYSTEMS)
    for table in TABLES.values():
        for method, size in (*table.perplexities, *table.gigabytes):
            assert size in table.sizes and (method in table.methods or method in ("SWAN", "SCALE"))
        for order in table.orders:
            assert set(order.methods) <= set(table.methods)


@pytest.mark.parametrize("name", TABLES)
def test_every_row_can_be_planned(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the table's first size, on tensors without data."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(outlook, "_rate", lambda *_: 1e12)
    table, size = TABLES[name], TABLES[name].sizes[0]
    assert main(["reproduce", name, "--sizes", size, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for method in table.methods:
        config = table.run(size, method, 0).config
        line = shown(printed, method)
        rate = f"as in {table.follows.table}" if table.follows else f"{config.lr:g}"
        assert line[:4] == [size, method, rate, f"{config.steps:,}"]
        assert float(line[11]) == pytest.approx(sum(map(float, line[6:11])), rel=0.01)  # three digits each
        assert float(line[12].replace(",", "")) > 0
        assert line[13] == {"tiny": "18", "ranks": "12", "small": "12"}.get(name.rpartition("::")[2], "3")


def test_hours_are_operations_over_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six floating-point operations a token for each weight of a linear layer, two of each in three products."""
    monkeypatch.setattr(outlook, "_rate", lambda *_: 1e12)
    run = galore.table2.run("60m", "adamw", 0)
    run = replace(run, config=replace(run.config, micro_batch_size=2))
    (hours,) = outlook.plan_table(galore.table2, [run], 3).columns[12].cells
    linear = 58_073_600 - 32_000 * 512 - 17 * 512  # without the embedding and the norms
    tokens = 11_000 * 512 * 256
    assert float(str(hours).replace(",", "")) == pytest.approx(6 * linear * tokens / 1e12 / 3600, abs=5e-3)


def test_what_the_paper_printed_lies_beside_the_rows(tmp_path: Path) -> None:
    write_published(galore.table2, tmp_path / "claims.json")
    found = {(it.method, it.size): it for it in read_published(tmp_path / "claims.json")}
    assert {key: it.perplexity for key, it in found.items()} == {
        key: claim.value for key, claim in galore.table2.perplexities.items()
    }
    assert (found["galore", "1b"].gigabytes, found["galore", "1b"].source) == (4.38, "arXiv 2403.03507, Table 2")
    write_published(replication.tiny, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_the_page_has_a_table_that_loads(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/reproduce.md").read_text(), flags=re.DOTALL)
    (tmp_path / "own.py").write_text(code)
    (table,) = tables_in(tmp_path / "own.py").values()
    assert [table.run("tiny", method, 1).label for method in table.methods] == [
        "tiny adamw lr 0.001 seed 1",
        "tiny galore lr 0.0006 seed 1",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["papers/galore.py"], "table: 'papers/galore.py' names no table; allowed: path::name"),
        (["papers/galore.py::table3"], "has no 'table3' (did you mean 'table2'?); known: table2"),
        (["papers/nowhere.py::t"], "table: no such Python file: "),
        (["broken.py::t"], "does not run: ZeroDivisionError: division by zero"),
        (["papers/galore.py::table2", "--methods", "galor"], "methods: unknown 'galor' (did you mean 'galore'?)"),
        (
            ["papers/galore.py::table2", "--sizes", "7b"],
            "sizes: unknown '7b' (did you mean '1b'?); known: 60m, 130m, 350m, 1b",
        ),
        (["papers/galore.py::table2", "--seeds", "0"], "seeds: 0 is too small; allowed: an integer >= 1"),
        (["papers/replication.py::tiny"], "data: table 'tiny' has no text of its own; name files by --data"),
        (
            ["papers/replication.py::small", "--data", "x"],
            "table: its rates are the best ones of tiny, which lacks 124 runs",
        ),
        (["broken.txt", "--list"], "table: no such Python file: "),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "papers").symlink_to(ROOT / "papers")
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "runs").exists()
