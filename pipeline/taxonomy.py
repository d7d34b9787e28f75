"""A taxonomy: the labels a teacher chooses from, in one level or two, and the matching of what it wrote to them."""

import random
import re
import unicodedata
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from pipeline import yaml_text
from pipeline.config import Settings
from pipeline.errors import UserError

STEP = " > "
"""Stands between the levels of a label: domain > use case."""
TAKEN = {
    *("id", "text", "labels", "reason", "unknown", "answer", "was_truncated", "prompt_tokens", "answer_tokens"),
    *("stratum", "prompt", "prompt_digest", "teacher", "gold", "score", "int_score", "group", "round"),
}
"""Columns of the labels, the ratings and scored shards that no level may be called."""


class Label(Settings):
    """One label; `about` helps the teacher, `labels` are those of the next level."""

    name: str = Field(min_length=1)
    about: str = ""
    labels: tuple["Label", ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class Taxonomy(Settings):
    """Labels as a tree in which every branch reaches the last level."""

    labels: tuple[Label, ...] = Field(min_length=1)
    levels: tuple[str, ...] = ("label",)
    """Names of the levels: the columns of the result."""
    no_match: str = "None of these"
    """The label of a document that fits no other."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"labels": value} if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _check(self) -> "Taxonomy":
        if len(self.levels) not in (1, 2) or len(set(self.levels)) < len(self.levels):
            raise ValueError(f"levels {list(self.levels)} must be one or two different names")
        for level in self.levels:
            if not re.fullmatch(r"[^\W\d]\w*", level) or level in TAKEN:
                raise ValueError(f"level {level!r} cannot be a column; use letters, digits and _, such as domain")
        check_depth(self.labels, len(self.levels))
        seen: dict[str, str] = {}
        for path in self.paths:
            other = seen.setdefault(folded(path), path)
            if other != path or not folded(path):
                raise ValueError(f"labels {other!r} and {path!r} cannot be told apart; rename one")
        if len(seen) < len(self.paths):
            raise ValueError("a label stands twice")
        return self

    @property
    def paths(self) -> tuple[str, ...]:
        """Every label in full (Health > Nursing), the one for no match last, unless it has a place of its own."""
        own = tuple(path for path, _ in walk(self.labels, len(self.levels)))
        return own if folded(self.no_match) in map(folded, own) else (*own, self.no_match)

    @property
    def no_match_path(self) -> str:
        """The label of no match as it stands among the paths."""
        return next(path for path in self.paths if folded(path) == folded(self.no_match))

    def listed(self, order: int = 0) -> str:
        """The labels as the prompt shows them, a line each, those of a domain together below what it is about;
        `order` above 0 shuffles them."""
        generator = random.Random(order)  # noqa: S311
        blocks = [block(label, len(self.levels)) for label in self.labels]
        if order:
            generator.shuffle(blocks)
        lines = []
        for heading, below in blocks:
            if order:
                generator.shuffle(below)
            lines += [*heading, *below]
        own = {path for path, _ in walk(self.labels, len(self.levels))}
        return "\n".join(lines if self.no_match_path in own else [*lines, f"- {self.no_match}"])

    def match(self, written: str) -> str | None:
        """The label that was written, whatever its case, accents and punctuation; a last level alone will do where
        only one label ends so. None for anything else."""
        return self.spelled.get(folded(written))

    @cached_property
    def spelled(self) -> dict[str, str]:
        """Labels by their folded names, and by their last level alone where no other label ends so."""
        last = [folded(path.split(STEP)[-1]) for path in self.paths]
        alone = {end: path for end, path in zip(last, self.paths, strict=True) if end and last.count(end) == 1}
        return alone | {folded(path): path for path in self.paths}

    def columns(self, label: str | None) -> dict[str, str | None]:
        """A label by level; that of no match stands in every level."""
        if label is None:
            return dict.fromkeys(self.levels)
        parts = label.split(STEP)
        return dict(
            zip(self.levels, parts if len(parts) == len(self.levels) else parts * len(self.levels), strict=True)
        )


def block(label: Label, depth: int) -> tuple[list[str], list[str]]:
    """How the prompt shows a label of the first level: its heading, if there are levels below, and the lines there."""
    heading = [f"{label.name}: {label.about}"] if depth > 1 and label.about else []
    leaves = walk((label,), depth)
    return heading, [f"- {path}: {leaf.about}" if leaf.about else f"- {path}" for path, leaf in leaves]


def check_depth(labels: tuple[Label, ...], depth: int) -> None:
    """Refuse a branch that is deeper or shallower than the levels."""
    for label in labels:
        if bool(label.labels) != (depth > 1) or STEP.strip() in label.name:
            raise ValueError(f"label {label.name!r}: the taxonomy has {depth} more level(s) here, and no > in a name")
        check_depth(label.labels, depth - 1)


def walk(labels: tuple[Label, ...], depth: int, before: str = "") -> Iterator[tuple[str, Label]]:
    """Full names of the last level."""
    for label in labels:
        if depth == 1:
            yield before + label.name, label
        else:
            yield from walk(label.labels, depth - 1, before + label.name + STEP)


@lru_cache(maxsize=4096)
def folded(name: str) -> str:
    """A name without case, accents, hyphens, spaces and other punctuation: what two spellings of it share."""
    decomposed = unicodedata.normalize("NFKD", name).casefold()
    return "".join(c for c in unicodedata.normalize("NFKD", decomposed) if c.isalnum())


def load(path: Path) -> Taxonomy:
    """Read a taxonomy file."""
    try:
        return Taxonomy.model_validate(yaml_text.parse(path.read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"labels: {path} cannot be read ({error}); give a YAML file of labels") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{path}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
