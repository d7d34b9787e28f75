"""A corpus as record batches, and the documents in them."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import Corpus
from pipeline.errors import UserError
from pipeline.formats import (
    arrow_schema,
    check_column,
    check_storable,
    hub_schema,
    parquet_schema,
    read_arrow,
    read_hub,
    read_jsonl,
    read_parquet,
)
from pipeline.shards import Counts, Shard, first_line, opened, reading


def read(
    shard: Shard,
    corpus: Corpus,
    counts: Counts,
    columns: list[str] | None = None,
    schema: pa.Schema | None = None,
) -> Iterator[pa.RecordBatch]:
    """Record batches of at most BATCH_ROWS rows, in order; only some columns if asked."""
    readers: dict[str, Callable[..., Iterator[pa.RecordBatch]]] = {
        "parquet": read_parquet,
        "arrow": read_arrow,
        "hub": read_hub,
    }
    with reading(shard):
        if shard.format == "jsonl":
            batches = read_jsonl(shard, corpus, counts, columns, schema)
        else:
            batches = readers[shard.format](shard, corpus, columns)
        for batch in batches:
            counts.n_rows += batch.num_rows
            yield conform(batch, schema) if schema else batch


def read_schema(shard: Shard, corpus: Corpus) -> pa.Schema:
    """The schema of a whole shard; where its head does not say, it is read through."""
    heads: dict[str, Callable[..., pa.Schema | None]] = {
        "parquet": parquet_schema,
        "arrow": arrow_schema,
        "hub": hub_schema,
    }
    with reading(shard):
        schema = heads[shard.format](shard, corpus) if shard.format in heads else None
    if schema is not None:
        return schema
    schema = pa.schema([])
    for batch in read(shard, corpus, Counts()):
        schema = unify(schema, batch.schema, shard)
    return check_storable(schema, shard)


def n_rows(found: Iterable[Shard]) -> int | None:
    """Rows of a corpus, when the files say so without being read."""
    total = 0
    for shard in found:
        if shard.format != "parquet":
            return None
        with reading(shard), opened(shard) as file:
            total += pq.ParquetFile(file).metadata.num_rows
    return total


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A batch under a wider schema: absent columns are null."""
    if batch.schema.equals(schema):
        return batch
    columns = [
        batch.column(f.name).cast(f.type) if f.name in batch.schema.names else pa.nulls(len(batch), f.type)
        for f in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def unify(schema: pa.Schema, other: pa.Schema, shard: Shard) -> pa.Schema:
    """One schema that holds both."""
    try:
        return pa.unify_schemas([schema, other], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        why = first_line(error)
        raise UserError(f"{shard.source}: a column changes its type within the file ({why}); make it one") from None


# -- documents --------------------------------------------------------------------------------------------------------


def column(batch: pa.RecordBatch, name: str, shard: Shard) -> pa.Array:
    """A column by name; content.text reaches into a struct."""
    check_column(batch.schema, name, shard)
    if name in batch.schema.names:
        return batch.column(name)
    top, *path = name.split(".")
    return pc.struct_field(batch.column(top), path)


def texts(batch: pa.RecordBatch, corpus: Corpus, shard: Shard, counts: Counts) -> list[str | None]:
    """The documents of a batch; bytes that are not UTF-8 become U+FFFD and are counted."""
    array = column(batch, corpus.text_column, shard)
    if not is_text(array.type):
        raise UserError(f"{shard.source}: text column {corpus.text_column!r} holds {array.type}, not text")
    found, n_repaired = decoded(array)
    counts.n_repaired_texts += n_repaired
    return found


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings, or nothing at all."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(test(kind) for test in tests)


def decoded(array: pa.Array) -> tuple[list[Any], int]:
    """The values of an array, and how many strings had bytes that are not UTF-8, now U+FFFD."""
    try:
        return array.to_pylist(), 0
    except UnicodeDecodeError:
        raw = array.cast(pa.large_binary()).to_pylist()
        found = [None if value is None else value.decode("utf-8", "replace") for value in raw]
        return found, sum(text is not None and text.encode() != value for text, value in zip(found, raw, strict=True))


def is_empty(text: str | None) -> bool:
    """Whether there is nothing in a document to judge."""
    return text is None or not text.strip()


def text_id(text: str) -> str:
    """A document's name when it has none: 32 hex digits of its content, so duplicates share it."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
