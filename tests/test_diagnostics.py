"""Diagnostics: numbers that can be computed by hand, and nothing of the run changed by looking."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer
from gossamer import AdamW, LoRAPre, Optimizer, UserError
from gossamer.cli import main
from gossamer.data import DataConfig
from gossamer.optim import contract
from gossamer.optim.contract import Context, Entry, State
from gossamer.optim.diagnostics import QUANTITIES, Diagnostics, Inspectable
from gossamer.train import Pretrain, pretrain


@dataclass(frozen=True)
class Rows:
    """Momentum of `rank` rows alone, beginning with row `turn * step`, round and round: its subspace is known."""

    betas: tuple[float, float] = (0.5, 0.5)
    rank: int = 1
    turn: int = 0
    key: str = "basis"

    def init(self, param: Tensor) -> State:
        return {self.key: param.new_zeros(len(param), self.rank), "m": torch.zeros_like(param)}

    def update(self, grad: Tensor, state: State, ctx: Context) -> Tensor:
        rows = [(self.turn * ctx.step + i) % len(grad) for i in range(self.rank)]
        # columns of different lengths, where the state does not promise orthonormal ones
        size = torch.arange(1.0, self.rank + 1) * ctx.step if self.key == "m_B" else torch.ones(self.rank)
        state[self.key].copy_(torch.eye(len(grad))[:, rows] * size)
        return state["m"].lerp_(grad, 1 - self.betas[0])


@dataclass(frozen=True)
class InspectableRows(Rows):
    def moments(self, param: Tensor, state: State, m_step: int, v_step: int) -> State:
        return {"m": state["basis"] @ state["basis"].mT @ state["m"] / (1 - self.betas[0] ** m_step)}


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known to the registry in these tests alone."""
    for name, cls in (("rows", Rows), ("inspectable-rows", InspectableRows)):
        monkeypatch.setitem(contract._entries, name, Entry(name, cls, "none", True, False))


def parameter(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradient(step: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + step))


def optimizer(param: nn.Parameter, method: Any = None, **options: Any) -> Optimizer:
    return Optimizer([{"params": [param], "method": method or AdamW()}], **options)


def walk(opt: Optimizer, steps: range) -> None:
    for step in steps:
        for group in opt.param_groups:
            for param in group["params"]:
                param.grad = gradient(step, *param.shape).to(param.dtype)
        opt.step()


def trace(opt: Optimizer, look: Diagnostics, steps: range) -> list[list[dict[str, Any]]]:
    records = []
    for step in steps:
        walk(opt, range(step, step + 1))
        records.append(look.records)
    return records


# --- Moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dense_adamw_has_no_error(dtype: torch.dtype, maximize: bool) -> None:
    param = parameter(5, 3, dtype=dtype)
    opt = optimizer(param, AdamW(betas=(0.7, 0.8)), maximize=maximize, implementation="reference")
    look = Diagnostics(opt, ["group"], every=1)
    for (record,) in trace(opt, look, range(6)):
        assert record["m_error"] == record["v_error"] == 0  # the same operations in the same order: to the bit


def test_the_error_of_a_projected_momentum_is_that_of_the_projection() -> None:
    opt = optimizer(parameter(2, 2), InspectableRows())
    look = Diagnostics(opt, ["group"], every=1)
    for _ in range(3):
        opt.param_groups[0]["params"][0].grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
        opt.step()
        (record,) = look.records
        assert record["m_error"] == pytest.approx(4 / 5, rel=1e-6)  # row 1 is lost: 4 of sqrt(9 + 16)
        assert "v_error" not in record  # it keeps no second moment


def test_the_error_against_averages_written_out() -> None:
    """Gradients that change, decays of the method's own, tall: the exact moment is a sum with explicit weights."""
    method, steps = LoRAPre(rank=2, betas=(0.6, 0.9)), 7
    assert isinstance(method, Inspectable)
    param = parameter(6, 4, dtype=torch.float64)
    opt = optimizer(param, method)
    look = Diagnostics(opt, ["group"], every=steps)
    walk(opt, range(steps))
    moments = method.moments(param, opt.state[param], steps, steps)
    for moment, decay, power in (("m", 0.6, 1), ("v", 0.9, 2)):
        weights = [decay ** (steps - 1 - t) for t in range(steps)]
        exact = sum(w * gradient(t, 6, 4).double() ** power for t, w in enumerate(weights)) / sum(weights)
        error = float((moments[moment] - exact).norm() / exact.norm())
        assert error > 0.01
        assert look.records[0][f"{moment}_error"] == pytest.approx(error, rel=1e-9)


def test_gradients_are_seen_as_the_driver_sees_them() -> None:
    """A closure's gradients exist within the step alone."""
    param = parameter(4, 3)
    opt = optimizer(param, AdamW(betas=(0.5, 0.5)))
    look = Diagnostics(opt, ["group"], every=1)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = param.square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_([param], 0.1)
        return loss

    for _ in range(3):
        opt.step(closure)
        assert look.records[0]["m_error"] == 0


@pytest.mark.parametrize("moments", [("m", "v"), ("v",)])
def test_a_reset_resets_the_exact_moments_too(moments: tuple[str, ...]) -> None:
    opt = optimizer(parameter(4, 3), implementation="reference")  # whose operations are the exact moments'
    look = Diagnostics(opt, ["group"], every=1)
    walk(opt, range(5))
    opt.reset(moments=moments)
    for (record,) in trace(opt, look, range(5, 8)):
        assert record["m_error"] == record["v_error"] == 0


def test_begun_late_it_compares_once_it_has_caught_up() -> None:
    """After k of t steps it lacks 0.5^k - 0.5^t of the weight: 1 / 1000 at k = 10."""
    opt = optimizer(parameter(4, 3), AdamW(betas=(0.5, 0.75)))
    walk(opt, range(20))
    look = Diagnostics(opt, ["group"], every=1)
    records = [record for (record,) in trace(opt, look, range(20, 32))]
    assert ["m_error" in record for record in records] == [False] * 9 + [True] * 3
    assert not any("v_error" in record for record in records)
    assert records[-1]["m_error"] < 2e-3 and all("update_rms" in record for record in records)


def test_a_method_that_is_not_inspectable_has_no_errors() -> None:
    opt = Optimizer([{"params": [parameter(4, 3)], "method": method} for method in (Rows(), AdamW())])
    look = Diagnostics(opt, ["group"], every=1)
    walk(opt, range(2))
    rows, adamw = look.records
    assert rows.keys() == {"name", "update_rms", "update_max", "overlap", "lost"}
    assert adamw.keys() == {"name", "update_rms", "update_max", "m_error", "v_error", "lost"}
    assert look.watched() == [
        {"name": "group.0.0", "method": "rows", "inspectable": False},
        {"name": "group.1.0", "method": "adamw", "inspectable": True},
    ]


@pytest.mark.parametrize("name", gossamer.methods())
def test_what_registered_methods_say_of_their_moments(name: str) -> None:
    """In the parameter's shape, tall and wide, and without a change of the state."""
    method = contract.find(name).cls()
    if not isinstance(method, Inspectable):
        pytest.skip("says nothing of its moments")
    for shape in ((12, 5), (5, 12)):
        param = parameter(*shape)
        opt = optimizer(param, method)
        walk(opt, range(3))
        before = {key: tensor.clone() for key, tensor in opt.state[param].items()}
        moments = method.moments(param, opt.state[param], 3, 3)
        assert moments and moments.keys() <= {"m", "v"}
        for tensor in moments.values():
            assert tensor.shape == param.shape and bool(tensor.isfinite().all())
        assert all(torch.equal(tensor, opt.state[param][key]) for key, tensor in before.items())


# --- Subspaces, updates, writes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["basis", "m_B"])
@pytest.mark.parametrize(("rank", "turn", "overlap"), [(2, 0, 1.0), (2, 1, 0.5), (2, 2, 0.0), (1, 3, 0.0)])
def test_overlap_of_known_subspaces(key: str, rank: int, turn: int, overlap: float) -> None:
    opt = optimizer(parameter(4, 4), Rows(rank=rank, turn=turn, key=key))
    look = Diagnostics(opt, ["group"], every=1)
    first, *later = trace(opt, look, range(4))
    assert "overlap" not in first[0]
    assert [record["overlap"] for (record,) in later] == pytest.approx([overlap] * 3, abs=1e-6)


def test_overlap_is_between_looks() -> None:
    """The rows move by one a step, so by two from look to look: they share nothing."""
    opt = optimizer(parameter(4, 4), Rows(rank=2, turn=1))
    look = Diagnostics(opt, ["group"], every=2)
    records = [record for step in trace(opt, look, range(6)) for record in step]
    assert [record.get("overlap") for record in records] == [None, 0.0, 0.0]


def test_updates_are_in_units_of_the_learning_rate_without_decay() -> None:
    param = parameter(2, 2)
    opt = optimizer(param, Rows(betas=(0.0, 0.0)), lr=1e-4, weight_decay=0.5)
    look = Diagnostics(opt, ["group"], every=1)
    param.grad = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    opt.step()
    assert look.records[0]["update_rms"] == pytest.approx(2.5)  # sqrt(25 / 4)
    assert look.records[0]["update_max"] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("dtype", "rounding", "lost", "room"),
    [
        (torch.bfloat16, "nearest", 1.0, 0.0),
        # 1 - lr lies 0.001 * 256 of the way to the neighbour below 1: binomial, 5 standard deviations of 0.0068
        (torch.bfloat16, "stochastic", 1 - 0.256, 0.035),
        (torch.float32, "nearest", 0.0, 0.0),
    ],
)
def test_writes_lost_to_rounding(dtype: torch.dtype, rounding: str, lost: float, room: float) -> None:
    """Entries without gradient are meant to stay, so they are not lost."""
    param = nn.Parameter(torch.ones(64, 128, dtype=dtype))
    opt = optimizer(param, lr=1e-3, rounding=rounding)
    look = Diagnostics(opt, ["group"], every=1)
    param.grad = torch.ones_like(param)
    param.grad[:, 64:] = 0
    opt.step()
    assert look.records[0]["lost"] == pytest.approx(lost, abs=room)


def test_nothing_meant_nothing_lost() -> None:
    param = parameter(3, 3)
    opt = optimizer(param, lr=0.0)
    look = Diagnostics(opt, ["group"], every=1)
    walk(opt, range(1))
    assert "lost" not in look.records[0]


# --- When, of what, and again -----------------------------------------------------------------------------------------


def test_looks_every_so_many_steps_at_what_matches() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    opt = Optimizer(gossamer.param_groups(model, LoRAPre(rank=2)))
    look = Diagnostics(opt, [r"0\.weight", r"\.bias$"], every=3)
    records = trace(opt, look, range(7))
    assert [bool(step) for step in records] == [False, False, True, False, False, True, False]
    assert {record["name"] for record in records[2]} == {"0.weight", "0.bias", "1.bias"}
    opt.zero_grad()
    opt.param_groups[0]["params"][0].grad = torch.ones(6, 6)
    opt.step()
    opt.step()
    assert [record["name"] for record in look.records] == ["0.weight"]  # the others were not stepped


@pytest.mark.parametrize(
    ("names", "every", "said"),
    [
        (["no.such"], 1, "diagnose: 'no.such' matches no parameter's name"),
        (["group", "gruop.0.0"], 1, "diagnose: 'gruop.0.0' matches no parameter's name (did you mean 'group.0.0'?)"),
        (["("], 1, "diagnose: '(' is not a regular expression: "),
        (["group"], 0, "diagnose: every is 0; allowed: an integer >= 1"),
    ],
)
def test_bad_names(names: list[str], every: int, said: str) -> None:
    opt = optimizer(parameter(2, 2))
    with pytest.raises(UserError) as error:
        Diagnostics(opt, names, every)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert opt.observers == ()


def test_looking_changes_nothing() -> None:
    ends = []
    for watched in (False, True):
        param = parameter(8, 6, dtype=torch.bfloat16)
        opt = optimizer(param, LoRAPre(rank=2), weight_decay=0.1)
        if watched:
            Diagnostics(opt, ["group"], every=1)
        walk(opt, range(5))
        ends.append((param, opt.state[param]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert all(torch.equal(tensor, ends[1][1][key]) for key, tensor in ends[0][1].items())


def test_detached_it_sees_nothing() -> None:
    opt = optimizer(parameter(3, 3))
    kept, look = (Diagnostics(opt, ["group"], every=1) for _ in range(2))
    look.detach()
    walk(opt, range(2))
    assert look.records == [] and kept.records


def test_continues_exactly() -> None:
    """State through a file that loads with `weights_only=True`, stopped between two looks."""

    def start() -> tuple[Optimizer, Diagnostics]:
        opt = optimizer(parameter(6, 5), LoRAPre(rank=2))
        return opt, Diagnostics(opt, ["group"], every=3)

    opt, look = start()
    whole = trace(opt, look, range(12))
    opt, look = start()
    trace(opt, look, range(5))
    file = BytesIO()
    torch.save({"optimizer": opt.state_dict(), "diagnostics": look.state_dict()}, file)
    param = opt.param_groups[0]["params"][0]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    opt = optimizer(param, LoRAPre(rank=2))
    opt.load_state_dict(saved["optimizer"])
    look = Diagnostics(opt, ["group"], every=3)
    look.load_state_dict(saved["diagnostics"])
    assert trace(opt, look, range(5, 12)) == whole[5:]
    assert {"m_error", "v_error", "overlap"} <= whole[-1][0].keys()


# --- In a run ---------------------------------------------------------------------------------------------------------


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_the_command_line_logs_and_draws_them(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    argv = ["pretrain", *small, "--method", "lora-pre", "--method.rank", "4", "--out", str(out)]
    assert main([*argv, "--diagnose", "q_proj", "norm", "--diagnose-every", "2"]) == 0
    looks = events(out, "diagnostics")
    assert [event["step"] for event in looks] == [2, 4]
    names = [watched["name"] for watched in events(out, "start")[0]["diagnosed"]]
    assert len(names) == 2 + 5 and all("q_proj" in name or "norm" in name for name in names)
    for event in looks:
        assert [record["name"] for record in event["parameters"]] == names
    assert looks[1]["parameters"][0].keys() == {"name", *QUANTITIES}
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert all(f"<option>{name}</option>" in page for name in names)
    assert all(f'id="{quantity}"' in page for quantity in QUANTITIES)


def test_a_name_that_matches_nothing_is_one_line(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", *small, "--out", str(tmp_path / "run"), "--diagnose", "q_prj"]) == 2
    assert "gossamer: diagnose: 'q_prj' matches no parameter's name" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def make(tiny: Path, out: Path, **changes: Any) -> Pretrain[Any]:
    text = DataConfig(str(tiny / "train.txt"), str(tiny / "valid.txt"), vocab_size=300, seq_len=32)
    options = {"model": str(tiny / "config.json"), "device": "cpu", "batch_size": 4, "steps": 6, "eval_tokens": 100}
    options |= {"diagnose": ("layers.0.*proj",), "diagnose_every": 2, "save_every": 3}
    return Pretrain(LoRAPre(rank=4), data=text, out=out, **(options | changes))


def test_a_resumed_run_continues_its_diagnostics(tiny: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    pretrain(make(tiny, whole), quiet=True)
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoints" / "step-00000006")
    pretrain(make(tiny, broken, resume=True), quiet=True)
    assert len(events(whole, "diagnostics")) == 3
    assert events(broken, "diagnostics") == events(whole, "diagnostics")


def test_diagnostics_may_be_turned_on_and_off_on_resume(tiny: Path, tmp_path: Path) -> None:
    plain, out = tmp_path / "plain", tmp_path / "run"
    pretrain(make(tiny, plain, diagnose=()), quiet=True)
    assert events(plain, "diagnostics") == [] and events(plain, "start")[0]["diagnosed"] == []
    assert not list(plain.rglob("diagnostics.safetensors"))
    shutil.copytree(plain, out)
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    pretrain(make(tiny, out, resume=True), quiet=True)
    assert [event["step"] for event in events(out, "diagnostics")] == [4, 6]
    assert "m_error" not in events(out, "diagnostics")[0]["parameters"][0]
    weights = [folder / "checkpoints" / "step-00000006" / "model.safetensors" for folder in (plain, out)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    pretrain(make(tiny, out, resume=True, diagnose=()), quiet=True)
