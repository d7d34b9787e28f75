"""A scored corpus, and what choosing needs to know of its rows: scores, tokens, ids, values of columns."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import config, corpus, places, sample
from pipeline.config import Recipe
from pipeline.engines.completions import BYTES_PER_TOKEN
from pipeline.errors import UserError
from pipeline.formats import check_column, dotted, schema_tree
from pipeline.places import Place
from pipeline.shards import AT_ONCE, Counts, Shard, find_shards, opened, reading, with_documents
from pipeline.tracking import corpus_of, read_json

log = logging.getLogger("gristmill")

REASON = "score_reason"
"""Column that says why a score is missing, where a cascade ruled documents out: cascade, or no_text."""
RULED_OUT = "cascade"
CASCADE = b"gristmill.cascade"
"""Key of the note in a scored shard that says what the cascade looked for."""


def locate(recipe: Recipe, stage: str) -> tuple[config.Corpus, list[Shard]]:
    """The scored corpus and its shards, all of them there and with scores."""
    place = corpus_of("score", recipe, stage, recipe.filter.scored)
    found = config.Corpus(path=str(place), text_column=recipe.corpus.text_column, id_column=recipe.corpus.id_column)
    shards = find_shards(found)
    check_complete(recipe, shards, stage)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        shards = list(pool.map(partial(with_scores, found), shards))
    if stage != "filter" and cascade_of(shards):
        log.warning("%s: a cascade ruled documents out; all figures are of those that it let pass", stage)
    return found, shards


def with_scores(found: config.Corpus, shard: Shard) -> Shard:
    """A shard that holds scores, with its documents where it holds nothing else."""
    schema = corpus.read_schema(shard, found)
    for name in ("score", "int_score"):
        check_column(schema, name, shard)
    return with_documents(shard)


def cascade_of(shards: list[Shard]) -> dict[str, Any] | None:
    """What the cascade looked for that documents were scored behind, if there was one."""
    parquet = [shard for shard in shards if shard.format in ("parquet", "sidecar")]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return next((json.loads(note[CASCADE]) for note in pool.map(notes_of, parquet) if CASCADE in note), None)


def notes_of(shard: Shard) -> dict[bytes, bytes]:
    """What the footer of a scored shard says."""
    with reading(shard), opened(shard._replace(format="parquet")) as file:
        return pq.read_metadata(file).metadata or {}


def check_complete(recipe: Recipe, found: list[Shard], stage: str) -> None:
    """Refuse this run's scored corpus when shards of it are gone."""
    made = {} if recipe.filter.scored else read_json(recipe.run_folder / "score" / "inputs.json") or {}
    missing = sorted(made.get("shards", {}).keys() - {shard.name for shard in found})
    if missing:
        raise UserError(f"{stage}: {missing[0]} is missing from the scored corpus; run gristmill score again")


def embeddings_of(found: config.Corpus, shards: list[Shard]) -> list[Place]:
    """The files of embeddings beside the shards."""
    place = places.side(places.of(found.path or "", "filter.scored"), "embeddings")
    there = places.names(place)
    missing = next((shard.name for shard in shards if shard.name not in there), None)
    if missing is not None:
        raise UserError(
            f"filter.sampling: density needs the documents' embeddings, but there is no {place / missing}; run"
            " gristmill score --keep-embeddings --redo"
        )
    return [place / shard.name for shard in shards]


# -- rows -------------------------------------------------------------------------------------------------------------


def scores(batch: pa.RecordBatch, name: str = "score") -> NDArray[np.float32]:
    """Scores (n,), NaN where there is none."""
    column = batch.column(name).cast(pa.float32())
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float32)


def is_ruled_out(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """Whether a cascade ruled each row's document out, so that it has no score: (n,)."""
    if REASON not in batch.schema.names:
        return np.zeros(batch.num_rows, bool)
    column = pc.fill_null(pc.equal(batch.column(REASON).cast(pa.string()), RULED_OUT), False)
    return np.asarray(column.to_numpy(zero_copy_only=False), bool)


def has_tokens(batch: pa.RecordBatch, column: str | None, found: config.Corpus) -> bool:
    """Whether there is anything to count tokens by."""
    return column is not None or found.text_column in dotted(schema_tree(batch.schema))


def tokens_counted_by(recipe: Recipe) -> str:
    """How the tokens of a document are counted, in words."""
    return recipe.filter.tokens_column or f"{BYTES_PER_TOKEN} bytes of text"


def tokens(batch: pa.RecordBatch, column: str | None, found: config.Corpus, shard: Shard) -> NDArray[np.int64]:
    """Tokens (n,) of each document, from a column or its text; 0 without a text."""
    if column is not None:
        return tokens_given(batch, column, shard)
    texts = corpus.column(batch, found.text_column, shard)
    if not corpus.is_text(texts.type):
        raise UserError(f"{shard.source}: text column {found.text_column!r} holds {texts.type}, not text")
    n_bytes = pc.fill_null(pc.binary_length(texts.cast(pa.large_string())), 0)
    return np.asarray(-(-n_bytes.to_numpy(zero_copy_only=False) // BYTES_PER_TOKEN), np.int64)


def tokens_given(batch: pa.RecordBatch, column: str, shard: Shard) -> NDArray[np.int64]:
    """Tokens (n,) as a column says; 0 for a row without a score."""
    given = corpus.column(batch, column, shard)
    if not (pa.types.is_integer(given.type) or pa.types.is_floating(given.type)):
        raise UserError(f"{shard.source}: filter.tokens_column {column} holds {given.type}, not numbers")
    values = np.asarray(given.cast(pa.float64()).to_numpy(zero_copy_only=False))
    values = np.where(np.isnan(values) & np.isnan(scores(batch)), 0, values)
    bad = values[~(np.isfinite(values) & (values >= 0))]
    if len(bad):
        raise UserError(f"{shard.source}: filter.tokens_column {column} holds {bad[0]:g} for a scored document")
    return values.astype(np.int64)


def ids(batch: pa.RecordBatch, found: config.Corpus, shard: Shard) -> list[str]:
    """The documents' names: (n,), as the sample that is rated has them; empty for a row without either."""
    given = sample.values(batch, found.id_column, shard)
    if None not in given:
        return [str(value) for value in given]
    texts = corpus.texts(batch, found, shard, Counts())
    return [
        corpus.text_id(text or "") if value is None else str(value) for value, text in zip(given, texts, strict=True)
    ]


def id_columns(found: config.Corpus) -> list[str]:
    """Columns that `ids` reads."""
    return [name for name in (found.id_column, found.text_column) if name]


def is_derived(schema: pa.Schema, name: str) -> bool:
    """Whether a group follows from the shard: `source`, where no column is called so."""
    return name == "source" and name not in dotted(schema_tree(schema))


def values(batch: pa.RecordBatch, name: str, shard: Shard) -> list[Any]:
    """A column's values (n,); source is the first folder below the corpus, where no column is called so."""
    if is_derived(batch.schema, name):
        return [sample.source(shard, "")] * batch.num_rows
    return sample.values(batch, name, shard)


def value_columns(shard: Shard, found: config.Corpus, names: tuple[str, ...]) -> list[str]:
    """Columns of a shard that `values` reads for these names."""
    schema = corpus.read_schema(shard, found)
    return [check_column(schema, name, shard) for name in names if not is_derived(schema, name)]
