"""Asks about documents with the vLLM engine and keeps the answers: a program for tests to interrupt.

Run as: asking.py STORE SETTINGS DOCUMENTS, the latter two as JSON.
"""

import json
import sys
from pathlib import Path

from pipeline.config import Teacher
from pipeline.engines import engine
from pipeline.errors import UserError
from pipeline.prompts import Choice, Prompt
from pipeline.teacher import Answer, AnswerStore, questions

BODY = "Grade the text.\n\n<text>\n{{ text }}\n</text>"


def one_token() -> Prompt:
    """Candidates of one token each."""
    groups = [
        Choice(value=5, answers=(" clear", " useful", " informative")),
        Choice(value=0, answers=(" long", " plain", " technical")),
    ]
    return Prompt(name="words", body=BODY, read="choices", answer_start="This text is very", choices=tuple(groups))


def several_tokens() -> Prompt:
    """Digits with and without a space, which is a token of its own, and a candidate of many tokens."""
    digits = [Choice(value=i, answers=(f" {i}", f"{i}")) for i in range(1, 6)]
    none = Choice(value=0, answers=(" 0", "0", " not usable at all"))
    return Prompt(name="digits", body=BODY, read="choices", answer_start="Quality:", choices=(none, *digits))


def main(store: str, settings: str, documents: str) -> None:
    """Ask what is not in the store; says how many were asked about."""
    teacher, prompt = Teacher.model_validate_json(settings), several_tokens()
    asked = questions(prompt, teacher, json.loads(documents))
    n_asked = 0
    with AnswerStore(Path(store)) as answers, engine(teacher) as ask:
        answered = {key for key, _ in answers.find(question.key for question in asked)}

        def record(arrived: list[tuple[str, Answer]]) -> bool:
            nonlocal n_asked
            answers.add(arrived)
            n_asked += len(arrived)
            return True

        ask(prompt, teacher, asked, answered, record)
    print(json.dumps({"n_asked": n_asked}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
