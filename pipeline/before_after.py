"""Replies to held-out prompts before and after RL, and what the teacher and the reward say of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline import replies, rewards
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.judge import Judge, Pair
from pipeline.metrics import Floats
from pipeline.storage import write_table

Sides = tuple[list[str], list[str]]
"""Replies before and after, in the order of the prompts."""


class Judged(NamedTuple):
    """(n_held_out,) each, before and after; NaN without a score, None without a reward."""

    teacher: tuple[Floats, Floats]
    reward: tuple[Floats, Floats] | None
    n_asked: int
    usd: float | None


def said(recipe: Recipe, models: tuple[str, str], prompts: Sequence[str]) -> Sides:
    """A reply of either model to each prompt, sampled as in training, as what is learned is how to sample: the
    likeliest reply can stay bad while most get better, and the other way round. Both have the same seed."""
    temperature, seed = recipe.align.reply_temperature, recipe.seed
    before, after = (replies.write(recipe, model, prompts, temperature, seed) for model in models)
    return before, after


def needs_reward(recipe: Recipe) -> bool:
    """Whether replies are rewarded while it learns."""
    return recipe.rl.algorithm != "dpo"


def judge(recipe: Recipe, prompts: Sequence[str], sides: Sides) -> Judged:
    """The teacher's scores and the reward's."""
    pairs: list[Pair] = [pair for side in sides for pair in zip(prompts, side, strict=True)]
    with Judge(recipe, recipe.rate) as teacher:
        scores = teacher(pairs)
        n_asked, usd = teacher.spending.n_asked, teacher.usd
        if teacher.stopped_by:
            raise UserError(
                f"rl: rate.{teacher.stopped_by} is spent before all replies to held-out prompts are judged; raise it,"
                " and the same command goes on"
            )
    if not needs_reward(recipe):
        return Judged(halves(scores), None, n_asked, usd)
    if recipe.reward.by == "teacher":
        return Judged(halves(scores), halves(scores), n_asked, usd)
    with rewards.load(recipe) as reward:
        return Judged(halves(scores), halves(reward(pairs)), n_asked, usd)


def halves(values: Floats) -> tuple[Floats, Floats]:
    """The first and the second half."""
    return values[: len(values) // 2], values[len(values) // 2 :]


def write(path: Path, prompts: Sequence[str], sides: Sides, judged: Judged) -> None:
    """Replies to held-out prompts side by side."""
    rewarded = judged.reward or (np.full(len(prompts), np.nan), np.full(len(prompts), np.nan))
    columns = {
        "user_input": pa.array(prompts, pa.string()),
        "before": pa.array(sides[0], pa.string()),
        "after": pa.array(sides[1], pa.string()),
        **{f"teacher_{name}": numbers(v) for name, v in zip(("before", "after"), judged.teacher, strict=True)},
        **{f"reward_{name}": numbers(v) for name, v in zip(("before", "after"), rewarded, strict=True)},
    }
    write_table(path, pa.table(columns))


def numbers(values: Floats) -> pa.Array:
    """A column, null where there is no number."""
    return pa.array(values, pa.float64(), mask=np.isnan(values))
