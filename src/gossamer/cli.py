"""The command line: the library's dataclasses as options. Bad input is one line on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
import tyro
from rich.console import Console
from rich.table import Table

import gossamer
from gossamer.bench import (
    Bench,
    Evaluate,
    Reproduce,
    Search,
    StepBench,
    bench,
    bench_step,
    evaluate_model,
    reproduce,
    search,
    step_table,
    summary_table,
    trials_table,
    write_page,
    write_report,
)
from gossamer.distributed import of_main
from gossamer.errors import UserError, nearest
from gossamer.evaluate import token_loss
from gossamer.layers import PARAMETRIZATIONS, Parametrization, name_of
from gossamer.memory import Size, activations, candidates, meta_model, parse_size, predict
from gossamer.models import longest_row, resolve_config
from gossamer.optim.contract import Method, entry_of, find, methods
from gossamer.optim.optimizer import num_bytes
from gossamer.restarts import Restarts
from gossamer.train import Finetune, Pretrain, finetune, pretrain

M = TypeVar("M", bound=Method)
L = TypeVar("L", bound=Parametrization | None)
Options = TypeVar("Options")

DEFAULT_METHOD = "gossamer"
WAYS = ("reference", "auto")
"""Of stepping: what a prediction shows."""


@dataclass(frozen=True)
class MemoryOptions(Generic[M, L]):
    """Predict what training takes, beside AdamW, without taking it."""

    method: M
    """How hidden matrices are trained; everything else is trained by AdamW."""
    layers: L
    """What hidden linear layers are replaced by; None: nothing."""
    layer_targets: tuple[str, ...] = ()
    """Regular expressions of the linear layers to replace; none: every hidden one."""
    model: str = "1b"
    """A size (tiny, 9m .. 13b), or a Hugging Face config.json or a folder with one."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of weights and gradients. Optimizer state is fp32 either way."""
    batch_size: int = 1
    """Rows of one forward pass, for activations."""
    seq_len: int | None = None
    """Tokens of a row; None: 256, or as many as the model allows if that is fewer."""
    checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    release_gradients: bool = False
    """Of gradients, hold those of one layer at a time, as `gossamer pretrain --release-gradients` does."""
    budget: str | None = None
    """An amount of memory such as 24GiB: list what fits, over all methods, parametrizations and ranks."""


@dataclass(frozen=True)
class ReportOptions:
    """Draw all results below a folder: a self-contained page of one table, a static site of several."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="directory")]
    """A benchmark's or a run's folder, or one of several: every `rows.jsonl`, other `.jsonl` rows and `log.jsonl`."""
    out: Path | None = None
    """Folder to write to; None: report.html into `directory`, a site into its folder `site`."""


@dataclass(frozen=True)
class MethodsOptions:
    """List every method and every layer: state, defaults, paper."""


def run_pretrain(argv: list[str]) -> None:
    options = _parse_with_parts(Pretrain, "pretrain", argv)
    pretrain(options)
    print(f"{options.out / 'log.jsonl'}")


def run_finetune(argv: list[str]) -> None:
    options = _parse_with_parts(Finetune, "finetune", argv)
    finetune(options)
    print(f"{options.out / 'log.jsonl'}")


def run_eval(argv: list[str]) -> None:
    options = _parse(Evaluate, "eval", argv)
    for row in evaluate_model(options):
        print(f"{row['task']}: " + ", ".join(f"{name} {value:.4f}" for name, value in row["scores"].items()))
        print(f"{options.out / (row['samples'] or 'results.jsonl')}")


def run_bench(argv: list[str]) -> None:
    if argv[:1] == ["step"]:
        _run_bench_step(argv[1:])
        return
    options = _parse(Bench, "bench", argv)
    folder = bench(options)

    def show() -> None:
        Console().print(summary_table(folder))
        print(write_report(folder))

    of_main("auto", lambda _: show())


def _console(width: int) -> Console:
    """As wide as the terminal, or so many columns where there is none."""
    return Console(width=None if sys.stdout.isatty() else width)


def run_sweep(argv: list[str]) -> None:
    options = _parse(Search, "sweep", argv)
    study = search(options)

    def show() -> None:
        table, lines = trials_table(study)
        _console(140).print(table)
        print(*lines, options.folder / "rows.jsonl", sep="\n")

    of_main(options.device, lambda _: show())


def _run_bench_step(argv: list[str]) -> None:
    options = _parse(StepBench, "bench step", argv)
    rows = bench_step(options)
    _console(160).print(step_table(rows))
    print(write_page(options.out))


def run_reproduce(argv: list[str]) -> None:
    reproduce(_parse(Reproduce, "reproduce", argv), _console(160))


def run_report(argv: list[str]) -> None:
    options = _parse(ReportOptions, "report", argv)
    print(write_report(options.directory, options.out))


def run_memory(argv: list[str]) -> None:
    options = _parse_with_parts(MemoryOptions, "memory", argv)
    dtype = getattr(torch, options.dtype)
    if options.budget is not None:
        if tried := [word for word in argv if word.startswith(("--method", "--layer"))]:
            raise UserError(f"budget: tries every method and parametrization; leave out {tried[0]}")
        _print_what_fits(options, parse_size(options.budget, "budget"), dtype)
        return
    name = entry_of(options.method).name
    if options.layer_targets and options.layers is None:
        raise UserError("layer_targets: there are no layers to replace them by; add --layers")
    if options.layers is not None:
        name += f" on {name_of(options.layers)}"
    plain = meta_model(options.model, None, dtype)
    model = meta_model(options.model, options.layers, dtype, options.layer_targets)
    seq_len = _seq_len(options)
    kept = activations(model, options.batch_size, seq_len, options.checkpointing, loss=token_loss)
    release = options.release_gradients
    mine, fused = (predict(model, options.method, implementation=way, release_gradients=release) for way in WAYS)
    dense, dense_fused = (predict(plain, gossamer.AdamW(), implementation=way) for way in WAYS)
    table = Table(title=f"{options.model}, {mine.parameters:,} parameters, {options.dtype}; bytes")
    for column, justify in (
        ("group", "left"),
        ("method", "left"),
        ("parameters", "right"),
        ("weights", "right"),
        ("gradients", "right"),
        ("optimizer state", "right"),
        ("step", "right"),
        ("fused step", "right"),
    ):
        table.add_column(column, justify=justify, no_wrap=column != "group")  # pyright: ignore
    for line, twin in zip(mine.lines, fused.lines, strict=True):
        sizes = (line.parameters, line.weights, line.gradients, line.state, line.step.transient, twin.step.transient)
        table.add_row(line.group, line.method, *(f"{size:,}" for size in sizes))
    counters = sum(line.counters for line in mine.lines)
    table.add_row("step counters", "", "", "", "", f"{counters:,}", end_section=True)
    released = f"total with {name}{', gradients released' if release else ''}"
    for label, memory, twin in ((released, mine, fused), ("total with adamw", dense, dense_fused)):
        sizes = (memory.parameters, memory.weights, memory.gradients, memory.state)
        sizes = (*sizes, memory.step.transient, twin.step.transient)
        table.add_row(label, "", *(f"{size:,}" for size in sizes))
    _console(140).print(table)
    totals = [memory.weights + memory.gradients + memory.state for memory in (mine, dense)]
    print(
        f"weights + gradients + state: {totals[0] / 2**30:.2f} GiB with {name}, "
        f"{totals[1] / 2**30:.2f} GiB with adamw; "
        f"state of hidden matrices {mine.hidden_state / max(dense.hidden_state, 1):.1%} of adamw's"
    )
    print(
        f"a step takes, while it runs, {_mib(mine.step.transient)} ({_mib(mine.step.first)} where projectors are "
        f"computed); fused {_mib(fused.step.transient)} ({_mib(fused.step.first)}), and {_mib(fused.scratch)} stay"
    )
    print(f"activations of {_batch(options, seq_len)}: {kept / 2**30:.2f} GiB")


def _print_what_fits(options: MemoryOptions[Any, Any], budget: Size, dtype: torch.dtype) -> None:
    seq_len = _seq_len(options)
    found = candidates(
        options.model,
        options.batch_size,
        seq_len,
        options.checkpointing,
        loss=token_loss,
        dtype=dtype,
        release_gradients=options.release_gradients,
    )
    table = Table(title=f"{options.model}, {options.dtype}, {_batch(options, seq_len)}; {budget.unit}")
    for column in ("method", "layers", "rank", "weights", "gradients", "state", "activations", "step", "total", "fits"):
        table.add_column(column, justify="left" if column in ("method", "layers") else "right", no_wrap=True)
    for it in found:
        sizes = (it.weights, it.gradients, it.state, it.activations, it.step, it.total)
        rank, fits = "-" if it.rank is None else str(it.rank), "yes" if it.total <= budget.bytes else "no"
        table.add_row(it.method, it.layers, rank, *map(budget.show, sizes), fits)
    _console(140).print(table)
    fitting = [it for it in found if it.total <= budget.bytes]
    ends = {"smallest": found[0], "largest that fits": fitting[-1]} if fitting else {"smallest": found[0]}
    print(
        f"{len(fitting)} of {len(found)} fit {budget}; "
        + "; ".join(f"{what}: {it}, {budget.show(it.total)} {budget.unit}" for what, it in ends.items())
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _seq_len(options: MemoryOptions[Any, Any]) -> int:
    return (
        options.seq_len if options.seq_len is not None else min(256, longest_row(resolve_config(options.model)) or 256)
    )


def _batch(options: MemoryOptions[Any, Any], seq_len: int) -> str:
    return f"{options.batch_size} x {seq_len} tokens{' with checkpointing' if options.checkpointing else ''}"


def run_methods(argv: list[str]) -> None:
    _parse(MethodsOptions, "methods", argv)
    shape = (4096, 11008)
    matrix = torch.empty(shape, device="meta")
    table = Table(title=f"state: of a {shape[0]} x {shape[1]} matrix at the defaults, and as a part of adamw's")
    for column in ("method", "state", "defaults", "what it is", "paper"):
        table.add_column(column, no_wrap=column in ("method", "state"))
    dense = num_bytes(gossamer.AdamW().init(matrix).values())
    for entry in methods().values():
        method = entry.cls()
        defaults = ", ".join(f"{field}={getattr(method, field)!r}" for field in method.__dataclass_fields__)
        size = num_bytes(method.init(matrix).values())
        table.add_row(entry.name, f"{size / 2**20:.1f} MiB\n{size / dense:.2%}", defaults, entry.summary, entry.paper)
    console = _console(160)
    console.print(table)
    table = Table(title="--layers: what hidden linear layers can be replaced by")
    for column in ("layers", "defaults", "what it is"):
        table.add_column(column, no_wrap=column == "layers")
    for name, cls in PARAMETRIZATIONS.items():
        defaults = ", ".join(f"{field}={value!r}" for field, value in vars(cls()).items())
        table.add_row(name, defaults, (cls.__doc__ or "").splitlines()[0])
    console.print(table)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "pretrain": (run_pretrain, "train a causal language model from scratch"),
    "finetune": (run_finetune, "train a model that is there on prompts and answers, or on labels"),
    "eval": (run_eval, "score a model: perplexity, GSM8K, MATH-500, HumanEval, MBPP, GLUE, lm-eval's tasks"),
    "bench": (run_bench, "train every method on the same data and compare them; bench step: time their steps"),
    "reproduce": (run_reproduce, "train the tables of papers, and print ours beside theirs"),
    "sweep": (run_sweep, "look for a method's learning rate, and values of its knobs, within a budget of tokens"),
    "report": (run_report, "draw the results that are there"),
    "memory": (run_memory, "predict what training takes"),
    "methods": (run_methods, "list every optimizer and every low-rank layer"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else a terminal in ASCII, or a path in another encoding, is an error
            stream.reconfigure(errors="backslashreplace")
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: gossamer COMMAND [OPTIONS]\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()))
        print("\n`gossamer COMMAND --help` lists its options.")
        return 0
    if argv[0] == "--version":
        print(gossamer.__version__)
        return 0
    try:
        if bad := [word for word in argv if "\0" in word]:
            raise UserError(f"{bad[0]!r} holds a NUL, which no option and no path can")
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; known: {', '.join(COMMANDS)}")
        COMMANDS[argv[0]][0](argv[1:])
    except UserError as error:
        _complain(str(error))
        return 2
    except OSError as error:  # a full disk, a folder that cannot be written: wherever it strikes
        _complain(f"{error.strerror or error}: {error.filename or ''}".rstrip(": "))
        return 2
    except KeyboardInterrupt:
        print("gossamer: interrupted", file=sys.stderr)
        return 130
    return 0


def _complain(text: str) -> None:
    """One line, whatever the user's own words held."""
    print("gossamer:", " ".join(text.split()), file=sys.stderr)


def _parse_with_parts(options: Any, command: str, argv: list[str]) -> Any:
    """Parse, after the parts that decide which options there are: `--method`, `--layers`, any `--restarts.*`."""
    method_name, argv = _take("method", argv)
    has_layers = "layers" in options.__dataclass_fields__
    layers_name, argv = _take("layers", argv) if has_layers else (None, argv)
    if method_name == "":
        raise UserError(f"method: no name given; known: {', '.join(methods())}")
    if layers_name == "":
        raise UserError(f"layers: no name given; known: {', '.join(PARAMETRIZATIONS)}")
    if any(word.partition("=")[0] == "--restarts" for word in argv):
        raise UserError("restarts: an option without a value of its own; --restarts.every N turns restarts on")
    if layers_name is not None and layers_name not in PARAMETRIZATIONS:
        guess = nearest(layers_name, PARAMETRIZATIONS)
        raise UserError(f"layers: unknown {layers_name!r}{guess}; known: {', '.join(PARAMETRIZATIONS)}")
    parts: dict[str, Any] = {
        # factors are thin already: a method of low rank would leave them to AdamW
        "method": find(method_name or ("adamw" if layers_name else DEFAULT_METHOD)).cls(),
        "layers": PARAMETRIZATIONS[layers_name]() if layers_name else None,
        "restarts": Restarts() if any(word.startswith("--restarts.") for word in argv) else None,
    }
    wanted = {name: part for name, part in parts.items() if name in options.__dataclass_fields__}
    default = DEFAULT_METHOD + ", adamw with --layers" * has_layers
    hint = f"--method NAME is one of {', '.join(methods())} (default: {default}) and brings --method.* options."
    if has_layers:
        hint += f" --layers NAME is one of {', '.join(PARAMETRIZATIONS)} (default: none) and brings --layers.*."
    if "restarts" in wanted:
        hint += " --restarts.every N turns restarts on and brings --restarts.* (reset, scope, no-refactorize, ...)."
    return _parse(
        options[*map(type, wanted.values())], command, argv, f"{options.__doc__}\n\n{hint}", options(**wanted)
    )


def _take(name: str, argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE` (None: not there; empty: no value), and the other words."""
    value, rest = None, []
    words = iter(argv)
    for word in words:
        if word == f"--{name}" or word.startswith(f"--{name}="):
            value = word.partition("=")[2] or next(words, "")
        else:
            rest.append(word)
    return value, rest


def _parse(
    options: Callable[..., Options],
    command: str,
    argv: list[str],
    description: str | None = None,
    default: Any = None,
) -> Options:
    """tyro's parser, with its panel of an error made one line."""
    caught = io.StringIO()
    columns = os.environ.get("COLUMNS")
    try:
        with contextlib.redirect_stderr(caught):
            if not {"-h", "--help"} & set(argv):
                os.environ["COLUMNS"] = "1000"  # else tyro wraps its message at the terminal's width
            return tyro.cli(options, args=argv, prog=f"gossamer {command}", description=description, default=default)
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise UserError(f"{command}: {_one_line(caught.getvalue())}") from None
    finally:
        if columns is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = columns


def _one_line(panel: str) -> str:
    """The message of tyro's error panel, and the option it suggests."""
    lines = [line.strip("│╭╮╰╯─ ") for line in panel.splitlines()]
    lines = [line for line in lines if line.strip("-")][1:]  # without frames, rules and the title
    message = lines[0] if lines else "cannot read the command line"
    if message.endswith(":") and len(lines) > 1:
        message = f"{message} {lines[1]}"
    suggestions = [line.split()[0] for line in lines if line.startswith("--")]
    if message.startswith("Unrecognized") and suggestions:
        return f"{message} (did you mean {suggestions[0]}?)"
    if message.startswith("Unrecognized"):  # read before tyro, which does not know of them
        return message + nearest(message.partition(":")[2].split(",")[0].strip(), ["--method", "--layers"])
    return message
