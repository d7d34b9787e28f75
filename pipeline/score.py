"""Stage 3: the student scores every document."""

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import corpus, storage
from pipeline import student as students
from pipeline.config import Recipe, digest
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
    """Documents longer than the encoder reads; only their beginning was judged."""
    n_shards: int
    n_shards_reused: int
    int_score_counts: dict[str, int]
    label_counts: dict[str, dict[str, int]]
    """Documents by label, for each target that is labels; commonest first."""
    docs_per_s: float | None


def run(recipe: Recipe, redo: bool = False) -> ScoreResult:
    """Score shard by shard; a shard that is there with the right fingerprint is not done again."""
    student = students.load(upstream(recipe.score.student, recipe, "train/student", "score"), recipe.encoder)
    found = find_shards(recipe.corpus)
    made_from = inputs(recipe, student, found)
    with stage("score", recipe, made_from) as work:
        out = work.folder / "scored"
        prints = {shard: digest([made_from["settings"], made_from["shards"][shard.name]]) for shard in found}
        tallies = {shard: tally_of(out / shard.name, prints[shard]) for shard in found}
        done = work.finished(ScoreResult, redo, None not in tallies.values())
        if done:
            return done
        check_columns(found, recipe, student.schema.names)
        storage.sweep(out, keep={shard.name for shard in found})
        todo = [shard for shard in found if tallies[shard] is None]
        with progress("score", corpus.n_rows(todo)) as step:
            for shard in todo:
                tallies[shard] = score_shard(shard, recipe, student, out / shard.name, prints[shard], step)
        counted = [tally for tally in tallies.values() if tally is not None]
        return work.finish(summarise(counted, len(found) - len(todo), made_from, work.seconds))


def inputs(recipe: Recipe, student: Student, found: list[Shard]) -> dict[str, Any]:
    """Everything that decides the scores."""
    return {
        "settings": {
            "student": student.fingerprint,
            "corpus": recipe.corpus.identity(),
            "score": recipe.score.identity(),
        },
        "shards": {shard.name: fingerprint(shard) for shard in found},
    }


def score_shard(
    shard: Shard, recipe: Recipe, student: Student, path: Path, fingerprint: str, step: Step
) -> Counter[str]:
    """Read, score and write one shard, a window of rows at a time; returns its counts."""
    source = corpus.read_schema(shard, recipe.corpus)
    refuse_existing(source, shard, recipe, student.schema.names)
    schema = scored_schema(source, student.schema)
    tally: Counter[str] = Counter()

    def scored() -> Iterator[pa.RecordBatch]:
        counts = Counts()
        for batch in corpus.read(shard, recipe.corpus, counts, schema=without(schema, student.schema.names)):
            texts = corpus.texts(batch, recipe.corpus, shard, counts)
            yield score_batch(batch, texts, student, schema, tally, step)
        tally.update(n_rows=counts.n_rows, n_bad_rows=counts.n_bad_rows, n_repaired_texts=counts.n_repaired_texts)

    with storage.shard_writer(path, schema) as writer:
        for batch in scored():
            writer.write_batch(batch)
        writer.add_key_value_metadata({FINGERPRINT: fingerprint.encode(), TALLY: json.dumps(tally).encode()})
    return tally


def score_batch(
    batch: pa.RecordBatch,
    texts: list[str | None],
    student: Student,
    schema: pa.Schema,
    tally: Counter[str],
    step: Step,
) -> pa.RecordBatch:
    """The batch with the student's columns; empty texts get null."""
    full = [i for i, text in enumerate(texts) if not corpus.is_empty(text)]
    found, n_truncated = student.predict_counted([texts[i] or "" for i in full], step)
    tally.update(n_scored=len(full), n_empty=len(texts) - len(full), n_truncated=n_truncated)
    tally.update(occurrences(student, found))
    step(len(texts) - len(full))
    place = dict(zip(full, range(len(full)), strict=True))
    places = pa.array([place.get(i) for i in range(len(texts))], pa.int64())
    added = [pa.array(found[field.name], field.type).take(places) for field in student.schema]
    kept = [batch.column(name) for name in batch.schema.names if name not in found]
    return pa.RecordBatch.from_arrays([*kept, *added], schema=schema)


def occurrences(student: Student, found: Columns) -> Iterator[str]:
    """A key of the tally for every whole score and label that was given: a JSON list of column and value."""
    for head in student.heads:
        values = found[f"int_{head.name}" if head.kind == "score" else head.name]
        for value in chain.from_iterable(values) if head.kind == "labels" else np.asarray(values).tolist():
            yield json.dumps([head.kind, head.name, value], ensure_ascii=False)


def summarise(tallies: list[Counter[str]], n_reused: int, made_from: dict[str, Any], seconds: float) -> ScoreResult:
    """Counts over all shards; every row must be somewhere."""
    total = sum(tallies, Counter())
    rows_out = total["n_scored"] + total["n_empty"] + total["n_bad_rows"]
    assert total["n_rows"] == rows_out, f"{total['n_rows']} rows in, {rows_out} accounted for"
    if total["n_rows"] == 0:
        raise UserError(f"corpus.path: {made_from['settings']['corpus']['path']} has no rows")
    given = [(*json.loads(key), count) for key, count in total.most_common() if key.startswith("[")]
    ints = sorted((value, count) for kind, name, value, count in given if name == "score" and kind == "score")
    return ScoreResult(
        seconds=seconds,
        **{
            name: total[name]
            for name in ("n_rows", "n_scored", "n_empty", "n_bad_rows", "n_repaired_texts", "n_truncated")
        },
        n_shards=len(tallies),
        n_shards_reused=n_reused,
        int_score_counts={str(value): count for value, count in ints},
        label_counts=label_counts(given),
        docs_per_s=total["n_rows"] / seconds if not n_reused else None,
    )


def label_counts(given: list[tuple[str, str, Any, int]]) -> dict[str, dict[str, int]]:
    """Documents by label, from (kind, target, value, count), of the targets that are labels."""
    counts: dict[str, dict[str, int]] = {}
    for kind, name, value, count in given:
        if kind != "score":
            counts.setdefault(name, {})[value] = count
    return counts


def tally_of(path: Path, fingerprint: str) -> Counter[str] | None:
    """The counts of a shard already scored from the same inputs; None if it has to be (re)done."""
    if not path.exists():
        return None
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError):
        return None
    if metadata.get(FINGERPRINT) != fingerprint.encode():
        return None
    return Counter(json.loads(metadata[TALLY]))


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
