"""Stage 3: the student scores every document."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import corpus, metrics, storage
from pipeline import student as students
from pipeline.config import Recipe, digest
from pipeline.encoder import Embedded
from pipeline.errors import UserError
from pipeline.formats import check_column
from pipeline.shards import Counts, Shard, find_shards, fingerprint
from pipeline.student import Columns, Student
from pipeline.tracking import Result, Step, progress, stage, upstream

log = logging.getLogger("gristmill")

DTYPES = {pa.float32(): "float32", pa.int8(): "int8", pa.string(): "string"}
"""Names of types in the notes that Hugging Face `datasets` keeps in a file."""
FINGERPRINT = b"gristmill.made_from"
TALLY = b"gristmill.tally"


class ScoreResult(Result):
    """What stage 3 did. Every row of the corpus is scored, empty (null score), or a bad row that was left out."""

    n_rows: int
    n_scored: int
    n_empty: int
    n_bad_rows: int
    n_repaired_texts: int
    n_truncated: int
    """Documents of which not all tokens were read: those longer than encoder.max_tokens with windows: first, than
    three windows with spread, none with all."""
    n_windows: int
    """Windows of documents that the encoder read."""
    n_shards: int
    n_shards_reused: int
    int_score_counts: dict[str, int]
    half_up_counts: dict[str, int]
    """Documents by score rounded half up, beside int_score_counts at the student's own cuts."""
    label_counts: dict[str, dict[str, int]]
    """Documents by label, for each target that is labels; commonest first."""
    docs_per_s: float | None


def run(recipe: Recipe, redo: bool = False) -> ScoreResult:
    """Score shard by shard; a shard that is there with the right fingerprint is not done again."""
    student = students.load(upstream(recipe.score.student, recipe, "train/student", "score"), recipe.encoder)
    found = find_shards(recipe.corpus)
    made_from = inputs(recipe, student, found)
    with stage("score", recipe, made_from) as work:
        prints = {shard: digest([made_from["settings"], made_from["shards"][shard.name]]) for shard in found}
        tallies = {shard: tally_of(work.folder, shard, prints[shard], recipe) for shard in found}
        done = work.finished(ScoreResult, redo, None not in tallies.values())
        if done:
            return done
        check_columns(found, recipe, student.schema.names)
        sweep(work.folder, found, recipe)
        todo = [shard for shard in found if tallies[shard] is None]
        with progress("score", corpus.n_rows(todo)) as step:
            for shard in todo:
                tallies[shard] = score_shard(shard, recipe, student, work.folder, prints[shard], step)
        counted = [tally for tally in tallies.values() if tally is not None]
        return work.finish(summarise(counted, len(found) - len(todo), made_from, work.seconds))


def inputs(recipe: Recipe, student: Student, found: list[Shard]) -> dict[str, Any]:
    """Everything that decides the scores."""
    return {
        "settings": {
            "student": student.fingerprint,
            "weights": student.weights,
            "corpus": recipe.corpus.identity(),
            "score": recipe.score.identity(),
        },
        "shards": {shard.name: fingerprint(shard) for shard in found},
    }


def sweep(folder: Path, found: list[Shard], recipe: Recipe) -> None:
    """Remove what killed writers left, and what was made of other shards or is no longer asked for."""
    names = {shard.name for shard in found}
    storage.sweep(folder / "scored", keep=names)
    storage.sweep(folder / "embeddings", keep=names if recipe.score.keep_embeddings else set())


def score_shard(
    shard: Shard, recipe: Recipe, student: Student, folder: Path, fingerprint: str, step: Step
) -> Counter[str]:
    """Read, score and write one shard, some rows at a time; returns its counts."""
    source = corpus.read_schema(shard, recipe.corpus)
    refuse_existing(source, shard, recipe, student.schema.names)
    schema = scored_schema(source, student.schema)
    tally: Counter[str] = Counter()
    made_from = {FINGERPRINT: fingerprint.encode()}
    # The embeddings are there before the scores, so that scores never stand without them.
    with (
        storage.shard_writer(folder / "scored" / shard.name, schema) as scored,
        embeddings_writer(folder / "embeddings" / shard.name, recipe, student) as kept,
    ):
        for batch, texts in documents(shard, recipe, without(schema, student.schema.names), tally):
            places, embedded = embed(texts, student, step)
            found = student.predict_embedded(embedded)
            tally.update(n_scored=len(texts) - places.null_count, n_empty=places.null_count)
            tally.update(n_truncated=embedded.n_truncated, n_windows=len(embedded.owners))
            tally.update(occurrences(student, found))
            scored.write_batch(with_columns(batch, found, places, student, schema))
            if kept is not None:
                kept.write_batch(half_precision(embedded, places, kept.schema))
        scored.add_key_value_metadata({**made_from, TALLY: json.dumps(tally).encode()})
        if kept is not None:
            kept.add_key_value_metadata(made_from)
    return tally


def documents(
    shard: Shard, recipe: Recipe, schema: pa.Schema, tally: Counter[str]
) -> Iterator[tuple[pa.RecordBatch, list[str | None]]]:
    """The rows of a shard and their texts; its counts go to the tally at its end."""
    counts = Counts()
    for batch in corpus.read(shard, recipe.corpus, counts, schema=schema):
        yield batch, corpus.texts(batch, recipe.corpus, shard, counts)
    tally.update(n_rows=counts.n_rows, n_bad_rows=counts.n_bad_rows, n_repaired_texts=counts.n_repaired_texts)


def embed(texts: list[str | None], student: Student, step: Step) -> tuple[pa.Array, Embedded]:
    """Of each row its place among the embedded texts, null for an empty one; and these texts embedded."""
    full = [i for i, text in enumerate(texts) if not corpus.is_empty(text)]
    embedded = student.encoder.embed([texts[i] or "" for i in full], step)
    step(len(texts) - len(full))
    place = dict(zip(full, range(len(full)), strict=True))
    return pa.array([place.get(i) for i in range(len(texts))], pa.int64()), embedded


def with_columns(
    batch: pa.RecordBatch, found: Columns, places: pa.Array, student: Student, schema: pa.Schema
) -> pa.RecordBatch:
    """The batch with the student's columns; empty texts get null."""
    added = [pa.array(found[field.name], field.type).take(places) for field in student.schema]
    kept = [batch.column(name) for name in batch.schema.names if name not in found]
    return pa.RecordBatch.from_arrays([*kept, *added], schema=schema)


def embeddings_writer(path: Path, recipe: Recipe, student: Student) -> Any:
    """A writer of the documents' embeddings (dim,) float16; of nothing where they are not kept."""
    if not recipe.score.keep_embeddings:
        return nullcontext()
    return storage.shard_writer(path, pa.schema([("embedding", pa.list_(pa.float16(), student.encoder.dim))]))


def half_precision(embedded: Embedded, places: pa.Array, schema: pa.Schema) -> pa.RecordBatch:
    """The mean embedding of each row's document; empty texts get null."""
    kind = schema.field("embedding").type
    limit = np.finfo(np.float16).max
    values = np.clip(embedded.documents(), -limit, limit).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), kind.list_size).take(places)
    return pa.RecordBatch.from_arrays([column.cast(kind)], schema=schema)


def occurrences(student: Student, found: Columns) -> Iterator[str]:
    """A key of the tally for every whole score and label that was given, and for every score rounded half up: a JSON
    list of kind, column and value."""
    for head in student.heads:
        if head.kind == "score":
            assert head.scale is not None
            half_up = metrics.int_scores(found[head.name], head.scale)
            yield from keys("half_up", head.name, half_up.tolist())
        values = found[f"int_{head.name}" if head.kind == "score" else head.name]
        given = chain.from_iterable(values) if head.kind == "labels" else np.asarray(values).tolist()
        yield from keys(head.kind, head.name, given)


def keys(kind: str, name: str, values: Iterable[Any]) -> Iterator[str]:
    """Keys of the tally."""
    return (json.dumps([kind, name, value], ensure_ascii=False) for value in values)


def summarise(tallies: list[Counter[str]], n_reused: int, made_from: dict[str, Any], seconds: float) -> ScoreResult:
    """Counts over all shards; every row must be somewhere."""
    total = sum(tallies, Counter())
    rows_out = total["n_scored"] + total["n_empty"] + total["n_bad_rows"]
    assert total["n_rows"] == rows_out, f"{total['n_rows']} rows in, {rows_out} accounted for"
    if total["n_rows"] == 0:
        raise UserError(f"corpus.path: {made_from['settings']['corpus']['path']} has no rows")
    given = [(*json.loads(key), count) for key, count in total.most_common() if key.startswith("[")]
    return ScoreResult(
        seconds=seconds,
        **{
            name: total[name]
            for name in ("n_rows", "n_scored", "n_empty", "n_bad_rows", "n_repaired_texts", "n_truncated", "n_windows")
        },
        n_shards=len(tallies),
        n_shards_reused=n_reused,
        int_score_counts=score_counts(given, "score"),
        half_up_counts=score_counts(given, "half_up"),
        label_counts=label_counts(given),
        docs_per_s=total["n_rows"] / seconds if not n_reused else None,
    )


def score_counts(given: list[tuple[str, str, Any, int]], kind: str) -> dict[str, int]:
    """Documents by whole score, from (kind, target, value, count), of the target called score."""
    counts = sorted((value, count) for of, name, value, count in given if (of, name) == (kind, "score"))
    return {str(value): count for value, count in counts}


def label_counts(given: list[tuple[str, str, Any, int]]) -> dict[str, dict[str, int]]:
    """Documents by label, from (kind, target, value, count), of the targets that are labels."""
    counts: dict[str, dict[str, int]] = {}
    for kind, name, value, count in given:
        if kind in ("label", "labels"):
            counts.setdefault(name, {})[value] = count
    return counts


def tally_of(folder: Path, shard: Shard, fingerprint: str, recipe: Recipe) -> Counter[str] | None:
    """The counts of a shard already scored from the same inputs; None if it has to be (re)done."""
    scored = notes_of(folder / "scored" / shard.name)
    kept = notes_of(folder / "embeddings" / shard.name) if recipe.score.keep_embeddings else scored
    if any(notes.get(FINGERPRINT) != fingerprint.encode() for notes in (scored, kept)):
        return None
    return Counter(json.loads(scored[TALLY]))


def notes_of(path: Path) -> dict[bytes, bytes]:
    """What a shard of ours says of itself; nothing if it cannot be read."""
    try:
        return pq.read_metadata(path).metadata or {}
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError):
        return {}


# -- schema -----------------------------------------------------------------------------------------------------------


def check_columns(found: list[Shard], recipe: Recipe, names: Sequence[str] | None = None) -> None:
    """Refuse, before anything is scored, shards without text or with columns of these names (those of the targets,
    before there is a student), as far as their heads tell; of JSON lines the first shard's beginning is looked at."""
    names = expected(recipe) if names is None else names
    for shard in found:
        if shard.format == "jsonl":
            first = next(corpus.read(shard, recipe.corpus, Counts()), None)
            refuse_existing(first.schema if first is not None else pa.schema([]), shard, recipe, names)
            return
        schema = corpus.read_schema(shard, recipe.corpus)
        check_column(schema, recipe.corpus.text_column, shard)
        refuse_existing(schema, shard, recipe, names)


def expected(recipe: Recipe) -> list[str]:
    """Columns that a student of the recipe's targets surely gives."""
    targets = recipe.train.targets
    return [*targets, *students.schema_of("score", "score").names[1:]] if "score" in targets else list(targets)


def refuse_existing(schema: pa.Schema, shard: Shard, recipe: Recipe, names: Sequence[str]) -> None:
    """What is already there under one of our names is never silently doubled or lost."""
    taken = [name for name in names if name in schema.names]
    if taken and not recipe.score.replace_existing:
        raise UserError(f"{shard.source} already has a column {taken[0]!r}; set score.replace_existing, or rename it")


def scored_schema(schema: pa.Schema, added: pa.Schema) -> pa.Schema:
    """The schema with the student's columns at its end; Hugging Face's own notes on the columns stay true."""
    metadata = dict(schema.metadata or {})
    if b"huggingface" in metadata:
        notes = json.loads(metadata[b"huggingface"])
        features = notes.get("info", {}).get("features")
        if features is not None:
            features |= {field.name: feature(field.type) for field in added}
        metadata[b"huggingface"] = json.dumps(notes).encode()
    return pa.schema([*without(schema, added.names), *added], metadata)


def feature(kind: pa.DataType) -> dict[str, Any]:
    """A column type as Hugging Face `datasets` notes it."""
    if pa.types.is_list(kind):
        return {"feature": feature(kind.value_type), "_type": "List"}
    return {"dtype": DTYPES[kind], "_type": "Value"}


def without(schema: pa.Schema, names: Sequence[str]) -> pa.Schema:
    """The schema without some columns."""
    return pa.schema([field for field in schema if field.name not in names], schema.metadata)
