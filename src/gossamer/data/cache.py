"""The cache folder, and content digests for what is kept there."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
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
    """Digest of a file's bytes, remembered by (path, size, modification time) so that big files are read once."""
    status = path.stat()
    memo = cache_folder("digests") / digest(str(path.resolve()), status.st_size, status.st_mtime_ns)
    if memo.exists():
        return memo.read_text()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    # A file written a moment ago may change again within one tick of the file system's clock: do not remember it yet.
    if time.time() - status.st_mtime > 2:
        write_atomically(memo, found)
    return found


def write_atomically(path: Path, text: str) -> None:
    """Write ``path`` whole or not at all, also where several processes write it at once."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
