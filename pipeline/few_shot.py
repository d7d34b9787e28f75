"""Few-shot examples: known documents with the answer that their score calls for, as a prompt shows them."""

import math
import random
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline import objectives
from pipeline.corpus import text_id
from pipeline.engines.completions import break_control_tokens, well_formed
from pipeline.errors import UserError
from pipeline.models import cut_at_space
from pipeline.prompts import CUT_MARK, Choice, Example, Prompt
from pipeline.reading import read_json, read_text

HERE = "\0"
"""Stands where a number goes."""
GROUP = re.compile(r"(?<!\\)\((?:\?(?:P<\w+>|:))?((?:[^()\\]|\\.)*)\)")
"""An innermost group of a pattern, and what it holds."""
ROUNDED = 0.006
"""A score that is written with two decimals at most is off by no more."""


class Pool(NamedTuple):
    """Known documents that may be shown."""

    documents: Sequence[tuple[str, float]]
    """Text and score of each."""
    span: objectives.Scale
    """The lowest and the highest known score of all documents, these and others."""


def drawn(prompt: Prompt, pool: Pool, n: int, draw: int, characters: int) -> tuple[Example, ...]:
    """So many of the pool as examples: one of each n-tile of the scores, in an order of the draw's
    own; texts are cut to `characters`."""
    if n > len(pool.documents):
        raise UserError(
            f"examples: {n} are asked for, {len(pool.documents)} documents are set aside for them; ask for fewer"
        )
    known = [(text, on_scale(score, pool.span, prompt.scale)) for text, score in pool.documents]
    ranked = sorted(known, key=lambda each: (each[1], text_id(each[0])))
    generator = random.Random(draw)  # noqa: S311
    tiles = [ranked[len(ranked) * i // n : len(ranked) * (i + 1) // n] for i in range(n)]
    chosen = [generator.choice(tile) for tile in tiles]
    generator.shuffle(chosen)
    return tuple(
        Example(text=shown(prompt, text, characters), answer=answer_for(prompt, score)) for text, score in chosen
    )


def on_scale(score: float, span: objectives.Scale, scale: objectives.Scale) -> float:
    """A human score on the prompt's scale: where the span of all is on another, its ends become those of the scale."""
    if objectives.is_on(np.array(span), scale):
        return score
    return scale[0] + (scale[1] - scale[0]) * (score - span[0]) / ((span[1] - span[0]) or 1)


def shown(prompt: Prompt, text: str, characters: int) -> str:
    """A document that an example may show: cut to so many characters, and unable to leave its place."""
    whole = well_formed(text)
    piece = cut_at_space(whole, characters)
    return prompt.fence(break_control_tokens(piece)) + (CUT_MARK if len(piece) < len(whole) else "")


# -- the answer


def answer_for(prompt: Prompt, score: float) -> str:
    """What an ideal teacher would answer, behind answer_start, about a document of this score."""
    if prompt.read == "label":
        raise UserError(
            f"examples: prompt {prompt.name} asks for labels, not for a score; write its examples yourself"
        )
    if prompt.read == "choices":
        return nearest(prompt, score).answers[0]
    if len(prompt.attributes) > 1:
        raise UserError(f"examples: prompt {prompt.name} asks for several scores, and one is known; take another")
    tried = attempts(prompt, f"{round(score, 2):g}")
    answer = next((each for each in tried if reads_back(prompt, each, score)), None)
    if answer is None:
        raise UserError(
            f"examples: no answer is known that prompt {prompt.name} reads as {score:g}; set example_answer in its"
            " front matter to how its answers are written, such as 'Score: {score}'"
        )
    return answer


def nearest(prompt: Prompt, score: float) -> Choice:
    """The first group of candidates with the nearest value; of two values, the higher from the middle of the scale."""
    values = sorted({choice.value for choice in prompt.choices})
    if len(values) == 2:
        value = values[score >= sum(prompt.scale) / 2]
    else:
        value = min(values, key=lambda value: (abs(value - score), -value))
    return next(choice for choice in prompt.choices if choice.value == value)


def attempts(prompt: Prompt, number: str) -> list[str]:
    """Ways to write an answer with this number: the prompt's own, else the plainest first."""
    if prompt.example_answer is not None:
        return [prompt.example_answer.replace("{score}", number)]
    if prompt.read == "json":
        return [] if prompt.rationale else [f'{{"{name}": {number}}}' for name in prompt.attributes]
    gap = " " if prompt.answer_start and not prompt.answer_start[-1].isspace() else ""
    begun = [number] if prompt.answer_start else []
    return [gap + each for each in (*begun, f"Score: {number}", spelled(prompt.pattern, number))]


def reads_back(prompt: Prompt, answer: str, score: float) -> bool:
    """Whether the prompt reads this answer as the score, and allows its form."""
    if prompt.regex is not None and not re.fullmatch(prompt.regex, answer):
        return False
    read = {"generate": read_text, "json": read_json}[prompt.read]
    found = read(prompt, prompt.answer_start + answer, True).score
    return found is not None and math.isclose(found, score, abs_tol=ROUNDED)


def spelled(pattern: str, number: str) -> str:
    """What a plain pattern matches, with a number in its place: an alternative, a colon for \\W and [sets], else
    spaces."""
    text = f"({pattern.replace('{number}', HERE)})"
    while (inside := GROUP.sub(alternative, text)) != text:
        text = inside
    text = re.sub(r"\\W|(?<!\\)\[[^\]]*\]", ":", text)
    text = re.sub(r"\\[a-zA-Z]|(?<!\\)[.^$]", " ", text)
    text = re.sub(r"\\(.)", r"\1", re.sub(r"(?<!\\)(?:[*+?]|\{[\d,]+\})", "", text))
    text = " ".join(text.split())
    return (text[:1].upper() + text[1:]).replace(HERE, number)


def alternative(group: re.Match[str]) -> str:
    """The one that holds the number, else the first."""
    parts = re.split(r"(?<!\\)\|", group[1])
    return next((part for part in parts if HERE in part), parts[0])
