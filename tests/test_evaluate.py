"""Perplexity counts every validation token once, and the learning rate goes where it should."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gossamer.data import Corpus, DataConfig, open_corpus
from gossamer.distributed import World
from gossamer.evaluate import Score, evaluate
from gossamer.models import build_model, resolve_config
from gossamer.train.schedule import Schedule

SEQ_LEN = 32
HERE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def corpus(tiny: Path) -> Corpus:
    return open_corpus(DataConfig(str(tiny / "train.txt"), vocab_size=300, seq_len=SEQ_LEN))


@pytest.fixture(scope="module")
def model(tiny: Path) -> torch.nn.Module:
    """With weights large enough that tokens differ in their loss."""
    model = build_model(resolve_config(str(tiny)), dtype=torch.float32, device="cpu", seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.train()


@pytest.fixture(scope="module")
def nats(corpus: Corpus, model: torch.nn.Module, tiny: Path) -> list[list[float]]:
    """For each row, the nats of its tokens, from the text itself by the definition, one row at a time."""
    text = (tiny / "valid.txt").read_text()
    ids = [*corpus.tokenizer.encode_batch([text])[0], corpus.tokenizer.eos_id]
    rows = []
    for start in range(0, len(ids) - 1, SEQ_LEN):
        row = torch.tensor(ids[start : start + SEQ_LEN + 1])
        with torch.no_grad():
            log_probabilities: Tensor = model(input_ids=row[None, :-1]).logits[0].double().log_softmax(-1)
        rows.append([-float(log_probabilities[i, token]) for i, token in enumerate(row[1:])])
    assert sum(map(len, rows)) == len(ids) - 1  # every token but the very first, which nothing precedes
    assert 0 < len(rows[-1]) < SEQ_LEN, "the last row should be a partial one"
    return rows


def score(model: torch.nn.Module, corpus: Corpus, batch: int, micro: int, tokens: int = 10**9) -> Score:
    rows = corpus.valid.rows_of(tokens)
    return evaluate(model, corpus.valid, rows=rows, batch_size=batch, micro_batch_size=micro, world=HERE)


@pytest.mark.parametrize(("batch", "micro"), [(1, 1), (4, 4), (4, 3), (7, 2), (10**6, 5), (10**6, 10**6)])
def test_every_token_counts_once(
    corpus: Corpus, model: torch.nn.Module, nats: list[list[float]], batch: int, micro: int
) -> None:
    flat = list(itertools.chain(*nats))
    found = score(model, corpus, batch, micro)
    assert found.tokens == len(flat)
    assert found.batches == math.ceil(len(nats) / batch)
    # fp32 logits of about 1, summed over a row: 1e-6 of the loss
    assert found.perplexity == pytest.approx(math.exp(math.fsum(flat) / len(flat)), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 4, 7, 10**6])
def test_the_legacy_number_divides_by_one_batch_too_many(
    corpus: Corpus, model: torch.nn.Module, nats: list[list[float]], batch: int
) -> None:
    batches = [list(itertools.chain(*nats[i : i + batch])) for i in range(0, len(nats), batch)]
    means = [math.fsum(part) / len(part) for part in batches]
    found = score(model, corpus, batch, 2)
    assert found.legacy_perplexity == pytest.approx(math.exp(sum(means) / (len(means) + 1)), rel=1e-5)
    assert found.legacy_perplexity < found.perplexity


def test_a_budget_is_rounded_up_to_whole_rows(corpus: Corpus, model: torch.nn.Module, nats: list[list[float]]) -> None:
    found = score(model, corpus, batch=4, micro=4, tokens=SEQ_LEN + 1)
    assert (found.tokens, found.batches) == (2 * SEQ_LEN, 1)
    assert found.loss == pytest.approx(math.fsum(nats[0] + nats[1]) / (2 * SEQ_LEN), rel=1e-5)


def test_evaluation_leaves_no_trace(corpus: Corpus, model: torch.nn.Module) -> None:
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    score(model, corpus, batch=4, micro=4)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_beyond_floats_is_infinite_perplexity() -> None:
    assert Score(loss=1e4, legacy_loss=1e4, tokens=1, batches=1).perplexity == math.inf


@pytest.mark.parametrize(("steps", "warmup"), [(10, 3), (1000, 100), (2, 1), (7, 6), (50, 1)])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_the_learning_rate_wastes_no_update(steps: int, warmup: int, floor: float) -> None:
    rates = [Schedule(steps, warmup, floor)(step) for step in range(steps)]
    assert rates[0] == 1 / warmup > 0
    assert rates[warmup - 1] == max(rates) == 1
    assert rates[-1] == floor
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert Schedule(steps, warmup, floor)(steps + 5) == floor


def test_without_warmup_the_first_update_is_close_to_the_peak() -> None:
    rates = [Schedule(100, 0, 0.1)(step) for step in range(100)]
    assert 0.999 < rates[0] <= 1 and rates[-1] == 0.1 and rates == sorted(rates, reverse=True)
