"""Pre-training, readable in one sitting: build everything, step, look now and then, save."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from gossamer.data import IGNORED, open_corpus
from gossamer.distributed import World, start, stop
from gossamer.errors import UserError
from gossamer.evaluate import Score, evaluate, token_loss
from gossamer.memory import predict
from gossamer.optim import Optimizer, param_groups
from gossamer.optim.diagnostics import Diagnostics
from gossamer.restarts import Restarter, in_words
from gossamer.train import log as logs
from gossamer.train.build import build
from gossamer.train.checkpoint import Checkpoints, read_training, reading, restore
from gossamer.train.config import Pretrain, check_resumable


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    score: Score
    seconds: float
    tokens_per_second: float


def pretrain(config: Pretrain[Any, Any, Any], *, label: str | None = None, quiet: bool = False) -> Result:
    """Train the model that `config` describes and evaluate it; log and checkpoints go to `config.out`.

    Under `torchrun` every process calls this. A run that was killed at any moment continues with `resume=True`; on a
    CPU it then ends with the same bits as one that was not.

    Args:
        label: what the report calls the run. quiet: print nothing.

    Raises:
        UserError: bad input, a full disk, or a loss that is not finite.
    """
    world = start(config.device)
    try:
        return Run(config, world, label or config.out.name, quiet).train()
    finally:
        stop()


class Run:
    """Everything that a run holds; `train` is the loop."""

    def __init__(self, config: Pretrain[Any, Any, Any], world: World, label: str, quiet: bool) -> None:
        self.config, self.world, self.label = config, world, label
        self.plain = config.to_json()
        torch.manual_seed(config.seed)  # for models with dropout; nothing of ours draws from the global state
        self.corpus = open_corpus(config.data, train_tokens=config.steps * config.batch_size * config.data.seq_len)
        self.model, self.replaced = build(config, self.corpus.tokenizer.vocab_size, world.device)
        self.replica = world.parallel(torch.compile(self.model) if config.compile else self.model)  # pyright: ignore
        self.optimizer = Optimizer(
            param_groups(self.model, config.method, fallback=config.fallback, fallback_lr=config.fallback_lr),
            lr=config.lr,
            weight_decay=config.weight_decay,
            rounding=config.rounding,
            seed=config.seed,
        )
        watch = config.diagnose, config.diagnose_every
        self.diagnostics = Diagnostics(self.optimizer, *watch) if config.diagnose else None
        restarts = config.restarts
        self.restarter = Restarter(restarts, self.model, self.optimizer, seed=config.seed) if restarts else None
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, config.schedule())
        self.checkpoints = Checkpoints(config.out, config.keep_last)
        self.rows = world.share(config.batch_size)
        self.micro = config.micro_batch_size or self.rows.stop - self.rows.start
        self.done, self.seconds, self.tokens = 0, 0.0, 0
        self.display = logs.Display(label, config.steps, quiet=quiet or not world.is_main)
        self.log: logs.RunLog | None = None
        self.trackers: list[logs.Tracker] = []

    def train(self) -> Result:
        config = self.config
        try:
            self._open()
            before, begun, score = self.seconds, time.monotonic(), None
            self.display.start(self.done)
            while self.done < config.steps:
                loss, norm, lr = self._step()
                self.seconds = before + time.monotonic() - begun
                self._say("train", loss=loss, lr=lr, grad_norm=norm, tokens=self.tokens, seconds=self.seconds)
                if self.diagnostics is not None and self.diagnostics.records:
                    self._say("diagnostics", parameters=self.diagnostics.records)
                if self.restarter is not None and self.done < config.steps:
                    self._restart(self.restarter)
                self.display.step(self.done, loss, self.tokens / self.seconds, logs.memory_in_use(self.world.device))
                last = self.done == config.steps
                if last or (config.eval_every and self.done % config.eval_every == 0):
                    score = self._evaluate()
                if last or (config.save_every and self.done % config.save_every == 0):
                    self._save()
            return self._end(score or self._score())
        finally:
            self.display.close()
            if self.log is not None:
                self.log.close()

    def _open(self) -> None:
        """Start afresh or from a checkpoint, and say what is about to run."""
        config, found = self.config, None
        if config.resume:
            found = self.checkpoints.newest_sound(self.display.say)
            self.display.say(f"resuming from {found}" if found else f"no checkpoint in {config.out}: from the start")
        elif self.checkpoints.steps():
            raise UserError(f"out: {config.out} holds the checkpoints of a run; add --resume, or use another --out")
        if found is not None:
            with reading(found):
                training = read_training(found)
                check_resumable(training["config"], self.plain)
                if training["data"] != self.corpus.train.fingerprint:
                    raise UserError(
                        f"resume: the training data of {config.data.data} has changed since {found} was written"
                    )
                restore(found, self.model, self.optimizer, self.diagnostics, self.world.device)
                self.scheduler.load_state_dict(training["scheduler"])
                self.done, self.seconds, self.tokens = training["step"], training["seconds"], training["tokens"]
            if self.restarter is not None:
                self.restarter.resume(self.done)
        if self.replaced:
            self.display.say(f"{self.plain['layers']['name']} in place of {len(self.replaced)} layers")
        self.display.say(f"validation: {self.corpus.valid_description}")
        if not self.world.is_main:
            return
        self.log = logs.RunLog(config.out, resume_step=self.done if found else None)
        self.trackers = logs.start_trackers(config.trackers, config.out, self.plain)
        if found is not None:
            self._say("resume", checkpoint=str(found))
            return
        self._say(
            "start",
            **logs.what_runs(predict(self.model, config.method, fallback=config.fallback)),
            label=self.label,
            method=self.plain["method"]["name"],
            config=self.plain,
            data=self.corpus.description,
            plan=[asdict(row) for row in self.optimizer.plan()],
            replaced=self.replaced,
            diagnosed=self.diagnostics.watched() if self.diagnostics else [],
        )

    def _step(self) -> tuple[float, float, float]:
        """One optimizer step over `batch_size` rows; returns the mean loss, the gradient norm and the learning rate."""
        config, world = self.config, self.world
        inputs, targets = self.corpus.train.batch(self.done * config.batch_size, config.batch_size, config.seed)
        count = int((targets != IGNORED).sum())  # of the whole batch, so that every token weighs the same
        x, y = inputs[self.rows].split(self.micro), targets[self.rows].split(self.micro)
        nats = torch.zeros((), device=world.device)
        for i in range(len(x)):
            with world.accumulating(self.replica, last=i == len(x) - 1):
                part = token_loss(self.replica, x[i].to(world.device), y[i].to(world.device))
                (part * (world.size / count)).backward()
            nats += part.detach()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, config.clip or math.inf))
        loss, lr = float(world.sum(nats)) / count, float(self.scheduler.get_last_lr()[0])
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(
                f"step {self.done + 1}: the loss is {loss} and the gradient norm is {norm}; stopped before the "
                f"update; {self.checkpoints.last_good()}"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.done += 1
        self.tokens += count
        return loss, norm, lr

    def _restart(self, restarter: Restarter) -> None:
        if (event := restarter(self.done)) is not None:
            self._say("restart", **event)
            self.display.say(f"step {self.done}: restart: {in_words(event)}")

    def _score(self) -> Score:
        return evaluate(
            self.model,
            self.corpus.valid,
            tokens=self.config.eval_tokens,
            batch_size=self.config.batch_size,
            micro_batch_size=self.micro,
            world=self.world,
        )

    def _evaluate(self) -> Score:
        score = self._score()
        self._say("eval", **_numbers(score), tokens=score.tokens, batches=score.batches)
        self.display.say(
            f"step {self.done}: validation perplexity {score.perplexity:.3f} over {score.tokens:,} tokens "
            f"(legacy {score.legacy_perplexity:.3f})"
        )
        return score

    def _save(self) -> None:
        """Save on the main process; the others wait, so that no one runs ahead of a checkpoint that fails."""
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise UserError(f"step {self.done}: a weight is not finite; not saved; {self.checkpoints.last_good()}")
        if self.world.is_main:
            training = {
                "step": self.done,
                "seconds": self.seconds,
                "tokens": self.tokens,
                "data": self.corpus.train.fingerprint,
                "scheduler": self.scheduler.state_dict(),
                "config": self.plain,
            }
            parts = self.model, self.optimizer, self.diagnostics
            path = self.checkpoints.save(self.done, *parts, training, self.corpus.tokenizer.save)
            self._say("checkpoint", path=str(path))
        self.world.wait()

    def _end(self, score: Score) -> Result:
        speed = self.tokens / self.seconds if self.seconds else 0.0
        self._say(
            "end",
            seconds=self.seconds,
            **_numbers(score),
            eval_tokens=score.tokens,
            train_tokens=self.tokens,
            tokens_per_second=speed,
        )
        return Result(score, self.seconds, speed)

    def _say(self, event: str, **fields: Any) -> None:
        if self.log is None:
            return
        self.log.write(event, step=self.done, **fields)
        numbers = {f"{event}/{key}": float(v) for key, v in fields.items() if isinstance(v, (int, float))}
        for tracker in self.trackers:
            tracker(self.done, numbers)


def _numbers(score: Score) -> dict[str, float]:
    return {"loss": score.loss, "perplexity": score.perplexity, "legacy_perplexity": score.legacy_perplexity}
