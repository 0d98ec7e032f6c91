"""`gossamer bench step`: fair pairs, rows that say what they are of, and what is shown of them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer
from gossamer.bench import StepBench, bench_step, naive, plots, step, write_page
from gossamer.bench.step import all_rivals, cells, hidden_shapes, latest, read_rows, write_markdown
from gossamer.bench.timing import WARM_UP, Pairs, time_pairs
from gossamer.cli import main
from gossamer.errors import UserError
from gossamer.optim import subspace


@pytest.fixture
def options(tiny: Path, tmp_path: Path) -> StepBench:
    """Two layers of seven matrices, 32 x 32 and 48 x 32, two pairs."""
    return StepBench(
        methods=("lora-pre", "galore", "lion"),
        ranks=(4,),
        rivals=("adamw", "reference"),
        model=str(tiny / "config.json"),
        rounds=2,
        out=tmp_path / "new" / "step.jsonl",
    )


def test_pairs_take_turns_and_the_warm_up_does_not_count() -> None:
    taken: list[str] = []
    pairs = time_pairs(lambda: taken.append("a"), lambda: taken.append("b"), rounds=4)
    assert "".join(taken) == "ab" * WARM_UP + "abba" * 2
    assert len(pairs.ours) == len(pairs.theirs) == 4


def test_a_ratio_is_of_a_pair() -> None:
    pairs = Pairs(ours=(1.0, 6.0, 2.0), theirs=(2.0, 2.0, 1.0))
    assert (pairs.ratios, pairs.ratio) == ([0.5, 3.0, 2.0], 2.0)  # medians alone would give 1
    found = step.summary(pairs)
    assert found == {
        "ratio": 2.0, "ratio_min": 0.5, "ratio_max": 3.0, "pairs": 3, "milliseconds": 2000.0,
        "rival_milliseconds": 2000.0,
    }  # fmt: skip


def test_rows_say_what_they_are_of(options: StepBench, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    rows = bench_step(replace(options, threads=3))
    assert threads == [3, torch.get_num_threads()]
    assert [(row["method"], row["rank"], row["rival"]) for row in rows] == [
        ("lora-pre", 4, "adamw"),
        ("lora-pre", 4, "reference"),
        ("galore", 4, "adamw"),
        ("galore", 4, "reference"),
        ("lion", None, "adamw"),  # it has no twin, so there is nothing to compare with its reference
    ]
    for row in rows:
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"] and row["pairs"] == 2
        assert row["milliseconds"] > 0 and row["rival_milliseconds"] > 0
        assert (row["layers"], row["layers_timed"], row["weights_timed"]) == (2, 2, 2 * (4 * 32 * 32 + 3 * 48 * 32))
        assert row["hardware"]["threads"] == threads[1] and "torch" in row["versions"] and "commit" in row
    assert {row["implementation"] == "reference" for row in rows if row["method"] == "lion"} == {True}
    assert not any(row["implementation"] == "reference" for row in rows if row["method"] != "lion")
    assert rows[2]["fields"]["name"] == "galore" and rows[2]["fields"]["update_proj_gap"] > 10**6
    assert [json.loads(line) for line in options.out.read_text().splitlines()] == json.loads(json.dumps(rows))


def test_everyone_has_the_same_weights_and_gradients(options: StepBench, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.optim.Optimizer] = []
    make = step._optimizer
    monkeypatch.setattr(step, "_optimizer", lambda *args: made.append(make(*args)) or made[-1])
    rates = {"lr": 0.0}  # so that weights stay what they were

    def still(*args: Any, **kwargs: Any) -> Any:
        for optimizer in made:
            for group in optimizer.param_groups:
                group.update(rates)
        return time_pairs(*args, **kwargs)

    monkeypatch.setattr(step, "time_pairs", still)
    bench_step(replace(options, methods=("lora-pre",), rivals=()))
    first, *others = ([p for group in optimizer.param_groups for p in group["params"]] for optimizer in made)
    assert len(others) >= 3 and len(first) == 14
    for params in others:
        for p, q in zip(first, params, strict=True):
            assert p is not q and p.grad is not q.grad
            assert torch.equal(p, q) and p.grad is not None and q.grad is not None and torch.equal(p.grad, q.grad)
    assert all(optimizer.state for optimizer in made)


def test_no_projector_is_computed_in_a_timed_step(options: StepBench, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    refreshed = subspace.refreshed

    def count(*args: Any) -> Any:
        calls.append("refresh")
        return refreshed(*args)

    monkeypatch.setattr(subspace, "refreshed", count)
    bench_step(replace(options, methods=("galore",), rounds=5))
    assert len(calls) == 3 * 14  # ours twice and the reference, 14 matrices, in the first step of the warm-up


def test_as_many_layers_as_memory_holds(options: StepBench, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(options, methods=("lion",), rivals=("adamw",))
    (row,) = bench_step(replace(options, layers=1))
    assert (row["layers_timed"], row["layers"]) == (1, 2)
    a_layer = (4 * 32 * 32 + 3 * 48 * 32) * step.BYTES_A_WEIGHT
    monkeypatch.setattr(step, "_free_memory", lambda device: int(1.9 * a_layer / 0.6))
    (row,) = bench_step(options)
    assert row["layers_timed"] == 1 and row["weights_timed"] * step.BYTES_A_WEIGHT == a_layer
    monkeypatch.setattr(step, "_free_memory", lambda device: int(0.9 * a_layer / 0.6))
    with pytest.raises(UserError, match=r"model: one decoder layer .* does not fit"):
        bench_step(options)


def test_the_table_of_130m_is_its_block_matrices() -> None:
    shapes, layers = hidden_shapes("130m")
    assert layers == 12 and sum(m * n for m, n in shapes) == 84_934_656
    assert sorted(set(shapes)) == [(768, 768), (768, 2048), (2048, 768)]
    names = {(type(method).__name__, getattr(method, "rank", None)) for method in StepBench().cases()}
    assert {("LoRAPre", 8), ("LoRAPre", 128), ("MLorc", 4), ("Gossamer", 128), ("Apollo", 128)} <= names
    assert len(names) == 11


def test_rivals() -> None:
    rivals = all_rivals(gossamer.AdamW(), "cuda", torch.bfloat16)
    assert {"adamw", "reference", "adamw-bf16", "adamw-bf16-fp32"} <= set(rivals)
    assert rivals["adamw"].dtype is torch.float32 and rivals["reference"].dtype is torch.bfloat16
    param = torch.nn.Parameter(torch.ones(4, 4))
    param.grad = torch.ones(4, 4)
    rival = all_rivals(gossamer.AdamW(), "cpu", torch.float32)["adamw"].make([param])
    rival.step()
    assert type(rival) is torch.optim.AdamW and rival.param_groups[0]["fused"] is True
    assert rival.state[param]["exp_avg"].dtype is torch.float32


NAIVE = [*((name, {}) for name in naive.EQUATIONS), ("mlorc", {"power_iterations": 1, "oversampling": 2})]


@pytest.mark.parametrize(("name", "fields"), NAIVE, ids=str)
def test_the_naive_rival_takes_the_reference_s_steps(name: str, fields: dict[str, int]) -> None:
    """In float64, tall, wide and square: the same sums in another order, as fused twins are held to them."""
    method = gossamer.methods()[name].cls(rank=4, **fields)
    trained = []
    for make in (partial(naive.Naive, method), partial(step.make_optimizer, method, "reference")):
        generator = torch.Generator().manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
            for shape in ((20, 12), (12, 20), (9, 9))
        ]
        optimizer = make(params)
        for _ in range(7):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        trained.append(params)
    for ours, theirs in zip(*trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_what_the_naive_rival_is_there_for() -> None:
    """The methods of the table, in fp32 on a CPU."""
    assert set(naive.EQUATIONS) == set(step.RANKS)
    assert "naive" in all_rivals(gossamer.LoRAPre(), "cpu", torch.float32)
    assert "naive" not in all_rivals(gossamer.LoRAPre(), "cpu", torch.bfloat16)
    assert "naive" not in all_rivals(gossamer.LoRAPreStable(), "cpu", torch.float32)
    assert "naive" not in all_rivals(gossamer.LoRAPre(), "cuda", torch.float32)


def test_what_is_shown(options: StepBench, tmp_path: Path) -> None:
    bench_step(options)
    rows = bench_step(options)
    assert len(options.out.read_text().splitlines()) == 10
    kept = read_rows(options.out)
    assert kept == json.loads(json.dumps(rows))  # the last of each
    header, body = cells(kept)
    assert header[-4:] == ["÷ adamw", "adamw ms", "÷ reference", "reference ms"]
    assert [line[:2] for line in body] == [["lora-pre", "4"], ["galore", "4"], ["lion", "–"]]
    assert body[2][-2:] == ["–", "–"]
    write_markdown(header, body, tmp_path / "step.md")
    lines = (tmp_path / "step.md").read_text().splitlines()
    assert len(lines) == 5 and all(line.count("|") == len(header) + 1 for line in lines)
    other = kept[0] | {"compiled_sweep": not kept[0]["compiled_sweep"]}
    assert latest([*kept, other]) == [*kept, other] and len(cells([*kept, other])[1]) == 4  # another program
    machines = [kept[0]["hardware"] | {"accelerator": "H100", "threads": threads} for threads in (1, 8)]
    on_gpu = [kept[0] | {"hardware": hardware} for hardware in machines]
    assert latest(on_gpu) == on_gpu  # of steps on its CPU
    assert len(plots.step_ratios([*kept, other])[kept[0]["rival"]]["data"]) == 3
    figures = plots.step_ratios(kept)
    assert set(figures) == {"adamw", "reference"}
    assert [trace["x"] for trace in figures["adamw"]["data"]] == [[4], [4]]  # lion has no rank
    page = write_page(options.out).read_text()
    assert all(line[5] in page for line in body) and 'id="reference"' in page


def test_the_command(options: StepBench, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", options.model, "--methods", "lora-pre", "--ranks", "4", "--rivals", "adamw", "--rounds", "1"]
    assert main(["bench", "step", *words, "--out", str(options.out)]) == 0
    printed = capsys.readouterr().out
    (row,) = read_rows(options.out)
    assert "lora-pre" in printed and f"{row['ratio']:.2f}" in printed
    assert Path(printed.split()[-1]).resolve() == options.out.with_suffix(".html").resolve()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--methods lora-per", "method: unknown 'lora-per' (did you mean 'lora-pre'?)"),
        ("--rivals adam", "rivals: 'adam' is not here (did you mean 'adamw'?)"),
        (
            "--rivals naive --methods adamw",
            "rivals: 'naive' is not written for 'adamw'; allowed methods: lora-pre, mlorc",
        ),
        ("--rivals naive --dtype bfloat16", "rivals: 'naive' is not here; known: adamw, reference"),
        ("--layers 0", "layers: 0 is too small; allowed: an integer >= 1"),
        ("--rounds 0", "rounds: 0 is too small"),
        ("--threads -1", "threads: -1 is too small"),
        ("--model tiny --ranks 128", "ranks: 128 is not below the smallest side of 'tiny', 128"),
        ("--ranks 0 --methods lora-pre", "lora-pre: rank is 0; allowed: an integer >= 1"),
        ("--dtype float16", "bench step: "),
        ("--roundz 3", "(did you mean --rounds?)"),
    ],
)
def test_bad_input_is_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "step", *words.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing was timed before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_is_one_line() -> None:
    with pytest.raises(UserError, match="device: there is no CUDA device here"):
        StepBench(device="cuda")
