"""What a reply is worth during RL: a student, a sequence classifier or the teacher, each a function of replies."""

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import conversations, language_model, model_files, student
from pipeline.config import Recipe
from pipeline.errors import UserError, needs
from pipeline.judge import Judge, Pair
from pipeline.metrics import Floats
from pipeline.models import files_of, pick_device

Reward = Callable[[Sequence[Pair]], Floats]
"""(n,) rewards of prompts with their replies."""

INSIDE = {"student": "train/student", "model": "reward/model"}
"""Where the run folder holds what learned the ratings."""
ROWS = 16
"""Replies that a classifier reads at a time."""


def load(recipe: Recipe) -> AbstractContextManager[Reward]:
    """The reward of a recipe, loaded for a `with` block. A judging teacher gives NaN to a reply without a score; from
    all others a reward that is no number is refused."""
    if recipe.reward.by == "teacher":
        return Judge(recipe, recipe.reward)
    where = place(recipe)
    kind = of_student if (Path(where) / student.DESCRIPTION).exists() else of_classifier
    return nullcontext(finite(kind(where, recipe), where))


def place(recipe: Recipe) -> str:
    """The folder or Hub name of a student or classifier."""
    by = recipe.reward.by
    if by not in INSIDE:
        return str(Path(by).expanduser()) if Path(by).expanduser().exists() else by
    folder = recipe.run_folder / INSIDE[by]
    if not folder.exists():
        raise UserError(f"reward.by: {by} is not learned yet, there is no {folder}; run gristmill align reward")
    return str(folder)


def finite(reward: Reward, where: str) -> Reward:
    """The same reward, which refuses to give anything but numbers."""

    def checked(pairs: Sequence[Pair]) -> Floats:
        found = reward(pairs)
        odd = np.flatnonzero(~np.isfinite(found))
        if len(odd):
            prompt, reply = pairs[odd[0]]
            raise UserError(
                f"reward.by: {where} gives {found[odd[0]]} to the reply {reply[:60]!r} to {prompt[:60]!r}; train it"
                " again, or take another reward"
            )
        return found

    return checked


def of_student(where: str, recipe: Recipe) -> Reward:
    """A student that learned to rate exchanges."""
    learned = student.load(where, recipe.encoder)
    return lambda pairs: np.asarray(learned.score([conversations.text(*pair) for pair in pairs]), dtype=np.float64)


# -- classifiers ------------------------------------------------------------------------------------------------------


def of_classifier(where: str, recipe: Recipe) -> Reward:
    """A sequence classifier with one output."""
    torch = needs("torch", "torch")
    tokenizer, model = load_classifier(where, "reward.by", recipe.reward.revision)
    device = pick_device(recipe.reward.device)
    model = model.to(device).eval()
    offset, slope = scale_of(model)

    def reward(pairs: Sequence[Pair]) -> Floats:
        found: list[float] = []
        for begin in range(0, len(pairs), ROWS):
            read = tokens_of(tokenizer, pairs[begin : begin + ROWS])
            batch = tokenizer.pad(read, return_tensors="pt").to(device)
            with torch.inference_mode():
                found += model(**batch).logits[:, 0].double().tolist()
        return offset + slope * np.array(found, dtype=np.float64)

    return reward


def load_classifier(where: str, setting: str, revision: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Tokenizer and model, which has one output; several labels are refused, as is a LoRA adapter alone."""
    transformers = needs("transformers", "torch")
    language_model.check_whole(where, setting)
    path, given = files_of(where, setting, revision)
    try:
        config = transformers.AutoConfig.from_pretrained(path, **given)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **given)
        check_head(config, where, setting, made=bool(options))
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, **model_files.of_weights(given), dtype="float32", **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = model_files.reason(error, setting)
        raise UserError(f"{setting}: {where} cannot be loaded as a classifier ({reason})") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, model


def check_head(config: Any, where: str, setting: str, made: bool) -> None:
    """Refuse what has no head for one number, which would start with random weights."""
    if made:
        return
    is_classifier = any("SequenceClassification" in name for name in config.architectures or [])
    if not is_classifier:
        raise UserError(
            f"{setting}: {where} is neither a student nor a classifier; take reward.by: model to train one from it"
        )
    if config.num_labels != 1:
        raise UserError(f"{setting}: {where} has {config.num_labels} labels; a reward is a classifier with one output")


def tokens_of(tokenizer: Any, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Exchanges as a classifier reads them, in its chat template if it has one; too long ones lose their beginning."""
    longest = min(tokenizer.model_max_length, LONGEST)
    tokenizer.truncation_side, own = "left", bool(getattr(tokenizer, "chat_template", None))
    texts = [in_template(tokenizer, *pair) if own else conversations.text(*pair) for pair in pairs]
    found = tokenizer(texts, truncation=True, max_length=longest, add_special_tokens=not own)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


LONGEST = 4096
"""Tokens that a classifier reads at most, where its tokenizer names no limit."""


def in_template(tokenizer: Any, prompt: str, reply: str) -> str:
    """An exchange as the chat template writes it."""
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


def scale_of(model: Any) -> tuple[float, float]:
    """Offset and slope from a classifier's output to points of the score; those of other makers are as they are."""
    return getattr(model.config, "score_offset", 0.0), getattr(model.config, "score_slope", 1.0)


# -- repetition -------------------------------------------------------------------------------------------------------

GRAM = 3


def repetition(reply: str) -> float:
    """Share of a reply's word trigrams that stand earlier in it: 0 without any, near 1 for one word over and over."""
    words = re.findall(r"\w+", reply.lower())
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
