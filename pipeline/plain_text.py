"""Plain text as rows of a corpus: paragraphs, or lines."""

import codecs
from collections.abc import Iterator
from typing import IO

import pyarrow as pa

from pipeline.config import Corpus
from pipeline.errors import UserError
from pipeline.formats import BATCH_BYTES, BATCH_ROWS, check_column
from pipeline.limits import MB, lines, long_row
from pipeline.shards import Counts, Shard, opened

TEXT_SCHEMA = pa.schema([("text", pa.string())])
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(shard: Shard, corpus: Corpus, counts: Counts, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream plain text: blank lines separate rows, which keep their line breaks; in a file without a blank line
    between others each line is a row. Bytes that are not UTF-8 become U+FFFD and are counted."""
    for name in columns or []:
        check_column(TEXT_SCHEMA, name, shard)
    rows: list[str] = []
    n_bytes = 0
    for raw in raw_rows(shard, corpus):
        row = raw.decode("utf-8", "replace")
        counts.n_repaired_texts += row.encode() != raw
        rows.append(row.replace("\r\n", "\n"))
        n_bytes += len(raw)
        if len(rows) == BATCH_ROWS or n_bytes >= BATCH_BYTES:
            yield pa.record_batch([rows], schema=TEXT_SCHEMA)
            rows, n_bytes = [], 0
    if rows:
        yield pa.record_batch([rows], schema=TEXT_SCHEMA)


def raw_rows(shard: Shard, corpus: Corpus) -> Iterator[bytes]:
    """The bytes of each row, without the blank ones."""
    by_paragraph = has_paragraphs(shard, corpus)
    paragraph: list[bytes] = []
    n_bytes, most = 0, corpus.max_row_mb * MB
    with opened(shard, corpus) as file:
        for number, line in text_lines(file, shard, corpus):
            if paragraph and (line.isspace() or not by_paragraph):
                yield b"".join(paragraph).rstrip()
                paragraph, n_bytes = [], 0
            if not line.isspace():
                paragraph.append(line)
                n_bytes += len(line)
                if n_bytes > most:
                    raise long_row(f"{shard.source} line {number}", corpus, WAY_OUT)
    if paragraph:
        yield b"".join(paragraph).rstrip()


WAY_OUT = "put blank lines between paragraphs, or leave no blank line, and each line is a row"


def has_paragraphs(shard: Shard, corpus: Corpus) -> bool:
    """Whether a blank line stands between others: the file is read as far as the first."""
    texts = blanks = 0
    with opened(shard, corpus) as file:
        for _, line in text_lines(file, shard, corpus):
            blanks += bool(texts) and line.isspace()
            texts += not line.isspace()
            if blanks and not line.isspace():
                return True
    return False


def text_lines(file: IO[bytes], shard: Shard, corpus: Corpus) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of UTF-8, without the mark that may begin them."""
    numbered = lines(file, shard, corpus, None)
    for number, first in numbered:
        if first.startswith(UTF_16):
            raise UserError(f"{shard.source} is UTF-16; save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
        yield number, first.removeprefix(codecs.BOM_UTF8)
        yield from numbered
