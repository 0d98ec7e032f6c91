"""Bad input is one line on stderr that names what is wrong, and exit code 2."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.cli import main
from gossamer.optim.contract import methods

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that has to fail; returns the line it says. With `after`, other lines may come before."""

    def run(*argv: str, after: bool = False) -> str:
        code = main([*argv])
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert code == 2, captured
        assert captured.out == ""
        assert after or len(lines) == 1, lines
        assert lines[-1].startswith("gossamer: ")
        return lines[-1]

    return run


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("pretran", "unknown command 'pretran' (did you mean 'pretrain'?)"),
        ("xyzzy", "known: pretrain, finetune, eval, bench, reproduce, sweep, report, memory, methods"),
        ("pretrain --method lora-per", "unknown 'lora-per' (did you mean 'lora-pre'?)"),
        ("memory --method=adamv", "unknown 'adamv' (did you mean 'adamw'?)"),
        ("pretrain --method", "method: no name given"),
        ("pretrain --stepz 3", "--stepz, 3 (did you mean --steps?)"),
        ("pretrain --method lora-pre --method.rnk 3", "--method.rnk, 3 (did you mean --method.rank?)"),
        ("memory --metod adamw", "(did you mean '--method'?)"),
        ("memory --method adamw --method.rank 3", "--method.rank"),
        ("methods --verbose", "--verbose"),
        ("pretrain here", "here"),
        ("pretrain --steps ten", "--steps: invalid literal for int() with base 10: 'ten'"),
        ("pretrain --steps 1.5", "--steps"),
        ("pretrain --lr fast", "--lr: could not convert string to float: 'fast'"),
        ("pretrain --method lora-pre --method.rank many", "--method.rank"),
        ("pretrain --dtype float16", "Expected one of ('float32', 'bfloat16')"),
        ("pretrain --trackers tensorbord", "Expected one of ('wandb', 'tensorboard')"),
        ("pretrain --method lora-pre --method.rank 0", "lora-pre: rank is 0; allowed: an integer >= 1"),
        ("pretrain --method lora-pre --method.rank -3", "lora-pre: rank is -3; allowed: an integer >= 1"),
        ("memory --method adamw --method.betas 0.9 1.5", "beta2 is 1.5; allowed: 0 <= beta2 < 1"),
        ("pretrain --steps 0", "steps: 0 is too small; allowed: an integer >= 1"),
        ("pretrain --batch-size -4", "batch_size: -4 is too small"),
        ("pretrain --micro-batch-size 0", "micro_batch_size: 0 is too small"),
        ("pretrain --clip-by previous", "clip_by: 'previous' without gradients that are released and clipped"),
        ("pretrain --clip-by both", "Expected one of ('two-pass', 'previous')"),
        ("pretrain --release-gradients --compile", "release_gradients: a compiled model hands over all gradients"),
        ("pretrain --keep-last 0", "keep_last: 0 is too small"),
        ("pretrain --save-every -1", "save_every: -1 is out of range"),
        ("pretrain --warmup 2", "warmup: 2.0"),
        ("pretrain --min-lr-ratio -0.5", "min_lr_ratio: -0.5"),
        ("pretrain --lr 0", "lr: 0.0 is out of range; allowed: finite numbers > 0"),
        ("pretrain --lr -1e-3", "lr: -0.001 is out of range; allowed: finite numbers > 0"),
        ("bench quick --methods lora-per", "'lora-per' has no preset for quick (did you mean 'lora-pre'?)"),
        ("bench quik", "'quik'"),
        ("bench --lrs 1e-3 0", "lrs: 0.0 is out of range"),
        ("bench --seeds", "at least one of each"),
        ("bench --steps 0", "steps: 0 is too small"),
        ("finetune", "model: none given; name a folder"),
        ("finetune --layers lora", "Unrecognized options: --layers"),
        ("finetune --epochs 0", "epochs: 0.0 is out of range; allowed: finite numbers > 0"),
        ("finetune --adapter.kind qlora", "Expected one of"),
        ("finetune --model no/such/folder", "'no/such/folder' is no folder"),
        ("eval --tasks gsm8k", "model: none given; name a folder"),
        ("eval --tasks humaneval", "--allow-code-execution permits it"),
        ("report", "directory"),
        ("report no-such-folder", "no-such-folder"),
        ("memory --model 90m", "model: '90m' is neither a size (did you mean '9m'?)"),
    ],
)
def test_one_line(fails: Fails, argv: str, said: str) -> None:
    assert said in fails(*argv.split())


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("--lr", "nan", "lr"),
        ("--lr", "inf", "lr"),
        ("--clip", "nan", "clip"),
        ("--weight-decay", "nan", "weight_decay"),
        ("--device", "gpu", "device: 'gpu'"),
        ("--device", "cuda:99", "device: 'cuda:99'"),
        ("--seed", str(2**64), "seed"),
        ("--data", "no/such.txt", "no such file: no/such.txt"),
        ("--valid", "no/such.txt", "no such file: no/such.txt"),
        ("--tokenizer", "no/such.json", "no such tokenizer: no/such.json"),
        ("--vocab-size", "256", "vocab_size 256 is too small"),
        ("--vocab-size", "310", "has room for 300"),
        ("--seq-len", "0", "seq_len is 0"),
        ("--seq-len", "65", "seq_len: 65 is longer than model"),
        ("--model", "no/such.json", "model: 'no/such.json' is neither a size"),
    ],
)
def test_values_that_only_a_run_can_judge(
    fails: Fails, small: list[str], tmp_path: Path, option: str, value: str, said: str
) -> None:
    """Judged before anything is written, too."""
    assert said in fails("pretrain", *small, "--out", str(tmp_path / "run"), option, value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_a_file_without_text(fails: Fails, small: list[str], tmp_path: Path, content: str) -> None:
    (tmp_path / "blank.txt").write_text(content)
    said = fails("pretrain", *small, "--out", str(tmp_path / "run"), "--data", str(tmp_path / "blank.txt"))
    assert "blank.txt holds no text" in said


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[1]",
        '{"hidden_size": 32}',
        '{"model_type": "no-such-model"}',
        '{"model_type": "t5"}',  # no causal language model
        '{"model_type": "llama", "hidden_size": 33, "num_attention_heads": 2}',
        '{"model_type": "llama", "hidden_size": "wide"}',
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "memory"])
def test_a_file_that_is_no_configuration(
    fails: Fails, small: list[str], tmp_path: Path, command: str, content: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    options = [*small, "--out", str(tmp_path / "run")] if command == "pretrain" else []
    said = fails(command, *options, "--model", str(path))
    assert f"model: {path} is not a model configuration" in said


@pytest.mark.parametrize("below", ["", "/run"])
def test_out_that_cannot_be_a_folder(fails: Fails, small: list[str], tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("precious")
    said = fails("pretrain", *small, "--out", f"{tmp_path}/file{below}", after=True)
    assert f"{tmp_path}/file" in said
    assert (tmp_path / "file").read_text() == "precious"


def test_report_of_an_empty_folder(fails: Fails, tmp_path: Path) -> None:
    assert str(tmp_path) in fails("report", str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def finished(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of lora-pre."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(["pretrain", *small, "--method", "lora-pre", "--method.rank", "4", "--out", str(out)]) == 0
    return out


def test_a_run_is_not_overwritten(fails: Fails, small: list[str], finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    said = fails("pretrain", *small, "--method", "lora-pre", "--method.rank", "4", "--out", str(finished))
    assert str(finished) in said and "--resume" in said and "--out" in said
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--method", "adamw"], "made by method 'lora-pre', this run asks for 'adamw'"),
        (["--method", "lora-pre", "--method.rank", "4", "--lr", "0.5"], "resume: lr was 0.001 in the checkpoint"),
        (["--method", "lora-pre", "--method.rank", "8"], "resume: method.rank was 4 in the checkpoint and is 8 now"),
        (["--method", "lora-pre", "--method.rank", "4", "--seq-len", "16"], "resume: data.seq_len was 32"),
        (["--method", "lora-pre", "--method.rank", "4", "--seed", "1"], "resume: seed was 0"),
        (["--method", "lora-pre", "--method.rank", "4", "--steps", "9"], "resume: steps was 4"),
    ],
)
def test_a_run_is_not_resumed_as_another(
    fails: Fails, small: list[str], finished: Path, changes: list[str], said: str
) -> None:
    log = (finished / "log.jsonl").read_bytes()
    assert said in fails("pretrain", *small, "--out", str(finished), *changes, "--resume", after=True)
    assert (finished / "log.jsonl").read_bytes() == log


def test_what_may_change_on_resume(small: list[str], finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "copy")
    changes = ["--method", "lora-pre", "--method.rank", "4", "--resume", "--keep-last", "5", "--save-every", "1"]
    assert main(["pretrain", *small, "--out", str(out), *changes]) == 0
    assert '"event": "resume", "step": 4' in (out / "log.jsonl").read_text()


def test_a_broken_line_of_a_log_is_named(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event": "start"\n' + json.dumps({"event": "end", "step": 1}) + "\n")
    assert "log.jsonl, line 1" in fails("report", str(tmp_path))


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_every_command(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert all(f"  {command} " in said for command in ("pretrain", "bench", "report", "memory", "methods"))


@pytest.mark.parametrize("command", ["pretrain", "memory"])
def test_help_of_a_method_lists_its_options(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--method", "lora-pre", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "--method.rank" in said and "--model" in said
    assert all(name in said for name in methods())
