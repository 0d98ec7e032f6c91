"""`gossamer eval`: a model, tasks, scores that can be audited."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gossamer.data import open_text
from gossamer.data.cache import digest, file_digest
from gossamer.data.config import Template
from gossamer.data.glue import LabelledRows, glue_task, read_glue
from gossamer.data.instructions import prompt_ids, render
from gossamer.data.records import read_records
from gossamer.distributed import World, start, stop
from gossamer.errors import UserError, nearest
from gossamer.evaluate import evaluate
from gossamer.evaluate.answers import Verifier
from gossamer.evaluate.exams import EXAMS
from gossamer.evaluate.generation import generate
from gossamer.evaluate.harness import run_harness
from gossamer.evaluate.labels import predict_labels, score_labels
from gossamer.evaluate.sandbox import isolation
from gossamer.models import check_row, head_width, load_model, load_tokenizer, locate, read_config
from gossamer.train.log import commit, hardware, versions

HARNESS = "lm-eval:"
_MODEL_FILES = ("config.json", "generation_config.json", "token*", "special_tokens*", "vocab*", "merges.txt", "*.model",
                "*.jinja", "model*.safetensors", "model*.json")  # fmt: skip
"""What decides a model's answers, and nothing of how it was trained."""
Samples = list[dict[str, Any]]


@dataclass(frozen=True)
class Evaluate:
    """Score a model on tasks. Every sample is kept beside the score."""

    model: str = ""
    """A Hugging Face folder with config.json, weights and tokenizer (such as a checkpoint of ours), or a hub name."""
    tasks: tuple[str, ...] = ("gsm8k",)
    """perplexity, gsm8k, math500, humaneval, mbpp, glue/cola, glue/rte ..., or lm-eval:TASK[,TASK...]."""
    data: tuple[str, ...] = ()
    """One for each task, in their order: a local file (of glue/* also a folder), `hf:REPO[:CONFIG]`, or of perplexity
    any text that `gossamer pretrain` reads; none: the tasks' own datasets on the hub."""
    out: Path = Path("runs/eval")
    """Folder of `results.jsonl`, to which a line is added, and of the samples."""
    template: Template | None = None
    """How prompts are put (alpaca, question, chat, none); None: as the task's papers do."""
    max_new_tokens: int | None = None
    """Tokens of an answer; None: the task's own limit."""
    batch_size: int = 8
    """Prompts or rows at once."""
    limit: int | None = None
    """The first so many questions only; of perplexity, tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations."""
    device: str = "auto"
    """auto, cpu or cuda."""
    allow_code_execution: bool = False
    """Run the programs that the model writes (humaneval, mbpp), in processes of their own, without network."""
    text_field: str = "text"
    """Of perplexity: the field of a record that holds its text."""
    seq_len: int = 256
    """Of perplexity: tokens predicted per row."""
    max_length: int = 128
    """Of glue/*: tokens of a row; longer ones are cut, and counted."""
    num_fewshot: int | None = None
    """Of lm-eval: examples before each question; None: as the task says."""
    tasks_folder: Path | None = None
    """Of lm-eval: a folder with YAML files of one's own tasks, in place of the library's."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "limit", "seq_len", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} is too small; allowed: an integer >= 1")
        if not self.tasks:
            raise UserError("tasks: none named; gsm8k, perplexity, ...")
        if len(self.data) not in (0, len(self.tasks)):
            raise UserError(f"data: {len(self.data)} sources for {len(self.tasks)} tasks: {', '.join(self.tasks)}")


@dataclass(frozen=True)
class _Found:
    """What a task's own part of an evaluation returns."""

    scores: dict[str, float]
    """The first one is the task's score."""
    counts: dict[str, Any]
    samples: Samples


_Run = Callable[[str, str | None, Evaluate, Path, World, bool], _Found]
"""Task, data, options, the model's folder, processes, quiet."""


def evaluate_model(options: Evaluate, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Score a model; returns the rows that were added to `results.jsonl`, one for each task.

    Raises:
        UserError: an unknown task, no such model or data, code that was not allowed to run.
    """
    sources = options.data or (None,) * len(options.tasks)
    runs = [(task, source, _task(task, source, options)) for task, source in zip(options.tasks, sources, strict=True)]
    world = start(options.device)
    try:
        folder = locate(options.model)
        model_digest = _digest_of(folder)
        return [
            _keep(options, task, run(task, source, options, folder, world, quiet), model_digest)
            for task, source, run in runs
        ]
    finally:
        stop()


def _keep(options: Evaluate, task: str, found: _Found, model_digest: str) -> dict[str, Any]:
    options.out.mkdir(parents=True, exist_ok=True)
    name = task.replace("/", "-").replace(":", "-")
    taken = len(list(options.out.glob(f"{name}-*.samples.jsonl")))
    samples = options.out / f"{name}-{taken + 1:03d}.samples.jsonl"
    if found.samples:
        samples.write_text("".join(json.dumps(sample, default=str) + "\n" for sample in found.samples))
    row = {
        "task": task,
        "scores": found.scores,
        **found.counts,
        "samples": samples.name if found.samples else None,
        "model": options.model,
        "model_digest": model_digest,
        "settings": {**asdict(options), "out": str(options.out), "tasks_folder": str(options.tasks_folder)},
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with (options.out / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def _digest_of(folder: Path) -> str:
    """32 hex digits that stand for a model's configuration, tokenizer and weights."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and any(map(path.match, _MODEL_FILES)))
    return digest("model", [(path.name, file_digest(path)) for path in files])


def _task(task: str, source: str | None, options: Evaluate) -> _Run:
    if task in EXAMS:
        if EXAMS[task].runs_code and not options.allow_code_execution:
            raise UserError(f"tasks: {task} runs programs that the model writes; --allow-code-execution permits it")
        return _examine
    if task == "perplexity":
        if source is None:
            raise UserError("data: perplexity of what? name a text file, a .jsonl, or hf:REPO[:CONFIG]")
        return _perplexity
    if task.startswith("glue/"):
        glue_task(task)
        return _glue
    if task.startswith(HARNESS) and len(task) > len(HARNESS):
        return _harness
    known = ("perplexity", *EXAMS, "glue/<task>", f"{HARNESS}<task>")
    raise UserError(f"tasks: unknown {task!r}{nearest(task, known)}; known: {', '.join(known)}")


def _examine(task: str, source: str | None, options: Evaluate, folder: Path, world: World, quiet: bool) -> _Found:
    exam = EXAMS[task]()
    records = read_records(source or exam.data, exam.split)
    template = options.template or exam.template
    questions = exam.questions(records, template)[: options.limit]
    tokenizer: Any = load_tokenizer(folder)
    texts = [render(template, question.prompt, "", tokenizer) for question in questions]
    model = load_model(folder, dtype=getattr(torch, options.dtype), device=world.device)
    with ExitStack() as stack:
        verifier = None if exam.runs_code else stack.enter_context(Verifier())
        report = stack.enter_context(_progress("answering", len(questions), quiet))
        said = generate(
            model,
            tokenizer,
            prompt_ids(tokenizer, template, texts),
            max_new_tokens=options.max_new_tokens or exam.max_new_tokens,
            stop=exam.stops(template),
            batch_size=options.batch_size,
            report=report,
        )
        report = stack.enter_context(_progress("judging", len(questions), quiet))
        samples = []
        for text, question, it in zip(texts, questions, said, strict=True):
            verdict = exam.judge(question, it.text, verifier)
            samples.append(
                {
                    "name": question.name,
                    "prompt": text,
                    "output": it.text,
                    "ended": it.ended,
                    "tokens": it.tokens,
                    "correct": verdict.correct,
                    **verdict.detail,
                }
            )
            report(len(samples))
    right = sum(sample["correct"] for sample in samples)
    score = right / len(samples)
    counts: dict[str, Any] = {
        "questions": len(samples),
        "correct": right,
        "standard_error": math.sqrt(score * (1 - score) / len(samples)),
        "not_finished": sum(it.ended == "length" for it in said),
        "prompt_too_long": sum(it.ended == "prompt too long" for it in said),
        "template": template,
        "data": {"source": records.name, "fingerprint": records.fingerprint},
    }
    if exam.runs_code:
        return _Found({"pass@1": score}, {**counts, "isolation": isolation()}, samples)
    return _Found({"accuracy": score}, counts, samples)


def _perplexity(task: str, source: str | None, options: Evaluate, folder: Path, world: World, quiet: bool) -> _Found:
    assert source is not None
    check_row("seq_len", options.seq_len, read_config(folder / "config.json"), str(folder))
    text = {"text_field": options.text_field, "tokenizer": str(folder), "seq_len": options.seq_len}
    rows, description = open_text(source, **text)
    model = load_model(folder, dtype=getattr(torch, options.dtype), device=world.device)
    scored = rows.num_rows if options.limit is None else rows.rows_of(options.limit)
    sizes = {"batch_size": options.batch_size, "micro_batch_size": options.batch_size}
    score = evaluate(model, rows, rows=scored, world=world, **sizes)
    scores = {"perplexity": score.perplexity, "loss": score.loss, "legacy_perplexity": score.legacy_perplexity}
    return _Found(scores, {"tokens": score.tokens, "data": description}, [])


def _glue(task: str, source: str | None, options: Evaluate, folder: Path, world: World, quiet: bool) -> _Found:
    spec = glue_task(task)
    check_row("max_length", options.max_length, read_config(folder / "config.json"), str(folder))
    data = read_glue(task, source, "dev")
    tokenizer: Any = load_tokenizer(folder)
    outputs = len(spec.labels) or 1
    if head_width(folder) is None:
        raise UserError(f"model: {folder} has no classification head; gossamer finetune --task {task} trains one")
    data = data.first(options.limit)
    rows = LabelledRows(data, tokenizer, options.max_length, not spec.labels)
    dtype = getattr(torch, options.dtype)
    model: Any = load_model(folder, dtype=dtype, device=world.device, labels=outputs, pad_id=rows.pad_id)
    logits = predict_labels(model, rows, options.batch_size, world)
    score = score_labels(logits, rows.labels, spec.metrics)
    samples = [
        {"text": list(text), "label": label, "logits": row}
        for text, label, row in zip(data.texts, data.labels, logits.tolist(), strict=True)
    ]
    read = {"source": data.name, "fingerprint": data.fingerprint}
    counts = {"examples": rows.num_rows, "cut": rows.num_cut, "data": read}
    return _Found({"score": score.score, **score.metrics, "loss": score.loss}, counts, samples)


def _harness(task: str, source: str | None, options: Evaluate, folder: Path, world: World, quiet: bool) -> _Found:
    model = load_model(folder, dtype=getattr(torch, options.dtype), device=world.device)
    found = run_harness(
        model,
        load_tokenizer(folder),
        task.removeprefix(HARNESS).split(","),
        folder=options.tasks_folder,
        batch_size=options.batch_size,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
    )
    return _Found(found.metrics, {"task_versions": found.versions, "questions": len(found.samples)}, found.samples)


@contextmanager
def _progress(title: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A function that shows how much is done: a bar on a terminal, else nothing."""
    if quiet or not sys.stderr.isatty():
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown = bar.add_task(title, total=total)
        yield lambda done: bar.update(shown, completed=done)
