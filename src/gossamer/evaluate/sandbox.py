"""Running programs that nobody has read: in a process of their own, without network, with little of everything.

This is no prison: such a program can read what its user can read. Run it where that does no harm.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NAMESPACE = "network and process namespaces of its own"
BLOCKED = "sockets blocked in Python"
_UNSHARE = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--")
_TAIL = 2000

# What the child runs: limits first, then the program, then the word that only its caller knows. A program that ends
# early, with whatever exit code, never says the word.
_CHILD = """
import os, resource, sys
path, word, channel, seconds, memory, size, block = sys.argv[1:]
for limit, most in ((resource.RLIMIT_CPU, int(seconds)), (resource.RLIMIT_AS, int(memory)),
                    (resource.RLIMIT_FSIZE, int(size)), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (most, most))
if block == "1":
    import socket
    def refuse(*args, **kwargs):
        raise PermissionError("no network here")
    socket.socket = socket.create_connection = socket.getaddrinfo = refuse
sys.argv = [path]
with open(path, encoding="utf-8") as file:
    program = compile(file.read(), path, "exec")
exec(program, {"__name__": "__main__", "__file__": path})
os.write(int(channel), word.encode())
"""


@dataclass(frozen=True)
class Execution:
    """How a program ended."""

    passed: bool
    """It ran to its end without an exception."""
    reason: str
    """`passed`, `failed`, `timeout`, or the signal that ended it."""
    output: str
    """The end of what it wrote to stdout and stderr."""


@cache
def isolation() -> str:
    """How programs are kept off the network here: `NAMESPACE` where the system allows it, else `BLOCKED`."""
    if shutil.which("unshare") is None:
        return BLOCKED
    probe = subprocess.run([*_UNSHARE, "true"], capture_output=True)
    return NAMESPACE if probe.returncode == 0 else BLOCKED


def execute(program: str, *, seconds: int = 20, memory: int = 4 * 2**30, file_size: int = 16 * 2**20) -> Execution:
    """Run a Python program in an empty temporary directory, which is deleted afterwards.

    Args:
        seconds: of processor time, and of the clock.
        memory: bytes of address space. file_size: bytes of any one file, its output included.
    """
    word = secrets.token_hex(16)
    own = isolation() == NAMESPACE
    with tempfile.TemporaryDirectory(prefix="gossamer-") as folder:
        source, output = Path(folder, "program.py"), Path(folder, "output")
        source.write_text(program, encoding="utf-8", errors="replace")
        listen, channel = os.pipe()
        limits = [str(value) for value in (seconds, memory, file_size)]
        words = [sys.executable, "-I", "-c", _CHILD, str(source), word, str(channel), *limits, "0" if own else "1"]
        with output.open("wb") as file:
            child = subprocess.Popen(
                [*_UNSHARE, *words] if own else words,
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(channel,),
                start_new_session=True,
            )
        os.close(channel)
        try:
            code: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        # what outlives its parent may hold the other end open: read what is there, wait for nothing
        os.set_blocking(listen, False)
        with open(listen, "rb", buffering=0) as said:  # noqa: PTH123
            passed = code == 0 and said.read(len(word)) == word.encode()
        tail = output.read_bytes()[-_TAIL:].decode("utf-8", "replace")
    if code is None:
        return Execution(False, "timeout", tail)
    if passed:
        return Execution(True, "passed", tail)
    ended = code - 128 if code > 128 else -code  # as `unshare` says it, and as Popen does
    known = ended in (signal.SIGKILL, signal.SIGXCPU, signal.SIGXFSZ, signal.SIGSEGV)
    return Execution(False, signal.Signals(ended).name if known else "failed", tail)
