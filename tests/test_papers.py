"""The papers' runs: a plan without weights, and every step of them on stand-ins of a few kilobytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.data import TaskConfig
from papers import lora_pre, mlorc
from papers.finetuning import plan


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stand-ins")
    maths = [
        {"query": f"{i}+1?", "response": f"#### {i + 1}\nThe answer is: {i + 1}", "type": "GSM"} for i in range(40)
    ]
    code = [{"query": f"print {i}", "answer": f"```python\nprint({i})\n```"} for i in range(40)]
    human = {"task_id": "HumanEval/0", "prompt": "def one():\n", "canonical_solution": "    return 1\n",
             "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}  # fmt: skip
    return {
        "math": write(folder / "math.jsonl", maths),
        "code": write(folder / "code.jsonl", code),
        "gsm8k": write(folder / "gsm8k.jsonl", [{"question": "1+1?", "answer": "#### 2"}]),
        "math500": write(folder / "math500.jsonl", [{"problem": "1+1?", "solution": "$\\boxed{2}$"}]),
        "humaneval": write(folder / "humaneval.jsonl", [human]),
    }


def small(base: Path, tmp_path: Path) -> list[str]:
    options = {"model": base, "out": tmp_path, "examples": 32, "max-new-tokens": 4, "device": "cpu", "seeds": 3}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("method", lora_pre.METHODS)
def test_lora_pre_runs_on_a_stand_in(
    base: Path, stand_ins: dict[str, str], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", stand_ins["math"], "--test-data", stand_ins["gsm8k"], stand_ins["math500"]]
    assert lora_pre.main([*small(base, tmp_path), "--method", method, *data]) == 0
    folder = tmp_path / f"lora-pre-llama-2-7b-{method}" / "seed-3"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [row["task"] for row in rows] == ["gsm8k", "math500"]
    assert all(row["model"] == str(folder / "checkpoints" / "step-00000001") for row in rows)
    start = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    config = start["config"]
    assert (config["lr"], config["warmup"], config["decay"], config["steps"]) == (2e-5, 0.03, "cosine", 1)
    assert start["data"]["train"]["examples"] == 32
    assert "seed 3: math500" in capsys.readouterr().out


@pytest.mark.parametrize(("task", "exam", "method"), [("math", "gsm8k", "mlorc-lion"), ("code", "humaneval", "mlorc")])
def test_mlorc_runs_on_a_stand_in(
    base: Path, stand_ins: dict[str, str], tmp_path: Path, task: str, exam: str, method: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(
        mlorc, "TaskConfig", lambda *args, **options: TaskConfig(*args, **options | {"max_length": 400})
    )
    words = [*small(base, tmp_path), "--task", task, "--method", method]
    words += ["--data", stand_ins[task], "--test-data", stand_ins[exam]]
    if task == "code":
        assert mlorc.main(words) == 2  # said before anything is trained
        assert not any(tmp_path.iterdir())
    assert mlorc.main([*words, "--allow-code-execution"]) == 0
    folder = tmp_path / f"mlorc-{task}-{method}" / "seed-3"
    (row,) = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert row["task"] == exam and row["questions"] == 1
    config = json.loads((folder / "log.jsonl").read_text().splitlines()[0])["config"]
    assert (config["lr"], config["decay"], config["clip"]) == (mlorc.RATES[task, method], "linear", 0.0)


def test_a_plan_says_what_the_paper_does() -> None:
    said = plan(lora_pre.table_2("llama-2-7b", "lora"))
    assert (said["steps"], said["token_slots_at_most"]) == (3125, 100_000 * 512)
    linears = 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))  # both factors of seven layers, of rank 1
    assert said["bytes"]["gradients"] == 2 * 8 * linears  # bf16
    assert said["bytes"]["state"] == pytest.approx(8 * 8 * linears, rel=1e-3)  # two fp32 moments, and counters
    assert said["parameters"] == 6_738_415_616 + 8 * linears


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for main, words, said in (
        (lora_pre.main, ["--method", "lora-per"], "method: unknown 'lora-per'; known: lora-pre, lora"),
        (lora_pre.main, ["--model-name", "gpt"], "model_name: unknown 'gpt'; known: llama-2-7b"),
        (lora_pre.main, ["--test-data", "a"], "data: 1 sources for 2 tasks: gsm8k, math500"),
        (mlorc.main, ["--method", "galore"], "lr: the repository has no learning rate for galore on math; name one"),
    ):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line


def test_the_published_averages_agree() -> None:
    """The gains over LoRA that the abstract states, 3.14 and 6.17, are differences of these averages."""
    for model, gain in (("llama-3.1-8b", 3.14), ("llama-2-7b", 6.17)):
        ours, theirs = (
            sum(lora_pre.SCORES[model, name, task].value for task in ("gsm8k", "math500")) / 2
            for name in ("lora-pre", "lora")
        )
        assert ours - theirs == pytest.approx(gain, abs=0.011)  # averages are printed with two digits
