"""What a run survives on one process: death at any moment, a full disk, other data, a step that is not finite.

Several processes: `tests/distributed/test_pretrain.py`. Death inside a save, and damage: `tests/test_train.py`.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from gossamer.distributed import storage
from gossamer.errors import UserError
from gossamer.layers import LowRank
from gossamer.train import pretrain
from gossamer.train.checkpoint import MANIFEST, _digest
from gossamer.train.loop import Run
from tests.test_train import assert_same_end, checkpoints, events, finish, losses, make, start_child

LOSS = "gossamer.train.pretraining.token_loss"


# ---- death -----------------------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_twenty_times_ends_with_the_same_bits(
    tiny: Path, small: list[str], tmp_path: Path
) -> None:
    """At random moments, of opening, of steps, of saves; every other life saves beside the training."""
    whole, broken, steps = tmp_path / "whole", tmp_path / "broken", 260
    changes: Any = {"steps": steps, "save_every": 4, "eval_every": 50}
    pretrain(make(tiny, whole, "lora-pre", **changes), quiet=True)
    argv = ["pretrain", *small, "--valid", str(tiny / "valid.txt"), "--method", "lora-pre", "--method.rank", "4"]
    argv += ["--steps", str(steps), "--save-every", "4", "--eval-every", "50", "--out", str(broken), "--resume"]
    draw, log, before = random.Random(20), broken / "log.jsonl", 0
    for life in range(20):
        target = _newest(broken) + draw.randint(0, 12)
        child = start_child(argv + ["--async-save"] * (life % 2), tmp_path / "errors")
        while child.is_alive() and (not log.exists() or log.stat().st_ino == before):  # each life writes it anew
            time.sleep(0.002)
        while child.is_alive() and target > 0 and f'"step": {target},' not in log.read_text():
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.02))
        child.kill()
        assert finish(child) == -signal.SIGKILL, (tmp_path / "errors").read_text()
        before = log.stat().st_ino
    assert 20 < _newest(broken) < steps, "killed before it did anything, or after the end"
    pretrain(make(tiny, broken, "lora-pre", resume=True, **changes), quiet=True)
    assert_same_end(whole, broken, f"step-{steps:08d}")
    assert [event["step"] for event in events(broken, "train")] == list(range(1, steps + 1))
    assert not list(broken.rglob(".draft*"))


def _newest(out: Path) -> int:
    """The step of the last checkpoint."""
    return max((int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*")), default=0)


@pytest.mark.parametrize("behind", [False, True])
def test_sigterm_finishes_the_step_saves_and_exits_with_0(tiny: Path, tmp_path: Path, behind: bool) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    pretrain(make(tiny, whole, steps=80), quiet=True)
    config = make(tiny, out, steps=80, async_save=behind, save_every=20)

    def terminate() -> None:
        while not (out / "log.jsonl").exists() or '"train", "step": 12,' not in (out / "log.jsonl").read_text():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(SystemExit) as stop:
        pretrain(config, quiet=True)
    thread.join()
    assert stop.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    *_, event = events(out)
    assert event["event"] == "stop" and 12 <= event["step"] < 80
    assert checkpoints(out)[-1] == f"step-{event['step']:08d}"
    pretrain(make(tiny, out, steps=80, resume=True), quiet=True)
    assert_same_end(whole, out, "step-00000080")


def test_sigterm_after_the_last_step_still_ends_the_process(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = Run._score

    def evaluate_and_be_told(run: Run) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(run)

    config = make(tiny, tmp_path, steps=5, eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_score", evaluate_and_be_told)
        with pytest.raises(SystemExit) as stop:
            pretrain(config, quiet=True)
    assert stop.value.code == 0
    *_, event = events(tmp_path)
    assert event["event"] == "end" and event["step"] == 5
    again = pretrain(make(tiny, tmp_path, steps=5, eval_every=0, resume=True), quiet=True)
    assert again.score.perplexity == event["perplexity"]


# ---- saving beside the training --------------------------------------------------------------------------------------


def test_a_save_beside_the_training_holds_the_bits_of_its_step(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the writing takes as long as some steps do; with the dense model of low-rank layers."""
    plain, behind = tmp_path / "plain", tmp_path / "behind"
    alike: Any = {"layers": LowRank(rank=4), "steps": 9, "save_every": 4, "keep_last": 9}
    pretrain(make(tiny, plain, **alike), quiet=True)
    publish, seen = storage._Writer.finish, []

    def slow(self: Any, **results: Any) -> None:
        time.sleep(0.3)
        seen.append(len(events(behind, "train")))
        publish(self, **results)

    monkeypatch.setattr(storage._Writer, "finish", slow)
    pretrain(make(tiny, behind, **alike, async_save=True), quiet=True)
    assert seen[0] > 4 and seen[-1] == 9, "nothing was trained meanwhile"
    assert checkpoints(behind) == checkpoints(plain) == [f"step-{step:08d}" for step in (4, 8, 9)]
    for name in checkpoints(plain):
        for path in (plain / "checkpoints" / name).glob("*.safetensors"):
            assert path.read_bytes() == (behind / "checkpoints" / name / path.name).read_bytes(), f"{name}/{path.name}"
    assert [event["step"] for event in events(behind, "checkpoint")] == [4, 8, 9]


@pytest.mark.parametrize("fails_at", [2, 3])
def test_a_failed_save_beside_the_training_is_said_at_the_next_one_or_the_end(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    calls, pwrite = iter(range(1, 10)), storage._Writer.write_data

    def full(self: Any, *arguments: Any) -> Any:
        if next(calls) == fails_at:
            raise OSError(28, "No space left on device")
        return pwrite(self, *arguments)

    monkeypatch.setattr(storage._Writer, "write_data", full)
    failed, good = 2 * fails_at, f"step-{2 * fails_at - 2:08d}"
    with pytest.raises(UserError, match=rf"cannot save step {failed} .*No space left.*{good}$"):
        pretrain(make(tiny, tmp_path, save_every=2, async_save=True, keep_last=9), quiet=True)
    assert checkpoints(tmp_path) == [f"step-{step:08d}" for step in range(2, failed, 2)]
    assert [event["step"] for event in events(tmp_path, "train")] == [1, 2, 3, 4, 5, 6]  # at the next save, not before
    monkeypatch.undo()
    pretrain(make(tiny, tmp_path, save_every=2, resume=True, keep_last=9), quiet=True)
    assert checkpoints(tmp_path)[-1] == "step-00000006"


def test_a_run_that_stops_still_publishes_what_it_was_saving(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = storage._Writer.finish
    monkeypatch.setattr(storage._Writer, "finish", lambda self, **rest: (time.sleep(0.3), publish(self, **rest))[1])
    monkeypatch.setattr(LOSS, spoiled(5, math.nan))
    with pytest.raises(UserError, match=r"^step 5: the loss is nan"):
        pretrain(make(tiny, tmp_path, save_every=4, async_save=True), quiet=True)
    assert checkpoints(tmp_path) == ["step-00000004"]


def test_a_disk_without_room(tiny: Path, tmp_path: Path) -> None:
    """A real one, where this machine lets us mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=600k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("no file system may be mounted here")
    try:
        with pytest.raises(UserError, match=r"cannot save step \d+ .*No space left on device"):
            pretrain(make(tiny, disk / "run", save_every=2, keep_last=9), quiet=True)
        assert checkpoints(disk / "run") == ["step-00000002"]
        assert not list(disk.rglob(".draft*"))
    finally:
        os.system(f"umount {disk}")


# ---- what a checkpoint is --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of lora-pre with checkpoints at steps 3 and 6. Copy it before changing it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    pretrain(make(tiny, out, "lora-pre", save_every=3), quiet=True)
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_nothing_is_unpickled(tiny: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **names: Any) -> None:
        raise AssertionError("a pickle was opened")

    for path in copied.rglob("step-*/*"):
        assert path.suffix in (".safetensors", ".json"), path
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, refuse)
    pretrain(make(tiny, copied, "lora-pre", save_every=3, resume=True), quiet=True)
    assert events(copied, "resume")[0]["step"] == 3


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change `training.json` as a careful person would: the manifest agrees afterwards."""
    training = json.loads((checkpoint / "training.json").read_text())
    change(training)
    (checkpoint / "training.json").write_text(json.dumps(training))
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["training.json"] = _digest(checkpoint / "training.json")
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


def forget(*keys: str) -> Callable[[dict[str, Any]], Any]:
    """As a version that had no such option would have written it."""

    def change(training: dict[str, Any]) -> None:
        config = training["config"]
        for key in keys:
            owner, _, name = key.rpartition(".")
            del (config[owner] if owner else config)[name]

    return change


def test_a_checkpoint_from_before_an_option_was_there(tiny: Path, finished: Path, copied: Path) -> None:
    """It meant the option's default, and is not continued with another value."""
    shutil.rmtree(copied / "checkpoints" / "step-00000006")
    edit(copied / "checkpoints" / "step-00000003", forget("on_nonfinite", "rounding", "method.eps", "fallback.betas"))
    with pytest.raises(UserError, match="resume: rounding was 'stochastic' in the checkpoint and is 'nearest' now"):
        pretrain(make(tiny, copied, "lora-pre", save_every=3, resume=True, rounding="nearest"), quiet=True)
    pretrain(make(tiny, copied, "lora-pre", save_every=3, resume=True), quiet=True)
    assert_same_end(finished, copied, "step-00000006")


def test_a_checkpoint_of_other_tensors_is_refused(tiny: Path, copied: Path) -> None:
    for name in checkpoints(copied):
        checkpoint = copied / "checkpoints" / name
        path = checkpoint / "optimizer.safetensors"
        saved = safetensors.torch.load_file(path)
        key = next(key for key in saved if key.endswith("/m_B"))
        saved[key] = saved[key][:, :1].contiguous()
        safetensors.torch.save_file(saved, path)
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        (checkpoint / MANIFEST).write_text(json.dumps(manifest | {path.name: _digest(path)}))
    with pytest.raises(UserError, match=r"step-00000006: optimizer/\S+/m_B is torch.float32 of shape .* there and"):
        pretrain(make(tiny, copied, "lora-pre", save_every=3, resume=True), quiet=True)


def test_a_file_that_the_manifest_does_not_name(tiny: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "checkpoints" / "step-00000006" / "diagnostics.safetensors").write_bytes(b"from elsewhere")
    pretrain(make(tiny, copied, "lora-pre", save_every=3, resume=True))
    assert "diagnostics.safetensors does not have the digest it was written with" in capsys.readouterr().err
    assert events(copied, "resume")[0]["step"] == 3


# ---- data ------------------------------------------------------------------------------------------------------------


def test_data_that_changed_in_content_alone_is_not_resumed_on(tiny: Path, tmp_path: Path) -> None:
    """One letter, and the file looks as old and as long as it was."""
    data = Path(shutil.copytree(tiny, tmp_path / "data"))
    out, text = tmp_path / "run", data / "train.txt"
    pretrain(make(data, out, steps=2), quiet=True)
    status = text.stat()
    text.write_text(text.read_text().replace("lantern", "lantorn", 1))
    os.utime(text, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert text.stat().st_size == status.st_size and text.stat().st_mtime_ns == status.st_mtime_ns
    with pytest.raises(UserError, match=r"train\.txt has changed since"):
        pretrain(make(data, out, steps=2, resume=True), quiet=True)
    text.write_text(text.read_text().replace("lantorn", "lantern"))
    pretrain(make(data, out, steps=2, resume=True), quiet=True)  # the same again, at another time


# ---- steps that are not finite ---------------------------------------------------------------------------------------


class Explode(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * math.inf


def spoiled(step: int, how: float) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """A `token_loss` that at a step is not a number (nan), or whose gradient is not finite (inf)."""
    from gossamer.evaluate import token_loss

    calls = iter(range(1, 1000))

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        value = token_loss(model, inputs, targets)
        if next(calls) != step:
            return value
        return value * math.nan if math.isnan(how) else Explode.apply(value)  # pyright: ignore

    return loss


@pytest.mark.parametrize("how", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: float
) -> None:
    """It is counted, nothing of it is kept, the data and the schedule move on, and resuming counts on."""
    out, cut = tmp_path / "run", tmp_path / "cut"
    options: Any = {"on_nonfinite": "skip", "save_every": 2, "keep_last": 9}
    monkeypatch.setattr(LOSS, spoiled(3, how))
    pretrain(make(tiny, out, "lora-pre", **options), quiet=True)
    monkeypatch.undo()
    (skip,) = events(out, "skip")
    assert skip["step"] == 3 and skip["skipped"] == 1 and skip["grad_norm"] is None
    assert (skip["loss"] is None) == math.isnan(how)
    assert [event["step"] for event in events(out, "train")] == [1, 2, 4, 5, 6]
    assert events(out, "end")[0]["skipped"] == 1 and events(out, "end")[0]["train_tokens"] == 5 * 4 * 32
    plain = tmp_path / "plain"
    pretrain(make(tiny, plain, "lora-pre", **options), quiet=True)
    ours, theirs = events(out, "train"), events(plain, "train")
    assert ours[:2] == theirs[:2]
    assert [event["lr"] for event in ours[2:]] == [event["lr"] for event in theirs[3:]]
    # step 4's rows seen by step 2's weights, in both: whatever step 3 would have done is not there
    counters = safetensors.torch.load_file(out / "checkpoints" / "step-00000006" / "optimizer.safetensors")
    assert {float(value) for name, value in counters.items() if name.endswith("/step")} == {5.0}

    shutil.copytree(out, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    pretrain(make(tiny, cut, "lora-pre", **options, resume=True), quiet=True)
    assert_same_end(out, cut, "step-00000006")
    assert events(cut, "end")[0]["skipped"] == 1


def test_a_run_whose_every_step_is_skipped_moves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOSS, lambda model, x, y: model(input_ids=x).logits.sum() * math.nan)
    pretrain(make(tiny, tmp_path / "nan", on_nonfinite="skip", steps=3), quiet=True)
    monkeypatch.undo()
    assert losses(tmp_path / "nan") == [] and events(tmp_path / "nan", "end")[0]["skipped"] == 3
    pretrain(make(tiny, tmp_path / "run", steps=1, lr=1e-30), quiet=True)
    moved, fresh = (
        safetensors.torch.load_file(tmp_path / name / "checkpoints" / f"step-0000000{step}" / "model.safetensors")
        for name, step in (("nan", 3), ("run", 1))
    )
    assert all(torch.equal(moved[name], fresh[name]) for name in fresh)
