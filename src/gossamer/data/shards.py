"""Tokenise once: documents become memory-mapped token ids in the cache folder, keyed by content."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.data.cache import cache_folder, digest, document_hash, partial
from gossamer.data.sources import Source
from gossamer.data.tokenizers import Tokenizer
from gossamer.errors import UserError

FORMAT = 1
_BATCH_CHARACTERS = 2**20
_PIECE_CHARACTERS = 2**22


@dataclass(frozen=True)
class Shards:
    """The tokens of a source, each document followed by eos."""

    tokens: NDArray[np.unsignedinteger]
    """(tokens,) uint16 or uint32, memory-mapped."""
    offsets: NDArray[np.int64]
    """(documents + 1,): document i is ``tokens[offsets[i] : offsets[i + 1]]``."""
    hashes: NDArray[np.uint64]
    """(documents,): hashes of the texts."""
    meta: dict[str, Any]
    """``description``, ``documents``, ``tokens``, ``skipped`` (passed-over documents by reason), ``key``."""


@dataclass(frozen=True)
class Budget:
    """Whole documents are taken until they hold ``tokens``, not counting eos, and counting at most ``per_document`` of
    each (None: all)."""

    tokens: int
    per_document: int | None = None


def open_shards(
    source: Source, tokenizer: Tokenizer, *, budget: Budget | None = None, without: Shards | None = None
) -> Shards:
    """The tokens of ``source`` from the cache, made first if they are not there.

    Documents that ``without`` holds too are left out. Raises ``UserError`` where no document is left.
    """
    limits = (budget.tokens, budget.per_document) if budget else None
    excluded = without.meta["key"] if without else None
    key = digest(FORMAT, source.fingerprint, tokenizer.fingerprint, limits, excluded)
    folder = cache_folder("shards") / key
    if (shards := _read(folder)) is None:
        _build(folder, source, tokenizer, budget, set(without.hashes.tolist()) if without else set())
        shards = _read(folder)
    if shards is None:
        raise OSError(f"the cache folder {folder} vanished while it was read")
    return shards


def _read(folder: Path) -> Shards | None:
    """The shards in ``folder``, or None where they are missing or not whole."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        offsets = np.load(folder / "offsets.npy")
        hashes = np.load(folder / "hashes.npy")
        tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r")
    except (OSError, ValueError, KeyError):
        return None
    whole = len(hashes) == len(offsets) - 1 == meta["documents"] and len(tokens) == offsets[-1] == meta["tokens"]
    return Shards(tokens, offsets, hashes, meta) if whole else None


def _build(folder: Path, source: Source, tokenizer: Tokenizer, budget: Budget | None, excluded: set[int]) -> None:
    with partial(folder.parent) as draft:
        _write(draft, folder.name, source, tokenizer, budget, excluded)
        try:
            draft.rename(folder)
        except OSError:
            # Another process was first, and its copy is as good; or a broken one lies there and makes way.
            if _read(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
                draft.rename(folder)


def _write(
    folder: Path, key: str, source: Source, tokenizer: Tokenizer, budget: Budget | None, excluded: set[int]
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    offsets, hashes, counted = [0], [], 0
    skipped: Counter[str] = Counter()
    with (folder / "tokens.bin").open("wb") as file, _progress(f"Tokenising {source.name}", budget) as report:
        for texts, text_hashes in _batches(source, skipped, excluded):
            for text_hash, ids in zip(text_hashes, _encode(tokenizer, texts), strict=True):
                if budget and counted >= budget.tokens:
                    break
                if not ids:
                    skipped["no tokens"] += 1
                    continue
                file.write(np.array([*ids, tokenizer.eos_id], dtype=dtype).tobytes())
                offsets.append(offsets[-1] + len(ids) + 1)
                hashes.append(text_hash)
                counted += min(len(ids), budget.per_document or len(ids)) if budget else len(ids)
            report(counted)
            if budget and counted >= budget.tokens:
                break
        file.flush()
        os.fsync(file.fileno())
    if not hashes:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise UserError(
            f"{source.name} holds no text to use" + (f" (documents passed over: {reasons})" * bool(reasons))
        )
    np.save(folder / "offsets.npy", np.array(offsets, dtype=np.int64))
    np.save(folder / "hashes.npy", np.array(hashes, dtype=np.uint64))
    meta = {
        "key": key,
        "description": source.describe(),
        "documents": len(hashes),
        "tokens": offsets[-1],
        "dtype": dtype.name,
        "skipped": dict(skipped),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _batches(source: Source, skipped: Counter[str], excluded: set[int]) -> Iterator[tuple[list[str], list[int]]]:
    """Documents and their hashes, about ``_BATCH_CHARACTERS`` at a time, without the ``excluded``."""
    texts, hashes, characters = [], [], 0
    for text in source.documents(skipped):
        text_hash = document_hash(text)
        if text_hash in excluded:
            skipped["also in validation"] += 1
            continue
        texts.append(text)
        hashes.append(text_hash)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield texts, hashes
            texts, hashes, characters = [], [], 0
    if texts:
        yield texts, hashes


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text; a very long one goes through the tokenizer in pieces, to bound its memory."""
    pieces = [list(_pieces(text)) for text in texts]
    encoded = iter(tokenizer.encode_batch([piece for parts in pieces for piece in parts]))
    return [[token for _ in parts for token in next(encoded)] for parts in pieces]


def _pieces(text: str) -> Iterator[str]:
    """``text`` cut where a word ends before white space: byte-level tokenizers cut there anyway."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        limit = start + _PIECE_CHARACTERS
        ends = (i for i in range(limit, start, -1) if text[i].isspace() and text[i - 1].isalnum())
        cut = next(ends, limit)
        yield text[start:cut]
        start = cut
    yield text[start:]


@contextmanager
def _progress(title: str, budget: Budget | None) -> Iterator[Callable[[int], None]]:
    """A function that shows how many tokens there are so far: a bar where stderr is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} tokens"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=budget.tokens if budget else None)
        yield lambda tokens: progress.update(task, completed=tokens)
