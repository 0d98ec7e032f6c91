"""Pre-training: rows of running text, a fresh model, the loss of the next token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gossamer.data import Batch, open_corpus
from gossamer.distributed import World
from gossamer.errors import Pruned
from gossamer.evaluate import Score, evaluate, token_loss
from gossamer.train.build import build
from gossamer.train.config import Pretrain
from gossamer.train.loop import Result, train

Watch = Callable[[int, Score], str | None]
"""Told of an evaluation, by the step after which it was made; may say why the run is not worth going on with."""


def pretrain(
    config: Pretrain[Any, Any, Any], *, label: str | None = None, quiet: bool = False, watch: Watch | None = None
) -> Result[Score]:
    """Train the model that `config` describes and evaluate it; all else is as in `gossamer.train.loop.train`.

    Args:
        watch: called in the main process after every evaluation.

    Raises:
        Pruned: with what `watch` said.
    """
    return train(config, lambda world: Text(config, world, watch), label=label, quiet=quiet)


class Text:
    """The `Job` of a `Pretrain`."""

    def __init__(self, config: Pretrain[Any, Any, Any], world: World, watch: Watch | None) -> None:
        corpus = open_corpus(config.data, train_tokens=config.steps * config.batch_size * config.data.seq_len)
        self.model, self.replaced = build(config, corpus.tokenizer.vocab_size, world.device)
        self.source, self.fingerprint = config.data.data, corpus.train.fingerprint
        self.description, self.save_tokenizer = corpus.description, corpus.tokenizer.save
        self.introduction = [f"validation: {corpus.valid_description}"]
        ends: Any = (self.model.config, self.model.generation_config)
        for part in ends:  # of the tokenizer, which the model was not made for
            part.eos_token_id, part.bos_token_id = corpus.tokenizer.eos_id, None
        if config.layers is not None:
            name = config.to_json()["layers"]["name"]
            self.introduction.insert(0, f"{name} in place of {len(self.replaced)} layers")
        self._train, self._valid = corpus.train, corpus.valid
        self._scored = corpus.valid.rows_of(config.eval_tokens)
        self._watch, self._step = watch, config.steps  # until another one is trained

    def batch(self, position: int, size: int, seed: int) -> Batch:
        self._step = position // size + 1
        inputs, targets = self._train.batch(position, size, seed)
        return Batch({"input_ids": inputs}, targets)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return token_loss(model, batch.inputs["input_ids"], batch.targets)

    def evaluate(self, batch_size: int, micro_batch_size: int, world: World) -> Score:
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
        score = evaluate(self.model, self._valid, rows=self._scored, world=world, **sizes)
        if (watch := self._watch) is not None and (why := world.from_main(lambda: watch(self._step, score))):
            raise Pruned(f"step {self._step}: {why}")
        return score
