"""Files that are there whole or not at all."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UserError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ENTRY = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


def content(path: Path) -> str:
    """16 hex digits of what a small file holds."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


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


@contextmanager
def replacing(folder: Path, mark: str) -> Iterator[Path]:
    """An empty folder that takes the place of one with the file `mark` in it, or of an empty one, if the block
    succeeds; a folder that holds something else is refused."""
    made, old = (folder.parent / f".{folder.name}.{os.getpid()}.{kind}" for kind in ("tmp", "old"))
    if folder.exists() and any(folder.iterdir()) and not (folder / mark).exists():
        raise UserError(f"{folder} holds other files than gristmill's (no {mark}); give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.iterdir():
        if re.fullmatch(rf"\.{re.escape(folder.name)}\.\d+\.(tmp|old)", left.name):
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


def sweep(folder: Path, keep: set[str] | None = None) -> None:
    """Remove what killed writers left and, if given, every shard that is not to be kept."""
    for path in folder.rglob("*"):
        stale = path.name.startswith(".") and path.name.endswith(".tmp")
        foreign = keep is not None and path.relative_to(folder).as_posix() not in keep
        if path.is_file() and (stale or foreign):
            path.unlink(missing_ok=True)
