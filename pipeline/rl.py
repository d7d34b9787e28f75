"""Align, last: the actor learns to please the reward, and the teacher judges its replies before and after."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline import (
    before_after,
    conversations,
    language_model,
    models,
    panel,
    policy,
    replies,
    student,
    training,
    unfinished,
)
from pipeline.before_after import Judged, needs_reward
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.gains import NOTHING, compared, sentence, warning
from pipeline.metrics import Interval
from pipeline.reward import RATED
from pipeline.storage import content, read_lines, write_table
from pipeline.teacher import identity
from pipeline.tracking import Result, Stage, read_json, stage
from pipeline.training import Job

log = logging.getLogger("gristmill")

REPLIES, ROWS, START = "replies.parquet", "rows.parquet", "start"


class RLResult(Result):
    """What the teacher says of replies to held-out prompts, next to what the reward says of them."""

    algorithm: str
    reward: str | None
    """reward.by; None for dpo, which needs no reward."""
    model: str
    """What it started from."""
    n_prompts: int
    """Prompts, or pairs of replies, that were learned from."""
    n_too_long: int
    """Prompts left out because they leave no room for a reply."""
    n_held_out: int
    """Prompts whose replies are judged."""
    n_steps: int
    teacher_before: float | None
    """Mean of the replies that the teacher scored both before and after."""
    teacher_after: float | None
    gain: float | None
    gain_interval: Interval | None
    """95%, from resampled prompts: a reply before and one after to each."""
    reward_before: float | None
    reward_after: float | None
    reward_gain: float | None
    n_unscored: int
    """Held-out prompts of which a reply has no score of the teacher."""
    n_unrewarded: int
    """Sampled replies that had no reward and were not learned from."""
    stopped_by: str | None
    """The teacher's budget that ended the learning early."""
    n_asked: int
    """Answers of the teacher in this run, learning and judging together."""
    usd: float | None
    sentence: str
    warning: str | None
    """Where the reward rose and the teacher's score did not."""


class Start(NamedTuple):
    """What RL works on."""

    model: str
    rows: pa.Table
    held_out: list[str]
    n_too_long: int


def run(recipe: Recipe, redo: bool = False) -> RLResult:
    """Train, then judge; an interrupted training goes on from its last checkpoint."""
    model = model_of(recipe)
    check_held_out(recipe)
    with stage("rl", recipe, inputs(recipe, model)) as work:
        unfinished.begin(work, redo, policy.CONVERSATIONS, policy.ENDED, START)
        done = work.finished(RLResult, redo, unfinished.is_trained(work) and (work.folder / REPLIES).exists())
        if done:
            return done
        begin = start(work, model)
        if not unfinished.is_trained(work):
            training.run(job(work, begin), recipe.rl.launch)
        sides = before_after.said(recipe, (begin.model, str(work.folder / training.MODEL)), begin.held_out)
        judged = before_after.judge(recipe, begin.held_out, sides)
        before_after.write(work.folder / REPLIES, begin.held_out, sides, judged)
        return work.finish(summarise(work, begin, model, judged))


def model_of(recipe: Recipe) -> str:
    """rl.model, or what align actor made, or what it would start from."""
    actor = recipe.run_folder / "actor"
    is_own = recipe.rl.model is None and actor.exists()
    found = str(actor / training.MODEL) if is_own else recipe.rl.model or recipe.actor.model
    if found is None or (is_own and not (actor / "result.json").exists()):
        raise UserError("rl: there is no actor to improve; run gristmill align actor to its end, or set rl.model")
    language_model.check_whole(found, "rl.model")
    return found


OF_REWARD = {"by", "revision", "budget_usd", "budget_tokens", "budget_minutes"}
"""Settings of the reward that decide what is learned from it, and for how long."""


def check_held_out(recipe: Recipe) -> None:
    """Refuse to judge on prompts that an earlier step may have learned from, as it held out others."""
    wanted = {"held_out_share": recipe.align.held_out_share, "seed": recipe.seed}
    for step in ("actor", "rate"):
        made = read_json(recipe.run_folder / step / "inputs.json") or {}
        before = {**made, **made.get("align", {})}
        for name, value in wanted.items():
            if before.get(name, value) != value:
                raise UserError(
                    f"rl: {name} is {value:g}, and was {before[name]:g} in align {step}, so that other prompts were"
                    " held out; set it back, or run align all again with --redo"
                )


def inputs(recipe: Recipe, model: str) -> dict[str, Any]:
    """Everything that decides the policy and how it is judged."""
    raters = [[rater.prompt.digest, identity(rater.prompt, rater.teacher)] for rater in panel.of(recipe)]
    align = recipe.align.identity()
    names = ("held_out_share", "held_out_prompts", "reply_tokens", "reply_temperature")
    files = {path.name: content(path) for path in conversations.files(recipe, "prompts")}
    return {
        "rl": recipe.rl.identity(),
        "reward": recipe.reward.model_dump(mode="json", include=OF_REWARD) if needs_reward(recipe) else None,
        "align": {name: align[name] for name in names},
        "model": model,
        "files": files | made_before(recipe, model),
        "raters": raters,
        "seed": recipe.seed,
    }


def made_before(recipe: Recipe, model: str) -> dict[str, str]:
    """What earlier steps were made from, by the files that say so."""
    run = recipe.run_folder
    found = {"actor": Path(model).parent / "inputs.json"}
    learned = {"student": run / "train/student/student.json", "model": run / "reward/model/model.safetensors"}
    found["reward"] = learned.get(recipe.reward.by, run / "none") if needs_reward(recipe) else run / RATED
    return {name: student.digest(path)[:16] for name, path in found.items() if path.exists()}


# -- what it works on -------------------------------------------------------------------------------------------------


def start(work: Stage, model: str) -> Start:
    """The model in a folder, and the prompts that leave room for a reply."""
    recipe = work.recipe
    taught, aside = conversations.prompts(recipe)
    where = as_folder(work, model)
    held_out, n_aside = replies.fitting(recipe, where, "rl.model", aside)
    if needs_reward(recipe):
        fit, n_taught = replies.fitting(recipe, where, "rl.model", taught)
        rows = pa.table({"user_input": pa.array(fit, pa.string())})
    else:
        rows, n_taught = pairs_of(recipe, where)
    if not held_out or not rows.num_rows:
        raise UserError(
            f"rl: of {len(taught)} prompts to learn on {rows.num_rows} are left, of {len(aside)} held-out ones"
            f" {len(held_out)}: the others leave no room for a reply; give shorter prompts, or lower"
            " align.reply_tokens"
        )
    if n_taught + n_aside:
        log.warning("rl: %d prompts leave no room for a reply and are left out", n_taught + n_aside)
    return Start(where, rows, held_out, n_taught + n_aside)


def as_folder(work: Stage, model: str) -> str:
    """The model where TRL can load it a second time, as the policy's reference: a .gguf file, and a revision of the
    Hub, are written out."""
    recipe, folder = work.recipe, work.folder / START
    revision = recipe.rl.revision if recipe.rl.model else recipe.actor.revision
    if not model.endswith(".gguf") and (revision is None or Path(model).expanduser().exists()):
        return models.locate(model, "rl.model")
    if not folder.exists():
        language_model.save(folder, *language_model.load(model, "rl.model", revision=revision))
    return str(folder)


def pairs_of(recipe: Recipe, model: str) -> tuple[pa.Table, int]:
    """To each prompt that is not held out the best and the worst rated reply, if they differ in score."""
    path = recipe.run_folder / RATED
    rated = conversations.read(path, "rl", ("completion",)) if path.exists() else []
    by_prompt: dict[str, list[tuple[float, str]]] = {}
    for prompt, reply, score in rated:
        if score is not None and not conversations.for_judging(recipe, prompt):
            by_prompt.setdefault(prompt, []).append((score, str(reply)))
    differ = {prompt: (max(said), min(said)) for prompt, said in by_prompt.items() if max(said)[0] > min(said)[0]}
    if not differ:
        raise UserError(
            f"rl.algorithm: dpo needs prompts with two replies of different scores, and {path} has none; run gristmill"
            " align rate with align.replies_per_prompt of 2 or more"
        )
    fit, n_too_long = replies.fitting(recipe, model, "rl.model", list(differ))
    names = ("user_input", "chosen", "rejected")
    rows = [dict(zip(names, (prompt, *(reply for _, reply in differ[prompt])), strict=True)) for prompt in fit]
    return pa.Table.from_pylist(rows, pa.schema(dict.fromkeys(names, pa.string()))), n_too_long


def job(work: Stage, begin: Start) -> Job:
    """The training, its rows written."""
    rl = work.recipe.rl
    write_table(work.folder / ROWS, begin.rows)
    given = {"trainer": rl.algorithm, "model": begin.model, "revision": None}  # of a folder that has the revision
    return training.job(work, rl, **given, rows=work.folder / ROWS, recipe=work.folder / "recipe.yaml")


# -- the result -------------------------------------------------------------------------------------------------------


def summarise(work: Stage, begin: Start, model: str, judged: Judged) -> RLResult:
    """Both sides in figures."""
    recipe, ended = work.recipe, read_json(work.folder / policy.ENDED) or {}
    teacher, reward = compared(*judged.teacher), compared(*judged.reward) if judged.reward else NOTHING
    best = panel.of(recipe)[0].prompt.scale[1]
    costs = [each for each in (judged.usd, ended.get("usd")) if each is not None]
    return RLResult(
        seconds=work.seconds,
        algorithm=recipe.rl.algorithm,
        reward=recipe.reward.by if needs_reward(recipe) else None,
        model=model,
        n_prompts=begin.rows.num_rows,
        n_too_long=begin.n_too_long,
        n_held_out=len(begin.held_out),
        n_steps=max((line["step"] for line in training.read_curve(work.folder)), default=0),
        teacher_before=teacher.before,
        teacher_after=teacher.after,
        gain=teacher.gain,
        gain_interval=teacher.interval,
        reward_before=reward.before,
        reward_after=reward.after,
        reward_gain=reward.gain,
        n_unscored=len(begin.held_out) - teacher.n,
        n_unrewarded=sum(line["reward"] is None for line in read_lines(work.folder / policy.CONVERSATIONS)),
        stopped_by=ended.get("stopped_by"),
        n_asked=judged.n_asked + ended.get("n_asked", 0),
        usd=sum(costs) if costs else None,
        sentence=sentence(teacher, reward, best),
        warning=warning(teacher, reward),
    )
