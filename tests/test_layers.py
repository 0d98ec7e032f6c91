"""Imports go downward only: the rooms of the house and who may look into which."""

from __future__ import annotations

import ast
from pathlib import Path

import gossamer

ROOT = Path(gossamer.__file__).parent
# a room may import those with a larger number, and itself
FLOORS = {
    "__main__": -1,
    "cli": 0,
    "bench": 1,
    "train": 2,
    "evaluate": 3,
    "integrations": 3,
    "memory": 3,
    "restarts": 3,
    "conformance": 4,
    "layers": 4,
    "models": 4,
    "data": 4,
    "optim": 5,
    "distributed": 6,
    "kernels": 6,
    "linalg": 7,
    "rows": 8,
    "errors": 8,
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("gossamer.")}


def test_every_room_has_a_floor() -> None:
    assert {room(path) for path in ROOT.rglob("*.py")} - {"__init__"} == set(FLOORS)


def test_imports_go_downward() -> None:
    for path in ROOT.rglob("*.py"):
        own = room(path)
        for name in imported(path) if own != "__init__" else ():
            other = name.split(".")[1]
            assert other == own or FLOORS.get(other, -1) > FLOORS[own], f"{path.relative_to(ROOT)} imports {name}"


def test_only_distributed_mentions_a_rank_of_processes() -> None:
    for path in ROOT.rglob("*.py"):
        if room(path) not in ("distributed", "conformance"):  # the kit tries optimizers on two processes
            assert "torch.distributed" not in path.read_text(), path


def test_the_driver_knows_no_method_by_name() -> None:
    for name in ("optimizer", "contract", "stores", "rules", "rounding"):
        assert not any("optim.methods." in module for module in imported(ROOT / "optim" / f"{name}.py"))


def test_optimizers_need_only_torch_and_numpy() -> None:
    for path in [*(ROOT / "optim").rglob("*.py"), ROOT / "linalg.py", ROOT / "errors.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                assert module.split(".")[0] in _ALLOWED, f"{path.name} imports {module}"


def test_the_conformance_kit_needs_only_the_optimizers() -> None:
    for path in (ROOT / "conformance").rglob("*.py"):
        assert {name.split(".")[1] for name in imported(path)} <= {"conformance", "optim", "errors"}, path


_ALLOWED = {
    "__future__", "collections", "contextlib", "copy", "ctypes", "dataclasses", "difflib", "functools", "gossamer",
    "hashlib", "importlib", "math", "numpy", "pkgutil", "re", "torch", "types", "typing",
}  # fmt: skip
