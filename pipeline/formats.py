"""The formats of a corpus, each streamed as record batches: parquet, Arrow, JSON lines, Hub datasets."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import IO, Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from pipeline.config import Corpus
from pipeline.errors import UserError
from pipeline.limits import check_parquet, check_rows, in_proportion, lines
from pipeline.shards import Counts, Shard, first_line, load_hub_dataset, opened

BATCH_ROWS = 2048
BATCH_BYTES = 64 * 2**20
"""Rows, and about so many bytes, are held at a time: memory is bounded by these, never by the corpus."""

ABSENT = object()
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


# -- parquet and Arrow ------------------------------------------------------------------------------------------------


def read_parquet(shard: Shard, corpus: Corpus, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream a parquet shard. Page headers have no checksum, and damage there ends the rows early: so count them."""
    with opened(shard) as file:
        size = file.seek(0, io.SEEK_END)
        reader = open_parquet(file, shard)
        check_parquet(reader.metadata, size, shard, corpus)
        wanted = None if columns is None else [check_column(reader.schema_arrow, name, shard) for name in columns]
        missing = reader.metadata.num_rows
        for batch in reader.iter_batches(rows_at_a_time(reader.metadata), columns=wanted):
            missing -= batch.num_rows
            yield check_rows(batch, shard, corpus)
    if missing:
        raise OSError(f"{missing} of its rows are missing")


def parquet_schema(shard: Shard, _: Corpus) -> pa.Schema:
    """The schema in the foot of a parquet shard."""
    with opened(shard) as file:
        return open_parquet(file, shard).schema_arrow


def open_parquet(file: IO[bytes], shard: Shard) -> pq.ParquetFile:
    """A reader that verifies checksums; local column chunks stream, remote ones are fetched whole, in few requests."""
    remote = "://" in shard.source
    buffer_size = 0 if remote else 2**20
    reader = pq.ParquetFile(file, page_checksum_verification=True, buffer_size=buffer_size, pre_buffer=remote)
    check_unique(reader.schema_arrow, shard)
    return reader


def rows_at_a_time(metadata: pq.FileMetaData) -> int:
    """Rows of a parquet file that fill a batch."""
    n_bytes = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
    return int(max(1, min(BATCH_ROWS, BATCH_BYTES * metadata.num_rows // max(n_bytes, 1))))


def read_arrow(shard: Shard, corpus: Corpus, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream an Arrow shard."""
    with opened(shard) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        batches = (in_proportion(whole(batch), size, shard, corpus) for batch in open_arrow(file, shard)[1])
        yield from in_pieces(batches, shard, corpus, columns)


def whole(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch, if nothing in it points outside its buffers: Arrow believes a damaged file, and would crash on it.
    Text that is not UTF-8 may pass, to be repaired."""
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
    return batch


def arrow_schema(shard: Shard, _: Corpus) -> pa.Schema:
    """The schema at the head of an Arrow shard."""
    with opened(shard) as file:
        return open_arrow(file, shard)[0]


def open_arrow(file: IO[bytes], shard: Shard) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    """Schema and batches of the stream format (save_to_disk) or the file format (Feather)."""
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
    check_unique(reader.schema, shard)
    return reader.schema, map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader


def in_pieces(
    batches: Iterable[pa.RecordBatch], shard: Shard, corpus: Corpus, columns: list[str] | None
) -> Iterator[pa.RecordBatch]:
    """Record batches cut to BATCH_ROWS rows and to the columns asked for."""
    for batch in batches:
        wanted = batch if columns is None else batch.select(tops(batch.schema, columns, shard))
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield check_rows(wanted.slice(start, BATCH_ROWS), shard, corpus)


def tops(schema: pa.Schema, columns: list[str], shard: Shard) -> list[str]:
    """The columns that hold what is asked for, each once."""
    found = [check_column(schema, name, shard) for name in columns]
    return list(dict.fromkeys(name if name in schema.names else name.split(".")[0] for name in found))


# -- JSON lines -------------------------------------------------------------------------------------------------------


def read_jsonl(
    shard: Shard, corpus: Corpus, counts: Counts, columns: list[str] | None, schema: pa.Schema | None
) -> Iterator[pa.RecordBatch]:
    """Stream JSON lines; without a schema each batch carries the types of its own rows.

    A column that some rows lack is null there; one that a whole shard lacks is refused.
    """
    known: dict[str, Any] = {}
    seen: set[str] = set()
    with opened(shard, corpus) as file:
        for number, rows in row_groups(file, shard, corpus, counts):
            for row in rows:
                known |= row
            if columns is not None:
                rows = [pick(row, columns) for row in rows]
            present = dict.fromkeys(name for row in rows for name in row)
            seen |= present.keys()
            names = columns or (schema.names if schema else list(present))
            yield to_batch(rows, names, schema, f"{shard.source} lines up to {number}")
    for name in columns or []:
        if known and name not in seen:
            raise UserError(no_column(shard, name, dotted(known)))


def row_groups(
    file: IO[bytes], shard: Shard, corpus: Corpus, counts: Counts
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """A batch of rows at a time, and the number of its last line."""
    rows: list[dict[str, Any]] = []
    n_bytes = number = 0
    for number, line in lines(file, shard, corpus, counts):
        row = None if line.isspace() else parse_line(line, number, shard, corpus.skip_bad_rows, counts)
        if row is not None:
            rows.append(row)
            n_bytes += len(line)
        if len(rows) == BATCH_ROWS or n_bytes >= BATCH_BYTES:
            yield number, rows
            rows, n_bytes = [], 0
    if rows:
        yield number, rows


def parse_line(line: bytes, number: int, shard: Shard, skip: bool, counts: Counts) -> dict[str, Any] | None:
    """One JSON object; None, and counted, for a bad line that is to be skipped."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if isinstance(row, dict):
            return repair(row, line, counts)
        problem = "not a JSON object"
    except UnicodeDecodeError:
        problem = "not valid UTF-8"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON ({first_line(error)})"
    if not skip:
        raise UserError(
            f"{shard.source} line {number} is {problem}; mend it, or leave it out with --corpus.skip-bad-rows"
        )
    counts.n_rows += 1
    counts.n_bad_rows += 1
    return None


def repair(row: dict[str, Any], line: bytes, counts: Counts) -> dict[str, Any]:
    """The row with lone surrogates, which no Arrow string can hold, as U+FFFD, and counted."""
    if not SURROGATE.search(line):
        return row
    repaired: dict[str, Any] = without_surrogates(row)
    counts.n_repaired_texts += repaired != row
    return repaired


def without_surrogates(value: Any) -> Any:
    """JSON with every lone surrogate replaced by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    return value


def pick(row: dict[str, Any], columns: list[str]) -> dict[str, Any]:
    """Those of the columns that a row has; a dot reaches into objects."""
    found = {name: reach(row, name) for name in columns}
    return {name: value for name, value in found.items() if value is not ABSENT}


def reach(row: dict[str, Any], name: str) -> Any:
    """A value by name, ABSENT if the row has none."""
    top, _, rest = name.partition(".")
    inner = row.get(top)
    if name not in row and rest and isinstance(inner, dict):
        return reach(inner, rest)
    return row.get(name, ABSENT)


def to_batch(rows: list[dict[str, Any]], names: list[str], schema: pa.Schema | None, where: str) -> pa.RecordBatch:
    """Parsed JSON rows as one record batch."""
    arrays = []
    for name in names:
        try:
            arrays.append(pa.array([row.get(name) for row in rows], schema.field(name).type if schema else None))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            why = first_line(error)
            raise UserError(f"{where}: column {name!r} mixes types or holds too large a number ({why})") from None
    return pa.RecordBatch.from_arrays(arrays, names)


def check_storable(schema: pa.Schema, shard: Shard) -> pa.Schema:
    """The schema, unless parquet has no form for it."""
    for column in schema:
        if has_empty_object(column.type):
            raise UserError(f"{shard.source}: column {column.name!r} holds empty objects alone; leave it out")
    return schema


def has_empty_object(kind: pa.DataType) -> bool:
    """Whether there is a struct without fields in a type."""
    if pa.types.is_list(kind):
        return has_empty_object(kind.value_type)
    return pa.types.is_struct(kind) and (not len(kind) or any(has_empty_object(inner.type) for inner in kind))


# -- the Hub ----------------------------------------------------------------------------------------------------------


def read_hub(shard: Shard, corpus: Corpus, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream one shard of a Hub dataset."""
    dataset = load_hub_dataset(corpus)
    part = dataset.shard(num_shards=dataset.num_shards, index=shard.part).with_format("arrow")
    tables = part.iter(batch_size=BATCH_ROWS)
    yield from in_pieces((batch for table in tables for batch in table.to_batches()), shard, corpus, columns)


def hub_schema(_: Shard, corpus: Corpus) -> pa.Schema | None:
    """The schema of a Hub dataset, if it is known without reading (JSON lines do not say)."""
    features = load_hub_dataset(corpus).features
    return features.arrow_schema if features else None


# -- columns ----------------------------------------------------------------------------------------------------------


def check_column(schema: pa.Schema, name: str, shard: Shard) -> str:
    """The column name, if the schema has it (a dot reaches into structs)."""
    there = dotted(schema_tree(schema))
    if name not in there:
        raise UserError(no_column(shard, name, there))
    return name


def no_column(shard: Shard, name: str, there: list[str]) -> str:
    """What to say of a column that is not there."""
    return f"{shard.source} has no column {name!r}; there are: {', '.join(there) or 'none'}"


def schema_tree(fields: Iterable[pa.Field]) -> dict[str, Any]:
    """Columns, those of structs as dicts."""
    return {field.name: schema_tree(field.type) if pa.types.is_struct(field.type) else None for field in fields}


def dotted(tree: dict[str, Any]) -> list[str]:
    """The names of nested dicts, the inner ones behind a dot, after the outer ones."""
    inner = [f"{name}.{rest}" for name, value in tree.items() if isinstance(value, dict) for rest in dotted(value)]
    return [*tree, *inner]


def check_unique(schema: pa.Schema, shard: Shard) -> None:
    """Refuse two columns of one name: nobody can say which is meant."""
    repeated = [name for name, count in Counter(schema.names).items() if count > 1]
    if repeated:
        raise UserError(f"{shard.source} has several columns called {repeated[0]!r}; rename all but one")
