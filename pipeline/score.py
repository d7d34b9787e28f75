"""Stage 3: the student scores every document."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
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
from pipeline.student import Student
from pipeline.tracking import Result, Step, progress, stage, upstream

log = logging.getLogger("gristmill")

COLUMNS = {"score": pa.float32(), "int_score": pa.int8()}
FEATURES = {name: {"dtype": dtype, "_type": "Value"} for name, dtype in (("score", "float32"), ("int_score", "int8"))}
"""The same in the notes that Hugging Face `datasets` keeps in a file."""
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
        check_columns(found, recipe)
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
    refuse_existing(source, shard, recipe)
    schema = scored_schema(source)
    tally: Counter[str] = Counter()

    def scored() -> Iterator[pa.RecordBatch]:
        counts = Counts()
        for batch in corpus.read(shard, recipe.corpus, counts, schema=without_scores(schema)):
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
    """The batch with its score columns; empty texts get null."""
    full = [i for i, text in enumerate(texts) if not corpus.is_empty(text)]
    found, n_truncated = student.score_counted([texts[i] or "" for i in full], step)
    scores = np.zeros(len(texts), np.float32)
    scores[full] = found
    null = np.ones(len(texts), dtype=bool)
    null[full] = False
    ints = student.int_score(scores)
    tally.update(n_scored=len(full), n_empty=len(texts) - len(full), n_truncated=n_truncated)
    tally.update(f"int_score {value}" for value in ints[full].tolist())
    step(len(texts) - len(full))
    added = [pa.array(scores, pa.float32(), mask=null), pa.array(ints, pa.int8(), mask=null)]
    kept = [batch.column(name) for name in batch.schema.names if name not in COLUMNS]
    return pa.RecordBatch.from_arrays([*kept, *added], schema=schema)


def summarise(tallies: list[Counter[str]], n_reused: int, made_from: dict[str, Any], seconds: float) -> ScoreResult:
    """Counts over all shards; every row must be somewhere."""
    total = sum(tallies, Counter())
    rows_out = total["n_scored"] + total["n_empty"] + total["n_bad_rows"]
    assert total["n_rows"] == rows_out, f"{total['n_rows']} rows in, {rows_out} accounted for"
    if total["n_rows"] == 0:
        raise UserError(f"corpus.path: {made_from['settings']['corpus']['path']} has no rows")
    ints = sorted((int(name.split()[1]), count) for name, count in total.items() if name.startswith("int_score "))
    return ScoreResult(
        seconds=seconds,
        **{
            name: total[name]
            for name in ("n_rows", "n_scored", "n_empty", "n_bad_rows", "n_repaired_texts", "n_truncated")
        },
        n_shards=len(tallies),
        n_shards_reused=n_reused,
        int_score_counts={str(value): count for value, count in ints},
        docs_per_s=total["n_rows"] / seconds if not n_reused else None,
    )


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


def check_columns(found: list[Shard], recipe: Recipe) -> None:
    """Refuse, before anything is scored, shards without text or with columns of our names, as far as their heads
    tell; of JSON lines the first shard's beginning is looked at."""
    for shard in found:
        if shard.format == "jsonl":
            first = next(corpus.read(shard, recipe.corpus, Counts()), None)
            refuse_existing(first.schema if first is not None else pa.schema([]), shard, recipe)
            return
        schema = corpus.read_schema(shard, recipe.corpus)
        check_column(schema, recipe.corpus.text_column, shard)
        refuse_existing(schema, shard, recipe)


def refuse_existing(schema: pa.Schema, shard: Shard, recipe: Recipe) -> None:
    """A column called score that is already there is never silently doubled or lost."""
    taken = [name for name in COLUMNS if name in schema.names]
    if taken and not recipe.score.replace_existing:
        raise UserError(f"{shard.source} already has a column {taken[0]!r}; set score.replace_existing, or rename it")


def scored_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with score and int_score at its end; Hugging Face's own notes on the columns stay true."""
    fields = [*without_scores(schema), *(pa.field(name, kind) for name, kind in COLUMNS.items())]
    metadata = dict(schema.metadata or {})
    if b"huggingface" in metadata:
        notes = json.loads(metadata[b"huggingface"])
        features = notes.get("info", {}).get("features")
        if features is not None:
            features |= FEATURES
        metadata[b"huggingface"] = json.dumps(notes).encode()
    return pa.schema(fields, metadata)


def without_scores(schema: pa.Schema) -> pa.Schema:
    """The schema without our columns."""
    return pa.schema([field for field in schema if field.name not in COLUMNS], schema.metadata)
