"""What was made of texts before in the same run, so that identical ones are computed once: on disk, in bounded
memory."""

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UserError
from pipeline.storage import writing

SETTINGS = ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", "cache_size=-65536")
"""Nothing is kept safe, for the file is only a memory; at most 64 MiB of it are held at a time."""

Records = NDArray[Any]
"""What was made of texts (n_texts,): a structured array."""


def key_of(text: str, scope: int = 0) -> bytes:
    """A text's name among those of its scope."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=b"%d" % scope).digest()


class Seen:
    """Records by key. Those still at work elsewhere are awaited: nobody else has to make them."""

    def __init__(self, file: sqlite3.Connection, kind: np.dtype[Any]) -> None:
        self.file, self.kind = file, kind
        self.awaited: set[bytes] = set()

    def claim(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those that were never claimed before, each once; whoever claims them adds their records."""
        new = [key for key in dict.fromkeys(keys) if key not in self.awaited and self.find(key) is None]
        self.awaited.update(new)
        return new

    def add(self, keys: Sequence[bytes], records: Records) -> None:
        """Keep the records of claimed keys."""
        rows = zip(keys, map(bytes, records.view(f"V{self.kind.itemsize}")), strict=True)
        self.file.executemany("INSERT INTO seen VALUES (?, ?)", rows)
        self.awaited.difference_update(keys)

    def get(self, keys: Sequence[bytes]) -> Records:
        """The records of keys that were added, in this order."""
        return np.frombuffer(b"".join(self.file.execute(RECORD, (key,)).fetchone()[0] for key in keys), self.kind)

    def find(self, key: bytes) -> bytes | None:
        """The record of a key, if there is one."""
        found = self.file.execute(RECORD, (key,)).fetchone()
        return None if found is None else found[0]


RECORD = "SELECT record FROM seen WHERE key = ?"
TABLE = "CREATE TABLE seen (key BLOB PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID"


@contextmanager
def opened(path: Path, kind: np.dtype[Any]) -> Iterator[Seen]:
    """An empty memory of records of this kind, in a file that is gone at the end."""
    with writing(path):
        path.unlink(missing_ok=True)  # left by a process that was killed
    try:
        with closing(sqlite3.connect(path, isolation_level="IMMEDIATE")) as file:
            for setting in SETTINGS:
                file.execute(f"PRAGMA {setting}")
            file.execute(TABLE)
            yield Seen(file, kind)
    except sqlite3.DatabaseError as error:
        raise UserError(f"cannot write {path} ({error}); make room, then run the same command again") from None
    finally:
        path.unlink(missing_ok=True)
