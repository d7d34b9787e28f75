"""One scored shard: written whole or not at all, and what its footer says of it."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import locks, metrics, places, storage
from pipeline.config import Recipe
from pipeline.head import Columns
from pipeline.places import Place
from pipeline.scored import CASCADE, REASON, RULED_OUT
from pipeline.seen import Records
from pipeline.shards import AT_ONCE, BESIDE, Counts, Shard, fingerprint
from pipeline.stream import Begin, Job, Results, Rows, Texts
from pipeline.student import Student

FINGERPRINT = b"gristmill.made_from"
TALLY = b"gristmill.tally"


def write(begin: Begin, results: Results, job: Job) -> Counter[str]:
    """Write one shard of the stream, whole or not at all; its counts."""
    tally: Counter[str] = Counter()
    # The embeddings are there before the scores, so that scores never stand without them.
    with (
        locks.written_by_one(job.place / begin.shard.name),
        storage.shard_writer(job.place / begin.shard.name, begin.schema) as of_scores,
        embeddings_writer(places.side(job.place, "embeddings") / begin.shard.name, job) as of_embeddings,
    ):
        for item, records in results:
            if isinstance(item, Counts):
                tally.update(n_rows=item.n_rows, n_bad_rows=item.n_bad_rows, n_repaired_texts=item.n_repaired_texts)
                break
            with job.scoring.effort.spent("writing"):
                if isinstance(item, Rows):
                    write_rows(item, job, tally, of_scores, of_embeddings)
                elif isinstance(item, Texts) and records is not None:
                    job.known.add(item.keys, records)
                    job.step(len(item.keys))
        of_scores.add_key_value_metadata(notes(begin.shard, job) | {TALLY: json.dumps(tally).encode()})
        if of_embeddings is not None:
            of_embeddings.add_key_value_metadata({FINGERPRINT: job.prints[begin.shard].encode()})
    return tally


def write_rows(rows: Rows, job: Job, tally: Counter[str], of_scores: Any, of_embeddings: Any) -> None:
    """Write rows with their columns, and their embeddings where these are kept; empty texts get null."""
    there = np.array([key is not None for key in rows.keys], np.bool_)
    known = job.known.get([key for key in rows.keys if key is not None])
    has_score = there.copy()
    has_score[there] = ~known["ruled_out"]
    records = known[~known["ruled_out"]]
    places = pa.array(np.cumsum(has_score) - 1, pa.int64(), mask=~has_score)
    columns = job.scoring.columns(records)
    added = [
        reasons(there, has_score) if field.name == REASON else pa.array(columns[field.name], field.type).take(places)
        for field in job.added
    ]
    of_scores.write_batch(pa.RecordBatch.from_arrays([*rows.kept.columns, *added], schema=of_scores.schema))
    if of_embeddings is not None:
        of_embeddings.write_batch(embeddings(records, places, of_embeddings.schema))
    tally.update(n_scored=len(records), n_empty=int((~there).sum()), n_ruled_out=len(known) - len(records))
    tally.update(n_truncated=int(records["truncated"].sum()), n_windows=int(records["n_windows"].sum()))
    for ending, student in job.scoring.named.items():
        tally.update(occurrences(student, columns, ending))
    job.scoring.effort.count(documents=len(there), duplicates=len(known) - rows.n_new)
    job.step(len(there) - rows.n_new)


def reasons(there: NDArray[np.bool_], has_score: NDArray[np.bool_]) -> pa.Array:
    """Why rows have no score (n,); null for those that have one."""
    return pa.array(np.where(there, RULED_OUT, "no_text"), pa.string(), mask=has_score)


def notes(shard: Shard, job: Job) -> dict[bytes, bytes]:
    """What a scored shard says of itself: what it was made from, what a cascade looked for, and where its documents
    are if it lacks them."""
    made_from = {FINGERPRINT: job.prints[shard].encode()}
    if job.cascade is not None:
        made_from[CASCADE] = json.dumps({name: job.cascade[name] for name in ("keep_share", "cut")}).encode()
    if not job.recipe.score.sidecar:
        return made_from
    found = job.recipe.corpus.model_dump(mode="json")
    if shard.format != "hub" and "://" not in found["path"]:
        found["path"] = str(Path(found["path"]).absolute())
    beside = {"corpus": found, "shard": shard._asdict(), "made_from": fingerprint(shard)}
    return made_from | {BESIDE: json.dumps(beside).encode()}


def embeddings_writer(path: Place, job: Job) -> Any:
    """A writer of the documents' embeddings (dim,) float16; of nothing where they are not kept."""
    if not job.recipe.score.keep_embeddings:
        return nullcontext()
    (dim,) = job.scoring.kind["embedding"].shape
    return storage.shard_writer(path, pa.schema([("embedding", pa.list_(pa.float16(), dim))]))


def embeddings(records: Records, places: pa.Array, schema: pa.Schema) -> pa.RecordBatch:
    """The mean embedding of each row's document."""
    kind = schema.field("embedding").type
    values = np.ascontiguousarray(records["embedding"]).reshape(-1)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), kind.list_size).take(places)
    return pa.RecordBatch.from_arrays([column.cast(kind)], schema=schema)


def occurrences(student: Student, columns: Columns, ending: str) -> Iterator[str]:
    """A key of the tally for every whole score and label that was given, and for every score rounded half up: a JSON
    list of kind, column and value."""
    for head in student.heads:
        name = head.name + ending
        if head.kind == "score":
            assert head.scale is not None
            yield from keys("half_up", name, metrics.int_scores(columns[name], head.scale).tolist())
        values = columns[f"int_{name}" if head.kind == "score" else name]
        given = chain.from_iterable(values) if head.kind == "labels" else np.asarray(values).tolist()
        yield from keys(head.kind, name, given)


def keys(kind: str, name: str, values: Iterable[Any]) -> Iterator[str]:
    """Keys of the tally."""
    return (json.dumps([kind, name, value], ensure_ascii=False) for value in values)


def tallies_of(prints: dict[Shard, str], recipe: Recipe) -> dict[Shard, Counter[str] | None]:
    """The counts of shards by their fingerprints; many at a time, as a store far away takes long to answer each."""
    place = places.corpus(recipe, "score")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda shard: tally_of(place, shard, prints[shard], recipe), prints)
        return dict(zip(prints, found, strict=True))


def tally_of(place: Place, shard: Shard, fingerprint: str, recipe: Recipe) -> Counter[str] | None:
    """The counts of a shard already scored from the same inputs; None if it has to be (re)done."""
    scored = notes_of(place / shard.name)
    kept = notes_of(places.side(place, "embeddings") / shard.name) if recipe.score.keep_embeddings else scored
    if any(notes.get(FINGERPRINT) != fingerprint.encode() for notes in (scored, kept)):
        return None
    return Counter(json.loads(scored[TALLY]))


def notes_of(path: Place) -> dict[bytes, bytes]:
    """What a shard of ours says of itself, by its footer alone; nothing if it is not there, or damaged."""
    unreadable = OSError if isinstance(path, Path) else FileNotFoundError  # a store may just not answer
    with places.reaching(path), suppress(pa.ArrowInvalid, UnicodeDecodeError, unreadable), path.open("rb") as file:
        return pq.read_metadata(file).metadata or {}
    return {}
