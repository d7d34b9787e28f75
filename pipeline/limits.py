"""How much memory a file of a corpus may take: long rows, and files that unpack to far more than they are."""

import io
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Corpus
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.shards import Counts, Shard

MB = 10**6
ALWAYS_MB = 200
"""What unpacks to no more than this is never refused."""
CHUNK = 2**20


def check_unpacked(unpacked: int, packed: int, source: str, corpus: Corpus) -> None:
    """Refuse what unpacks to too many times its size; bytes."""
    if unpacked > max(ALWAYS_MB * MB, corpus.max_expansion * packed):
        raise UserError(
            f"{source} unpacks {packed:,} bytes to {unpacked:,} or more; remove it, or raise corpus.max_expansion"
            f" ({corpus.max_expansion})"
        )


def long_row(source: str, corpus: Corpus, way_out: str = "shorten it") -> UserError:
    """What to say of a row that is too large."""
    return UserError(
        f"{source} holds a row of more than {corpus.max_row_mb} MB; {way_out}, or raise corpus.max_row_mb"
    )


# -- text -------------------------------------------------------------------------------------------------------------


class Unpacked(io.RawIOBase):
    """What a decompressor makes of a file of so many bytes, as far as it is in proportion."""

    def __init__(self, stream: Any, packed: int, source: str, corpus: Corpus) -> None:
        self.stream, self.packed, self.source, self.corpus = stream, packed, source, corpus
        self.unpacked = 0

    def readable(self) -> bool:
        """It is only read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; the number of bytes."""
        n = int(self.stream.readinto(buffer))
        self.unpacked += n
        check_unpacked(self.unpacked, self.packed, self.source, self.corpus)
        return n


def lines(file: IO[bytes], shard: "Shard", corpus: Corpus, counts: "Counts | None") -> Iterator[tuple[int, bytes]]:
    """Lines and their numbers, from 1. A line that is too long is refused before it is read whole; with
    skip_bad_rows it is left out and counted in `counts`, if there are some."""
    most, number, readline = corpus.max_row_mb * MB, 0, file.readline
    while line := readline(most + 1):
        number += 1
        if len(line) <= most:
            yield number, line
        elif counts is None or not corpus.skip_bad_rows:
            way_out = "leave it out with --corpus.skip-bad-rows" if counts else "break it into several"
            raise long_row(f"{shard.source} line {number}", corpus, way_out)
        else:
            pass_over(line, file)
            counts.n_rows += 1
            counts.n_bad_rows += 1


def pass_over(line: bytes, file: IO[bytes]) -> None:
    """Read to the end of a line that has begun, and keep nothing of it."""
    while line and not line.endswith(b"\n"):
        line = file.readline(CHUNK)


# -- parquet and Arrow ------------------------------------------------------------------------------------------------


def check_rows(batch: pa.RecordBatch, shard: "Shard", corpus: Corpus) -> pa.RecordBatch:
    """The batch, unless one of its rows is too large. What rows share counts whole in each, so it is taken apart."""
    most = corpus.max_row_mb * MB
    if batch.nbytes > most:
        own = without_views(batch)
        if own.nbytes > most and any(decoded(own.slice(row, 1)).nbytes > most for row in range(own.num_rows)):
            raise long_row(shard.source, corpus)
    return batch


def without_views(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch in which each string lies by itself."""
    columns = [column.cast(without_view(column.type)) for column in batch.columns]
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


def without_view(kind: pa.DataType) -> pa.DataType:
    """The type that holds the same without views."""
    is_a = pa.types
    if is_a.is_string_view(kind) or is_a.is_binary_view(kind):
        return pa.large_binary()
    if is_a.is_struct(kind):
        return pa.struct([field.with_type(without_view(field.type)) for field in kind])
    if is_a.is_list(kind) or is_a.is_large_list(kind):
        return pa.large_list(without_view(kind.value_type))
    return kind


def decoded(row: pa.RecordBatch) -> pa.RecordBatch:
    """A row without dictionaries."""
    columns = [each.dictionary_decode() if pa.types.is_dictionary(each.type) else each for each in row.columns]
    return pa.RecordBatch.from_arrays(columns, row.schema.names)


def check_parquet(metadata: pq.FileMetaData, size: int, shard: "Shard", corpus: Corpus) -> None:
    """Refuse a parquet file of `size` bytes by what its foot says of it, before anything is unpacked."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    for group in groups:
        if group.total_byte_size > ALWAYS_MB * MB:
            stored = sum(group.column(number).total_compressed_size for number in range(group.num_columns))
            check_unpacked(group.total_byte_size, min(stored, size), shard.source, corpus)
        if group.total_byte_size > corpus.max_row_mb * MB * max(group.num_rows, 1):
            raise long_row(shard.source, corpus)
    check_unpacked(sum(group.total_byte_size for group in groups), size, shard.source, corpus)


def in_proportion(batch: pa.RecordBatch, size: int, shard: "Shard", corpus: Corpus) -> pa.RecordBatch:
    """The batch, unless it is too many times as large as its file of `size` bytes."""
    check_unpacked(batch.nbytes, size, shard.source, corpus)
    return batch
