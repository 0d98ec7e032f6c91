"""Greedy answers to many prompts, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.models import longest_row


@dataclass(frozen=True)
class Generated:
    """What a model said."""

    text: str
    """Without what ended it."""
    ended: str
    """`eos`, the stop string, `length`, or `prompt too long`: then nothing was asked."""
    tokens: int
    """New ones, eos included."""


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    report: Callable[[int], None] = lambda done: None,
) -> list[Generated]:
    """The most likely next token, again and again, until eos, a string of `stop`, or `max_new_tokens`.

    Args:
        prompts: token ids. One that leaves no room for `max_new_tokens` in the model's context is not asked.
        report: called with how many prompts are done.
    """
    from transformers import GenerationConfig, StoppingCriteriaList

    was_training = model.training
    model.eval()
    room = longest_row(model.config)
    fits = [i for i, ids in enumerate(prompts) if room is None or len(ids) + max_new_tokens <= room]
    found = dict.fromkeys(range(len(prompts)), Generated("", "prompt too long", 0))
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ends = _end_ids(model, tokenizer)
    how = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=sorted(ends), pad_token_id=pad_id
    )
    done = len(prompts) - len(fits)
    # alike lengths together, the longest first: if memory is short, it shows at once
    fits.sort(key=lambda i: -len(prompts[i]))
    for start in range(0, len(fits), batch_size):
        chosen = fits[start : start + batch_size]
        longest = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[pad_id] * (longest - len(prompts[i])) + prompts[i] for i in chosen])
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        criteria = StoppingCriteriaList([_Stops(tokenizer, stop, longest)] if stop else [])
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=how,
            stopping_criteria=criteria,
        )
        for i, row in zip(chosen, out[:, longest:].tolist(), strict=True):
            found[i] = _read(prompts[i], row, tokenizer, ends, stop)
        done += len(chosen)
        report(done)
    model.train(was_training)
    return [found[i] for i in range(len(prompts))]


def _end_ids(model: Any, tokenizer: Any) -> set[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = set(own) if isinstance(own, list) else {own}
    return {i for i in ids | {tokenizer.eos_token_id} if i is not None}


def _read(prompt: list[int], row: list[int], tokenizer: Any, ends: set[int], stop: Sequence[str]) -> Generated:
    length = next((place for place, token in enumerate(row) if token in ends), None)
    ended = "length" if length is None else "eos"
    # behind the prompt, since decoders of the SentencePiece kind strip a space at the beginning of what they decode
    before, text = (
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, prompt + row[:length])
    )
    text = text[len(before) :]
    if cuts := sorted((text.find(word), word) for word in stop if word in text):
        text, ended = text[: cuts[0][0]], cuts[0][1]
    return Generated(text, ended, len(row) if length is None else length + 1)


class _Stops:
    """`transformers`' stopping criterion: which rows hold a stop string near their end."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], prompt: int) -> None:
        self._tokenizer, self._stop, self._prompt = tokenizer, stop, prompt
        # a token is a byte at least, and one before may hold the string's beginning
        self._window = max(len(word.encode()) for word in stop) + 2

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, max(self._prompt, input_ids.shape[1] - self._window) :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        hits = [any(word in text for word in self._stop) for text in texts]
        return torch.tensor(hits, device=input_ids.device)
