"""The cache folder, and content digests for what is kept there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from gossamer.errors import UserError


def cache_folder(kind: str) -> Path:
    """``$GOSSAMER_CACHE/kind`` (default ``~/.cache/gossamer/kind``), made if missing."""
    folder = Path(os.environ.get("GOSSAMER_CACHE") or "~/.cache/gossamer").expanduser() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the cache folder {folder} ({error.strerror}); set GOSSAMER_CACHE") from error
    return folder


def digest(*parts: object) -> str:
    """32 hex digits that stand for ``parts`` (anything json can write)."""
    return bytes_digest(json.dumps(parts).encode())


def bytes_digest(content: bytes) -> str:
    """32 hex digits that stand for ``content``."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def document_hash(text: str) -> int:
    """A stable 64-bit hash of a document's text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def file_digest(path: Path) -> str:
    """Digest of a file's bytes, remembered so that big files are read once.

    It is remembered by path, size, inode and the times of the last change of content and of inode: whoever writes to a
    file can set back the former time, as `rsync -t` and `touch` do, and not the latter.
    """
    status = path.stat()
    version = status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
    memo = cache_folder("digests") / digest(str(path.resolve()), version)
    if memo.exists():
        return memo.read_text()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    # A file written a moment ago may change again within one tick of the file system's clock: do not remember it yet.
    if time.time() - status.st_ctime > 2:
        write_atomically(memo, found)
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all, also where several processes write it at once."""
    with partial(path.parent) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")
        (folder / path.name).replace(path)


@contextlib.contextmanager
def partial(parent: Path) -> Iterator[Path]:
    """A folder in ``parent`` to make something in that is then renamed out of it or as a whole; what stays is deleted.

    What a killed process left behind is deleted by the next one that comes: a folder is locked while its maker lives.
    """
    for left in parent.glob(".partial-*"):
        _delete_abandoned(left)
    folder = Path(tempfile.mkdtemp(dir=parent, prefix=".partial-"))
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock)
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _delete_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError):  # another process deletes it, or it has just been renamed
        if time.time() - folder.stat().st_ctime < 60:
            return  # its maker may not have come to lock it yet
        lock = os.open(folder, os.O_RDONLY)
        try:
            if _lock(lock):
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
        finally:
            os.close(lock)


def _lock(descriptor: int) -> bool:
    """Whether the lock is ours now; never where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
