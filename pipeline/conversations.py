"""Prompts and replies as they lie in files: JSON arrays or JSON lines of {user_input, completion, score}."""

from pathlib import Path
from typing import NamedTuple

from pipeline.corpus import text_id


class Exchange(NamedTuple):
    """A prompt with a reply, either of which may be missing; no score is not a score of 0."""

    user_input: str
    completion: str | None = None
    score: float | None = None


def text(user_input: str, completion: str) -> str:
    """An exchange as the document that a teacher rates and a student scores."""
    return f"User: {user_input.strip()}\n\nAssistant: {completion.strip()}"


def is_held_out(user_input: str, share: float, seed: int) -> bool:
    """Whether a prompt is set aside for judging: decided by its content, so that every step agrees."""
    return int(text_id(f"{seed}:{user_input.strip()}")[:8], 16) / 16**8 < share


def read(path: Path, setting: str) -> list[Exchange]:
    """The rows of a file, in order; raises UserError that names the file, the row and what is wrong with it."""
    raise NotImplementedError
