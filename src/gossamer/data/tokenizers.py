"""Text to token ids and back, whatever file the vocabulary came in."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.data.cache import bytes_digest, cache_folder, digest, write_atomically
from gossamer.data.sources import Source
from gossamer.errors import UserError, first_line, nearest

if TYPE_CHECKING:
    import tokenizers

BPE = "bpe"
END_OF_TEXT = "<|endoftext|>"
EOS_CANDIDATES = (
    END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>", "[SEP]",
)  # fmt: skip
_TRAINING_BYTES = 64 * 2**20
_ALLOWED = "bpe, a tokenizer.json, a SentencePiece *.model, a Hugging Face folder, a folder with vocab.json+merges.txt"


class Tokenizer(ABC):
    """Text to ids and back. Text that happens to spell a special token is encoded as the plain text it is."""

    name: str
    """Where it came from, for people."""
    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """The id that ends a document."""
    fingerprint: str
    """Changes when the ids of any text may."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, with no special tokens added."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """The text of ``ids``; special tokens are left out."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what ``open_tokenizer(str(folder), ...)`` needs to give this tokenizer again into ``folder``."""


def open_tokenizer(name: str, vocab_size: int, source: Source) -> Tokenizer:
    """The tokenizer ``name`` stands for (see ``DataConfig.tokenizer``); ``bpe`` is trained on ``source``.

    Raises ``UserError`` where there is none, it cannot be read, or it has no end-of-text token.
    """
    if name == BPE:
        return train_bpe(source, vocab_size)
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"no such tokenizer: {name}{nearest(name, [BPE])}; allowed: {_ALLOWED}")
    if not path.is_dir():
        return _open_file(path)
    files = {file.name: file for file in sorted(path.iterdir())}
    if "tokenizer_config.json" in files:
        return HuggingFaceTokenizer(path)
    if "tokenizer.json" in files:
        return _open_file(files["tokenizer.json"])
    if models := [file for file in files if ".model" in file]:
        return _open_file(files[models[0]])
    if {"vocab.json", "merges.txt"} <= files.keys():
        return _open_gpt2(path)
    raise UserError(
        f"no tokenizer in {name}: looked for tokenizer_config.json, tokenizer.json, *.model*, vocab.json+merges.txt"
    )


def train_bpe(source: Source, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most ``vocab_size`` ids, trained on the first 64 MiB of ``source``, cached by content."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise UserError(f"vocab_size {vocab_size} is too small: a byte-level bpe needs at least 257 (bytes and eos)")
    cached = cache_folder("tokenizers") / f"{digest('bpe 1', source.fingerprint, vocab_size)}.json"
    if not cached.exists():
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        backend.decoder = decoders.ByteLevel()  # pyright: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(_first_bytes(source, _TRAINING_BYTES), trainer)
        write_atomically(cached, backend.to_str())
    return FastTokenizer(f"bpe trained on {source.name}", Backend.from_file(str(cached)), END_OF_TEXT)


class FastTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library."""

    def __init__(self, name: str, backend: tokenizers.Tokenizer, eos: str):
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.name = name
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = vocabulary[eos]
        self.fingerprint = digest("tokenizers", backend.to_str(), eos)
        self._backend, self._eos = backend, eos

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids)

    def save(self, folder: Path) -> None:
        self._backend.save(str(folder / "tokenizer.json"))
        # With it transformers' AutoTokenizer reads the folder too.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eos}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file."""

    def __init__(self, path: Path):
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except Exception as error:
            raise UserError(f"cannot read {path} as a SentencePiece model") from error
        self.name = str(path)
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"the SentencePiece model {path} has no end-of-text token (eos_id is -1)")
        self.fingerprint = digest("sentencepiece", bytes_digest(self._model.serialized_model_proto()))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, num_threads=os.cpu_count() or 1)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self._model.serialized_model_proto())


class HuggingFaceTokenizer(Tokenizer):
    """Whatever ``AutoTokenizer`` makes of a folder."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise UserError(f"cannot read the tokenizer in {folder}: {first_line(error)}") from error
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer in {folder} has no end-of-text token: its eos_token is not set")
        vocabulary = self._tokenizer.get_vocab()
        backend = self._tokenizer.backend_tokenizer.to_str() if self._tokenizer.is_fast else ""
        self.name = str(folder)
        self.eos_id = self._tokenizer.eos_token_id
        # no text is to hold any other special token: a model needs no room for T5's hundred sentinels
        self._unknown = self._tokenizer.unk_token_id
        special = {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self.vocab_size = max(set(vocabulary.values()) - (special - {self.eos_id, self._unknown})) + 1
        self.fingerprint = digest(type(self._tokenizer).__name__, backend, sorted(vocabulary.items()), self.eos_id)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encoded = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return [ids if max(ids, default=0) < self.vocab_size else self._known(ids) for ids in encoded["input_ids"]]

    def _known(self, ids: list[int]) -> list[int]:
        """With the unknown token where a text spells a special one that is a piece of the tokenizer's model, too."""
        if self._unknown is None:
            token = self._tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"tokenizer: a text spells {token!r}, a special token of {self.name}, which has no unknown one"
            )
        return [i if i < self.vocab_size else self._unknown for i in ids]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


def _open_file(path: Path) -> Tokenizer:
    if ".model" in path.name:
        return SentencePieceTokenizer(path)
    if path.suffix != ".json":
        raise UserError(f"{path} is no tokenizer file; allowed: {_ALLOWED}")
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"cannot read {path} as a tokenizer.json of the tokenizers library: {first_line(error)}"
        ) from error
    return FastTokenizer(str(path), backend, _find_eos(backend, path))


def _open_gpt2(folder: Path) -> Tokenizer:
    """The byte-level BPE of GPT-2 from its two files."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:
        raise UserError(f"cannot read vocab.json and merges.txt in {folder}: {first_line(error)}") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    eos = _find_eos(backend, folder)
    backend.add_special_tokens([AddedToken(eos, special=True)])
    return FastTokenizer(str(folder), backend, eos)


def _find_eos(backend: tokenizers.Tokenizer, path: Path) -> str:
    for candidate in EOS_CANDIDATES:
        if backend.token_to_id(candidate) is not None:
            return candidate
    raise UserError(f"{path} has no end-of-text token; looked for {', '.join(EOS_CANDIDATES)}")


def _first_bytes(source: Source, budget: int) -> Iterator[str]:
    """Documents of ``source`` until ``budget`` bytes of UTF-8 are given, the last one cut short."""
    for text in source.documents(Counter()):
        content = text.encode()
        yield text if len(content) <= budget else content[:budget].decode("utf-8", "ignore")
        budget -= len(content)
        if budget <= 0:
            return
