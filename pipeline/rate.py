"""Stage 1: a teacher rates a sample of the corpus."""

import logging
from collections import Counter

import numpy as np

from pipeline import metrics, prompts, ratings, teacher
from pipeline.config import Recipe
from pipeline.engines import engine
from pipeline.errors import UserError, required
from pipeline.prompts import Prompt, Reading
from pipeline.sample import Document, sample
from pipeline.shards import Counts, find_shards, fingerprint
from pipeline.teacher import Answer, AnswerStore, Question
from pipeline.tracking import Result, Stage, progress, stage

log = logging.getLogger("gristmill")


class RateResult(Result):
    """What stage 1 did. Rates are shares of the sample; `mass` is the mean probability of all candidates."""

    n_failed: int
    """Documents whose request failed; --redo asks again about them."""
    n_rows: int
    n_empty: int
    n_bad_rows: int
    n_repaired_texts: int
    n_not_drawn: int
    """Rows with text that the sample left out, copies of a drawn text among them."""
    n_sampled: int
    n_scored: int
    n_asked: int
    n_reused: int
    n_truncated: int
    unscored: dict[str, int]
    unscored_rate: float
    int_score_counts: dict[str, int]
    mean_score: float | None
    mass: float | None
    prompt_tokens: int
    answer_tokens: int
    docs_per_s: float | None
    gold: dict[str, float | int | None] | None


def run(recipe: Recipe, redo: bool = False) -> RateResult:
    """Rate a sample; answers already recorded are not asked for again."""
    prompt = load_prompt(recipe)
    ask = engine(recipe.teacher)
    with stage("rate", recipe, inputs(recipe, prompt)) as work:
        done = work.finished(RateResult, redo, (work.folder / "ratings.parquet").exists())
        if done:
            return done
        documents, counts = draw(recipe)
        asked = teacher.questions(prompt, recipe.teacher, [document.text for document in documents])
        with AnswerStore(work.folder / "answers.sqlite") as store:
            n_asked = collect(ask, prompt, recipe, asked, store)
            answers = dict(store.find(question.key for question in asked))
        rated = [answers.get(question.key, Answer("failed")) for question in asked]
        readings = [teacher.read(prompt, answer) for answer in rated]
        ratings.write(work.folder / "ratings.parquet", prompt, recipe.teacher.model, documents, rated, readings)
        result = summarise(work, prompt, documents, counts, rated, readings, n_asked)
        teacher.check_candidates_seen(prompt, recipe.teacher, rated)
        check_enough_scored(result, recipe, work)
        return work.finish(result)


def load_prompt(recipe: Recipe) -> Prompt:
    """The prompt, if it asks for a score."""
    prompt = prompts.load(required(recipe.rate.prompt, "rate.prompt", "prompts/edu-en.md"))
    if prompt.read == "label":
        raise UserError(f"rate.prompt: {recipe.rate.prompt} asks for labels; rate needs a prompt that gives a score")
    return prompt


def inputs(recipe: Recipe, prompt: Prompt) -> dict[str, object]:
    """Everything that decides the ratings."""
    return {
        "corpus": recipe.corpus.identity(),
        "shards": {shard.name: fingerprint(shard) for shard in find_shards(recipe.corpus)},
        "teacher": teacher.identity(prompt, recipe.teacher),
        "rate": {**recipe.rate.identity(), "prompt": prompt.digest},
        "seed": recipe.seed,
    }


def draw(recipe: Recipe) -> tuple[list[Document], Counts]:
    """The sample, if the corpus has anything to rate."""
    rate = recipe.rate
    documents, counts = sample(recipe.corpus, rate.sample, recipe.seed, rate.stratify_by, rate.gold_column)
    if not documents:
        raise UserError(f"corpus.path: {recipe.corpus.path} has no document with text in {counts.n_rows} rows")
    if len(documents) < rate.sample:
        log.info("rate: the corpus has only %d distinct texts to rate", len(documents))
    return documents, counts


def collect(ask: teacher.Ask, prompt: Prompt, recipe: Recipe, asked: list[Question], store: AnswerStore) -> int:
    """Ask what is not in the store; returns how many documents were asked about."""
    answered = {key for key, _ in store.find(question.key for question in asked)}
    log.info("rate: %d documents, %d already answered", len(asked), len(answered))
    n_asked = 0
    with progress("rate", len(asked) - len(answered)) as step:

        def record(answers: list[tuple[str, Answer]]) -> None:
            nonlocal n_asked
            store.add(answers)
            n_asked += len(answers)
            step(len(answers))

        if len(answered) < len(asked):
            ask(prompt, recipe.teacher, asked, answered, record)
    return n_asked


def summarise(
    work: Stage,
    prompt: Prompt,
    documents: list[Document],
    counts: Counts,
    answers: list[Answer],
    readings: list[Reading],
    n_asked: int,
) -> RateResult:
    """Counts and means over the sample."""
    scored = [i for i, reading in enumerate(readings) if reading.score is not None]
    scores = np.array([readings[i].score for i in scored], dtype=np.float64)
    unscored = Counter(str(reading.reason) for reading in readings if reading.reason)
    masses = [reading.mass for reading in readings if reading.mass is not None]
    ints = Counter(metrics.int_scores(scores, prompt.scale).tolist())
    gold = [documents[i].gold for i in scored]
    n_not_drawn = counts.n_rows - counts.n_empty - counts.n_bad_rows - len(documents)
    assert len(documents) == len(scored) + unscored.total(), "every sampled document has a score or a reason"
    assert n_not_drawn >= 0, f"{counts.n_rows} rows in, {-n_not_drawn} too many accounted for"
    return RateResult(
        seconds=work.seconds,
        n_failed=unscored["request_failed"],
        n_rows=counts.n_rows,
        n_empty=counts.n_empty,
        n_bad_rows=counts.n_bad_rows,
        n_repaired_texts=counts.n_repaired_texts,
        n_not_drawn=n_not_drawn,
        n_sampled=len(documents),
        n_scored=len(scored),
        n_asked=n_asked,
        n_reused=len(documents) - n_asked,
        n_truncated=sum(answer.was_truncated for answer in answers),
        unscored=dict(unscored),
        unscored_rate=1 - len(scored) / len(documents),
        int_score_counts={str(value): ints[value] for value in sorted(ints)},
        mean_score=float(scores.mean()) if scored else None,
        mass=float(np.mean(masses)) if masses else None,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        answer_tokens=sum(answer.answer_tokens for answer in answers),
        docs_per_s=n_asked / work.seconds if n_asked else None,
        gold=metrics.against_gold(scores, gold, metrics.is_binary(gold)),
    )


def check_enough_scored(result: RateResult, recipe: Recipe, work: Stage) -> None:
    """Stop when too much of the sample has no score; ratings and answers stay to be looked at."""
    n_unscored = result.n_sampled - result.n_scored
    if result.unscored_rate > recipe.rate.max_unscored_rate or result.n_scored == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in result.unscored.items())
        raise UserError(
            f"rate: {n_unscored} of {result.n_sampled} documents have no score ({reasons}); read the answers in"
            f" {work.folder / 'ratings.parquet'}, then mend the prompt or choose another teacher; where the request"
            " failed, the same command asks again"
        )
    if result.n_failed:
        log.info("rate: %d requests failed; run again with --redo to ask only them again", result.n_failed)
