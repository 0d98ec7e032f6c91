"""The conformance kit: every fact is one that a faulty optimizer fails and a sound one passes."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from gossamer.conformance import FACTS, Table, Verdict, check, markdown, processes
from gossamer.conformance.subject import Subject
from gossamer.errors import UserError
from gossamer.optim.contract import methods

pytest_plugins = ["pytester"]

FILE = str(Path(__file__).with_name("broken_optimizers.py"))
FAULTS = {
    "weights-only": {"StateWithObject": "UnpicklingError: the state holds broken_optimizers.Projector"},
    "resume-fp32": {"CountsOutsideState": "6 steps and 3 + load + 3: weights differ by up to"},
    "resume-bf16": {"MomentsInFp32": "weights differ by up to"},
    "state-dtype": {
        "MomentsInFp32": "m is torch.float32, and torch.bfloat16 once loaded",
        "StateWithSeed": "seed is torch.int64, and torch.bfloat16 once loaded",
    },
    "load-by-keyword": {"OwnWord": "unexpected keyword argument 'state_dict'"},
    "dcp-flat": {"StateWithText": "NotImplementedError"},
    "dcp-full": {"StateWithObject": "ValueError: Unexpected value type"},
    "deepcopy": {"AttributeThatIsNotCopied": "no attribute 'damping'"},
    "pickled": {"StateWithFunction": "pickle"},
    "every-parameter-moves": {"SkipsVectors": "up.bias, norm.weight, norm.bias, down.bias as they were"},
    "no-gradient": {"NoneIsZero": "a parameter without gradient moves"},
    "zero-gradient": {"Normalized": "not finite", "DecayBesideLr": "at lr 0"},
    "noncontiguous-gradient": {"Viewed": "RuntimeError: view size", "ReadsMemory": "contiguous gradients and others"},
    "closure": {"ClosureWithoutGradients": "does not require grad", "LossNotReturned": "does not return the loss"},
    "optimizer-zero-grad": {"ZeroGradWithoutOptions": "set_to_none"},
    "global-random-state": {"DrawsGlobally": "torch's global random state changes"},
    "swapped-parameters": {"KeepsParameters": "weights differ"},
    "late-group": {"StateMadeOnce": "KeyError"},
    "scheduler": {"OwnLr": "where the scheduler says lr 0"},
    "tensor-lr": {"LrAsNumber": "where the tensor was filled with 0"},
    "weight-decay": {"DecaysMatrices": "changes nothing for scale, up.bias"},
    "betas": {"BetasOfMatrices": "changes nothing for scale, up.bias"},
    "maximize": {"IgnoresMaximize": "maximize and the negated gradient: weights differ"},
    "fsdp2-even": {"NormOfShard": "two processes and one: weights differ by up to"},
    "fsdp2-uneven": {"RefusesEmptyShard": "max()"},
    "fsdp2-to-one": {"StateOfShard": "shape"},
}


def judge(fact: str, optimizer: str, **arguments: object) -> Verdict:
    return FACTS[fact].judge(Subject(f"{FILE}:{optimizer}", arguments))


@pytest.mark.parametrize(
    ("fact", "optimizer", "said"), [(fact, *fault) for fact, faults in FAULTS.items() for fault in faults.items()]
)
def test_a_faulty_optimizer_fails(fact: str, optimizer: str, said: str) -> None:
    verdict = judge(fact, optimizer)
    assert verdict.outcome == "fail" and said in verdict.detail and "\n" not in verdict.detail, verdict


def alone(subject: Subject) -> list[Verdict]:
    """What one process tries."""
    return [fact.judge(subject) for fact in FACTS.values() if "fsdp2" not in fact.name]


def test_a_sound_optimizer_passes() -> None:
    table = check(f"{FILE}:Sound", lr=0.01)
    assert {v.outcome for v in table.verdicts} == {"pass"}, str(table)
    assert {v.fact for v in table.verdicts} == set(FACTS) == set(FAULTS)


@pytest.mark.parametrize(
    ("optimizer", "inapplicable"),
    [("torch.optim:AdamW", set()), (f"{FILE}:of_a_model", {"weight-decay", "betas", "maximize"})],
)
def test_more_sound_optimizers(optimizer: str, inapplicable: set[str]) -> None:
    verdicts = alone(Subject(optimizer, {"lr": 0.01}))
    assert not [v for v in verdicts if v.outcome == "fail"]
    assert {v.fact for v in verdicts if v.outcome == "not applicable"} == inapplicable


@pytest.mark.parametrize("name", methods())
def test_our_methods_pass_what_one_process_tries(name: str) -> None:
    cls = methods()[name].cls
    rank = {"rank": 4} if "rank" in cls.__dataclass_fields__ else {}
    verdicts = alone(Subject("gossamer.conformance:method", {"name": name, **rank}))
    assert not [v for v in verdicts if v.outcome == "fail"]


@pytest.mark.parametrize(
    ("fact", "optimizer", "why"),
    [
        ("maximize", "LrAsNumber", "the constructor takes no maximize"),
        ("betas", "forgives", "the constructor takes no betas: "),
        ("tensor-lr", "RefusesTensorLr", "refused: lr is a tensor"),
        ("fsdp2-to-one", "Dies", "two processes cannot step (fsdp2-even)"),
    ],
)
def test_what_does_not_apply_says_why(fact: str, optimizer: str, why: str) -> None:
    verdict = judge(fact, optimizer)
    assert verdict.outcome == "not applicable" and why in verdict.detail, verdict


def test_a_state_without_tensors_is_no_failure_of_the_optimizer() -> None:
    verdict = FACTS["dcp-full"].judge(Subject("torch.optim:SGD"))
    assert (verdict.outcome, verdict.detail) == ("not applicable", "its state has no tensors")


def test_a_process_that_dies_is_a_failure_with_its_last_line() -> None:
    verdict = judge("fsdp2-even", "Dies")
    assert verdict.outcome == "fail" and verdict.detail == "a process died with code 3: out of memory"


def test_a_connection_that_a_dead_process_closed_is_not_the_reason(tmp_path: Path) -> None:
    (tmp_path / "0.error").write_text("RuntimeError: Connection closed by peer")
    (tmp_path / "0.out").write_text("a warning\n")
    (tmp_path / "1.out").write_text("a warning\nout of memory\n\n")
    for codes in ([1, 3], [None, 3]):
        assert processes._said(tmp_path, codes) == "a process died with code 3: out of memory"
    (tmp_path / "1.error").write_text("ValueError: the first")
    os.utime(tmp_path / "1.error", (0, 0))
    assert processes._said(tmp_path, [1, 1]) == processes._said(tmp_path, [1, None]) == "ValueError: the first"


def test_a_process_that_hangs_is_a_failure_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TIMEOUT", 3.0)
    begun = time.monotonic()
    verdict = judge("fsdp2-even", "Hangs")
    assert verdict.outcome == "fail" and verdict.detail == "two processes do not end within 3 s"
    assert time.monotonic() - begun < 30  # two pairs at 3 s each, on a machine that does other things


def test_a_file_that_does_not_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken_here.py").write_text("def (")
    with pytest.raises(UserError, match=r"cannot import .*broken_here\.py': SyntaxError"):
        check(f"{tmp_path}/broken_here.py:X")
    assert "broken_here" not in sys.modules


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ("AdamW", "'AdamW' is not module:Attr or path/to/file.py:Attr"),
        ("torch.optim:", "is not module:Attr"),
        ("no_such_module:X", "cannot import 'no_such_module'"),
        ("no/such/file.py:X", "cannot import 'no/such/file.py'"),
        ("torch.optim:AdamV", "has no class or function 'AdamV'"),
        (f"{FILE}:NOT_CALLABLE", "has no class or function 'NOT_CALLABLE'"),
    ],
)
def test_a_name_that_leads_nowhere(optimizer: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        check(optimizer)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_optimizer_fails() -> None:
    verdict = judge("closure", "no_optimizer")
    assert verdict.outcome == "fail" and "made a int, no torch.optim.Optimizer" in verdict.detail


def test_facts_are_sentences() -> None:
    for fact in FACTS.values():
        assert fact.sentence.endswith("."), fact.name


def test_a_table_of_several() -> None:
    good = Table("a", (Verdict("one", "pass"), Verdict("two", "pass", "0")))
    bad = Table("b", (Verdict("one", "fail", "x | y"), Verdict("two", "not applicable", "why")))
    assert markdown([good, bad, Table("c", bad.verdicts)]).splitlines() == [
        "| optimizer | one | two |",
        "|---|---|---|",
        "| `a` | ok | 0 |",
        "| `b` | FAIL | – |",
        "| `c` | FAIL | – |",
        "",
        "FAIL:",
        "",
        "- one: x \\| y (`b`, `c`)",
        "",
        "–:",
        "",
        "- two: why (`b`, `c`)",
    ]
    assert Table.from_json(json.loads(json.dumps(bad.to_json()))) == bad


# ---- as a pytest run -------------------------------------------------------------------------------------------------


KIT = ("-p", "gossamer_pytest", "--pyargs", "gossamer.conformance")  # -p: as the entry point, where it is installed


def test_the_command(pytester: pytest.Pytester) -> None:
    argv = ["--optimizer", f"{FILE}:SkipsVectors", "--optimizer-arg", "lr=0.1", "-k", "not fsdp2"]
    done = pytester.runpytest_inprocess(*KIT, *argv, "--table", "out/rows.jsonl")
    assert done.ret == 1
    lines = done.stdout.lines
    assert "SkipsVectors(lr=0.1)" in lines
    row = next(line for line in lines if line.startswith("every-parameter-moves"))
    assert "FAIL" in row and "scale, up.bias" in row
    assert "Matrices and vectors alike: none is skipped in silence. But: two steps leave" in done.stdout.str()
    table = Table.from_json(json.loads((pytester.path / "out" / "rows.jsonl").read_text()))
    assert [v.fact for v in table.verdicts] == [name for name in FACTS if "fsdp2" not in name]
    assert {"every-parameter-moves", "weight-decay"} <= {v.fact for v in table.failures}
    assert "resume-fp32" not in {v.fact for v in table.failures}


def test_the_command_of_one_of_our_methods(pytester: pytest.Pytester) -> None:
    argv = ["--optimizer", "gossamer.conformance:method", "-k", "resume", "--table", "table.md"]
    done = pytester.runpytest_inprocess(*KIT, *argv, "--optimizer-arg", "name=mlorc", "--optimizer-arg", "rank=4")
    assert done.ret == 0
    assert (pytester.path / "table.md").read_text().splitlines()[2] == "| `method(name=mlorc, rank=4)` | 0 | 0 |"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "optimizer: none is named; add --optimizer module:Attr"),
        (["--optimizer", "nowhere:X"], "optimizer: cannot import 'nowhere'"),
        (["--optimizer", "torch.optim:SGD", "--optimizer-arg", "lr"], "optimizer-arg: 'lr' is not KEY=VALUE"),
        (["--optimizer", "torch.optim:SGD", "--table", "x.csv"], "table: cannot write x.csv; allowed: a name that"),
    ],
)
def test_bad_options_of_the_command(pytester: pytest.Pytester, argv: list[str], said: str) -> None:
    done = pytester.runpytest_inprocess(*KIT, *argv)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert said in done.stderr.str() and "Traceback" not in done.stderr.str() + done.stdout.str()


def test_other_peoples_tests_are_left_alone(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """No option is added, and torch is not imported."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    pytester.makeconftest("def pytest_addoption(parser): parser.addoption('--optimizer')\n")
    pytester.makepyfile("import sys\ndef test_it(): assert 'torch' not in sys.modules\n")
    argv = ["-p", "gossamer_pytest", "-p", "no:hypothesispytest", "--optimizer", "theirs"]
    done = pytester.runpytest_subprocess(*argv, timeout=60)
    assert done.ret == 0, done.stdout.str()
