"""Align: what a reply is worth is learned from the ratings, and held against the teacher and against people."""

import logging
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import conversations, metrics, preferences, rewards, splits, train, training, unfinished
from pipeline.config import Recipe
from pipeline.conversations import Exchange
from pipeline.errors import UserError, required
from pipeline.figures import ScoreFigures
from pipeline.judge import Judge
from pipeline.metrics import Bools, Figures, Interval
from pipeline.preferences import Preference
from pipeline.rewards import Reward
from pipeline.storage import content, write_table
from pipeline.tracking import Result, Stage, stage
from pipeline.training import Job

log = logging.getLogger("gristmill")

RATED = "rate/replies.jsonl"
FEWEST = 20
"""Rated replies below which nothing is learned."""


class RewardResult(Result):
    """What stands in for the teacher during RL, and how well."""

    by: str
    n_rated: int
    """Replies with a score that it was learned from or is held against."""
    n_unscored: int
    n_held_out: int
    """Those that it did not learn from; no prompt, and nothing nearly equal, is on both sides."""
    spearman: float | None
    """Against the teacher on these."""
    spearman_interval: Interval | None
    preferences: dict[str, Any] | None
    """Share of the pairs of people in which it prefers their reply; `n_seen` more are to prompts it learned from."""
    n_asked: int
    usd: float | None
    """What a teacher that judges the pairs of people took."""
    sentence: str


def run(recipe: Recipe, redo: bool = False) -> RewardResult:
    """Learn the reward, if there is something to learn, and judge it."""
    rated, n_unscored = read(recipe)
    pairs = preferences.read(recipe.reward.preferences) if recipe.reward.preferences else []
    fresh = unseen(pairs, rated, recipe)
    with stage("reward", recipe, inputs(recipe)) as work:
        unfinished.begin(work, redo)
        done = work.finished(RewardResult, redo, is_there(work))
        if done:
            return done
        agreement = learned(work, rated, redo)
        with rewards.load(recipe) if fresh else nullcontext(None) as reward:
            judged = preferences.accuracy(reward, fresh) | {"n_seen": len(pairs) - len(fresh)} if reward else None
            told = spent(reward)
        given: dict[str, Any] = {"by": recipe.reward.by, "n_rated": len(rated), "n_unscored": n_unscored}
        said = sentence(recipe.reward.by, agreement, judged)
        return work.finish(
            RewardResult(seconds=work.seconds, **given, **agreement, preferences=judged, **told, sentence=said)
        )


def inputs(recipe: Recipe) -> dict[str, Any]:
    """Everything that decides the reward."""
    files = {"preferences": recipe.reward.preferences, "rated": recipe.run_folder / RATED}
    return {
        "reward": recipe.reward.identity(),
        "encoder": recipe.encoder.identity(),
        "train": recipe.train.identity(),
        "files": {name: content(path) for name, path in files.items() if path and path.exists()},
        "seed": recipe.seed,
    }


def is_there(work: Stage) -> bool:
    """Whether what was learned is still there."""
    by = work.recipe.reward.by
    return by not in rewards.INSIDE or (work.recipe.run_folder / rewards.INSIDE[by]).exists()


def read(recipe: Recipe) -> tuple[list[Exchange], int]:
    """The replies that the teacher gave a score, and how many it gave none; none where nothing is rated yet."""
    path = recipe.run_folder / RATED
    found = conversations.read(path, "reward", ("completion",)) if path.exists() else []
    rated = [each for each in found if each.score is not None]
    return rated, len(found) - len(rated)


def unseen(pairs: list[Preference], rated: list[Exchange], recipe: Recipe) -> list[Preference]:
    """The pairs of people to prompts that the reward does not learn from."""
    seen = {each.user_input for each in rated} if recipe.reward.by in rewards.INSIDE else set()
    found = [pair for pair in pairs if pair.prompt not in seen]
    if len(found) < len(pairs):
        log.warning(
            "reward: %d of %d pairs of people are left out, as the reward learns from replies to their prompts",
            len(pairs) - len(found),
            len(pairs),
        )
    return found


# -- what learns ------------------------------------------------------------------------------------------------------


def learned(work: Stage, rated: list[Exchange], redo: bool) -> dict[str, Any]:
    """Learn what is to be learned; how well it agrees with the teacher."""
    if work.recipe.reward.by == "student":
        check(rated)
        return of_student(train.run(work.recipe, redo))
    return by_model(work, rated) if work.recipe.reward.by == "model" else by_others(work.recipe, rated)


def of_student(result: train.TrainResult) -> Figures:
    """What stage 2 found of a head on the frozen encoder."""
    found = result.targets["score"]
    assert isinstance(found, ScoreFigures), "the score of the ratings is a score"
    between = found.intervals["spearman"]
    return {"n_held_out": found.n_test, "spearman": found.spearman, "spearman_interval": between}


def by_model(work: Stage, rated: list[Exchange]) -> Figures:
    """A sequence classifier is fine-tuned on most of the ratings."""
    held_out = apart(rated, work.recipe)
    taught = [each for each, aside in zip(rated, held_out, strict=True) if not aside]
    check(taught)
    if not unfinished.is_trained(work):
        training.run(job(work, taught), work.recipe.reward.launch)
    return agreement(work.recipe, [each for each, aside in zip(rated, held_out, strict=True) if aside])


def by_others(recipe: Recipe, rated: list[Exchange]) -> Figures:
    """A teacher or a folder learns nothing; a folder is held against all ratings."""
    if recipe.reward.by == "teacher" or not rated:
        return {"n_held_out": 0, "spearman": None, "spearman_interval": None}
    return agreement(recipe, rated)


def apart(rated: list[Exchange], recipe: Recipe) -> Bools:
    """(n,) which replies are held out: whole prompts, with whatever says nearly the same."""
    texts = [conversations.text(each.user_input, str(each.completion)) for each in rated]
    strata = [round(each.score or 0) for each in rated]
    groups = [each.user_input for each in rated]
    parts = splits.split(texts, strata, groups, [0] * len(rated), recipe.train, recipe.seed).parts
    return np.asarray(parts == "test")


def check(taught: list[Exchange]) -> None:
    """Refuse ratings of which nothing can be learned."""
    if len(taught) < FEWEST:
        raise UserError(
            f"reward: only {len(taught)} rated replies are there to learn from; have at least {FEWEST}, better a"
            " thousand, rated by gristmill align rate (align.replies_per_prompt)"
        )
    if len({each.score for each in taught}) == 1:
        raise UserError(
            f"reward: all {len(taught)} replies to learn from have the score {taught[0].score}; mend the prompt or"
            " choose another teacher"
        )


def job(work: Stage, taught: list[Exchange]) -> Job:
    """The training of a classifier."""
    settings, rows = work.recipe.reward, work.folder / "rows.parquet"
    write_table(rows, pa.Table.from_pylist([each._asdict() for each in taught]))
    required(settings.model, "reward.model", "answerdotai/ModernBERT-base")
    return training.job(work, settings, trainer="classifier", rows=rows)


# -- the result -------------------------------------------------------------------------------------------------------


def agreement(recipe: Recipe, held_out: list[Exchange]) -> Figures:
    """How alike the reward and the teacher rank replies that the reward did not learn from."""
    with rewards.load(recipe) as reward:
        found = reward([(each.user_input, str(each.completion)) for each in held_out])
    of_teacher = np.array([each.score for each in held_out], dtype=np.float64)
    figures = metrics.correlation(found, of_teacher)
    return {"n_held_out": len(held_out), **{name: value for name, value in figures.items() if name != "n"}}


def spent(reward: Reward | None) -> dict[str, Any]:
    """What a judging teacher was asked."""
    judge = reward if isinstance(reward, Judge) else None
    return {"n_asked": judge.spending.n_asked if judge else 0, "usd": judge.usd if judge else None}


def sentence(by: str, found: Figures, judged: dict[str, Any] | None) -> str:
    """What a person has to know, on one line."""
    told = [with_interval("Spearman with the teacher", found["spearman"], found["spearman_interval"])]
    if judged:
        told.append(with_interval("prefers the reply that people prefer in", judged["accuracy"], judged["interval"]))
    known = "; ".join(filter(None, told))
    return f"Reward by {by}: {known or 'nothing to hold it against'}."


def with_interval(what: str, value: Any, interval: Any) -> str:
    """A figure in words, nothing where there is none."""
    if value is None:
        return ""
    return f"{what} {value:.3f}" + (f" (95% {interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
