"""The choices a user makes about data."""

from __future__ import annotations

from dataclasses import dataclass


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
