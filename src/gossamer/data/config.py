"""The choices a user makes about data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gossamer.errors import UserError

Template = Literal["alpaca", "question", "chat", "none"]


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into rows."""

    data: str = "python-stdlib"
    """Training text: `python-stdlib` (the interpreter's own library, no download), files or globs separated by commas
    (.txt, .jsonl, both also .gz/.xz/.zst, .parquet), or `hf:REPO[:CONFIG]` (a Hugging Face dataset, streamed)."""
    valid: str | None = None
    """Validation text, written like `data`. Left out: a file named valid*, validation* or dev* beside the training
    files, the dataset's own validation split, or about 1 % of the documents held out."""
    tokenizer: str = "bpe"
    """`bpe` (trained on the training text), a tokenizer.json, a SentencePiece *.model, or a Hugging Face tokenizer
    folder (or one with vocab.json and merges.txt)."""
    vocab_size: int = 2048
    """Vocabulary of a `bpe` tokenizer trained here, at least 257."""
    seq_len: int = 256
    """Tokens predicted per row."""
    packing: bool = True
    """Cut one long run of documents into full rows. Off: one document a row, truncated or padded, as in the papers."""
    text_field: str = "text"
    """The field of a .jsonl, .parquet or Hugging Face record that holds its text."""


@dataclass(frozen=True)
class TaskConfig:
    """Which examples of a task are read, and how they become rows."""

    task: str = "gsm8k"
    """metamath, gsm8k, codefeedback, instructions (any local file of prompts and answers), glue/cola, glue/rte ..."""
    data: str | None = None
    """A local file (.jsonl, also packed; .json, .parquet), for glue/* a TSV file or a folder with the benchmark's, or
    `hf:REPO[:CONFIG]`; None: the task's own dataset on the hub."""
    valid: str | None = None
    """Validation examples, written like `data`; None: glue/* brings its own, of others the examples after those trained
    on are held out."""
    prompt_field: str | None = None
    """The field that holds the prompt; None: the task's own (of instructions: instruction)."""
    input_field: str | None = None
    """The field of what the prompt is about, where a record has one; None: the task's own (of instructions: input)."""
    answer_field: str | None = None
    """The field that holds the answer; None: the task's own (of instructions: output)."""
    template: Template = "alpaca"
    """How a prompt is put: as the papers do (alpaca), `Question: ... Answer:`, by the tokenizer's chat template, or as
    it is (none)."""
    examples: int | None = None
    """Training examples, the first ones that are short enough; None: all."""
    valid_examples: int | None = None
    """Validation examples; None: all of `valid`, or 1,000 held out (a tenth, if there are fewer than 10,000)."""
    max_length: int | None = None
    """Tokens of an example; a longer one is dropped, of glue/* cut. None: 512, of glue/* 128."""
    packing: bool = False
    """Several examples a row, as many as fit into `max_length`, which do not see one another. Off: one, padded."""

    def __post_init__(self) -> None:
        for name, least in (("examples", 1), ("valid_examples", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}: {value} is too small; allowed: an integer >= {least}")
