"""How much memory a file of a corpus may take: long rows, and files that unpack to far more than they are."""

import io
import struct
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any, NamedTuple

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
    """The batch, unless one of its rows is too large."""
    most = corpus.max_row_mb * MB
    if batch.nbytes > most and any(plain(batch.slice(row, 1)).nbytes > most for row in range(batch.num_rows)):
        raise long_row(shard.source, corpus)
    return batch


def plain(row: pa.RecordBatch) -> pa.RecordBatch:
    """A batch without dictionaries, which count whole however few of their values are used."""
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


def in_proportion(
    batches: Iterable[pa.RecordBatch], file: IO[bytes], begin: int, shard: "Shard", corpus: Corpus
) -> Iterator[pa.RecordBatch]:
    """Arrow's record batches, each after a look at how large it will be; its messages begin at byte `begin`.

    `batches` are read from `file`, whose place is left as it was.
    """
    found, stored = iter(batches), record_batches(file, begin)
    while True:
        here = file.tell()
        known = next(stored, None)
        file.seek(here)
        if known is not None:
            check_batch(known, shard, corpus)
        batch = next(found, None)
        if batch is None:
            return
        if known is None:
            raise OSError("a batch lies outside the stream")
        yield batch


class Stored(NamedTuple):
    """A record batch, with the dictionaries before it: bytes in the file, bytes in memory, and rows."""

    packed: int
    unpacked: int
    n_rows: int


def check_batch(stored: Stored, shard: "Shard", corpus: Corpus) -> None:
    """Refuse a record batch before it is read, as a whole, into memory."""
    check_unpacked(stored.unpacked, stored.packed, shard.source, corpus)
    if stored.unpacked > corpus.max_row_mb * MB * max(stored.n_rows, 1):
        raise long_row(shard.source, corpus)


def record_batches(file: IO[bytes], at: int) -> Iterator[Stored]:
    """What the messages from byte `at` say of each record batch."""
    packed = unpacked = 0
    try:
        while (found := message(file, at)) is not None:
            compressed = sum(size_of(file, found.end - found.body + place, n) for place, n in found.buffers)
            packed += found.body
            unpacked += max(found.body, compressed)
            if found.kind == RECORD_BATCH:
                yield Stored(packed, unpacked, found.n_rows)
                packed = unpacked = 0
            at = found.end
    except (struct.error, ValueError) as error:
        raise OSError(f"a damaged message: {error}") from None


def size_of(file: IO[bytes], at: int, stored: int) -> int:
    """Bytes of a compressed buffer, which names them at its beginning; -1 there says that it is not compressed."""
    if stored < 8:
        return stored
    file.seek(at)
    [found] = struct.unpack("<q", file.read(8))
    return stored if found < 0 else int(found)


CONTINUES = 0xFFFFFFFF
"""Begins each message, but for the oldest files."""
DICTIONARY_BATCH, RECORD_BATCH = 2, 3


class Message(NamedTuple):
    """A message of Arrow's format: kind, rows, place and length of its compressed buffers in the body, the bytes of
    that, and where it ends in the file."""

    kind: int
    n_rows: int
    buffers: list[tuple[int, int]]
    body: int
    end: int


def message(file: IO[bytes], at: int) -> Message | None:
    """The message at a byte of the file, None at the end; its head is a flatbuffer (format/Message.fbs), a table of
    which points back to the list of where its fields are."""
    file.seek(at)
    start = file.read(8)
    if len(start) < 8:
        return None
    marker, length = struct.unpack("<Ii", start)
    begin = at + 8
    if marker != CONTINUES:
        begin, length = at + 4, marker
    if length <= 0:
        return None
    file.seek(begin)
    head = file.read(length)
    table = number(head, 0, "I")
    kind, body = value(head, table, 1, "B"), value(head, table, 3, "q")
    if body < 0:
        raise ValueError("its length is negative")
    end = begin + length + body
    if kind not in (DICTIONARY_BATCH, RECORD_BATCH):
        return Message(kind, 0, [], body, end)
    batch = follow(head, field(head, table, 2))
    if kind == DICTIONARY_BATCH:
        batch = follow(head, field(head, batch, 1))
    compressed = buffers(head, batch) if field(head, batch, 3) else []
    return Message(kind, value(head, batch, 0, "q"), compressed, body, end)


def buffers(head: bytes, batch: int) -> list[tuple[int, int]]:
    """Place and length of each buffer of a record batch."""
    listed = follow(head, field(head, batch, 2))
    places = range(listed + 4, listed + 4 + 16 * number(head, listed, "I"), 16)
    return [(number(head, place, "q"), number(head, place + 8, "q")) for place in places]


def field(head: bytes, table: int, which: int) -> int:
    """Where a field of a table is; 0 for one that is not there."""
    places, at = table - number(head, table, "i"), 4 + 2 * which
    offset = number(head, places + at, "H") if at < number(head, places, "H") else 0
    return table + offset if offset else 0


def value(head: bytes, table: int, which: int, kind: str) -> int:
    """A number in a field; 0 for one that is not there."""
    at = field(head, table, which)
    return number(head, at, kind) if at else 0


def follow(head: bytes, at: int) -> int:
    """Where a reference points."""
    return at + number(head, at, "I")


def number(head: bytes, at: int, kind: str) -> int:
    """A little-endian number."""
    return int(struct.unpack_from("<" + kind, head, at)[0])
