"""Rows of tokens in an order that the seed alone decides."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.data.batch import IGNORED
from gossamer.data.cache import digest
from gossamer.data.shards import Shards
from gossamer.errors import UserError


class Order:
    """The endless order of `num_rows` rows: epoch after epoch, each a permutation that the seed alone decides."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._epochs: dict[tuple[int, int], NDArray[np.int64]] = {}

    def rows(self, position: int, size: int, seed: int) -> NDArray[np.int64]:
        """(size,) row numbers; position p is in epoch ``p // num_rows``."""
        parts = []
        while size > 0:
            epoch, start = divmod(position, self.num_rows)
            part = self._permutation(seed, epoch)[start : start + size]
            parts.append(part)
            position, size = position + len(part), size - len(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _permutation(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """(num_rows,) the permutation of one epoch; the last two made are kept."""
        if (seed, epoch) not in self._epochs:
            key = np.array([seed % 2**64, epoch], dtype=np.uint64)
            order = np.random.Generator(np.random.Philox(key=key)).permutation(self.num_rows)
            self._epochs = dict([*self._epochs.items()][-1:]) | {(seed, epoch): order}
        return self._epochs[seed, epoch]


class TokenStream:
    """Rows of token ids whose order is a function of the seed alone.

    Packed, row r predicts tokens ``r * seq_len + 1 .. (r + 1) * seq_len`` of the one run of documents, so that every
    token but the very first is predicted once; the last, partial row is kept or dropped by ``keep_tail``.
    Not packed, row r is document r: its first ``seq_len + 1`` tokens (eos included), padded on the right.
    """

    num_rows: int
    seq_len: int
    num_tokens: int
    """Tokens of the documents, eos included, before any is truncated or dropped."""
    num_truncated: int
    """Documents that lose tokens to truncation; 0 when packed."""
    fingerprint: str
    """Changes when any row may."""

    def __init__(self, shards: Shards, *, seq_len: int, packing: bool, keep_tail: bool, eos_id: int, name: str):
        self.seq_len = seq_len
        self.num_tokens = len(shards.tokens)
        lengths = np.diff(shards.offsets)
        self.num_truncated = 0 if packing else int((lengths > seq_len + 1).sum())
        targets = self.num_tokens - 1
        self.num_rows = len(lengths) if not packing else -(-targets // seq_len) if keep_tail else targets // seq_len
        if self.num_rows < 1:
            need = 2 if keep_tail else seq_len + 1
            raise UserError(
                f"too little data: {name} has {self.num_tokens} tokens and one row needs {need} (seq_len {seq_len})"
            )
        self.fingerprint = digest("rows 1", shards.meta["key"], seq_len, packing, keep_tail)
        self._tokens, self._offsets = shards.tokens, shards.offsets
        self._packing, self._eos_id = packing, eos_id
        self._order = Order(self.num_rows)

    def rows_of(self, tokens: int) -> int:
        """How many rows, in file order, it takes to predict so many tokens; all, if they do not."""
        if self._packing:
            return min(self.num_rows, -(-tokens // self.seq_len))
        predicted = np.minimum(np.diff(self._offsets) - 1, self.seq_len).cumsum()
        return min(self.num_rows, int(np.searchsorted(predicted, tokens)) + 1)

    def batch(self, position: int, size: int, seed: int | None) -> tuple[Tensor, Tensor]:
        """Rows ``position .. position + size`` of the endless shuffled order, as (inputs, targets).

        Both are (size, seq_len) int64. ``targets[i, j]`` is the token after ``inputs[i, j]``, or -100 where nothing
        is to be predicted. With ``seed=None`` rows come in file order and end there: there may be fewer than ``size``.
        """
        if seed is None:
            rows = np.arange(position, min(position + size, self.num_rows), dtype=np.int64)
        else:
            rows = self._order.rows(position, size, seed)
        if self._packing:
            starts = rows * self.seq_len
            ends = np.minimum(starts + self.seq_len + 1, self.num_tokens)
        else:
            starts = self._offsets[rows]
            ends = np.minimum(starts + self.seq_len + 1, self._offsets[rows + 1])
        places = starts[:, None] + np.arange(self.seq_len + 1)
        inside = places < ends[:, None]
        tokens = self._tokens[np.minimum(places, self.num_tokens - 1)].astype(np.int64)
        inputs = np.where(inside, tokens, self._eos_id)[:, :-1]
        targets = np.where(inside, tokens, IGNORED)[:, 1:]
        return torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(np.ascontiguousarray(targets))
