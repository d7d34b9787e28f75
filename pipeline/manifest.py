"""What a finished stage vouches for: every file that it made, with its length and digest."""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec

from pipeline import __version__, places, storage
from pipeline.errors import UserError
from pipeline.storage import write_text

FORMAT = 1
"""Form of a run folder; another number is refused and never read."""
FILE = "manifest.json"
BEFORE = "manifest.before.json"
"""What is known of the files of a stage that is at work again."""
GROWING = (".sqlite", "-wal", "-shm", "-journal", ".tmp", ".lock", ".log")
"""Endings of files that are never finished."""
OWN = (FILE, BEFORE, "parts", "checkpoints", "keys")
"""Names in a stage's folder that no manifest lists: what is gone when the stage is done, and manifests themselves."""
EDITABLE = (".yaml", ".md")
"""Endings of files that people may change after they were made."""
TOGETHER = "model"
"""Name of folders whose files are one thing: without one of them the others are of no use."""


class Entry(NamedTuple):
    """One file; `version` changes when it is written again, as its time does, and saves hashing it anew."""

    bytes: int
    sha256: str
    """Empty for what another process put behind a URL: it is not fetched again to be hashed."""
    version: str


class Written(NamedTuple):
    """The length of a file, and what tells this writing of it from the next."""

    bytes: int
    version: str


class Manifest(NamedTuple):
    """Files by their path from the stage's folder. What lies below a name in `places` is not there, but in that folder
    or URL."""

    files: dict[str, Entry]
    places: dict[str, str]


EMPTY = Manifest({}, {})


# -- making one -------------------------------------------------------------------------------------------------------


def of(
    folder: Path, elsewhere: dict[str, str], known: dict[str, Entry], only: Collection[str] | None = None
) -> Manifest:
    """The manifest of the finished files in a folder and its places elsewhere, or of those at `only` these absolute
    paths and URLs; those that are known and were not written since keep their digest."""
    there = walk(folder, elsewhere)
    paths = sorted(there)
    if only is not None:
        paths = [path for path in paths if locate(folder.absolute(), path, elsewhere) in only]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        entries = pool.map(lambda path: entry(locate(folder, path, elsewhere), there[path], known.get(path)), paths)
        return Manifest(dict(zip(paths, entries, strict=True)), elsewhere)


def walk(folder: Path, elsewhere: dict[str, str]) -> dict[str, Written]:
    """All finished files in a folder and in its places elsewhere."""
    found = dict(files_here(folder, ""))
    for name, place in elsewhere.items():
        found |= files_behind(place, f"{name}/") if "://" in place else files_here(Path(place), f"{name}/")
    return found


def files_here(folder: Path, below: str) -> Iterator[tuple[str, Written]]:
    """The finished files in a folder."""
    for path in folder.rglob("*"):
        name = below + path.relative_to(folder).as_posix()
        if is_finished(name) and path.is_file():
            yield name, look(str(path))


def files_behind(url: str, below: str) -> Iterator[tuple[str, Written]]:
    """The finished files behind a URL, by their listing alone."""
    fs, root = fsspec.core.url_to_fs(url)
    with places.reaching(url):
        files = fs.find(root, detail=True)
    for file, info in files.items():
        name = below + file[len(root) :].lstrip("/")
        if is_finished(name) and not places.is_marker(file):
            yield name, Written(int(info["size"]), places.version(info))


def is_finished(path: str) -> bool:
    """Whether a file in a stage's folder is neither a store that grows, nor a log, a lock or a temporary file."""
    parts = PurePosixPath(path).parts
    return not (path.endswith(GROWING) or parts[0] in OWN or any(part.startswith(".") for part in parts))


def locate(folder: Path, path: str, places: dict[str, str]) -> str:
    """Where a file of a manifest is: a path here, or a URL."""
    place = next((name for name in places if path.startswith(f"{name}/")), None)
    return str(folder / path) if place is None else places[place].rstrip("/") + path[len(place) :]


def entry(where: str, now: Written, known: Entry | None) -> Entry:
    """A file as it is now; one that was not written since it became known is not read."""
    if known is not None and (known.bytes, known.version) == now:
        return known
    if "://" in where:
        return Entry(now.bytes, storage.UPLOADED.get(where, ""), now.version)
    return Entry(now.bytes, storage.sha256(where), now.version)


def look(where: str) -> Written:
    """What tells this writing of a file from the next."""
    if "://" not in where:
        found = Path(where).stat()
        return Written(found.st_size, str(found.st_mtime_ns))
    fs, path = fsspec.core.url_to_fs(where)
    info = fs.info(path)
    return Written(int(info["size"]), places.version(info))


# -- on disk ----------------------------------------------------------------------------------------------------------


def write(path: Path, manifest: Manifest) -> None:
    """Write a manifest whole or not at all."""
    write_text(path, render(manifest))


def render(manifest: Manifest) -> str:
    """The text of a manifest, a line for each file, with a digest of its own."""
    head = {"format": FORMAT, "gristmill": __version__, "places": manifest.places}
    lines = ",\n".join(f"{json.dumps(path)}: {json.dumps(each._asdict())}" for path, each in manifest.files.items())
    begin = f'{json.dumps(head)[:-1]}, "files": {{\n{lines}\n}}'
    return f'{begin}, "sha256": "{hashlib.sha256(begin.encode()).hexdigest()}"}}\n'


def read(path: Path) -> Manifest | None:
    """A manifest; None if there is none. One that is damaged or of another form is refused."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    begin, _, end = raw.rpartition(b', "sha256": ')
    if end != f'"{hashlib.sha256(begin).hexdigest()}"}}\n'.encode():
        raise Damaged(f"{path} is damaged; remove it and the result beside it, then run the stage again")
    return parse(path, json.loads(raw))


class Damaged(UserError):
    """A manifest that cannot be trusted."""


def parse(path: Path, said: dict[str, Any]) -> Manifest:
    """What a manifest says, if it is of our form and stays in its folder."""
    check_format(said, path)
    for name in [*said["files"], *said["places"]]:
        if not stays_inside(name):
            raise UserError(f"{path} names {name!r}, which is outside its folder; remove it and run the stage again")
    return Manifest({name: Entry(**each) for name, each in said["files"].items()}, said["places"])


def stays_inside(name: str) -> bool:
    """Whether a path leads nowhere but further down."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not (name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name)


def check_format(said: dict[str, Any], path: Path) -> None:
    """Refuse what another version of gristmill wrote in another form."""
    if said.get("format") != FORMAT:
        raise UserError(
            f"{path} was written by another version of gristmill (form {said.get('format', 0)}, this one reads"
            f" {FORMAT}); go on with that version, or give another --run-folder"
        )


# -- what was made before ---------------------------------------------------------------------------------------------


def begin(folder: Path) -> None:
    """The stage is at work again: what it vouched for is only known from now on."""
    before = read(folder / FILE)
    if before is None:
        return
    write(folder / BEFORE, before._replace(files=dict(as_they_are(folder, before))))
    (folder / FILE).unlink(missing_ok=True)


def as_they_are(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Entry]]:
    """The files that are still there, as last written now: copying a finished run is no writing."""
    there = walk(folder, manifest.places)
    for path, each in manifest.files.items():
        if path in there and there[path].bytes == each.bytes:
            yield path, each._replace(version=there[path].version)


def known(folder: Path) -> dict[str, Entry]:
    """What manifests of before, and of parts of the work, say of the files in a folder."""
    found: dict[str, Entry] = {}
    for path in (folder / BEFORE, *sorted((folder / "parts").glob("manifest.*.json"))):
        found |= (read(path) or EMPTY).files
    return found


# -- what is not as it was made ---------------------------------------------------------------------------------------


def lost(folder: Path, manifest: Manifest) -> dict[str, int | None]:
    """Files that are gone (None), or their bytes where these are not as many as were made."""
    there = walk(folder, manifest.places)
    bytes_now = {path: there[path].bytes if path in there else None for path in manifest.files}
    other = {path: n_bytes for path, n_bytes in bytes_now.items() if n_bytes != manifest.files[path].bytes}
    return {path: n_bytes for path, n_bytes in other.items() if n_bytes is None or not path.endswith(EDITABLE)}


def is_cut_off(where: str) -> bool:
    """Whether a parquet file here has no end: nobody means that."""
    if "://" in where or not where.endswith(".parquet"):
        return False
    with Path(where).open("rb") as file:
        file.seek(-min(4, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return file.read() != b"PAR1"


def remove(folder: Path, path: str) -> None:
    """Remove a file, so that its stage finds it missing; with it what is of no use without it."""
    for inside in PurePosixPath(path).parents:
        if inside.name == TOGETHER:
            shutil.rmtree(folder / inside, ignore_errors=True)
    (folder / path).unlink(missing_ok=True)
