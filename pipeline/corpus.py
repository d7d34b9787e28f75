"""Read and write corpora: formats, shards, sampling, atomic writes."""

import errno
import gzip
import hashlib
import heapq
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq
import zstandard

from pipeline.config import Corpus
from pipeline.errors import UserError, needs

BATCH_ROWS = 2048
"""Rows held at a time: memory is bounded by this, never by the corpus."""

SUFFIXES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    **{stem + pack: "jsonl" for stem in (".jsonl", ".ndjson", ".json") for pack in ("", ".gz", ".zst")},
}
UNREADABLE = (pa.ArrowInvalid, pa.ArrowNotImplementedError, EOFError, zstandard.ZstdError, OSError)


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
    strata: Counter[str] = field(default_factory=Counter)


# -- finding shards ---------------------------------------------------------------------------------------------------


def shards(corpus: Corpus) -> list[Shard]:
    """The shards of a corpus in the order of their names."""
    if corpus.path is None:
        raise UserError("corpus.path is not set; give it in the recipe or as --corpus.path data/")
    fs, root = filesystem(corpus.path)
    if has_magic(root):
        files = [file for file in fs.glob(root) if format_of(file)]
        base = re.split(r"[*?\[]", root)[0].rsplit("/", 1)[0]
    elif fs.isfile(root):
        files, base = [root], root.rsplit("/", 1)[0]
    elif fs.isdir(root):
        files, base = folder_files(fs, root, corpus)
    elif looks_like_hub_name(corpus.path):
        return hub_shards(corpus)
    else:
        raise UserError(f"corpus.path: {corpus.path} does not exist; give a parquet or JSONL file or a folder of them")
    return name_shards(fs, files, base, corpus.path)


def name_shards(fs: Any, files: list[str], base: str, path: str) -> list[Shard]:
    """Shards with output names relative to `base`, one format, no name twice."""
    known = [file for file in files if format_of(file)]
    if not known:
        raise UserError(f"corpus.path: {path} holds no parquet, JSONL or Arrow file")
    formats = sorted({format_of(file) for file in known})
    if len(formats) > 1:
        raise UserError(
            f"corpus.path: {path} mixes {' and '.join(formats)} files; choose with a glob such as {path}/*"
        )
    found = [
        Shard(parquet_name(file[len(base) :].lstrip("/")), fs.unstrip_protocol(file), formats[0]) for file in known
    ]
    repeated = [name for name, count in Counter(shard.name for shard in found).items() if count > 1]
    if repeated:
        raise UserError(f"corpus.path: two files of {path} would both be written as {repeated[0]}; rename one")
    return found if "state.json" in files else sorted(found)


def folder_files(fs: Any, root: str, corpus: Corpus) -> tuple[list[str], str]:
    """Data files below a folder; a save_to_disk folder gives the ones its state names, in its order."""
    if fs.exists(f"{root}/dataset_dict.json"):
        root = f"{root}/{corpus.split}"
        if not fs.exists(root):
            raise UserError(f"corpus.split: {root} does not exist; the folder holds other splits")
    if fs.exists(f"{root}/state.json"):
        state = json.loads(fs.cat_file(f"{root}/state.json"))
        return [f"{root}/{part['filename']}" for part in state["_data_files"]], root
    hidden = re.compile(r"/[._]")
    files = [file for file in fs.find(root) if not hidden.search(file[len(root) :])]
    return [file for file in files if not file.endswith(".json")], root


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path on it."""
    protocol = path.split("://")[0]
    try:
        return fsspec.core.url_to_fs(path)  # type: ignore[no-any-return]
    except ImportError as error:
        raise UserError(f"corpus.path: {path} needs a package: {error}") from None
    except ValueError as error:
        raise UserError(f"corpus.path: {path}: {protocol}:// is not understood ({error})") from None


def has_magic(path: str) -> bool:
    """Whether a path is a glob."""
    return any(sign in path for sign in "*?[")


def format_of(file: str) -> str:
    """How a file is read, from its name; empty when it is none of ours."""
    name = file.rsplit("/", 1)[-1].lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), "")


def parquet_name(name: str) -> str:
    """The name of a shard on the way out: the same, always parquet."""
    suffix = max((s for s in SUFFIXES if name.lower().endswith(s)), key=len)
    return name[: -len(suffix)] + ".parquet"


def fingerprint(shard: Shard) -> str:
    """Size, first and last 64 KiB of a shard as 16 hex digits: enough to notice another file under the same name."""
    if shard.format == "hub":
        return hashlib.sha256(repr(shard).encode()).hexdigest()[:16]
    fs, path = filesystem(shard.source)
    size = fs.size(path)
    ends = fs.cat_file(path, start=0, end=min(size, 65536)) + fs.cat_file(path, start=max(0, size - 65536), end=size)
    return hashlib.sha256(str(size).encode() + ends).hexdigest()[:16]


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
        "jsonl": read_jsonl,
        "hub": read_hub,
    }
    for batch in readers[shard.format](shard, corpus, counts, columns):
        yield conform(batch, schema) if schema else batch


def read_schema(shard: Shard, corpus: Corpus) -> pa.Schema:
    """The schema of a whole shard; JSONL is read through for it."""
    if shard.format == "parquet":
        with reading(shard), open_source(shard) as file:
            return pq.ParquetFile(file).schema_arrow
    if shard.format != "jsonl":
        return next((batch.schema for batch in read(shard, corpus, Counts())), pa.schema([]))
    schema = pa.schema([])
    for batch in read(shard, corpus, Counts()):
        schema = unify(schema, batch.schema, shard)
    return schema


def n_rows(found: Iterable[Shard]) -> int | None:
    """Rows of a corpus, when the files say so without being read."""
    total = 0
    for shard in found:
        if shard.format != "parquet":
            return None
        with reading(shard), open_source(shard) as file:
            total += pq.ParquetFile(file).metadata.num_rows
    return total


def read_parquet(shard: Shard, _: Corpus, counts: Counts, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream a parquet shard."""
    with reading(shard), open_source(shard) as file:
        reader = pq.ParquetFile(file, page_checksum_verification=True)
        wanted = None if columns is None else [check_column(reader.schema_arrow, name, shard) for name in columns]
        for batch in reader.iter_batches(BATCH_ROWS, columns=wanted):
            counts.n_rows += batch.num_rows
            yield batch


def read_arrow(shard: Shard, _: Corpus, counts: Counts, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream an Arrow shard, in the stream format (save_to_disk) or the file format (Feather)."""
    with reading(shard), open_source(shard) as file:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            reader = pa.ipc.open_file(file)
            batches: Iterable[pa.RecordBatch] = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = pa.ipc.open_stream(file)
        yield from in_pieces(batches, shard, counts, columns)


def read_hub(shard: Shard, corpus: Corpus, counts: Counts, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream one shard of a Hub dataset through `datasets`."""
    dataset = load_hub_dataset(corpus.path, corpus.subset, corpus.split)
    part = dataset.shard(num_shards=dataset.num_shards, index=shard.part).with_format("arrow")
    tables = part.iter(batch_size=BATCH_ROWS)
    yield from in_pieces((batch for table in tables for batch in table.to_batches()), shard, counts, columns)


def in_pieces(
    batches: Iterable[pa.RecordBatch], shard: Shard, counts: Counts, columns: list[str] | None
) -> Iterator[pa.RecordBatch]:
    """Record batches cut to BATCH_ROWS rows and to the columns asked for."""
    for batch in batches:
        wanted = batch
        if columns is not None:
            tops = [check_column(batch.schema, name, shard).split(".")[0] for name in columns]
            wanted = batch.select(list(dict.fromkeys(tops)))
        for start in range(0, batch.num_rows, BATCH_ROWS):
            piece = wanted.slice(start, BATCH_ROWS)
            counts.n_rows += piece.num_rows
            yield piece


def read_jsonl(shard: Shard, corpus: Corpus, counts: Counts, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """Stream JSON lines; each batch carries the types of its own rows."""
    tops = None if columns is None else list(dict.fromkeys(name.split(".")[0] for name in columns))
    rows: list[dict[str, Any]] = []
    with reading(shard), open_source(shard) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = parse_line(line, number, shard, corpus.skip_bad_rows)
            counts.n_rows += 1
            if row is None:
                counts.n_bad_rows += 1
                continue
            rows.append(row)
            if len(rows) == BATCH_ROWS:
                yield to_batch(rows, tops, number, shard, counts)
                rows = []
        if rows:
            yield to_batch(rows, tops, number, shard, counts)


def parse_line(line: bytes, number: int, shard: Shard, skip: bool) -> dict[str, Any] | None:
    """One JSON object; None for a bad line that is to be skipped."""
    try:
        row = json.loads(line.decode("utf-8"))
        if isinstance(row, dict):
            return row
        problem = "not a JSON object"
    except UnicodeDecodeError:
        problem = "not valid UTF-8"
    except (ValueError, RecursionError) as error:
        problem = f"not JSON ({error})"
    if skip:
        return None
    raise UserError(f"{shard.source} line {number} is {problem}; mend it, or leave it out with --corpus.skip-bad-rows")


def to_batch(
    rows: list[dict[str, Any]], columns: list[str] | None, number: int, shard: Shard, counts: Counts
) -> pa.RecordBatch:
    """Parsed JSON rows as one record batch; lone surrogates, which no Arrow string can hold, become U+FFFD."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    if columns is not None:
        for name in columns:
            check_column(pa.schema([(known, pa.null()) for known in names]), name, shard)
        names = columns
    try:
        return pa.RecordBatch.from_pydict({name: [row.get(name) for row in rows] for name in names})
    except UnicodeEncodeError:
        repaired = [without_surrogates(row) for row in rows]
        counts.n_repaired_texts += sum(a != b for a, b in zip(rows, repaired, strict=True))
        return to_batch(repaired, columns, number, shard, counts)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        at = f"lines up to {number}"
        raise UserError(
            f"{shard.source} {at}: a column holds values of several types ({error}); make it one"
        ) from None


def without_surrogates(value: Any) -> Any:
    """JSON with every lone surrogate replaced by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(key): without_surrogates(item) for key, item in value.items()}
    return value


def unify(schema: pa.Schema, other: pa.Schema, shard: Shard) -> pa.Schema:
    """One schema that holds both."""
    try:
        return pa.unify_schemas([schema, other], promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{shard.source}: a column changes its type within the file ({error}); make it one") from None


def conform(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """A batch under a wider schema: absent columns are null."""
    if batch.schema.equals(schema):
        return batch
    columns = [
        batch.column(f.name).cast(f.type) if f.name in batch.schema.names else pa.nulls(len(batch), f.type)
        for f in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


@contextmanager
def reading(shard: Shard) -> Iterator[None]:
    """Turn what a damaged file raises into one line that names the shard."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{shard.source} is gone; it was there when the corpus was listed") from None
    except UNREADABLE as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"{shard.source} cannot be read as {shard.format} ({reason}); replace or remove it") from None


def open_source(shard: Shard) -> IO[bytes]:
    """The bytes of a shard, decompressed."""
    fs, path = filesystem(shard.source)
    file = fs.open(path, "rb")
    if path.endswith(".gz"):
        return gzip.open(file)  # type: ignore[return-value]
    if path.endswith(".zst"):
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
    return file  # type: ignore[no-any-return]


# -- columns ----------------------------------------------------------------------------------------------------------


def check_column(schema: pa.Schema, name: str, shard: Shard) -> str:
    """The column name, if the schema has it (a dot reaches into structs)."""
    if name in schema.names or name.split(".")[0] in schema.names:
        return name
    there = ", ".join(schema.names) or "none"
    raise UserError(f"{shard.source} has no column {name!r}; there are: {there}")


def column(batch: pa.RecordBatch, name: str, shard: Shard) -> pa.Array:
    """A column by name; content.text reaches into a struct."""
    check_column(batch.schema, name, shard)
    if name in batch.schema.names:
        return batch.column(name)
    top, *path = name.split(".")
    try:
        return pc.struct_field(batch.column(top), path)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(f"{shard.source} has no field {name!r}; {top} is {batch.schema.field(top).type}") from None


def texts(batch: pa.RecordBatch, corpus: Corpus, shard: Shard, counts: Counts) -> list[str | None]:
    """The documents of a batch; bytes that are not UTF-8 become U+FFFD and are counted."""
    array = column(batch, corpus.text_column, shard)
    kind = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not is_text and not pa.types.is_null(kind):
        raise UserError(f"{shard.source}: text column {corpus.text_column!r} holds {kind}, not text")
    try:
        return array.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        raw = array.cast(pa.string()).view(pa.binary()).to_pylist()
        decoded = [None if value is None else value.decode("utf-8", "replace") for value in raw]
        counts.n_repaired_texts += sum(
            v is not None and d is not None and d.encode() != v for v, d in zip(raw, decoded, strict=True)
        )
        return decoded


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
    pass, memory of `size` documents, and the same however the corpus is cut into shards. With `stratify_by` the
    places are shared out equally among the values of that column, and what small strata leave goes to the others.
    """
    counts = Counts()
    drawn: dict[str, Stratum] = {}
    for shard in shards(corpus):
        for documents in documents_of(shard, corpus, counts, stratify_by, gold_column):
            for document in documents:
                drawn.setdefault(document.stratum or "", Stratum()).add(document, seed, size)
            trim(drawn, size)
    for name, places in quotas({name: len(stratum.heap) for name, stratum in drawn.items()}, size).items():
        drawn[name].keep(places)
    chosen = sorted(item for stratum in drawn.values() for item in stratum.items())
    return [document for _, document in chosen], counts


class Stratum:
    """The documents of one stratum with the smallest priorities so far."""

    def __init__(self) -> None:
        self.heap: list[tuple[int, str]] = []
        self.documents: dict[str, Document] = {}

    def add(self, document: Document, seed: int, size: int) -> None:
        """Take a document in if it is among the `size` smallest; of one text's copies the smallest id stays."""
        key = text_id(document.text)
        if key in self.documents:
            self.documents[key] = min(self.documents[key], document, key=lambda d: d.id)
            return
        priority = int.from_bytes(hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "big")
        if len(self.heap) == size and priority >= -self.heap[0][0]:
            return
        heapq.heappush(self.heap, (-priority, key))
        self.documents[key] = document
        self.keep(size)

    def keep(self, size: int) -> None:
        """Drop the largest priorities beyond `size`."""
        while len(self.heap) > size:
            del self.documents[heapq.heappop(self.heap)[1]]

    def items(self) -> list[tuple[int, Document]]:
        """(priority, document) pairs."""
        return [(-negative, self.documents[key]) for negative, key in self.heap]


def quotas(available: dict[str, int], size: int) -> dict[str, int]:
    """Places per stratum: equal shares of `size`; what a small stratum cannot fill goes to the larger ones."""
    places, left = {}, size
    for position, name in enumerate(sorted(available, key=lambda name: (available[name], name))):
        places[name] = min(available[name], -(-left // (len(available) - position)))
        left -= places[name]
    return places


def trim(drawn: dict[str, Stratum], size: int) -> None:
    """Cut every stratum to the largest quota; it only falls as documents come, so nothing dropped is missed later."""
    largest = max(quotas({name: len(stratum.heap) for name, stratum in drawn.items()}, size).values(), default=0)
    for stratum in drawn.values():
        stratum.keep(largest)


def documents_of(
    shard: Shard, corpus: Corpus, counts: Counts, stratify_by: str | None, gold_column: str | None
) -> Iterator[list[Document]]:
    """The non-empty documents of a shard, batch by batch."""
    names = [corpus.text_column, corpus.id_column, stratify_by, gold_column]
    for batch in read(shard, corpus, counts, [name for name in names if name]):
        found = texts(batch, corpus, shard, counts)
        ids, strata, golds = (values(batch, name, shard) for name in names[1:])
        counts.n_empty += sum(map(is_empty, found))
        counts.strata.update(str(stratum) for stratum in strata if stratify_by)
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
    return column(batch, name, shard).to_pylist() if name else [None] * batch.num_rows


def gold_value(value: Any, name: str | None, shard: Shard) -> float | None:
    """A known quality as a number."""
    if value is None or isinstance(value, bool | int | float):
        return None if value is None else float(value)
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
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).split("\n")[0][:200]
        raise UserError(
            f"corpus.path: {path} does not exist here and is no Hub dataset within reach ({reason})"
        ) from None


def hub_shards(corpus: Corpus) -> list[Shard]:
    """One shard per shard of the Hub dataset."""
    count = load_hub_dataset(corpus.path or "", corpus.subset, corpus.split).num_shards
    names = [f"{corpus.split}-{index:05d}-of-{count:05d}.parquet" for index in range(count)]
    return [Shard(name, f"{corpus.path} {name}", "hub", index) for index, name in enumerate(names)]


# -- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; synced and renamed to it if the block succeeds, removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            why = os.strerror(error.errno).lower()
            raise UserError(f"cannot write {path}: {why}; make room and run the same command again") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)


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
        foreign = keep is not None and path.is_file() and path.relative_to(folder).as_posix() not in keep
        if stale or foreign:
            path.unlink(missing_ok=True)
