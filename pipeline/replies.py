"""Replies that a language model writes to prompts, each recorded before it is used."""

import math
from collections.abc import Sequence
from pathlib import Path

from pipeline import conversations, generation, models, training
from pipeline.config import Budget, Recipe, Teacher, digest
from pipeline.engines.kept import Kept
from pipeline.errors import UserError, needs
from pipeline.panel import Desk
from pipeline.spending import Spending
from pipeline.teacher import AnswerStore
from pipeline.tracking import progress

UNBOUNDED = 10**9
"""Tokens that a prompt may have where a model names no context."""
MARGIN = 16
"""Tokens of the context that an engine may need beside prompt and reply; a prompt may differ by half of them where it
is tokenised apart from its template."""


def write(recipe: Recipe, model: str, prompts: Sequence[str], temperature: float | None, seed: int) -> list[str]:
    """One reply to each prompt, in order, of at most align.reply_tokens and without spaces around it; temperature None
    is that of the recipe, 0 takes the likeliest token each time. Replies written before by the same model are read
    back; a prompt that leaves no room for the reply raises UserError (fitting)."""
    return write_several(recipe, model, prompts, temperature, [seed])[0]


def write_several(
    recipe: Recipe, model: str, prompts: Sequence[str], temperature: float | None, seeds: Sequence[int]
) -> list[list[str]]:
    """The same with each of several seeds, the model loaded once: (n_seeds, n_prompts)."""
    asked, spending, room = generation.question_prompt(None, "", True), Spending(Budget()), own_tokens(recipe, model)
    with (
        AnswerStore(store_of(recipe, model)) as store,
        Kept() as kept,
        progress("replies", len(seeds) * len(prompts), unit="replies") as step,
    ):
        found = []
        for seed in seeds:
            desk = Desk(store, spending)
            desk.step = step
            answers = generation.ask(asked, writer(recipe, model, room, temperature, seed), prompts, desk, kept.start)
            found.append([answer.text.strip() for answer in answers])
    return found


def writer(recipe: Recipe, model: str, room: int, temperature: float | None, seed: int) -> Teacher:
    """The model as something that can be asked prompts of so many tokens."""
    align = recipe.align
    return Teacher(
        model=model,
        temperature=align.reply_temperature if temperature is None else temperature,
        seed=seed,
        max_tokens=align.reply_tokens,
        document_tokens=room,
        device=recipe.actor.device,
    )


def store_of(recipe: Recipe, model: str) -> Path:
    """Where a model's replies are kept; a model that is made anew in the same folder has another place."""
    folder = Path(model).expanduser()
    files = sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []
    made = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return recipe.run_folder / "replies" / f"{digest([str(model), made])}.sqlite"


def fitting(recipe: Recipe, model: str, setting: str, prompts: Sequence[str]) -> tuple[list[str], int]:
    """The prompts that leave room for a reply of align.reply_tokens in the model's context, and how many don't."""
    tokenizer = models.load_tokenizer(model, setting, None)
    training.check_chat_template(tokenizer, setting, model)
    return conversations.fitting(prompts, tokenizer, prompt_tokens(recipe, model, setting))


def prompt_tokens(recipe: Recipe, model: str, setting: str) -> float:
    """Most tokens of a prompt that leave room for the reply; infinite where the model names no context."""
    found = context(model, setting)
    limit = found - recipe.align.reply_tokens - MARGIN
    if limit < 1:
        raise UserError(
            f"align.reply_tokens: {recipe.align.reply_tokens} leave no room for a prompt in the {found:g} tokens that"
            f" {model} reads; lower it"
        )
    return limit


def own_tokens(recipe: Recipe, model: str) -> int:
    """The same without the chat template."""
    limit = prompt_tokens(recipe, model, "actor")
    around = next(conversations.n_tokens([""], models.load_tokenizer(model, "actor", None)))
    return max(1, int(limit) - around + MARGIN // 2) if math.isfinite(limit) else UNBOUNDED


def context(model: str, setting: str, revision: str | None = None) -> float:
    """Tokens that a model reads and writes together; infinite where it names no limit."""
    transformers, (where, options) = needs("transformers", "torch"), models.files_of(model, setting, revision)
    try:
        config = transformers.AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"{setting}: {model} cannot be loaded as a causal language model ({told})") from None
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return float(found) if found else float("inf")
