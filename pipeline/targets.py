"""What a student learns: columns of the ratings and of the labels, joined by document."""

import difflib
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import config
from pipeline.config import Recipe
from pipeline.corpus import is_empty, is_text
from pipeline.errors import UserError
from pipeline.metrics import Floats
from pipeline.pairs import as_dict
from pipeline.storage import read_table
from pipeline.tracking import upstream

RATINGS, LABELS = "rate/ratings.parquet", "label/labels.parquet"

BESIDES = ("gold", "group", "round", "probabilities", "opinions", "prompt", "prompt_digest")
"""Columns that are read beside the targets."""

Kind = Literal["score", "label", "labels"]
Row = dict[str, Any]
Sources = dict[str, Path]
"""Targets by name, each with the file that holds it."""


class Target(NamedTuple):
    """One thing to learn. `values` are aligned with the documents: numbers, labels or lists of labels; None where
    missing."""

    name: str
    kind: Kind
    values: list[Any]
    scale: tuple[float, float] | None = None
    labels: tuple[str, ...] = ()
    """The labels that occur, sorted."""
    probabilities: tuple[dict[float, float] | None, ...] = ()
    """The teacher's probability of each value of a score; None for documents without, empty without any."""
    repeated: tuple[Floats, ...] = ()
    """(n_repeats, n_documents) of each teacher with each prompt that was asked more than once, NaN where missing."""


class TrainingSet(NamedTuple):
    """Documents with at least one target, aligned: ids, texts, gold or None, group or None, round and the targets."""

    ids: list[str]
    texts: list[str]
    gold: list[float | None]
    groups: list[str | None]
    rounds: list[int]
    """0 for documents of the uniform or stratified sample, k for those that the k-th rate --next chose."""
    targets: tuple[Target, ...]
    n_unscored: int
    """Documents left out because nothing is known of them."""
    prompts: tuple[str, ...]
    """Digests of the prompts that were answered."""
    teachers: tuple[str, ...]


def sources(recipe: Recipe) -> Sources:
    """Each target and its file; the default means the score or, where only labels were made, every level."""
    schemas = {path: schema_of(path) for path in files(recipe)}
    names = recipe.train.targets
    if recipe.train.ratings is None and list(schemas) == [recipe.run_folder / LABELS] and is_default(names):
        names = levels(schemas[recipe.run_folder / LABELS]) or names
    return {name: holder(name, schemas) for name in names}


def files(recipe: Recipe) -> list[Path]:
    """The one file that was named, or those of the run folder that are finished and may be meant."""
    if recipe.train.ratings is not None:
        return [upstream(recipe.train.ratings, recipe, RATINGS, "train")]
    done = [inside for inside in (RATINGS, LABELS) if (recipe.run_folder / inside).with_name("result.json").exists()]
    if is_default(recipe.train.targets) and (recipe.run_folder / RATINGS).with_name("inputs.json").exists():
        done = [RATINGS]
    return [upstream(None, recipe, inside, "train") for inside in done or [RATINGS]]


def is_default(names: tuple[str, ...]) -> bool:
    """Whether the targets are those of a recipe that names none."""
    return names == config.Train().targets


def schema_of(path: Path) -> pa.Schema:
    """The schema of a ratings or labels file."""
    try:
        schema = pq.read_schema(path)
        check_schema(schema)
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
        why = str(error).split("\n")[0]
        raise UserError(
            f"train.ratings: {path} is no ratings or labels file ({why}); give one made by gristmill rate or label"
        ) from None
    return schema


def check_schema(schema: pa.Schema) -> None:
    """Refuse columns and scales that cannot be read as what they are called."""
    for name in ("id", "text"):
        if not is_text(schema.field(name).type):
            raise TypeError(f"{name} is {schema.field(name).type}, not text")
    gold = schema.field("gold").type if "gold" in schema.names else pa.null()
    if is_text(gold) and not pa.types.is_null(gold):
        raise TypeError("gold is text, neither a number nor true/false")
    for name, (low, high) in scales(schema).items():
        if not low < high:
            raise ValueError(f"the scale of {name} goes from {low:g} to {high:g}")


def levels(schema: pa.Schema) -> tuple[str, ...]:
    """The levels of the taxonomy, as the metadata of a labels file names them."""
    return tuple(json.loads((schema.metadata or {}).get(b"levels", b"{}")))


def holder(name: str, schemas: dict[Path, pa.Schema]) -> Path:
    """The one file that holds a target."""
    there = [path for path, schema in schemas.items() if name in learnable(schema)]
    if len(there) > 1:
        raise UserError(f"train.targets: {there[0]} and {there[1]} both hold {name!r}; name one with train.ratings")
    if not there:
        raise UserError(f"train.targets: {no_target(name, schemas)}")
    return there[0]


def no_target(name: str, schemas: dict[Path, pa.Schema]) -> str:
    """What to say of a target that is in no file."""
    known = sorted({column for schema in schemas.values() for column in learnable(schema)})
    where = " or ".join(str(path) for path in schemas)
    for path, schema in schemas.items():
        if name in schema.names:
            scaled = "with" if name in scales(schema) else "without"
            return (
                f"{name!r} in {path} is {schema.field(name).type} {scaled} a scale; scores are numbers with a scale in"
                " the file's metadata (scale: 0 5), labels are texts without one"
            )
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"{name!r} is not in {where}; did you mean {near[0]}?"
    return f"{name!r} is not in {where}; there are: {', '.join(known) or 'none'}"


def learnable(schema: pa.Schema) -> list[str]:
    """Columns that can be learned: numbers with a scale, texts and lists of texts."""
    known = scales(schema)
    fields = [field for field in schema if field.name not in ("id", "text")]
    return [field.name for field in fields if kind_of(field, known) is not None]


def scales(schema: pa.Schema) -> dict[str, tuple[float, float]]:
    """The scale of the score and of each attribute, as the file's metadata says."""
    metadata = schema.metadata or {}
    found = json.loads(metadata.get(b"attributes", b"{}"))
    if b"scale" in metadata:
        found["score"] = metadata[b"scale"].split()
    if odd := next((name for name, ends in found.items() if len(ends) != 2), None):
        raise ValueError(f"the scale of {odd} is not two numbers such as 0 5")
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def kind_of(field: pa.Field, known: dict[str, tuple[float, float]]) -> Kind | None:
    """What a column holds; None if that cannot be learned."""
    if pa.types.is_floating(field.type) or pa.types.is_integer(field.type):
        return "score" if field.name in known else None
    if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
        return "labels" if is_text(field.type.value_type) else None
    return "label" if is_text(field.type) and not pa.types.is_null(field.type) and field.name not in known else None


# -- reading ----------------------------------------------------------------------------------------------------------


def read(found: Sources) -> TrainingSet:
    """The documents of all files, each once, in the order of the files."""
    tables = {path: read_table(path) for path in found.values()}
    files = {path: named(table, found, path) for path, table in tables.items()}
    for path, of_file in files.items():
        check_one_prompt(path, of_file)
    rows = join(files)
    kept = [row for row in rows if is_learned(row, found)]
    return TrainingSet(
        ids=[row["id"] for row in kept],
        texts=[row["text"] for row in kept],
        gold=[None if is_missing(row.get("gold")) else row["gold"] for row in kept],
        groups=[row.get("group") for row in kept],
        rounds=[row.get("round", 0) for row in kept],
        targets=tuple(target(name, path, tables[path].schema, kept) for name, path in found.items()),
        n_unscored=len(rows) - len(kept),
        prompts=origins(tables.values(), ("prompt_digest", "prompt")),
        teachers=origins(tables.values(), ("teacher",)),
    )


def named(table: pa.Table, found: Sources, path: Path) -> list[Row]:
    """The rows of a file: document, the targets that it holds, and what is known of it besides."""
    wanted = ["id", "text", *(name for name, source in found.items() if source == path)]
    wanted += [name for name in BESIDES if name in table.schema.names]
    rows: list[Row] = table.select(dict.fromkeys(wanted)).to_pylist()
    return rows


def check_one_prompt(path: Path, rows: list[Row]) -> None:
    """Refuse documents that were rated by different prompts: their scores don't mean the same."""
    asked = Counter(filter(None, map(prompts_of, rows)))
    if len(asked) > 1:
        groups = [f"{n} by {', '.join(sorted(prompts))}" for prompts, n in asked.most_common(3)]
        raise UserError(
            f"train.ratings: {path} mixes ratings of different prompts ({'; '.join(groups)}); keep those of one"
        )


def prompts_of(row: Row) -> frozenset[str]:
    """The prompts that were answered about a document: those of its opinions, or the one of its label."""
    return frozenset(map(prompt_of, row.get("opinions") or ([row] if row.get("prompt_digest") else ())))


def prompt_of(opinion: Row) -> str:
    """A prompt by its name and the begin of its digest."""
    return f"{opinion.get('prompt')} {str(opinion.get('prompt_digest'))[:8]}"


def join(files: dict[Path, list[Row]]) -> list[Row]:
    """One row a document (same id, same text), with what every file says of it."""
    joined: dict[tuple[str, str], Row] = {}
    for path, rows in files.items():
        if len({(row["id"], row["text"]) for row in rows}) < len(rows):
            raise UserError(f"train.ratings: {path} holds the same document twice; keep one row of each")
        for row in rows:
            known = {name: without_missing(value) for name, value in row.items() if value is not None}
            joined.setdefault((row["id"], row["text"]), {"id": row["id"], "text": row["text"]}).update(known)
    return list(joined.values())


def is_missing(value: Any) -> bool:
    """None, or the NaN that other programs write for it."""
    return value is None or value != value


def without_missing(value: Any) -> Any:
    """The value; of a list its members that are there."""
    return [member for member in value if not is_missing(member)] if isinstance(value, list) else value


def target(name: str, path: Path, schema: pa.Schema, rows: list[Row]) -> Target:
    """One column of the joined rows, with its scale or its labels."""
    known = scales(schema)
    values = [row.get(name) for row in rows]
    kind = kind_of(schema.field(name), known)
    assert kind is not None, f"{name} was found to be learnable"
    if kind != "score":
        return Target(name, kind, values, labels=labels_in(kind, values))
    check_scores(name, path, rows, known[name])
    said = tuple(probabilities(row) if name == "score" else None for row in rows)
    return Target(
        name,
        kind,
        values,
        known[name],
        probabilities=said if any(said) else (),
        repeated=repeated(name, rows),
    )


def check_scores(name: str, path: Path, rows: list[Row], scale: tuple[float, float]) -> None:
    """Refuse numbers that are no scores of the scale, and a scale whose whole numbers an int8 cannot hold."""
    if scale[0] < -128 or scale[1] > 127:
        raise UserError(
            f"train.ratings: {path}: the scale of {name} must stay in -128 to 127; divide it and the scores"
        )
    slack = 1e-6 * (scale[1] - scale[0])
    for row in rows:
        value = row.get(name)
        if value is None or scale[0] - slack <= value <= scale[1] + slack:
            continue
        where = f"train.ratings: {path}: {name} of document {row['id']!r}"
        if is_missing(value):
            raise UserError(f"{where} is NaN; leave it empty (null) where there is no score")
        raise UserError(f"{where} is {value:g}, outside the scale {scale[0]:g} to {scale[1]:g}; mend it or the scale")


def probabilities(row: Row) -> dict[float, float] | None:
    """The teacher's probability of each value, where the score is their mean."""
    said = {float(value): float(share) for value, share in as_dict(row.get("probabilities")).items()}
    score = row.get("score")
    if not said or score is None:
        return None
    mean = sum(value * share for value, share in said.items()) / sum(said.values())
    return said if abs(mean - score) <= 1e-3 * (max(said) - min(said)) else None


def repeated(name: str, rows: list[Row]) -> tuple[Floats, ...]:
    """What each teacher said with each prompt at each repeat, for those that were asked more than once."""
    by_rater: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
    for i, row in enumerate(rows):
        for opinion in row.get("opinions") or ():
            score = opinion.get("score") if name == "score" else as_dict(opinion.get("attributes")).get(name)
            rater = (str(opinion.get("prompt_digest")), str(opinion.get("teacher")))
            if score is not None:
                by_rater.setdefault(rater, {}).setdefault(opinion.get("repeat") or 0, {})[i] = score
    found = []
    for repeats in by_rater.values():
        if len(repeats) > 1:
            found.append(np.full((len(repeats), len(rows)), np.nan))
            for scores, said in zip(found[-1], repeats.values(), strict=True):
                scores[list(said)] = list(said.values())
    return tuple(found)


def labels_in(kind: Kind, values: list[Any]) -> tuple[str, ...]:
    """The labels that occur, sorted; none among scores."""
    given = [value for value in values if value is not None]
    if kind == "labels":
        return tuple(sorted({label for labels in given for label in labels}))
    return tuple(sorted(set(given))) if kind == "label" else ()


def is_learned(row: Row, names: Iterable[str]) -> bool:
    """Whether there is a text and anything is known of it."""
    return not is_empty(row["text"]) and any(row.get(name) is not None for name in names)


def origins(tables: Iterable[pa.Table], names: tuple[str, ...]) -> tuple[str, ...]:
    """The distinct values of a column, or of a field of the opinions, over all files."""
    found: set[str] = set()
    for table in tables:
        opinions = pc.list_flatten(table["opinions"]) if "opinions" in table.schema.names else None
        name = next((name for name in names if name in table.schema.names), None)
        if opinions is not None:
            found |= set(pc.unique(pc.struct_field(opinions, names[0])).to_pylist())
        elif name is not None:
            found |= set(pc.unique(table[name]).to_pylist())
    return tuple(sorted(value for value in found if value))
