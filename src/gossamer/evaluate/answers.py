"""Final answers of mathematical problems: finding them in a text, and telling whether two are equal."""

from __future__ import annotations

import importlib.util
import json
import re
import select
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from gossamer.errors import UserError

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_ANSWER_IS = re.compile(r"answer is:?", re.IGNORECASE)


def final_answer(text: str) -> str | None:
    """What follows the last `####`, or else "answer is"; else the last \\boxed, the last number, or None."""
    if "####" in text:
        return _tidy(text.rpartition("####")[2].strip().partition("\n")[0])
    if said := [match.end() for match in _ANSWER_IS.finditer(text)]:
        return _tidy(text[said[-1] :].strip().partition("\n")[0])
    if (boxed := _last_boxed(text)) is not None:
        return _tidy(boxed)
    numbers = _NUMBER.findall(text)
    return _tidy(numbers[-1]) if numbers else None


def _last_boxed(text: str) -> str | None:
    """What the braces of the last \\boxed{...} hold, or the word after \\boxed."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed", text)]):
        rest = text[start:].lstrip()
        if not rest.startswith("{"):
            return rest.split("$")[0].split()[0] if rest.split("$")[0].split() else None
        depth = 0
        for place, character in enumerate(rest):
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return rest[1:place]
    return None


def _tidy(answer: str) -> str | None:
    """Without the dollars of LaTeX and the full stop of a sentence."""
    answer = answer.strip().removesuffix(".").strip()
    if len(answer) > 1 and answer.startswith("$") and answer.endswith("$"):
        answer = answer.strip("$").strip().removesuffix(".")
    return answer or None


class Verifier:
    """Tells equal answers from different ones by `math-verify`, in a process that is killed after `seconds` a pair.

    Used as a context: `with Verifier() as verifier: verifier("1/2", "0.5")`.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("math answers need math-verify, which is not installed; pip install 'gossamer[eval]'")
        self.seconds = seconds
        self._worker: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._kill()

    def __call__(self, gold: str, answer: str | None) -> dict[str, Any]:
        """`equal`, by which of `text` or `math-verify`, and what could not be read or was too slow.

        Answers of the same characters are equal, whether or not anybody can read them.
        """
        if answer is None:
            return {"equal": False, "why": "no answer"}
        if "".join(gold.split()) == "".join(answer.split()):
            return {"equal": True, "by": "text"}
        said = self.compare(gold, answer)
        if said is None:
            return {"equal": False, "why": f"timeout after {self.seconds:g} s"}
        if said["equal"]:
            return {"equal": True, "by": "math-verify"}
        unread = [name for name, read in zip(("gold", "answer"), said["read"], strict=True) if not read]
        return {"equal": False, "why": f"{' and '.join(unread)} unreadable" if unread else "different"}

    def compare(self, gold: str, answer: str) -> dict[str, Any] | None:
        """What `math-verify` alone says: `equal`, and of each whether it could be `read`; None: not in time."""
        worker = self._worker = self._worker or self._start()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
            worker.stdin.flush()
            # the first answer also waits for the imports
            ready, _, _ = select.select([worker.stdout], [], [], self.seconds + (0 if self._warm else 60))
            line = worker.stdout.readline() if ready else b""
        except BrokenPipeError:
            line = b""
        self._warm = True
        if not line:  # too slow, or gone: sympy recurses deeply on some inputs
            self._kill()
            return None
        return json.loads(line)

    def _start(self) -> subprocess.Popen[bytes]:
        self._warm = False
        path = Path(__file__).with_name("math_worker.py")
        return subprocess.Popen(
            [sys.executable, "-I", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def _kill(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None
