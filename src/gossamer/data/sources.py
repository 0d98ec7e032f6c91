"""Where documents come from: the standard library, local files, the Hugging Face hub."""

from __future__ import annotations

import glob
import gzip
import io
import json
import lzma
import os
import re
import sysconfig
import tokenize
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from gossamer.data.cache import bytes_digest, digest, document_hash, file_digest
from gossamer.errors import UserError, first_line, nearest

Part = Literal["train", "valid"]
STDLIB = "python-stdlib"
HUB = "hf:"
READABLE = (".txt", ".jsonl", *(f"{kind}{packed}" for kind in (".txt", ".jsonl") for packed in (".gz", ".xz", ".zst")))
READABLE += (".parquet",)
_ALLOWED = f"{STDLIB}, files or globs, hf:REPO[:CONFIG]"
_SURROGATE = re.compile("[\ud800-\udfff]")


class Source(ABC):
    """Documents in a fixed order."""

    name: str
    """As the user wrote it."""
    fingerprint: str
    """Changes when any document, or their order, does."""
    places: list[str]
    """The files or folders read."""
    streamed: bool = False
    """Too long to be read whole: only a prefix is taken."""

    @abstractmethod
    def describe(self) -> str:
        """What is read, for people; may read some of it."""

    @abstractmethod
    def documents(self, skipped: Counter[str]) -> Iterator[str]:
        """Every document that holds text; what is passed over is counted in ``skipped`` by reason."""


def open_sources(data: str, valid: str | None, text_field: str) -> tuple[Source, Source]:
    """The training and the validation source (see ``DataConfig``). Raises ``UserError`` where one cannot be read."""
    train = open_source(data, "train", text_field)
    if valid is not None:
        return train, open_source(valid, "valid", text_field)
    if isinstance(train, StandardLibrary):
        return train, StandardLibrary("valid")
    if isinstance(train, Hub) and "validation" in train.splits:
        return train, Hub(train.name, "validation", text_field)
    if isinstance(train, Files) and (siblings := _validation_siblings(train.paths)):
        names = ", ".join(path.name for path in siblings)
        return train, Files(names, siblings, text_field, f"{names}, found beside the training files")
    return HeldOut(train, "train"), HeldOut(train, "valid")


def open_source(name: str, part: Part, text_field: str) -> Source:
    """The source that a name stands for, alone."""
    if name == STDLIB:
        return StandardLibrary(part)
    if name.startswith(HUB):
        return Hub(name, "train" if part == "train" else "validation", text_field)
    return Files(name, _find_files(name), text_field, name)


class StandardLibrary(Source):
    """The .py files of the running interpreter's standard library without its tests; about 5 % are validation."""

    _excluded = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

    def __init__(self, part: Part):
        root = Path(sysconfig.get_paths()["stdlib"])
        names: list[str] = []
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = set(subfolders) - self._excluded
            names += [Path(folder, file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
        self._files = [root / name for name in sorted(names) if (document_hash(name) % 20 == 0) == (part == "valid")]
        self.name = STDLIB
        self.fingerprint = digest(STDLIB, [bytes_digest(path.read_bytes()) for path in self._files])
        self.places = [str(root)]
        self._part = part

    def describe(self) -> str:
        return f"{len(self._files)} files of the Python standard library ({self._part} part)"

    def documents(self, skipped: Counter[str]) -> Iterator[str]:
        for path in self._files:
            try:
                with tokenize.open(path) as file:
                    text = file.read()
            except (SyntaxError, UnicodeDecodeError):
                skipped["undecodable"] += 1
                continue
            yield from _usable([text], skipped)


class Files(Source):
    """Local files. A .txt file is one document; a .jsonl line or a .parquet row is one, read from ``text_field``."""

    def __init__(self, name: str, paths: list[Path], text_field: str, description: str):
        self.name = name
        self.paths = paths
        self.fingerprint = digest("files", text_field, [(_suffix(path), file_digest(path)) for path in paths])
        self.places = [str(path) for path in paths]
        self._text_field, self._description = text_field, description

    def describe(self) -> str:
        return self._description

    def documents(self, skipped: Counter[str]) -> Iterator[str]:
        for path in self.paths:
            yield from _usable(self._read(path), skipped)

    def _read(self, path: Path) -> Iterator[str]:
        suffix = _suffix(path)
        with reading(path):
            if suffix == ".parquet":
                yield from self._read_parquet(path)
            elif suffix.startswith(".txt"):
                with open_binary(path) as file:
                    yield file.read().decode("utf-8-sig")
            else:
                with open_binary(path) as file:
                    yield from self._read_jsonl(path, file)

    def _read_jsonl(self, path: Path, lines: Iterable[bytes]) -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            yield _text_of(parse_line(line, where), self._text_field, where)

    def _read_parquet(self, path: Path) -> Iterator[str]:
        from pyarrow.parquet import ParquetFile

        with ParquetFile(path) as file:
            fields = file.schema_arrow.names
            if self._text_field not in fields:
                raise UserError(_missing_field(self._text_field, fields, f"{path}, row 1"))
            number = 0
            for rows in file.iter_batches(batch_size=1024, columns=[self._text_field]):
                for record in rows.to_pylist():
                    number += 1
                    yield _text_of(record, self._text_field, f"{path}, row {number}")


class Hub(Source):
    """One split of a Hugging Face dataset (or of a local dataset folder), streamed. ``name`` is ``hf:REPO[:CONFIG]``.

    The fingerprint holds the repository's commit (for a local folder the files' digests), so that a new revision is
    read anew; finding it out needs the network.
    """

    streamed = True

    def __init__(self, name: str, split: str, text_field: str):
        from datasets import load_dataset_builder

        repo, _, config = name.removeprefix(HUB).partition(":")
        if not repo:
            raise UserError(f"{name!r} names no dataset; write hf:REPO or hf:REPO:CONFIG")
        try:
            self._builder = load_dataset_builder(repo, config or None)
        except Exception as error:  # network, hub and format errors have no common class
            raise UserError(f"cannot open {name}: {first_line(error)}") from error
        files: Any = self._builder.config.data_files or {}
        self.splits = list(map(str, files))
        if split not in self.splits:
            raise UserError(f"{name} has no {split} split; it has: {', '.join(self.splits) or 'none'}")
        self.name = name
        self.places = [name]
        names = list(map(str, files[split]))
        local = all(map(os.path.isfile, names))
        version = list(map(file_digest, map(Path, names))) if local else str(files[split].origin_metadata)
        self.fingerprint = digest(HUB, repo, config, split, text_field, names, version)
        self._split, self._text_field = split, text_field

    def describe(self) -> str:
        return f"the {self._split} split of {self.name}"

    def documents(self, skipped: Counter[str]) -> Iterator[str]:
        records = self._builder.as_streaming_dataset(split=self._split)
        texts = (
            _text_of(dict(record), self._text_field, f"{self.name}, {self._split} record {number}")
            for number, record in enumerate(records, start=1)
        )
        yield from _usable(texts, skipped)


class HeldOut(Source):
    """One part of a source that brings no validation data: about 1 % of its documents, chosen by a hash of their
    text, are validation, so equal documents fall on one side. Of a single document it is the last 5 % of the text."""

    _probe = 2000

    def __init__(self, source: Source, part: Part):
        self._source, self._part = source, part
        self.name, self.places, self.streamed = source.name, source.places, source.streamed
        self.fingerprint = digest("held out", part, source.fingerprint)

    def describe(self) -> str:
        share = "the last 5 % of the text" if self._cutoff is None else "about 1 % of the documents"
        kept = f"{share} of {self.name}, held out of training"
        return kept if self._part == "valid" else f"{self.name} without {kept}"

    @cached_property
    def _cutoff(self) -> int | None:
        """Documents whose hash is below it are validation; None: there is but one document."""
        hashes = {document_hash(text) for text in islice(self._source.documents(Counter()), self._probe)}
        if len(hashes) < 2:
            return None
        percent = 2**64 // 100
        # Of few documents the hash may pick none, or all: then exactly one is held out.
        return percent if min(hashes) < percent <= max(hashes) else min(hashes) + 1

    def documents(self, skipped: Counter[str]) -> Iterator[str]:
        cutoff, valid = self._cutoff, self._part == "valid"
        for text in self._source.documents(skipped):
            if cutoff is not None:
                if (document_hash(text) < cutoff) == valid:
                    yield text
                continue
            cut = len(text) * 95 // 100
            cut = text.rfind("\n", cut - len(text) // 100, cut) + 1 or cut  # between lines where one ends nearby
            yield from _usable([text[cut:] if valid else text[:cut]], skipped)


def _usable(texts: Iterable[str], skipped: Counter[str]) -> Iterator[str]:
    for text in texts:
        if not text or text.isspace():
            skipped["empty"] += 1
        elif not text.isascii() and _SURROGATE.search(text):  # JSON can spell half a character; no tokenizer takes it
            skipped["undecodable"] += 1
        else:
            yield text


def _suffix(path: Path) -> str:
    return next((suffix for suffix in reversed(READABLE) if path.name.lower().endswith(suffix)), "")


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """One line's JSON object. A `UserError` that begins with `where` if it is none."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({first_line(error)})") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, not {type(record).__name__}")
    return record


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever reading a file raises is one line that names it."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except Exception as error:  # each decompressor and pyarrow has errors of its own
        raise UserError(f"cannot read {path}: {first_line(error)}") from error


def open_binary(path: Path) -> BinaryIO:
    """A file's bytes, unpacked if its name says that they are packed."""
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path)  # pyright: ignore[reportReturnType]
        case ".xz":
            return lzma.open(path)  # pyright: ignore[reportReturnType]
        case ".zst":
            import zstandard

            return io.BufferedReader(zstandard.open(path))  # pyright: ignore[reportArgumentType]
        case _:
            return path.open("rb")


def _find_files(names: str) -> list[Path]:
    """The files a comma-separated list of paths and globs stands for: each once, in the order given, globs sorted."""
    paths: dict[Path, Path] = {}
    for name in filter(None, map(str.strip, names.split(","))):
        path = Path(name).expanduser()
        if path.is_dir():
            raise UserError(f"{name} is a folder; name its files, such as {name.rstrip('/')}/*.jsonl")
        if path.exists():
            found = [path]
        elif glob.has_magic(name):
            hits = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            found = [hit for hit in map(Path, sorted(hits)) if hit.is_file()]
            if not found:
                raise UserError(f"no file matches {name}")
        else:
            raise UserError(
                f"no such file: {name}{nearest(name, [STDLIB])}; allowed: {STDLIB}, files or globs, hf:REPO"
            )
        for hit in found:
            if not _suffix(hit):
                raise UserError(f"cannot read {hit}: unknown kind of file; allowed: {', '.join(READABLE)}")
            paths.setdefault(hit.resolve(), hit)
    if not paths:
        raise UserError(f"{names!r} names no data; allowed: {_ALLOWED}")
    return list(paths.values())


def _validation_siblings(paths: list[Path]) -> list[Path]:
    """Readable files named valid*, validation* or else dev* in the folders of ``paths`` and not among them."""
    used = {path.resolve() for path in paths}
    folders = dict.fromkeys(path.resolve().parent for path in paths)
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file() and _suffix(path)]
    for word in ("valid(ation)?", "dev"):
        # A whole word: `devices.txt` is not a development set.
        pattern = re.compile(rf"{word}(?![a-z])", re.IGNORECASE)
        if found := [path for path in files if pattern.match(path.name) and path not in used]:
            return found
    return []


def _text_of(record: dict[str, object], field: str, where: str) -> str:
    if field not in record:
        raise UserError(_missing_field(field, record, where))
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is not text but {type(text).__name__}")
    return text


def _missing_field(field: str, fields: Iterable[str], where: str) -> str:
    fields = list(fields)
    return f"{where}: no field {field!r}{nearest(field, fields)}; it has: {', '.join(fields) or 'none'}"
