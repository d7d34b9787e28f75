"""What a finished stage vouches for: every file that it made, with its length and digest."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec

from pipeline import __version__
from pipeline.errors import UserError
from pipeline.storage import UPLOADED, write_text

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
BLOCK = 1 << 20


class Entry(NamedTuple):
    """One file; `version` changes when it is written again, as its time does, and saves hashing it anew."""

    bytes: int
    sha256: str
    version: str


class Manifest(NamedTuple):
    """Files by their path from the stage's folder. What lies below a name in `places` is not there, but in that folder
    or URL."""

    files: dict[str, Entry]
    places: dict[str, str]


EMPTY = Manifest({}, {})


# -- making one -------------------------------------------------------------------------------------------------------


def of(folder: Path, places: dict[str, str], known: dict[str, Entry], only: Collection[str] | None = None) -> Manifest:
    """The manifest of the finished files in a folder and its places, or of those at `only` these absolute paths and
    URLs; those that are known and were not written since keep their digest."""
    paths = sorted(walk(folder, places))
    if only is not None:
        paths = [path for path in paths if locate(folder.absolute(), path, places) in only]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        entries = pool.map(lambda path: entry(locate(folder, path, places), known.get(path)), paths)
        return Manifest(dict(zip(paths, entries, strict=True)), places)


def walk(folder: Path, places: dict[str, str]) -> dict[str, int]:
    """All finished files with their length in bytes."""
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for name, place in places.items():
        fs, root = fsspec.core.url_to_fs(place)
        files = fs.find(root, detail=True).items()
        found |= {f"{name}/{file[len(root) :].lstrip('/')}": int(about["size"]) for file, about in files}
    return {path: n_bytes for path, n_bytes in found.items() if is_finished(path)}


def is_finished(path: str) -> bool:
    """Whether a file in a stage's folder is neither a store that grows, nor a log, a lock or a temporary file."""
    parts = PurePosixPath(path).parts
    return not (path.endswith(GROWING) or parts[0] in OWN or any(part.startswith(".") for part in parts))


def locate(folder: Path, path: str, places: dict[str, str]) -> str:
    """Where a file of a manifest is: a path here, or a URL."""
    place = next((name for name in places if path.startswith(f"{name}/")), None)
    return str(folder / path) if place is None else places[place].rstrip("/") + path[len(place) :]


def entry(where: str, known: Entry | None = None) -> Entry:
    """A file as it is now; one that was not written since it became known is not read."""
    n_bytes, now = look(where)
    if known is not None and (known.bytes, known.version) == (n_bytes, now):
        return known
    return Entry(n_bytes, UPLOADED.get(where) or sha256(where), now)


def look(where: str) -> tuple[int, str]:
    """Length of a file, and what tells this writing of it from the next."""
    if "://" not in where:
        found = Path(where).stat()
        return found.st_size, str(found.st_mtime_ns)
    fs, path = fsspec.core.url_to_fs(where)
    return int(fs.info(path)["size"]), str(fs.ukey(path))[:32]


def sha256(where: str) -> str:
    """The digest of a file, read a block at a time."""
    digest, block = hashlib.sha256(), bytearray(BLOCK)
    with Path(where).open("rb", buffering=0) if "://" not in where else fsspec.open(where, "rb") as file:
        while n := file.readinto(block):
            digest.update(memoryview(block)[:n])
    return digest.hexdigest()


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
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise damaged(path) from None
    begin, _, end = text.rpartition(', "sha256": ')
    if end != f'"{hashlib.sha256(begin.encode()).hexdigest()}"}}\n':
        raise damaged(path)
    return parse(path, json.loads(text))


def damaged(path: Path) -> UserError:
    """What to say of a manifest that cannot be trusted."""
    return UserError(f"{path} is damaged; remove it and run the stage again")


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
    for path, each in manifest.files.items():
        try:
            n_bytes, now = look(locate(folder, path, manifest.places))
        except OSError:
            continue
        if n_bytes == each.bytes:
            yield path, each._replace(version=now)


def known(folder: Path) -> dict[str, Entry]:
    """What manifests of before, and of parts of the work, say of the files in a folder."""
    found: dict[str, Entry] = {}
    for path in (folder / BEFORE, *sorted((folder / "parts").glob("manifest.*.json"))):
        found |= (read(path) or EMPTY).files
    return found


def lost(folder: Path, manifest: Manifest) -> list[str]:
    """Files that are gone or have another length than they were made with."""
    there = walk(folder, manifest.places)
    changed = [path for path, each in manifest.files.items() if there.get(path) != each.bytes]
    return [path for path in changed if path not in there or not path.endswith(EDITABLE)]
