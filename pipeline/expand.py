"""Beside prepare: further rows that the teacher writes, from a few examples of the data or from nothing."""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pipeline import conversations, expansion, generation, teacher
from pipeline.config import Recipe, Teacher, digest
from pipeline.conversations import FILES, Exchange
from pipeline.engines import engine
from pipeline.engines.kept import Kept
from pipeline.errors import UserError
from pipeline.expansion import KEYS, Apart, Kind, Question
from pipeline.panel import Desk
from pipeline.prompts import Prompt
from pipeline.spending import Spending, check_budget
from pipeline.storage import content
from pipeline.teacher import Answer, AnswerStore
from pipeline.tracking import Result, Stage, progress, read_json, stage

log = logging.getLogger("gristmill")

MOST = 3
"""Answers for each row that is wanted, after which it is given up."""
QUESTION_TOKENS = 4096
"""Tokens that a question may have, if teacher.document_tokens are fewer: it is no document."""


class ExpandResult(Result):
    """What the teacher wrote, and what of it could be used."""

    kind: str
    n_wanted: int
    n_rows: int
    n_answers: int
    """Answers that were read: each is a row, unreadable or a copy."""
    unreadable: dict[str, int]
    """Answers that are no row, by reason."""
    n_copies: int
    """Rows that say, nearly or exactly, what another one or the data says."""
    n_asked: int
    n_reused: int
    n_not_asked: int
    """Rows that the budget left out; the same command with more of it goes on."""
    stopped_by: str | None
    prompt_tokens: int
    answer_tokens: int
    usd: float | None
    """At the prices given; None without them."""
    sentence: str


def run(recipe: Recipe, redo: bool = False, kind: Kind = "actor", n: int = 100) -> ExpandResult:
    """Have n rows written; answers already recorded are not asked for again."""
    template, topics = expansion.templates(recipe.align.templates, KEYS[kind])
    check_budget(recipe.rate, [recipe.teacher])
    engine(recipe.teacher)
    with stage(f"expand/{kind}", recipe, inputs(recipe, kind, template, topics)) as work:
        path = recipe.run_folder / FILES[kind][2]
        there = path.exists() and (read_json(work.folder / "result.json") or {}).get("n_wanted") == n
        done = work.finished(ExpandResult, redo, there)
        if done:
            return done
        data, known = (conversations.of(recipe, name, made_by=("prepare",)) for name in (kind, "prompts"))
        asked = expansion.questions(recipe, kind, template, topics, data)
        with AnswerStore(work.folder / "answers.sqlite") as store:
            desk = Desk(store, Spending(recipe.rate))
            found = collect(recipe, kind, template, asked, Apart(kind, [*data, *known]), desk, n)
        result = summarise(work, kind, n, found, desk)
        log.log(logging.INFO if len(found.rows) == n else logging.WARNING, "expand: %s", result.sentence)
        if not found.rows:
            raise UserError(
                f"expand: {result.sentence}; read the answers in {work.folder}/answers.sqlite, then mend the template"
                f" {KEYS[kind]} in {recipe.align.templates}, raise teacher.max_tokens, or choose another teacher"
            )
        conversations.write(path, (expansion.of_kind(row, kind) for row in found.rows))
        return work.finish(result)


def inputs(recipe: Recipe, kind: Kind, template: str, topics: Sequence[str]) -> dict[str, Any]:
    """Everything that decides the rows, but how many are wanted: more of them begin with the same ones."""
    files = {name: conversations.files(recipe, name, ("prepare",)) for name in (kind, "prompts")}
    return {
        "template": digest([template, list(topics)]),
        "teacher": teacher.identity(expansion.prompt_of(kind, template), writer(recipe, kind, 0)),
        "rows": {f"{name}/{path.name}": content(path) for name, some in files.items() for path in some},
        "examples": recipe.align.examples,
        "held_out_share": recipe.align.held_out_share,
        "seed": recipe.seed,
    }


def summarise(work: Stage, kind: Kind, n: int, found: "Found", desk: Desk) -> ExpandResult:
    """Every answer is a row or counted."""
    n_lost = found.unreadable.total() + found.n_copies
    assert found.n_answers == len(found.rows) + n_lost, f"{found.n_answers} answers, {n_lost} left out"
    short = len(found.rows) < n
    why = f"stopped by {desk.spending.stopped_by}" if found.n_not_asked else "given up"
    reasons = {**found.unreadable, "copies": found.n_copies}
    told = ", ".join(f"{reason} {count}" for reason, count in reasons.items() if count) or "none left out"
    spent = desk.spending.in_figures([work.recipe.teacher], work.seconds)
    return ExpandResult(
        seconds=work.seconds,
        kind=kind,
        n_wanted=n,
        n_rows=len(found.rows),
        n_answers=found.n_answers,
        unreadable=dict(found.unreadable),
        n_copies=found.n_copies,
        n_not_asked=found.n_not_asked,
        sentence=f"{len(found.rows)} of {n} rows from {found.n_answers} answers ({told})"
        + (f"; {why}" if short else ""),
        **{name: spent[name] for name in ("n_asked", "n_reused", "stopped_by")},
        **{name: spent[name] for name in ("prompt_tokens", "answer_tokens", "usd")},
    )


def writer(recipe: Recipe, kind: Kind, seed: int) -> Teacher:
    """The teacher, sampling; it stops where another row, or a reply to a prompt, would begin."""
    own, ends = recipe.teacher, ("\nUser:", *(("\nAssistant:",) if kind == "prompts" else ()))
    return own.model_copy(
        update={
            "temperature": recipe.align.expand_temperature,
            "seed": own.seed + seed,
            "stop": (*own.stop, *ends),
            "document_tokens": max(own.document_tokens, QUESTION_TOKENS),
        }
    )


# -- asking -----------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Rows, and what became of the other answers."""

    rows: list[Exchange]
    unreadable: Counter[str]
    n_copies: int
    n_answers: int
    n_not_asked: int


def collect(
    recipe: Recipe, kind: Kind, template: str, asked: Iterator[Question], apart: Apart, desk: Desk, n: int
) -> Found:
    """Ask until there are n rows, or the budget or patience is at its end."""
    rows: list[Exchange] = []
    unreadable: Counter[str] = Counter()
    n_copies = n_answers = n_not_asked = 0
    prompt = expansion.prompt_of(kind, template)
    with Kept() as kept, progress(f"expand {kind}", n, unit="rows") as step:
        while len(rows) < n and n_answers < MOST * n and not n_not_asked:
            wave = [next(asked) for _ in range(min(n - len(rows), MOST * n - n_answers))]
            for question, answer in zip(wave, answers(recipe, kind, prompt, wave, desk, kept), strict=True):
                if answer.finish == "not_asked":
                    n_not_asked += 1
                    continue
                n_answers += 1
                row = expansion.read(answer, question, kind)
                if isinstance(row, str):
                    unreadable[row] += 1
                elif not apart.takes(row):
                    n_copies += 1
                else:
                    rows.append(row)
                    step(1)
    return Found(rows, unreadable, n_copies, n_answers, n_not_asked)


def answers(
    recipe: Recipe, kind: Kind, prompt: Prompt, wave: Sequence[Question], desk: Desk, kept: Kept
) -> list[Answer]:
    """What the teacher says to each question, in order; those of one seed are asked together."""
    found: dict[int, Answer] = {}
    for seed in sorted({question.seed for question in wave}):
        at = [place for place, question in enumerate(wave) if question.seed == seed]
        settings = writer(recipe, kind, seed)
        said = generation.ask(prompt, settings, [wave[place].text for place in at], desk, kept.start)
        found |= dict(zip(at, said, strict=True))
    return [found[place] for place in range(len(wave))]
