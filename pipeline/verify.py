"""What became of the files of a run since they were made: every one is read and held against its manifest."""

import json
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import locks, manifest, storage
from pipeline.errors import UserError
from pipeline.manifest import Entry, Manifest
from pipeline.shards import first_line, from_outside
from pipeline.storage import write_text
from pipeline.tracking import MADE_FROM, Step, check_format, progress

RESULTS = ("result.json", "inputs.json")
"""Files by which a folder below the run folder is known for a stage's."""
AT_ONCE = 4
"""Files that are read at a time."""
MB = 1_000_000


class Damage(NamedTuple):
    """A file that is not what was made; `what` is wrong with it, and where in it if that can be told."""

    stage: str
    path: str
    what: str
    is_ours: bool
    """Whether it may be removed, to be made again."""


def run(run_folder: Path, remove: bool = False) -> dict[str, Any]:
    """Read everything that the manifests of a run list; remove what is damaged, if asked, so that it is made again."""
    if not run_folder.is_dir():
        raise UserError(f"{run_folder} is no folder; give the run folder of a recipe")
    stages = {path.relative_to(run_folder).as_posix(): path for path in folders(run_folder)}
    found = {name: listed(folder) for name, folder in stages.items()}
    files = [each for made, _ in found.values() for each in made.files.values()]
    with progress("verify", len(files), unit="files") as step:
        damaged = [each for name, folder in stages.items() for each in damages(name, folder, *found[name], step)]
    damaged += [*bad_stores(run_folder), *bad_lines(run_folder)]
    if remove:
        remove_all(run_folder, damaged)
    return {
        "run_folder": str(run_folder),
        "n_files": len(files),
        "n_bytes": sum(each.bytes for each in files),
        "n_stores": len(stores(run_folder)),
        "n_unknown": sum(n_unknown(stages[name], made) for name, (made, _) in found.items()),
        "unfinished": [name for name, folder in stages.items() if not (folder / manifest.FILE).exists()],
        "damaged": [each._asdict() for each in damaged],
        "removed": remove,
    }


def folders(run_folder: Path) -> list[Path]:
    """The folders of all stages, those of steps within a stage among them."""
    names = (*RESULTS, manifest.FILE)
    return sorted(
        {path.parent for deep in ("*", "*/*") for name in names for path in run_folder.glob(f"{deep}/{name}")}
    )


def listed(folder: Path) -> tuple[Manifest, list[str]]:
    """What a stage vouches for, all of it or its finished parts; and the manifests that cannot be read."""
    made, bad = manifest.EMPTY, list[str]()
    whole = folder / manifest.FILE
    for path in [whole] if whole.exists() else sorted((folder / "parts").glob("manifest.*.json")):
        try:
            one = manifest.read(path) or manifest.EMPTY
        except manifest.Damaged:
            bad.append(path.relative_to(folder).as_posix())
            continue
        made = Manifest(made.files | one.files, made.places | one.places)
    return made, bad


def damages(name: str, folder: Path, made: Manifest, bad: list[str], step: Step) -> Iterator[Damage]:
    """What is wrong with the files of one stage. What lies elsewhere, or was perhaps edited, is not ours to remove."""
    wrong = {path: what for path, what in checked(folder, made, step) if what}
    for path, what in wrong.items():
        is_here = manifest.locate(folder, path, made.places) == str(folder / path)
        yield Damage(name, path, what, is_here and not path.endswith(manifest.EDITABLE))
    notes = {note: folder / note for note in RESULTS if note not in wrong and (folder / note).exists()}
    broken = [note for note, path in notes.items() if not is_object(path.read_bytes())]
    yield from (Damage(name, path, "cannot be read", True) for path in [*bad, *broken])
    if "inputs.json" in notes.keys() - {*broken}:
        check_format(folder)


def checked(folder: Path, made: Manifest, step: Step) -> Iterator[tuple[str, str | None]]:
    """Each file with what is wrong with it; None for one that is whole."""

    def one(item: tuple[str, Entry]) -> tuple[str, str | None]:
        path, entry = item
        return path, difference(manifest.locate(folder, path, made.places), entry)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for path, what in pool.map(one, made.files.items()):
            step(1)
            yield path, what


def difference(where: str, entry: Entry) -> str | None:
    """What a file is now that is not what was made; None if there is nothing. One without a digest is known by what
    its store says of its writing, and by the checksums of its pages."""
    try:
        now = manifest.look(where)
        if now.bytes != entry.bytes:
            return f"{now.bytes} bytes instead of {entry.bytes}"
        if entry.sha256:
            is_same = storage.sha256(where) == entry.sha256
        else:
            is_same = now.version == entry.version and damaged_part(where) in ("", ROWS_WHOLE)
        return None if is_same else f"other content{damaged_part(where)}"
    except FileNotFoundError:
        return "missing"
    except Exception as error:
        if not from_outside(error):
            raise
        return f"cannot be read ({getattr(error, 'strerror', None) or first_line(error)})"


ROWS_WHOLE = ": a page header or note, all rows whole"


def damaged_part(where: str) -> str:
    """The place of the damage in a parquet file, as far as its pages' checksums tell."""
    if not where.endswith(".parquet"):
        return ""
    with fsspec.open(where, "rb") as file:
        try:
            reader = pq.ParquetFile(file, page_checksum_verification=True)
        except (pa.ArrowException, OSError):
            return ": footer"
        bad = [str(i) for i in range(reader.num_row_groups) if not is_whole(reader, i)]
    return f": row group {', '.join(bad)} of {reader.num_row_groups}" if bad else ROWS_WHOLE


def is_whole(reader: pq.ParquetFile, number: int) -> bool:
    """Whether a row group can be read and its pages have their checksums."""
    try:
        reader.read_row_group(number)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return False
    return True


def is_object(raw: bytes) -> bool:
    """Whether this is a JSON object."""
    try:
        return isinstance(json.loads(raw), dict)
    except ValueError:
        return False


def n_unknown(folder: Path, made: Manifest) -> int:
    """Finished files in a stage's folder that its manifest does not list."""
    return len(manifest.walk(folder, {}).keys() - made.files.keys() - {*RESULTS, "recipe.yaml"})


# -- stores and metrics -----------------------------------------------------------------------------------------------


def stores(run_folder: Path) -> list[Path]:
    """The SQLite files of a run."""
    return sorted(path for path in run_folder.rglob("*.sqlite") if path.is_file())


def bad_stores(run_folder: Path) -> Iterator[Damage]:
    """SQLite files that are damaged; what they hold may be paid for, so that none is removed."""
    for path in stores(run_folder):
        said = quick_check(path)
        if said != "ok":
            yield Damage("", path.relative_to(run_folder).as_posix(), said, False)


def quick_check(path: Path) -> str:
    """What SQLite finds in a file; in a folder that can only be read, in the file without its journal."""
    said = ""
    for how in ("mode=ro", "mode=ro&immutable=1"):
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, timeout=60)) as db:
                return " ".join(str(db.execute("PRAGMA quick_check(1)").fetchone()[0]).split())
        except sqlite3.OperationalError as error:
            said = str(error)
        except sqlite3.DatabaseError as error:
            return str(error)
    return said


def bad_lines(run_folder: Path) -> Iterator[Damage]:
    """Lines of the metrics that cannot be read."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if line and not is_object(line):
            yield Damage("", path.name, f"line {number} cannot be read", True)


# -- mending ----------------------------------------------------------------------------------------------------------


def remove_all(run_folder: Path, damaged: list[Damage]) -> None:
    """Remove what is damaged, and what says that its stage is done. Of the metrics only lines go."""
    for each in damaged:
        folder = run_folder / each.stage
        if each.is_ours and not each.stage:
            keep_lines(folder / each.path)
        elif each.is_ours:
            with locks.held(folder / ".lock", f"verify: another process is at work in {folder}; wait for it"):
                manifest.remove(folder, each.path)
                (folder / "result.json").unlink(missing_ok=True)


def keep_lines(path: Path) -> None:
    """Write a file of JSON lines again without those that cannot be read."""
    lines = [line for line in path.read_bytes().split(b"\n") if is_object(line)]
    write_text(path, b"".join(line + b"\n" for line in lines).decode())


def advice(found: dict[str, Any]) -> str | None:
    """One line about what is damaged, and what to do; None if nothing is."""
    damaged, run_folder = found["damaged"], found["run_folder"]
    if not damaged:
        return None
    name = "/".join(filter(None, [damaged[0]["stage"], damaged[0]["path"]]))
    told = f"verify: {run_folder}: {len(damaged)} damaged or missing, first {name} ({damaged[0]['what']})"
    ours = [each for each in damaged if each["is_ours"]]
    if not ours:
        return f"{told}; it is never removed: put it back or move it away, and run its stage again"
    stages = in_order({each["stage"] for each in ours if each["stage"]})
    then = f", then run gristmill {', '.join(stages)} again" if stages else ""
    if found["removed"]:
        return f"{told}; removed what can be made again{then}"
    return f"{told}; remove what can be made again with gristmill verify {run_folder} --remove{then}"


def in_order(stages: set[str]) -> list[str]:
    """Stages in the order in which they are run."""
    order = [*MADE_FROM]
    return sorted(stages, key=lambda name: (order.index(name) if name in order else len(order), name))


def show(found: dict[str, Any]) -> None:
    """What was found, for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(Console().width, 100))
    if found["damaged"]:
        table = Table("stage", "file", "what is wrong", title=found["run_folder"])
        for each in found["damaged"]:
            table.add_row(each["stage"], each["path"], each["what"])
        console.print(table)
    console.print(told(found), markup=False, highlight=False)


def told(found: dict[str, Any]) -> str:
    """The counts in a line."""
    unfinished = f"; not finished: {', '.join(found['unfinished'])}" if found["unfinished"] else ""
    return (
        f"{found['n_files']:,} files ({found['n_bytes'] / MB:,.1f} MB) and {found['n_stores']} stores read,"
        f" {len(found['damaged'])} damaged, {found['n_unknown']} that no manifest lists{unfinished}"
    )
