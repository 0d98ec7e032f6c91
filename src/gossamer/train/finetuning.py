"""Fine-tuning: a model that is trained already, prompts and answers or labels, every weight or adapters."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal

import torch
import tyro
from torch import Tensor, nn

from gossamer import layers
from gossamer.data import Batch, TaskConfig
from gossamer.data.glue import GlueTask, LabelledRows, glue_task, read_glue
from gossamer.data.instructions import ExampleRows, open_instructions
from gossamer.distributed import World
from gossamer.errors import UserError
from gossamer.evaluate import Score, evaluate, token_loss
from gossamer.evaluate.labels import LabelScore, label_loss, predict_labels, score_labels
from gossamer.layers import Adapter
from gossamer.models import check_row, load_model, load_tokenizer, locate, new_parts, read_config
from gossamer.train.config import M, R, Training
from gossamer.train.loop import Result, train


@dataclass(frozen=True)
class Finetune(Training[M, R], Generic[M, R]):
    """Fine-tune a causal language model on answers, or a classifier on labels."""

    model: str = ""
    """A Hugging Face folder with config.json, weights and tokenizer (such as a checkpoint of ours), or a hub name."""
    data: Annotated[TaskConfig, tyro.conf.arg(name="")] = field(default_factory=TaskConfig)
    adapter: Adapter = field(default_factory=Adapter)
    """LoRA or DoRA in place of training every weight."""
    epochs: float | None = None
    """Passes over the training rows, instead of `steps`."""
    out: Path = Path("runs/finetune")
    """Folder of the log and the checkpoints."""
    dtype: Literal["float32", "bfloat16", "masters"] = "float32"  # pyright: ignore
    """Of weights, gradients and activations; `masters`: weights in fp32, computed with in bf16."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UserError(f"epochs: {self.epochs} is out of range; allowed: finite numbers > 0")

    @property
    def width(self) -> torch.dtype:
        """Of the weights."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def computing(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """In which forward passes run."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == "masters")


def finetune(config: Finetune[Any, Any], *, label: str | None = None, quiet: bool = False) -> Result[Any]:
    """Train the model that `config` names and evaluate it; all else is as in `gossamer.train.loop.train`."""
    material = prepare(config)
    if config.epochs is not None:
        steps = max(1, round(config.epochs * material.train.num_rows / config.batch_size))
        config = replace(config, steps=steps, epochs=None)
    job = Labels if material.task else Answers
    return train(config, lambda world: job(config, material, world), label=label, quiet=quiet)


@dataclass(frozen=True)
class Material:
    """What a run learns from, before a model is there."""

    folder: Path
    """Of the model."""
    tokenizer: Any
    train: Any
    """`ExampleRows`, or of glue/* `LabelledRows`."""
    valid: Any
    source: str
    fingerprint: str
    counts: dict[str, Any]
    """For machines (json-able)."""
    summary: str
    """For people."""
    task: GlueTask | None


def prepare(config: Finetune[Any, Any]) -> Material:
    """Read and tokenise what `config` asks for.

    Raises:
        UserError: no such model, tokenizer, task or file; rows longer than the model allows; nothing left.
    """
    folder = locate(config.model)
    tokenizer: Any = load_tokenizer(folder)
    glue = config.data.task.startswith("glue/")
    length = config.data.max_length or (128 if glue else 512)
    check_row("max_length", length, read_config(folder / "config.json"), config.model)
    if not glue:
        data = open_instructions(config.data, tokenizer, length)
        rows, source = (data.train, data.valid), data.name
        return Material(folder, tokenizer, *rows, source, data.fingerprint, data.counts, data.summary, None)
    task, opened = glue_task(config.data.task), []
    for name in ("prompt_field", "input_field", "answer_field", "packing"):
        if getattr(config.data, name):
            raise UserError(f"{name}: means nothing to {config.data.task}, whose rows are sentences with labels")
    if config.data.data and config.data.valid is None and Path(config.data.data).expanduser().is_file():
        raise UserError(f"valid: none is named, and data is one file, {config.data.data}; name a dev file, or a folder")
    for part, place in (("train", config.data.data), ("dev", config.data.valid or config.data.data)):
        labelled = read_glue(config.data.task, place, part)
        most = config.data.examples if part == "train" else config.data.valid_examples
        opened.append(LabelledRows(labelled.first(most), tokenizer, length, not task.labels))
    counts = {
        part: {"source": rows.name, "fingerprint": rows.fingerprint, "examples": rows.num_rows, "cut": rows.num_cut}
        for part, rows in zip(("train", "valid"), opened, strict=True)
    }
    train, valid = opened
    summary = (
        f"{config.data.task}: {train.num_rows:,} training examples ({train.num_cut:,} cut to {length} tokens), "
        f"{valid.num_rows:,} of validation ({valid.num_cut:,} cut)"
    )
    return Material(folder, tokenizer, train, valid, train.name, train.fingerprint, counts, summary, task)


class _Tuning(ABC):
    """What the two jobs share: a `gossamer.train.job.Job` but for its loss and its judge."""

    def __init__(self, config: Finetune[Any, Any], material: Material, world: World) -> None:
        task = material.task
        outputs = None if task is None else len(task.labels) or 1
        pad_id = None if task is None else material.train.pad_id
        options: dict[str, Any] = {"dtype": config.width, "device": world.device, "seed": config.seed}
        model: Any = load_model(material.folder, labels=outputs, pad_id=pad_id, **options)
        room = model.get_input_embeddings().num_embeddings
        if len(material.tokenizer) > room:
            raise UserError(
                f"model: the tokenizer of {material.folder} has {len(material.tokenizer):,} tokens, its model has "
                f"room for {room:,}"
            )
        self.replaced: list[str] = []
        self.introduction = [material.summary]
        if config.adapter.kind is not None:
            head = [] if task is None else new_parts(model)
            self.replaced = layers.adapt(model, config.adapter, trained=head, seed=config.seed)
            self.introduction.insert(0, f"{config.adapter.kind} beside {len(self.replaced)} layers")
        if config.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = model.train()
        self.source, self.fingerprint = material.source, material.fingerprint
        self.description = {"source": material.source, "task": config.data.task, **material.counts}
        self._config, self._material = config, material

    def batch(self, position: int, size: int, seed: int) -> Batch:
        return self._material.train.batch(position, size, seed)

    def save_tokenizer(self, folder: Path) -> None:
        self._material.tokenizer.save_pretrained(folder)

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...


class Answers(_Tuning):
    """The loss of every token of an answer, given the prompt and the answer so far."""

    def __init__(self, config: Finetune[Any, Any], material: Material, world: World) -> None:
        super().__init__(config, material, world)
        if config.data.packing:
            check_packing(self.model, world.device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        others = {name: tensor for name, tensor in batch.inputs.items() if name != "input_ids"}
        with self._config.computing(batch.targets.device):
            return token_loss(model, batch.inputs["input_ids"], batch.targets, **others)

    def evaluate(self, batch_size: int, micro_batch_size: int, world: World) -> Score:
        rows: Any = _Pairs(self._material.valid)
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
        with self._config.computing(world.device):
            return evaluate(self.model, rows, rows=rows.num_rows, world=world, **sizes)


class _Pairs:
    """`ExampleRows` as `evaluate` reads them."""

    def __init__(self, rows: ExampleRows) -> None:
        self.num_rows, self.seq_len, self._rows = rows.num_rows, rows.seq_len, rows

    def batch(self, position: int, size: int, seed: int | None) -> tuple[Tensor, Tensor]:
        batch = self._rows.batch(position, size, seed)
        return batch.inputs["input_ids"], batch.targets


class Labels(_Tuning):
    """The loss of the label of a sentence or a pair."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with self._config.computing(batch.targets.device):
            return label_loss(model, batch)

    def evaluate(self, batch_size: int, micro_batch_size: int, world: World) -> LabelScore:
        rows, task = self._material.valid, self._material.task
        assert task is not None
        with self._config.computing(world.device):
            logits = predict_labels(self.model, rows, micro_batch_size, world)
        return score_labels(logits, rows.labels, task.metrics, -(-rows.num_rows // micro_batch_size))


@torch.no_grad()
def check_packing(model: nn.Module, device: torch.device) -> None:
    """See for oneself that what a model says of a packed example does not depend on the one before it.

    Raises:
        UserError: it does.
    """
    was_training = model.training
    model.eval()
    first = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]], device=device)
    second = torch.tensor([9, 10, 11, 12], device=device).expand(2, 4)
    positions = torch.arange(4, device=device).repeat(2).expand(2, 8)
    one, other = model(input_ids=torch.cat([first, second], dim=1), position_ids=positions).logits[:, 4:].float()
    model.train(was_training)
    # a masked score is exactly no weight; what is left are sums of other shapes in another order
    if not torch.allclose(one, other, rtol=0, atol=1e-3 * float(one.abs().max())):
        raise UserError(f"packing: examples of one row see one another in {type(model).__name__}; train without it")
