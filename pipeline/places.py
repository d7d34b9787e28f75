"""Where a run's corpora lie: in its run folder, in its mirror, or in the folder or URL that the recipe names."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from upath import UPath

from pipeline.config import Recipe, load_recipe
from pipeline.errors import UserError
from pipeline.shards import filesystem, first_line, from_outside, out_of_reach

Place: TypeAlias = Path | UPath
"""A file or folder here, or one behind a URL."""
CORPORA = {"score": "scored", "filter": "kept"}
"""The corpus that a stage writes, which its `output` moves."""
BESIDE = {"scored": "embeddings", "kept": "dropped"}
"""What may lie beside it."""


def of(path: Path | str, setting: str) -> Place:
    """The place of a path or of a URL, which a Path has robbed of a slash; nothing is looked up yet."""
    url = re.fullmatch(r"(\w+):/+(.*?)/*", str(path))
    if url is None:
        return Path(path)
    whole = f"{url[1]}://{url[2]}"
    fs, root = filesystem(whole, setting)
    if "file" in fs.protocol:
        return Path(root)
    if "/" not in root.strip("/"):
        raise UserError(f"{setting}: {whole} is a whole bucket; give a folder in it, such as {whole}/edu")
    return UPath(whole)


@contextmanager
def reaching(place: Place | str) -> Iterator[None]:
    """Turn what a store that does not answer raises into one line."""
    try:
        yield
    except Exception as error:
        if not from_outside(error):
            raise
        raise out_of_reach(place, first_line(error)) from None


def is_there(place: Place) -> bool:
    """Whether a file or folder exists."""
    with reaching(place):
        return bool(place.exists())


def names(place: Place) -> set[str]:
    """The files below a place, by their path from there."""
    if isinstance(place, Path):
        return {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    with reaching(place):
        root = place.path.rstrip("/")
        files = [file for file in place.fs.find(root) if file != root and not is_marker(file)]
        return {file[len(root) + 1 :] for file in files}


def is_marker(file: str) -> bool:
    """Whether a file is the empty one by which a store's console remembers a folder."""
    return file.endswith("/")


def version(info: dict[str, Any]) -> str:
    """What a store says of a file that changes with its content, or at least with each writing."""
    tags = ("ETag", "md5Hash", "etag", "oid", "blob_id", "created", "mtime", "LastModified")
    return f"{info['size']} {next((info[tag] for tag in tags if info.get(tag)), '')}"


def lies_in(inside: Place | str, place: Place | str) -> bool:
    """Whether a place is another one or below it."""
    return f"{absolute(inside)}/".startswith(f"{absolute(place)}/")


def absolute(place: Place | str) -> str:
    """A place by a name that no other has."""
    return str(place).rstrip("/") if "://" in str(place) else str(Path(str(place)).resolve())


def check_apart(setting: str, place: Place | str, other: str, inside: Place | str) -> None:
    """Refuse a place within another, where the files of the one would be taken for those of the other."""
    if lies_in(inside, place):
        raise UserError(f"{other}: {inside} lies in {setting} {place}; keep them apart")


# -- of a run ---------------------------------------------------------------------------------------------------------


def corpus(recipe: Recipe, stage: str) -> Place:
    """Where a stage writes its corpus with these settings."""
    output, name = getattr(recipe, stage).output, CORPORA[stage]
    if output:
        return of(output, f"{stage}.output")
    if recipe.mirror:
        return of(recipe.mirror, "mirror") / stage / name
    return recipe.run_folder / stage / name


def made(recipe: Recipe, stage: str) -> Place:
    """Where the corpus of a stage is: by the settings that the stage was made with, if it was."""
    path = recipe.run_folder / stage / "recipe.yaml"
    if not path.exists():
        return corpus(recipe, stage)
    return corpus(load_recipe(path, {}).model_copy(update={"run_folder": recipe.run_folder}), stage)


def side(place: Place, name: str) -> Place:
    """Where the embeddings of a scored corpus or the dropped rows of a kept one lie."""
    return place.parent / (name if place.name in BESIDE else f"{place.name}-{name}")


def elsewhere(recipe: Recipe, stage: str) -> dict[str, str]:
    """The places of a stage's corpora, by the names that they would have in its folder; none if they are there."""
    name = CORPORA.get(stage, "")
    if not name or corpus(recipe, stage) == recipe.run_folder / stage / name:
        return {}
    place, wanted = (
        corpus(recipe, stage),
        {"score": recipe.score.keep_embeddings, "filter": recipe.filter.keep_dropped},
    )
    return {name: str(place)} | ({BESIDE[name]: str(side(place, BESIDE[name]))} if wanted[stage] else {})
