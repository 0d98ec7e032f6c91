"""The benchmark report: its numbers, what it does with broken logs, and the page in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html import unescape
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gossamer.bench import Bench, plots, summary_table, write_report
from gossamer.bench.reading import load
from gossamer.errors import UserError

MIB = 2**20
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def start(method: str, lr: float, seed: int, label: str = "", state: float = 8.0) -> dict[str, Any]:
    memory = {"weights": MIB, "gradients": MIB, "state": state * MIB, "hidden_state": state / 2 * MIB}
    return {
        "event": "start",
        "time": "2026-01-02T03:04:05Z",
        "label": label or f"{method} lr {lr} seed {seed}",
        "method": method,
        "config": {"model": "tiny", "lr": lr, "data": {"data": "stories"}, "seed": seed},
        "versions": {"torch": "2.11.0"},
        "hardware": {"cpu": "a cpu", "cores": 2, "accelerator": None},
        "commit": "abc1234",
        "parameters": 1_500_000,
        "memory": memory,
        "data": {"seq_len": 128},
    }


def train(step: int, loss: float | None = 3.0) -> dict[str, Any]:
    return {"event": "train", "step": step, "loss": loss, "lr": 1e-3, "tokens": step * 10, "seconds": step / 10}


def evaluation(step: int, loss: float) -> dict[str, Any]:
    return {"event": "eval", "step": step, "loss": loss, "perplexity": math.exp(loss), "tokens": 4096}


def restart(step: int, **more: Any) -> dict[str, Any]:
    """A restart that rewrote weights and reset both moments, unless `more` says otherwise."""
    reset = {"moments": ["m", "v"], "parameters": 60, "tensors": 120, "norm_before": 12.3456, "norm_after": 0.0}
    return {"event": "restart", "step": step, "layers": 28, "change": 1.234e-7} | reset | more


def end(perplexity: float | None, seconds: float = 10.0) -> dict[str, Any]:
    outcome = {"perplexity": perplexity, "legacy_perplexity": perplexity, "eval_tokens": 4096}
    return {"event": "end", "step": 100, "seconds": seconds, "tokens_per_second": 1234.0} | outcome


def look(step: int, method: str) -> dict[str, Any]:
    """Two parameters' diagnostics; only adamw says what its moments are, only thin has a subspace."""
    more = {"m_error": 0.0} if method == "adamw" else {"overlap": 0.9 - 0.001 * step}
    records = [{"name": name, "update_rms": 1 / step, **more} for name in ("layers.0.q", "layers.1.<q>")]
    return {"event": "diagnostics", "step": step, "parameters": records}


def write_run(
    root: Path, method: str, lr: float, seed: int, perplexity: float | None, state: float = 8.0, label: str = ""
) -> Path:
    events = [start(method, lr, seed, label, state), *(train(step, 3 + 4 / step) for step in range(1, 101))]
    events += [evaluation(50, 3.1), restart(60), evaluation(100, 3.0), end(perplexity)]
    return write_lines(root / f"{method}-{lr}-{seed}" / "log.jsonl", events)


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """AdamW at two rates and a thinner method at one, two seeds each."""
    for seed, (slow, fast) in enumerate([(30.0, 20.0), (32.0, 22.0)]):
        write_run(tmp_path, "adamw", 0.001, seed, slow)
        write_run(tmp_path, "adamw", 0.002, seed, fast)
        write_run(tmp_path, "thin", 0.004, seed, slow + fast - 31.5, state=2.0)
    return tmp_path


def page(directory: Path) -> str:
    """The page without the plotting library."""
    text = write_report(directory).read_text(encoding="utf-8")
    return re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)


def cells(directory: Path) -> list[list[str]]:
    """The texts of the results table."""
    body = page(directory).split('class="ranked results"')[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body, flags=re.DOTALL)
    texts = [re.findall(r"<(?:th|td)\b[^>]*>(.*?)</(?:th|td)>", row, flags=re.DOTALL) for row in rows]
    return [[re.sub(r"<[^>]+>", " ", text).replace("\xa0", " ").strip() for text in row] for row in texts]


def test_best_rate_mean_sd_and_ratios(benchmark: Path) -> None:
    thin, adamw = cells(benchmark)
    # thin: 18.5 and 22.5; adamw at 0.002: 20 and 22, ahead of 31 at 0.001.
    assert thin[:4] == ["thin", "0.004 of 1 rate, 2 seeds", "20.50 ± 2.83", "0.976"]
    assert adamw[:4] == ["adamw", "0.002 of 2 rates, 2 seeds", "21.00 ± 1.41", "1.000"]
    # weights, state, and both over adamw's: (1 + 2) / (1 + 8); then the state of hidden layers alone
    assert thin[4:] == ["1.00", "2.00", "0.33", "1.00", "0.25", "–", "10.0", "1,234", "20.50"]
    text = page(benchmark).replace("\xa0", " ")
    assert "6 finished runs of 2 methods, training the tiny model (1.5 million parameters), on stories." in text
    assert "<b>20.50 ± 2.83</b>, is that of <b>thin</b> at learning rate 0.004." in text
    assert "AdamW, reaches 21.00 ± 1.41 at 0.002." in text


def test_a_rate_tried_once_does_not_beat_one_with_more_seeds(benchmark: Path) -> None:
    write_run(benchmark, "adamw", 0.004, 0, 19.0)
    write_run(benchmark, "thin", 0.008, 0, None)
    write_run(benchmark, "thin", 0.008, 1, None)
    write_run(benchmark, "thin", 0.008, 2, 15.0)
    thin, adamw = cells(benchmark)
    assert thin[:3] == ["thin", "0.004 of 2 rates, 2 seeds", "20.50 ± 2.83"]  # nor does one that mostly diverges
    assert adamw[:3] == ["adamw", "0.002 of 3 rates, 2 seeds", "21.00 ± 1.41"]


def test_terminal_table_says_the_same(benchmark: Path) -> None:
    table = summary_table(benchmark)
    columns = [[str(cell).replace("\xa0", " ") for cell in column.cells] for column in table.columns]
    assert [column[0] for column in columns] == ["thin", "0.004", "20.50 ± 2.83", "0.976", "1.00", "2.00", "–"]


def test_terminal_table_fits_eighty_columns(tmp_path: Path) -> None:
    names = [recipe.name for recipe in Bench().recipes()]
    for name in names:
        for seed in (0, 1):
            write_run(tmp_path, name, 0.0004, seed, 55.5 + seed, state=999.0)
    console = Console(width=80, record=True, file=StringIO())
    console.print(summary_table(tmp_path))
    first_column = [line.split()[0] for line in console.export_text().splitlines() if line.strip()]
    assert sorted(first_column[-len(names) :]) == sorted(names)  # none cut, none in two lines


def test_one_seed_has_no_sd_and_no_baseline_no_ratio(tmp_path: Path) -> None:
    write_run(tmp_path, "thin", 0.001, 0, 1234.5)
    assert cells(tmp_path)[0][:4] == ["thin", "0.001 of 1 rate, 1 seed", "1,234", "–"]


def test_directory_of_a_single_run(tmp_path: Path) -> None:
    write_lines(tmp_path / "log.jsonl", [start("adamw", 0.001, 0), train(1), end(20.0)])
    assert cells(tmp_path)[0][2] == "20.00"


def test_a_diverged_seed_disqualifies_its_rate(tmp_path: Path) -> None:
    write_run(tmp_path, "adamw", 0.001, 0, 30.0)
    write_run(tmp_path, "adamw", 0.002, 0, 20.0)
    write_run(tmp_path, "adamw", 0.002, 1, None)
    write_run(tmp_path, "wild", 0.002, 0, None)
    adamw, wild = cells(tmp_path)
    assert adamw[1:3] == ["0.001 of 2 rates, 1 seed", "30.00"]
    assert wild[2:4] == ["diverged", "–"]


def test_torn_last_line_is_an_unfinished_run(tmp_path: Path) -> None:
    log = write_lines(tmp_path / "a" / "log.jsonl", [start("adamw", 0.001, 0), train(1), train(1200)])
    with log.open("a") as file:
        file.write('{"event":"train","step":13')
    assert cells(tmp_path)[0][2] == "unfinished, step 1,200"
    assert "Did not finish: adamw lr 0.001 seed 0 (step 1,200)." in page(tmp_path)


def test_unfinished_run_does_not_count(benchmark: Path) -> None:
    write_lines(benchmark / "killed" / "log.jsonl", [start("adamw", 0.002, 2), train(70)])
    assert cells(benchmark)[1][1:3] == ["0.002 of 2 rates, 2 seeds", "21.00 ± 1.41"]
    assert "1 more run did not finish." in page(benchmark)


@pytest.mark.parametrize(
    "broken",
    [
        '{"event":"tr',
        "[1]",
        '{"event":"train","step":2}',
        '{"step":2}',
        '{"event":"restart","step":2,"layers":3}',
        '{"event":"restart","step":2,"layers":3,"change":"x"}',
    ],
)
def test_broken_middle_line_is_named(tmp_path: Path, broken: str) -> None:
    log = write_lines(tmp_path / "log.jsonl", [start("adamw", 0.001, 0)])
    with log.open("a") as file:
        file.write(f"{broken}\n{json.dumps(train(3))}\n")
    with pytest.raises(UserError, match=re.escape(f"{log}, line 2: ")):
        load(tmp_path)


def test_resumed_steps_replace_the_lost_ones(tmp_path: Path) -> None:
    events = [start("adamw", 0.001, 0), train(10, 5.0), train(20, 4.0), train(30, 9.0)]
    events += [{"event": "resume", "step": 20}, train(30, 3.0), end(20.0)]
    write_lines(tmp_path / "log.jsonl", events)
    assert load(tmp_path)[0].runs[0].train == ((10, 5.0), (20, 4.0), (30, 3.0))


def test_last_row_of_a_label_wins(tmp_path: Path) -> None:
    def row(perplexity: float, log: Path) -> dict[str, Any]:
        outcome = {"perplexity": perplexity, "step_time_ratio": 1.25, "state_bytes": 3 * MIB, "lr": 0.001, "seed": 0}
        name = log.relative_to(tmp_path).as_posix()
        return {"table": "quick", "label": "thin one", "method": "thin", "steps": 100, "log": name} | outcome

    logs = [write_run(tmp_path / attempt, "thin", 0.001, 0, 50.0) for attempt in ("first", "second")]
    write_lines(tmp_path / "rows.jsonl", [row(40.0, logs[0]), row(25.0, logs[1])])
    (method,) = load(tmp_path)
    assert [run.perplexity for run in method.runs] == [25.0]
    assert method.runs[0].evals  # its log is still read, for the curves
    assert cells(tmp_path)[0][2:9] == ["25.00", "–", "1.00", "3.00", "–", "4.00", "–"]
    assert "<h1>Gossamer benchmark: quick</h1>" in page(tmp_path)


def test_runs_of_other_configurations_are_no_seeds_of_one_another(tmp_path: Path) -> None:
    def row(perplexity: float, rank: int, steps: int = 9, text: str = "a.txt", **more: Any) -> dict[str, Any]:
        config = {"model": "tiny", "lr": 1e-3, "seed": 0, "steps": steps, "method": {"name": "thin", "rank": rank}}
        config |= {"data": {"data": text, "seq_len": 8}, "save_every": steps} | more
        return {"label": "thin one", "method": "thin", "lr": 1e-3, "perplexity": perplexity, "config": config}

    def found(*rows: dict[str, Any]) -> list[tuple[str, list[float | None]]]:
        write_lines(tmp_path / "rows.jsonl", list(rows))
        return [(method.title, [run.perplexity for run in method.runs]) for method in load(tmp_path)]

    assert found(row(30.0, 4), row(20.0, 8), row(25.0, 8)) == [("thin, rank 8", [25.0]), ("thin, rank 4", [30.0])]
    assert [line[0] for line in cells(tmp_path)] == ["thin rank 8", "thin rank 4"]
    assert found(row(30.0, 4), row(20.0, 4, out="x", device="cuda")) == [("thin", [20.0])]  # made elsewhere, later
    assert found(row(30.0, 4), row(20.0, 4, seed=1)) == [("thin", [30.0, 20.0])]
    # compared apart: other texts have other perplexities, as have runs of another length
    assert found(row(30.0, 4), row(20.0, 4, text="b.txt")) == [
        ("thin, data a.txt", [30.0]),
        ("thin, data b.txt", [20.0]),
    ]
    assert found(row(30.0, 4), row(20.0, 4, steps=7)) == [("thin, 7 steps", [20.0]), ("thin, 9 steps", [30.0])]


def test_a_run_is_called_what_its_row_says_and_else_what_was_trained(tmp_path: Path) -> None:
    """Low-rank weights trained by adamw must not count as runs of adamw, the baseline."""
    for name, layers, restarts in (
        ("plain", None, None),
        ("thin", {"name": "low-rank", "rank": 32}, None),
        ("again", {"name": "low-rank", "rank": 32}, {"every": 50}),
        ("in-rows", {"name": "sltrain", "rank": 32}, {"every": 50}),
    ):
        event = start("adamw", 0.001, 0, label=name)
        event["config"] |= {"layers": layers, "restarts": restarts}
        write_lines(tmp_path / name / "log.jsonl", [event, train(1), end(20.0)])
    row = {"label": "in-rows", "method": "sltrain-restarts", "lr": 0.001, "log": "in-rows/log.jsonl"}
    write_lines(tmp_path / "rows.jsonl", [row])
    found = {run.label: run.method for method in load(tmp_path) for run in method.runs}
    assert found == {
        "plain": "adamw",
        "thin": "adamw + low-rank",
        "again": "adamw + low-rank + restarts",
        "in-rows": "sltrain-restarts",
    }


def test_restarts_are_marked_on_their_runs_curve_and_say_what_was_touched(tmp_path: Path) -> None:
    events = [start("adamw", 0.001, 0, label="<again>"), *(train(step, 8 - step / 25) for step in range(1, 26))]
    events += [restart(10), restart(20, moments=["v"], tensors=1, parameters=1, norm_before=None)]
    write_lines(tmp_path / "again" / "log.jsonl", events)
    write_lines(tmp_path / "without" / "log.jsonl", [start("adamw", 0.001, 0), *map(train, range(1, 26))])
    methods = load(tmp_path)
    figure = plots.loss(methods, plots.styles_of(methods))
    assert figure
    line, _, marks = (trace for trace in figure["data"] if "&lt;again&gt;" in trace["hovertemplate"])
    assert len(figure["data"]) == 3 + 2  # the run without restarts has no marks
    assert marks["marker"]["symbol"] == "line-ns-open" and marks["meta"] == line["meta"]
    assert marks["x"] == [10, 20]
    assert marks["y"] == [line["y"][line["x"].index(step)] for step in marks["x"]]
    assert marks["text"] == [
        "28 layers rewritten, largest change of W 1.23e-07; m and v reset: 120 tensors of 60 parameters, norm 12.3 → 0",
        "28 layers rewritten, largest change of W 1.23e-07; v reset: 1 tensor of 1 parameter, norm – → 0",
    ]
    assert "%{text}" in marks["hovertemplate"] and "after step %{x:,}" in marks["hovertemplate"]


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            {"event": "restart", "step": 60, "layers": 1, "change": None},
            "1 time; after step 60: 1 layer rewritten, largest change of W –",
        ),
        (
            restart(60, layers=0, change=None, moments=["m"]),
            "1 time; after step 60: m reset: 120 tensors of 60 parameters, norm 12.3 → 0",
        ),
    ],
)
def test_a_runs_facts_tell_its_restarts(tmp_path: Path, event: dict[str, Any], text: str) -> None:
    write_lines(tmp_path / "log.jsonl", [start("adamw", 0.001, 0), train(60), event, end(20.0)])
    (run,) = load(tmp_path)[0].runs
    assert run.facts["restarted"] == text
    assert text in page(tmp_path)


def test_restarts_after_the_checkpoint_happen_again(tmp_path: Path) -> None:
    events = [start("adamw", 0.001, 0), restart(10), restart(20), {"event": "resume", "step": 15}, restart(20)]
    write_lines(tmp_path / "log.jsonl", events)
    assert [step for step, _ in load(tmp_path)[0].runs[0].restarts] == [10, 20]


def test_memory_picture_counts_weights_too(tmp_path: Path) -> None:
    """Low-rank weights save both: a picture of the state alone would hide half of what they save."""
    write_run(tmp_path, "adamw", 0.001, 0, 30.0)
    log = write_run(tmp_path, "thin", 0.001, 0, 31.0)
    events = [json.loads(line) for line in log.read_text().splitlines()]
    events[0]["memory"]["weights"] = MIB / 4
    write_lines(log, events)
    methods = load(tmp_path)
    figure = plots.memory(methods, plots.styles_of(methods))
    assert figure
    points = [trace for trace in figure["data"] if trace["mode"] != "lines"]
    assert {trace["text"][0]: trace["x"] for trace in points} == {"adamw": [9.0], "thin": [8.25]}


def test_every_recipe_looks_different(tmp_path: Path) -> None:
    for recipe in Bench().recipes():
        write_run(tmp_path, recipe.name, 0.001, 0, 30.0)
    styles = plots.styles_of(load(tmp_path)).values()
    assert len(set(styles)) == len(styles) == len(Bench().recipes())


def test_no_log_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)


def test_page_escapes_text_loads_nothing_and_is_deterministic(benchmark: Path) -> None:
    write_run(benchmark, "adamw", 0.002, 3, 21.0, label="<script>alert(1)</script>")
    write_lines(benchmark / "odd" / "log.jsonl", [start("<script>m</script>", 0.1, 0), train(5)])
    text = page(benchmark)
    assert "<script>alert" not in text and "<script>m" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", text)
    assert text == page(benchmark)


# --- Learning rates and diagnostics -----------------------------------------------------------------------------------


def rates_of(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The traces of the learning-rate picture by method."""
    methods = load(directory)
    figure = plots.rates(methods, plots.styles_of(methods))
    assert figure
    traces: dict[str, list[dict[str, Any]]] = {}
    for trace in figure["data"]:
        traces.setdefault(trace["name"], []).append(trace)
    return traces


def test_learning_rates_show_means_spread_and_every_seed(benchmark: Path) -> None:
    traces = rates_of(benchmark)
    mean, seeds = traces["adamw"]
    assert (mean["x"], mean["y"]) == ([0.001, 0.002], [31.0, 21.0])
    assert mean["error_y"]["array"] == pytest.approx([2**0.5, 2**0.5])
    assert sorted(zip(seeds["x"], seeds["y"], strict=True)) == [(0.001, 30), (0.001, 32), (0.002, 20), (0.002, 22)]
    assert traces["thin"][0]["x"] == [0.004]


def test_a_diverged_seed_leaves_a_gap_and_a_cross(benchmark: Path) -> None:
    write_run(benchmark, "adamw", 0.002, 2, None)
    mean, seeds, crosses = rates_of(benchmark)["adamw"]
    assert mean["y"] == [31.0, None]
    assert len(seeds["x"]) == 4  # the sound seeds at that rate are still there
    assert (crosses["x"], crosses["y"], crosses["text"]) == ([0.002], [32.0], ["adamw lr 0.002 seed 2"])


@pytest.mark.parametrize(("second", "drawn"), [(0.001, False), (0.004, True)])
def test_learning_rates_are_drawn_where_a_method_was_tried_at_two(tmp_path: Path, second: float, drawn: bool) -> None:
    write_run(tmp_path, "adamw", 0.001, 0, 30.0)
    write_run(tmp_path, "thin", 0.002, 0, 30.0)  # another method at another rate is no sweep
    write_run(tmp_path, "adamw", second, 1, 25.0)
    assert ('id="rates"' in page(tmp_path)) == drawn


@pytest.fixture
def diagnosed(benchmark: Path) -> Path:
    for log in benchmark.rglob("log.jsonl"):
        events = [json.loads(line) for line in log.read_text().splitlines()]
        looks = [look(step, events[0]["method"]) for step in range(10, 101, 10)]
        write_lines(log, [*events[:-1], *looks, events[-1]])
    return benchmark


def test_diagnostics_are_drawn_for_what_was_measured(diagnosed: Path) -> None:
    methods = load(diagnosed)
    figures = plots.diagnostics(methods, plots.styles_of(methods))
    assert list(figures) == ["m_error", "update_rms", "overlap"]
    assert plots.parameters(methods) == ["layers.0.q", "layers.1.<q>"]
    curves = figures["update_rms"]["data"]
    assert len(curves) == 6 * 2
    shown = {(curve["meta"]["group"], curve["meta"]["parameter"]) for curve in curves if curve["visible"]}
    assert shown == {("thin 0.004", "layers.0.q"), ("adamw 0.002", "layers.0.q")}
    assert curves[0]["x"] == list(range(10, 101, 10)) and curves[0]["y"][1] == 0.05
    axes = {quantity: figure["layout"]["yaxis"] for quantity, figure in figures.items()}
    assert axes["overlap"]["range"] == [-0.03, 1.03]
    assert axes["m_error"]["rangemode"] == "tozero" and "type" not in axes["m_error"]
    text = page(diagnosed)
    assert "<option>layers.1.&lt;q&gt;</option>" in text and text.count('class="key"') == 2


def test_huge_errors_get_a_logarithmic_axis(tmp_path: Path) -> None:
    looks = [look(step, "adamw") for step in (1, 2, 3)]
    for event, error in zip(looks, (0.1, 40.0, None), strict=True):
        event["parameters"][0]["m_error"] = error
    write_lines(tmp_path / "log.jsonl", [start("adamw", 0.001, 0), *looks])
    methods = load(tmp_path)
    figure = plots.diagnostics(methods, plots.styles_of(methods))["m_error"]
    assert figure["layout"]["yaxis"]["type"] == "log"
    assert figure["data"][0]["y"] == [0.1, 40.0, None]


def test_no_diagnostics_no_section(benchmark: Path) -> None:
    assert "Diagnostics" not in page(benchmark) and '<select id="parameter"' not in page(benchmark)


@pytest.mark.parametrize("record", ['{"update_rms": 1}', "3"])
def test_a_broken_look_is_named(tmp_path: Path, record: str) -> None:
    log = write_lines(tmp_path / "log.jsonl", [start("adamw", 0.001, 0)])
    with log.open("a") as file:
        file.write(f'{{"event": "diagnostics", "step": 1, "parameters": [{record}]}}\n')
    with pytest.raises(UserError, match=re.escape(f"{log}, line 2: an incomplete event")):
        load(tmp_path)


# --- In a browser -----------------------------------------------------------------------------------------------------

# Runs inside the report, framed at a phone's width: brings in a hidden learning rate, measures, tells the frame.
PROBE = """<script>
addEventListener("load", () => {
  const count = (selector) => document.querySelectorAll(selector).length;
  const before = count("#loss .scatterlayer .trace"), looks = count("#update_rms .scatterlayer .trace");
  document.querySelector('.key button[aria-pressed="false"]').click();
  const chooser = document.querySelector("#parameter"), first = chooser.value;
  chooser.selectedIndex = 1;
  chooser.onchange();
  setTimeout(() => parent.postMessage({
    width: innerWidth, content: document.documentElement.scrollWidth, before,
    after: count("#loss .scatterlayer .trace"), memory: count("#memory .scatterlayer .trace"),
    rates: count("#rates .scatterlayer .trace"), looks, looksAfter: count("#update_rms .scatterlayer .trace"),
    overlap: document.querySelector("#overlap").data.filter((t) => t.visible).map((t) => t.meta.parameter), first,
    pressed: count('.key button[aria-pressed="true"]'), drawn: count(".plot .main-svg .xtick"),
  }, "*"), 500);
});
</script></body>"""
FRAME = """<!doctype html><pre></pre><iframe src="probed.html" style="width:390px;height:800px;border:0"></iframe>
<script>addEventListener("message", (event) => document.querySelector("pre").textContent = JSON.stringify(event.data))
</script>"""


def chromium(address: str, profile: Path) -> tuple[str, str]:
    """The page's document once its scripts have run, and what it wrote to the console."""
    assert BROWSER
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    flags += ["--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, address], capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_in_a_browser_on_a_phone(diagnosed: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    # A long name must scroll or wrap rather than widen the page.
    write_run(diagnosed, "a-method-with-quite-a-long-name-for-a-phone", 0.002, 0, 25.0)
    report = write_report(diagnosed).read_text(encoding="utf-8")
    (diagnosed / "probed.html").write_text(report.replace("</body>", PROBE), encoding="utf-8")
    frame = diagnosed / "frame.html"
    frame.write_text(FRAME, encoding="utf-8")
    document, console = chromium(frame.as_uri(), tmp_path_factory.mktemp("profile"))
    assert console == ""
    found = re.search(r"<pre>(\{.*?\})</pre>", document)
    assert found, document[:500]
    probe = json.loads(unescape(found[1]))
    assert probe["content"] <= probe["width"] == 390
    assert probe["drawn"] >= 6
    # Two runs of thin, two of adamw at its best rate, one of the long name: a line, points and marks each.
    assert probe["before"] == 15
    assert probe["after"] == 21  # and adamw's two at its other rate
    # A mean for each method; two of them have seeds.
    assert (probe["memory"], probe["rates"]) == (3, 5)
    # Two runs of thin and two of adamw, then adamw's two at its other rate; one parameter at a time.
    assert (probe["looks"], probe["looksAfter"]) == (4, 6)
    assert probe["first"] == "layers.0.q" and probe["overlap"] == ["layers.1.<q>"] * 2
    # The same buttons under the loss (three methods) and the diagnostics (two): each pair goes on together.
    assert probe["pressed"] == (3 + 1) + (2 + 1)


def test_classifiers_are_ranked_by_their_score(tmp_path: Path) -> None:
    for method, score in (("adamw", 0.8), ("mlorc", 0.9)):
        for seed in (0, 1):
            outcome = {"event": "end", "step": 100, "score": score + 0.01 * seed, "accuracy": score, "loss": 0.5}
            run = tmp_path / method / str(seed) / "log.jsonl"
            write_lines(run, [start(method, 1e-3, seed), train(100), outcome | {"seconds": 1.0, "eval_tokens": 40}])
    best, other = load(tmp_path)
    assert (best.name, other.name) == ("mlorc", "adamw")
    assert best.best is not None and best.best.score == pytest.approx(0.905)
    figure = plots.memory([best, other], plots.styles_of([best, other]))
    assert figure is not None
    bars = {round(trace["y"][0], 3): trace["error_y"]["array"] for trace in figure["data"] if "error_y" in trace}
    assert set(bars) == {80.5, 90.5}  # per cent, and so is the spread
    assert list(bars.values()) == [[pytest.approx(0.7071, rel=1e-3)]] * 2
    page = unescape(write_report(tmp_path).read_text())
    assert "score 90.5\u00a0±\u00a00.7\u00a0%" in page and "1.124" in page and "diverged" not in page
    assert 'id="rates"' not in page  # a plot of perplexities
