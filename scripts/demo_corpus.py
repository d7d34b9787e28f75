"""Build the demo corpus: real documents that are on every machine with Python.

    python scripts/demo_corpus.py data/demo [--seed 0]

Prose (docstrings, Python's topics, READMEs) beside junk (licences, listings, metadata,
changelogs, option dumps, tables, logs), taken from this interpreter's standard library and
site-packages. Packages are read as files and never imported. One environment and one seed
give the same shards byte for byte. Beside the folder goes another, data/demo-trusted:
docstrings of packages whose prose is not in the corpus, for gristmill prove to judge by.
"""

import argparse
import ast
import hashlib
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email import message_from_string
from pathlib import Path
from random import Random
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

MIN_DOCUMENTS = 5_000
MIN_CHARS = 200
N_SHARDS = 8
DOCSTRING_MIN_CHARS = 400
DOCSTRINGS_PER_PACKAGE = 350
N_DOCSTRINGS = 3_500
N_TRUSTED = 300
N_LICENCE_HEADERS = 150
PIECES_PER_SOURCE = 40
LINES_PER_PIECE = (60, 100)

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "text": pa.string(),
        "kind": pa.string(),
        "prose": pa.bool_(),
        "meta": pa.struct({"package": pa.string(), "path": pa.string()}),
    }
)


class Source(NamedTuple):
    """A file below one of the interpreter's library folders."""

    root: Path
    path: str  # relative to root, with forward slashes

    @property
    def package(self) -> str:
        """`numpy` for numpy/linalg.py, torch-2.13.0.dist-info/RECORD and six.py alike."""
        top = re.split(r"[-.]", self.path.split("/")[0])[0]
        return top or self.path

    def read(self, n_chars: int = -1) -> str:
        """The text; nothing where a file is not UTF-8 or a link leads nowhere."""
        try:
            with (self.root / self.path).open(encoding="utf-8") as file:
                return file.read(n_chars)
        except (UnicodeDecodeError, FileNotFoundError):
            return ""


class Found(NamedTuple):
    """A text and where it came from; `name` is unique within its kind."""

    name: str
    text: str
    package: str
    path: str


class Library(NamedTuple):
    """All there is to choose from, and the seed of every choice."""

    files: list[Source]
    seed: int


Finder = Callable[[Library], Iterator[Found]]


def main() -> int:
    """Collect, check that there is enough, write the shards, say what they hold."""
    args = arguments()
    warnings.simplefilter("ignore", SyntaxWarning)  # other people's escape sequences
    library = Library(sources(), args.seed)
    rows = collect(library)
    if len(rows) < MIN_DOCUMENTS:
        print(
            f"demo corpus: found {len(rows):,} documents in this environment, need "
            f"{MIN_DOCUMENTS:,}; install the packages of the [demo] extra",
            file=sys.stderr,
        )
        return 1
    write_shards(rows, args.folder, N_SHARDS)
    write_shards(trusted(library, rows), args.folder.with_name(f"{args.folder.name}-trusted"), 1)
    print_counts(rows, args.folder)
    return 0


def arguments() -> argparse.Namespace:
    """Where to and which seed."""
    parser = argparse.ArgumentParser(description="Build the demo corpus from installed packages.")
    parser.add_argument("folder", type=Path, help="where the parquet shards go")
    parser.add_argument("--seed", type=int, default=0, help="picks and shuffles the documents")
    return parser.parse_args()


def sources() -> list[Source]:
    """Every library file of this interpreter, sorted, without tests and vendored copies."""
    paths = sysconfig.get_paths()
    roots = list(dict.fromkeys(Path(paths[key]) for key in ("purelib", "platlib", "stdlib")))
    return [source for root in roots if root.is_dir() for source in files_below(root)]


def files_below(root: Path) -> Iterator[Source]:
    """The files of one library folder, in an order that every file system gives."""
    skipped = {"__pycache__", "_vendor", "site-packages", "dist-packages", "test", "tests"}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - skipped)
        for name in sorted(names):
            yield Source(root, (Path(folder) / name).relative_to(root).as_posix())


def collect(library: Library) -> list[dict[str, object]]:
    """At most the limit of each kind, no text and no id twice, shuffled: rows of SCHEMA."""
    rows: dict[str, dict[str, object]] = {}
    seen: set[bytes] = set()
    for kind, (find, prose, limit) in KINDS.items():
        for found in pick(fresh(find(library), seen), limit, library.seed):
            row = row_of(kind, prose, found)
            rows.setdefault(str(row["id"]), row)
    return [rows[name] for name in sorted(rows, key=lambda name: lot(library.seed, name))]


def trusted(library: Library, rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Docstrings of packages of which no prose is among the rows."""
    known = {row["meta"]["package"] for row in rows if row["prose"]}  # type: ignore[index]
    files = [source for source in matching(library, r".*\.py") if source.package not in known]
    found = (each for source in files for each in module_docstrings(source))
    return [row_of("docstring", True, each) for each in pick(fresh(found, set()), N_TRUSTED, library.seed)]


def fresh(found: Iterator[Found], seen: set[bytes]) -> Iterator[Found]:
    """Those long enough whose exact text has not come before."""
    for each in found:
        digest = hashlib.sha256(each.text.encode()).digest()
        if len(each.text) >= MIN_CHARS and digest not in seen:
            seen.add(digest)
            yield each


def pick(found: Iterator[Found], limit: int, seed: int) -> list[Found]:
    """All of them, or a random choice of `limit`."""
    return sorted(found, key=lambda each: lot(seed, each.name))[:limit]


def lot(seed: int, name: str) -> bytes:
    """Sorting by it shuffles, and one more package hardly changes who else is chosen."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def row_of(kind: str, prose: bool, found: Found) -> dict[str, object]:
    """One document as a row of SCHEMA."""
    return {
        "id": f"{kind}:{found.name}",
        "text": found.text,
        "kind": kind,
        "prose": prose,
        "meta": {"package": found.package, "path": found.path},
    }


# Prose


def docstrings(library: Library) -> Iterator[Found]:
    """Long docstrings, about DOCSTRINGS_PER_PACKAGE of a package at most, until there are enough."""
    n_taken: Counter[str] = Counter()
    for source in shuffled(matching(library, r".*\.py"), library.seed):
        if n_taken.total() >= N_DOCSTRINGS:
            return
        if n_taken[source.package] < DOCSTRINGS_PER_PACKAGE:
            for found in module_docstrings(source):
                n_taken[source.package] += 1
                yield found


def module_docstrings(source: Source) -> Iterator[Found]:
    """The long docstrings of one file."""
    code = source.read()
    if not has_long_string(code):
        return
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError):  # templates, other versions of Python, null bytes
        return
    for name, text in named_docstrings(tree, module_name(source.path)):
        yield Found(name, text, source.package, source.path)


def has_long_string(code: str) -> bool:
    """A cheap test that spares parsing most files."""
    return any(len(part) >= DOCSTRING_MIN_CHARS for part in code.split('"""')[1::2])


def module_name(path: str) -> str:
    """numpy/linalg/__init__.py -> numpy.linalg."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def named_docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module, its classes and functions, outermost first."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text and len(text) >= DOCSTRING_MIN_CHARS:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from named_docstrings(child, f"{name}.{child.name}")


def topics(library: Library) -> Iterator[Found]:
    """The language reference that `help()` prints: one dict literal in one file."""
    for source in matching(library, r"pydoc_data/topics\.py"):
        for node in ast.parse(source.read()).body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
                for topic, text in ast.literal_eval(node.value).items():
                    yield Found(topic, text, source.package, source.path)


def readmes(library: Library) -> Iterator[Found]:
    """Package descriptions up to where their changelog begins."""
    for source, _, description in metadata_files(library):
        yield Found(source.package, split_changelog(description)[0], source.package, source.path)


# Junk


def metadata_headers(library: Library) -> Iterator[Found]:
    """Name, version, classifiers, requirements: what stands above a description."""
    for source, header, _ in metadata_files(library):
        yield Found(source.package, header, source.package, source.path)


def metadata_files(library: Library) -> Iterator[tuple[Source, str, str]]:
    """(source, header, description) of every installed distribution."""
    for source in matching(library, r"[^/]+\.(dist|egg)-info/(METADATA|PKG-INFO)"):
        text = source.read()
        header = text.split("\n\n", 1)[0]
        yield source, header, str(message_from_string(text).get_payload())


def split_changelog(text: str) -> tuple[str, str]:
    """A README's own part, and its history from the heading on (empty where it has none)."""
    heading = r"^(?:#+ *)?(?:change ?log|changes|history|release notes|release history)\W*$"
    soon_a_version = r"(?=[\s\S]{0,800}\n\W*(?:version |v)?\d+\.\d)"
    match = re.search(heading + soon_a_version, text, flags=re.IGNORECASE | re.MULTILINE)
    return (text[: match.start()], text[match.start() :]) if match else (text, "")


def changelogs(library: Library) -> Iterator[Found]:
    """Release histories, as files of their own or at the end of a README."""
    names = r"(.*/)?(\w*change(s|log)?|history|news\w*|whatsnew|release_notes)(\.(txt|md|rst))?"
    for source in matching(library, names):
        yield from pieces(source.package, source.read(), source, library.seed)
    for source, _, description in metadata_files(library):
        yield from pieces(source.package, split_changelog(description)[1], source, library.seed)


def licences(library: Library) -> Iterator[Found]:
    """Licence and notice files; most packages repeat one of a few, often word for word."""
    names = r"(.*/)?(.*licen[sc]e.*|copying.*|notice.*)(\.(txt|md|rst|apache|bsd|mit))?"
    for source in matching(library, names):
        if not source.path.endswith((".py", ".pyi", ".so", ".pyc")):
            yield Found(source.path, source.read(), source.package, source.path)


def licence_headers(library: Library) -> Iterator[Found]:
    """The comment that source files begin with, where it is about rights."""
    sample = shuffled(matching(library, r".*\.(py|h|hpp|cuh|proto)"), library.seed)[: 5 * N_LICENCE_HEADERS]
    for source in sample:
        match = re.match(r"(?:\s*(?:#|//|/?\*).*\n)+", source.read(4_000))
        if match and re.search(r"licen[sc]e|copyright", match[0], re.IGNORECASE):
            yield Found(source.path, match[0], source.package, source.path)


def records(library: Library) -> Iterator[Found]:
    """File listings with their checksums, as the installer left them."""
    for source in matching(library, r"[^/]+\.dist-info/RECORD"):
        yield from pieces(source.package, source.read(), source, library.seed)


def tables(library: Library) -> Iterator[Found]:
    """Character maps, entity lists, certificates and columns of numbers."""
    for source in matching(library, r"encodings/.*\.py"):
        _, begin, table = source.read().partition("decoding_table = (")
        yield from pieces(module_name(source.path), begin + table, source, library.seed)
    names = r"html/entities\.py|idna/\w*data\.py|wcwidth/table_\w+\.py|.*\.(pem|csv|dat|arff|tab)"
    for source in matching(library, names):
        yield from pieces(source.path, source.read(), source, library.seed)


def settings(library: Library) -> Iterator[Found]:
    """Configuration files."""
    for source in matching(library, r".*\.(toml|cfg|ini|ya?ml|json|def)|.*/(Makefile|Setup)"):
        yield from pieces(source.path, source.read(200_000), source, library.seed)


def options(library: Library) -> Iterator[Found]:
    """What `--help` prints."""
    pip = "install download wheel list index"
    modules = (
        "ast calendar compileall dis gzip json.tool pdb pickletools profile py_compile site "
        "tarfile tokenize trace unittest venv zipapp"
    )
    commands = [f"-m pip {name} --help" for name in pip.split()]
    commands += [f"-m {name} --help" for name in modules.split()] + ["--help-all", "--help-env"]
    return outputs(commands, library.seed)


def logs(library: Library) -> Iterator[Found]:
    """What running things prints: import traces, doctest runs, line traces, checks."""
    imported = "unittest email.mime.text concurrent.futures xml.dom http.server sqlite3"
    tested = "_pydecimal difflib collections/__init__ statistics ipaddress pickle"
    traced = "calendar textwrap quopri shlex"
    commands = [f"-v -I -X pycache_prefix=/nonexistent -c 'import {name}'" for name in imported.split()]
    commands += [f"-m doctest -v {name}.py" for name in tested.split()]
    commands += [f"-m trace -t {name}.py" for name in traced.split()]
    commands += [f"-m tabnanny -v {name}" for name in ("asyncio", "email", "unittest", "http")]
    return outputs([*commands, "-m pip list", "-m pip debug --verbose"], library.seed)


def dumps(library: Library) -> Iterator[Found]:
    """Programs as machines see them: byte code (-OO: without docstrings), tokens, trees."""
    modules = "argparse bisect calendar cmd configparser csv ftplib heapq mailbox shlex tarfile"
    commands = [f"-OO -m dis {name}.py" for name in modules.split()]
    commands += [f"-m tokenize {name}.py" for name in ("opcode", "stat", "keyword", "token")]
    return outputs([*commands, "-m ast stat.py", "-m ast colorsys.py"], library.seed)


def outputs(commands: list[str], seed: int) -> Iterator[Found]:
    """What the commands print, in pieces, in the order of the commands."""
    with ThreadPoolExecutor(2) as pool:
        for command, text in zip(commands, pool.map(output, commands), strict=True):
            yield from pieces(command, text, Source(Path(), "python/" + command), seed)


def output(command: str) -> str:
    """What this interpreter prints when run in its library folder; nothing if it takes too long."""
    python = [sys.executable, "-B", "-X", "utf8"]
    plain = {"COLUMNS": "80", "NO_COLOR": "1", "PYTHONHASHSEED": "0"}
    try:
        done = subprocess.run(
            [*python, *shlex.split(command)],
            check=False,
            cwd=sysconfig.get_path("stdlib"),
            env={**os.environ, **plain},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=20,
        )
    except subprocess.TimeoutExpired:
        return ""
    return without_machine(done.stdout.decode("utf-8", errors="replace"))


def without_machine(text: str) -> str:
    """Memory addresses and this machine's folders would differ from run to run."""
    paths = sysconfig.get_paths()
    folders = [paths["purelib"], paths["platlib"], paths["stdlib"], sys.prefix, sys.base_prefix]
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    return re.sub(r"0x[0-9a-f]{6,}", "0x7f0000000000", text)


# Shared by the finders


def matching(library: Library, pattern: str) -> list[Source]:
    """The files whose whole relative path matches, in whatever case."""
    matches = re.compile(pattern, re.IGNORECASE).fullmatch
    return [source for source in library.files if matches(source.path)]


def shuffled(files: list[Source], seed: int) -> list[Source]:
    """The same files in random order."""
    return sorted(files, key=lambda source: lot(seed, source.path))


def pieces(name: str, text: str, source: Source, seed: int) -> Iterator[Found]:
    """A long text in pieces of LINES_PER_PIECE, a random choice of them where there are many."""
    rng = Random(f"{seed}:{name}")
    lines, cut = text.splitlines(keepends=True), []
    while lines:
        n_lines = rng.randint(*LINES_PER_PIECE)
        cut.append("".join(lines[:n_lines]))
        lines = lines[n_lines:]
    for i in sorted(rng.sample(range(len(cut)), min(len(cut), PIECES_PER_SOURCE))):
        yield Found(f"{name}#{i}", cut[i], source.package, source.path)


# kind: (finder, whether it is prose, most documents taken)
KINDS: dict[str, tuple[Finder, bool, int]] = {
    "topic": (topics, True, 200),
    "readme": (readmes, True, 200),
    "docstring": (docstrings, True, N_DOCSTRINGS),
    "licence": (licences, False, 200),
    "licence_header": (licence_headers, False, N_LICENCE_HEADERS),
    "record": (records, False, 450),
    "metadata": (metadata_headers, False, 150),
    "changelog": (changelogs, False, 200),
    "settings": (settings, False, 150),
    "options": (options, False, 150),
    "table": (tables, False, 450),
    "log": (logs, False, 300),
    "dump": (dumps, False, 250),
}


# Writing


def write_shards(rows: list[dict[str, object]], folder: Path, n_shards: int) -> None:
    """The rows in turn to each shard; a shard appears under its name when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n_shards):
        part = folder / f"part-{i:05d}.parquet"
        unfinished = part.with_suffix(".parquet.tmp")
        table = pa.Table.from_pylist(rows[i::n_shards], schema=SCHEMA)
        pq.write_table(table, unfinished, compression="zstd")
        unfinished.replace(part)


def print_counts(rows: list[dict[str, object]], folder: Path) -> None:
    """The kinds and how many of each."""
    counts = Counter(str(row["kind"]) for row in rows)
    for kind, n_documents in counts.most_common():
        print(f"{kind:16}{'prose' if KINDS[kind][1] else 'junk':8}{n_documents:6,}")
    n_prose = sum(bool(row["prose"]) for row in rows)
    print(f"{len(rows):,} documents, {n_prose / len(rows):.0%} prose, in {folder}")


if __name__ == "__main__":
    sys.exit(main())
