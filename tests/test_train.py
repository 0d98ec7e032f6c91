"""Training: a run that dies continues to the same bits, damage is noticed, and splitting the work changes nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from gossamer.data import DataConfig, open_corpus
from gossamer.distributed import World, storage
from gossamer.errors import UserError
from gossamer.models import build_model, resolve_config
from gossamer.optim.contract import build
from gossamer.train import Pretrain, jsonl, pretrain
from gossamer.train.checkpoint import MANIFEST, Checkpoints
from gossamer.train.log import RunLog

Event = dict[str, Any]
LOSS = "gossamer.train.pretraining.token_loss"
CHILD = Path(__file__).parent / "cli" / "child.py"

# Its children begin with everything imported, so that one that has to die costs no five seconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["gossamer.cli", "transformers.models.llama.modeling_llama", "tokenizers"])


def make(tiny: Path, out: Path, method: str = "adamw", data: str = "train.txt", **changes: Any) -> Pretrain[Any]:
    hyperparameters = {"rank": 4} if method == "lora-pre" else {}
    packing = changes.pop("packing", True)
    defaults = {"model": str(tiny / "config.json"), "device": "cpu", "batch_size": 4, "steps": 6, "eval_tokens": 100}
    text = DataConfig(str(tiny / data), str(tiny / "valid.txt"), vocab_size=300, seq_len=32, packing=packing)
    return Pretrain(build(method, **hyperparameters), data=text, out=out, **(defaults | changes))


def events(out: Path, *kinds: str) -> list[Event]:
    """The log's events, of these kinds only if any are named; strict JSON, without the clock."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (out / "log.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in lines
        if not kinds or line["event"] in kinds
    ]


def losses(out: Path) -> list[float]:
    return [event["loss"] for event in events(out, "train")]


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def assert_same_end(one: Path, other: Path, step: str) -> None:
    """The last checkpoints hold the same bits and the logs the same numbers."""
    a, b = one / "checkpoints" / step, other / "checkpoints" / step
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    groups, others = (json.loads((path / "training.json").read_text())["groups"] for path in (a, b))
    assert groups == others
    assert events(one, "train", "eval") == events(other, "train", "eval")


# --- Children that may die --------------------------------------------------------------------------------------------


def start_child(
    argv: list[str],
    errors: Path,
    environment: dict[str, str] | None = None,
    largest_file: int | None = None,
    die_at_sync: int | None = None,
) -> BaseProcess:
    """The command line in a process of its own, which says its output in `errors`.

    `largest_file` is a disk that is full: no file can grow beyond it. `die_at_sync` kills in a save, at that sync.
    """
    shared = {name: os.environ[name] for name in ("GOSSAMER_CACHE", "OMP_NUM_THREADS")} | (environment or {})
    options = {"argv": argv, "environment": shared, "errors": str(errors)}
    options |= {"largest_file": largest_file, "die_at_sync": die_at_sync}
    child = processes.Process(target=runpy.run_path, args=(str(CHILD), {"options": options}))
    with pytest.MonkeyPatch.context() as patch:  # else the child looks for pytest's own main program first
        patch.setitem(sys.modules, "__main__", types.ModuleType("__main__"))
        child.start()
    return child


def finish(child: BaseProcess) -> int:
    child.join(60)
    if child.exitcode is None:
        child.kill()
        raise AssertionError("the child hangs")
    return child.exitcode


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


# --- Death and resumption ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora-pre", "adamw"])
def test_a_killed_run_ends_with_the_same_bits(
    tiny: Path, small: list[str], tmp_path: Path, method: str, dtype: str
) -> None:
    whole, broken, errors = tmp_path / "whole", tmp_path / "broken", tmp_path / "errors"
    steps = 24
    changes = {"steps": steps, "dtype": dtype, "save_every": 5, "eval_every": 6}
    pretrain(make(tiny, whole, method, **changes), quiet=True)
    config = make(tiny, broken, method, resume=True, **changes)
    argv = ["pretrain", *small, "--valid", str(tiny / "valid.txt"), "--method", method, "--steps", str(steps)]
    argv += ["--dtype", dtype, "--save-every", "5", "--eval-every", "6", "--out", str(broken), "--resume"]
    argv += ["--method.rank", "4"] * (method == "lora-pre")

    seed = sum(map(ord, method + dtype))
    draw = random.Random(seed)
    # first inside one of the first two saves of ten syncs each (the last comes after the publishing rename) ...
    sync = draw.randint(1, 20)
    code = finish(start_child(argv, errors, die_at_sync=sync))
    print(f"seed {seed}: killed at sync {sync}")
    assert code == -signal.SIGKILL, errors.read_text()
    # ... then anywhere
    child, target, delay = start_child(argv, errors), draw.randint(6, 14), draw.uniform(0, 0.01)
    log = broken / "log.jsonl"
    patience = time.monotonic() + 60
    while child.is_alive() and time.monotonic() < patience:
        if f'"train", "step": {target},' in log.read_text():
            break
        time.sleep(0.001)
    time.sleep(delay)
    child.kill()
    print(f"then {1000 * delay:.1f} ms after step {target}")
    assert finish(child) == -signal.SIGKILL, errors.read_text()
    assert len(losses(broken)) < steps, "the run was over before it was killed"

    pretrain(config, quiet=True)
    assert_same_end(whole, broken, f"step-{steps:08d}")
    assert [event["step"] for event in events(broken, "train")] == list(range(1, steps + 1))
    assert [event["step"] for event in events(broken, "eval")] == [6, 12, 18, 24]
    assert len(events(broken, "start")) == len(events(broken, "end")) == 1
    assert not list(broken.rglob(".draft*"))


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints at steps 2, 4 and 6. Copy it before changing it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    pretrain(make(tiny, out, save_every=2, eval_every=3, keep_last=3), quiet=True)
    assert checkpoints(out) == ["step-00000002", "step-00000004", "step-00000006"]
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def again(tiny: Path, out: Path, **changes: Any) -> Pretrain[Any]:
    """The configuration of `finished`, resumed."""
    return make(tiny, out, **({"save_every": 2, "eval_every": 3, "keep_last": 3, "resume": True} | changes))


def test_resuming_a_finished_run_logs_nothing_twice(tiny: Path, finished: Path, copied: Path) -> None:
    result = pretrain(again(tiny, copied), quiet=True)
    assert_same_end(finished, copied, "step-00000006")
    assert len(events(copied, "end")) == 1
    assert result.score.loss == events(finished, "end")[0]["loss"]


@pytest.mark.parametrize("torn", ['{"event": "train", "st', ""])
def test_a_torn_last_line_of_the_log_is_mended(tiny: Path, finished: Path, copied: Path, torn: str) -> None:
    """Torn within an event after the last checkpoint, or between that checkpoint's event and its newline."""
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    path = copied / "log.jsonl"
    lines = path.read_text().splitlines()
    kept = next(i for i, line in enumerate(lines) if '"checkpoint", "step": 4' in line) + 1
    path.write_text("\n".join([*lines[:kept], torn] if torn else lines[:kept]))
    pretrain(again(tiny, copied), quiet=True)
    assert_same_end(finished, copied, "step-00000006")


def test_a_resumed_run_holds_one_state(tiny: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read from the checkpoint is what is stepped on: no copy of it."""
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    read: list[Tensor] = []
    load, restore = storage.load, Checkpoints.restore

    def remember(path: Path, tensors: dict[str, Tensor]) -> None:
        read.extend(tensors.values())
        load(path, tensors)

    def compare(self: Checkpoints, path: Path, parts: Any, training: dict[str, Any]) -> None:
        restore(self, path, parts, training)
        state = [tensor for held in parts.optimizer.state.values() for tensor in held.values()]
        assert state and {id(tensor) for tensor in state} <= {id(tensor) for tensor in read}
        read.clear()

    monkeypatch.setattr(storage, "load", remember)
    monkeypatch.setattr(Checkpoints, "restore", compare)
    pretrain(again(tiny, copied), quiet=True)
    assert not read


def test_resume_with_nothing_to_resume_starts_afresh(tiny: Path, finished: Path, tmp_path: Path) -> None:
    pretrain(again(tiny, tmp_path / "new"), quiet=True)
    assert_same_end(finished, tmp_path / "new", "step-00000006")


@pytest.fixture
def dropout(tiny: Path, tmp_path: Path) -> str:
    """A model whose forward pass draws from torch's global generator."""
    config = json.loads((tiny / "config.json").read_text()) | {"attention_dropout": 0.5}
    (tmp_path / "dropout.json").write_text(json.dumps(config))
    return str(tmp_path / "dropout.json")


def test_resumption_continues_the_random_numbers_of_dropout(tiny: Path, tmp_path: Path, dropout: str) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    pretrain(make(tiny, out, model=dropout, save_every=3), quiet=True)
    shutil.copytree(out, whole)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    torch.manual_seed(123)
    pretrain(make(tiny, out, model=dropout, save_every=3, resume=True), quiet=True)
    assert_same_end(whole, out, "step-00000006")


def test_dropout_depends_on_the_seed_alone(tiny: Path, tmp_path: Path, dropout: str) -> None:
    for out, ambient in (("one", 1), ("two", 2)):
        torch.manual_seed(ambient)
        pretrain(make(tiny, tmp_path / out, model=dropout, steps=3), quiet=True)
    assert losses(tmp_path / "one") == losses(tmp_path / "two")


def truncate(checkpoint: Path) -> str:
    os.truncate(checkpoint / "model.safetensors", 1000)
    return "model.safetensors"


def flip(checkpoint: Path) -> str:
    path = checkpoint / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "optimizer.safetensors"


def lose_manifest(checkpoint: Path) -> str:
    (checkpoint / MANIFEST).unlink()
    return MANIFEST


def empty_manifest(checkpoint: Path) -> str:
    (checkpoint / MANIFEST).write_text("{}")
    return "config.json"


def truncate_manifest(checkpoint: Path) -> str:
    os.truncate(checkpoint / MANIFEST, 20)
    return MANIFEST


def lose_state(checkpoint: Path) -> str:
    (checkpoint / "training.json").unlink()
    return "training.json"


@pytest.mark.parametrize("damage", [truncate, flip, lose_manifest, empty_manifest, truncate_manifest, lose_state])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    tiny: Path, finished: Path, copied: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], str]
) -> None:
    newest = copied / "checkpoints" / "step-00000006"
    culprit = damage(newest)
    pretrain(again(tiny, copied))
    said = next(line for line in capsys.readouterr().err.splitlines() if "is damaged" in line)
    assert str(newest) in said and culprit in said
    assert events(copied, "resume")[0]["step"] == 4
    assert_same_end(finished, copied, "step-00000006")
    assert checkpoints(copied) == ["step-00000002", "step-00000004", "step-00000006"]


def test_all_checkpoints_damaged(tiny: Path, copied: Path) -> None:
    for checkpoint in (copied / "checkpoints").iterdir():
        truncate(checkpoint)
    before = (copied / "log.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"all 3 checkpoints in .* are damaged"):
        pretrain(again(tiny, copied), quiet=True)
    assert (copied / "log.jsonl").read_bytes() == before


def test_the_files_of_a_checkpoint_follow_the_umask(finished: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for path in (finished / "checkpoints" / "step-00000006").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path.name


def test_old_checkpoints_go(tiny: Path, tmp_path: Path) -> None:
    pretrain(make(tiny, tmp_path, save_every=1, keep_last=2), quiet=True)
    assert checkpoints(tmp_path) == ["step-00000005", "step-00000006"]


def test_a_damaged_checkpoint_is_not_kept_instead_of_a_sound_one(
    tiny: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed at step 4 because 6 is damaged, saved at 5, stopped at 6: step 5 is there to resume from."""
    truncate(copied / "checkpoints" / "step-00000006")
    monkeypatch.setattr(LOSS, nan_at(2))
    config = again(tiny, copied, save_every=1, keep_last=1)
    with pytest.raises(UserError, match="step 6"):
        pretrain(config, quiet=True)
    monkeypatch.undo()
    assert "step-00000005" in checkpoints(copied)
    pretrain(config, quiet=True)
    assert events(copied, "resume")[-1]["step"] == 5


def test_changed_data_is_not_resumed_on(tiny: Path, copied: Path, tmp_path: Path) -> None:
    # the same path with other content: the run is made anew where the data may change
    moved = Path(shutil.copytree(tiny, tmp_path / "data"))
    out = tmp_path / "other"
    pretrain(make(moved, out, steps=2), quiet=True)
    with (moved / "train.txt").open("a") as file:
        file.write(" One sentence more.")
    with pytest.raises(UserError, match=r"train\.txt has changed"):
        pretrain(make(moved, out, steps=2, resume=True), quiet=True)
    assert events(out)[-1]["event"] == "end"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_a_checkpoint(tiny: Path, tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = make(tiny, tmp_path, steps=2, dtype=dtype)
    pretrain(config, quiet=True)
    folder = tmp_path / "checkpoints" / "step-00000002"
    ours = build_model(resolve_config(config.model), dtype=getattr(torch, dtype), device="cpu", seed=1).eval()
    safetensors.torch.load_model(ours, folder / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.dtype == ours.dtype
    ends = open_corpus(config.data).tokenizer.eos_id
    for part in (theirs.config, theirs.generation_config):
        assert (part.eos_token_id, part.bos_token_id) == (ends, None)
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=ids).logits, ours(input_ids=ids).logits)

    text = "Seven green lamps <|endoftext|> wait."
    tokenizer = open_corpus(config.data).tokenizer
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded(text, split_special_tokens=True)["input_ids"] == tokenizer.encode_batch([text])[0]
    assert loaded.eos_token_id == tokenizer.eos_id


# --- What goes wrong --------------------------------------------------------------------------------------------------


def nan_at(step: int) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """A `token_loss` whose `step`-th call is not a number."""
    from gossamer.evaluate import token_loss

    calls = iter(range(1, 1000))

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        value = token_loss(model, inputs, targets)
        return value * math.nan if next(calls) == step else value

    return loss


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOSS, nan_at(5))
    config = again(tiny, tmp_path, resume=False)
    with pytest.raises(UserError, match=r"^step 5: the loss is nan.*step-00000004$"):
        pretrain(config, quiet=True)
    assert checkpoints(tmp_path) == ["step-00000002", "step-00000004"]
    assert [event["step"] for event in events(tmp_path, "train")] == [1, 2, 3, 4]
    monkeypatch.undo()
    pretrain(again(tiny, tmp_path), quiet=True)  # and the checkpoint is as good as ever
    assert_same_end(finished, tmp_path, "step-00000006")


@pytest.mark.parametrize("method", ["adamw", "lora-pre"])
def test_a_divergent_run_stops_with_its_step(tiny: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(UserError, match=r"^step \d+: ") as caught:
        pretrain(make(tiny, tmp_path, method, lr=1e30, clip=0.0, save_every=1), quiet=True)
    step = int(str(caught.value).split()[1].rstrip(":"))
    assert all(event["step"] <= step for event in events(tmp_path))
    for checkpoint in (tmp_path / "checkpoints").glob("*"):
        weights = safetensors.torch.load_file(checkpoint / "model.safetensors")
        assert all(bool(weight.isfinite().all()) for weight in weights.values())


def test_a_disk_that_fills_up_while_saving(
    tiny: Path, small: list[str], finished: Path, copied: Path, tmp_path: Path
) -> None:
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    sizes = {path.name: path.stat().st_size for path in copied.rglob("*") if path.is_file()}
    limit = sizes["model.safetensors"] - 4096
    assert 4 * sizes["log.jsonl"] < limit, "the log should have room"
    argv = ["pretrain", *small, "--valid", str(tiny / "valid.txt"), "--method", "adamw", "--steps", "6", "--resume"]
    argv += ["--save-every", "2", "--eval-every", "3", "--keep-last", "3", "--out", str(copied)]
    code = finish(start_child(argv, tmp_path / "errors", largest_file=limit))
    said = (tmp_path / "errors").read_text().splitlines()
    assert code == 2, said
    assert [line for line in said if line.startswith("gossamer: ")] == said[-1:]
    assert "cannot save step 6" in said[-1] and "step-00000004" in said[-1]
    assert checkpoints(copied) == ["step-00000002", "step-00000004"]  # no draft either
    pretrain(again(tiny, copied), quiet=True)  # once there is room
    assert_same_end(finished, copied, "step-00000006")


@pytest.mark.parametrize("full", ["log", "cache"])
def test_a_disk_that_is_full_elsewhere(tiny: Path, small: list[str], tmp_path: Path, full: str) -> None:
    corpus = open_corpus(make(tiny, tmp_path).data)  # in the cache from here on
    assert corpus.train.num_rows > 0
    environment = {} if full == "log" else {"GOSSAMER_CACHE": str(tmp_path / "cache")}
    argv = ["pretrain", *small, "--valid", str(tiny / "valid.txt"), "--out", str(tmp_path / "run")]
    code = finish(start_child(argv, tmp_path / "errors", environment, largest_file=1000))
    said = (tmp_path / "errors").read_text().splitlines()
    assert code == 2, said
    assert "Traceback" not in "".join(said)
    assert said[-1].startswith("gossamer: ")


# --- Splitting the work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_change_rounding_only(tiny: Path, tmp_path: Path, packing: bool) -> None:
    """Also where rows differ in their number of tokens, as they do unpacked: every token of the batch weighs the same.

    The same sums in another order differ by a few units of fp32's 6e-8, which Adam's division amplifies where a
    gradient is tiny; 1e-5 leaves room for that, while weighing micro-batches instead of tokens errs by 2e-4.
    """
    curves = {}
    for micro in (None, 3, 1):
        out = tmp_path / str(micro)
        data = "train.txt" if packing else "documents.jsonl"
        pretrain(make(tiny, out, data=data, packing=packing, batch_size=8, micro_batch_size=micro), quiet=True)
        curves[micro] = losses(out) + [event["loss"] for event in events(out, "eval")]
    assert len(curves[None]) == 7
    assert curves[3] == pytest.approx(curves[None], rel=1e-5)
    assert curves[1] == pytest.approx(curves[None], rel=1e-5)
    assert curves[1] != curves[None], "no different order of summation: was the batch split at all?"


def test_torchrun_trains_as_one_process(tiny: Path, small: list[str], tmp_path: Path) -> None:
    """Unpacked, so that the two processes see different numbers of tokens. Tolerance: as for micro-batches."""
    one, two = tmp_path / "one", tmp_path / "two"
    changes = {"data": "documents.jsonl", "packing": False, "eval_every": 3, "eval_tokens": 400, "save_every": 3}
    pretrain(make(tiny, one, "lora-pre", **changes), quiet=True)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    torchrun += ["--master-port", free_port(), "--no-python", str(Path(sys.executable).with_name("gossamer"))]
    argv = ["pretrain", *small, "--data", str(tiny / "documents.jsonl"), "--valid", str(tiny / "valid.txt")]
    argv += ["--no-packing", "--method", "lora-pre", "--method.rank", "4", "--steps", "6", "--eval-every", "3"]
    argv += ["--eval-tokens", "400", "--save-every", "3", "--micro-batch-size", "1", "--out", str(two)]
    done = subprocess.run([sys.executable, *torchrun, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    ours, theirs = events(one, "eval"), events(two, "eval")
    for name in ("loss", "legacy_perplexity", "tokens"):
        assert [event[name] for event in theirs] == pytest.approx([event[name] for event in ours], rel=1e-5)
    assert [event["step"] for event in events(two, "train")] == [1, 2, 3, 4, 5, 6]
    assert len(events(two, "start")) == 1
    assert len(list(two.rglob("log.jsonl"))) == 1
    assert done.stderr.count("validation perplexity") == 2, "both processes speak"
    assert checkpoints(two) == ["step-00000003", "step-00000006"]


def test_rows_are_split_over_processes_evenly_or_not_at_all(small: list[str], tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    parts = [World(rank, 3, cpu).share(12) for rank in range(3)]
    assert [row for part in parts for row in range(12)[part]] == list(range(12))
    children = []
    port = free_port()
    for rank in ("0", "1"):
        environment = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        argv = ["pretrain", *small, "--batch-size", "3", "--out", str(tmp_path / "run")]
        children.append(start_child(argv, tmp_path / rank, environment))
    assert [finish(child) for child in children] == [2, 2]
    for rank in ("0", "1"):
        assert "gossamer: batch_size: 3 rows cannot be split evenly over 2 processes" in (tmp_path / rank).read_text()


# --- What a run says --------------------------------------------------------------------------------------------------


def test_the_log_says_what_ran(tiny: Path, finished: Path) -> None:
    start, *rest = events(finished)
    assert start["event"] == "start" and start["method"] == "adamw" and start["label"] == "run"
    assert start["config"]["lr"] == 1e-3 and start["config"]["method"]["name"] == "adamw"
    assert start["config"]["data"]["data"] == str(tiny / "train.txt")
    assert start["versions"]["torch"] == torch.__version__ and "transformers" in start["versions"]
    assert start["hardware"].keys() == {"cpu", "cores", "threads", "memory_gib", "accelerator"}
    weights = safetensors.torch.load_file(finished / "checkpoints" / "step-00000006" / "model.safetensors").values()
    parameters = sum(weight.numel() for weight in weights)
    assert start["parameters"] == parameters
    tensors = len(start["plan"])
    counted = {"weights": 4 * parameters, "gradients": 4 * parameters, "state": 8 * parameters + 12 * tensors}
    assert counted.items() <= start["memory"].items()
    saved = safetensors.torch.load_file(finished / "checkpoints" / "step-00000006" / "optimizer.safetensors")
    held = sum(tensor.nbytes for tensor in saved.values())
    assert start["memory"]["state"] == held
    kinds = ["train", "train", "checkpoint", "train", "eval", "train", "checkpoint", "train", "train", "eval"]
    assert [event["event"] for event in rest] == [*kinds, "checkpoint", "end"]
    assert rest[-1]["train_tokens"] == 6 * 4 * 32
    assert rest[-1]["perplexity"] == pytest.approx(math.exp(rest[-1]["loss"]))


def test_the_log_has_no_number_that_is_not_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path, resume_step=None)
    log.write("eval", step=1, loss=math.inf, nested={"a": [math.nan, -math.inf, 1.5]})
    log.close()
    assert events(tmp_path) == [{"event": "eval", "step": 1, "loss": None, "nested": {"a": [None, None, 1.5]}}]


@pytest.mark.parametrize(
    ("content", "read", "mended"),
    [
        ('{"a": 1}\n{"a": 2}\n', [1, 2], '{"a": 1}\n{"a": 2}\n'),
        ('{"a": 1}\n{"a": ', [1], '{"a": 1}\n'),
        ('{"a": 1}\n{"a": 2}', [1, 2], '{"a": 1}\n{"a": 2}\n'),
        ("{", [], ""),
        ("", [], ""),
    ],
)
def test_torn_lines(tmp_path: Path, content: str, read: list[int], mended: str) -> None:
    path = tmp_path / "lines.jsonl"
    jsonl.mend(path)
    assert not path.exists()
    path.write_text(content)
    assert [value["a"] for _, value in jsonl.read(path)] == read
    jsonl.mend(path)
    assert path.read_text() == mended
    assert [value["a"] for _, value in jsonl.read(path)] == read


@pytest.mark.parametrize("broken", ["{", "3"])
def test_a_line_that_is_broken_but_not_last_is_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"event": "start"}}\n{broken}\n')
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"log\.jsonl, line 2: not a JSON object"):
        RunLog(tmp_path, resume_step=5)
    assert path.read_bytes() == before


def test_trackers_get_the_numbers(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            assert Path(folder).is_relative_to(tmp_path)

        def add_text(self, name: str, text: str) -> None:
            assert json.loads(text)["steps"] == 2

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            pass

    module = types.ModuleType("torch.utils.tensorboard.writer")
    vars(module)["SummaryWriter"] = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.ModuleType("torch.utils.tensorboard"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    pretrain(make(tiny, tmp_path, steps=2, trackers=("tensorboard",)), quiet=True)
    for event in events(tmp_path, "train"):
        assert ("train/loss", event["loss"], event["step"]) in written
    assert ("eval/perplexity", events(tmp_path, "eval")[0]["perplexity"], 2) in written


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_writes_its_file(tiny: Path, tmp_path: Path) -> None:
    pretrain(make(tiny, tmp_path, steps=1, trackers=("tensorboard",)), quiet=True)
    files = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files) == 1 and files[0].stat().st_size > 100


@pytest.mark.parametrize(("tracker", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard.writer")])
def test_a_tracker_that_is_not_installed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: Any, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"^trackers: {tracker} is not installed; pip install {tracker}$"):
        pretrain(make(tiny, tmp_path, trackers=(tracker,)), quiet=True)


def test_progress_is_plain_lines_where_there_is_no_terminal(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(make(tiny, tmp_path))
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("step 6/6 ")]
    assert len(lines) == 1
    assert f"loss {losses(tmp_path)[-1]:.4f}" in lines[0] and "tokens/s" in lines[0]
    assert "\x1b" not in captured.err and "\r" not in captured.err
    assert "validation: " in captured.err and "validation perplexity" in captured.err


def test_quiet_says_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrain(make(tiny, tmp_path, steps=2), quiet=True)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
