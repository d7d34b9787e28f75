"""Before anything is paid for: the tokens, hours and money that rating will take."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import gold as golds
from pipeline import panel
from pipeline.config import Recipe, Teacher
from pipeline.engines.completions import BYTES_PER_TOKEN
from pipeline.engines.layout import Layout
from pipeline.models import load_tokenizer
from pipeline.panel import Rater
from pipeline.prompts import Prompt
from pipeline.sample import draw
from pipeline.spending import cost, has_prices
from pipeline.teacher import AnswerStore, Question
from pipeline.tracking import Result, read_metrics, stage

log = logging.getLogger("gristmill")

Count = Callable[[str], int]
"""Prompt tokens of one document, everything around it included."""


class PlanResult(Result):
    """What the whole of stage 1 takes, answers that are recorded already included."""

    n_documents: int
    n_raters: int
    n_answers: int
    """Answers in all: documents times raters."""
    n_recorded: int
    """Answers already paid for."""
    prompt_tokens: int
    answer_tokens: int
    answer_length: str
    """Where an answer's length comes from: given, recorded, fixed by the prompt, or teacher.max_tokens (the most)."""
    usd: float | None
    usd_left: float | None
    """Without the answers already recorded."""
    tokens_per_s: float | None
    hours: float | None
    hours_left: float | None
    raters: list[dict[str, Any]]


def run(recipe: Recipe, _: bool = False) -> PlanResult:
    """Count the sample's tokens with the teacher's own tokenizer; nothing is asked."""
    raters = panel.of(recipe)
    with stage("plan", recipe, {}) as work:
        documents, _counts = draw(recipe.corpus, recipe.rate, recipe.seed)
        judged = golds.documents(golds.read(recipe.rate.gold)[0], documents) if recipe.rate.gold else []
        texts = list(dict.fromkeys(document.text for document in [*documents, *judged]))
        with AnswerStore(recipe.run_folder / "rate" / "answers.sqlite") as store:
            lines = [line(rater, texts, store, recipe) for rater in raters]
        return work.finish(summarise(lines, texts, recipe, work.seconds))


def line(rater: Rater, texts: list[str], store: AnswerStore, recipe: Recipe) -> dict[str, Any]:
    """What one rater takes."""
    count = counter(rater.prompt, rater.teacher)
    per_document = float(np.mean([count(text) for text in texts[: recipe.plan.count_on]]))
    first = next(panel.rounds(rater, texts, store))
    answers = [answer for _, answer in store.find(first.answered)]
    length, known_from = answer_length(rater, [answer.answer_tokens for answer in answers], recipe)
    prompt_tokens, answer_tokens = round(per_document * len(texts)), round(length * len(texts))
    return {
        **panel.origin(rater),
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
        "answer_length": known_from,
        "n_recorded": len(answers),
        "usd": cost(rater.teacher, prompt_tokens, answer_tokens) if has_prices(rater.teacher) else None,
    }


def answer_length(rater: Rater, recorded: list[int], recipe: Recipe) -> tuple[float, str]:
    """Mean tokens of an answer, and where that is known from."""
    if rater.prompt.read == "choices":
        return (0.0, "nothing is written") if rater.teacher.engine == "transformers" else (1.0, "one token")
    if recipe.plan.answer_tokens is not None:
        return recipe.plan.answer_tokens, "given"
    if recorded:
        return float(np.mean(recorded)), "recorded"
    return float(rater.teacher.max_tokens), "teacher.max_tokens"


def counter(prompt: Prompt, teacher: Teacher) -> Count:
    """Counts with the teacher's tokenizer; for an endpoint whose tokenizer is not given, bytes stand in for it."""
    name = teacher.tokenizer if teacher.engine == "openai" else teacher.model
    if name is None:
        log.warning("plan: %d bytes are counted as a token; give --teacher.tokenizer to count", BYTES_PER_TOKEN)
        around = " ".join(turn["content"] for turn in prompt.turns("")) + prompt.answer_start
        return lambda text: (
            len(around.encode()) // BYTES_PER_TOKEN
            + min(len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN, teacher.document_tokens)
        )
    tokenizer = load_tokenizer(name, "teacher.model", teacher.revision, teacher.trust_remote_code)
    layout = Layout(tokenizer, prompt, teacher, teacher.max_model_len)
    return lambda text: len(layout.whole(layout.row(Question("", text))))


def summarise(lines: list[dict[str, Any]], texts: list[str], recipe: Recipe, seconds: float) -> PlanResult:
    """The sum over all raters."""
    prompt_tokens, answer_tokens = (sum(each[name] for each in lines) for name in ("prompt_tokens", "answer_tokens"))
    n_answers, n_recorded = len(lines) * len(texts), sum(each["n_recorded"] for each in lines)
    left = 1 - n_recorded / n_answers
    speed = recipe.plan.tokens_per_s or measured_speed(recipe.run_folder)
    hours = (prompt_tokens + answer_tokens) / speed / 3600 if speed else None
    usd = None if any(each["usd"] is None for each in lines) else sum(each["usd"] for each in lines)
    return PlanResult(
        seconds=seconds,
        n_documents=len(texts),
        n_raters=len(lines),
        n_answers=n_answers,
        n_recorded=n_recorded,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        answer_length=", ".join(dict.fromkeys(each["answer_length"] for each in lines)),
        usd=usd,
        usd_left=None if usd is None else usd * left,
        tokens_per_s=speed,
        hours=hours,
        hours_left=None if hours is None else hours * left,
        raters=lines,
    )


def measured_speed(run_folder: Path) -> float | None:
    """Tokens a second when this run folder was last rated, if it was."""
    speeds = [line.get("tokens_per_s") for line in read_metrics(run_folder) if line["stage"] == "rate"]
    return next((speed for speed in reversed(speeds) if speed), None)
