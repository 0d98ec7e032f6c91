"""Training, readable in one sitting: build everything, step, look now and then, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch

from gossamer.distributed import World, local, start, stop
from gossamer.errors import Diverged, UserError
from gossamer.memory import predict
from gossamer.optim.diagnostics import Diagnostics
from gossamer.restarts import Restarter, in_words
from gossamer.train import log as logs
from gossamer.train.build import build_optimizer
from gossamer.train.checkpoint import Checkpoints, Parts, reading
from gossamer.train.config import Training
from gossamer.train.gradients import gradients_of
from gossamer.train.job import Job, Outcome
from gossamer.train.stopping import Stopping

S = TypeVar("S", bound=Outcome)


@dataclass(frozen=True)
class Result(Generic[S]):
    """How a run ended."""

    score: S
    seconds: float
    tokens_per_second: float


def train(
    config: Training[Any, Any], make_job: Callable[[World], Job], *, label: str | None = None, quiet: bool = False
) -> Result[Any]:
    """Train the model of a job and evaluate it; log and checkpoints go to `config.out`.

    Under `torchrun` every process calls this. A run that was killed at any moment continues with `resume=True`; on a
    CPU it then ends with the same bits as one that was not. SIGTERM ends it with a checkpoint and `SystemExit(0)`.

    Args:
        make_job: what is trained, on what, towards what; made once this process knows its device.
        label: what the report calls the run. quiet: print nothing.

    Raises:
        UserError: bad input, a full disk, a loss that is not finite, or a process that is gone.
    """
    world = start(config.device, config.timeout)
    try:
        with world.together(), Stopping() as stopping:
            return Run(config, make_job, world, stopping, label or config.out.name, quiet).train()
    finally:
        stop()


class Run:
    """Everything that a run holds; `train` is the loop."""

    def __init__(
        self,
        config: Training[Any, Any],
        make_job: Callable[[World], Job],
        world: World,
        stopping: Stopping,
        label: str,
        quiet: bool,
    ) -> None:
        self.config, self.world, self.stopping, self.label = config, world, stopping, label
        self.plain = config.to_json()
        world.seed(config.seed)  # for models with dropout; nothing of ours draws from the global state
        self.job = make_job(world)
        self.model = self.job.model
        self.rows = world.share(config.batch_size)
        self.micro = config.micro_batch_size or self.rows.stop - self.rows.start
        released = config.release_gradients and self.rows.stop - self.rows.start == self.micro  # else all are held
        self.memory = predict(self.model, config.method, fallback=config.fallback, release_gradients=released)
        self.checkpoints = Checkpoints(config.out, config.keep_last, world, self.model)
        compiled: Any = torch.compile(self.model) if config.compile else self.model
        self.replica = world.parallel(compiled, config.parallel)
        self.optimizer = build_optimizer(config, self.model)
        self.gradients = gradients_of(config, self.model, self.optimizer, world)
        watch = config.diagnose, config.diagnose_every
        self.diagnostics = Diagnostics(self.optimizer, *watch) if config.diagnose else None
        restarts = config.restarts
        self.restarter = Restarter(restarts, self.model, self.optimizer, seed=config.seed) if restarts else None
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, config.schedule())
        self.parts = Parts(self.model, self.optimizer, self.diagnostics)
        self.done, self.seconds, self.tokens, self.skipped = 0, 0.0, 0, 0
        self.display = logs.Display(label, config.steps, quiet=quiet or not world.is_main)
        self.journal: logs.Journal | None = None

    def train(self) -> Result[Any]:
        config = self.config
        try:
            self._open()
            before, begun, score = self.seconds, time.monotonic(), None
            self.display.start(self.done)
            while self.done < config.steps:
                loss, norm, lr, stopping = self._step()
                self.seconds = before + time.monotonic() - begun
                self._say_step(loss, norm, lr)
                if self.restarter is not None and self.done < config.steps:
                    self._restart(self.restarter)
                self.display.step(self.done, loss, self.tokens / self.seconds, logs.memory_in_use(self.world.device))
                last = self.done == config.steps
                if last or (config.eval_every and self.done % config.eval_every == 0):
                    score = self._evaluate()
                if last or stopping or (config.save_every and self.done % config.save_every == 0):
                    self._save()
                if stopping and not last:
                    self._settle()
                    self._say("stop")
                    self.display.say(f"step {self.done}: stopped by SIGTERM and saved; --resume continues")
                    raise SystemExit(0)
            self._settle()
            result = self._end(score or self._score())
            if self.world.any(self.stopping.asked):  # too late to be noticed by a step; whoever trains on must hear it
                self.display.say("finished; stopped by SIGTERM")
                raise SystemExit(0)
            return result
        except UserError as error:
            self.checkpoints.settle_after(error)
            raise
        finally:
            self.display.close()
            if self.journal is not None:
                self.journal.close()

    def _open(self) -> None:
        """Start afresh or from a checkpoint, and say what is about to run."""
        config, job, found, say = self.config, self.job, None, self.display.say
        if (opened := self.checkpoints.open(config, job.source, job.fingerprint, say)) is not None:
            found, training = opened
            with reading(found):
                self.checkpoints.restore(found, self.parts, training)
                self.scheduler.load_state_dict(training["scheduler"])
                self.done, self.seconds, self.tokens = training["step"], training["seconds"], training["tokens"]
                self.skipped = training["skipped"]
            if self.restarter is not None:
                self.restarter.resume(self.done)
        for line in job.introduction:
            say(line)
        if not self.world.is_main:
            return
        since = self.done if found else None
        self.journal = logs.Journal(config.out, config.trackers, self.plain, resume_step=since)
        if found is not None:
            self._say("resume", checkpoint=str(found))
            return
        self._say(
            "start",
            **logs.what_runs(self.memory),
            label=self.label,
            method=self.plain["method"]["name"],
            config=self.plain,
            data=job.description,
            plan=[asdict(row) for row in self.optimizer.plan()],
            replaced=job.replaced,
            diagnosed=self.diagnostics.watched() if self.diagnostics else [],
        )

    def _step(self) -> tuple[float, float, float, bool]:
        """One step over `batch_size` rows: mean loss, gradient norm, learning rate; whether a process is to stop."""
        config, world = self.config, self.world
        batch = self.job.batch(self.done * config.batch_size, config.batch_size, config.seed)
        count = batch.count  # of the whole batch, so that every target weighs the same
        parts = batch.rows(self.rows).split(self.micro)
        nats = torch.zeros((), device=world.device)
        for i in range(len(parts)):
            last = i == len(parts) - 1
            with world.accumulating(self.replica, last or self.gradients.averaged_at_once):
                part = self.job.loss(self.replica, parts[i].to(world.device))
                self.gradients.backward(part * (world.size / count), last)
            nats += part.detach()
        norm = self.gradients.norm()
        asked = torch.full_like(nats, self.stopping.asked)
        total, asked = world.sum(torch.stack([nats, asked])).tolist()
        loss, lr = total / count, float(self.scheduler.get_last_lr()[0])
        finite = math.isfinite(loss) and math.isfinite(norm)
        if not finite and config.on_nonfinite == "stop":
            raise Diverged(
                f"step {self.done + 1}: the loss is {loss} and the gradient norm is {norm}; stopped "
                f"{self.gradients.stopped}; {self.checkpoints.last_good()}"
            )
        if finite:
            self.optimizer.step()
            self.tokens += batch.tokens
        self.skipped += not finite
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss, norm, lr, asked > 0

    def _say_step(self, loss: float, norm: float, lr: float) -> None:
        numbers = {"loss": loss, "lr": lr, "grad_norm": norm, "tokens": self.tokens, "seconds": self.seconds}
        if not math.isfinite(loss + norm):
            self._say("skip", **numbers, skipped=self.skipped)
            self.display.say(f"step {self.done}: skipped: the loss is {loss} and the gradient norm is {norm}")
            return
        self._say("train", **numbers)
        if self.diagnostics is not None and self.diagnostics.records:
            self._say("diagnostics", parameters=self.diagnostics.records)

    def _restart(self, restarter: Restarter) -> None:
        if (event := restarter(self.done)) is not None:
            self._say("restart", **event)
            self.display.say(f"step {self.done}: restart: {in_words(event)}")

    def _score(self) -> Outcome:
        return self.job.evaluate(self.config.batch_size, self.micro, self.world)

    def _evaluate(self) -> Outcome:
        score = self._score()
        self._say("eval", **score.numbers(), tokens=score.tokens, batches=score.batches)
        self.display.say(f"step {self.done}: validation {score}")
        return score

    def _save(self) -> None:
        if self.world.any(not all(bool(local(p).isfinite().all()) for p in self.model.parameters())):
            raise Diverged(f"step {self.done}: a weight is not finite; not saved; {self.checkpoints.last_good()}")
        self._settle()
        counted = {"seconds": self.seconds, "tokens": self.tokens, "skipped": self.skipped}
        made_by = {"data": self.job.fingerprint, "config": self.plain}
        training = {**counted, **made_by, "scheduler": self.scheduler.state_dict()}
        behind = self.config.async_save
        self.checkpoints.save(self.done, self.parts, training, self.job.save_tokenizer, behind=behind)
        if not behind:
            self._settle()

    def _settle(self) -> None:
        """Wait for the save that is under way."""
        if (saved := self.checkpoints.settle()) is not None and self.journal is not None:
            step, path = saved
            self.journal.write("checkpoint", step, path=str(path))

    def _end(self, score: Outcome) -> Result[Any]:
        speed = self.tokens / self.seconds if self.seconds else 0.0
        counted = {"eval_tokens": score.tokens, "train_tokens": self.tokens, "skipped": self.skipped}
        self._say("end", seconds=self.seconds, **score.numbers(), **counted, tokens_per_second=speed)
        return Result(score, self.seconds, speed)

    def _say(self, event: str, **fields: Any) -> None:
        if self.journal is not None:
            self.journal.write(event, self.done, **fields)
