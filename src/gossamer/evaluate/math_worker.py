"""The other side of `gossamer.evaluate.answers.Verifier`: reads pairs of answers, says whether they are equal.

Run by its path, in a process that is killed where sympy does not come to an end. It imports nothing of this package.
"""

import json
import sys

from math_verify import parse, verify


def main() -> None:
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            ours, theirs = (parse(f"$\\boxed{{{text}}}$", parsing_timeout=None) for text in (gold, answer))  # pyright: ignore
            verdict = {"read": [bool(ours), bool(theirs)], "equal": verify(ours, theirs, timeout_seconds=None)}
        except Exception as error:  # latex2sympy and sympy raise whatever they like on what a model wrote
            verdict = {"read": [False, False], "equal": False, "error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(verdict), flush=True)


if __name__ == "__main__":
    main()
