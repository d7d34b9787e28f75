"""Read and write corpora: formats, shards, sampling, atomic writes."""

import errno
import hashlib
import heapq
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from pipeline.config import Corpus
from pipeline.errors import UserError, needs

BATCH_ROWS = 2048
BATCH_BYTES = 64 * 2**20
"""Rows, and about so many bytes, are held at a time: memory is bounded by these, never by the corpus."""

SUFFIXES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    **{stem + pack: "jsonl" for stem in (".jsonl", ".ndjson", ".json") for pack in ("", ".gz", ".zst")},
}
PACKED = {".gz": "gzip", ".zst": "zstd"}
REMOTE = {"aiohttp", "azure", "botocore", "datasets", "gcsfs", "google", "httpx", "huggingface_hub", "requests"}
"""Packages whose exceptions say that something out there did not answer."""
ABSENT = object()
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ENTRY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


class Shard(NamedTuple):
    """One unit of a corpus: what it is called on the way out, and where and how it is read."""

    name: str
    source: str
    format: str
    part: int = 0


class Document(NamedTuple):
    """A sampled document. `gold` is a known quality, `stratum` the group it was drawn from."""

    id: str
    text: str
    gold: float | None = None
    stratum: str | None = None


@dataclass
class Counts:
    """What reading met on its way."""

    n_rows: int = 0
    n_empty: int = 0
    n_bad_rows: int = 0
    n_repaired_texts: int = 0


# -- finding shards ---------------------------------------------------------------------------------------------------


def shards(corpus: Corpus) -> list[Shard]:
    """The shards of a corpus in the order of their names."""
    if not corpus.path:
        raise UserError("corpus.path is not set; give it in the recipe or as --corpus.path data/")
    fs, root = filesystem(corpus.path)
    with reaching(corpus.path):
        files, base = data_files(fs, root, corpus)
    if files is not None:
        return name_shards(fs, files, base, corpus.path)
    if looks_like_hub_name(corpus.path):
        return hub_shards(corpus)
    raise UserError(f"corpus.path: {corpus.path} does not exist; give a parquet or JSONL file or a folder of them")


def data_files(fs: Any, root: str, corpus: Corpus) -> tuple[list[str] | None, str]:
    """The files of a path, and the folder their names start from; None if nothing is there."""
    if fs.isfile(root):
        return [root], root.rpartition("/")[0]
    if fs.isdir(root):
        return folder_files(fs, root, corpus)
    if not has_magic(root):
        return None, root
    base = re.split(r"[*?\[]", root)[0].rpartition("/")[0]
    found = fs.glob(root, detail=True).items()
    return visible([file for file, info in found if info["type"] == "file"], base), base


def folder_files(fs: Any, root: str, corpus: Corpus) -> tuple[list[str], str]:
    """Data files below a folder; a save_to_disk folder names its own, for others may lie beside them (caches)."""
    splits = note(fs, f"{root}/dataset_dict.json").get("splits")
    if splits and corpus.split not in splits:
        raise UserError(f"corpus.split: {corpus.path} has no split {corpus.split!r}; there are: {', '.join(splits)}")
    if splits:
        root = f"{root}/{corpus.split}"
    parts = note(fs, f"{root}/state.json").get("_data_files")
    if parts is not None:
        return [f"{root}/{part['filename']}" for part in parts], root
    files = visible(fs.find(root), root)
    return [file for file in files if not file.lower().endswith(".json")] or files, root


def note(fs: Any, path: str) -> dict[str, Any]:
    """What a JSON file of `datasets` says; nothing if it is not there."""
    try:
        said = json.loads(fs.cat_file(path))
        return said if isinstance(said, dict) else {}
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({first_line(error)}); save the dataset again") from None


def visible(files: list[str], base: str) -> list[str]:
    """The files whose names below `base`, and whose folders', begin with neither a dot nor an underscore."""
    return [file for file in files if not re.search(r"/[._]", file[len(base) :])]


def name_shards(fs: Any, files: list[str], base: str, path: str) -> list[Shard]:
    """Shards with output names relative to `base`, one format, no name twice."""
    known = [file for file in files if format_of(file)]
    if not known:
        raise UserError(f"corpus.path: {path} holds no parquet, JSONL or Arrow file")
    formats = {format_of(file): "*" + suffix_of(file) for file in known}
    if len(formats) > 1:
        mixed = " and ".join(sorted(formats))
        raise UserError(f"corpus.path: {path} mixes {mixed} files; choose with a glob such as {min(formats.values())}")
    names = [parquet_name(file[len(base) :].lstrip("/")) for file in known]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"corpus.path: two files of {path} would both be written as {repeated[0]}; rename one")
    sources = known if "file" in fs.protocol else [fs.unstrip_protocol(file) for file in known]
    return sorted(Shard(name, source, format_of(source)) for name, source in zip(names, sources, strict=True))


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path on it."""
    protocol = path.split("://")[0]
    if "::" in path:
        raise UserError(f"corpus.path: {path} is a chain of filesystems, which is not understood; unpack it first")
    try:
        return fsspec.core.url_to_fs(path)  # type: ignore[no-any-return]
    except ImportError as error:
        raise UserError(f"corpus.path: {path} needs a package: {error}") from None
    except ValueError as error:
        raise UserError(f"corpus.path: {path}: {protocol}:// is not understood ({error})") from None


def has_magic(path: str) -> bool:
    """Whether a path is a glob."""
    return any(sign in path for sign in "*?[")


def suffix_of(file: str) -> str:
    """The longest ending that tells a format; empty when it is none of ours."""
    return max((suffix for suffix in SUFFIXES if file.lower().endswith(suffix)), key=len, default="")


def format_of(file: str) -> str:
    """How a file is read, from its name; empty when it is none of ours."""
    return SUFFIXES.get(suffix_of(file), "")


def parquet_name(name: str) -> str:
    """The name of a shard on the way out: the same, always parquet."""
    return name[: -len(suffix_of(name))] + ".parquet"


def fingerprint(shard: Shard) -> str:
    """Size, first and last 64 KiB of a shard as 16 hex digits: enough to notice another file under the same name."""
    if shard.format == "hub":
        return hashlib.sha256(repr(shard).encode()).hexdigest()[:16]
    fs, path = filesystem(shard.source)
    with reading(shard), fs.open(path, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        ends = []
        for start in (0, max(0, size - 65536)):
            file.seek(start)
            ends.append(file.read(65536))
    return hashlib.sha256(str(size).encode() + b"".join(ends)).hexdigest()[:16]


# -- reading ----------------------------------------------------------------------------------------------------------


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


@contextmanager
def reading(shard: Shard) -> Iterator[None]:
    """Turn what a damaged or missing file raises into one line that names the shard."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{shard.source} is missing; put it back, or give the corpus as it is now") from None
    except Exception as error:
        if not from_outside(error):
            raise
        why = first_line(error)
        raise UserError(f"{shard.source} cannot be read as {shard.format} ({why}); replace or remove it") from None


@contextmanager
def reaching(path: str) -> Iterator[None]:
    """Turn what a store that does not answer raises into one line."""
    try:
        yield
    except Exception as error:
        if not from_outside(error):
            raise
        why = first_line(error)
        raise UserError(f"corpus.path: {path} is out of reach ({why}); check name, network and credentials") from None


def from_outside(error: Exception) -> bool:
    """Whether files or the network are to blame: everything else is a bug and keeps its traceback."""
    package = type(error).__module__.split(".")[0]
    return isinstance(error, pa.ArrowException | OSError | UnicodeDecodeError) or package in REMOTE


def first_line(error: Exception) -> str:
    """What an exception says, fit to stand in our own line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


@contextmanager
def opened(shard: Shard) -> Iterator[IO[bytes]]:
    """The bytes of a shard, decompressed. Arrow's decompressor, unlike zstandard's reader, notices a cut file."""
    fs, path = filesystem(shard.source)
    packing = next((kind for suffix, kind in PACKED.items() if path.lower().endswith(suffix)), None)
    with fs.open(path, "rb") as file:
        if packing is None:
            yield file
            return
        if file.seek(0, io.SEEK_END) == 0:
            raise OSError("0 bytes")
        file.seek(0)
        with pa.CompressedInputStream(file, packing) as stream, io.BufferedReader(stream) as unpacked:
            yield unpacked


# -- parquet and Arrow ------------------------------------------------------------------------------------------------


def read_parquet(shard: Shard, _: Corpus, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream a parquet shard. Page headers have no checksum, and damage there ends the rows early: so count them."""
    with opened(shard) as file:
        reader = open_parquet(file, shard)
        wanted = None if columns is None else [check_column(reader.schema_arrow, name, shard) for name in columns]
        missing = reader.metadata.num_rows
        for batch in reader.iter_batches(rows_at_a_time(reader.metadata), columns=wanted):
            missing -= batch.num_rows
            yield batch
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


def read_arrow(shard: Shard, _: Corpus, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream an Arrow shard."""
    with opened(shard) as file:
        yield from in_pieces(open_arrow(file, shard)[1], shard, columns)


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


def in_pieces(batches: Iterable[pa.RecordBatch], shard: Shard, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Record batches cut to BATCH_ROWS rows and to the columns asked for."""
    for batch in batches:
        wanted = batch if columns is None else batch.select(tops(batch.schema, columns, shard))
        for start in range(0, batch.num_rows, BATCH_ROWS):
            yield wanted.slice(start, BATCH_ROWS)


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
    with opened(shard) as file:
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
    for number, line in enumerate(file, 1):
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


# -- sampling ---------------------------------------------------------------------------------------------------------


def sample(
    corpus: Corpus, size: int, seed: int, stratify_by: str | None = None, gold_column: str | None = None
) -> tuple[list[Document], Counts]:
    """A seeded sample of the distinct, non-empty texts of the whole corpus.

    Every text has a priority, the hash of seed and content, and the smallest ones are drawn (bottom-k): uniform, one
    pass, memory of a few times `size` documents, and the same however the corpus is cut into shards. With
    `stratify_by` the places are shared out equally among the values of that column (`size` of them, drawn the same
    way, if there are more), and what small strata leave goes to the others.
    """
    counts, everything = Counts(), Smallest()
    strata: dict[str, Smallest] = {}
    for shard in shards(corpus):
        for documents in documents_of(shard, corpus, counts, stratify_by, gold_column):
            for document in documents:
                rank = priority(text_id(document.text), seed)
                everything.add(rank, document, size)
                if document.stratum is not None:
                    strata.setdefault(document.stratum, Smallest()).add(rank, document, size)
            trim(strata, size, seed)
    return share_out(strata, everything, size), counts


def priority(name: str, seed: int) -> int:
    """A number of 64 bits as good as drawn at random, always the same for a name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "big")


class Smallest:
    """The documents with the smallest priorities so far, one per text."""

    def __init__(self) -> None:
        self.documents: dict[int, Document] = {}
        self.heap: list[int] = []

    def add(self, rank: int, document: Document, size: int) -> None:
        """Take a document in if it is among the `size` smallest; which of one text's copies stays is settled too."""
        if rank in self.documents:
            self.documents[rank] = min(self.documents[rank], document, key=copy_order)
        elif len(self.heap) < size or rank < -self.heap[0]:
            heapq.heappush(self.heap, -rank)
            self.documents[rank] = document
            self.keep(size)

    def keep(self, size: int) -> None:
        """Drop the largest priorities beyond `size`."""
        while len(self.heap) > size:
            del self.documents[-heapq.heappop(self.heap)]


def copy_order(document: Document) -> tuple[str, str, bool, float]:
    """Of two copies of a text the smaller id counts, then the smaller stratum, then a known quality."""
    return document.id, document.stratum or "", document.gold is None, document.gold or 0.0


def trim(strata: dict[str, Smallest], size: int, seed: int) -> None:
    """Drop what cannot be drawn any more: shares only fall as documents come, so none of it is missed later."""
    for name in sorted(strata, key=lambda name: priority(name, seed))[size:]:
        del strata[name]
    largest = largest_share([len(stratum.heap) for stratum in strata.values()], size)
    for stratum in strata.values():
        stratum.keep(largest)


def largest_share(available: list[int], size: int) -> int:
    """Most places that any stratum gets when `size` are shared out equally, as far as each can fill them."""
    largest, left = 0, size
    for position, n in enumerate(sorted(available)):
        share = min(n, -(-left // (len(available) - position)))
        largest, left = max(largest, share), left - share
    return largest


def share_out(strata: dict[str, Smallest], everything: Smallest, size: int) -> list[Document]:
    """Equal shares, smallest strata first, no text twice; places left over (all, without strata) go to any text."""
    drawn: dict[int, Document] = {}
    order = sorted(strata, key=lambda name: (len(strata[name].heap), name))
    for position, name in enumerate(order):
        share = -(-(size - len(drawn)) // (len(order) - position))
        drawn |= next_smallest(strata[name], drawn, share)
    drawn |= next_smallest(everything, drawn, size - len(drawn))
    return [document for _, document in sorted(drawn.items())]


def next_smallest(pool: Smallest, drawn: dict[int, Document], places: int) -> dict[int, Document]:
    """The first documents of a pool, by priority, that are not drawn yet."""
    fresh = sorted(rank for rank in pool.documents if rank not in drawn)
    return {rank: pool.documents[rank] for rank in fresh[:places]}


def documents_of(
    shard: Shard, corpus: Corpus, counts: Counts, stratify_by: str | None, gold_column: str | None
) -> Iterator[list[Document]]:
    """The non-empty documents of a shard, batch by batch."""
    names = [corpus.text_column, corpus.id_column, stratify_by, gold_column]
    for batch in read(shard, corpus, counts, list(dict.fromkeys(name for name in names if name))):
        found = texts(batch, corpus, shard, counts)
        ids, strata, golds = (values(batch, name, shard) for name in names[1:])
        counts.n_empty += sum(map(is_empty, found))
        yield [
            Document(
                id=text_id(text) if id_ is None else str(id_),
                text=text,
                gold=gold_value(gold, gold_column, shard),
                stratum=str(stratum) if stratify_by else None,
            )
            for text, id_, stratum, gold in zip(found, ids, strata, golds, strict=True)
            if text is not None and not is_empty(text)
        ]


def values(batch: pa.RecordBatch, name: str | None, shard: Shard) -> list[Any]:
    """A column as Python values; all None when there is no such column to read."""
    return decoded(column(batch, name, shard))[0] if name else [None] * batch.num_rows


def gold_value(value: Any, name: str | None, shard: Shard) -> float | None:
    """A known quality as a number; NaN, which pandas writes for a missing one, is none."""
    if value is None or value != value:
        return None
    if isinstance(value, bool | int | float | Decimal):
        return float(value)
    raise UserError(f"{shard.source}: gold column {name!r} holds {value!r}; it must be true/false or a number")


# -- the Hub ----------------------------------------------------------------------------------------------------------


def looks_like_hub_name(path: str) -> bool:
    """Whether a path could be owner/name on the Hub."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) is not None and not format_of(path)


@lru_cache(maxsize=4)
def load_hub_dataset(path: str, subset: str | None, split: str) -> Any:
    """A streaming dataset; it is read a batch at a time and never stored."""
    datasets = needs("datasets", "datasets")
    try:
        return datasets.load_dataset(path, subset, split=split, streaming=True)
    except Exception as error:
        if not (from_outside(error) or isinstance(error, ValueError)):
            raise
        raise UserError(
            f"corpus.path: {path} does not exist here and is no Hub dataset within reach ({first_line(error)})"
        ) from None


def hub_shards(corpus: Corpus) -> list[Shard]:
    """One shard per shard of the Hub dataset."""
    count = load_hub_dataset(corpus.path or "", corpus.subset, corpus.split).num_shards
    names = [f"{corpus.split}-{index:05d}-of-{count:05d}.parquet" for index in range(count)]
    return [Shard(name, f"{corpus.path} {name}", "hub", index) for index, name in enumerate(names)]


def read_hub(shard: Shard, corpus: Corpus, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream one shard of a Hub dataset."""
    dataset = load_hub_dataset(corpus.path, corpus.subset, corpus.split)
    part = dataset.shard(num_shards=dataset.num_shards, index=shard.part).with_format("arrow")
    tables = part.iter(batch_size=BATCH_ROWS)
    yield from in_pieces((batch for table in tables for batch in table.to_batches()), shard, columns)


def hub_schema(_: Shard, corpus: Corpus) -> pa.Schema | None:
    """The schema of a Hub dataset, if it is known without reading (JSON lines do not say)."""
    features = load_hub_dataset(corpus.path, corpus.subset, corpus.split).features
    return features.arrow_schema if features else None


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; synced and renamed to it if the block succeeds, removed if it fails."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that cannot be written to, into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*NO_ROOM, *NO_ENTRY):
            raise
        why = os.strerror(error.errno).lower()
        raise UserError(
            f"cannot write {path}: {why}; make room or give another folder, then run the same command again"
        ) from None


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def shard_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer of a parquet shard with page checksums, which is there whole or not at all."""
    with (
        atomic(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        yield writer


def write_table(path: Path, table: pa.Table) -> None:
    """Write a small table whole or not at all."""
    with shard_writer(path, table.schema) as writer:
        writer.write_table(table)


def sweep(folder: Path, keep: set[str] | None = None) -> None:
    """Remove what killed writers left and, if given, every shard that is not to be kept."""
    for path in folder.rglob("*"):
        stale = path.name.startswith(".") and path.name.endswith(".tmp")
        foreign = keep is not None and path.relative_to(folder).as_posix() not in keep
        if path.is_file() and (stale or foreign):
            path.unlink(missing_ok=True)
