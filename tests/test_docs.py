"""The documentation says what is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import gossamer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("name", gossamer.methods())
def test_every_method_has_a_page(name: str) -> None:
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert page.startswith(f"# `{name}`")
    for part in ("**When to use it.**", "**What to tune.**", "**Algorithm**", "**Deviations"):
        assert part in page, part


def test_no_page_without_a_method() -> None:
    assert {path.stem for path in (ROOT / "docs" / "methods").glob("*.md")} == set(gossamer.methods())


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_python_runs() -> None:
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})


def commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("gossamer ")]


@pytest.mark.parametrize("command", commands())
def test_readme_commands_run(command: str, tmp_path: Path) -> None:
    """Each as written, in an empty folder; training ones for two steps."""
    words = shlex.split(command)
    if words[1] in ("bench", "pretrain"):
        words += ["--steps", "2"]
    script = Path(sys.executable).with_name("gossamer")
    if words[1] == "report":  # of the folder that the command above it makes
        first = [str(script), "bench", "quick", "--methods", "adamw", "--steps", "2", "--rounds", "1"]
        subprocess.run(first, cwd=tmp_path, check=True, timeout=250)
    done = subprocess.run([str(script), *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


def test_readme_names_the_two_commands() -> None:
    assert "make demo" in README and "make test" in README
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.MULTILINE) and re.search(r"^test:", makefile, re.MULTILINE)
