"""Gold answers fed back as a model's: what the judges of GSM8K, MATH-500, HumanEval and MBPP make of perfection.

    python benchmarks/gold.py --gsm8k test.jsonl --math500 math500.jsonl --humaneval HumanEval.jsonl --mbpp mbpp.jsonl

Of mathematical answers it also says how many `math-verify` by itself does not find equal to themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from gossamer.data.records import read_records
from gossamer.evaluate.answers import Verifier, final_answer
from gossamer.evaluate.exams import EXAMS
from gossamer.evaluate.sandbox import isolation


@dataclass(frozen=True)
class Options:
    """Judge what there is a file for. HumanEval's and MBPP's programs are run."""

    gsm8k: str | None = None
    math500: str | None = None
    humaneval: str | None = None
    mbpp: str | None = None


def main(options: Options) -> None:
    print(f"programs: {isolation()}")
    for name, cls in EXAMS.items():
        if (data := getattr(options, name)) is None:
            continue
        exam = cls()
        questions = exam.questions(read_records(data), exam.template)
        with Verifier() as verifier:
            verdicts = [exam.judge(question, question.gold, verifier) for question in questions]
            unread = []
            for question in [] if exam.runs_code else questions:
                gold = final_answer(question.gold) or ""
                said = verifier.compare(gold, gold)
                unread += [] if said is not None and said["equal"] else [gold]
        print(f"{name}: {sum(verdict.correct for verdict in verdicts)} of {len(verdicts)} right")
        for question, verdict in zip(questions, verdicts, strict=True):
            if not verdict.correct:
                print(f"  {question.name}: {verdict.detail}")
        if not exam.runs_code:
            print(f"  not equal to themselves by math-verify alone: {len(unread)} {unread}")


if __name__ == "__main__":
    main(tyro.cli(Options))
