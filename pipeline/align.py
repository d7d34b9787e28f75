"""Align as a whole: what would stop a later step is found before the first token is paid for."""

from pathlib import Path

from pipeline import (
    actor,
    arguments,
    conversations,
    language_model,
    models,
    panel,
    policy,
    preferences,
    prepare,
    rate_replies,
    rewards,
    train,
)
from pipeline.config import Recipe
from pipeline.conversations import Exchange
from pipeline.engines import engine
from pipeline.errors import UserError, needs, required


def check_ahead(recipe: Recipe) -> None:
    """Models, prompts and files, as far as they are there yet."""
    actor.check(recipe)
    raters = panel.of(recipe)
    for teacher in {rater.called: rater.teacher for rater in raters}.values():
        engine(teacher)
    check_reward(recipe)
    check_arguments(recipe)
    if recipe.align.source:
        prepare.inputs(recipe, recipe.align.source)
    given = rate_replies.read_given(recipe, raters[0].prompt.scale)
    if not recipe.align.source or all(conversations.files(recipe, kind) for kind in ("actor", "prompts")):
        check_taught(recipe, actor.read(recipe))
        check_enough(recipe, conversations.prompts(recipe)[0], given)


def check_taught(recipe: Recipe, rows: list[Exchange]) -> None:
    """Refuse rows for the actor of which none is learned from."""
    if all(conversations.for_judging(recipe, row.user_input) for row in rows):
        raise UserError(
            f"align.actor_data: all {len(rows)} rows are to prompts that are held out; give more, or lower"
            " align.held_out_share"
        )


def check_enough(recipe: Recipe, taught: list[str], given: list[Exchange]) -> None:
    """Refuse fewer replies than a student learns from."""
    own = {(row.user_input, row.completion) for row in given if not conversations.for_judging(recipe, row.user_input)}
    n = len(own) + len(taught) * recipe.align.replies_per_prompt
    if recipe.reward.by == "student" and n < train.FEWEST:
        raise UserError(
            f"align: only {n} replies would be rated, and a student learns from {train.FEWEST} or more; give more"
            " prompts or rows, or raise align.replies_per_prompt"
        )


def check_reward(recipe: Recipe) -> None:
    """What the reward is made of or held against, and the files of launches."""
    by = recipe.reward.by
    if by == "student":
        models.locate(recipe.encoder.model, "encoder.model")
    elif by == "model":
        model = required(recipe.reward.model, "reward.model", "answerdotai/ModernBERT-base")
        language_model.check_whole(model, "reward.model")
    elif by != "teacher":
        language_model.check_whole(rewards.place(recipe), "reward.by")
    named: dict[str, Path | None] = {
        "reward.preferences": recipe.reward.preferences,
        **{f"{section}.launch": getattr(recipe, section).launch for section in ("actor", "reward", "rl")},
    }
    for setting, path in named.items():
        if path is not None and not path.exists():
            raise UserError(f"{setting}: {path} does not exist")
    if recipe.reward.preferences:
        preferences.read(recipe.reward.preferences)


def check_arguments(recipe: Recipe) -> None:
    """Refuse arguments that a later training does not take."""
    trl, transformers, peft = needs("trl", "finetune"), needs("transformers", "torch"), needs("peft", "finetune")
    on_policy = getattr(trl, policy.KINDS[recipe.rl.algorithm].config)
    kinds = {"reward": transformers.TrainingArguments, "rl": on_policy}
    for section, kind in kinds.items():
        arguments.known(kind, getattr(recipe, section).args, f"{section}.args")
        arguments.known(peft.LoraConfig, getattr(recipe, section).lora, f"{section}.lora")
