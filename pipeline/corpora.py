"""Several corpora in a file, one a line, each with a folder of its own in the run folder."""

import re
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Recipe, digest
from pipeline.errors import UserError


class Listed(NamedTuple):
    """A line of the file; without a text column the recipe's counts."""

    path: str
    text_column: str | None

    @property
    def slug(self) -> str:
        """The folder's name: the end of the path for people, and a digest of the line, for paths may end alike."""
        plain = unicodedata.normalize("NFKD", self.path.rpartition("/")[2]).encode("ascii", "ignore").decode()
        words = re.sub(r"[^A-Za-z0-9]+", "-", plain.partition(".")[0]).strip("-").lower()
        return f"{words[:40] or 'corpus'}-{digest([self.path, self.text_column])[:8]}"


def read(path: Path) -> list[Listed]:
    """The corpora of a file: a path or Hub name a line and, after a tab, the text column; # begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"label.datasets: {path} cannot be read ({error}); give a file with a corpus a line") from None
    found: dict[Listed, int] = {}
    for number, line in enumerate(lines, 1):
        entry = parse(line, f"{path}, line {number}")
        if entry is not None and entry in found:
            raise UserError(f"{path}, line {number} names the same corpus as line {found[entry]}; remove one")
        if entry is not None:
            found[entry] = number
    if not found:
        raise UserError(f"label.datasets: {path} names no corpus; write a path or Hub name on each line")
    return list(found)


def parse(line: str, where: str) -> Listed | None:
    """What a line says; nothing for an empty one or a comment."""
    cells = [cell.strip() for cell in re.sub(r"(^|\s)#.*", "", line).rstrip().split("\t")]
    if not any(cells):
        return None
    if len(cells) > 2 or not cells[0]:
        raise UserError(f"{where}: {line.strip()!r} is not a path and, after a tab, a text column")
    return Listed(cells[0] if cells[0] == "/" else cells[0].rstrip("/"), (cells[1:] or [""])[0] or None)


def of(recipe: Recipe, entry: Listed) -> Recipe:
    """The recipe for one of the corpora alone, without subset and revision, which are those of one Hub dataset; batch
    files have a folder of their own too."""
    own: dict[str, Any] = {"path": entry.path, "subset": None, "revision": None}
    column = {"text_column": entry.text_column} if entry.text_column else {}
    corpus = recipe.corpus.model_copy(update=own | column)
    label = recipe.label.model_copy(update={"datasets": None})
    apart: dict[str, Any] = {"run_folder": recipe.run_folder / entry.slug, "corpus": corpus, "label": label}
    if recipe.teacher.batch_folder:
        folder = recipe.teacher.batch_folder / entry.slug
        apart["teacher"] = recipe.teacher.model_copy(update={"batch_folder": folder})
    return recipe.model_copy(update=apart)


def titles(entries: list[Listed]) -> list[str]:
    """A short name for each: as much of the end of its path as tells it from the others, or path and text column."""
    names = []
    for entry in entries:
        parts = entry.path.split("/")
        ends = ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        alone = (end for end in ends if sum(("/" + each.path).endswith("/" + end) for each in entries) == 1)
        names.append(next(alone, f"{entry.path}, {entry.text_column or 'text'}"))
    return names
