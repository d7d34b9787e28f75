"""What a student learns: columns of the ratings and of the labels, joined by document."""

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import config
from pipeline.config import Recipe
from pipeline.corpus import is_empty, is_text
from pipeline.errors import UserError
from pipeline.tracking import upstream

RATINGS, LABELS = "rate/ratings.parquet", "label/labels.parquet"

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


class TrainingSet(NamedTuple):
    """Documents with at least one target, aligned: ids, texts, gold or None, and the targets."""

    ids: list[str]
    texts: list[str]
    gold: list[float | None]
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
        schema.field("id"), schema.field("text")
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        why = str(error).split("\n")[0]
        raise UserError(
            f"train.ratings: {path} is no ratings or labels file ({why}); give one made by gristmill rate or label"
        ) from None
    return schema


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
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def kind_of(field: pa.Field, known: dict[str, tuple[float, float]]) -> Kind | None:
    """What a column holds; None if that cannot be learned."""
    if pa.types.is_floating(field.type) or pa.types.is_integer(field.type):
        return "score" if field.name in known else None
    if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
        return "labels" if is_text(field.type.value_type) else None
    return "label" if is_text(field.type) and not pa.types.is_null(field.type) else None


# -- reading ----------------------------------------------------------------------------------------------------------


def read(found: Sources) -> TrainingSet:
    """The documents of all files, each once, in the order of the files."""
    tables = {path: pq.read_table(path) for path in found.values()}
    rows = join({path: named(table, found, path) for path, table in tables.items()})
    targets = [target(name, tables[path].schema, rows) for name, path in found.items()]
    kept = [i for i, row in enumerate(rows) if is_learned(i, row, targets)]
    return TrainingSet(
        ids=[rows[i]["id"] for i in kept],
        texts=[rows[i]["text"] for i in kept],
        gold=[rows[i].get("gold") for i in kept],
        targets=tuple(each._replace(values=[each.values[i] for i in kept]) for each in targets),
        n_unscored=len(rows) - len(kept),
        prompts=origins(tables.values(), ("prompt_digest", "prompt")),
        teachers=origins(tables.values(), ("teacher",)),
    )


def named(table: pa.Table, found: Sources, path: Path) -> list[Row]:
    """The rows of a file: document, known quality and the targets that it holds."""
    wanted = ["id", "text", *(name for name, source in found.items() if source == path)]
    if "gold" in table.schema.names:
        wanted.append("gold")
    rows: list[Row] = table.select(dict.fromkeys(wanted)).to_pylist()
    return rows


def join(files: dict[Path, list[Row]]) -> list[Row]:
    """One row a document (same id, same text), with what every file says of it."""
    joined: dict[tuple[str, str], Row] = {}
    for path, rows in files.items():
        if len({(row["id"], row["text"]) for row in rows}) < len(rows):
            raise UserError(f"train.ratings: {path} holds the same document twice; keep one row of each")
        for row in rows:
            known = {name: without_missing(value) for name, value in row.items() if not is_missing(value)}
            joined.setdefault((row["id"], row["text"]), {"id": row["id"], "text": row["text"]}).update(known)
    return list(joined.values())


def is_missing(value: Any) -> bool:
    """None, or the NaN that other programs write for it."""
    return value is None or value != value


def without_missing(value: Any) -> Any:
    """The value; of a list its members that are there."""
    return [member for member in value if not is_missing(member)] if isinstance(value, list) else value


def target(name: str, schema: pa.Schema, rows: list[Row]) -> Target:
    """One column of the joined rows, with its scale or its labels."""
    known = scales(schema)
    values = [row.get(name) for row in rows]
    kind = kind_of(schema.field(name), known)
    assert kind is not None, f"{name} was found to be learnable"
    scale = known.get(name) if kind == "score" else None
    return Target(name, kind, values, scale, labels_in(kind, values))


def labels_in(kind: Kind, values: list[Any]) -> tuple[str, ...]:
    """The labels that occur, sorted; none among scores."""
    given = [value for value in values if value is not None]
    if kind == "labels":
        return tuple(sorted({label for labels in given for label in labels}))
    return tuple(sorted(set(given))) if kind == "label" else ()


def is_learned(i: int, row: Row, targets: list[Target]) -> bool:
    """Whether there is a text and anything is known of it."""
    return not is_empty(row["text"]) and any(target.values[i] is not None for target in targets)


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
