"""Make tests/golden/answers.jsonl: answers that real models wrote, with the verdicts of the library math-verify.

Needs math-verify; the project and its tests do not. It takes runs of real models that eval.py has evaluated once, with
--repeat 1, each with the file of its questions and how many of them to take (that --limit, or fewer):

    pip install math-verify
    python tests/make_golden_answers.py runs/a gsm8k_test.jsonl 50 runs/b math500_test.json 50

Taken are the answers of the SLM alone and of the LLM alone. A line: the gold answer, the text, the library's verdict.
"""
import json
import sys
from pathlib import Path

import math_verify

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import Tokenizer, load_questions  # noqa: E402
from eval import Answers  # noqa: E402
from relay import Rollout, Run, plain_text  # noqa: E402

OUT = Path(__file__).parent / "golden" / "answers.jsonl"


def answers_of(run, questions, limit):
    """(gold answer, text) of each answer to the first questions."""
    tokenizer, questions, seen = Tokenizer(run.directory("slm")), load_questions(questions, limit), set()
    for record in Answers(run.path / "eval" / "answers.jsonl").records.values():
        key = record["method"], record["index"]
        if record["method"] in ("slm", "llm") and record["index"] < len(questions):
            assert key not in seen, f"{run.path} holds more than one evaluation"
            seen.add(key)
            rollout = Rollout([], record["tokens"], [False] * len(record["tokens"]), end=record["end"])
            yield questions[record["index"]].answer, plain_text(rollout, tokenizer)


def main():
    lines = []
    for run, questions, limit in zip(*[iter(sys.argv[1:])] * 3):
        for gold, text in answers_of(Run(run), questions, int(limit)):
            verdict = math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(text))
            lines.append(json.dumps(dict(gold=gold, text=text, math_verify=verdict)) + "\n")
    OUT.write_text("".join(lines), encoding="utf-8")
    print(f"{OUT}: {len(lines)} answers")


if __name__ == "__main__":
    main()
