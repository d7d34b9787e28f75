"""The SQLite file of an Optuna study: opened alone, checked, and explained where it is damaged."""

import logging
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pipeline import locks
from pipeline.errors import UserError, needs
from pipeline.tracking import changes

log = logging.getLogger("gristmill")

Optuna = Any
"""An object of Optuna's."""
MADE_FROM = "search.made_from"
"""Attribute of a study: what its values depend on."""
WAIT_S = 60
"""Seconds that a dashboard may hold the file."""


@contextmanager
def opened(path: Path, name: str, made_from: dict[str, Any], rungs: Sequence[int]) -> Iterator[Optuna]:
    """The study in this SQLite file, alone; refuses one of another space, objective or documents. It prunes at all
    `rungs` but the last, numbers of documents that double."""
    optuna = needs("optuna", "tune")
    with alone(path), explained(path), quiet(), connected(path) as file:
        halving = optuna.pruners.SuccessiveHalvingPruner(min_resource=rungs[0], reduction_factor=2)
        names = optuna.get_all_study_names(file)
        study = optuna.create_study(
            storage=file,
            study_name=names[0] if names else name[:500],
            direction="maximize",
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),
            pruner=halving if len(rungs) > 1 else optuna.pruners.NopPruner(),
        )
        check_same(study, made_from, path)
        yield study


@contextmanager
def connected(path: Path) -> Iterator[Optuna]:
    """Optuna's storage in an SQLite file, whose connections are closed at the end."""
    optuna, sqlalchemy = needs("optuna", "tune"), needs("sqlalchemy", "tune")
    url = f"sqlite:///{path}".replace("{", "{{").replace("}", "}}")  # Optuna fills templates
    kwargs = {"connect_args": {"timeout": WAIT_S}}
    try:
        file = optuna.storages.RDBStorage(url, engine_kwargs=kwargs)
    except RuntimeError as error:
        raise UserError(f"study {path}: {error}; or move the file away (recorded answers are kept)") from None
    try:
        file.engine.dispose()
        sqlalchemy.event.listen(file.engine, "connect", journal)
        yield file
    finally:
        file.remove_session()
        file.engine.dispose()


def journal(connection: sqlite3.Connection, _: object) -> None:
    """Commit without waiting for the disk: a dozen commits make a trial. A kill loses none; a power cut may."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def check_same(study: Optuna, made_from: dict[str, Any], path: Path) -> None:
    """Refuse a study whose values are not comparable with new ones."""
    before = study.user_attrs.get(MADE_FROM)
    if before is None:
        study.set_user_attr(MADE_FROM, made_from)
    elif before != made_from:
        raise UserError(
            f"study {path} is another one: {changes(before, made_from)}; move the file away to begin anew (recorded"
            " answers are kept)"
        )


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """No other process at work on this file."""
    refusal = f"study {path}: another process is at work on it; wait for it or stop it"
    with locks.held(path.with_name(f".{path.name}.lock"), refusal):
        yield


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """What the database complains about, as one line."""
    optuna, sqlalchemy = needs("optuna", "tune"), needs("sqlalchemy", "tune")
    try:
        check_whole(path)
        yield
    except (sqlite3.DatabaseError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise UserError(
            f"study {path}: {why}; make room, or move the file away, and run again (recorded answers are kept)"
        ) from None


def check_whole(path: Path) -> None:
    """Raise sqlite3.DatabaseError for a damaged file."""
    if path.exists():
        with closing(sqlite3.connect(path, timeout=WAIT_S)) as db:
            found = db.execute("PRAGMA quick_check").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(f"the file is damaged ({found.splitlines()[-1]})")


class Relay(logging.Handler):
    """Hands records to the log of gristmill."""

    def emit(self, record: logging.LogRecord) -> None:
        """Hand one on."""
        log.handle(record)


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna's warnings go to the log of gristmill, and what it tells besides goes nowhere."""
    theirs = logging.getLogger("optuna")
    before = theirs.handlers, theirs.level, theirs.propagate
    theirs.handlers, theirs.level, theirs.propagate = [Relay()], logging.WARNING, False
    try:
        yield
    finally:
        theirs.handlers, theirs.level, theirs.propagate = before
