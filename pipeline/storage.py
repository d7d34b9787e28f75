"""Files that are there whole or not at all."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from pipeline import places
from pipeline.errors import UserError
from pipeline.places import Place
from pipeline.shards import AT_ONCE, first_line, from_outside

log = logging.getLogger("gristmill")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ENTRY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)
WRITTEN: set[Path] = set()
"""Files that this process has put in their places, which the manifest of its part of the work lists."""
UPLOADED: dict[str, str] = {}
"""SHA-256 of what this process has put to URLs, so that no manifest has to read it again."""


def content(path: Path) -> str:
    """16 hex digits of what a small file holds."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@contextmanager
def atomic(path: Place) -> Iterator[Path]:
    """A temporary name beside `path`; synced and renamed to it if the block succeeds, removed if it fails. What goes
    to a URL is written here first."""
    if not isinstance(path, Path):
        with temporary_file() as file:
            yield file
            put(file, path)
        return
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.tmp"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
            WRITTEN.add(path.absolute())
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def temporary_file() -> Iterator[Path]:
    """An empty file; where the system has /proc it has no name, and so is gone however the process ends."""
    with writing(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
        path = Path(f"/proc/self/fd/{file.fileno()}")
        if path.exists():
            yield path
            return
        with tempfile.NamedTemporaryFile() as named:
            yield Path(named.name)


PAUSES_S = (1, 5)
"""Seconds before a failed upload is tried again, beside the tries of the store's own client."""


def put(file: Path, place: UPath, pauses_s: Sequence[float] = PAUSES_S) -> None:
    """Upload a file, in one request or in parts that are put together at the end: nobody sees half of it."""
    digest = sha256(file)
    for pause_s in (*pauses_s, None):
        try:
            place.fs.put_file(str(file), place.path)
            break
        except Exception as error:
            if not from_outside(error):
                raise
            if not file.exists():  # a stage has just removed it
                raise FileNotFoundError(file) from None
            if pause_s is None or isinstance(error, FileNotFoundError | PermissionError):
                raise UserError(
                    f"cannot write {place} ({first_line(error)}); check bucket, network and credentials, then run the"
                    " same command again"
                ) from None
        log.info("%s: the store does not answer, trying again in %g s", place, pause_s)
        time.sleep(pause_s)
    UPLOADED[str(place)] = digest


def sha256(where: Path | str) -> str:
    """The digest of a file or of what is behind a URL, read a block at a time."""
    digest, block = hashlib.sha256(), bytearray(1 << 20)
    with fsspec.open(where, "rb") if "://" in str(where) else Path(where).open("rb", buffering=0) as file:
        while n := file.readinto(block):
            digest.update(memoryview(block)[:n])
    return digest.hexdigest()


def try_out(place: Place) -> None:
    """Write and remove a small file, so that what is wrong with a place is found before something is paid for."""
    if isinstance(place, Path):
        return
    probe = place / f".gristmill-{uuid.uuid4().hex[:12]}"
    with temporary_file() as file:
        put(file, probe, ())
    with places.reaching(place):
        place.fs.rm_file(probe.path)


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


@contextmanager
def replacing(folder: Path, mark: str) -> Iterator[Path]:
    """An empty folder that takes the place of one with the file `mark` in it, or of an empty one, if the block
    succeeds; a folder that holds something else is refused."""
    own = uuid.uuid4().hex[:12]
    made, old = (folder.parent / f".{folder.name}.{own}.{kind}" for kind in ("tmp", "old"))
    if folder.exists() and any(folder.iterdir()) and not (folder / mark).exists():
        raise UserError(f"{folder} holds other files than gristmill's (no {mark}); give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.[0-9a-f]+\.(tmp|old)", left.name):
            shutil.rmtree(left, ignore_errors=True)
    try:
        made.mkdir()
        yield made
        for path in (*made.rglob("*"), made):
            if path.is_file():  # safetensors keeps its files to their owner, whatever the umask
                path.chmod((made / mark).stat().st_mode)
            sync(path)
        if folder.exists():
            folder.rename(old)
        made.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Place, text: str) -> None:
    """Write a small file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def shard_writer(path: Place, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A writer of a parquet shard with page checksums, which is there whole or not at all."""
    with (
        atomic(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        yield writer


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, none where there is no file; a line that a crash cut is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def write_table(path: Path, table: pa.Table) -> None:
    """Write a small table whole or not at all."""
    with shard_writer(path, table.schema) as writer:
        writer.write_table(table)


STORE_FORM = 1
"""Form of the SQLite files; 0 is the same, from before it had a number."""


def check_form(store: sqlite3.Connection) -> None:
    """Refuse an SQLite file that another version wrote in another form; mark a new one."""
    (form,) = store.execute("PRAGMA user_version").fetchone()
    if form not in (0, STORE_FORM):
        raise sqlite3.DatabaseError(
            f"written by another version of gristmill (form {form}, this one reads {STORE_FORM})"
        )
    if form == 0:
        store.execute(f"PRAGMA user_version = {STORE_FORM}")


@contextmanager
def reading_table(path: Place) -> Iterator[pq.ParquetFile]:
    """A table of ours, whose pages are held against their checksums; what is wrong with it is one line."""
    try:
        with path.open("rb") as whole, pq.ParquetFile(whole, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        why = str(error).split("\n")[0][:200]
        raise UserError(
            f"{path} cannot be read as parquet ({why}); remove it, and run again the stage that made it"
        ) from None


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A small table of ours."""
    with reading_table(path) as file:
        return file.read(columns)


def is_unfinished(name: str) -> bool:
    """Whether a name is that of a file that is being written, or of its lock."""
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith((".tmp", ".lock"))


def sweep(folder: Place, keep: set[str] | None = None) -> None:
    """Remove what killed writers left and, if given, every shard that is not to be kept."""
    if not isinstance(folder, Path):
        others = set[str]() if keep is None else places.names(folder) - keep
        with places.reaching(folder), ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(folder.fs.rm_file, (f"{folder.path}/{name}" for name in others)))
        return
    for path in folder.rglob("*"):
        stale = is_unfinished(path.name)
        foreign = keep is not None and path.relative_to(folder).as_posix() not in keep
        if path.is_file() and (stale or foreign):
            path.unlink(missing_ok=True)
