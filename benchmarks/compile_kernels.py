"""What the compiler makes of the Triton kernels on an H100 or H200, without one.

    python benchmarks/compile_kernels.py            # all variants, about a minute

It writes results/kernels_sm90.jsonl and the table of docs/kernels.md.

Each variant is compiled for compute capability 9.0 with the `ptxas` that Triton brings, and its machine code is read:
registers, stack (what does not fit into registers is spilled there, and the kernel is lost), shared memory, and the
instructions of each main loop for each weight. `tests/test_kernels.py` holds the code to the rows of the file.

These are counts, not times: no kernel was timed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gossamer.kernels import adamw, cholesky, factors, lora_pre

ROWS = Path(__file__).parents[1] / "results" / "kernels_sm90.jsonl"
PAGE = ROWS.parents[1] / "docs" / "kernels.md"
MARK = "<!-- written by benchmarks/compile_kernels.py -->"
TARGET = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TYPES = {"bf16": tl.bfloat16, "fp32": tl.float32}


@dataclass(frozen=True)
class Variant:
    """One kernel with its constants.

    Args:
        name: of the kernel. fn: itself.
        types: of its arguments that are no constants, "*fp32", "i32" and the like.
        constants: its constexprs; "bf16" and "fp32" stand for the types.
        loops: for each main loop, in the order of the code, what it is called and how many weights one turn takes;
            empty for a kernel that takes `weights` at once.
        divisible: integer arguments that are multiples of 16. Pointers always are.
    """

    name: str
    fn: Any
    types: dict[str, str]
    constants: dict[str, Any]
    loops: dict[str, int]
    warps: int
    stages: int = 3
    weights: int = 0
    divisible: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """What was read from a variant's machine code."""

    kernel: str
    constants: dict[str, Any]
    warps: int
    stages: int
    registers: int
    stack: int
    """Bytes of a thread."""
    shared: int
    """Bytes of a program."""
    instructions: dict[str, float] = field(default_factory=dict)
    """For one weight, of each main loop."""
    triton: str = triton.__version__
    target: str = "sm_90"


def lora_pre_variants() -> Iterable[Variant]:
    """The step at every tile that ships: both tasks in one grid, and the columns' own launch."""
    ranks = {"bf16": (16, 32, 64, 128), "fp32": (16, 32, 64)}
    for dtype, aligned in (("bf16", True), ("bf16", False), ("fp32", True), ("fp32", False)):
        for rank in ranks[dtype]:
            tile = lora_pre.tiles(rank, DTYPES[dtype], aligned)
            kinds = {"rows": tile.BM * tile.BN, "columns": tile.CM * tile.CN}
            for rows, columns in ((False, True), (True, False), (True, True)):
                if (not rows or not columns) and not (aligned and dtype == "bf16"):
                    continue
                types = dict.fromkeys(("weights", "grads"), "*i64") | {"numbers": "*fp32"}
                types |= dict.fromkeys(("m_left", "m_right", "v_left", "v_right"), "*bf16")
                types |= dict.fromkeys(("m_left_whole", "v_left_whole"), "*bf16")
                types |= dict.fromkeys(("m_seen", "v_seen", "m_seen_below", "v_seen_below"), "*fp32")
                types |= dict.fromkeys(("M", "N", "STRIDE"), "i32")
                constants = {
                    "ROWS": rows, "COLUMNS": columns, "R": rank, "BM": tile.BM, "BN": tile.BN, "CM": tile.CM,
                    "CN": tile.CN, "WEIGHT": dtype, "GRAD": dtype, "ALIGNED": aligned, "STOCHASTIC": dtype == "bf16",
                    "PIECES": lora_pre.PIECES[DTYPES[dtype]], "FAST": True, "DOT_F32": False,
                }  # fmt: skip
                yield Variant(
                    "lora_pre.both",
                    lora_pre.both,
                    types,
                    constants,
                    {k: v for k, v in kinds.items() if (k == "rows" and rows) or (k == "columns" and columns)},
                    tile.warps,
                    tile.stages,
                    divisible=("M", "N", "STRIDE") if aligned else ("M",),
                )


def factors_variants() -> Iterable[Variant]:
    """Both passes: of MLorc ("floored"), and of the tracker with its tail. For bf16 rows at 16 bytes, of each kind."""
    ranks = {"bf16": (16, 32, 64, 128), "fp32": (16, 32, 64)}
    for dtype, aligned in (("bf16", True), ("bf16", False), ("fp32", True), ("fp32", False)):
        some = ("rows-columns", "floored", "square")
        for kind in ("none", "absolute", *some) if dtype == "bf16" and aligned else some:
            for rank in ranks[dtype]:
                yield factors_variant("sketch", kind, rank, dtype, aligned)
                yield factors_variant("update", kind, rank, dtype, aligned)


def factors_variant(name: str, kind: str, rank: int, dtype: str, aligned: bool) -> Variant:
    tile = factors.tile(name, kind, rank, DTYPES[dtype], aligned)
    factored, tail = kind in factors.FACTORED, kind != "floored"
    types = dict.fromkeys(("params", "grads"), "*i64") | dict.fromkeys(("bound", "eps"), "fp32")
    types |= dict.fromkeys(("numbers", "m_A", "m_Y", "m_P", "rows", "columns", "below", "floor", "sums"), "*fp32")
    types |= dict.fromkeys(("m_W", "m_B", "m_N", *(("m_I",) if tail else ())), "*bf16")
    types |= dict.fromkeys(("M", "N", "WIDTH"), "i32")
    if factored:
        types |= dict.fromkeys(("v_W", "v_B", "v_A", "v_N"), "*bf16") | dict.fromkeys(
            ("v_Y", "v_P", "below_Y"), "*fp32"
        )
    constants = {
        "R": rank, "SECOND": kind, "BM": tile["BM"], "BN": tile["BN"], "GRAD": dtype, "ALIGNED": aligned,
        "PIECES": lora_pre.PIECES[DTYPES[dtype]], "DOT_F32": False,
    }  # fmt: skip
    if name == "update":
        constants |= {"STEP": True, "TAIL": tail, "STOCHASTIC": dtype == "bf16", "WEIGHT": dtype, "FAST": True}
    fn, size = getattr(factors, name), tile["BM"] * tile["BN"]
    return Variant(
        f"factors.{name}",
        fn,
        {argument: kind for argument, kind in types.items() if argument in fn.arg_names},
        constants,
        {**({"tail": size} if tail and name == "update" else {}), name: size},
        tile["num_warps"],
        tile["num_stages"],
        divisible=("M", "N", "WIDTH") if aligned else ("WIDTH",),
    )


def adamw_variants() -> Iterable[Variant]:
    types = dict.fromkeys(("weights", "grads", "ms", "vs"), "*i64") | {"numbers": "*fp32"}
    types |= dict.fromkeys(("own_m", "beta2", "own_v", "bound"), "fp32") | {"SIZE": "i32"}
    for dtype in TYPES:
        for aligned in (True, False):
            constants = {
                "BLOCK": adamw.BLOCK, "WEIGHT": dtype, "GRAD": dtype, "ALIGNED": aligned,
                "STOCHASTIC": dtype == "bf16", "FAST": True,
            }  # fmt: skip
            divisible = ("SIZE",) if aligned else ()
            yield Variant("adamw.adamw", adamw.adamw, types, constants, {}, 4, weights=adamw.BLOCK, divisible=divisible)


def cholesky_variants() -> Iterable[Variant]:
    types = dict.fromkeys(("a_", "lower_", "inverse_"), "*fp32") | {"r": "i32"}
    for size in (16, 32, 64):
        fn, warps = cholesky._cholesky_inverse, cholesky.warps(size)
        yield Variant("cholesky", fn, types, {"SIZE": size}, {"step": size * size}, warps, divisible=("r",))


def variants() -> list[Variant]:
    return [*lora_pre_variants(), *factors_variants(), *adamw_variants(), *cholesky_variants()]


def measure(variant: Variant) -> Row:
    """Compile and read."""
    names = variant.fn.arg_names
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if variant.types.get(name, "").startswith("*") or name in variant.divisible
    }
    absent = [name for name in names if name not in variant.types]  # None, if no constant either
    constants: dict[str, Any] = {**dict.fromkeys(absent), **variant.constants}
    source = ASTSource(
        variant.fn,
        {name: variant.types.get(name, "constexpr") for name in names},
        {name: TYPES.get(value, value) for name, value in constants.items()},
        attributes,
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=TARGET, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage, code = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))  # pyright: ignore
    threads, counts = 32 * variant.warps, main_loops(code)
    if variant.loops:
        if len(counts) != len(variant.loops):
            raise RuntimeError(f"{key(variant)}: {len(counts)} loops in the machine code, not {len(variant.loops)}")
        each = {
            name: round(count * threads / weights, 1)
            for (name, weights), count in zip(variant.loops.items(), counts, strict=True)
        }
    else:
        each = {"all": round(len(instructions(code)) * threads / variant.weights, 1)}
    return Row(
        variant.name, variant.constants, variant.warps, variant.stages, registers, stack, compiled.metadata.shared, each
    )


def instructions(code: str) -> list[tuple[int, str]]:
    """Address and text of each instruction, without the padding at the end."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found if not text.startswith("NOP")]


def main_loops(code: str) -> list[int]:
    """How many instructions each loop has, in the order of the code.

    A loop ends with a jump back; one over an exit is the way back from code that was put aside, and one of a few
    instructions waits for something.
    """
    program = instructions(code)
    lengths = []
    for address, text in program:
        jump = re.search(r"\bBRA\S*\s.*?(0x[0-9a-f]+)", text)
        if jump is None or int(jump[1], 16) >= address:
            continue
        inside = [t for a, t in program if int(jump[1], 16) <= a <= address]
        if len(inside) > 16 and not any(re.search(r"\bEXIT\b", t) for t in inside):
            lengths.append(len(inside))
    return lengths


def committed() -> dict[str, Row]:
    """The rows of the file."""
    rows = [Row(**json.loads(line)) for line in ROWS.read_text().splitlines()]
    return {key(row): row for row in rows}


def key(row: Row | Variant) -> str:
    """What a variant and its row have in common."""
    name = row.kernel if isinstance(row, Row) else row.name
    return json.dumps([name, row.constants, row.warps, row.stages], sort_keys=True)


def table(rows: Iterable[Row]) -> str:
    """Markdown, for `docs/kernels.md`."""
    lines = [
        "| kernel | weights | rank | rows at 16 bytes | tiles | warps | registers | stack | shared | for each weight |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        c = row.constants
        tiles = ", ".join(f"{c[a]}x{c[b]}" for a, b in (("BM", "BN"), ("CM", "CN")) if a in c and b in c)
        each = ", ".join(f"{name} {count}" for name, count in row.instructions.items())
        aligned = {True: "yes", False: "no"}.get(c.get("ALIGNED"), "-")  # pyright: ignore
        cells = (
            f"{row.kernel} {c.get('SECOND', '')}".strip(), c.get("GRAD", "-"), c.get("R", c.get("SIZE", "-")), aligned,
            tiles or c.get("BLOCK", "-"), row.warps, row.registers, row.stack, f"{row.shared / 1024:.0f} KiB", each,
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    rows = [measure(variant) for variant in variants()]
    ROWS.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    text, _, _ = PAGE.read_text().partition(MARK)
    PAGE.write_text(f"{text}{MARK}\n\n{table(rows)}\n")
    print(table(rows))
    spilled = [row for row in rows if row.stack]
    sys.exit(f"{len(spilled)} variants spill" if spilled else 0)


if __name__ == "__main__":
    main()
