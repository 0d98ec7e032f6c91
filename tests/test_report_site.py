"""A folder of results as a site: what is read, drawn and named, filters and CSV, and the pages in a browser."""

from __future__ import annotations

import csv
import json
import re
import shlex
from dataclasses import replace
from html import unescape
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from gossamer.bench import Bench, plots, reading, suite, write_report
from gossamer.bench.again import command
from gossamer.bench.page import Rows
from gossamer.bench.plots import styles_of
from gossamer.bench.reading import Published, load
from gossamer.cli import _parse_with_parts
from gossamer.errors import UserError
from gossamer.layers import Adapter
from gossamer.optim.methods.mlorc import MLorc
from gossamer.train import Finetune, Pretrain
from tests.test_report import BROWSER, MIB, chromium, look, write_lines, write_run

ROOT = Path(__file__).parents[1]


def row(method: str, lr: float, perplexity: float | None, *, size: str = "tiny", seed: int = 0, **more: Any) -> Any:
    """As the benchmark writes it, with a curve inside and no log."""
    scale = {"tiny": 1, "small": 4}[size]
    curve = {
        "train": [[step, 3 + 4 / step] for step in range(4, 401, 4)],
        "eval": [[200, 3.1], [400, 3.0]],
        "restarts": [[100, "28 layers rewritten"]] if method == "again" else [],
    }
    return {
        "table": "tiny",
        "label": f"{size} {method} lr {lr:g} seed {seed}",
        "size": size,
        "method": method,
        "lr": lr,
        "seed": seed,
        "steps": 400,
        "tokens": 819_200,
        "perplexity": perplexity,
        "legacy_perplexity": perplexity and perplexity - 1,
        "weights_bytes": scale * MIB,
        "state_bytes": scale * (2 if method == "adamw" else 1) * MIB,
        "hidden_state_bytes": scale * MIB,
        "tokens_per_second": 800.0,
        "step_time": 0.004,
        "step_share": 0.25,
        "reference": {"tokens_per_second": 1000.0, "step_time": 0.002, "step_share": 0.1},
        "memory": {"predicted": {"weights": MIB, "step": 2 * MIB}, "peak": {"forward": 3 * MIB}},
        "curve": curve,
        "log": "../../runs/gone/log.jsonl",
        "config": {"method": {"name": method}, "model": size, "lr": lr, "steps": 400, "seed": seed},
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "a cpu", "threads": 1 + seed, "accelerator": None},
        "commit": "abc1234",
    } | more


def step_row(method: str, rank: int, ratio: float) -> dict[str, Any]:
    numbers = {"ratio": ratio, "ratio_min": ratio / 2, "ratio_max": ratio * 2, "milliseconds": 1.0}
    setting = {"model": "130m", "layers_timed": 2, "dtype": "float32", "device": "cpu"}
    return {"method": method, "rank": rank, "implementation": "tiles", "rival": "adamw", "rival_milliseconds": 2.0,
            **numbers, **setting, "hardware": {"cpu": "a cpu", "threads": 2}}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two sizes in one table, a table of logs, step times, other rows with a picture, and a file that is torn apart."""
    folder = tmp_path / "results"
    rows = [row("adamw", lr, 20 + 1000 * lr, seed=seed) for lr in (0.001, 0.002) for seed in (0, 1)]
    rows += [row("again", 0.002, 18.0), row("worse", 0.002, 30.0), row("lost", 0.002, None)]
    rows += [row("adamw", 0.001, 12.0, size="small"), row("again", 0.001, 15.0, size="small")]
    write_lines(folder / "ours" / "rows.jsonl", rows)
    for seed in (0, 1):
        write_run(folder / "logs", "adamw", 0.001, seed, 30.0 + seed)
    log = write_run(folder / "logs", "mlorc", 0.001, 0, 31.0)
    log.write_text(log.read_text() + json.dumps(look(7, "thin")) + "\n")
    write_lines(folder / "step.jsonl", [step_row("mlorc", rank, 0.5 + rank) for rank in (4, 32, 4)])
    write_lines(folder / "memory.jsonl", [{"method": "mlorc", "peak": {"mib": 2.5}, "note": 'a "b",\nc', "none": None}])
    (folder / "memory_cpu.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "torn.jsonl").write_text('{"a": 1}\n{"b":\n{"c": 3}\n')
    (folder / "gsm8k-001.samples.jsonl").write_text("{}\n")
    return folder


def read_site(folder: Path) -> dict[str, str]:
    """Every page by its address."""
    index = write_report(folder)
    assert index == folder / "site" / "index.html"
    return {page.relative_to(index.parent).as_posix(): page.read_text() for page in index.parent.rglob("*.html")}


def embedded(page: str) -> Any:
    """The figures and rows in a page."""
    found = re.search(r"<script>const figures = (.*), rows = (.*);\nconst all = ", page)
    assert found
    return json.loads(found[1]), json.loads(found[2])


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_a_site_has_a_page_for_each_table_and_method_and_no_link_is_dead(results: Path) -> None:
    pages = read_site(results)
    assert set(pages) == {
        "index.html",
        *(f"tables/{name}.html" for name in ("memory", "ours", "results", "step")),
        *(f"methods/{name}.html" for name in ("adamw", "again", "lost", "mlorc", "worse")),
    }
    for name, page in pages.items():
        for address in re.findall(r'(?:href|src)="([^"]*)"', page):
            assert address.startswith("data:") or (results / "site" / name).parent.joinpath(address).is_file(), address
        assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", page)
        assert len(page) < 300_000  # the plotting library is there once


def test_every_file_is_listed_with_what_became_of_it(results: Path) -> None:
    index = read_site(results)["index.html"]
    lines = dict(re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td></tr>", index))
    assert lines == {
        "3 logs of results": "a table, loss, memory, update_rms, overlap",
        "memory.jsonl": "a table, a picture beside it",
        "ours/rows.jsonl": "a table, loss, memory, rates",
        "step.jsonl": "a table, adamw, 1 row superseded by later ones",
        "torn.jsonl": lines["torn.jsonl"],
        "gsm8k-001.samples.jsonl": "samples of an evaluation: not drawn",
    }
    assert unescape(lines["torn.jsonl"]).startswith("not understood: torn.jsonl, line 2: not a JSON object")
    assert "1 more table could not be read, see the list of files: torn." in index
    assert "gossamer report results" in index and "2.13.0" in index and "a cpu" in index
    assert "galore" in index.split("Methods without a row here")[1]


def test_one_table_is_one_page_wherever_it_lies(results: Path, tmp_path: Path) -> None:
    page = write_report(results / "ours")
    assert page == results / "ours" / "report.html" and "plotly.js v" in page.read_text()
    (tmp_path / "above").mkdir()
    (results / "ours").rename(tmp_path / "above" / "ours")
    assert write_report(tmp_path / "above", tmp_path / "out") == tmp_path / "out" / "report.html"
    single = write_lines(tmp_path / "one" / "step.jsonl", [step_row("mlorc", 4, 0.5)])
    assert "One optimizer step" in write_report(single.parent).read_text()


def test_nothing_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("[1]\n{}\n")
    with pytest.raises(UserError, match=re.escape("a.jsonl, line 1: not a JSON object")):
        write_report(tmp_path)


def test_the_same_files_give_the_same_bytes_and_pages_of_lost_tables_go(results: Path) -> None:
    first = read_site(results)
    assert read_site(results) == first
    mine = results / "site" / "tables" / "mine.html"
    mine.write_text("<p>somebody's own</p>")
    (results / "step.jsonl").unlink()
    assert set(first) - set(read_site(results)) == {"tables/step.html"}
    assert mine.exists()


def test_files_of_one_name_are_two_tables(results: Path) -> None:
    write_lines(results / "step" / "rows.jsonl", [row("adamw", 0.001, 20.0)])
    write_lines(results / "st ep" / "rows.jsonl", [row("adamw", 0.001, 20.0)])
    write_lines(results / "st-ep" / "rows.jsonl", [row("adamw", 0.001, 20.0)])
    names = {name for name in read_site(results) if name.startswith("tables/st")}
    assert names == {f"tables/{name}.html" for name in ("step", "step-jsonl", "st-ep", "st-ep.2")}


def test_the_repositorys_own_results_are_all_understood(tmp_path: Path) -> None:
    write_report(ROOT / "results", tmp_path)
    index = (tmp_path / "index.html").read_text()
    assert "not understood" not in index
    for path in (ROOT / "results").rglob("*.jsonl"):
        assert f"<td>{path.relative_to(ROOT / 'results').as_posix()}</td>" in index


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_curves_and_restarts_come_from_rows_alone(results: Path) -> None:
    methods = load(results / "ours")
    figure = plots.loss(methods, styles_of(methods))
    assert figure
    curves = [trace for trace in figure["data"] if "tiny again" in trace["hovertemplate"]]
    line, points, marks = curves
    assert list(zip(line["x"], line["y"], strict=True))[:2] == [(4, 4.0), (8, 3.5)]  # as they are: means already
    assert (points["x"], points["y"]) == ([200, 400], [3.1, 3.0])
    assert (marks["x"], marks["text"]) == ([100], ["28 layers rewritten"])


def test_sizes_are_compared_among_themselves(results: Path) -> None:
    methods = load(results / "ours")
    assert [method.title for method in methods] == [
        "again, tiny", "adamw, tiny", "worse, tiny", "lost, tiny", "adamw, small", "again, small"
    ]  # fmt: skip
    page = write_report(results / "ours").read_text()
    ratios = re.findall(r'class="perplexity ratio">([\d.]+)<', page)
    assert ratios == ["0.857", "1.000", "1.429", "1.000", "1.250"]  # 18 / 21 and 30 / 21; 15 / 12
    assert len({plots.group_of(run) for method in methods for run in method.runs}) == 7


def test_what_a_run_measured_is_shown(results: Path) -> None:
    page = write_report(results / "ours").read_text()
    costs = page.split("Time and memory, measured in the run")[1].split("</table>")[0]
    line = next(line for line in costs.split("<tr") if "again" in line)
    assert re.findall(r"<td>(.*?)</td>", line) == ["4.00", "0.250", "1.25", "1.00", *"–––", "2.00", "3.00", *"––"]


def test_rows_of_experiments_without_labels_are_told_apart(tmp_path: Path) -> None:
    common = {"lr": 0.001, "steps": 4, "perplexity": 20.0, "config": {"method": {"name": "adamw"}}}
    rows = [
        common | {"layers": "low-rank", "arm": arm, "state_bits": bits, "seed": seed}
        for arm in ("plain", "reset")
        for bits in (32, 16)
        for seed in (0, 1)
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    found = {method.name: [run.label for run in method.runs] for method in load(tmp_path)}
    assert found["low-rank, reset, 16 bits"] == [
        f"low-rank, reset, 16 bits lr 0.001 seed {seed} steps 4" for seed in (0, 1)
    ]
    assert len(found) == 4
    write_lines(tmp_path / "rows.jsonl", [{"perplexity": 2.0}])
    with pytest.raises(UserError, match="line 1: a run's row needs 'method'"):
        load(tmp_path)


def test_scores_are_drawn_by_task(tmp_path: Path) -> None:
    rows = [
        {"task": task, "method": method, "lr": lr, "seed": seed, "score": score + lr + 0.01 * seed, "state_bytes": size}
        for task in ("rte", "cola")
        for method, score, size in (("adamw", 0.7, 2 * MIB), ("mlorc", 0.8, MIB))
        for lr in (0.001, 0.002)
        for seed in (0, 1)
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    methods = load(tmp_path)
    assert [method.title for method in methods] == ["mlorc, cola", "adamw, cola", "mlorc, rte", "adamw, rte"]
    styles = styles_of(methods)
    memory, rates = plots.memory(methods, styles), plots.rates(methods, styles)
    assert memory and rates
    assert memory["layout"]["xaxis"]["title"]["text"] == "optimizer state, MiB"
    points = {trace["text"][0]: (trace["x"], trace["y"]) for trace in memory["data"] if trace["mode"] != "lines"}
    assert points["mlorc, rte"] == ([1.0], [pytest.approx(80.7)])
    assert rates["data"][0]["y"] == [pytest.approx(80.6), pytest.approx(80.7)]
    assert ">Validation score<" in write_report(tmp_path).read_text()


def test_the_front_holds_what_nothing_beats_in_both(tmp_path: Path) -> None:
    sizes = {"adamw": (4, 20.0), "thin": (2, 21.0), "thinner": (1, 25.0), "fat": (3, 22.0), "same": (2, 23.0)}
    rows = [row(name, 0.001, value, state_bytes=state * MIB) for name, (state, value) in sizes.items()]
    write_lines(tmp_path / "rows.jsonl", rows)
    methods = load(tmp_path)
    figure = plots.memory(methods, styles_of(methods))
    assert figure
    (front,) = (trace for trace in figure["data"] if trace["mode"] == "lines")
    assert list(zip(front["x"], front["y"], strict=True)) == [(2, 25.0), (3, 21.0), (5, 20.0)]  # with 1 MiB of weights


def test_published_results_are_hollow_marks_beside_our_legacy_perplexities(results: Path) -> None:
    claim = {"method": "again", "size": "small", "perplexity": 14.5, "gigabytes": 0.01, "source": "<Table> 2"}
    claims = results / "ours" / "claims.json"
    claims.write_text(json.dumps([claim | {"caveats": "bf16"}]))
    methods = load(results / "ours")
    figure = plots.memory(methods, styles_of(methods), reading.read_published(claims))
    assert figure
    hollow = figure["data"][-1]
    assert (hollow["x"], hollow["y"]) == ([pytest.approx(1e7 / MIB)], [14.5])
    assert hollow["marker"]["symbol"].endswith("-open") and "&lt;Table&gt; 2" in hollow["hovertemplate"]
    ours = {trace["text"][0]: trace["y"] for trace in figure["data"][:-1] if "text" in trace}
    assert ours["again, small"] == [14.0] and "lost, tiny" not in ours
    assert "legacy" in figure["layout"]["yaxis"]["title"]["text"]
    pages = read_site(results)
    assert "&lt;Table&gt; 2" in pages["tables/ours.html"]
    assert "<tr><td>ours/claims.json</td><td>hollow marks and a table</td></tr>" in pages["index.html"]


def test_claims_without_memory_draw_nothing_beside_runs_that_diverged(results: Path) -> None:
    claim = {"method": "again", "size": "small", "perplexity": 14.5, "gigabytes": None, "source": "a", "caveats": ""}
    methods = [method for method in load(results / "ours") if method.name == "lost"]
    assert methods and plots.memory(methods, styles_of(methods), [reading.Published(**claim)] * 2) is None


@pytest.mark.parametrize("text", ["{", "[1]", '[{"method": "x"}]', '{"a": 1}'])
def test_claims_that_are_none_are_named(results: Path, text: str) -> None:
    (results / "ours" / "claims.json").write_text(text)
    assert "not understood: ours/claims.json: not a list of published results" in read_site(results)["index.html"]


def test_a_claim_has_the_fields_that_its_file_has() -> None:
    assert list(Published.__dataclass_fields__) == ["method", "size", "perplexity", "gigabytes", "source", "caveats"]


def test_laws_over_compute_are_drawn_of_rows_with_a_whole_configuration(tmp_path: Path) -> None:
    rows = []
    for steps, perplexity in ((100, 30.0), (200, 25.0), (400, 20.0)):
        config = as_written(Pretrain(MLorc(), model="tiny", steps=steps))
        rows.append(row("mlorc", 0.001, perplexity, steps=steps, label=f"{steps}", config=config))
    path = write_lines(tmp_path / "rows.jsonl", rows)
    figures, _ = embedded(write_report(tmp_path).read_text())
    assert any("exponent" in trace.get("name", "") for trace in figures["scaling"]["data"])
    config = rows[1]["config"] | {"layers": {"name": "unheard-of"}}
    for wrong, message in (
        ({"config": config}, "Loss and compute: a row is not as it was written"),
        ({"perplexity": -1.0}, "run '200': its log or row is not as it was written .a perplexity of -1"),
    ):
        write_lines(path, [rows[0], rows[1] | wrong])
        with pytest.raises(UserError, match=message):
            write_report(tmp_path)


def test_a_method_with_measurements_alone_has_a_page(results: Path) -> None:
    for name in ("ours", "logs"):
        (results / name).rename(results.parent / name)
    page = read_site(results)["methods/mlorc.html"]
    assert "step.html" in page and "Results" not in page


# ---- a method's page -------------------------------------------------------------------------------------------------


def test_a_methods_page_has_its_results_of_every_table(results: Path) -> None:
    page = read_site(results)["methods/adamw.html"]
    assert "Dense first and second moments" in page
    heads = re.findall(r'<a href="\.\./tables/(\w+)\.html">.*?</th>\s*<td>(.*?)<', page)
    assert heads == [("ours", "0.001"), ("ours", "0.001"), ("results", "0.001")]
    figures, rows = embedded(page)
    assert set(figures) == {"loss", "rates"}
    assert {trace["name"] for trace in figures["rates"]["data"]} == {"results", "ours, tiny", "ours, small"}
    assert len(rows["cells"]) == 7


def test_a_methods_page_names_other_measurements_of_it(results: Path) -> None:
    page = read_site(results)["methods/mlorc.html"]
    assert '<a href="../tables/step.html">step</a>: 2 rows' in page
    assert '<a href="../tables/memory.html">memory</a>: 1 row' in page


def test_a_method_that_is_not_registered_is_told_by_what_its_runs_trained(tmp_path: Path) -> None:
    config = {"method": {"name": "adamw"}, "layers": {"name": "sltrain", "rank": 4}, "restarts": {"every": 50}}
    write_lines(tmp_path / "a" / "rows.jsonl", [row("sparse", 0.001, 20.0, config=config)])
    write_lines(tmp_path / "b" / "rows.jsonl", [row("sparse", 0.001, 20.0, config=[1])])
    with pytest.raises(UserError, match="sparse"):
        load(tmp_path / "b")
    write_lines(tmp_path / "c" / "rows.jsonl", [row("other", 0.001, 20.0)])
    page = read_site(tmp_path)["methods/sparse.html"]
    assert "Weights: <b>sltrain</b>" in page and "Trained by <b>adamw</b>" in page and "every 50" in page


# ---- commands --------------------------------------------------------------------------------------------------------


def parsed(text: str) -> Any:
    _, name, *words = shlex.split(text)
    return _parse_with_parts({"pretrain": Pretrain, "finetune": Finetune}[name], name, words)


def as_written(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(config.to_json()))


@pytest.mark.parametrize("recipe", Bench().recipes(), ids=lambda recipe: recipe.name)
def test_a_rows_command_trains_the_same(recipe: suite.Recipe) -> None:
    config = Pretrain(recipe.method, recipe.restarts, layers=recipe.layers, lr=recipe.lr, steps=7, checkpointing=True)
    config = replace(config, diagnose=("a b", "c"), fallback_lr=0.004, data=replace(config.data, packing=False))
    said = command(as_written(config))
    assert said
    assert as_written(parsed(said)) == as_written(config)


def test_a_finetuned_rows_command_trains_the_same() -> None:
    config = Finetune(MLorc(rank=4), model="/a b", adapter=Adapter("lora", rank=3), epochs=2.5)
    said = command(as_written(config))
    assert said
    assert as_written(parsed(said)) == as_written(config)


@pytest.mark.parametrize(
    "change", [{"method": {"name": "none"}}, {"method": None}, {"knob": 1}, {"layers": {"name": "none"}}, {"layers": 3}]
)
def test_a_configuration_of_another_version_has_no_command(change: dict[str, Any]) -> None:
    config = as_written(Pretrain(MLorc()))
    assert command(config) and command({}) is None
    assert command(config | change) is None


# ---- CSV and filters -------------------------------------------------------------------------------------------------


def test_the_csv_has_every_row_and_every_column() -> None:
    rows = [{"a": 1, "b": {"c": None, "d": [1, 2]}}, {"a": 'x"', "e": {}, "b": {"d": True}}]
    texts = Rows("name", rows, [{}, {}]).as_texts()
    assert texts["columns"] == ["a", "b.c", "b.d", "e"]
    assert texts["cells"] == [["1", "", "[1, 2]", ""], ['x"', "", "true", "{}"]]


def test_rows_keep_what_tells_them_for_filters(results: Path) -> None:
    figures, rows = embedded(read_site(results)["tables/ours.html"])
    expected = {"table": ["ours"], "size": ["small"], "method": ["again"], "hardware": ["a cpu, 1 thread"]}
    assert rows["facets"][-1] == expected and len(rows["facets"]) == len(rows["cells"]) == 9
    assert all(trace["meta"]["facets"] for figure in figures.values() for trace in figure["data"])


# ---- in a browser ----------------------------------------------------------------------------------------------------

# Runs inside a page, framed at a phone's width, and tells the frame what `look` finds.
PROBE = """<script>
addEventListener("load", async () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const shown = (selector) => all(selector).filter((element) => element.getClientRects().length).length;
  const traces = (id) => document.getElementById(id).data.filter((trace) => trace.visible).length;
  const box = (name, value) => all(`.filters input[name="${name}"]`).find((input) => input.value === value);
  const tick = (name, value) => { const input = box(name, value); input.focus(); input.click(); return input; };
  const saved = async () => {
    let kept; URL.createObjectURL = (blob) => { kept = blob; return "data:,"; };
    all("#save")[0].click();
    return kept.text();
  };
  const found = {width: innerWidth, content: document.documentElement.scrollWidth, ...await (LOOK)()};
  setTimeout(() => parent.postMessage([NAME, found], "*"), 300);
});
</script></body>"""
LOOKS = {
    "index.html": "async () => ({tables: shown('.list li')})",
    "tables/ours.html": """async () => {
      const lines = "table.results tbody tr", out = {lines: shown(lines), loss: traces("loss"), csv: await saved()};
      out.drawn = all("#loss .scatterlayer .trace").length;
      const range = () => document.querySelector("#memory").layout.xaxis.range;
      out.before = range();
      const input = tick("size", "small");
      out.focused = document.activeElement === input;
      out.after = range();
      out.small = [shown(lines), traces("loss"), traces("memory"), traces("rates")];
      out.text = all("#save")[0].textContent;
      out.some = await saved();
      tick("method", "again");
      out.both = [shown(lines), traces("loss")];
      tick("size", "small"); tick("method", "again"); tick("hardware", "a cpu, 2 threads");
      out.hardware = [shown(lines), traces("loss")];
      tick("hardware", "a cpu, 2 threads");
      out.again = [shown(lines), traces("loss"), all("#save")[0].textContent];
      return out;
    }""",
    "tables/results.html": "async () => ({drawn: all('#loss .scatterlayer .trace').length})",
    "tables/step.html": "async () => ({drawn: all('#adamw .scatterlayer .trace').length})",
    "tables/memory.html": "async () => ({csv: await saved(), images: shown('img')})",
    "methods/adamw.html": "async () => { tick('table', 'results'); return {lines: shown('table.results tbody tr')}; }",
}
FRAME = """<!doctype html><pre></pre>{frames}<script>
const found = {{}};
addEventListener("message", ({{data}}) => {{
  found[data[0]] = data[1];
  document.querySelector("pre").textContent = JSON.stringify(found);
}});
</script>"""


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
def test_in_a_browser_on_a_phone(results: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    long = "a-method-with-quite-a-long-name-for-a-phone-that-nobody-would-choose"
    write_lines(results / "long" / "rows.jsonl", [row(long, 0.001, 20.0), row("adamw", 0.001, 19.0)])
    pages = read_site(results)
    looks = LOOKS | {"tables/long.html": "async () => ({})", f"methods/{long}.html": "async () => ({})"}
    frames = ""
    for name, looked in looks.items():
        probe = PROBE.replace("LOOK", looked).replace("NAME", json.dumps(name))
        path = (results / "site" / name).with_suffix(".probed.html")
        path.write_text(pages[name].replace("</body>", probe))
        frames += f'<iframe src="{path.as_uri()}" style="width:390px;height:800px;border:0"></iframe>'
    frame = results / "frame.html"
    frame.write_text(FRAME.format(frames=frames))
    document, console = chromium(frame.as_uri(), tmp_path_factory.mktemp("profile"))
    assert console == ""
    found = json.loads(unescape(re.findall(r"<pre>(.*?)</pre>", document)[0]))
    assert set(found) == set(looks), document[:500]
    for name, probe in found.items():
        assert probe["content"] <= probe["width"] == 390, name

    assert found["index.html"]["tables"] == 5 + 6
    assert found["tables/results.html"]["drawn"] == 3 * 3 and found["tables/step.html"]["drawn"] == 1
    assert found["methods/adamw.html"]["lines"] == 1
    assert found["tables/memory.html"]["images"] == 1
    (line,) = csv.DictReader(StringIO(found["tables/memory.html"]["csv"], newline=""))
    assert line == {"method": "mlorc", "peak.mib": "2.5", "note": 'a "b",\nc', "none": ""}

    ours = found["tables/ours.html"]
    written = [json.loads(line) for line in (results / "ours" / "rows.jsonl").read_text().splitlines()]
    lines = list(csv.DictReader(StringIO(ours["csv"], newline="")))
    assert len(lines) == len(written)
    by_label = {line["label"]: line for line in lines}
    for one in written:
        line = by_label[one["label"]]
        assert json.loads(line["curve.train"]) == one["curve"]["train"]
        assert float(line["memory.predicted.step"]) == 2 * MIB and line["commit"] == "abc1234"
        assert line["perplexity"] == ("" if one["perplexity"] is None else json.dumps(one["perplexity"]))
    # Tiny: four methods, small: two, each again among the costs; of the methods at their best rate five runs of tiny
    # and two of small have a line and points, those of "again" restarts too.
    assert (ours["lines"], ours["loss"], ours["drawn"]) == (12, 7 * 2 + 2, 7 * 2 + 2)
    assert ours["focused"]
    # Two methods, in both tables; of rates, a mean each; in the plot of memory two points and their front.
    assert ours["small"] == [4, 2 * 2 + 1, 2 + 1, 2]
    assert ours["before"][0] < 2 < ours["after"][0]  # MiB: the axis fits what is shown
    assert ours["text"] == "Download 2 of 9 rows as CSV"
    assert {line["size"] for line in csv.DictReader(StringIO(ours["some"], newline=""))} == {"small"}
    assert ours["both"] == [2, 3]
    assert ours["hardware"] == [2, 2]  # adamw's line, whose runs are of both; the run of two threads
    assert ours["again"] == [12, 16, "Download 9 rows as CSV"]
