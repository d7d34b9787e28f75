"""A corpus as record batches, and the documents in them."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
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
    tops,
)
from pipeline.plain_text import TEXT_SCHEMA, read_text
from pipeline.shards import Beside, Counts, Shard, beside, first_line, opened, reading

DTYPES = {pa.float32(): "float32", pa.int8(): "int8", pa.string(): "string"}
"""Names of types in the notes that Hugging Face `datasets` keeps in a file."""


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
        "sidecar": read_sidecar,
    }
    with reading(shard):
        if shard.format == "jsonl":
            batches = read_jsonl(shard, corpus, counts, columns, schema)
        elif shard.format == "text":
            batches = read_text(shard, corpus, counts, columns)
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
        "sidecar": sidecar_schema,
        "text": lambda *_: TEXT_SCHEMA,
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
        if shard.format not in ("parquet", "sidecar"):
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


# -- scores beside documents ------------------------------------------------------------------------------------------


def read_sidecar(shard: Shard, corpus: Corpus, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream documents with the scores that lie beside them; what of either is not asked for is not read."""
    names = student_schema(shard).names
    asked = names if columns is None else [name for name in columns if name in names]
    others = None if columns is None else [name for name in columns if name not in names]
    scores = read_parquet(shard, corpus, asked or names[:1])  # one at least, which counts the rows
    return scores if others == [] else in_step(read_documents(shard, others, names), scores, shard)


def sidecar_schema(shard: Shard, _: Corpus) -> pa.Schema:
    """The schema of the documents with the student's columns."""
    return scored_schema(documents_schema(documents_of(shard)), student_schema(shard))


def student_schema(shard: Shard) -> pa.Schema:
    """The student's columns in a sidecar, which stand behind the ids."""
    return pa.schema(list(parquet_schema(shard, Corpus()))[1:])


def documents_of(shard: Shard) -> Beside:
    """Where the documents of a sidecar are."""
    found = beside(shard)
    assert found is not None, f"{shard.source} is no sidecar"
    return found


@lru_cache(maxsize=1024)
def documents_schema(of: Beside) -> pa.Schema:
    """The schema of the documents; kept, since JSON lines are read through for it."""
    return read_schema(of.shard, of.corpus)


def read_documents(shard: Shard, columns: list[str] | None, replaced: list[str]) -> Iterator[pa.RecordBatch]:
    """Stream the documents of a sidecar without the columns that it replaces, with the types of the whole shard."""
    of = documents_of(shard)
    schema = without(documents_schema(of), replaced)
    names = schema.names if columns is None else columns
    if of.shard.format not in ("jsonl", "hub"):
        return read(of.shard, of.corpus, Counts(), names)
    typed = pa.schema([schema.field(name) for name in tops(schema, names, of.shard)])
    return read(of.shard, of.corpus, Counts(), schema=typed)


def in_step(
    documents: Iterator[pa.RecordBatch], scores: Iterator[pa.RecordBatch], shard: Shard
) -> Iterator[pa.RecordBatch]:
    """The batches of the documents, each with its scores behind it; refuses other documents than were scored."""
    held = next(scores, None)
    for batch in documents:
        while held is None or len(held) < len(batch):
            more = next(scores, None)
            if held is None or more is None:
                raise other_documents(shard)
            held = pa.concat_batches([held, more])
        both = pa.schema([*batch.schema, *held.schema])
        yield pa.RecordBatch.from_arrays([*batch.columns, *held.slice(0, len(batch)).columns], schema=both)
        held = held.slice(len(batch))
    if held is not None and (len(held) or next(scores, None) is not None):
        raise other_documents(shard)


def other_documents(shard: Shard) -> UserError:
    """What to say where there are more documents than scores, or fewer."""
    return UserError(
        f"{shard.source} holds scores for another number of documents than are in {documents_of(shard).shard.source};"
        " put back what was scored, or run gristmill score --redo"
    )


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
    """The values of an array, and how many strings, but for nested ones, had bytes that are not UTF-8, now U+FFFD."""
    try:
        return array.to_pylist(), 0
    except UnicodeDecodeError:
        if pa.types.is_nested(array.type):
            return [lenient(value) for value in array], 0
        raw = array.cast(pa.large_binary()).to_pylist()
        found = [None if value is None else value.decode("utf-8", "replace") for value in raw]
        return found, sum(text is not None and text.encode() != value for text, value in zip(found, raw, strict=True))


def lenient(value: pa.Scalar) -> Any:
    """A nested value in which bytes that are not UTF-8 are U+FFFD."""
    if isinstance(value, pa.StringScalar) and value.is_valid:
        return value.as_buffer().to_pybytes().decode("utf-8", "replace")
    if isinstance(value, pa.StructScalar) and value.is_valid:
        return {name: lenient(inner) for name, inner in value.items()}
    if isinstance(value, pa.ListScalar) and value.is_valid:
        return [lenient(inner) for inner in value]
    return value.as_py()


def is_empty(text: str | None) -> bool:
    """Whether there is nothing in a document to judge."""
    return text is None or not text.strip()


def text_id(text: str) -> str:
    """A document's name when it has none: 32 hex digits of its content, so duplicates share it."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
