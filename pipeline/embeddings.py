"""Embeddings that were computed before, in one SQLite file."""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Recipe
from pipeline.corpus import text_id
from pipeline.encoder import Embedded, Encoder
from pipeline.errors import UserError
from pipeline.forward import Embeddings
from pipeline.storage import check_form, writing

TABLE = """CREATE TABLE IF NOT EXISTS embeddings (
    encoder TEXT, id TEXT, vectors BLOB, tokens BLOB, truncated INTEGER, PRIMARY KEY (encoder, id))"""

CHUNK_TEXTS = 256
CHUNK_CHARACTERS = 4_000_000
"""Texts, and characters in them, that are embedded and stored at a time: what a killed run loses."""

ASK_AT_ONCE = 500
WAIT_S = 60
"""Seconds that another process may hold the file."""

Step = Callable[[int], None]


class Row(NamedTuple):
    """One text in the file."""

    vectors: bytes
    """(n_windows, dim) float32"""
    tokens: bytes
    """(n_windows,) int32"""
    truncated: int


def cache_path(recipe: Recipe) -> Path:
    """The file of embeddings of a run."""
    return recipe.encoder.cache or recipe.run_folder / "embeddings.sqlite"


def embed(encoder: Encoder, texts: Sequence[str], path: Path, step: Step = lambda _: None) -> Embedded:
    """What `encoder.embed` gives; each text is computed once for one encoder, and stored as it goes."""
    name, ids = encoder.fingerprint, [text_id(text) for text in texts]
    with opened(path) as file:
        there = {id for part in parts(ids) for id, _ in rows(file, name, part, "1")}
        todo = {id: text for id, text in zip(ids, texts, strict=True) if id not in there}
        step(len(texts) - len(todo))
        for chunk in chunks(todo):
            store(file, name, compute(encoder, chunk, todo, step))
        return gather(file, name, ids, encoder)


def gather(file: sqlite3.Connection, name: str, ids: Sequence[str], encoder: Encoder) -> Embedded:
    """The stored embeddings of these texts, in this order."""
    if not ids:
        return encoder.embed([])
    vectors: list[Embeddings] = []
    tokens: list[NDArray[np.int32]] = []
    truncated: list[int] = []
    for part in parts(ids):
        found = {id: Row(*values) for id, values in rows(file, name, part, "vectors, tokens, truncated")}
        tokens += [np.frombuffer(found[id].tokens, np.int32) for id in part]
        flat = [np.frombuffer(found[id].vectors, np.float32) for id in part]
        vectors.append(np.concatenate(flat).reshape(sum(map(len, tokens[-len(part) :])), -1))
        truncated += [found[id].truncated for id in part]
    owners = np.repeat(np.arange(len(ids)), [len(of_text) for of_text in tokens])
    return Embedded(
        np.concatenate(vectors), owners, np.concatenate(tokens).astype(np.int64), np.array(truncated, np.bool_)
    )


def compute(encoder: Encoder, chunk: Sequence[str], texts: dict[str, str], step: Step) -> dict[str, Row]:
    """Rows for the texts of these ids."""
    found = encoder.embed([texts[id] for id in chunk], step)
    begins = np.searchsorted(found.owners, np.arange(len(chunk) + 1))
    tokens = found.tokens.astype(np.int32)
    return {
        id: Row(found.vectors[begin:end].tobytes(), tokens[begin:end].tobytes(), int(truncated))
        for id, begin, end, truncated in zip(chunk, begins[:-1], begins[1:], found.truncated, strict=True)
    }


def chunks(texts: dict[str, str]) -> Iterator[list[str]]:
    """Ids of texts of similar length, a bounded amount of text at a time."""
    chunk: list[str] = []
    characters = 0
    for id in sorted(texts, key=lambda id: len(texts[id])):
        if chunk and (len(chunk) == CHUNK_TEXTS or characters + len(texts[id]) > CHUNK_CHARACTERS):
            yield chunk
            chunk, characters = [], 0
        chunk.append(id)
        characters += len(texts[id])
    if chunk:
        yield chunk


def parts(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Ids as many as one question may name."""
    return (ids[i : i + ASK_AT_ONCE] for i in range(0, len(ids), ASK_AT_ONCE))


# -- the file ---------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The file, made if it is not there; what is wrong with it is one line."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    file = None
    try:
        file = sqlite3.connect(path, timeout=WAIT_S)
        with file:
            file.execute(TABLE)
            check_form(file)
        yield file
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"encoder.cache: {path} cannot be used ({error}); make room, remove it, or give another file"
        ) from None
    finally:
        if file is not None:
            file.close()


def rows(
    file: sqlite3.Connection, name: str, ids: Sequence[str], columns: str
) -> Iterator[tuple[str, tuple[bytes, bytes, int]]]:
    """Id and columns of those of these texts that are stored for this encoder."""
    marks = ",".join("?" * len(ids))
    asked = f"SELECT id, {columns} FROM embeddings WHERE encoder = ? AND id IN ({marks})"  # noqa: S608
    return ((id, tuple(values)) for id, *values in file.execute(asked, [name, *ids]))


def store(file: sqlite3.Connection, name: str, found: dict[str, Row]) -> None:
    """Add rows, all or none of them."""
    with file:
        file.executemany(
            "INSERT OR REPLACE INTO embeddings VALUES (?, ?, ?, ?, ?)", [(name, id, *row) for id, row in found.items()]
        )
