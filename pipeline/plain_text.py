"""Plain text as rows of a corpus: paragraphs, or lines."""

import codecs
from collections.abc import Iterator
from typing import IO

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.formats import BATCH_BYTES, BATCH_ROWS, check_column
from pipeline.shards import Counts, Shard, opened

TEXT_SCHEMA = pa.schema([("text", pa.string())])
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(shard: Shard, counts: Counts, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream plain text: blank lines separate rows, which keep their line breaks; in a file without a blank line
    between others each line is a row. Bytes that are not UTF-8 become U+FFFD and are counted."""
    for name in columns or []:
        check_column(TEXT_SCHEMA, name, shard)
    rows: list[str] = []
    n_bytes = 0
    for raw in raw_rows(shard):
        row = raw.decode("utf-8", "replace")
        counts.n_repaired_texts += row.encode() != raw
        rows.append(row.replace("\r\n", "\n"))
        n_bytes += len(raw)
        if len(rows) == BATCH_ROWS or n_bytes >= BATCH_BYTES:
            yield pa.record_batch([rows], schema=TEXT_SCHEMA)
            rows, n_bytes = [], 0
    if rows:
        yield pa.record_batch([rows], schema=TEXT_SCHEMA)


def raw_rows(shard: Shard) -> Iterator[bytes]:
    """The bytes of each row, without the blank ones."""
    by_paragraph = has_paragraphs(shard)
    lines: list[bytes] = []
    with opened(shard) as file:
        for number, line in enumerate(text_lines(file, shard), 1):
            if lines and (line.isspace() or not by_paragraph):
                yield b"".join(lines).rstrip()
                lines = []
            if not line.isspace():
                lines.append(line)
            check_paragraph(lines, number, shard)
    if lines:
        yield b"".join(lines).rstrip()


def has_paragraphs(shard: Shard) -> bool:
    """Whether a blank line stands between others: the file is read as far as the first."""
    texts = blanks = 0
    with opened(shard) as file:
        for line in text_lines(file, shard):
            blanks += bool(texts) and line.isspace()
            texts += not line.isspace()
            if blanks and not line.isspace():
                return True
    return False


def text_lines(file: IO[bytes], shard: Shard) -> Iterator[bytes]:
    """Lines of UTF-8, without the mark that may begin them."""
    for number, line in enumerate(file):
        if number == 0 and line.startswith(UTF_16):
            raise UserError(f"{shard.source} is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
        yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line


def check_paragraph(lines: list[bytes], number: int, shard: Shard) -> None:
    """Refuse a paragraph that does not fit into a batch."""
    if len(lines) % 1024 == 1023 and sum(map(len, lines)) > BATCH_BYTES:
        raise UserError(
            f"{shard.source} line {number}: a paragraph of more than {BATCH_BYTES >> 20} MiB; put blank lines between"
            " paragraphs, or leave no blank line, and each line is a row"
        )
