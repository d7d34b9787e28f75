"""Align, first: the model learns replies by supervised fine-tuning, the loss on the replies alone."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline import conversations, language_model, models, replies, sft, training, unfinished
from pipeline.config import Recipe
from pipeline.conversations import Exchange
from pipeline.corpus import text_id
from pipeline.errors import UserError, required
from pipeline.storage import content, write_table
from pipeline.tracking import Result, Stage, stage
from pipeline.training import Job

log = logging.getLogger("gristmill")

FEWEST = 2
"""Rows below which nothing is learned."""


class ActorResult(Result):
    """What the actor learned from."""

    model: str
    n_rows: int
    n_empty: int
    """Rows whose reply is empty; not learned from."""
    n_too_long: int
    """Rows whose prompt leaves no room for a reply in args.max_length; not learned from."""
    n_cut: int
    """Rows learned from whose reply is cut at args.max_length."""
    n_held_out: int
    """Rows with a prompt that is held out; not learned from."""
    n_trained_on: int
    n_steps: int
    loss_first: float | None
    loss_last: float | None
    held_out_loss_before: float | None
    """Of at most align.held_out_prompts of the rows held out; None where there are none."""
    held_out_loss_after: float | None


class Parts(NamedTuple):
    """Rows by what becomes of them."""

    taught: list[Exchange]
    held_out: list[Exchange]
    n_empty: int
    n_too_long: int
    n_cut: int


def run(recipe: Recipe, redo: bool = False) -> ActorResult:
    """Fine-tune; an interrupted training goes on from its last checkpoint."""
    model = check(recipe)
    rows = read(recipe)
    with stage("actor", recipe, inputs(recipe)) as work:
        unfinished.begin(work, redo)
        done = work.finished(ActorResult, redo, unfinished.is_trained(work))
        if done:
            return done
        parts = parted(rows, recipe, model)
        if not unfinished.is_trained(work):
            training.run(job_of(work, model, parts), recipe.actor.launch)
        return work.finish(summarise(work, model, len(rows), parts))


def check(recipe: Recipe) -> str:
    """The model, if it is whole, can be found and has a form for conversations."""
    actor = recipe.actor
    sft.check(actor, "actor")
    model = required(actor.model, "actor.model", "Qwen/Qwen3-0.6B")
    language_model.check_whole(model, "actor.model")
    tokenizer = models.load_tokenizer(model, "actor.model", actor.revision)
    training.check_chat_template(tokenizer, "actor.model", model)
    return model


def read(recipe: Recipe) -> list[Exchange]:
    """All rows."""
    found = conversations.of(recipe, "actor", needed=("completion",))
    if not found:
        raise conversations.absent("actor")
    return found


def inputs(recipe: Recipe) -> dict[str, Any]:
    """Everything that decides the model."""
    return {
        "actor": recipe.actor.identity(),
        "rows": {path.name: content(path) for path in conversations.files(recipe, "actor")},
        "held_out_share": recipe.align.held_out_share,
        "seed": recipe.seed,
    }


# -- rows -------------------------------------------------------------------------------------------------------------


def parted(rows: Sequence[Exchange], recipe: Recipe, model: str) -> Parts:
    """What is learned from, what only the loss is looked at, and how much is left out."""
    tokenizer = models.load_tokenizer(model, "actor.model", recipe.actor.revision)
    limit = max_length(recipe, model)
    said = [row for row in rows if (row.completion or "").strip()]
    asked = list(conversations.n_tokens([row.user_input for row in said], tokenizer))
    fit = [(row, n) for row, n in zip(said, asked, strict=True) if n < limit]
    aside = [conversations.for_judging(recipe, row.user_input) for row, _ in fit]
    taught = [each for each, is_aside in zip(fit, aside, strict=True) if not is_aside]
    held_out = [each[0] for each, is_aside in zip(fit, aside, strict=True) if is_aside]
    if len(taught) < FEWEST:
        raise UserError(
            f"actor: {len(taught)} of {len(rows)} rows can be learned from, at least {FEWEST} are needed:"
            f" {len(rows) - len(said)} have an empty reply, in {len(said) - len(fit)} the prompt fills"
            f" actor.args.max_length ({limit:g} tokens), and {len(held_out)} are held out; give more rows"
        )
    n_cut = sum(is_cut(row, n, limit, tokenizer) for row, n in taught)
    n_too_long = len(said) - len(fit)
    if n_too_long or n_cut:
        log.warning("actor: in %d rows the prompt fills %g tokens, in %d the reply is cut", n_too_long, limit, n_cut)
    return Parts([row for row, _ in taught], held_out, len(rows) - len(said), n_too_long, n_cut)


def max_length(recipe: Recipe, model: str) -> float:
    """Tokens of prompt and reply together that are trained on."""
    asked = recipe.actor.args.get("max_length", sft.REPLIES["max_length"])
    context = replies.context(model, "actor.model", recipe.actor.revision)
    return min(math.inf if asked is None else float(asked), context)


def is_cut(row: Exchange, n_asked: int, limit: float, tokenizer: Any) -> bool:
    """Whether a reply, with the token that ends it, is longer than what the prompt leaves."""
    reply = tokenizer(row.completion, add_special_tokens=False, verbose=False)["input_ids"]
    return n_asked + len(reply) + 1 > limit


def job_of(work: Stage, model: str, parts: Parts) -> Job:
    """The training, its rows written; the loss on held-out rows is taken before it and after each epoch."""
    recipe, actor = work.recipe, work.recipe.actor
    drawn = sorted(parts.held_out, key=lambda row: text_id(f"{recipe.seed}:{row.user_input}"))
    held_out, longest = drawn[: recipe.align.held_out_prompts], max_length(recipe, model)
    looks = {"eval_strategy": "epoch", "eval_on_start": True} if held_out else {}
    args = {**looks, **actor.args, "max_length": int(longest) if math.isfinite(longest) else None}
    rows = written(work.folder / "rows.parquet", parts.taught)
    judged = written(work.folder / "held_out.parquet", held_out) if held_out else None
    return training.job(work, actor, trainer="sft", model=model, rows=rows, held_out=judged, args=args)


def written(path: Path, rows: Sequence[Exchange]) -> Path:
    """Rows as the trainer reads them."""
    columns = {"user_input": [row.user_input for row in rows], "completion": [row.completion for row in rows]}
    write_table(path, pa.table(columns))
    return path


def summarise(work: Stage, model: str, n_rows: int, parts: Parts) -> ActorResult:
    """The curve in a few figures; every row is learned from or counted."""
    curve = training.read_curve(work.folder)
    losses, held_out = ([line[name] for line in curve if name in line] for name in ("loss", "eval_loss"))
    n = len(parts.taught) + len(parts.held_out) + parts.n_empty + parts.n_too_long
    assert n == n_rows, f"{n_rows} rows in, {n} accounted for"
    return ActorResult(
        seconds=work.seconds,
        model=model,
        n_rows=n_rows,
        n_empty=parts.n_empty,
        n_too_long=parts.n_too_long,
        n_cut=parts.n_cut,
        n_held_out=len(parts.held_out),
        n_trained_on=len(parts.taught),
        n_steps=max((line["step"] for line in curve), default=0),
        loss_first=losses[0] if losses else None,
        loss_last=losses[-1] if losses else None,
        held_out_loss_before=held_out[0] if len(held_out) > 1 else None,
        held_out_loss_after=held_out[-1] if len(held_out) > 1 else None,
    )
