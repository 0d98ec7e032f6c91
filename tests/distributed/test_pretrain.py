"""Training on several processes: the numbers of one, checkpoints for any number, and what happens when one fails.

The processes run this same file, from the bottom; each makes all the runs of a world of its size in turn.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from gossamer.distributed import storage
from gossamer.layers import PARAMETRIZATIONS, Adapter
from gossamer.optim.contract import build
from gossamer.restarts import Restarts
from gossamer.train import Finetune, Pretrain, finetune, pretrain
from tests import test_finetune as tuning
from tests.test_train import checkpoints, events, free_port, losses, make, processes

Run = dict[str, Any]
"""What a process does: a `config` to train, or a `folder` to write tensors to or read them from."""

METHODS = {"adamw": {}, "lora-pre": {"rank": 4}, "mlorc": {"rank": 4}, "gossamer": {"rank": 4}, "galore": {"rank": 4},
           "muon": {}}  # fmt: skip
SIZES = (1, 2, 4)


def config(tiny: Path, out: Path, method: str = "adamw", **changes: Any) -> Pretrain[Any, Any, Any]:
    """A run of a model of one decoder layer: what takes time is that the processes wait for each other."""
    out.parent.mkdir(parents=True, exist_ok=True)
    model = json.loads((tiny / "config.json").read_text()) | {"num_hidden_layers": 1, "hidden_size": 16}
    (out.parent / "model.json").write_text(json.dumps(model | {"intermediate_size": 24}))
    defaults = {"model": str(out.parent / "model.json"), "steps": 6, "save_every": 2, "keep_last": 3, "timeout": 60.0}
    made = make(tiny, out, method, **(defaults | changes))
    return Pretrain(**{**vars(made), "method": build(method, **METHODS[method])})


# ---- processes -------------------------------------------------------------------------------------------------------


def begin(size: int, runs: list[Run], folder: Path) -> list[BaseProcess]:
    """`size` processes that make these runs; each says what it has to say in `folder/<rank>`."""
    for run in runs:
        run["port"] = free_port()
    children = []
    shared = {name: os.environ[name] for name in ("GOSSAMER_CACHE", "OMP_NUM_THREADS")}
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(size):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        names = {"options": (own, runs, str(folder / str(rank)))}
        child = processes.Process(target=runpy.run_path, args=(__file__, names, "__child__"))
        with pytest.MonkeyPatch.context() as patch:  # else the child looks for pytest's own main program first
            patch.setitem(sys.modules, "__main__", type(sys)("__main__"))
            child.start()
        children.append(child)
    return children


def end(children: list[BaseProcess], patience: float = 200) -> list[int | None]:
    """Their exit codes."""
    until = time.monotonic() + patience
    for child in children:
        child.join(max(0.0, until - time.monotonic()))
        if child.exitcode is None:
            child.kill()
            child.join()
    return [child.exitcode for child in children]


def together(size: int, runs: list[Run], folder: Path) -> None:
    """All of these runs, on `size` processes; on one, here."""
    if size == 1:
        for run in runs:
            make_run(run)
        return
    codes = end(begin(size, runs, folder))
    assert codes == [0] * size, "\n".join((folder / str(rank)).read_text() for rank in range(size))


def make_run(run: Run) -> None:
    if "config" not in run:
        (write_tensors if run["write"] else read_tensors)(run["folder"], run["seed"])
        return
    with pytest.MonkeyPatch.context() as patch:
        if "nan" in run:
            spoil(patch, *run["nan"], full="full" in run)
        (finetune if isinstance(run["config"], Finetune) else pretrain)(run["config"])


def spoil(patch: pytest.MonkeyPatch, rank: int, call: int, full: bool) -> None:
    """Make the `call`-th loss of one process not a number, or a disk full then."""
    from gossamer.evaluate import token_loss

    calls = iter(range(1, 1000))

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        value = token_loss(model, inputs, targets)
        if next(calls) != call or int(os.environ.get("RANK", 0)) != rank:
            return value
        if full:
            raise OSError(28, "No space left on device")
        return value * float("nan")

    patch.setattr("gossamer.train.pretraining.token_loss", loss)


# ---- the numbers of one process --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curves(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[list[float]]]:
    """The losses of 50 steps of a method on one process and on two, sharded: all that can be are trained at once."""
    folder = tmp_path_factory.mktemp("curves")
    names = list(METHODS)
    alike = {"steps": 50, "eval_every": 25, "eval_tokens": 300, "save_every": 0, "parallel": "fsdp2"}
    for size in (1, 2):
        runs = [{"config": config(tiny, folder / str(size) / name, name, **alike)} for name in names]
        together(size, runs, folder / "said")
    return lambda name: [
        [event["loss"] for event in events(folder / str(size) / name, "train", "eval")] for size in (1, 2)
    ]


@pytest.mark.parametrize("name", METHODS)
def test_a_sharded_model_trains_as_on_one_process(curves: Callable[[str], list[list[float]]], name: str) -> None:
    """1e-5: sums over the batch in another order, 6e-8, which the division by small second moments amplifies."""
    one, two = curves(name)
    assert len(one) == 52 and two == pytest.approx(one, rel=1e-5)


def test_released_gradients_of_shards_train_alike(tiny: Path, tmp_path: Path) -> None:
    """By two passes over micro-batches, each reduced by itself, hence the tolerance above; muon's whole matrices are
    gathered in the backward pass."""
    names, alike = ["gossamer", "muon"], {"steps": 4, "save_every": 0, "parallel": "fsdp2", "micro_batch_size": 1}
    runs: list[Run] = [
        {"config": config(tiny, tmp_path / f"{name}-{release}", name, release_gradients=release, **alike)}
        for name in names
        for release in (True, False)
    ]
    together(2, runs, tmp_path / "said")
    for name in names:
        released, held = (losses(tmp_path / f"{name}-{release}") for release in (True, False))
        assert len(held) == 4 and released == pytest.approx(held, rel=1e-5)


@pytest.mark.parametrize("layers", ["low-rank", "sltrain", "relora"])
@pytest.mark.parametrize("micro", [None, 1])
def test_sharded_low_rank_layers_train_as_on_one_process(
    tiny: Path, tmp_path: Path, layers: str, micro: int | None
) -> None:
    """With restarts that refactorize, in micro-batches or not; and the dense model they stand for is saved.

    Tolerance of losses as above; weights have gone 5 steps of 1e-3 on it.
    """
    alike = {"layers": PARAMETRIZATIONS[layers](rank=4), "restarts": Restarts(2, recovery_steps=1, reset=None)}
    alike |= {"steps": 5, "save_every": 0, "parallel": "fsdp2"}
    pretrain(config(tiny, tmp_path / "1", **alike), quiet=True)
    together(2, [{"config": config(tiny, tmp_path / "2", **alike, micro_batch_size=micro)}], tmp_path / "said")
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)
    dense = [safetensors.torch.load_file(last(tmp_path / size) / "model.safetensors") for size in "12"]
    assert dense[0].keys() == dense[1].keys() and not any(name.endswith(".B") for name in dense[0])
    for name, weight in dense[0].items():
        torch.testing.assert_close(dense[1][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_fine_tuning_is_that_of_one_process(
    base: Path, sums: str, colours: Path, tmp_path: Path, parallel: str
) -> None:
    """Answers of different lengths, packed or not, labels, and LoRA, whose frozen weights are sharded too.

    A batch of four rows is two of each process, whose answers have different numbers of tokens.
    """
    answers = {"task": "instructions", "data": sums, "template": "none", "max_length": 64}
    tasks: dict[str, dict[str, Any]] = {
        "answers": answers,
        "packed": answers | {"packing": True},
        "labels": {"task": "glue/sst2", "data": str(colours)},
        "lora": answers | {"adapter": Adapter("lora", rank=4), "method": "adamw"},
    }
    runs = [
        {size: tuning.make(base, tmp_path / size / name, **({"method": "gossamer"} | task), parallel=parallel)}
        for size in "12"
        for name, task in tasks.items()
    ]
    for size in "12":
        together(int(size), [{"config": run[size]} for run in runs if size in run], tmp_path / "said" / size)
    for name in tasks:
        one, two = (
            [event["loss"] for event in tuning.events(tmp_path / size / name, "train", "eval")] for size in "12"
        )
        assert len(one) == 5 and two == pytest.approx(one, rel=1e-5), name


def last(out: Path) -> Path:
    return out / "checkpoints" / checkpoints(out)[-1]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def tensors(seed: int) -> dict[str, tuple[Tensor, Any]]:
    """Whole tensors and how they are split; on four processes some have one row more than others, or none at all."""
    draw = torch.Generator().manual_seed(seed)
    made: dict[str, tuple[Tensor, Any]] = {
        f"a/{shape} {dim} {dtype}": (torch.randn(shape, generator=draw).to(dtype), Shard(dim))
        for shape in ((7, 5), (3, 11), (8, 8), (1, 6))
        for dim in (0, 1)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    }
    made["a/cube"] = torch.randn(3, 5, 4, generator=draw), Shard(1)
    made["b/row"] = torch.randn(6, generator=draw), Shard(0)
    made["b/codes"] = torch.randint(0, 255, (5, 3), dtype=torch.uint8, generator=draw), Shard(0)
    made["b/everywhere"] = torch.randn(4, 3, generator=draw), Replicate()
    made["b/plain"] = torch.randint(0, 9, (4,), generator=draw), None
    made["b/step"] = torch.tensor(3.0), None
    return made


def split(tensor: Tensor, placement: Any) -> Tensor:
    size = int(os.environ.get("WORLD_SIZE", 1))
    if placement is None or size == 1:
        return tensor.clone()
    return distribute_tensor(tensor, init_device_mesh("cpu", (size,)), [placement])


def write_tensors(folder: Path, seed: int) -> None:
    with joined():
        storage.save(folder, {name: split(*it) for name, it in tensors(seed).items()}, lambda: None)


def read_tensors(folder: Path, seed: int) -> None:
    with joined():
        read = {name: split(torch.zeros_like(whole), placement) for name, (whole, placement) in tensors(seed).items()}
        storage.load(folder, read)
        for name, it in tensors(seed).items():
            ours, expected = (x.to_local() if isinstance(x, DTensor) else x for x in (read[name], split(*it)))
            assert ours.dtype == expected.dtype and torch.equal(ours, expected), name


class joined:
    """In a group of processes, if this one is of several."""

    def __enter__(self) -> None:
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("gloo")

    def __exit__(self, *_: object) -> None:
        if "WORLD_SIZE" in os.environ:
            dist.destroy_process_group()


def test_tensors_written_by_some_processes_are_read_by_others_to_the_bit(tmp_path: Path) -> None:
    for size in SIZES:
        (tmp_path / str(size)).mkdir()
        together(size, [{"folder": tmp_path / str(size), "seed": 5, "write": True}], tmp_path / "said")
    for size in SIZES:
        together(size, [{"folder": tmp_path / str(n), "seed": 5, "write": False} for n in SIZES], tmp_path / "said")
    for name in "ab":
        contents = {(tmp_path / str(size) / f"{name}.safetensors").read_bytes() for size in SIZES}
        assert len(contents) == 1, "a file says how many wrote it"
        assert "".join(sorted(safetensors.torch.load_file(tmp_path / "4" / f"{name}.safetensors"))) == "".join(
            sorted(key[2:] for key in tensors(5) if key.startswith(name))
        )


def test_a_run_saved_on_some_processes_goes_on_on_others(tiny: Path, tmp_path: Path) -> None:
    """From every number of processes to every other, sharded and not, saved beside the training and not.

    Tolerance as above. The state itself is carried over exactly, as the test before this one shows.
    """
    how: dict[int, Run] = {1: {}, 2: {"parallel": "fsdp2"}, 4: {"parallel": "fsdp2", "async_save": True}}
    names = ["adamw", "mlorc", "galore"]
    for size in SIZES:
        runs = [{"config": config(tiny, tmp_path / name / f"{size}", name, **how[size])} for name in names]
        together(size, runs, tmp_path / "said")
    for size in SIZES:
        runs = []
        for name in names:
            folder = tmp_path / name
            assert checkpoints(folder / f"{size}") == ["step-00000002", "step-00000004", "step-00000006"]
            for other in set(SIZES) - {size}:
                out = Path(shutil.copytree(folder / f"{other}", folder / f"{other} to {size}"))
                for step in ("step-00000004", "step-00000006"):
                    shutil.rmtree(out / "checkpoints" / step)
                runs.append({"config": config(tiny, out, name, **how[size], resume=True)})
        together(size, runs, tmp_path / "said")
        for run in runs:
            assert events(run["config"].out, "resume")[0]["step"] == 2
            assert losses(run["config"].out) == pytest.approx(losses(run["config"].out.parent / "1"), rel=1e-5)
    assert not list(tmp_path.rglob(".draft*"))


def test_replicas_resume_to_the_same_bits(tiny: Path, tmp_path: Path) -> None:
    """On two processes a sum has one order, whoever computes it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    together(2, [{"config": config(tiny, whole)}], tmp_path / "said")
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    together(2, [{"config": config(tiny, cut, resume=True, async_save=True)}], tmp_path / "said")
    for path in last(whole).glob("*.safetensors"):
        assert path.read_bytes() == (last(cut) / path.name).read_bytes(), path.name
    assert len(safetensors.torch.load_file(last(cut) / "random.safetensors")) == 2


# ---- faults ----------------------------------------------------------------------------------------------------------


def wait_for_step(out: Path, step: int, children: list[BaseProcess]) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and all(child.exitcode is None for child in children):
        if (out / "log.jsonl").exists() and f'"train", "step": {step},' in (out / "log.jsonl").read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came")


def said(folder: Path, rank: int) -> str:
    return (folder / str(rank)).read_text().splitlines()[-1]


@pytest.fixture
def stopped() -> Iterator[list[BaseProcess]]:
    """Processes that will be killed, whatever happens."""
    children: list[BaseProcess] = []
    yield children
    for child in children:
        if child.exitcode is None:
            child.kill()


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_sigterm_of_one_process_saves_on_all(tiny: Path, tmp_path: Path, parallel: Any) -> None:
    out = tmp_path / "run"
    endless = config(tiny, out, steps=5000, save_every=0, parallel=parallel)
    children = begin(2, [{"config": endless}], tmp_path / "said")
    wait_for_step(out, 3, children)
    os.kill(children[1].pid or 0, signal.SIGTERM)
    assert end(children, 60) == [0, 0], said(tmp_path / "said", 0)
    step = events(out, "stop")[0]["step"]
    assert checkpoints(out) == [f"step-{step:08d}"] and events(out)[-1]["event"] == "stop"
    assert events(out, "train")[-1]["step"] == step


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_process_that_dies_is_named_by_the_others(tiny: Path, tmp_path: Path, parallel: Any) -> None:
    out = tmp_path / "run"
    endless = config(tiny, out, steps=5000, parallel=parallel)
    children = begin(3, [{"config": Pretrain(**{**vars(endless), "batch_size": 3})}], tmp_path / "said")
    wait_for_step(out, 3, children)
    os.kill(children[1].pid or 0, signal.SIGKILL)
    assert end(children, 30) == [2, -signal.SIGKILL, 2]
    assert said(tmp_path / "said", 0) == said(tmp_path / "said", 2) == "gossamer: process 1 of 3 is gone"


def test_a_process_that_hangs_is_named_by_the_others(tiny: Path, tmp_path: Path, stopped: list[BaseProcess]) -> None:
    out = tmp_path / "run"
    children = begin(2, [{"config": config(tiny, out, steps=5000, timeout=4.0)}], tmp_path / "said")
    stopped += children
    wait_for_step(out, 3, children)
    os.kill(children[1].pid or 0, signal.SIGSTOP)
    assert end(children[:1], 30) == [2]
    assert "process 1 of 2 is gone" in said(tmp_path / "said", 0)


def test_what_one_process_met_the_other_repeats(tiny: Path, tmp_path: Path) -> None:
    """The other one would wait for it for ever."""
    run = {"config": config(tiny, tmp_path / "run"), "nan": (1, 3), "full": True}
    assert end(begin(2, [run], tmp_path / "said"), 60) == [2, 2]
    assert said(tmp_path / "said", 1) == "gossamer: [Errno 28] No space left on device"
    assert said(tmp_path / "said", 0) == "gossamer: process 1 of 2: [Errno 28] No space left on device"


def test_the_process_that_keeps_the_store_is_named_too(tiny: Path, tmp_path: Path) -> None:
    """The log of the main process cannot be written."""
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    assert end(begin(2, [{"config": config(tiny, tmp_path / "run")}], tmp_path / "said"), 60) == [2, 2]
    assert "log.jsonl" in said(tmp_path / "said", 0)
    assert said(tmp_path / "said", 1) == "gossamer: process 0 of 2, which keeps the store, is gone"


def test_a_step_is_skipped_on_all_processes_alike(tiny: Path, tmp_path: Path) -> None:
    """What is not finite in one process's rows is left out by both; the run goes on as one process's does."""
    alike = {"on_nonfinite": "skip", "save_every": 0}
    for size, spoiled in ((1, 0), (2, 1)):
        run = {"config": config(tiny, tmp_path / f"{size}", **alike), "nan": (spoiled, 3)}
        together(size, [run], tmp_path / "said")
    one, two = tmp_path / "1", tmp_path / "2"
    assert [event["step"] for event in events(two, "skip")] == [3]
    assert events(two, "end")[0]["skipped"] == 1
    assert len(losses(one)) == 5 and losses(two) == pytest.approx(losses(one), rel=1e-5)


def test_torchrun_starts_again_from_the_last_checkpoint(tiny: Path, tmp_path: Path, small: list[str]) -> None:
    """A process dies in the first life of the run, which nobody asked to resume."""
    out = tmp_path / "run"
    (tmp_path / "train.py").write_text(
        "import os, signal, sys\n"
        "from gossamer.cli import main\n"
        "from gossamer.train import loop\n"
        "step = loop.Run._step\n"
        "def dying(self):\n"
        "    if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1' and self.done == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self)\n"
        "loop.Run._step = dying\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", free_port(), str(tmp_path / "train.py")]
    argv = ["pretrain", *small, "--valid", str(tiny / "valid.txt"), "--method", "adamw", "--steps", "6"]
    argv += ["--save-every", "2", "--keep-last", "3", "--out", str(out), "--parallel", "fsdp2"]
    argv += ["--model", config(tiny, tmp_path / "one").model]
    done = subprocess.run([sys.executable, *torchrun, *argv], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [event["step"] for event in events(out, "resume")] == [4]
    pretrain(config(tiny, tmp_path / "one"), quiet=True)
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def child(environment: dict[str, str], runs: list[Run], errors: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for run in runs:
        os.environ["MASTER_PORT"] = run["port"]
        try:
            make_run(run)
        except (ValueError, OSError) as error:  # as the command line says it
            print(f"gossamer: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__child__":
    child(*globals()["options"])
