"""Where chosen rows are written: parquet shards or JSON lines."""

import base64
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa

from pipeline import corpus, storage
from pipeline.places import Place

Sink = Callable[[pa.RecordBatch], None]


@contextmanager
def parquet_sink(path: Place, schema: pa.Schema) -> Iterator[Sink]:
    """Writes record batches to a parquet shard."""
    with storage.shard_writer(path, schema) as writer:
        yield writer.write_batch


@contextmanager
def jsonl_sink(path: Place, _: pa.Schema) -> Iterator[Sink]:
    """Writes record batches as JSON lines."""
    with storage.atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield lambda batch: write_lines(file, batch)


SINKS = {"parquet": parquet_sink, "jsonl": jsonl_sink}


def write_lines(file: IO[str], batch: pa.RecordBatch) -> None:
    """Rows as JSON lines; what JSON has no form for (times, decimals) as text."""
    columns = [corpus.decoded(column)[0] for column in batch.columns]
    for row in zip(*columns, strict=True):
        named = dict(zip(batch.schema.names, row, strict=True))
        file.write(json.dumps(plain(named), ensure_ascii=False, default=str) + "\n")


def plain(value: Any) -> Any:
    """What JSON can hold: bytes as base64, NaN and infinity as null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
