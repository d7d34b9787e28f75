"""A corpus as one stream of work: no worker waits where a shard ends and the next begins."""

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline import corpus, scored, seen
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.places import Place
from pipeline.scoring import Scoring
from pipeline.seen import Records, Seen
from pipeline.shards import Counts, Shard
from pipeline.tracking import Step
from pipeline.workers import in_order

ID = "id"
"""Column that names a document where its scores are written without it."""


class Job(NamedTuple):
    """What it takes to score shards."""

    recipe: Recipe
    scoring: Scoring
    added: pa.Schema
    """The students' columns."""
    known: Seen
    place: Place
    """Where the scored corpus goes."""
    prints: dict[Shard, str]
    """Fingerprints of the shards with all that decides their scores."""
    step: Step
    cascade: dict[str, Any] | None = None
    """What the result says of the cascade, if there is one."""


class Begin(NamedTuple):
    """A shard begins; its Counts end it."""

    shard: Shard
    schema: pa.Schema
    """Of what is written."""


class Texts(NamedTuple):
    """A unit of work: different texts that are not known yet."""

    keys: list[bytes]
    texts: list[str]


class Rows(NamedTuple):
    """Rows of a shard; their texts came before."""

    kept: pa.RecordBatch
    """What is written beside the students' columns."""
    keys: list[bytes | None]
    """The text of each row, None for an empty one."""
    n_new: int
    """Texts that were not known before."""


Item = Begin | Texts | Rows | Counts
Results = Generator[tuple[Item, Records | None]]


def results(job: Job) -> Results:
    """The stream, in its order, with the records of all texts in it."""
    scoring = job.scoring
    items = scoring.effort.timed("reading", stream(job))
    return in_order(partial(made_of, scoring), items, scoring.n_workers, scoring.begin_thread)


def made_of(scoring: Scoring, item: Item) -> Records | None:
    """Records of an item's texts, if it has some."""
    return scoring.records(item.texts) if isinstance(item, Texts) else None


def stream(job: Job) -> Iterator[Item]:
    """All shards one after the other: texts that are not known yet, as units of work, each before its rows."""
    begun = in_order(lambda shard: written_schema(shard, job), job.prints, 1)
    for number, (shard, schema) in enumerate(begun, 1):
        yield Begin(shard, schema)
        counts = Counts()
        scope = 0 if job.scoring.is_independent else number  # where texts sway each other, each shard is on its own
        for batch, kept in batches(shard, schema, counts, job):
            texts = corpus.texts(batch, job.recipe.corpus, shard, counts)
            keys = [None if corpus.is_empty(text) else seen.key_of(text or "", scope) for text in texts]
            by_key = {key: text for key, text in zip(keys, texts, strict=True) if key and text}
            new = job.known.claim(by_key)
            yield from units({key: by_key[key] for key in new}, job.scoring.unit_texts)
            yield Rows(kept, keys, len(new))
        yield counts


def batches(
    shard: Shard, schema: pa.Schema, counts: Counts, job: Job
) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """The rows of a shard as they are read, and what is kept of them."""
    found = job.recipe.corpus
    if not job.recipe.score.sidecar:
        for batch in corpus.read(shard, found, counts, schema=corpus.without(schema, job.added.names)):
            yield batch, batch
        return
    for batch in corpus.read(shard, found, counts, columns=list(dict.fromkeys(scored.id_columns(found)))):
        yield batch, pa.RecordBatch.from_arrays([pa.array(scored.ids(batch, found, shard), pa.string())], [ID])


def written_schema(shard: Shard, job: Job) -> pa.Schema:
    """The columns of a scored shard: all that were there, or its ids alone, then the students'."""
    if job.recipe.score.sidecar:
        return pa.schema([(ID, pa.string()), *job.added])
    source = corpus.read_schema(shard, job.recipe.corpus)
    refuse_existing(source, shard, job.recipe, job.added.names)
    return corpus.scored_schema(source, job.added)


def units(texts: dict[bytes, str], n: int) -> Iterator[Texts]:
    """So many texts at a time, by their keys."""
    keys = list(texts)
    return (Texts(part, [texts[key] for key in part]) for part in (keys[i : i + n] for i in range(0, len(keys), n)))


def refuse_existing(schema: pa.Schema, shard: Shard, recipe: Recipe, names: Sequence[str]) -> None:
    """What is already there under one of our names is never silently doubled or lost."""
    taken = [name for name in names if name in schema.names]
    if taken and not recipe.score.replace_existing:
        raise UserError(f"{shard.source} already has a column {taken[0]!r}; set score.replace_existing, or rename it")
