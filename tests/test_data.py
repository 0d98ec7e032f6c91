"""Data: every source reads back, splits are disjoint, no token is lost, the order is the seed's, the cache honest."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import gossamer.data as data
from gossamer.data import DataConfig, Tokenizer, TokenStream, open_corpus, shards
from gossamer.data.cache import partial
from gossamer.data.shards import Budget, Shards, open_shards
from gossamer.data.sources import Files, HeldOut, Source, StandardLibrary, open_sources
from gossamer.data.tokenizers import FastTokenizer, open_tokenizer, train_bpe
from gossamer.errors import UserError

TEXTS = [f"Document {i}:\n  {'häßlich 日本 🙂 ' * (i % 7)}{'word ' * (i * 5 % 31)}\r\n\n end {i}" for i in range(60)]
HARD_TEXT = "  Two  spaces,\ttab\n\n\nnew lines <|endoftext|></s> é 日本 🙂 don't 1234 \x00 end "


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    return tmp_path / "cache"


class Documents(Source):
    """A source of given texts."""

    def __init__(self, texts: list[str]):
        self.texts, self.name, self.places = texts, "some texts", []
        self.fingerprint = data.shards.digest(texts)

    def describe(self) -> str:
        return "some texts"

    def documents(self, skipped: Counter[str]) -> Iterator[str]:
        yield from self.texts


class Bytes(Tokenizer):
    """Ids are UTF-8 bytes; counts the documents it has encoded."""

    name, vocab_size, eos_id, fingerprint = "bytes", 257, 256, "bytes"

    def __init__(self):
        self.encoded = 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.encoded += len(texts)
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode()

    def save(self, folder: Path) -> None:
        raise NotImplementedError


def read(source: Source) -> list[str]:
    return list(source.documents(Counter()))


def stream(texts: list[str], seq_len: int, packing: bool = True, keep_tail: bool = False) -> TokenStream:
    made = open_shards(Documents(texts), Bytes())
    return TokenStream(made, seq_len=seq_len, packing=packing, keep_tail=keep_tail, eos_id=256, name="texts")


def concatenated(texts: list[str]) -> list[int]:
    return [token for text in texts for token in [*text.encode(), 256]]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    lines = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))
    path.write_text(lines, encoding="utf-8")
    return path


def one_line(error: pytest.ExceptionInfo[UserError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} not in {message!r}"


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_every_text_format_reads_back(tmp_path: Path, kind: str, suffix: str):
    import zstandard

    texts = TEXTS[:1] if kind == ".txt" else TEXTS
    lines = texts[0] if kind == ".txt" else "".join(json.dumps({"text": text}) + "\n\n" for text in texts)
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix]
    path = tmp_path / f"books{kind}{suffix}"
    path.write_bytes(pack(lines.encode()))
    assert read(open_sources(str(path), str(path), "text")[0]) == texts


def test_parquet_reads_back(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "books.parquet"
    parquet.write_table(pa.table({"id": list(range(60)), "body": TEXTS}), path)
    assert read(open_sources(str(path), str(path), "body")[0]) == TEXTS
    with pytest.raises(UserError) as error:
        read(open_sources(str(path), str(path), "text")[0])
    one_line(error, str(path), "'text'", "id, body")


def test_globs_and_lists_name_each_file_once_in_order(tmp_path: Path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/er/c.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    source = open_sources(f"{tmp_path}/b.txt, {tmp_path}/**/*.txt", f"{tmp_path}/a.txt", "text")[0]
    assert read(source) == ["text of b.txt", "text of a.txt", "text of deep/er/c.txt"]


def test_huggingface_dataset_is_streamed(tmp_path: Path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", TEXTS)
    train, valid = open_sources(f"hf:{folder}", None, "text")
    assert isinstance(valid, HeldOut) and train.streamed and valid.streamed
    assert sorted(read(train) + read(valid)) == sorted(TEXTS)
    write_jsonl(folder / "validation.jsonl", ["held out text"])
    train, valid = open_sources(f"hf:{folder}", None, "text")
    assert (read(train), read(valid)) == (TEXTS, ["held out text"])
    assert valid.describe() == f"the validation split of hf:{folder}"
    with pytest.raises(UserError) as error:
        read(open_sources(f"hf:{folder}", None, "body")[0])
    one_line(error, "record 1", "'body'", "id, text")


def test_stream_is_read_only_as_far_as_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", [f"{i:02} " + "x" * 97 for i in range(50)])
    write_jsonl(folder / "validation.jsonl", ["held out text"])
    monkeypatch.setattr(data, "open_tokenizer", lambda *_: Bytes())
    for packing in (True, False):
        config = DataConfig(data=f"hf:{folder}", seq_len=20, packing=packing)
        corpus = open_corpus(config, train_tokens=980)
        assert corpus.train.num_rows * 20 >= 980  # no row is seen twice
        assert corpus.description["train"]["documents"] == (10 if packing else 50)
    assert open_corpus(DataConfig(data=f"hf:{folder}", seq_len=20)).train.num_tokens == 50 * 101
    # of validation as well, a document counts for what its row predicts
    write_jsonl(folder / "validation.jsonl", [f"v{i} " + "x" * 97 for i in range(30)])
    monkeypatch.setattr(data, "STREAMED_VALIDATION_TOKENS", 400)
    for packing, documents in ((True, 4), (False, 20)):
        corpus = open_corpus(DataConfig(data=f"hf:{folder}", seq_len=20, packing=packing))
        assert corpus.description["valid"]["documents"] == documents
        assert corpus.valid.rows_of(400) == 20


def test_budget_takes_whole_documents_and_counts_what_a_row_can_use():
    texts = ["abcdefgh", "ij", "klmnop", "q"]
    made = open_shards(Documents(texts), Bytes(), budget=Budget(9))
    assert made.tokens.tolist() == concatenated(texts[:2])
    made = open_shards(Documents(texts), Bytes(), budget=Budget(9, per_document=4))
    assert made.tokens.tolist() == concatenated(texts[:3])


def test_standard_library_split_is_by_file_disjoint_and_stable():
    train, valid = StandardLibrary("train"), StandardLibrary("valid")
    files = {part: {str(path) for path in source._files} for part, source in [("train", train), ("valid", valid)]}
    assert not files["train"] & files["valid"]
    every = files["train"] | files["valid"]
    assert 0.02 < len(files["valid"]) / len(every) < 0.09
    assert any(name.endswith("/json/decoder.py") for name in every)
    root = train.places[0]
    assert not [f for f in every if re.search(r"/(site-packages|dist-packages|tests?|idle_test)/", f[len(root) :])]
    again = StandardLibrary("train")
    assert (again._files, again.fingerprint) == (train._files, train.fingerprint) != (valid._files, valid.fingerprint)


def test_undecodable_library_file_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(40):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}\n")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# café\n".encode("latin-1"))
    (tmp_path / "bad.py").write_bytes(b"# \xff\xfe not UTF-8\n")
    (tmp_path / "empty.py").write_text("")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    skipped, texts = Counter(), []
    for part in ("train", "valid"):
        texts += StandardLibrary(part).documents(skipped)
    assert skipped == {"undecodable": 1, "empty": 1}
    assert len(texts) == 41 and any("café" in text for text in texts)


# --- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["valid.jsonl", "validation-00.jsonl.gz", "dev_set.txt", "VALID.txt"])
def test_validation_file_beside_the_training_file_is_found(tmp_path: Path, name: str):
    train = write_jsonl(tmp_path / "train.jsonl", TEXTS)
    (tmp_path / "devices.txt").write_text("no development set")
    (tmp_path / "valid.md").write_text("not readable")
    line = json.dumps({"text": "held out"}).encode()
    content = {"l": line, "z": gzip.compress(line), "t": b"held out"}[name[-1]]
    (tmp_path / name).write_bytes(content)
    source = open_sources(str(train), None, "text")[1]
    assert read(source) == ["held out"]
    assert source.describe() == f"{name}, found beside the training files"


def test_validation_file_that_is_trained_on_is_not_validation(tmp_path: Path):
    write_jsonl(tmp_path / "valid.jsonl", TEXTS)
    assert isinstance(open_sources(f"{tmp_path}/*.jsonl", None, "text")[1], HeldOut)


@pytest.mark.parametrize("number", [2, 3, 10, 3000])
def test_held_out_documents_are_a_stable_share(number: int):
    texts = [f"text {i}" for i in range(number)] * 2  # each twice: both copies must fall on one side
    train, valid = read(HeldOut(Documents(texts), "train")), read(HeldOut(Documents(texts), "valid"))
    assert set(train) | set(valid) == set(texts) and not set(train) & set(valid)
    assert 1 <= len(set(valid)) <= max(1, number * 0.02) and train
    assert read(HeldOut(Documents(texts[::-1]), "valid")) == valid[::-1]  # by text, not by place
    assert (
        HeldOut(Documents(texts), "valid").describe()
        == "about 1 % of the documents of some texts, held out of training"
    )


def test_one_document_is_cut_near_its_end():
    text = "".join(f"line {i}\n" for i in range(1000))
    train, valid = (read(HeldOut(Documents([text]), part))[0] for part in ("train", "valid"))
    assert train + valid == text and train.endswith("\n")
    assert 0.05 <= len(valid) / len(text) <= 0.06


def test_a_validation_document_is_never_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "open_tokenizer", lambda *_: Bytes())
    train = write_jsonl(tmp_path / "train.jsonl", TEXTS)
    valid = write_jsonl(tmp_path / "held.jsonl", [TEXTS[7], "another", TEXTS[9]])
    corpus = open_corpus(DataConfig(data=str(train), valid=str(valid), seq_len=16))
    assert corpus.description["train"]["skipped"] == {"also in validation": 2}
    assert corpus.description["train"]["documents"] == len(TEXTS) - 2
    assert corpus.description["valid"]["documents"] == 3
    with pytest.raises(UserError) as error:
        open_corpus(DataConfig(data=str(train), valid=str(train), seq_len=16))
    one_line(error, "60 also in validation")


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq_len", [1, 7, 64, 1000])
def test_packed_validation_predicts_every_token_once(seq_len: int):
    rows = stream(TEXTS, seq_len, keep_tail=True)
    inputs, targets = rows.batch(0, rows.num_rows + 5, None)
    assert inputs.shape == targets.shape == (rows.num_rows, seq_len)
    assert inputs.dtype == targets.dtype == torch.int64
    ids = concatenated(TEXTS)
    assert rows.num_tokens == len(ids)
    real = targets != -100
    assert targets[real].tolist() == ids[1:]
    assert inputs[real].tolist() == ids[:-1]
    assert not (~real[:-1]).any() and (real[-1].long().diff() <= 0).all()  # only the end of the last row is padding
    padding = inputs[-1][~real[-1]].tolist()
    assert padding == [256] * len(padding)


@pytest.mark.parametrize("length", [64, 65, 66, 70])
def test_packed_training_drops_only_the_ragged_tail(length: int):
    text = "x" * (length - 1)
    rows = stream([text], 16)
    assert rows.num_rows == (length - 1) // 16
    targets = rows.batch(0, rows.num_rows, None)[1]
    assert targets.flatten().tolist() == concatenated([text])[1 : 1 + rows.num_rows * 16]


def test_unpacked_rows_are_documents_truncated_and_padded():
    texts = ["ab", "abcdefg", "abcdefgh", "abcdefghi", "abcdefghijkl"]
    rows = stream(texts, 8, packing=False)
    assert (rows.num_rows, rows.num_truncated) == (5, 2)  # eight letters and eos just fit
    inputs, targets = rows.batch(0, 5, None)
    a, eos, no = 97, 256, -100
    assert inputs.tolist() == [
        [a, a + 1, eos, eos, eos, eos, eos, eos],
        [*range(a, a + 7), eos],
        [*range(a, a + 8)],
        [*range(a, a + 8)],
        [*range(a, a + 8)],
    ]
    assert targets.tolist() == [
        [a + 1, eos, no, no, no, no, no, no],
        [*range(a + 1, a + 7), eos, no],
        [*range(a + 1, a + 8), eos],
        [*range(a + 1, a + 9)],
        [*range(a + 1, a + 9)],
    ]
    # they predict 2, 7, 8, 8 and 8 tokens: padding is none, and what is cut off is none
    assert [rows.rows_of(tokens) for tokens in (1, 2, 3, 9, 10, 33, 34, 10**9)] == [1, 1, 2, 2, 3, 5, 5, 5]


@pytest.mark.parametrize("packing", [True, False])
def test_order_is_the_seeds_alone(packing: bool):
    rows = stream(TEXTS, 32, packing)
    whole = rows.batch(0, 3 * rows.num_rows, seed=5)
    for size in (1, 7, rows.num_rows + 3):  # any batch size, from any position, by a fresh stream, across epochs
        for position in (0, 3, rows.num_rows - 1, 2 * rows.num_rows - size // 2):
            for part, expected in zip(stream(TEXTS, 32, packing).batch(position, size, 5), whole, strict=True):
                assert torch.equal(part, expected[position : position + size])
    in_order = rows.batch(0, rows.num_rows, None)[0]
    epochs = whole[0].split(rows.num_rows)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(in_order.tolist())
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], in_order)
    assert not torch.equal(rows.batch(0, rows.num_rows, seed=6)[0], epochs[0])
    assert torch.equal(
        rows.batch(0, rows.num_rows, seed=-5)[0], stream(TEXTS, 32, packing).batch(0, rows.num_rows, -5)[0]
    )


def test_order_is_the_same_everywhere():
    """A saved run must resume on another machine: the permutation itself is pinned."""
    rows = stream(["abcdefghi"], 1)
    assert bytes(rows.batch(0, 18, seed=3)[0].flatten().tolist()) == b"hgebdiafciaebhcfdg"


def test_file_order_ends():
    rows = stream(TEXTS, 32)
    inputs, targets = rows.batch(rows.num_rows - 2, 5, None)
    assert inputs.shape == targets.shape == (2, 32)
    assert rows.batch(rows.num_rows, 5, None)[0].shape == (0, 32)


def test_fingerprint_tells_rows_apart():
    made = [stream(TEXTS, 32), stream(TEXTS, 31), stream(TEXTS, 32, packing=False), stream(TEXTS[::-1], 32)]
    assert len({rows.fingerprint for rows in made}) == 4
    assert stream(TEXTS, 32).fingerprint == made[0].fingerprint


# --- cache -----------------------------------------------------------------------------------------------------------


def test_second_open_does_not_tokenise_and_a_changed_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = Bytes()
    monkeypatch.setattr(data, "open_tokenizer", lambda *_: tokenizer)
    path = write_jsonl(tmp_path / "train.jsonl", TEXTS)
    config = DataConfig(data=str(path), seq_len=16)
    first = open_corpus(config)
    assert tokenizer.encoded == len(TEXTS)
    again = open_corpus(config)
    assert tokenizer.encoded == len(TEXTS)
    assert (again.description, again.valid_description) == (first.description, first.valid_description)
    path.rename(tmp_path / "elsewhere.jsonl")  # the content counts, not the name
    open_corpus(DataConfig(data=str(tmp_path / "elsewhere.jsonl"), seq_len=32))
    assert tokenizer.encoded == len(TEXTS)
    write_jsonl(path, [text.replace("Document", "document") for text in TEXTS])  # as long as before
    changed = open_corpus(config)
    assert tokenizer.encoded == 2 * len(TEXTS)
    assert changed.train.fingerprint != first.train.fingerprint
    assert ord("D") in first.train.batch(0, 9999, None)[0] and ord("D") not in changed.train.batch(0, 9999, None)[0]


def test_big_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_jsonl(tmp_path / "train.jsonl", TEXTS)
    later(monkeypatch, 10)
    first = Files("a", [path], "text", "a").fingerprint
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)  # would fail if called
        assert Files("a", [path], "text", "a").fingerprint == first
    status = path.stat()
    write_jsonl(path, [text.replace("Document", "document") for text in TEXTS])  # as long as before ...
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # ... and, it says, as old
    assert Files("a", [path], "text", "a").fingerprint != first


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """For the cache it is later than it is."""
    now = time.time() + seconds
    monkeypatch.setattr("gossamer.data.cache.time", SimpleNamespace(time=lambda: now))


@pytest.mark.parametrize("damage", ["tokens.bin", "offsets.npy", "hashes.npy", "meta.json"])
@pytest.mark.parametrize("how", ["removed", "cut short"])
def test_half_written_shards_are_made_again(cache: Path, damage: str, how: str):
    expected = open_shards(Documents(TEXTS), Bytes()).tokens.tolist()
    (folder,) = (cache / "shards").iterdir()
    if how == "removed":
        (folder / damage).unlink()
    else:
        os.truncate(folder / damage, (folder / damage).stat().st_size // 4 * 2)  # still whole uint16 tokens
    tokenizer = Bytes()
    assert open_shards(Documents(TEXTS), tokenizer).tokens.tolist() == expected
    assert tokenizer.encoded == len(TEXTS)
    assert list((cache / "shards").iterdir()) == [folder]


def test_killed_process_leaves_nothing_taken_for_complete(cache: Path):
    script = (
        "import os, signal, test_data as t\n"
        "class Dying(t.Bytes):\n"
        "    def encode_batch(self, texts):\n"
        "        if self.encoded: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return super().encode_batch(texts)\n"
        "t.shards._BATCH_CHARACTERS = 1000\n"
        "t.open_shards(t.Documents(t.TEXTS), Dying())\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [entry.name.startswith(".partial-") for entry in (cache / "shards").iterdir()] == [True]
    assert open_shards(Documents(TEXTS), Bytes()).tokens.tolist() == concatenated(TEXTS)


def test_what_killed_processes_left_is_deleted_and_what_living_ones_make_is_not(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = cache / "shards"
    left = folder / ".partial-left"
    left.mkdir(parents=True)
    (left / "tokens.bin").write_bytes(b"half")
    with partial(folder) as making:
        open_shards(Documents(TEXTS[:5]), Bytes())
        assert left.exists(), "it may be a process that is just beginning"
        later(monkeypatch, 100)
        open_shards(Documents(TEXTS), Bytes())
        assert not left.exists() and making.exists()
    assert not making.exists()


def test_an_error_leaves_no_folder(cache: Path):
    class Failing(Bytes):
        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_shards(Documents(TEXTS), Failing())
    assert list((cache / "shards").iterdir()) == []


def test_two_processes_at_once_both_succeed(cache: Path):
    class Overtaken(Bytes):
        """While it encodes, another process finishes the same shards."""

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            self.other = open_shards(Documents(TEXTS), Bytes())
            return super().encode_batch(texts)

    slow = Overtaken()
    made = open_shards(Documents(TEXTS), slow)
    assert made.tokens.tolist() == slow.other.tokens.tolist() == concatenated(TEXTS)
    assert len(list((cache / "shards").iterdir())) == 1


def test_shards_hold_documents_and_fit_the_vocabulary():
    class Wide(Bytes):
        vocab_size, fingerprint = 2**16 + 1, "wide"

    class Widest16(Bytes):
        vocab_size, fingerprint = 2**16, "widest of 16 bits"

    narrow, wide = (open_shards(Documents(TEXTS), tokenizer) for tokenizer in (Widest16(), Wide()))
    assert (narrow.tokens.dtype, wide.tokens.dtype) == (np.uint16, np.uint32)
    for made in (narrow, wide):
        bounds = made.offsets.tolist()
        documents = [made.tokens[a : b - 1].tolist() for a, b in pairwise(bounds)]
        assert [bytes(ids).decode() for ids in documents] == TEXTS
        assert (made.tokens[made.offsets[1:] - 1] == 256).all()
        assert isinstance(made, Shards) and isinstance(made.tokens, np.memmap)


def test_long_document_in_pieces_has_the_same_ids(monkeypatch: pytest.MonkeyPatch):
    source = StandardLibrary("valid")
    text = "\n\n".join(read(source)[:3])
    tokenizer = train_bpe(Documents([text]), 400)
    expected = tokenizer.encode_batch([text])[0]
    monkeypatch.setattr(shards, "_PIECE_CHARACTERS", 1000)
    assert len(list(shards._pieces(text))) > 10
    assert shards._encode(tokenizer, ["a", text, "b"])[1] == expected
    assert "".join(shards._pieces("x" * 2500)) == "x" * 2500


def test_terminal_sees_progress_and_a_pipe_does_not(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    open_shards(Documents(TEXTS), Bytes())
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    open_shards(Documents(TEXTS[1:]), Bytes())
    out, err = capfd.readouterr()
    assert out == "" and "Tokenising some texts" in err


# --- tokenizers ------------------------------------------------------------------------------------------------------


def byte_level(eos: str | None) -> Backend:
    """A byte-level tokenizer with two merges, and ``eos`` if given."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "he", "hel", *([eos] if eos else [])]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, [("h", "e"), ("he", "l")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if eos:
        backend.add_special_tokens([AddedToken(eos, special=True)])
    return backend


def check(tokenizer: Tokenizer, folder: Path) -> None:
    """It reads back text, treats special spellings as text, and comes back from a checkpoint folder as it was."""
    texts = ["hello hell", HARD_TEXT]
    ids = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in ids] == texts
    assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.eos_id for row in ids for token in row)
    assert tokenizer.decode([*ids[0], tokenizer.eos_id]) == texts[0]
    folder.mkdir()
    tokenizer.save(folder)
    again = open_tokenizer(str(folder), 0, Documents([]))
    assert again.encode_batch(texts) == ids
    assert (again.vocab_size, again.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)


def test_trained_bpe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = train_bpe(Documents(TEXTS), 300)
    check(tokenizer, tmp_path / "saved")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (300, 0)
    assert len(tokenizer.encode_batch(["word word word"])[0]) < 6  # it has learnt
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "other"))
    assert train_bpe(Documents(TEXTS), 300).fingerprint == tokenizer.fingerprint  # deterministic
    monkeypatch.setattr("tokenizers.Tokenizer.train_from_iterator", None)  # would fail if called: it is cached
    assert train_bpe(Documents(TEXTS), 300).fingerprint == tokenizer.fingerprint
    monkeypatch.undo()
    assert train_bpe(Documents(TEXTS[:50]), 300).fingerprint != tokenizer.fingerprint


def test_bpe_sees_only_the_first_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gossamer.data.tokenizers._TRAINING_BYTES", 100)
    first = train_bpe(Documents(["ab " * 30, "ééé" * 40, "unseen"]), 270).fingerprint
    assert train_bpe(Documents(["ab " * 30, "ééé" * 40, "other"]), 270).fingerprint == first
    assert train_bpe(Documents(["ab " * 30, "é" + "x" * 99, "unseen"]), 270).fingerprint != first


@pytest.mark.parametrize("eos", ["<|endoftext|>", "</s>"])
def test_tokenizer_json(tmp_path: Path, eos: str):
    path = tmp_path / "tokenizer.json"
    byte_level(eos).save(str(path))
    tokenizer = open_tokenizer(str(path), 0, Documents([]))
    assert tokenizer.eos_id == 258 and tokenizer.encode_batch(["hel"]) == [[257]]
    check(tokenizer, tmp_path / "saved")
    byte_level(None).save(str(path))
    with pytest.raises(UserError) as error:
        open_tokenizer(str(path), 0, Documents([]))
    one_line(error, str(path), "<|endoftext|>", "</s>", "<eos>")


def test_tokenizer_json_that_pads_and_truncates_does_neither_here(tmp_path: Path):
    backend = byte_level("</s>")
    backend.enable_truncation(4)
    backend.enable_padding(length=9)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(str(tmp_path), 0, Documents([]))
    assert tokenizer.decode(tokenizer.encode_batch(["abcdefgh"])[0]) == "abcdefgh"


def test_vocab_and_merges(tmp_path: Path):
    backend = byte_level("<|endoftext|>")
    backend.model.save(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["merges.txt", "vocab.json"]
    tokenizer = open_tokenizer(str(tmp_path), 0, Documents([]))
    assert isinstance(tokenizer, FastTokenizer) and tokenizer.eos_id == 258
    assert tokenizer.encode_batch(["hel"]) == [[257]]
    check(tokenizer, tmp_path / "saved")


def test_huggingface_folder(tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    backend = byte_level("<end>")  # named by the folder's configuration only
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path / "folder")
    tokenizer = open_tokenizer(str(tmp_path / "folder"), 0, Documents([]))
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (258, 259)
    check(tokenizer, tmp_path / "saved")
    # sentinels as T5 has them come about in no text, so that no model needs room for them
    more = PreTrainedTokenizerFast(tokenizer_object=byte_level("<end>"), eos_token="<end>")
    more.add_special_tokens({"additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)]})
    more.save_pretrained(tmp_path / "sentinels")
    tokenizer = open_tokenizer(str(tmp_path / "sentinels"), 0, Documents([]))
    assert len(more) == 359 and tokenizer.vocab_size == 259
    assert max(tokenizer.encode_batch(["<extra_id_7> and <end>"])[0]) < 258
    # as T5 has them, they are pieces as well: a text that spells one holds something unknown
    pieces = [("<unk>", 0.0), ("<end>", 0.0), ("▁", -2.0), ("a", -2.0), ("<extra_id_0>", 0.0)]
    unigram = Backend(models.Unigram(pieces, unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    sentinel = {"additional_special_tokens": ["<extra_id_0>"]}
    for unknown in ({"unk_token": "<unk>"}, {}):
        t5 = PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="<end>", **unknown, **sentinel)
        t5.save_pretrained(tmp_path / "t5")
        tokenizer = open_tokenizer(str(tmp_path / "t5"), 0, Documents([]))
        assert tokenizer.vocab_size == 4
        if unknown:
            assert tokenizer.encode_batch(["a <extra_id_0> a"]) == [[2, 3, 2, 0, 2, 3]]
    with pytest.raises(UserError, match="a text spells '<extra_id_0>'"):
        tokenizer.encode_batch(["a <extra_id_0> a"])
    PreTrainedTokenizerFast(tokenizer_object=byte_level(None)).save_pretrained(tmp_path / "no_eos")
    with pytest.raises(UserError) as error:
        open_tokenizer(str(tmp_path / "no_eos"), 0, Documents([]))
    one_line(error, "no_eos", "eos_token")


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import sentencepiece

    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model.v1"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=300, model_type="bpe", byte_fallback=True,
            hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
            minloglevel=2,
        )  # fmt: skip
    return path


def test_sentencepiece(tmp_path: Path, sentencepiece_model: Path):
    tokenizer = open_tokenizer(str(sentencepiece_model), 0, Documents([]))
    assert tokenizer.eos_id == 2
    check(tokenizer, tmp_path / "saved")


# --- the whole -------------------------------------------------------------------------------------------------------


def test_corpus_of_the_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library = tmp_path / "library"
    library.mkdir()
    for path in Path(json.__file__).parent.parent.glob("[a-f]*.py"):
        (library / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    corpus = open_corpus(DataConfig(vocab_size=300, seq_len=64))
    assert corpus.tokenizer.vocab_size == 300
    assert "Python standard library" in corpus.valid_description and "tokens" in corpus.valid_description
    assert json.loads(json.dumps(corpus.description)) == corpus.description
    _, targets = corpus.valid.batch(0, corpus.valid.num_rows, None)
    ids = [token for token in targets.flatten().tolist() if token != -100]
    texts = list(StandardLibrary("valid").documents(Counter()))
    expected = [token for row in corpus.tokenizer.encode_batch(texts) for token in [*row, corpus.tokenizer.eos_id]]
    assert ids == expected[1:]
    unpacked = open_corpus(DataConfig(vocab_size=300, seq_len=64, packing=False))
    assert unpacked.valid.num_rows == len(texts)
    assert unpacked.description["train"]["truncated"] == unpacked.train.num_truncated > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": "nowhere.jsonl"}, ["nowhere.jsonl", "python-stdlib"]),
        ({"data": "python-stdlb"}, ["did you mean 'python-stdlib'"]),
        ({"data": " , "}, ["python-stdlib"]),
        ({"data": "{tmp}/*.nothing"}, ["no file matches", "*.nothing"]),
        ({"data": "{tmp}"}, ["is a folder", "*.jsonl"]),
        ({"data": "{tmp}/notes.md"}, ["notes.md", ".jsonl.zst", ".parquet"]),
        ({"data": "{tmp}/blank.txt"}, ["blank.txt", "no text"]),
        ({"data": "{tmp}/bad.jsonl"}, ["bad.jsonl, line 2", "not JSON"]),
        ({"data": "{tmp}/list.jsonl"}, ["list.jsonl, line 1", "list"]),
        ({"data": "{tmp}/number.jsonl"}, ["number.jsonl, line 1", "'text'", "int"]),
        ({"data": "{tmp}/good.jsonl", "text_field": "txt"}, ["good.jsonl, line 1", "'txt'", "id, text", "'text'?"]),
        ({"data": "{tmp}/latin.txt"}, ["latin.txt", "UTF-8", "byte 3"]),
        ({"data": "{tmp}/broken.txt.gz"}, ["broken.txt.gz"]),
        ({"data": "{tmp}/broken.txt.xz"}, ["broken.txt.xz"]),
        ({"data": "{tmp}/broken.txt.zst"}, ["broken.txt.zst"]),
        ({"data": "{tmp}/broken.parquet"}, ["broken.parquet"]),
        ({"data": "hf:"}, ["hf:REPO"]),
        ({"data": "hf:{tmp}/dataset:nothing"}, ["nothing"]),
        ({"data": "hf:{tmp}/only_test"}, ["no train split", "test"]),
        ({"valid": "nowhere.txt"}, ["nowhere.txt"]),
        ({"tokenizer": "bep"}, ["bep", "did you mean 'bpe'", "tokenizer.json"]),
        ({"tokenizer": "{tmp}/notes.md"}, ["notes.md", "tokenizer.json"]),
        ({"tokenizer": "{tmp}"}, ["vocab.json", "tokenizer.json"]),
        ({"tokenizer": "{tmp}/tokenizers/tokenizer.json"}, ["tokenizers/tokenizer.json"]),
        ({"tokenizer": "{tmp}/tokenizers/a.model"}, ["a.model", "SentencePiece"]),
        ({"tokenizer": "{tmp}/gpt"}, ["vocab.json"]),
        ({"vocab_size": 256}, ["256", "257"]),
        ({"seq_len": 0}, ["seq_len", "1"]),
        ({"seq_len": 10**6}, ["too little data", "tokens", "1000001", "training"]),
    ],
)
def test_user_errors_are_one_clear_line(tmp_path: Path, change: dict, words: list[str]):
    for folder in ("dataset", "only_test", "tokenizers", "gpt"):
        (tmp_path / folder).mkdir()
    write_jsonl(tmp_path / "good.jsonl", TEXTS)
    write_jsonl(tmp_path / "dataset" / "train.jsonl", TEXTS)
    write_jsonl(tmp_path / "only_test" / "test.jsonl", TEXTS)
    for name, content in {
        "notes.md": b"text", "blank.txt": b" \n", "latin.txt": b"caf\xe9", "list.jsonl": b"[1]\n",
        "bad.jsonl": b'{"text": "a"}\n{"text": \n', "number.jsonl": b'{"text": 3}\n', "tokenizers/tokenizer.json": b"{",
        "tokenizers/a.model": b"none", "gpt/vocab.json": b"{", "gpt/merges.txt": b"a",
        **{f"broken.{kind}": b"broken\nbroken" for kind in ("txt.gz", "txt.xz", "txt.zst", "parquet")},
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    values = {"data": "{tmp}/good.jsonl", "vocab_size": 260, **change}
    filled = {k: v.replace("{tmp}", str(tmp_path)) if isinstance(v, str) else v for k, v in values.items()}
    with pytest.raises(UserError) as error:
        open_corpus(DataConfig(**filled))
    one_line(error, *words)


def test_sentencepiece_without_eos_is_an_error(tmp_path: Path):
    import sentencepiece

    path = tmp_path / "a.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=100, eos_id=-1, hard_vocab_limit=False,
            minloglevel=2,
        )  # fmt: skip
    with pytest.raises(UserError) as error:
        open_tokenizer(str(path), 0, Documents([]))
    one_line(error, "a.model", "eos_id")


def test_half_characters_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "open_tokenizer", lambda *_: Bytes())
    write_jsonl(tmp_path / "valid.jsonl", ["held out"])
    path = write_jsonl(tmp_path / "train.jsonl", ["good text", "half \ud83d", " ", "more text"])
    corpus = open_corpus(DataConfig(data=str(path), seq_len=4))
    assert corpus.description["train"]["skipped"] == {"undecodable": 1, "empty": 1}
    assert corpus.description["train"]["documents"] == 2


def test_unwritable_cache_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError) as error:
        open_corpus(DataConfig())
    one_line(error, "GOSSAMER_CACHE")
