"""Questions whose answers can be checked: GSM8K, MATH-500, HumanEval, MBPP."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.data.config import Template
from gossamer.data.records import Record, Records
from gossamer.errors import UserError
from gossamer.evaluate.answers import Verifier, final_answer
from gossamer.evaluate.sandbox import execute

_BLOCK = re.compile(r"```(?:[Pp]ython)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """What a model is asked."""

    name: str
    prompt: str
    """Before it is put into a template."""
    gold: str
    """What the dataset's authors would say, in full."""


@dataclass(frozen=True)
class Verdict:
    correct: bool
    detail: dict[str, Any]
    """What was compared, or how the program ended."""


class Exam(ABC):
    """A dataset, how its questions are put, and how answers are judged."""

    data: str
    """On the hub."""
    split: str = "test"
    template: Template
    """That questions are put into where nobody asks for another."""
    max_new_tokens: int
    runs_code: bool = False

    @abstractmethod
    def questions(self, records: Records, template: Template) -> list[Question]: ...

    @abstractmethod
    def judge(self, question: Question, output: str, verifier: Verifier | None) -> Verdict: ...

    def stops(self, template: Template) -> tuple[str, ...]:
        """Where an answer ends, though its model goes on."""
        return {"alpaca": ("\n### Instruction",), "question": ("\nQuestion:",)}.get(template, ())


class _Mathematics(Exam):
    """The final answer counts, and what is equal to it."""

    template, max_new_tokens = "alpaca", 512
    question_fields: tuple[str, ...]
    answer_fields: tuple[str, ...]

    def questions(self, records: Records, template: Template) -> list[Question]:
        found = []
        for number, record in enumerate(records.records):
            gold = record.text(_first(record, self.answer_fields))
            if final_answer(gold) is None:
                raise UserError(f"{record.where}: no final answer in {gold[-60:]!r}")
            found.append(Question(str(number), record.text(_first(record, self.question_fields)), gold))
        return found

    def judge(self, question: Question, output: str, verifier: Verifier | None) -> Verdict:
        assert verifier is not None
        gold, answer = final_answer(question.gold), final_answer(output)
        assert gold is not None
        found = verifier(gold, answer)
        return Verdict(found["equal"], {"gold": gold, "answer": answer, **found})


class GSM8K(_Mathematics):
    """Cobbe et al., arXiv 2110.14168: grade school problems in words."""

    data = "hf:openai/gsm8k:main"
    question_fields, answer_fields = ("question",), ("answer",)


class Math500(_Mathematics):
    """The 500 problems of MATH (arXiv 2103.03874) that Lightman et al. (arXiv 2305.20050) held out."""

    data = "hf:HuggingFaceH4/MATH-500"
    question_fields, answer_fields = ("problem", "question"), ("solution", "answer")


class HumanEval(Exam):
    """Chen et al., arXiv 2107.03374: the body of a function from its signature and docstring; pass@1."""

    data, template, max_new_tokens, runs_code = "hf:openai/openai_humaneval", "none", 512, True
    _tests: dict[str, Record]

    def questions(self, records: Records, template: Template) -> list[Question]:
        self._tests = {record.text("task_id"): record for record in records.records}
        ask = "Complete the following Python function.\n```python\n{}```" if template != "none" else "{}"
        return [
            Question(name, ask.format(it.text("prompt")), it.text("canonical_solution"))
            for name, it in self._tests.items()
        ]

    def judge(self, question: Question, output: str, verifier: Verifier | None) -> Verdict:
        record = self._tests[question.name]
        prompt, entry = record.text("prompt"), record.text("entry_point")
        code = _code(output)
        if re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE):  # the whole function, not its body alone
            prompt = prompt[: prompt.index(f"def {entry}")]
        return _run(f"{prompt}{code}\n{record.text('test')}\ncheck({entry})\n")

    def stops(self, template: Template) -> tuple[str, ...]:
        if template != "none":
            return super().stops(template)
        return "\nclass ", "\ndef ", "\n#", "\nif ", "\nprint("  # as in the paper


class MBPP(Exam):
    """Austin et al., arXiv 2108.07732: a function from a sentence and three assertions, none as examples; pass@1.

    Of a file with all 974 problems the 500 of its test split (task_id 11 to 510) are asked.
    """

    data, template, max_new_tokens, runs_code = "hf:google-research-datasets/mbpp:full", "none", 512, True
    _tests: dict[str, Record]

    def questions(self, records: Records, template: Template) -> list[Question]:
        everyone = {record.text("task_id"): record for record in records.records}
        for name, it in everyone.items():
            if not (name.isdecimal() and isinstance(it.fields.get("test_list"), list)):
                raise UserError(f"{it.where}: no problem of MBPP, whose task_id is a number and test_list a list")
        self._tests = {name: it for name, it in everyone.items() if 11 <= int(name) <= 510} or everyone
        return [Question(name, self._ask(it, template), it.text("code")) for name, it in self._tests.items()]

    def _ask(self, record: Record, template: Template) -> str:
        text, tests = record.text("text").strip(), "\n".join(record.fields["test_list"])
        return (
            f'"""\n{text}\n{tests}\n"""\n'
            if template == "none"
            else f"{text}\nYour Python code should pass these tests:\n{tests}"
        )

    def judge(self, question: Question, output: str, verifier: Verifier | None) -> Verdict:
        record = self._tests[question.name]
        setup, tests = record.fields.get("test_setup_code") or "", "\n".join(record.fields["test_list"])
        return _run(f"{_code(output)}\n{setup}\n{tests}\n")

    def stops(self, template: Template) -> tuple[str, ...]:
        return (
            super().stops(template) if template != "none" else ("\nclass ", "\nassert ", '\n"""', "\nprint(", "\nif ")
        )


EXAMS: dict[str, type[Exam]] = {"gsm8k": GSM8K, "math500": Math500, "humaneval": HumanEval, "mbpp": MBPP}


def _first(record: Record, fields: Sequence[str]) -> str:
    """The first of the fields that a record has; where it has none, the first: the error will say so."""
    return next((field for field in fields if field in record.fields), fields[0])


def _code(output: str) -> str:
    """The first code block of an answer, or all of it."""
    block = _BLOCK.search(output)
    return block.group(1) if block else output


def _run(program: str) -> Verdict:
    ended = execute(program)
    return Verdict(ended.passed, {"program": program, "ended": ended.reason, "printed": ended.output})
