"""Pre-training: rows of running text, a fresh model, the loss of the next token."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gossamer.data import Batch, open_corpus
from gossamer.distributed import World
from gossamer.evaluate import Score, evaluate, token_loss
from gossamer.train.build import build
from gossamer.train.config import Pretrain
from gossamer.train.loop import Result, train


def pretrain(config: Pretrain[Any, Any, Any], *, label: str | None = None, quiet: bool = False) -> Result[Score]:
    """Train the model that `config` describes and evaluate it; all else is as in `gossamer.train.loop.train`."""
    return train(config, lambda world: Text(config, world), label=label, quiet=quiet)


class Text:
    """The `Job` of a `Pretrain`."""

    def __init__(self, config: Pretrain[Any, Any, Any], world: World) -> None:
        corpus = open_corpus(config.data, train_tokens=config.steps * config.batch_size * config.data.seq_len)
        self.model, self.replaced = build(config, corpus.tokenizer.vocab_size, world.device)
        self.source, self.fingerprint = config.data.data, corpus.train.fingerprint
        self.description, self.save_tokenizer = corpus.description, corpus.tokenizer.save
        self.introduction = [f"validation: {corpus.valid_description}"]
        if config.layers is not None:
            name = config.to_json()["layers"]["name"]
            self.introduction.insert(0, f"{name} in place of {len(self.replaced)} layers")
        self._train, self._valid, self._eval_tokens = corpus.train, corpus.valid, config.eval_tokens

    def batch(self, position: int, size: int, seed: int) -> Batch:
        inputs, targets = self._train.batch(position, size, seed)
        return Batch({"input_ids": inputs}, targets)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return token_loss(model, batch.inputs["input_ids"], batch.targets)

    def evaluate(self, batch_size: int, micro_batch_size: int, world: World) -> Score:
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
        return evaluate(self.model, self._valid, tokens=self._eval_tokens, world=world, **sizes)
