"""Several opinions on each document: prompts x teachers x repeats, their consensus and how far they agree."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from pipeline import config, prompts, teacher
from pipeline.config import Asking, Rate, Recipe, Teacher
from pipeline.engines import engine
from pipeline.errors import SettingsError, UserError, required
from pipeline.metrics import Floats
from pipeline.prompts import Prompt
from pipeline.reading import Reading
from pipeline.spending import Spending, check_prices
from pipeline.teacher import Answer, AnswerStore, Ask, Question
from pipeline.tracking import Step, progress

log = logging.getLogger("gristmill")

MORE_ROOM = 2
"""An answer that was cut before it could be read is asked for once more, with so many times the tokens."""


class Rater(NamedTuple):
    """One opinion's origin."""

    prompt: Prompt
    teacher: Teacher
    repeat: int = 0
    called: str = ""
    """The teacher's name: its model, and what sets it apart from another teacher with the same model."""


class Opinions(NamedTuple):
    """What one rater said of each document, in the order of the documents."""

    rater: Rater
    answers: list[Answer]
    readings: list[Reading]

    @property
    def scores(self) -> Floats:
        """(n_documents,), NaN where there is none."""
        return np.array([np.nan if r.score is None else r.score for r in self.readings], dtype=np.float64)

    def about(self, texts: list[str], wanted: list[str]) -> "Opinions":
        """The opinions on some of the texts they were given on."""
        position = {text: i for i, text in enumerate(texts)}
        kept = [position[text] for text in wanted]
        return Opinions(self.rater, [self.answers[i] for i in kept], [self.readings[i] for i in kept])


# -- who is asked -----------------------------------------------------------------------------------------------------


def of(recipe: Recipe) -> list[Rater]:
    """Who is asked, if nothing in the settings keeps their opinions from being comparable."""
    rate = recipe.rate
    asked = load_prompts([required(rate.prompt, "rate.prompt", "prompts/edu-en.md"), *rate.more_prompts])
    asked_of = teachers(recipe.teacher, rate.more_teachers)
    check_prices(rate, asked_of)
    if rate.calibrate:
        check_calibration(asked)
    for each in asked_of:
        engine(each)
    return raters(asked, asked_of, rate)


def raters(asked: Sequence[Prompt], teachers: Sequence[Teacher], rate: Rate) -> list[Rater]:
    """Every teacher with every prompt, as often as `repeats` says; all of one teacher's stand together."""
    check_comparable(asked)
    return [
        vary(prompt, each, repeat, rate)._replace(called=called)
        for each, called in zip(teachers, names(teachers), strict=True)
        for prompt in asked
        for repeat in range(rate.repeats)
    ]


def names(teachers: Sequence[Teacher]) -> list[str]:
    """A name for each teacher: its model; beside another of that model, also the settings that differ."""
    found = []
    for each in teachers:
        twin = next(other for other in teachers if other.model == each.model)
        before, now = twin.identity(), each.identity()
        different = [f"{name} {now[name]}" for name in now if now[name] != before[name]]
        found.append(f"{each.model} ({', '.join(different)})" if different else str(each.model))
    return found


def vary(prompt: Prompt, teacher: Teacher, repeat: int, rate: Rate) -> Rater:
    """One repeat, different from the others in its seed or in the order of choices."""
    sampled = prompt.read != "choices" and teacher.temperature > 0
    permuted = rate.permute and prompt.lists_options
    if rate.permute and not permuted:
        raise UserError(f"rate.permute: prompt {prompt.name} lists no choices; put {{{{ choices }}}} in its text")
    if rate.repeats > 1 and not (sampled or permuted):
        raise UserError(
            f"rate.repeats: {teacher.model} would say the same {rate.repeats} times of prompt {prompt.name}; set"
            " --teacher.temperature above 0, or --permute where the prompt lists its choices"
        )
    seed = {"seed": teacher.seed + repeat} if sampled else {}
    order = {"order": repeat} if permuted else {}
    return Rater(prompt.model_copy(update=order), teacher.model_copy(update=seed), repeat)


def check_comparable(asked: Sequence[Prompt]) -> None:
    """Refuse opinions of which no mean can be taken."""
    first = asked[0]
    for other in asked[1:]:
        if (other.scale, other.scales) != (first.scale, first.scales):
            raise UserError(f"rate.more_prompts: {other.name} has another scale or other attributes than {first.name}")
        if other.name == first.name:
            raise UserError(f"rate.more_prompts: two prompts are called {first.name}; rename a file")


def teachers(main: Teacher, more: Sequence[dict[str, Any]]) -> list[Teacher]:
    """The teacher, and those whose settings are laid over its own."""
    found = [main]
    for position, settings in enumerate(more):
        try:
            found.append(Teacher.model_validate(config.merge(main.model_dump(exclude_unset=True), settings)))
        except ValidationError as error:
            raise SettingsError(f"rate.more_teachers.{position}: {config.explain(error, None)}") from None
        if any(found[-1].identity() == other.identity() for other in found[:-1]):
            raise UserError(f"rate.more_teachers: number {position + 1} is the same teacher as another")
    return found


# -- asking -----------------------------------------------------------------------------------------------------------


Start = Callable[[Teacher], AbstractContextManager[Ask]]
"""Brings a teacher up, and takes it down again."""


def collect(
    stage: str, raters: list[Rater], texts: list[str], store: AnswerStore, limits: Asking, start: Start = engine
) -> tuple[Spending, set[str]]:
    """Ask all that the store does not hold, as far as the budget goes; what it cost, with what had been paid before,
    and the keys of failed requests."""
    spending = Spending(limits, max(in_flight(rater.teacher) for rater in raters))
    for rater in raters:
        for asked, answer in recorded(rater, texts, store):
            spending.add(asked, [answer])
    n_open = sum(is_open(round) for rater in raters for round in islice(rounds(rater, texts, store), 1))
    log.info("%s: %d documents, %d answers there already", stage, len(texts), len(raters) * len(texts) - n_open)
    with progress(stage, n_open) as step:
        desk = Desk(store, spending, step)
        for _, group in groupby(raters, key=lambda rater: rater.teacher.model_copy(update={"seed": 0})):
            ask(list(group), texts, desk, start)
    if spending.stopped_by:
        log.warning("%s: stopped by %s; the same command with more of it goes on", stage, spending.stopped_by)
    return spending, desk.failed


def ask(raters: list[Rater], texts: list[str], desk: "Desk", start: Start) -> None:
    """Ask one teacher, which is brought up once, and only if there is something to ask it."""
    with ExitStack() as running:
        started: Ask | None = None
        for rater in raters:
            for round in rounds(rater, texts, desk.store):
                if is_open(round) and desk.spending.left():
                    started = started or running.enter_context(start(round.teacher))
                    started(rater.prompt, *round[:3], partial(desk.record, round))


class Desk:
    """Where answers arrive: recorded, then counted."""

    def __init__(self, store: AnswerStore, spending: Spending, step: Step) -> None:
        self.store, self.spending, self.step = store, spending, step
        self.failed: set[str] = set()

    def record(self, round: "Round", answers: list[tuple[str, Answer]]) -> bool:
        """Take answers in; says whether the budget allows more. Second askings are no progress."""
        self.store.add(answers)
        self.failed.update(key for key, answer in answers if answer.finish == "failed")
        self.spending.add(round.teacher, [answer for _, answer in answers], now=True)
        self.step(0 if round.again else len(answers))
        return self.spending.left()


class Round(NamedTuple):
    """Questions to one teacher, and the keys of those that are answered."""

    teacher: Teacher
    questions: list[Question]
    answered: set[str]
    again: bool = False


def is_open(round: Round) -> int:
    """How many questions have no answer yet."""
    return len(round.questions) - len(round.answered)


def rounds(rater: Rater, texts: list[str], store: AnswerStore) -> Iterator[Round]:
    """What one rater is asked: everything; then, with more room, what was cut before it could be read."""
    first = teacher.questions(rater.prompt, rater.teacher, texts)
    yield Round(rater.teacher, first, {key for key, _ in store.find(key for key, _ in first)})
    answers = dict(store.find(key for key, _ in first))
    cut = [text for key, text in first if key in answers and was_cut(rater.prompt, answers[key])]
    again = teacher.questions(rater.prompt, more_room(rater.teacher), cut)
    yield Round(more_room(rater.teacher), again, {key for key, _ in store.find(key for key, _ in again)}, again=True)


def more_room(teacher: Teacher) -> Teacher:
    """The teacher with room for longer answers."""
    return teacher.model_copy(update={"max_tokens": MORE_ROOM * teacher.max_tokens})


def was_cut(prompt: Prompt, answer: Answer) -> bool:
    """Whether an answer ended for want of room before it could be read."""
    return answer.finish == "length" and teacher.read(prompt, answer).reason == "truncated"


def recorded(rater: Rater, texts: list[str], store: AnswerStore) -> list[tuple[Teacher, Answer]]:
    """Every recorded answer of a rater about these texts, first and longer ones: what was paid for."""
    return [
        (round.teacher, answer)
        for round in rounds(rater, texts, store)
        for _, answer in store.find(question.key for question in round.questions)
    ]


def opinions(
    rater: Rater, texts: list[str], store: AnswerStore, failed: set[str], empty: Answer | None = None
) -> Opinions:
    """A rater's answers from the store, the longer one where it was asked for twice, and how they read."""
    first, again = (round.questions for round in rounds(rater, texts, store))
    found: dict[str, Answer] = {}
    for questions in (first, again):
        answered = dict(store.find(question.key for question in questions))
        found |= {question.text: answered[question.key] for question in questions if question.key in answered}
    lost = {text: Answer("failed" if key in failed else "not_asked") for key, text in first}
    answers = [found.get(text) or lost[text] for text in texts]
    return Opinions(rater, answers, [teacher.read(rater.prompt, answer, empty) for answer in answers])


def empty_answer(rater: Rater, store: AnswerStore) -> Answer | None:
    """What a rater said of an empty document, to calibrate its choices by."""
    found = dict(store.find(q.key for q in teacher.questions(rater.prompt, rater.teacher, [""])))
    answer = next(iter(found.values()), None)
    if answer is None:
        return None
    seen = answer.log_probs or {}
    for choice in rater.prompt.choices:
        if all(seen[name] == -np.inf for name in choice.answers):
            raise UserError(
                f"rate.calibrate: {rater.teacher.model} gives {choice.answers[0]!r} no probability for an empty"
                " document; leave calibration off, or use an engine that sees all candidates"
            )
    return answer


def check_calibration(asked: Sequence[Prompt]) -> None:
    """Refuse prompts that contextual calibration has no meaning for."""
    for prompt in asked:
        if prompt.read != "choices" or not prompt.normalise:
            raise UserError(f"rate.calibrate: prompt {prompt.name} must have read: choices, normalised")


def origin(rater: Rater) -> dict[str, Any]:
    """Who a rater is."""
    return {"prompt": rater.prompt.name, "teacher": rater.called, "repeat": rater.repeat}


def in_flight(teacher: Teacher) -> int:
    """Answers that can still arrive when no more questions are sent."""
    return 0 if teacher.engine == "transformers" else teacher.concurrency


def load_prompts(paths: Sequence[Any]) -> list[Prompt]:
    """Prompt files that ask for a score."""
    asked = [prompts.load(path) for path in paths]
    for prompt, path in zip(asked, paths, strict=True):
        if prompt.read == "label":
            raise UserError(f"rate.prompt: {path} asks for labels; give it to gristmill label")
    return asked
