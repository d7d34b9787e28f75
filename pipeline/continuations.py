"""How a language model goes on from a beginning, or replies to it."""

import json
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline import language_model, models, teacher
from pipeline.config import Generate, Teacher
from pipeline.engines.layout import document_tokenizer
from pipeline.engines.transformers import LocalTeacher, ask_all, token_ids_only
from pipeline.errors import UserError
from pipeline.generation import question_prompt
from pipeline.teacher import Answer

WORDS, CHARACTERS = 16, 200
"""Of a document's beginning: so many words, or where they are longer, a third of so many characters."""


SPELLED = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
AROUND = 64
"""Tokens that are kept free for what a chat template puts around a prompt."""


class Beginning(NamedTuple):
    """What is continued, and how the document itself goes on."""

    prompt: str
    original: str | None = None


def beginning(text: str, characters: int) -> Beginning | None:
    """The first words of a document and about so many characters of what follows; None if too little does."""
    words = re.match(rf"\s*(?:\S+\s+){{{WORDS - 1}}}\S+", text)
    end = words.end() if words and words.end() <= CHARACTERS else CHARACTERS // 3
    rest = models.cut_at_space(text[end:], characters)
    return Beginning(text[:end], rest) if len(rest) >= characters // 2 else None


def continued(tokenizer: Any, model: Any, prompts: Sequence[str], settings: Teacher, chat: bool = False) -> list[str]:
    """What follows each prompt, in order, or what is replied to it; with the same seed another model is judged by the
    same luck. Raises UserError for a prompt that the model cannot read whole."""
    longest = check_length(tokenizer, model, prompts, settings.max_tokens)
    model.generation_config = token_ids_only(model.generation_config)
    asked = settings.model_copy(update={"document_tokens": longest})
    prompt = question_prompt(None, "", chat)
    questions = teacher.questions(prompt, asked, prompts)
    found: dict[str, Answer] = {}

    def record(answers: list[tuple[str, Answer]]) -> bool:
        found.update(answers)
        return True

    ask_all(LocalTeacher(prompt, asked, tokenizer, model.eval()), list(dict.fromkeys(questions)), set(), record)
    return [found[question.key].text for question in questions]


def check_length(tokenizer: Any, model: Any, prompts: Sequence[str], max_tokens: int) -> int:
    """Tokens of the longest prompt, if the model can read it whole and what follows."""
    spelled = document_tokenizer(tokenizer)
    lengths = [len(spelled(prompt, **SPELLED)["input_ids"]) for prompt in prompts]
    longest, at = max((length, place) for place, length in enumerate(lengths))
    most = language_model.context(model) - max_tokens - AROUND
    if longest > most:
        raise UserError(
            f"prompt {prompts[at][:40]!r} has {longest} tokens; beside {max_tokens} to be written the model can read"
            f" {max(0, most)}: shorten it, or write fewer"
        )
    return longest


# -- gristmill generate -----------------------------------------------------------------------------------------------


def run(name: str, prompts: Sequence[str], ways: Generate, as_json: bool = False) -> None:
    """Print what the model writes, a JSON line each or as text."""
    asked = prompts or [sys.stdin.read().rstrip("\n")]
    check(asked, ways)
    device = models.pick_device(ways.device)
    tokenizer, model = language_model.load(name, "model", device, ways.revision, "auto")
    parting = ""
    for seed in range(ways.seed, ways.seed + ways.n):
        found = continued(tokenizer, model, asked, settings(name, ways, seed), ways.chat)
        for prompt, text in zip(asked, found, strict=True):
            if as_json:
                line = {"prompt": prompt, "seed": seed, "text": text}
                sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                whole = text.strip() if ways.chat else prompt + text.rstrip()
                sys.stdout.write(f"{parting}{whole}\n")
            parting = "\n---\n\n"


def check(prompts: Sequence[str], ways: Generate) -> None:
    """Refuse what would write nothing of use."""
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("generate: the prompt is empty; give one after the model, or on stdin")
    if ways.n > 1 and not ways.temperature:
        raise UserError("generate: at --temperature 0 all continuations are the same; raise it, or leave out --n")


def settings(name: str, ways: Generate, seed: int) -> Teacher:
    """How an engine is asked for it."""
    return Teacher(
        model=name,
        max_tokens=ways.max_tokens,
        temperature=ways.temperature,
        top_p=ways.top_p,
        repetition_penalty=ways.repetition_penalty,
        seed=seed,
    )
