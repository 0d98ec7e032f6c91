"""GLUE: sentences and pairs with labels, from the benchmark's TSV files or the hub, and padded rows of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.data.batch import Batch
from gossamer.data.cache import digest, file_digest
from gossamer.data.records import Record, read_records
from gossamer.data.sources import HUB
from gossamer.data.stream import Order
from gossamer.errors import UserError, nearest

REPOSITORY = "hf:nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One of the benchmark's tasks."""

    folder: str
    """Its name in the benchmark's archive."""
    columns: tuple[str, ...]
    """The sentence, or the two, in the TSV files' header."""
    label: str
    """The label's column."""
    labels: tuple[str, ...]
    """The TSV files' words for labels 0, 1, ...; none: the label is a number."""
    metrics: tuple[str, ...]
    """Of `gossamer.evaluate.metrics`; their mean is the task's score."""
    dev: str = "dev.tsv"
    header: tuple[str, ...] = ()
    """Column names where the files have no header."""
    hub: tuple[str, ...] = ()
    """The sentences' fields on the hub, if they are called otherwise."""
    lowest: float = 0.0
    highest: float = 5.0
    """Between which a label that is a number lies."""


_BINARY, _NLI = ("0", "1"), ("entailment", "neutral", "contradiction")
_PAIR = ("sentence1", "sentence2")
GLUE = {
    "cola": GlueTask(
        "CoLA", ("sentence",), "label", _BINARY, ("matthews",), header=("source", "label", "mark", "sentence")
    ),
    "sst2": GlueTask("SST-2", ("sentence",), "label", _BINARY, ("accuracy",)),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", _BINARY, ("accuracy", "f1"), hub=_PAIR),
    "stsb": GlueTask("STS-B", _PAIR, "score", (), ("pearson", "spearman")),
    "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate", _BINARY, ("accuracy", "f1")),
    "mnli": GlueTask(
        "MNLI", _PAIR, "gold_label", _NLI, ("accuracy",), dev="dev_matched.tsv", hub=("premise", "hypothesis")
    ),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", ("entailment", "not_entailment"), ("accuracy",)),
    "rte": GlueTask("RTE", _PAIR, "label", ("entailment", "not_entailment"), ("accuracy",)),
    "wnli": GlueTask("WNLI", _PAIR, "label", _BINARY, ("accuracy",)),
}


@dataclass(frozen=True)
class Labelled:
    """Sentences or pairs, and their labels."""

    name: str
    fingerprint: str
    texts: list[tuple[str, ...]]
    labels: list[float]

    def first(self, count: int | None) -> Labelled:
        """The first `count` of them; None: all."""
        return replace(self, texts=self.texts[:count], labels=self.labels[:count])


def glue_task(name: str) -> GlueTask:
    """The task of `glue/<name>`. A `UserError` if there is none."""
    short = name.removeprefix("glue/")
    if short not in GLUE:
        raise UserError(f"task: unknown glue/{short}{nearest(short, GLUE)}; known: {', '.join(GLUE)}")
    return GLUE[short]


def read_glue(name: str, data: str | None, part: str) -> Labelled:
    """The part "train" or "dev" of a task.

    Args:
        data: a TSV file, or a folder with the benchmark's files, or with the task's folder in it; None: the hub.

    Raises:
        UserError: no such file, a line with too few columns, a label out of the task's range.
    """
    task, short = glue_task(name), name.removeprefix("glue/")
    if data is None:
        split = "train" if part == "train" else "validation_matched" if short == "mnli" else "validation"
        found = read_records(f"{REPOSITORY}:{short}", split)
        columns, label = task.hub or task.columns, "label"
        records, title, print_ = found.records, found.name, found.fingerprint
    elif data.startswith(HUB):
        raise UserError(f"data: {data!r}: the benchmark's own dataset is read where no data is named")
    else:
        path = _find(Path(data).expanduser(), task, part)
        records, title, print_ = list(_rows(path, task)), str(path), digest("glue", file_digest(path))
        columns, label = task.columns, task.label
    if not records:
        raise UserError(f"{title}: no records")
    texts = [tuple(record.text(column) for column in columns) for record in records]
    labels = [_label(record, record.text(label), task, words=data is not None) for record in records]
    return Labelled(title, print_, texts, labels)


def _find(place: Path, task: GlueTask, part: str) -> Path:
    name = "train.tsv" if part == "train" else task.dev
    for path in (place, place / name, place / task.folder / name):
        if path.is_file():
            return path
    raise UserError(f"data: no {name} in {place} or {place / task.folder}")


def _rows(path: Path, task: GlueTask) -> Iterator[Record]:
    """The file's rows by column. GLUE's files have no quoting: a quotation mark is a character."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    if lines[-1] == "":
        lines.pop()
    header = task.header or tuple(lines[0].rstrip("\r").split("\t")) if lines else ()
    first = 1 if task.header else 2
    for column in (*task.columns, task.label):
        if column not in header:
            raise UserError(f"{path}, line 1: no column {column!r}; it has: {', '.join(header) or 'none'}")
    for number, line in enumerate(lines[first - 1 :], first):
        cells = line.rstrip("\r").split("\t")
        if len(cells) < len(header):
            raise UserError(f"{path}, line {number}: {len(cells)} columns, not {len(header)}")
        yield Record(f"{path}, line {number}", dict(zip(header, cells, strict=False)))


def _label(record: Record, value: str, task: GlueTask, words: bool) -> float:
    if task.labels:
        allowed = task.labels if words else tuple(map(str, range(len(task.labels))))
        if value not in allowed:
            raise UserError(f"{record.where}: label {value!r} is out of range; allowed: {', '.join(allowed)}")
        return float(allowed.index(value))
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not task.lowest <= number <= task.highest:
        raise UserError(
            f"{record.where}: label {value!r} is out of range; allowed: {task.lowest:g} to {task.highest:g}"
        )
    return number


class LabelledRows:
    """Tokenised sentences or pairs, a row each; those longer than `max_length` are cut, and counted."""

    def __init__(self, data: Labelled, tokenizer: Any, max_length: int, regression: bool):
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if pad_id is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has neither a padding token nor an end-of-text token"
            )
        self.pad_id = pad_id
        self.name, self.num_rows, self._regression = data.name, len(data.texts), regression
        # a tokenizer that has no mark between two sentences is given one text of two lines
        texts = data.texts if tokenizer.sep_token_id is not None else [("\n".join(text),) for text in data.texts]
        pair: Sequence[list[str]] = [list(column) for column in zip(*texts, strict=True)]
        encoded = tokenizer(*pair, truncation=True, max_length=max_length, return_attention_mask=False)
        whole = tokenizer(*pair, return_attention_mask=False, verbose=False)["input_ids"]
        self.num_cut = sum(len(ids) > max_length for ids in whole)
        self._columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
        self._pads = {"input_ids": pad_id, "token_type_ids": 0}
        self.labels = np.array(data.labels)
        self.num_tokens = sum(map(len, encoded["input_ids"]))
        self.fingerprint = digest("labelled", data.fingerprint, max_length, encoded["input_ids"][:100], data.labels)
        self._order = Order(self.num_rows)

    def batch(self, position: int, size: int, seed: int | None) -> Batch:
        """Rows `position .. position + size` of the endless order of `seed`; None: of the file's, which ends."""
        rows = range(position, min(position + size, self.num_rows))
        chosen = rows if seed is None else self._order.rows(position, size, seed)
        lengths = [len(self._columns["input_ids"][i]) for i in chosen]
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        arrays: dict[str, Any] = {"attention_mask": mask.astype(np.int64)}
        for name, column in self._columns.items():
            arrays[name] = np.full(mask.shape, self._pads[name], dtype=np.int64)
            arrays[name][mask] = np.concatenate([column[i] for i in chosen])
        labels = self.labels[list(chosen)]
        targets = torch.tensor(labels, dtype=torch.float32 if self._regression else torch.int64)
        return Batch({name: torch.from_numpy(array) for name, array in arrays.items()}, targets)
