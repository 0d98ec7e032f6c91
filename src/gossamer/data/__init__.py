"""Text in, rows of token ids out: sources, tokenizers, cached shards, and the order rows are read in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gossamer.data.batch import IGNORED, Batch
from gossamer.data.config import DataConfig, TaskConfig
from gossamer.data.shards import Budget, Shards, open_shards
from gossamer.data.sources import HeldOut, Source, open_source, open_sources
from gossamer.data.stream import TokenStream
from gossamer.data.tokenizers import Tokenizer, open_tokenizer
from gossamer.errors import UserError

__all__ = [
    "IGNORED",
    "Batch",
    "Corpus",
    "DataConfig",
    "TaskConfig",
    "TokenStream",
    "Tokenizer",
    "open_corpus",
    "open_text",
]

STREAMED_VALIDATION_TOKENS = 10_000_000
"""How much is read of a streamed validation split: as much as the GaLore paper evaluates on."""


@dataclass(frozen=True)
class Corpus:
    """Training and validation rows, which share no document, and the tokenizer that made them."""

    train: TokenStream
    valid: TokenStream
    tokenizer: Tokenizer
    valid_description: str
    """What the validation rows are, for people."""
    description: dict[str, Any]
    """The same and more for machines (json-able): sources, files, counts, fingerprints."""


def open_corpus(config: DataConfig, *, train_tokens: int | None = None) -> Corpus:
    """Read, tokenise (or find in the cache) and open what ``config`` asks for.

    ``train_tokens`` bounds what is taken of a streamed (``hf:``) training source: enough whole documents to predict
    that many tokens without repeating one. Validation keeps its last, partial row; training drops it.
    Raises ``UserError`` for anything that cannot be read or is too small for one row.
    """
    if config.seq_len < 1:
        raise UserError(f"seq_len is {config.seq_len}; it must be at least 1")
    train_source, valid_source = open_sources(config.data, config.valid, config.text_field)
    tokenizer = open_tokenizer(config.tokenizer, config.vocab_size, train_source)
    train_budget = valid_budget = None
    counted = None if config.packing else config.seq_len  # of a document
    if train_source.streamed and train_tokens is not None:
        train_budget = Budget(train_tokens + config.seq_len, counted)
    if valid_source.streamed:
        share = train_budget.tokens // 99 + 1 if train_budget and isinstance(valid_source, HeldOut) else None
        valid_budget = Budget(min(STREAMED_VALIDATION_TOKENS, share or STREAMED_VALIDATION_TOKENS), counted)
    valid_shards = open_shards(valid_source, tokenizer, budget=valid_budget)
    train_shards = open_shards(train_source, tokenizer, budget=train_budget, without=valid_shards)

    def stream(shards: Shards, part: str, keep_tail: bool) -> TokenStream:
        return TokenStream(
            shards,
            seq_len=config.seq_len,
            packing=config.packing,
            keep_tail=keep_tail,
            eos_id=tokenizer.eos_id,
            name=f"the {part} data ({shards.meta['description']})",
        )

    train, valid = stream(train_shards, "training", False), stream(valid_shards, "validation", True)
    counts = f"{valid_shards.meta['documents']:,} documents, {valid.num_tokens:,} tokens"
    description = {
        "train": _describe(train_source, train_shards, train),
        "valid": _describe(valid_source, valid_shards, valid),
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "fingerprint": tokenizer.fingerprint,
        },
        "seq_len": config.seq_len,
        "packing": config.packing,
    }
    return Corpus(train, valid, tokenizer, f"{valid_shards.meta['description']} ({counts})", description)


def open_text(data: str, *, text_field: str, tokenizer: str, seq_len: int) -> tuple[TokenStream, dict[str, Any]]:
    """Packed rows of a source, all of it, to be scored; and their description for machines.

    Args:
        data, text_field, seq_len: as in `DataConfig`. tokenizer: a file or folder of one.
    """
    source = open_source(data, "valid", text_field)
    opened = open_tokenizer(tokenizer, 0, source)
    shards = open_shards(source, opened, budget=Budget(STREAMED_VALIDATION_TOKENS) if source.streamed else None)
    name = f"{shards.meta['description']}"
    rows = TokenStream(shards, seq_len=seq_len, packing=True, keep_tail=True, eos_id=opened.eos_id, name=name)
    return rows, _describe(source, shards, rows)


def _describe(source: Source, shards: Shards, stream: TokenStream) -> dict[str, Any]:
    return {
        "source": source.name,
        "description": shards.meta["description"],
        "files": source.places,
        "documents": shards.meta["documents"],
        "tokens": stream.num_tokens,
        "rows": stream.num_rows,
        "truncated": stream.num_truncated,
        "skipped": shards.meta["skipped"],
        "fingerprint": stream.fingerprint,
    }
