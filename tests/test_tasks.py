"""Evaluation: a perfect answer scores one hundred per cent, programs are kept in, every sample is kept."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from gossamer.bench import Evaluate, evaluate_model
from gossamer.cli import main
from gossamer.data.records import read_records
from gossamer.errors import UserError
from gossamer.evaluate import generation, sandbox
from gossamer.evaluate.answers import Verifier, final_answer
from gossamer.evaluate.exams import EXAMS, Exam
from gossamer.evaluate.generation import generate
from gossamer.evaluate.labels import score_labels
from gossamer.evaluate.metrics import METRICS
from gossamer.evaluate.sandbox import BLOCKED, execute
from gossamer.models import load_model, load_tokenizer

RECORDS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [
        {"question": "What is 3 + 4?", "answer": "It is 3+4=<<3+4=7>>7.\n#### 7"},
        {"question": "What is 1000 + 234?", "answer": "That is\n#### 1,234"},
        {"question": "What is 1 - 6?", "answer": "#### -5"},
    ],
    "math500": [
        {"problem": "Half of one?", "solution": "It is $\\boxed{\\frac{1}{2}}$."},
        {"problem": "Where?", "solution": "At $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}$."},
        {"problem": "Who?", "solution": "It is $\\boxed{\\text{Evelyn}}$."},
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": 'import math\n\n\ndef root(x):\n    """The root."""\n',
            "canonical_solution": "    return math.sqrt(x)\n",
            "test": "def check(candidate):\n    assert candidate(9) == 3\n",
            "entry_point": "root",
        }
    ],
    "mbpp": [
        {
            "text": "Write a function that doubles.",
            "code": "def double(x):\r\n\treturn 2 * x",
            "task_id": 11,
            "test_setup_code": "",
            "test_list": ["assert double(2) == 4", "assert double(-1) == -2"],
        }
    ],
}
WRONG = {
    "gsm8k": "#### 8",
    "math500": "\\boxed{3}",
    "humaneval": "    return x\n",
    "mbpp": "def double(x):\n    return x",
}


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def samples(out: Path) -> list[dict[str, Any]]:
    (path,) = out.glob("*.samples.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- Exams ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMS)
@pytest.mark.parametrize("template", ["own", "alpaca"])
def test_gold_answers_are_right_and_wrong_ones_wrong(tmp_path: Path, name: str, template: Any) -> None:
    exam = EXAMS[name]()
    template = exam.template if template == "own" else template
    questions = exam.questions(read_records(write(tmp_path / "x.jsonl", RECORDS[name])), template)
    assert len(questions) == len(RECORDS[name])
    with Verifier() as verifier:
        for question in questions:
            assert exam.judge(question, question.gold, verifier).correct
            assert not exam.judge(question, WRONG[name], verifier).correct
            assert not exam.judge(question, "", verifier).correct


def humaneval(tmp_path: Path) -> tuple[Exam, Any]:
    exam = EXAMS["humaneval"]()
    (question,) = exam.questions(read_records(write(tmp_path / "x.jsonl", RECORDS["humaneval"])), "none")
    return exam, question


def test_a_whole_function_in_a_code_block_counts_too(tmp_path: Path) -> None:
    exam, question = humaneval(tmp_path)
    whole = "Here it is:\n```python\ndef root(x):\n    return math.sqrt(x)\n```\nIt takes the root."
    assert exam.judge(question, whole, None).correct


def test_a_program_that_ends_early_has_not_passed(tmp_path: Path) -> None:
    exam, question = humaneval(tmp_path)
    for leave in ("import sys; sys.exit(0)", "import os; os._exit(0)"):
        verdict = exam.judge(question, f"    return 3\n{leave}\n", None)
        assert not verdict.correct and verdict.detail["ended"] == "failed"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("We add.\n#### 72", "72"),
        ("First #### 1\nthen\n#### 1,234 apples\nThe answer is: 5", "1,234 apples"),
        ("So the answer is: 5. But no, the answer is 6.", "6"),
        ("The answer is: $x^2$.", "x^2"),
        ("$\\boxed{1}$ or rather \\boxed{\\frac{1}{\\sqrt{2}}} holds", "\\frac{1}{\\sqrt{2}}"),
        ("it costs $1,200.50 in all", "$1,200.50"),
        ("from 3 to -4 degrees", "-4"),
        ("no number at all", None),
        ("", None),
        ("#### ", None),
    ],
)
def test_the_final_answer_is_found(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_equal_answers_are_equal_however_they_are_written() -> None:
    with Verifier() as verifier:
        for gold, answer in (("1/2", "0.5"), ("\\frac{1}{2}", "\\dfrac12"), ("1,234", "1234"), ("x+y", "y + x")):
            assert verifier(gold, answer) == {"equal": True, "by": "math-verify"}, (gold, answer)
        assert verifier("\\text{a b}", "\\text{ab}") == {"equal": True, "by": "text"}
        assert verifier("2", "3") == {"equal": False, "why": "different"}
        assert verifier("2", None) == {"equal": False, "why": "no answer"}


def test_a_comparison_without_end_is_ended() -> None:
    with Verifier() as verifier:
        assert verifier("1", "1.0")["equal"]  # so that the worker has its imports behind it
        worker, verifier.seconds = verifier._worker, 0.5
        # a billion digits, which sympy works out
        assert verifier("1", "9^{9^{9}} - 9^{9^{9}} + 2") == {"equal": False, "why": "timeout after 0.5 s"}
        assert worker is not None and worker.returncode is not None
        verifier.seconds = 10
        assert verifier("1", "1.0")["equal"]


# --- Programs of strangers --------------------------------------------------------------------------------------------


@pytest.fixture(params=["as the system allows", BLOCKED])
def kept_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == BLOCKED:
        monkeypatch.setattr(sandbox, "isolation", lambda: BLOCKED)
    return request.param


def test_programs_pass_or_fail(kept_in: str) -> None:
    assert execute("x = 1\nassert x == 1").passed
    failed = execute("print('so far')\nassert 1 == 2, 'no'")
    assert (failed.passed, failed.reason) == (False, "failed")
    assert "so far" in failed.output and "AssertionError: no" in failed.output
    assert not execute("def f(:").passed
    assert execute("if __name__ != '__main__': raise SystemExit(1)").passed


def test_programs_have_no_network(kept_in: str) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"
        assert execute("pass").passed and not execute(program).passed


def test_programs_have_little_time_memory_and_disk(kept_in: str) -> None:
    assert execute("while True: pass", seconds=1).reason in ("timeout", "SIGXCPU", "SIGKILL")
    assert execute("import time; time.sleep(60)", seconds=1).reason == "timeout"
    greedy = execute("x = bytearray(2**30)", memory=2**29)
    assert not greedy.passed and "MemoryError" in greedy.output
    assert not execute("open('big', 'wb').write(bytes(2**20))", file_size=2**16).passed


def test_programs_live_in_an_empty_folder_that_goes_with_them(kept_in: str, tmp_path: Path) -> None:
    said = execute(
        "import os\nopen('mine', 'w').write('x')\nprint(os.getcwd(), sorted(os.listdir()), dict(os.environ))"
    )
    folder, _, rest = said.output.strip().partition(" ")
    assert said.passed and not Path(folder).exists()
    assert rest.startswith("['mine', 'output', 'program.py']") and "GOSSAMER_CACHE" not in rest


# --- Metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_what_others_compute(seed: int) -> None:
    draw = np.random.default_rng(seed)
    x, y = draw.integers(0, 2, 50).astype(float), draw.integers(0, 2, 50).astype(float)
    a, b = draw.integers(0, 9, 50) / 3, draw.normal(size=50)  # ties on one side
    theirs = {
        "accuracy": (x, y, sklearn.metrics.accuracy_score(y, x)),
        "f1": (x, y, sklearn.metrics.f1_score(y, x)),
        "matthews": (x, y, sklearn.metrics.matthews_corrcoef(y, x)),
        "pearson": (a, b, scipy.stats.pearsonr(a, b)[0]),
        "spearman": (a, b, scipy.stats.spearmanr(a, b)[0]),
    }
    assert theirs.keys() == METRICS.keys()
    for name, (predicted, labels, value) in theirs.items():
        assert METRICS[name](predicted, labels) == pytest.approx(value, abs=1e-12), name  # fp64 sums of 50


def test_metrics_of_nothing_but_one_class() -> None:
    ones, zeros = np.ones(4), np.zeros(4)
    assert METRICS["f1"](zeros, zeros) == METRICS["matthews"](ones, ones) == METRICS["spearman"](ones, ones) == 0
    assert METRICS["accuracy"](ones, ones) == 1


def test_the_score_is_the_mean_of_the_metrics() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0]], dtype=torch.float64)
    score = score_labels(logits, np.array([0, 1, 0]), ("accuracy", "f1"))
    assert score.metrics == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}
    assert score.numbers()["score"] == pytest.approx(2 / 3) and score.tokens == 3


# --- Generation -------------------------------------------------------------------------------------------------------


def test_a_batch_says_what_each_would_alone(base: Path) -> None:
    model: Any = load_model(base, dtype=torch.float64, device=torch.device("cpu"))
    tokenizer: Any = load_tokenizer(base)
    prompts = tokenizer(["the river", "a", "seven green lamps under the old hill", "stone"])["input_ids"]
    together = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=3)
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert together == alone and all(it.tokens <= 8 for it in together)
    ids = torch.tensor([prompts[0]])
    for _ in range(8):  # the plainest greedy decoding there is
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert together[0].text == tokenizer.decode(ids[0, len(prompts[0]) :])


def test_what_is_said_keeps_its_first_space(base: Path) -> None:
    """A decoder of the SentencePiece kind strips one space from the front of whatever it is given: of the prompt."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "</s>", "▁def", "▁f():", "<0x0A>", "▁▁▁", "▁return", "▁x"]
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)  # pyright: ignore
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    found = generation._read([2, 3, 4], [5, 6, 7, 1], tokenizer, {1}, ())
    assert (found.text, found.ended) == ("    return x", "eos")


def test_generation_stops_where_it_is_told(base: Path) -> None:
    model: Any = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer: Any = load_tokenizer(base)
    prompt = tokenizer(["the river"])["input_ids"]
    (free,) = generate(model, tokenizer, prompt, max_new_tokens=12)
    word = free.text[4:7]
    (cut,) = generate(model, tokenizer, prompt, max_new_tokens=12, stop=(word,))
    assert cut.text == free.text[: free.text.index(word)] and cut.ended == word and cut.tokens < free.tokens
    (long,) = generate(model, tokenizer, [prompt[0] * 300], max_new_tokens=12)
    assert (long.text, long.ended) == ("", "prompt too long")


# --- gossamer eval ----------------------------------------------------------------------------------------------------


def test_every_sample_is_kept_with_the_score(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "gsm.jsonl", RECORDS["gsm8k"])
    words = ["eval", "--model", str(base), "--tasks", "gsm8k", "--data", data, "--out", str(tmp_path / "out")]
    assert main([*words, "--max-new-tokens", "5", "--limit", "2", "--device", "cpu"]) == 0
    assert "gsm8k: accuracy 0.0000" in capsys.readouterr().out
    (row,) = (json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert (row["questions"], row["correct"], row["settings"]["max_new_tokens"]) == (2, 0, 5)
    assert len(row["model_digest"]) == 32 and row["versions"]["torch"] == torch.__version__
    kept = samples(tmp_path / "out")
    assert [sample["gold"] for sample in kept] == ["7", "1,234"]
    assert all("### Instruction:\nWhat is" in sample["prompt"] and not sample["correct"] for sample in kept)


def test_several_tasks_each_with_its_data(base: Path, tmp_path: Path) -> None:
    names = ("gsm8k", "math500")
    data = tuple(write(tmp_path / f"{name}.jsonl", RECORDS[name]) for name in names)
    rows = evaluate_model(Evaluate(str(base), names, data, tmp_path, max_new_tokens=2, device="cpu"), quiet=True)
    assert [(row["task"], row["data"]["source"]) for row in rows] == list(zip(names, data, strict=True))
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == json.loads(
        json.dumps(rows)
    )


def test_the_digest_changes_with_any_weight(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "text.jsonl", [{"text": "the river carried a lantern"}])
    model: Any = load_model(base, dtype=torch.float32, device=torch.device("cpu"))
    model.lm_head.weight.data[0, 0] += 1
    load_tokenizer(base).save_pretrained(tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    options: dict[str, Any] = {"tasks": ("perplexity",), "data": (data,), "device": "cpu"}
    rows = [
        row
        for folder in (base, base, tmp_path / "other")
        for row in evaluate_model(Evaluate(model=str(folder), out=tmp_path / "out", **options), quiet=True)
    ]
    one, again, other = (row["model_digest"] for row in rows)
    assert one == again != other
    assert rows[0]["scores"]["perplexity"] == pytest.approx(300, rel=0.2)  # random weights: about the vocabulary
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 3


def test_code_runs_only_where_it_is_allowed(base: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "he.jsonl", RECORDS["humaneval"])
    options: dict[str, Any] = {"model": str(base), "tasks": ("humaneval",), "data": (data,), "out": tmp_path / "out"}
    with pytest.raises(UserError, match="--allow-code-execution"):
        evaluate_model(Evaluate(**options), quiet=True)
    (row,) = evaluate_model(Evaluate(**options, max_new_tokens=4, allow_code_execution=True, device="cpu"), quiet=True)
    assert row["scores"] == {"pass@1": 0} and row["isolation"] == sandbox.isolation()
    (sample,) = samples(tmp_path / "out")
    assert sample["output"] in sample["program"] and sample["ended"] != "passed"


def test_tasks_of_lm_eval_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write(tmp_path / "parity.jsonl", [{"question": str(i), "label": i % 2} for i in range(4)])
    (tmp_path / "parity.yaml").write_text(
        f"task: own_parity\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "Question: {{question}} Answer:"\ndoc_to_target: "{{label}}"\n'
        'doc_to_choice: ["even", "odd"]\nmetric_list:\n  - metric: acc\nmetadata:\n  version: 1.0\n'
    )
    options: dict[str, Any] = {"model": str(base), "tasks_folder": tmp_path, "out": tmp_path / "out", "device": "cpu"}
    (row,) = evaluate_model(Evaluate(tasks=("lm-eval:own_parity",), **options), quiet=True)
    kept = samples(tmp_path / "out")
    right = sum(sample["acc"] for sample in kept)
    assert len(kept) == 4 and row["scores"] == {"own_parity/acc,none": right / 4}
    with pytest.raises(UserError, match="lm-eval knows no 'own_party'"):
        evaluate_model(Evaluate(tasks=("lm-eval:own_party",), **options), quiet=True)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--tasks gsm9k", "tasks: unknown 'gsm9k' (did you mean 'gsm8k'?)"),
        ("--tasks glue/rtee", "unknown glue/rtee (did you mean 'rte'?)"),
        ("--tasks perplexity", "data: perplexity of what?"),
        ("--tasks gsm8k --data nowhere.jsonl", "no such file: nowhere.jsonl"),
        ("--tasks gsm8k math500 --data {gsm}", "data: 1 sources for 2 tasks: gsm8k, math500"),
        ("--tasks gsm8k --limit 0", "limit: 0 is too small"),
        ("--tasks gsm8k --data {gsm} --template chat", "has no chat template"),
        ("--tasks glue/sst2 --data {colours}", "has no classification head"),
        ("--tasks math500 --data {gsm}", "no field 'problem'"),
        ("--tasks mbpp --data {human} --allow-code-execution", "no problem of MBPP, whose task_id is a number"),
        ("--tasks perplexity --data {gsm} --seq-len 4096", "seq_len: 4096 is longer than model"),
    ],
)
def test_bad_input_is_one_line(
    base: Path, colours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: str, said: str
) -> None:
    gsm = write(tmp_path / "gsm.jsonl", [{"text": "x", "solution": "#### 1"}])
    if "chat" in argv:
        gsm = write(tmp_path / "gsm.jsonl", RECORDS["gsm8k"])
    human = write(tmp_path / "human.jsonl", RECORDS["humaneval"])
    words = argv.format(gsm=gsm, colours=colours, human=human).split()
    assert main(["eval", "--model", str(base), "--out", str(tmp_path / "out"), "--device", "cpu", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
