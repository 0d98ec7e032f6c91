"""What every test shares: its own cache folder, one torch thread, and a model and a text small enough for seconds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
WORDS = """
the a river lantern slowly turned over old stone and bright morning wind carried salt from harbour to quiet hill where
children sang of winter bread while an engine waited under seven green lamps
"""


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """A script (or `-m`, a module) of the repository under torchrun, which chooses its own port."""
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *command]
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, timeout=250)


def prose(characters: int, seed: int) -> str:
    """Made-up sentences, the same ones for the same seed."""
    words, draw, sentences, length = WORDS.split(), random.Random(seed), [], 0
    while length < characters:
        sentences.append(" ".join(draw.choices(words, k=draw.randint(3, 12))).capitalize() + ".")
        length += len(sentences[-1]) + 1
    return " ".join(sentences)


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache, and none believes to be one of torchrun's processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config.json (a Llama of 36,000 parameters), train.txt, valid.txt and documents.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "train.txt").write_text(prose(12_000, seed=1))
    (folder / "valid.txt").write_text(prose(1_500, seed=2))
    documents = [{"text": prose(10 + (7 * i) % 90, seed=100 + i)} for i in range(90)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))  # old enough that their digests are remembered
    return folder


@pytest.fixture(scope="session")
def small(tiny: Path) -> list[str]:
    """The options of a run of about a second."""
    return [
        *("--model", str(tiny / "config.json"), "--data", str(tiny / "train.txt"), "--tokenizer", "bpe"),
        *("--vocab-size", "300", "--seq-len", "32", "--device", "cpu", "--batch-size", "4"),
        *("--steps", "4", "--eval-tokens", "100"),
    ]


@pytest.fixture(scope="session")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has them: a Llama of random weights with room for 512 tokens, and a tokenizer of 300."""
    from gossamer.data.sources import open_source
    from gossamer.data.tokenizers import train_bpe
    from gossamer.models import build_model, resolve_config

    folder = tmp_path_factory.mktemp("base")
    shape = json.loads((tiny / "config.json").read_text()) | {"max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(shape))
    model = build_model(resolve_config(str(folder)), dtype=torch.float32, device="cpu", seed=0)
    model.save_pretrained(folder)
    train_bpe(open_source(str(tiny / "train.txt"), "train", "text"), 300).save(folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixty additions as a file of instructions."""
    pairs = [(i % 7, (3 * i) % 8) for i in range(60)]
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    records = [{"instruction": f"{a}+{b}", "output": str(a + b)} for a, b in pairs]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.tsv and dev.tsv as SST-2 has them: 1 where the second word is `red`."""
    folder, draw = tmp_path_factory.mktemp("colours"), random.Random(0)
    for name, count in (("train", 120), ("dev", 40)):
        lines = ["sentence\tlabel"]
        for _ in range(count):
            colour = draw.choice(["red", "blue"])
            lines.append(f"the {colour} {draw.choice(WORDS.split())}\t{int(colour == 'red')}")
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return folder
