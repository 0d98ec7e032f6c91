"""Prompts and answers: the tasks that models are fine-tuned on, the templates, and rows in which only answers count."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.data.batch import IGNORED, Batch
from gossamer.data.cache import digest
from gossamer.data.config import TaskConfig, Template
from gossamer.data.records import Record, read_records
from gossamer.data.stream import Order
from gossamer.errors import UserError, first_line, nearest

_ALPACA = (
    "Below is an instruction that describes a task{more}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{prompt}{input}\n\n### Response:\n"
)
HELD_OUT = 1000
"""Examples held out for validation where nobody says how many, but no more than a tenth of all."""
_CHUNK = 1000
_CODE_BLOCK = re.compile(r"```.*?```", re.DOTALL)


@dataclass(frozen=True)
class InstructionTask:
    """A dataset of prompts and answers, and what the papers take of it."""

    data: str | None
    """On the hub; None: only local files."""
    prompt: str
    """The field that holds the prompt."""
    answer: str
    input: str | None = None
    """The field of what the prompt is about, if it has one."""
    refuse: Callable[[dict[str, Any]], str | None] = lambda fields: None
    """Why a record is passed over, or None."""
    cut: Callable[[str], str] = lambda answer: answer
    """What of an answer is learnt."""


def _only_gsm(fields: dict[str, Any]) -> str | None:
    return None if "GSM" in str(fields.get("type", "")) else "not of GSM8K"


def _with_code(fields: dict[str, Any]) -> str | None:
    return None if _CODE_BLOCK.search(str(fields.get("answer", ""))) else "no code block"


def _to_first_block(answer: str) -> str:
    """Up to the end of the first code block, as MLorc's authors cut it."""
    block = _CODE_BLOCK.search(answer)
    return answer[: block.end()] if block else answer


INSTRUCTION_TASKS = {
    "metamath": InstructionTask("hf:meta-math/MetaMathQA", "query", "response", refuse=_only_gsm),
    "gsm8k": InstructionTask("hf:openai/gsm8k:main", "question", "answer"),
    "codefeedback": InstructionTask(
        "hf:m-a-p/CodeFeedback-Filtered-Instruction", "query", "answer", refuse=_with_code, cut=_to_first_block
    ),
    "instructions": InstructionTask(None, "instruction", "output", "input"),
}


def render(template: Template, prompt: str, about: str, tokenizer: Any) -> str:
    """The text that comes before an answer.

    Args:
        about: what the prompt is about; "": nothing.
        tokenizer: whose chat template "chat" is.

    Raises:
        UserError: the tokenizer has no chat template, or it refuses a single message of the user's.
    """
    if template == "alpaca":
        more = ", paired with an input that provides further context" if about else ""
        return _ALPACA.format(more=more, prompt=prompt, input=f"\n\n### Input:\n{about}" if about else "")
    prompt = f"{prompt}\n{about}" if about else prompt
    if template == "none":
        return prompt
    if template == "question":
        return f"Question: {prompt}\nAnswer:"
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError(f"template: the tokenizer of {tokenizer.name_or_path} has no chat template; allowed: "
                        "alpaca, question, none")  # fmt: skip
    try:
        message = {"role": "user", "content": prompt}
        return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    except Exception as error:  # jinja's errors, and whatever the template raises
        raise UserError(
            f"template: the chat template of {tokenizer.name_or_path} fails: {first_line(error)}"
        ) from error


def prompt_ids(tokenizer: Any, template: Template, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts, as an answer may follow: with the tokenizer's first token, without its last."""
    # a chat template writes its special tokens itself
    encoded = tokenizer(list(prompts), add_special_tokens=template != "chat", return_attention_mask=False)["input_ids"]
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in encoded]


@dataclass(frozen=True)
class Instructions:
    """Training and validation rows of one task."""

    train: ExampleRows
    valid: ExampleRows
    name: str
    counts: dict[str, Any]
    """For machines (json-able): how many records were read, used, and passed over for which reason."""
    summary: str
    """The same for people."""
    fingerprint: str
    """Changes when any training row may."""


class ExampleRows:
    """Rows of one example each, or of as many as fit: (token ids, length of the prompt) pairs.

    Only answers are targets. Packed examples do not see one another: positions begin anew with each, by which
    `transformers` tells them apart.
    """

    def __init__(self, examples: list[tuple[NDArray[np.int32], int]], *, max_length: int, packing: bool, pad_id: int):
        self.examples, self._packing, self._pad_id = examples, packing, pad_id
        lengths = [len(ids) - 1 for ids, _ in examples]
        self.rows: list[list[int]] = []
        room = 0
        for index, length in enumerate(lengths):
            if not packing or length > room:
                self.rows.append([])
                room = max_length - 1
            self.rows[-1].append(index)
            room -= length
        self.num_rows = len(self.rows)
        self.seq_len = max(sum(lengths[i] for i in row) for row in self.rows)
        self.num_tokens = sum(len(ids) - prompt for ids, prompt in examples)
        self._order = Order(self.num_rows)

    def batch(self, position: int, size: int, seed: int | None) -> Batch:
        """Rows `position .. position + size` of the endless order of `seed`; None: of the file's, which ends."""
        if seed is None:
            rows = self.rows[position : position + size]
        else:
            rows = [self.rows[i] for i in self._order.rows(position, size, seed)]
        length = max(sum(len(self.examples[i][0]) - 1 for i in row) for row in rows)
        inputs = np.full((len(rows), length), self._pad_id, dtype=np.int64)
        targets = np.full((len(rows), length), IGNORED, dtype=np.int64)
        positions = np.zeros((len(rows), length), dtype=np.int64)
        for r, row in enumerate(rows):
            start = 0
            for i in row:
                ids, prompt = self.examples[i]
                end = start + len(ids) - 1
                inputs[r, start:end] = ids[:-1]
                targets[r, start + prompt - 1 : end] = ids[prompt:]
                positions[r, start:end] = np.arange(end - start)
                start = end
            positions[r, start:] = np.arange(length - start)  # padding is one more example, which nothing is asked of
        tensors = {"input_ids": inputs, **({"position_ids": positions} if self._packing else {})}
        return Batch({name: torch.from_numpy(array) for name, array in tensors.items()}, torch.from_numpy(targets))


def open_instructions(config: TaskConfig, tokenizer: Any, max_length: int) -> Instructions:
    """Read, filter and tokenise what `config` asks for.

    The first `examples` that are short enough are trained on, in the order of the file; validation is `valid`, or the
    `valid_examples` after them. Examples longer than `max_length` tokens are dropped, and counted.

    Args:
        tokenizer: a `transformers` tokenizer with an eos token.
        max_length: of an example, prompt, answer and special tokens together.

    Raises:
        UserError: an unknown task, nothing to read, a record without its fields, nothing left.
    """
    task = instruction_task(config)
    source = config.data or task.data
    if source is None:
        raise UserError(f"data: task {config.task!r} needs a local file; name it")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no end-of-text token: its eos_token is not set")
    found = read_records(source)
    passed: Counter[str] = Counter()
    held_out = 0
    if config.valid is None:
        held_out = config.valid_examples or min(HELD_OUT, max(1, len(found.records) // 10))
    needed = None if config.examples is None else config.examples + held_out
    examples, used = _examples(found.records, task, config, tokenizer, max_length, needed, passed)
    if config.valid is not None:
        own = read_records(config.valid)
        valid_passed: Counter[str] = Counter()
        held, valid_used = _examples(
            own.records, task, config, tokenizer, max_length, config.valid_examples, valid_passed
        )
        train, valid_name, valid_print = examples, own.name, own.fingerprint
    else:
        cut = max(0, len(examples) - held_out)
        train, held, valid_passed, valid_used = examples[:cut], examples[cut:], Counter(), 0
        valid_name, valid_print = f"the last {len(held):,} of them, held out", found.fingerprint
    for part, kept, why in (("training", train, passed), ("validation", held, valid_passed or passed)):
        if not kept:
            raise UserError(f"no {part} examples are left of {source}{_because(why)}")
    counts = {
        "train": {"source": found.name, "fingerprint": found.fingerprint, "read": used, "examples": len(train)},
        "valid": {"source": valid_name, "fingerprint": valid_print, "read": valid_used, "examples": len(held)},
    }
    counts["train"]["passed_over"], counts["valid"]["passed_over"] = dict(passed), dict(valid_passed)
    sizes: dict[str, Any] = {"max_length": max_length, "pad_id": tokenizer.eos_token_id}
    rows = ExampleRows(train, packing=config.packing, **sizes), ExampleRows(held, packing=False, **sizes)
    for part, its in zip(("train", "valid"), rows, strict=True):
        counts[part] |= {"rows": its.num_rows, "tokens": its.num_tokens}
    summary = (
        f"{config.task}: {len(train):,} training examples, {len(held):,} of validation ({valid_name}), of {used:,} "
        f"records read{_because(passed)}"
    )
    probe = [train[i][0].tolist() for i in (0, len(train) // 2, -1)]
    print_ = digest("examples", counts["train"], repr(config), max_length, len(tokenizer), probe)
    return Instructions(*rows, found.name, counts, summary, print_)


def instruction_task(config: TaskConfig) -> InstructionTask:
    """The task with the fields that the configuration names.

    Raises:
        UserError: it is not known.
    """
    task = INSTRUCTION_TASKS.get(config.task)
    if task is None:
        known = (*INSTRUCTION_TASKS, "glue/<task>")
        raise UserError(f"task: unknown {config.task!r}{nearest(config.task, known)}; known: {', '.join(known)}")
    fields = config.prompt_field or task.prompt, config.answer_field or task.answer, config.input_field or task.input
    return InstructionTask(task.data, *fields, refuse=task.refuse, cut=task.cut)


def _examples(
    records: Iterable[Record],
    task: InstructionTask,
    config: TaskConfig,
    tokenizer: Any,
    max_length: int,
    wanted: int | None,
    passed: Counter[str],
) -> tuple[list[tuple[NDArray[np.int32], int]], int]:
    """The first `wanted` examples (None: all) that can be used, and how many records were looked at for them."""
    examples: list[tuple[NDArray[np.int32], int]] = []
    used = 0
    records = list(records)
    for start in range(0, len(records), _CHUNK):
        texts = []
        for record in records[start : start + _CHUNK]:
            why = task.refuse(record.fields)
            prompt, answer = ("", "") if why else (record.text(task.prompt), task.cut(record.text(task.answer)))
            why = why or (None if prompt.strip() and answer.strip() else "empty")
            about = record.text(task.input) if task.input and task.input in record.fields and not why else ""
            texts.append((why, render(config.template, prompt, about, tokenizer) if not why else "", answer))
        prompts = prompt_ids(tokenizer, config.template, [text for _, text, _ in texts])
        # a chat template ends where the answer begins; elsewhere a space divides them
        gap = "" if config.template == "chat" else " "
        answers = tokenizer([gap + text for *_, text in texts], add_special_tokens=False)["input_ids"]
        for (why, *_), prompt, answer in zip(texts, prompts, answers, strict=True):
            if wanted is not None and len(examples) == wanted:
                return examples, used
            used += 1
            if why is None and len(prompt) + len(answer) + 1 > max_length:
                why = f"longer than {max_length} tokens"
            if why is None and not prompt:
                why = "empty"
            if why is not None:
                passed[why] += 1
                continue
            examples.append((np.array([*prompt, *answer, tokenizer.eos_token_id], dtype=np.int32), len(prompt)))
    return examples, used


def _because(passed: Counter[str]) -> str:
    return f" (passed over: {', '.join(f'{count:,} {why}' for why, count in passed.items())})" if passed else ""
