"""A copy of the run folder behind a URL: fetched before stages work, pushed while they do and when they end."""

import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import permutations
from pathlib import Path, PurePosixPath
from threading import Event, Thread
from typing import NamedTuple

from upath import UPath

from pipeline import locks, places, storage
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.shards import AT_ONCE, has_magic

log = logging.getLogger("gristmill")

STATE, LOCK = ".mirror.json", ".mirror.lock"
APART = {"score/scored", "score/embeddings", "filter/kept", "filter/dropped", "filter/keys"}
"""Corpora, which go to their places directly, and what is only needed to write them."""
PASSING = ("checkpoints", "wandb")
"""Names of folders that are not copied: only this machine can go on with them."""
UNFINISHED = ("-wal", "-shm", "-journal", ".tmp", ".lock")
GROWING = (".sqlite", ".jsonl", ".log")
"""Endings of files that are written to at any time, and so are copied before they are sent."""
SHARE_OF_TIME = 0.1
"""Of the time of a run, at most this much is spent on pushing."""


class Mirror(NamedTuple):
    """A run folder and the place of its copy."""

    folder: Path
    place: UPath


class Known(NamedTuple):
    """A file when both sides were last alike: what tells that writing of it, here and there, from the next; and its
    digest."""

    here: str | None
    there: str | None
    sha256: str
    putting: str = ""
    """The digest of what is being put there: should this process be killed, it is known whose file is there."""


class Conflict(UserError):
    """The same run was changed on two machines."""


State = dict[str, Known]
Versions = dict[str, str]
"""By path from the run folder, what changes when a file is written again."""
AT_WORK: list[Mirror] = []
"""The mirror of this process, while stages work."""


def of(recipe: Recipe) -> Mirror | None:
    """The mirror of a run, if it has one."""
    if recipe.mirror is None:
        return None
    place = places.of(recipe.mirror, "mirror")
    if isinstance(place, Path):
        raise UserError(f"mirror: {recipe.mirror} is a folder here; give a URL, such as s3://bucket/edu")
    return Mirror(recipe.run_folder, place)


@contextmanager
def kept(recipe: Recipe) -> Iterator[None]:
    """Try the places where the run will write; then keep its copy up to date while the block works, if it has one."""
    mirror = of(recipe)
    check_places(recipe)
    if mirror is None:
        yield
        return
    fetch(mirror)
    stop, trouble = Event(), list[Conflict]()
    pusher = Thread(target=push_now_and_then, args=(mirror, recipe.mirror_every_s, stop, trouble), daemon=True)
    AT_WORK.append(mirror)
    pusher.start()
    try:
        try:
            yield
        finally:
            AT_WORK.clear()
            stop.set()
            pusher.join()
    except BaseException:
        if trouble:
            raise trouble[0] from None
        push_what_is_there(mirror)
        raise
    if trouble:
        raise trouble[0]
    push(mirror)


def check_places(recipe: Recipe) -> None:
    """Refuse, before anything is paid for, places that cannot be written to or that hold each other."""
    found = {f"{name}.output": getattr(recipe, name).output for name in places.CORPORA}
    outputs = {setting: places.of(path, setting) for setting, path in found.items() if path}
    mirror = {} if recipe.mirror is None else {"mirror": places.of(recipe.mirror, "mirror")}
    documents = {"corpus.path": folder_of(recipe.corpus.path)} if recipe.corpus.path else {}
    for apart in (outputs | documents, mirror | documents):
        for (setting, place), (other, inside) in permutations(apart.items(), 2):
            places.check_apart(setting, place, other, inside)
    for place in (*mirror.values(), *outputs.values()):
        storage.try_out(place)


def folder_of(path: str) -> str:
    """The folder of a corpus, of which files may be chosen by a glob."""
    return re.split(r"[*?\[]", path)[0].rpartition("/")[0] if has_magic(path) else path


def push_now_and_then(mirror: Mirror, every_s: float, stop: Event, trouble: list[Conflict]) -> None:
    """Push until the work ends; a conflict stops the work, as what it pays for would be lost."""
    pause_s = every_s
    while not stop.wait(pause_s):
        begin = time.monotonic()
        try:
            push(mirror)
        except Conflict as conflict:
            trouble.append(conflict)
            os.kill(os.getpid(), signal.SIGINT)
            return
        except UserError as error:
            log.warning("mirror: %s; it is tried again", error)
        pause_s = max(every_s, (time.monotonic() - begin) / SHARE_OF_TIME)


def push_what_is_there(mirror: Mirror) -> None:
    """Push what work left that did not succeed; what stopped it is what is told."""
    try:
        push(mirror)
    except UserError as error:
        log.warning("mirror: %s", error)


def refresh(recipe: Recipe) -> Path:
    """The run folder, with what is newer in its mirror, if it has one."""
    mirror = of(recipe)
    if mirror is not None:
        fetch(mirror)
    return recipe.run_folder


def here(path: Path) -> Path:
    """The run folder to read for a path or for the URL of a mirror, which is fetched."""
    recipe = Recipe.model_validate({"run_folder": path})
    mirror = of(recipe)
    if mirror is not None and not there(mirror):
        raise UserError(f"{mirror.place} holds no run; give the run folder of a recipe")
    return refresh(recipe)


def forget(*paths: Path) -> None:
    """Take back there, at once, files and folders that say what is finished here; before anything of it changes."""
    for mirror in AT_WORK:
        for path in paths:
            with places.reaching(mirror.place), suppress(FileNotFoundError):
                mirror.place.fs.rm(f"{mirror.place.path}/{path.relative_to(mirror.folder).as_posix()}", recursive=True)


# -- fetching and pushing ---------------------------------------------------------------------------------------------


def fetch(mirror: Mirror) -> None:
    """Bring what is newer there, or missing here. What a stage took back on the one side is taken back on the
    other."""
    with busy(mirror) as known, places.reaching(mirror.place):
        theirs = there(mirror)
        if not theirs:
            known.clear()
        ours, wanted = versions(mirror.folder), list[str]()
        for name in {**theirs, **known}:
            before = known.get(name, NEVER)
            if name not in theirs:
                if is_mark(name) and ours.get(name) == before.here:
                    (mirror.folder / name).unlink(missing_ok=True)
            elif name not in ours or (theirs[name] != before.there and ours[name] == before.here):
                wanted.append(name)
            elif theirs[name] != before.there and not is_log(name):
                check_alike(mirror, name, theirs[name], known)
        bring(mirror, wanted, theirs, known)
    if wanted:
        log.info("mirror: fetched %d files from %s", len(wanted), mirror.place)


def bring(mirror: Mirror, names: list[str], theirs: Versions, known: State) -> None:
    """Fetch files, those last that say that others are there."""

    def one(name: str) -> None:
        path = mirror.folder / name
        with storage.atomic(path) as temporary:
            mirror.place.fs.get_file(f"{mirror.place.path}/{name}", str(temporary))
        for ending in UNFINISHED:
            path.with_name(path.name + ending).unlink(missing_ok=True)
        known[name] = Known(version(path), theirs[name], storage.sha256(path))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for some in (False, True):
            list(pool.map(one, [name for name in names if is_mark(name) is some]))


def push(mirror: Mirror) -> None:
    """Send what has changed here, last what vouches for the rest; remove there what a stage has removed."""
    with busy(mirror) as known:
        marks = {name: at for name, at in versions(mirror.folder).items() if is_mark(name)}
        ours = versions(mirror.folder)  # after the marks: all that they vouch for is among it
        changed = {name: at for name, at in ours.items() if known.get(name, NEVER).here != at}
        growing = [name for name in changed if is_growing(name)]
        written = [name for name in changed if not is_growing(name) and not is_mark(name)]
        for some in (written, *([name] for name in growing)):  # each needs room for a copy
            send(mirror, {name: changed[name] for name in some}, known)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda name: remove(mirror, name, known), known.keys() - ours.keys()))
        send(mirror, {name: at for name, at in changed.items() if marks.get(name) == at}, known)


def send(mirror: Mirror, some: Versions, known: State) -> None:
    """Send files, unless they have changed there too; what is about to be put is written down first."""
    with ExitStack() as copies, ThreadPoolExecutor(AT_ONCE) as pool:
        files: dict[str, Path] = {}
        for name in some:
            with suppress(FileNotFoundError):
                files[name] = copies.enter_context(frozen(mirror.folder / name))
        made = {name: sha256 for name, sha256 in zip(files, pool.map(digest, files.values()), strict=True) if sha256}
        list(pool.map(lambda name: check_unchanged(mirror, name, known, made[name]), made))
        for name, sha256 in made.items():
            before = known.get(name, NEVER)
            is_there = is_alike(before, sha256)
            known[name] = before._replace(here=some[name]) if is_there else before._replace(putting=sha256)
        wanted = [name for name in made if not is_alike(known[name], made[name])]
        if wanted:
            write_state(mirror, known)

        def one(name: str) -> None:
            with suppress(FileNotFoundError):
                storage.put(files[name], mirror.place / name)
                known[name] = Known(some[name], version_there(mirror, name), made[name])

        list(pool.map(one, wanted))


def digest(file: Path) -> str | None:
    """The SHA-256 of a file; None where a stage has just removed it."""
    with suppress(FileNotFoundError):
        return storage.sha256(file)
    return None


def is_alike(known: Known, sha256: str) -> bool:
    """Whether a file with this digest is there already."""
    return known.there is not None and known.sha256 == sha256


def check_unchanged(mirror: Mirror, name: str, known: State, sha256: str) -> None:
    """Refuse to send a file with this digest where another has been put since."""
    before = known.get(name, NEVER)
    if is_alike(before, sha256) or is_log(name):
        return
    now = version_there(mirror, name)
    if now not in (None, before.there):
        check_alike(mirror, name, now, known, sha256)


def remove(mirror: Mirror, name: str, known: State) -> None:
    """Remove a file there that is gone here, unless it has changed."""
    if version_there(mirror, name) == known.pop(name).there:
        with places.reaching(mirror.place), suppress(FileNotFoundError):
            mirror.place.fs.rm_file(f"{mirror.place.path}/{name}")


def check_alike(mirror: Mirror, name: str, now: str | None, known: State, sha256: str | None = None) -> None:
    """Refuse a file that was written on both sides, unless it has the same content, or was put there from here."""
    path, before = mirror.folder / name, known.get(name, NEVER)
    with storage.temporary_file() as file, places.reaching(mirror.place):
        mirror.place.fs.get_file(f"{mirror.place.path}/{name}", str(file))
        theirs = storage.sha256(file)
    if theirs == (sha256 or storage.sha256(path)):
        known[name] = Known(version(path), now, theirs)
    elif theirs in (before.sha256, before.putting):
        known[name] = before._replace(there=now)
    else:
        raise Conflict(
            f"mirror: {name} has changed in {mirror.folder} and in {mirror.place}, as the run went on elsewhere too;"
            f" move {mirror.folder} away to go on with the other, or give another --mirror"
        )


@contextmanager
def frozen(path: Path) -> Iterator[Path]:
    """A file as it is now, though it is written to: of a database a consistent copy."""
    if not is_growing(path.name):
        yield path
        return
    copy = path.with_name(f".{path.name}.mirror.tmp")
    try:
        with storage.writing(copy):
            back_up(path, copy) if path.suffix == ".sqlite" else shutil.copyfile(path, copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def back_up(path: Path, copy: Path) -> None:
    """Copy a database that others may be writing to."""
    copy.unlink(missing_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=60)) as whole,
            closing(sqlite3.connect(copy)) as into,
        ):
            whole.backup(into)
    except sqlite3.DatabaseError as error:
        if not path.exists():
            raise FileNotFoundError(path) from None
        raise UserError(f"{path} cannot be copied ({error}); move it away and run again") from None


# -- what is there ----------------------------------------------------------------------------------------------------


NEVER = Known(None, None, "")


def is_mark(name: str) -> bool:
    """Whether a file says that others are finished."""
    path = PurePosixPath(name)
    return path.name in ("result.json", "manifest.json") or (path.parent.name == "parts" and path.suffix == ".json")


def is_growing(name: str) -> bool:
    """Whether a file is written to at any time."""
    return name.endswith(GROWING)


def is_log(name: str) -> bool:
    """Whether a file is a log, of which the last that is sent stays."""
    return name.endswith(".log")


def is_copied(name: str) -> bool:
    """Whether a file or folder below the run folder has a copy in the mirror."""
    path = PurePosixPath(name)
    hidden = path.name.startswith((".", "seen.")) or path.name.endswith(UNFINISHED)
    return not (hidden or name in APART or path.name in PASSING)


def versions(folder: Path, below: str = "") -> Versions:
    """The files here that have a copy."""
    found: Versions = {}
    for entry in os.scandir(folder / below) if (folder / below).is_dir() else []:
        name = f"{below}{entry.name}"
        if not is_copied(name) or entry.is_symlink():
            continue
        with suppress(FileNotFoundError):  # a stage has just replaced it
            found |= versions(folder, f"{name}/") if entry.is_dir() else {name: version(Path(entry.path))}
    return found


def version(path: Path) -> str:
    """What changes when a file is written to; of a database, when its journal is."""
    journal = path.with_name(f"{path.name}-wal")
    both = [path, *([journal] if path.suffix == ".sqlite" and journal.exists() else [])]
    return " ".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in map(Path.stat, both))


def there(mirror: Mirror, below: str = "") -> Versions:
    """The files of the copy."""
    found: Versions = {}
    folder = f"{mirror.place.path}/{below}".rstrip("/")
    with places.reaching(mirror.place), suppress(FileNotFoundError):
        for info in mirror.place.fs.ls(folder, detail=True):
            path = info["name"].rstrip("/")
            name = below + path.rpartition("/")[2]
            if path == folder or not is_copied(name):  # a marker of the folder, or a file in its stead
                continue
            if info["type"] == "directory":
                found |= there(mirror, f"{name}/")
            else:
                found[name] = places.version(info)
    return found


def version_there(mirror: Mirror, name: str) -> str | None:
    """What changes when a file of the copy is written again; None if there is none."""
    with places.reaching(mirror.place), suppress(FileNotFoundError):
        return places.version(mirror.place.fs.info(f"{mirror.place.path}/{name}"))
    return None


@contextmanager
def busy(mirror: Mirror) -> Iterator[State]:
    """What both sides had in common, for one process at a time; written down whatever comes."""
    with locks.held(mirror.folder / LOCK, "", wait=True):
        known = read_state(mirror)
        try:
            yield known
        finally:
            write_state(mirror, known)


def read_state(mirror: Mirror) -> State:
    """What both sides had in common; nothing with another mirror."""
    try:
        said = json.loads((mirror.folder / STATE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    if said["mirror"] != str(mirror.place):
        return {}
    return {name: Known(*each) for name, each in said["files"].items()}


def write_state(mirror: Mirror, known: State) -> None:
    """Write down what both sides have in common."""
    storage.write_text(mirror.folder / STATE, json.dumps({"mirror": str(mirror.place), "files": known}))
