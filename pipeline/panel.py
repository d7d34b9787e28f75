"""Several opinions on each document: prompts x teachers x repeats, their consensus and how far they agree."""

import difflib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from pipeline import config, prompts, teacher
from pipeline.config import Budget, Rate, Recipe, Teacher
from pipeline.engines import engine
from pipeline.engines.layout import NoRoom
from pipeline.errors import Pending, SettingsError, UserError, required
from pipeline.metrics import Floats
from pipeline.prompts import Prompt
from pipeline.reading import Reading
from pipeline.spending import Spending, check_budget
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

    def first(self, n: int) -> "Opinions":
        """The opinions on the first documents."""
        return Opinions(self.rater, self.answers[:n], self.readings[:n])


# -- who is asked -----------------------------------------------------------------------------------------------------


def of(recipe: Recipe) -> list[Rater]:
    """Who is asked, if nothing in the settings keeps their opinions from being comparable."""
    rate = recipe.rate
    asked = load_prompts([required(rate.prompt, "rate.prompt", "prompts/edu-en.md"), *rate.more_prompts])
    asked_of = teachers(recipe.teacher, rate.more_teachers)
    check_budget(rate, asked_of)
    if rate.calibrate:
        check_calibration(asked)
    return raters(asked, asked_of, rate)


def raters(asked: Sequence[Prompt], teachers: Sequence[Teacher], rate: Rate) -> list[Rater]:
    """Every teacher with every prompt, as often as `repeats` says; all of one teacher's stand together."""
    check_comparable(asked)
    found = [
        vary(prompt, each, repeat, rate)._replace(called=called)
        for each, called in zip(teachers, names(teachers), strict=True)
        for prompt in asked
        for repeat in range(rate.repeats)
    ]
    check_different(found)
    return found


def check_different(raters: list[Rater]) -> None:
    """Refuse opinions that would be one answer counted twice."""
    seen: dict[str, Rater] = {}
    for rater in raters:
        read = rater.prompt.model_copy(update={"order": 0}).digest
        key = config.digest([rater.prompt.asked_digest, teacher.identity(rater.prompt, rater.teacher), read])
        other = seen.setdefault(key, rater)
        if other is not rater:
            raise UserError(
                f"rate: repeat {rater.repeat} of {rater.called} with prompt {rater.prompt.name} would be the same"
                f" answer as repeat {other.repeat} of {other.called}; ask for fewer repeats, or let teachers differ in"
                " what bears on an answer"
            )


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
        if (other.scale, other.attributes) != (first.scale, first.attributes):
            raise UserError(f"rate.more_prompts: {other.name} has another scale or other attributes than {first.name}")
    twice = [name for name, n in Counter(prompt.name for prompt in asked).items() if n > 1]
    if twice:
        raise UserError(f"rate.more_prompts: two prompts are called {twice[0]}; rename a file")


MODEL_BOUND = {
    "revision",
    "trust_remote_code",
    "tokenizer",
    "quantization",
    "max_model_len",
    "chat_template_args",
    "usd_per_million_prompt_tokens",
    "usd_per_million_answer_tokens",
}
"""Settings that are no good for another model."""


def teachers(main: Teacher, more: Sequence[dict[str, Any]]) -> list[Teacher]:
    """The teacher, and those whose settings are laid over its own; those of its model only for the same model."""
    found = [main]
    for position, settings in enumerate(more):
        bound = MODEL_BOUND if settings.get("model", main.model) != main.model else set()
        own = main.model_dump(exclude_unset=True, exclude=bound)
        try:
            found.append(Teacher.model_validate(config.merge(own, settings)))
        except ValidationError as error:
            raise SettingsError(f"rate.more_teachers.{position}.{explain(error)}") from None
    return found


def explain(error: ValidationError) -> str:
    """The first thing wrong with a further teacher."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        return f"{key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
    near = difflib.get_close_matches(key, Teacher.model_fields, n=1)
    return f"{key} is no setting of a teacher" + (f"; did you mean {near[0]}?" if near else "")


# -- asking -----------------------------------------------------------------------------------------------------------


Start = Callable[[Teacher], AbstractContextManager[Ask]]
"""Brings a teacher up, and takes it down again."""


class Collected(NamedTuple):
    """What asking came to: its cost, the keys of failed requests, and how many questions the budget left out."""

    spending: Spending
    failed: set[str]
    n_not_asked: int


def collect(
    stage: str,
    raters: list[Rater],
    texts: list[str],
    store: AnswerStore,
    limits: Budget,
    start: Start = engine,
    calibrate: bool = False,
    study: Spending | None = None,
    unit: str = "documents",
) -> Collected:
    """Ask all that the store does not hold, as far as the budget goes; of an empty document first, to `calibrate`. A
    `study` asks in many ways for one budget: its spending goes on from call to call, and no call is told of."""
    desk = Desk(store, Spending(limits) if study is None else study)
    for rater in raters:
        count_recorded(rater, texts, store, desk.spending, calibrate)
    n_open = sum(next(rounds(rater, texts, store)).n_open for rater in raters)
    for rater in raters if n_open else []:
        engine(rater.teacher)
    if study is None:
        log.info("%s: %d %s, %d answers there already", stage, len(texts), unit, len(raters) * len(texts) - n_open)
    waiting: list[Pending] = []
    has_table = study is not None and sys.stderr.isatty()
    with nullcontext(desk.step) if has_table else progress(stage, n_open, unit=unit) as desk.step:
        for _, group in groupby(raters, key=lambda rater: rater.teacher.model_copy(update={"seed": 0})):
            try:
                ask(list(group), texts, desk, start, calibrate)
            except Pending as error:
                waiting.append(error)
    if waiting:
        raise Pending("; ".join(map(str, waiting)))
    if not desk.n_not_asked:
        desk.spending.stopped_by = None
    elif study is None:
        log.warning("%s: stopped by %s; more of it goes on from here", stage, desk.spending.stopped_by)
    return Collected(desk.spending, desk.failed, desk.n_not_asked)


def ask(raters: list[Rater], texts: list[str], desk: "Desk", start: Start, calibrate: bool) -> None:
    """Ask one teacher, which is brought up once, and only if there is something to ask it."""
    with ExitStack() as running:
        started: Ask | None = None
        for rater in raters:
            for wanted in [[""], texts] if calibrate else [texts]:
                for round in rounds(rater, wanted, desk.store):
                    if round.n_open and desk.spending.left(round.teacher):
                        started = started or running.enter_context(start(round.teacher))
                        ask_round(started, rater, round, desk)
                    desk.n_not_asked += round.open_in(desk.store, desk.failed) if desk.spending.stopped_by else 0
                if wanted == [""] and not desk.n_not_asked:
                    check_empty(rater, desk.store)


def ask_round(started: Ask, rater: Rater, round: "Round", desk: "Desk") -> None:
    """Put one round of questions, as many at a time as the budget surely takes. Where there is no room for longer
    answers, the short ones stand."""
    n_open = round.n_open + 1
    try:
        while desk.spending.left(round.teacher):
            there = {key for key, _ in desk.store.find(question.key for question in round.questions)}
            still = [question for question in round.questions if question.key not in there | desk.failed]
            if not still or len(still) == n_open:
                return
            n_open, room = len(still), desk.spending.room(round.teacher)
            questions = round.questions if room >= n_open else still[: int(room)]
            started(rater.prompt, round.teacher, questions, there, partial(desk.record, round))
    except NoRoom as error:
        if not round.again:
            raise
        log.warning("teacher: answers that were cut cannot be asked for with more room (%s)", error)


class Desk:
    """Where answers arrive: recorded, then counted."""

    def __init__(self, store: AnswerStore, spending: Spending) -> None:
        self.store, self.spending = store, spending
        self.step: Step = lambda _: None
        self.failed: set[str] = set()
        self.n_not_asked = 0

    def record(self, round: "Round", answers: list[tuple[str, Answer]]) -> bool:
        """Take answers in; says whether the budget allows more. Second askings are no progress."""
        self.store.add(answers)
        self.failed.update(key for key, answer in answers if answer.finish == "failed")
        self.spending.add(round.teacher, answers, now=True)
        self.step(0 if round.again else len(answers))
        return self.spending.left(round.teacher)


class Round(NamedTuple):
    """Questions to one teacher, and the keys of those that are answered."""

    teacher: Teacher
    questions: list[Question]
    answered: set[str]
    again: bool = False

    @property
    def n_open(self) -> int:
        """How many questions had no answer."""
        return len(self.questions) - len(self.answered)

    def open_in(self, store: AnswerStore, failed: set[str]) -> int:
        """How many have neither an answer now nor a request that failed."""
        there = {key for key, _ in store.find(key for key, _ in self.questions)}
        return len({key for key, _ in self.questions} - there - failed)


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


def recorded(rater: Rater, texts: list[str], store: AnswerStore) -> list[tuple[str, Teacher, Answer]]:
    """Every recorded answer of a rater about these texts with its key, first and longer ones: what was paid for."""
    return [
        (key, round.teacher, answer)
        for round in rounds(rater, texts, store)
        for key, answer in store.find(question.key for question in round.questions)
    ]


def count_recorded(
    rater: Rater, texts: list[str], store: AnswerStore, spending: Spending, calibrate: bool = False
) -> None:
    """Count what has been paid for earlier."""
    for key, asked, answer in recorded(rater, [*texts, *[""] * calibrate], store):
        spending.add(asked, [(key, answer)])


def opinions(
    rater: Rater, texts: list[str], store: AnswerStore, failed: set[str], calibrate: bool = False
) -> Opinions:
    """A rater's answers from the store, the longer one where it was asked for twice, and how they read. Without an
    answer about the empty document nothing can be calibrated, and nothing counts as asked."""
    first, again = (round.questions for round in rounds(rater, texts, store))
    found: dict[str, Answer] = {}
    for questions in (first, again):
        answered = dict(store.find(question.key for question in questions))
        found |= {question.text: answered[question.key] for question in questions if question.key in answered}
    empty = recorded(rater, [""], store)[:1] if calibrate else []
    lost = {text: Answer("failed" if key in failed else "not_asked") for key, text in first}
    answers = [lost[text] if calibrate and not empty else found.get(text) or lost[text] for text in texts]
    prior = empty[0][2] if empty else None
    return Opinions(rater, answers, [teacher.read(rater.prompt, answer, prior) for answer in answers])


def check_empty(rater: Rater, store: AnswerStore) -> None:
    """Stop, before more is paid for, where what a teacher says of an empty document cannot calibrate anything."""
    answers = [answer for _, _, answer in recorded(rater, [""], store)]
    if not answers:
        raise UserError(
            f"rate.calibrate: {rater.teacher.model} was asked about an empty document, and that failed; run the same"
            " command again, or leave calibration off"
        )
    seen = {name: log_p for answer in answers for name, log_p in (answer.log_probs or {}).items()}
    for choice in rater.prompt.choices:
        if all(seen.get(name, -np.inf) == -np.inf for name in choice.answers):
            raise UserError(
                f"rate.calibrate: {rater.teacher.model} gives {choice.answers[0]!r} no probability for an empty"
                " document; leave calibration off, or use an engine that sees all candidates"
            )


def check_calibration(asked: Sequence[Prompt]) -> None:
    """Refuse prompts that contextual calibration has no meaning for."""
    for prompt in asked:
        if prompt.read != "choices" or not prompt.normalise:
            raise UserError(f"rate.calibrate: prompt {prompt.name} must have read: choices, normalised")


def origin(rater: Rater) -> dict[str, Any]:
    """Who a rater is."""
    return {"prompt": rater.prompt.name, "teacher": rater.called, "repeat": rater.repeat}


def load_prompts(paths: Sequence[Any]) -> list[Prompt]:
    """Prompt files that ask for a score."""
    asked = [prompts.load(path) for path in paths]
    for prompt, path in zip(asked, paths, strict=True):
        if prompt.read == "label":
            raise UserError(f"rate.prompt: {path} asks for labels; give it to gristmill label")
    return asked
