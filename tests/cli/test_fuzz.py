"""Whatever the user types or has on the disk: exit code 0 or 2, one clear line, and never a traceback.

The commands run in this process as far as their first training step, which says that it was reached.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.bench import runner, step
from gossamer.cli import COMMANDS, main
from gossamer.errors import UserError
from gossamer.layers import PARAMETRIZATIONS
from gossamer.optim.contract import methods
from gossamer.train import loop

REACHED = "the first training step was reached"


def examples(number: int) -> Callable[..., Any]:
    """So many, the same ones each time."""
    return settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


class Said(NamedTuple):
    code: int
    out: str
    err: str


def run(argv: list[str]) -> Said:
    """`main`, with streams that encode as a terminal's do. What it raises, a user would see as a traceback."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:  # after --help
            code = int(stop.code or 0)
        out.flush()
        err.flush()
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]  # pyright: ignore
    return Said(code, *texts)


def check(argv: list[str]) -> Said:
    said = run(argv)
    assert said.code in (0, 2), (argv, said)
    assert "Traceback" not in said.out + said.err, (argv, said)
    if said.code == 2:
        last = said.err.splitlines()[-1]
        assert re.match(r"gossamer: \S", last), (argv, said)
        assert sum(line.startswith("gossamer: ") for line in said.err.splitlines()) == 1, (argv, said)
    return said


@pytest.fixture(scope="module")
def finished(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that ended, with a restart and diagnostics in its log, and the options that resume it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    argv = [*small, "--method", "lora-pre", "--method.rank", "4", "--restarts.every", "2", "--restarts.no-refactorize"]
    argv += ["--restarts.scope", "all", "--diagnose", "q_proj", "--diagnose-every", "2", "--save-every", "2"]
    assert run(["pretrain", *argv, "--out", str(out)]).code == 0
    return out, argv


@pytest.fixture(scope="module")
def here(finished: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with files of every bad kind, where training stops at its first step and timing takes none."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "folder").mkdir()
    (folder / "binary.txt").write_bytes(bytes(range(256)))
    (folder / "binary.json").write_bytes(bytes(range(256)))
    (folder / "empty.jsonl").write_text("")
    (folder / "empty.json").write_text("")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "deep.jsonl").write_text("[" * 100_000)
    (folder / "list.json").write_text("[1, 2]")
    (folder / "null.parquet").write_bytes(b"PAR1" + b"\0" * 64)
    (folder / "text.txt").write_text("a b c " * 400)
    (folder / "loop.txt").symlink_to("loop.txt")

    def stop(*_: Any, **__: Any) -> None:
        raise UserError(REACHED)

    timed = {"ratio": 1.0, "ratio_min": 1.0, "ratio_max": 1.0, "pairs": 1, "milliseconds": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(loop.Run, "_step", stop)
        patch.setattr(runner, "pretrain", stop)
        patch.setattr(step, "_time", lambda *_: {**timed, "rival_milliseconds": 1.0})
        yield folder


NUMBERS = ["0", "-1", "1", "2", "3.5", "1e-3", "nan", "inf", "-inf", "1e400", str(2**63), "9" * 400, "0x10", "1_0", "١"]
WORDS = ["", " ", "-", "--", "None", "True", "{}", "[", "(", "*", "a=b", "é", "\udc80", "a\0b", "\n", "x" * 5000, "1,2"]
FILES = ["folder", "missing.txt", "binary.txt", "binary.json", "empty.jsonl", "empty.json", "deep.json", "list.json"]
FILES += [
    "null.parquet",
    "text.txt",
    "loop.txt",
    "deep.jsonl",
    "/dev/null",
    "text.txt/x",
    "~nobody/x",
    "**",
    "hf:",
    ",",
]
values = st.sampled_from(NUMBERS + WORDS + FILES) | st.text(max_size=8) | st.integers().map(str) | st.floats().map(str)


def options(command: list[str]) -> list[str]:
    """As its help lists them, with those of every method and every kind of layer."""
    listed = set(re.findall(r"--[a-z][\w.-]*", run([*command, "--help"]).out))
    if command[0] in ("pretrain", "memory"):
        parts = {"method": [entry.cls for entry in methods().values()], "layers": list(PARAMETRIZATIONS.values())}
        for part, classes in parts.items():
            names = {field.name.replace("_", "-") for cls in classes for field in dataclasses.fields(cls)}
            listed |= {f"--{part}.{name}" for name in names}
    if command[0] == "pretrain":
        listed |= {f"--restarts.{name}" for name in ("every", "reset", "scope", "no-refactorize", "recovery-steps")}
    return sorted(listed)


def words(command: list[str]) -> st.SearchStrategy[list[str]]:
    """What may follow a command: options with and without values, and strays."""
    chosen = {
        "--method": st.sampled_from(list(methods())),
        "--layers": st.sampled_from(list(PARAMETRIZATIONS)),
        "--restarts.every": st.sampled_from(["1", "20"]),
    }
    named = [st.tuples(st.just(o), chosen.get(o, st.nothing()) | values).map(list) for o in options(command)]
    joined = st.one_of(named).map(lambda pair: ["=".join(pair)])
    part = st.one_of(*named, joined, st.sampled_from(options(command)).map(lambda o: [o]), values.map(lambda v: [v]))
    return st.lists(part, min_size=1, max_size=4).map(lambda parts: [word for part in parts for word in part])


@given(words=st.lists(values | st.sampled_from([*COMMANDS, "--help", "--version", "step", "quick"]), max_size=3))
@examples(100)
def test_any_words(here: Path, words: list[str]) -> None:
    if words[:1] not in (["pretrain"], ["bench"], ["memory"]):  # their defaults take longer
        check(words)


@pytest.mark.parametrize(
    ("command", "number"),
    [("pretrain", 120), ("finetune", 60), ("eval", 60), ("memory", 60), ("bench", 60), ("bench step", 60),
     ("report", 40), ("methods", 20)],
)  # fmt: skip
def test_options(here: Path, small: list[str], base: Path, sums: str, command: str, number: int) -> None:
    start = command.split()
    model = small[small.index("--model") + 1]
    weights = ["--model", str(base), "--device", "cpu"]
    usual = {
        "pretrain": small,
        "finetune": [*weights, "--task", "instructions", "--data", sums, "--steps", "1"],
        "eval": [*weights, "--tasks", "perplexity", "--data", "text.txt", "--limit", "20"],
        "memory": ["--model", model],
        "bench step": ["--model", model, "--methods", "adamw"],
    }.get(command, [])

    @given(words(start))
    @examples(number)
    def fuzz(rest: list[str]) -> None:
        out = ["--out", "run"] if command in ("pretrain", "finetune", "eval") else []
        check([*start, *usual, *out, *rest])
        shutil.rmtree(here / "run", ignore_errors=True)

    fuzz()


# ---- what is on the disk ---------------------------------------------------------------------------------------------

JUNK: tuple[Any, ...] = (None, True, 0, -1, 2.5, float("nan"), 10**30, "", "x", "\udc80", [], [1], {}, {"x": 1})


def spots(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a JSON value has something inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield (*path, key)
        yield from spots(part, (*path, key))


def mangled_json(draw: st.DataObject, value: Any) -> Any:
    """With one to three parts replaced by junk, or left out."""
    value = {"": value}
    for _ in range(draw.draw(st.integers(1, 3))):
        *path, last = draw.draw(st.sampled_from(list(spots(value))))
        parent = value
        for key in path:
            parent = parent[key]
        if last != "" and draw.draw(st.booleans()):
            del parent[last]
        else:
            parent[last] = copy.deepcopy(draw.draw(st.sampled_from(JUNK)))
    return value.get("")


def mangled_bytes(draw: st.DataObject, content: bytes) -> bytes:
    """Cut, overwritten or continued."""
    at = draw.draw(st.integers(0, len(content)))
    return content[:at] + draw.draw(st.binary(max_size=20)) + content[at + draw.draw(st.integers(0, 20)) :]


def mangle(draw: st.DataObject, path: Path) -> None:
    """A file as somebody, or a disk, might leave it; JSON stays JSON half of the time."""
    content = path.read_bytes()
    if path.suffix == ".jsonl" and draw.draw(st.booleans()):
        lines = [json.loads(line) for line in content.splitlines()]
        at = draw.draw(st.integers(0, len(lines) - 1))
        lines[at] = mangled_json(draw, lines[at])
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    elif path.suffix == ".json" and draw.draw(st.booleans()):
        content = json.dumps(mangled_json(draw, json.loads(content))).encode()
    else:
        content = mangled_bytes(draw, content)
    path.write_bytes(content)


@given(draw=st.data())
@examples(60)
def test_mangled_logs(finished: tuple[Path, list[str]], here: Path, draw: st.DataObject) -> None:
    folder = shutil.copytree(finished[0], here / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    try:
        if draw.draw(st.booleans()):
            row = {"label": "a", "method": "adamw", "lr": 1e-3, "perplexity": 9.0, "log": "log.jsonl", "config": {}}
            (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
        mangle(draw, folder / draw.draw(st.sampled_from([path.name for path in sorted(folder.glob("*.jsonl"))])))
        check(["report", str(folder)])
    finally:
        shutil.rmtree(folder)


@given(draw=st.data())
@examples(60)
def test_mangled_checkpoints(finished: tuple[Path, list[str]], here: Path, draw: st.DataObject) -> None:
    """Also where the manifest was made to agree with what it lists."""
    original, argv = finished
    folder = shutil.copytree(original, here / "copy")
    try:
        newest = max((folder / "checkpoints").iterdir())
        files = [*sorted(path for path in newest.rglob("*") if path.is_file()), folder / "log.jsonl"]
        mangle(draw, draw.draw(st.sampled_from(files)))
        if draw.draw(st.booleans()):
            listed = [path for path in files if path.name != "manifest.json" and path.parent == newest]
            digests = {path.name: hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in listed}
            (newest / "manifest.json").write_text(json.dumps(digests))
        check(["pretrain", *argv, "--out", str(folder), "--resume"])
    finally:
        shutil.rmtree(folder)


@given(draw=st.data())
@examples(60)
def test_mangled_data_and_configurations(here: Path, tiny: Path, small: list[str], draw: st.DataObject) -> None:
    changed = {"--data": "documents.jsonl", "--valid": "documents.jsonl", "--model": "config.json"}
    option = draw.draw(st.sampled_from(list(changed)))
    path = Path(shutil.copy(tiny / changed[option], here))
    mangle(draw, path)
    check(["pretrain", *small, "--out", "run", option, str(path)])
    if option == "--model":
        check(["memory", "--method", "adamw", "--model", str(path)])
    shutil.rmtree(here / "run", ignore_errors=True)


# ---- the machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2, but WORLD_SIZE is 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "first"}, "LOCAL_RANK is 'first'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "door"}, "MASTER_PORT is 'door'"),
    ],
)
def test_variables_of_torchrun(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    answer = check(["pretrain", *small, "--out", str(tmp_path / "run")])
    assert answer.code == 2 and said in answer.err, answer.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run", "/sys/run"])
def test_a_folder_that_nobody_can_write(here: Path, small: list[str], place: str) -> None:
    answer = check(["pretrain", *small, "--out", place])
    assert answer.code == 2 and place.rpartition("/")[0] in answer.err


@pytest.mark.parametrize("place", ["/proc/cache", "/dev/null"])
def test_a_cache_that_nobody_can_write(
    here: Path, small: list[str], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", place)
    answer = check(["pretrain", *small, "--out", "run"])
    assert answer.code == 2 and "set GOSSAMER_CACHE" in answer.err


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "tpu", ""])
def test_a_device_that_is_not_there(here: Path, small: list[str], device: str) -> None:
    answer = check(["pretrain", *small, "--out", "run", "--device", device])
    assert answer.code == 2 and "device: " in answer.err


def test_a_terminal_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", ascii_only)
    assert main(["methods"]) == 0
