"""The shards of a corpus: finding them by path or name, opening them, and saying what is wrong with one."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Corpus
from pipeline.errors import UserError, needs
from pipeline.limits import CHUNK, Unpacked

SUFFIXES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    **{stem + pack: "jsonl" for stem in (".jsonl", ".ndjson", ".json") for pack in ("", ".gz", ".zst")},
    **{".txt" + pack: "text" for pack in ("", ".gz", ".zst")},
}
NOTES = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
"""Files of `datasets` that lie beside the data."""
PACKED = {".gz": "gzip", ".zst": "zstd"}
LINES = ("jsonl", "text")
"""Formats that are read a line at a time."""
AS_USUAL = Corpus()
REMOTE = {"aiohttp", "azure", "botocore", "datasets", "gcsfs", "google", "httpx", "huggingface_hub", "requests"}
"""Packages whose exceptions say that something out there did not answer."""
AT_ONCE = 16
"""Shards that are looked at at a time."""
STORES = {
    "s3": {"use_listings_cache": False, "config_kwargs": {"connect_timeout": 10, "retries": {"max_attempts": 3}}},
    "gs": {"use_listings_cache": False},
}
"""Options of stores where fsspec's own configuration says nothing: other processes write there too, and one that does
not answer is given up within a minute."""
for _protocol, _options in STORES.items():
    fsspec.config.conf[_protocol] = _options | fsspec.config.conf.get(_protocol, {})
BESIDE = b"gristmill.beside"
"""Key of the note in a parquet file of scores alone that says which documents are scored."""


class Shard(NamedTuple):
    """One unit of a corpus: what it is called on the way out, and where and how it is read."""

    name: str
    source: str
    format: str
    part: int = 0


class Beside(NamedTuple):
    """The documents that a shard of scores alone lies beside, and their fingerprint when they were scored."""

    corpus: Corpus
    shard: Shard
    made_from: str


@dataclass
class Counts:
    """What reading met on its way."""

    n_rows: int = 0
    n_empty: int = 0
    n_bad_rows: int = 0
    n_repaired_texts: int = 0


# -- finding shards ---------------------------------------------------------------------------------------------------


def find_shards(corpus: Corpus) -> list[Shard]:
    """The shards of a corpus in the order of their names."""
    if not corpus.path:
        raise UserError("corpus.path is not set; give it in the recipe or as --corpus.path data/")
    fs, root = filesystem(corpus.path)
    with reaching(corpus.path):
        files, base = data_files(fs, root, corpus)
    if files is not None:
        return name_shards(fs, files, base, corpus.path)
    if looks_like_hub_name(corpus.path):
        check_no_local_folder(corpus.path)
        return hub_shards(corpus)
    raise UserError(
        f"corpus.path: {corpus.path} does not exist; give a parquet, JSONL or text file or a folder of them"
    )


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
        return [f"{root}/{part['filename'] if isinstance(part, dict) else part}" for part in parts], root
    return [file for file in visible(fs.find(root), root) if file.rpartition("/")[2] not in NOTES], root


def inside(name: str, folder: str) -> str:
    """The name of a file in a folder, unless it leads out of it."""
    if ".." in name.split("/") or "\0" in name:
        raise UserError(f"corpus.path: {folder} names the file {name!r}, which is not inside it; save the data again")
    return name


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
    """Shards with output names relative to `base`, one format, no name twice; beside data, plain text is no part of
    it (README.txt, LICENSE.txt)."""
    readable = [file for file in files if format_of(file)]
    known = [file for file in readable if format_of(file) != "text"] or readable
    if not known:
        raise UserError(f"corpus.path: {path} holds no parquet, JSONL, Arrow or text file")
    formats = {format_of(file): "*" + suffix_of(file) for file in known}
    if len(formats) > 1:
        mixed = " and ".join(sorted(formats))
        raise UserError(f"corpus.path: {path} mixes {mixed} files; choose with a glob such as {min(formats.values())}")
    names = [parquet_name(inside(file[len(base) :].lstrip("/"), path)) for file in known]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"corpus.path: two files of {path} would both be written as {repeated[0]}; rename one")
    sources = known if "file" in fs.protocol else [fs.unstrip_protocol(file) for file in known]
    return sorted(Shard(name, source, format_of(source)) for name, source in zip(names, sources, strict=True))


def filesystem(path: str, setting: str = "corpus.path") -> tuple[Any, str]:
    """The fsspec filesystem of a path or URL, and the path on it."""
    protocol = path.split("://")[0]
    if re.match(r"\w+://[^/]*@", path):
        raise UserError(f"{setting}: a URL must not hold a password; leave it to the environment of its store")
    if "::" in path:
        raise UserError(f"{setting}: {path} is a chain of filesystems, which is not understood; unpack it first")
    try:
        return fsspec.core.url_to_fs(path)  # type: ignore[no-any-return]
    except ImportError as error:
        raise UserError(f"{setting}: {path} needs a package: {error}") from None
    except ValueError as error:
        raise UserError(f"{setting}: {path}: {protocol}:// is not understood ({error})") from None


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


def fingerprints(found: Sequence[Shard]) -> dict[str, str]:
    """The fingerprint of each shard by its name; many at a time, as a store far away takes long to answer each."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip([shard.name for shard in found], pool.map(fingerprint, found), strict=True))


# -- scores beside documents ------------------------------------------------------------------------------------------


def beside(shard: Shard) -> Beside | None:
    """Where the documents of a shard of scores alone are; None for a shard that holds its documents."""
    if shard.format not in ("parquet", "sidecar"):
        return None
    with reading(shard), opened(shard) as file:
        note = (pq.read_metadata(file).metadata or {}).get(BESIDE)
    if note is None:
        return None
    try:
        said = json.loads(note)
        return Beside(Corpus.model_validate(said["corpus"]), Shard(**said["shard"]), str(said["made_from"]))
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{shard.source} does not say where the documents of its scores are; run gristmill score --redo"
        ) from None


def with_documents(shard: Shard) -> Shard:
    """The shard; one of scores alone as a sidecar, which is read with its documents, if these are still the same."""
    of = beside(shard)
    if of is None:
        return shard
    gone = not is_there(of.shard)
    if gone or fingerprint(of.shard) != of.made_from:
        what = "are not there any more" if gone else "have changed since they were scored"
        raise UserError(
            f"{shard.source} holds scores alone, and their documents, {of.shard.source}, {what}; put them back, or run"
            " gristmill score --redo"
        )
    return shard._replace(format="sidecar")


def is_there(shard: Shard) -> bool:
    """Whether the file of a shard exists."""
    if shard.format == "hub":
        return True
    fs, path = filesystem(shard.source)
    return bool(fs.exists(path))


# -- the Hub ----------------------------------------------------------------------------------------------------------


def looks_like_hub_name(path: str) -> bool:
    """Whether a path could be owner/name on the Hub."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) is not None and not format_of(path)


def check_no_local_folder(path: str) -> None:
    """Refuse a name whose first part is a folder here: it was meant to be a file or folder in it."""
    first, _, rest = path.partition("/")
    if rest and Path(first).is_dir():
        raise UserError(f"corpus.path: {path} does not exist; the folder {first} does, but it holds no {rest}")


@lru_cache(maxsize=4)
def load_hub_dataset(corpus: Corpus) -> Any:
    """A streaming dataset; it is read a batch at a time and never stored."""
    datasets = needs("datasets", "datasets")
    try:
        return datasets.load_dataset(
            corpus.path, corpus.subset, split=corpus.split, revision=corpus.revision, streaming=True
        )
    except Exception as error:
        if not (from_outside(error) or isinstance(error, ValueError)):
            raise
        raise UserError(
            f"corpus.path: {corpus.path} does not exist here and is no Hub dataset within reach ({first_line(error)})"
        ) from None


def hub_shards(corpus: Corpus) -> list[Shard]:
    """One shard per shard of the Hub dataset."""
    count = load_hub_dataset(corpus).num_shards
    names = [f"{corpus.split}-{index:05d}-of-{count:05d}.parquet" for index in range(count)]
    return [Shard(name, f"{corpus.path} {name}", "hub", index) for index, name in enumerate(names)]


# -- opening ----------------------------------------------------------------------------------------------------------


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
        if shard.format != "hub" and package_of(error) in REMOTE:
            raise out_of_reach(shard.source, why) from None
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


def out_of_reach(where: Any, why: str) -> UserError:
    """What to say where a store does not answer."""
    return UserError(f"{where} is out of reach ({why}); check name, network and credentials, and run it again")


def from_outside(error: Exception) -> bool:
    """Whether files or the network are to blame: everything else is a bug and keeps its traceback."""
    kinds = pa.ArrowException | OSError | UnicodeDecodeError | MemoryError  # a damaged length asks for all memory
    return isinstance(error, kinds) or package_of(error) in REMOTE


def package_of(error: Exception) -> str:
    """The package that an exception comes from."""
    return type(error).__module__.split(".")[0]


def first_line(error: Exception) -> str:
    """What an exception says, fit to stand in our own line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


@contextmanager
def opened(shard: Shard, corpus: Corpus = AS_USUAL) -> Iterator[IO[bytes]]:
    """The bytes of a shard, decompressed. Arrow's decompressor, unlike zstandard's reader, notices a cut file."""
    fs, path = filesystem(shard.source)
    packing = next((kind for suffix, kind in PACKED.items() if path.lower().endswith(suffix)), None)
    with fs.open(path, "rb") as file:
        if packing is None and shard.format not in LINES:
            yield file
            return
        if packing is None:
            with io.BufferedReader(file, CHUNK) as buffered:  # a remote file reads lines whole, however long
                yield buffered
            return
        size = file.seek(0, io.SEEK_END)
        if size == 0:
            raise OSError("0 bytes")
        file.seek(0)
        with (
            pa.CompressedInputStream(file, packing) as stream,
            io.BufferedReader(Unpacked(stream, size, shard.source, corpus), CHUNK) as unpacked,
        ):
            yield unpacked
