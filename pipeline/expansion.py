"""Questions that have a teacher write rows, and the rows in its answers."""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipeline import conversations, generation
from pipeline.config import Recipe
from pipeline.conversations import Exchange, for_judging
from pipeline.errors import UserError
from pipeline.prompts import CUT_MARK, Prompt
from pipeline.splits import grams, jaccard
from pipeline.teacher import Answer

Kind = Literal["actor", "prompts", "reward"]
KEYS = {"actor": "actor", "prompts": "rlhf", "reward": "reward"}
"""Key of the template of each kind of rows."""
PLACES = {"examples", "topic", "quality", "user_input"}
"""What a template may have filled in."""
QUALITIES = ("wrong or careless", "vague and too short", "acceptable", "good", "excellent")
EXAMPLE_CHARACTERS = 600
"""Characters of an example's prompt and of its reply; more are cut, and marked as cut."""
ALIKE = 0.8
"""Share of common word 5-grams (Jaccard) from which two rows say the same."""


class Question(NamedTuple):
    """What is asked for one row."""

    text: str
    seed: int
    """Of the draw: what is asked in the same words is asked with another."""
    user_input: str | None = None
    """The prompt that a reply is written to, where the template names it."""


# -- questions --------------------------------------------------------------------------------------------------------


def templates(path: Path, key: str) -> tuple[str, list[str]]:
    """The template of a key, and the topics, if the file lists any."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"align.templates: {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"align.templates: {path} is not JSON ({error})") from None
    template = found.get(key) if isinstance(found, dict) else None
    if not isinstance(template, str):
        raise UserError(
            f"align.templates: {path} holds no text called {key!r}; it is an object with {key}: a template"
        )
    unknown = sorted(set(generation.PLACE.findall(template)) - PLACES)
    if unknown:
        raise UserError(f"align.templates: {key} names {{{{ {unknown[0]} }}}}; there are: {', '.join(sorted(PLACES))}")
    topics = found.get("topics", [])
    if not isinstance(topics, list) or not all(isinstance(topic, str) for topic in topics):
        raise UserError(f"align.templates: topics in {path} must be a list of texts")
    return template, topics


def questions(
    recipe: Recipe, kind: Kind, template: str, topics: Sequence[str], data: Sequence[Exchange]
) -> Iterator[Question]:
    """Questions without end, always the same ones: another draw of examples each time, topic and quality in turn."""
    shown = [row for row in data if not for_judging(recipe, row.user_input)]
    wanted = generation.columns(template) if generation.PLACE.search(template) else []
    asked_of = prompts_for(recipe) if "user_input" in wanted else []
    times: Counter[str] = Counter()
    number = 0
    while True:
        draw = random.Random(f"{recipe.seed} {number}")  # noqa: S311
        examples = draw.sample(shown, min(recipe.align.examples, len(shown)))
        user_input = draw.choice(asked_of) if asked_of else None
        values = {
            "examples": "\n\n".join(shown_as(row, kind) for row in examples),
            "topic": topics[number % len(topics)] if topics else "anything",
            "quality": QUALITIES[number % len(QUALITIES)],
            "user_input": user_input,
        }
        text = re.sub(r"\n{3,}", "\n\n", generation.fill(template, values)).strip()
        yield Question(text, times[text], user_input)
        times[text] += 1
        number += 1


def prompts_for(recipe: Recipe) -> list[str]:
    """Prompts that replies are written to."""
    found = [row.user_input for row in conversations.of(recipe, "prompts", made_by=("prepare",))]
    found = [prompt for prompt in dict.fromkeys(found) if not for_judging(recipe, prompt)]
    if not found:
        raise conversations.absent("prompts")
    return found


def shown_as(row: Exchange, kind: Kind) -> str:
    """A row as an example."""
    asked, said = (generation.shown(part).strip() for part in (row.user_input, row.completion))
    asked, said = (part[:EXAMPLE_CHARACTERS] + CUT_MARK * (len(part) > EXAMPLE_CHARACTERS) for part in (asked, said))
    return f"User: {asked}" if kind == "prompts" else f"User: {asked}\n\nAssistant: {said}"


def prompt_of(kind: Kind, template: str) -> Prompt:
    """How it is asked: the beginning of the answer is written already."""
    names_prompt = "user_input" in generation.PLACE.findall(template)
    return generation.question_prompt(None, "Assistant:" if names_prompt and kind != "prompts" else "User:", True)


# -- answers ----------------------------------------------------------------------------------------------------------

REPLY = re.compile(r"^(?:.*?\bUser:\**)?(?P<asked>.*?)\n\s*\**Assistant:\**(?P<said>.*)$", re.DOTALL)


def read(answer: Answer, question: Question, kind: Kind) -> Exchange | str:
    """The row in an answer, or why there is none."""
    text = conversations.repaired(answer.text).strip()
    if answer.finish == "refused":
        return "refused"
    if answer.finish == "length":
        return "truncated"
    if kind == "prompts":
        asked = text.removeprefix("User:").strip()
        return Exchange(asked) if asked else "empty"
    if question.user_input is not None:
        said = text.removeprefix("Assistant:").strip()
        return Exchange(question.user_input, said) if said else "empty"
    found = REPLY.match(text)
    if found is None:
        return "no_reply"
    asked, said = found["asked"].strip(), found["said"].partition("\nAssistant:")[0].strip()
    return Exchange(asked, said) if asked and said else "empty"


def of_kind(row: Exchange, kind: Kind) -> dict[str, Any]:
    """A row as its file has it; one for the reward is yet to be rated."""
    asked: dict[str, Any] = {"user_input": row.user_input}
    said = {} if kind == "prompts" else {"completion": row.completion}
    return {**asked, **said, **({"score": None} if kind == "reward" else {})}


class Apart:
    """Takes rows that differ from all before them: in their prompt, or, for the reward, in prompt and reply."""

    def __init__(self, kind: Kind, data: Sequence[Exchange]) -> None:
        from datasketch import MinHash, MinHashLSH

        self.kind, self.blank = kind, MinHash(num_perm=64, hashfunc=int)
        self.index, self.kept = MinHashLSH(threshold=ALIKE, num_perm=64, weights=(0.1, 0.9)), []  # type: ignore[var-annotated]
        for row in data:
            self.takes(row)

    def takes(self, row: Exchange) -> bool:
        """Whether nothing alike was taken before; then it is taken."""
        whole = self.kind == "reward" and row.completion is not None
        found = grams(conversations.text(row.user_input, row.completion or "") if whole else row.user_input)
        sketch = self.blank.copy()
        sketch.update_batch(found.tolist())
        if any(jaccard(found, self.kept[i]) >= ALIKE for i in self.index.query(sketch)):
            return False
        self.index.insert(len(self.kept), sketch, check_duplication=False)
        self.kept.append(found)
        return True
