"""Stage 1: a teacher rates a sample of the corpus."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import corpus, metrics, prompts, teacher
from pipeline.config import Recipe
from pipeline.corpus import Counts, Document
from pipeline.errors import UserError, required
from pipeline.prompts import Prompt, Reading
from pipeline.teacher import Answer, AnswerStore, Question
from pipeline.tracking import Result, Stage, progress, stage

log = logging.getLogger("gristmill")

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "text": pa.string(),
        "score": pa.float64(),
        "reason": pa.string(),
        "answer": pa.string(),
        "log_probs": pa.map_(pa.string(), pa.float64()),
        "mass": pa.float64(),
        "entropy": pa.float64(),
        "was_cut": pa.bool_(),
        "prompt_tokens": pa.int64(),
        "answer_tokens": pa.int64(),
        "stratum": pa.string(),
        "gold": pa.float64(),
        "prompt": pa.string(),
        "teacher": pa.string(),
    }
)
"""A rating. It holds no clock time, so that an interrupted run ends with the same bytes; seconds are in the answer
store."""


class RateResult(Result):
    """What stage 1 did. Rates are shares of the sample; `mass` is the mean probability of all candidates."""

    n_rows: int
    n_empty: int
    n_bad_rows: int
    n_repaired_texts: int
    n_sampled: int
    n_scored: int
    n_asked: int
    n_reused: int
    n_cut: int
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
    ask = teacher.engine(recipe.teacher)
    with stage("rate", recipe, inputs(recipe, prompt)) as work:
        done = work.finished(RateResult, redo)
        if done:
            return done
        documents, counts = draw(recipe)
        asked = teacher.questions(prompt, recipe.teacher, [document.text for document in documents])
        with AnswerStore(work.folder / "answers.sqlite") as store:
            n_asked = collect(ask, prompt, recipe, asked, store)
            answers = dict(store.find(question.key for question in asked))
        rated = [answers.get(question.key, Answer("failed")) for question in asked]
        readings = [teacher.read(prompt, answer) for answer in rated]
        write(work, prompt, documents, rated, readings)
        result = summarise(work, prompt, documents, counts, rated, readings, n_asked)
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
        "shards": {shard.name: corpus.fingerprint(shard) for shard in corpus.shards(recipe.corpus)},
        "teacher": teacher.identity(prompt, recipe.teacher),
        "rate": {**recipe.rate.identity(), "prompt": prompt.digest},
        "seed": recipe.seed,
    }


def draw(recipe: Recipe) -> tuple[list[Document], Counts]:
    """The sample, if the corpus has anything to rate."""
    rate = recipe.rate
    documents, counts = corpus.sample(recipe.corpus, rate.sample, recipe.seed, rate.stratify_by, rate.gold_column)
    if not documents:
        raise UserError(f"corpus.path: {recipe.corpus.path} has no document with text in {counts.n_rows} rows")
    if len(documents) < rate.sample:
        log.info("rate: the corpus has only %d distinct texts to rate", len(documents))
    return documents, counts


def collect(ask: teacher.Ask, prompt: Prompt, recipe: Recipe, asked: list[Question], store: AnswerStore) -> int:
    """Ask what is not in the store; returns how many answers came."""
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


def write(
    work: Stage, prompt: Prompt, documents: list[Document], answers: list[Answer], readings: list[Reading]
) -> None:
    """Ratings, one row a document, in the order of the sample."""
    rows = [
        {
            **document._asdict(),
            "score": reading.score,
            "reason": reading.reason,
            "answer": answer.text,
            "log_probs": list(answer.log_probs.items()) if answer.log_probs is not None else None,
            "mass": reading.mass,
            "entropy": reading.entropy,
            "was_cut": answer.was_cut,
            "prompt_tokens": answer.prompt_tokens,
            "answer_tokens": answer.answer_tokens,
            "prompt": prompt.digest,
            "teacher": work.recipe.teacher.model,
        }
        for document, answer, reading in zip(documents, answers, readings, strict=True)
    ]
    metadata = {"scale": f"{prompt.scale[0]:g} {prompt.scale[1]:g}"}
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata(metadata))
    corpus.write_table(work.folder / "ratings.parquet", table)


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
    has_gold = work.recipe.rate.gold_column is not None
    return RateResult(
        seconds=work.seconds,
        n_failed=unscored["request_failed"],
        n_rows=counts.n_rows,
        n_empty=counts.n_empty,
        n_bad_rows=counts.n_bad_rows,
        n_repaired_texts=counts.n_repaired_texts,
        n_sampled=len(documents),
        n_scored=len(scored),
        n_asked=n_asked,
        n_reused=len(documents) - n_asked,
        n_cut=sum(answer.was_cut for answer in answers),
        unscored=dict(unscored),
        unscored_rate=1 - len(scored) / len(documents),
        int_score_counts={str(value): ints[value] for value in sorted(ints)},
        mean_score=float(scores.mean()) if scored else None,
        mass=float(np.mean(masses)) if masses else None,
        prompt_tokens=sum(answer.prompt_tokens for answer in answers),
        answer_tokens=sum(answer.answer_tokens for answer in answers),
        docs_per_s=n_asked / work.seconds if n_asked else None,
        gold=metrics.against_gold(scores, [documents[i].gold for i in scored]) if has_gold else None,
    )


def check_enough_scored(result: RateResult, recipe: Recipe, work: Stage) -> None:
    """Stop when too much of the sample has no score; ratings and answers stay to be looked at."""
    if result.unscored_rate > recipe.rate.max_unscored_rate or result.n_scored == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in result.unscored.items())
        raise UserError(
            f"rate: {result.n_sampled - result.n_scored} of {result.n_sampled} documents have no score ({reasons});"
            f" read the answers in {work.folder / 'ratings.parquet'}, then mend the prompt or choose another teacher"
        )


def read_scale(path: Path) -> tuple[float, float]:
    """The scale of a ratings file."""
    low, high = (pq.read_schema(path).metadata or {})[b"scale"].split()
    return float(low), float(high)
