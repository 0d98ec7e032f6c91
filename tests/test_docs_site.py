"""The site builds without a warning, everything public is on it, and what its pages say runs."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from filelock import FileLock
from sphinx.util.inventory import InventoryFile
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import gossamer
from benchmarks import pages
from gossamer import cli, layers
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The built site; once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder if worker_id == "master" else folder.parent) / "site"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            options = ["-W", "--keep-going", "-q", "-c", str(DOCS), "-d", f"{folder}-doctrees"]
            built = subprocess.run(
                [sys.executable, "-m", "sphinx", *options, str(ROOT), f"{folder}-draft"],
                capture_output=True,
                text=True,
                timeout=250,
            )
            assert built.returncode == 0, built.stderr
            Path(f"{folder}-draft").rename(folder)
    return folder


def public() -> Iterator[str]:
    """Every name of an `__all__`, and the class of every method."""
    for module in pkgutil.walk_packages(gossamer.__path__, "gossamer."):
        if module.ispkg:
            offered = getattr(importlib.import_module(module.name), "__all__", ())
            yield from (f"{module.name}.{name}" for name in offered)
    yield from (f"gossamer.{name}" for name in gossamer.__all__)
    yield from (f"gossamer.{entry.cls.__name__}" for entry in gossamer.methods().values())


def test_every_public_name_is_on_a_page(site: Path) -> None:
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    described = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    objects = {id(_resolve(name)) for name in public() if name in described}
    # what is offered twice, as by gossamer.optim, is described once
    assert not [name for name in public() if id(_resolve(name)) not in objects]


def _resolve(name: str) -> Any:
    """The object that a dotted name stands for; raises where there is none."""
    module, _, rest = name.partition(".")
    found: Any = importlib.import_module(module)
    while rest:
        part, _, rest = rest.partition(".")
        module = f"{module}.{part}"
        try:
            found = getattr(found, part)
        except AttributeError:
            fields = getattr(found, "__annotations__", {})
            found = fields[part] if part in fields else importlib.import_module(module)
    return found


class Links(HTMLParser):
    """Where a page leads, and the places in it that can be led to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a" and (target := values.get("href")):
            self.targets.append(target)
        if place := values.get("id"):
            self.places.add(place)


def test_the_24_gib_card_is_one_click_from_home(site: Path) -> None:
    assert "url=docs/index.html" in (site / "index.html").read_text()
    assert "choose.html#a-card-of-24-gib" in Links(site / "docs" / "index.html").targets
    page = site / "docs" / "choose.html"
    assert "a-card-of-24-gib" in Links(page).places
    section = page.read_text().partition('id="a-card-of-24-gib"')[2].partition("</section>")[0]
    assert "<table" in section and "Llama 3 8B" in section


def test_links_to_places_lead_somewhere(site: Path) -> None:
    found = {page: Links(page) for page in (site / "docs").rglob("*.html")}
    for page, links in found.items():
        for target in links.targets:
            file, _, place = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            if place and "://" not in target and there in found:
                assert place in found[there].places, f"{page.name}: {target}"


@pytest.mark.parametrize("name", layers.PARAMETRIZATIONS)
def test_every_layer_has_a_page(name: str) -> None:
    page = (DOCS / "layers" / f"{name}.md").read_text()
    assert page.startswith(f"# `{name}`")
    for part in ("**When to use it.**", "**Weight.**", "**What to tune.**", "**Algorithm", "**Deviations"):
        assert part in page, part


def test_no_page_without_a_layer() -> None:
    assert {page.stem for page in (DOCS / "layers").glob("*.md")} == set(layers.PARAMETRIZATIONS)


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_the_table_at_home_is_what_the_rows_say() -> None:
    assert pages.between_marks(DOCS / "index.md") == {"quick": pages.home_table()}


@pytest.mark.parametrize("model", ["130m", "Llama 3 8B"])
def test_tables_of_cards_are_what_the_code_counts(model: str) -> None:
    """One of the papers' and one of the hub's; all sixteen take 40 seconds (`python benchmarks/pages.py`)."""
    tables = pages.between_marks(DOCS / "choose.md")
    assert set(tables) == {f"{card} GiB" for card in pages.CARDS}
    for card in pages.CARDS:
        lines = [line for line in tables[f"{card} GiB"].splitlines() if line.startswith(f"| {model} |")]
        expected = pages.card_line(card, model)
        assert lines == ([] if expected is None else [pages.row(expected)])


@pytest.mark.parametrize("model", pages.PUBLISHED)
def test_shapes_have_the_published_sizes(model: str) -> None:
    built = pages.meta_model(pages.config_of(model), None, torch.bfloat16)
    assert sum(param.numel() for param in built.parameters()) == pages.PUBLISHED[model][0]


# ---- what pages say --------------------------------------------------------------------------------------------------


def fenced(page: Path) -> list[tuple[str, str]]:
    """Its blocks: language and text."""
    return re.findall(r"^```(\S*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


PYTHON = {page: code for page in PAGES if (code := [text for language, text in fenced(page) if language == "python"])}

ELSEWHERE = {
    "fully_shard(model)": "examples/torchrun_fsdp2.py",
    "optimizer_cls_and_kwargs=for_trainer(": "examples/trainer.py",
    "GossamerOptimizers.Config(": "tests/integrations/test_torchtitan.py",
    "# heavy_ball.py": "docs/add_a_method.md",
    "# test_heavy_ball.py": "docs/add_a_method.md",
}
"""What cannot run as it stands (for want of processes, a dataset, a package) and the file that runs it."""


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: str(page.relative_to(DOCS)))
def test_python_of_pages_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after the other."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = STAGES.get(page.name, dict)()
    for code in PYTHON[page]:
        if told := [line for line in ELSEWHERE if line in code]:
            ast.parse(code)
            assert all(line in (ROOT / ELSEWHERE[line]).read_text() for line in told)
        else:
            exec(compile(code, str(page), "exec"), names)


def llama() -> dict[str, Any]:
    """A model of transformers that has made a backward pass, and its optimizer."""
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 144,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=64, **sizes))
    model.save_pretrained("base")
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    model(input_ids=tokens, labels=tokens).loss.backward()
    opt = gossamer.Optimizer(gossamer.param_groups(model, gossamer.AdamW()), lr=1e-3)
    names = {"gossamer": gossamer, "layers": layers, "peft": peft, "AutoModelForCausalLM": AutoModelForCausalLM}
    return {**names, "model": model, "opt": opt, "steps": 3, "base": "base", "folder": "saved"}


def low_rank() -> dict[str, Any]:
    names = llama()
    layers.apply(names["model"], layers.LowRank(rank=8))
    names["opt"] = gossamer.Optimizer(gossamer.param_groups(names["model"], gossamer.AdamW()), lr=1e-3)
    return names


def batches() -> dict[str, Any]:
    model, batch = nn.Sequential(nn.Linear(8, 144), nn.Linear(144, 144), nn.Linear(144, 4)), torch.randn(2, 8)

    def loss(output: torch.Tensor, targets: object) -> torch.Tensor:
        return output.square().mean()

    names = {"gossamer": gossamer, "torch": torch, "model": model, "loss": loss}
    return {**names, "data": [(batch, batch)], "first": batch, "last": batch}


STAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "diagnostics.md": llama,
    "gradient_release.md": batches,
    "integrations.md": llama,
    "layers.md": llama,
    "restarts.md": low_rank,
}
"""What a page's fragments take for granted. Those of the others are whole programs."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_names_on_pages_exist(page: Path) -> None:
    for name in re.findall(r"(?<![\w./-])gossamer(?:\.\w+)+", page.read_text()):
        if name not in MADE_UP and not name.endswith((".md", ".py")):
            try:
                _resolve(name)
            except ModuleNotFoundError as error:  # torchtitan is not installed here
                assert error.name and not error.name.startswith("gossamer"), name


MADE_UP = {"gossamer.HeavyBall", "gossamer.Class"}


def test_a_method_is_added_as_the_page_says(tmp_path: Path) -> None:
    """But for the kit's facts about several processes, which take most of its time."""
    text = (DOCS / "add_a_method.md").read_text()
    for language, code in fenced(DOCS / "add_a_method.md"):
        if language == "python":
            (tmp_path / code.splitlines()[0].removeprefix("# ")).write_text(code)
    first, second = re.findall(r"^(pytest .*)$", text, re.MULTILINE)
    words = [*shlex.split(first)[1:], *shlex.split(second)[1:], "-k", "not fsdp2", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *words], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout
    assert "resume-bf16" in done.stdout and re.search(r"^2[0-9]+ passed", done.stdout, re.MULTILINE), done.stdout


def commands() -> dict[str, list[str]]:
    """What stands behind `gossamer` in a shell's block, by page and text."""
    found = {}
    for page in PAGES:
        shell = [code for language, code in fenced(page) if language in ("", "bash")]
        for line in "".join(shell).replace("\\\n", " ").splitlines():
            if match := re.match(r"(?:torchrun .*)?\bgossamer (.*)", line):
                argv = [word for word in shlex.split(match[1], comments=True) if word != "..."]
                found[f"{page.stem}: {' '.join(argv)}"] = argv
    return found


COMMANDS = commands()


class Understood(Exception):
    """The command line was read; nothing is run."""


@pytest.mark.parametrize("argv", COMMANDS.values(), ids=COMMANDS)
def test_commands_of_pages_are_understood(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **options: object) -> None:
        raise Understood

    workers = ("pretrain", "finetune", "bench", "bench_step", "evaluate_model", "write_report", "meta_model")
    for worker in (*workers, "candidates", "reproduce", "search"):
        monkeypatch.setattr(cli, worker, stop)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if argv == ["methods"]:
        assert cli.main(argv) == 0
    else:
        with pytest.raises(Understood):
            cli.main(argv)
