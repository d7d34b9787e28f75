"""Locks of files: they end with the process that holds them, however it ends."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import UserError
from pipeline.places import Place
from pipeline.storage import writing

WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
"""What a file system says that has no locks, as some of clusters: there everybody is let in."""


class Taken(UserError):
    """Another process holds the file."""


@contextmanager
def held(path: Path, refusal: str, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a file alone, or with others that share it; where another process holds it, `wait` for it or refuse."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock(handle, refusal, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


def lock(handle: int, refusal: str, how: int) -> None:
    """Lock an open file, where the file system can."""
    try:
        fcntl.flock(handle, how)
    except BlockingIOError:
        raise Taken(refusal) from None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise


@contextmanager
def written_by_one(path: Place, what: str = "shard") -> Iterator[None]:
    """Refuse while another process writes the same shard or training; nothing is left of the lock. Object stores have
    no locks: whoever comes last there puts the same bytes once more."""
    if not isinstance(path, Path):
        yield
        return
    beside = path.parent / f".{path.name}.lock"
    with held(beside, f"{path}: another process is writing this {what}; leave it to that one, or stop it"):
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)
