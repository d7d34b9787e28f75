"""Students at work: what they make of texts, and the columns of that."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import cascade, scored, windows
from pipeline import student as students
from pipeline.cascade import First, Floats
from pipeline.config import Recipe
from pipeline.encoder import Embedded, Encoder
from pipeline.errors import UserError
from pipeline.head import Columns
from pipeline.seen import Records
from pipeline.student import Student
from pipeline.tracking import upstream
from pipeline.windows import Windows
from pipeline.workers import Effort

Named = dict[str, Student]
"""Students by the ending of their columns, which for the first is empty."""


class Scoring:
    """Students that score the same texts; those on the same encoder share one pass over the tokens."""

    def __init__(self, named: Named, keep_embeddings: bool, effort: Effort | None = None) -> None:
        self.named = named
        self.passes = passes(named)
        encoders = [encoder for encoder, _ in self.passes]
        self.effort = effort or Effort()
        for encoder in encoders:
            encoder.effort = self.effort
        self.n_workers = max(encoder.ready() for encoder in encoders)
        self.begin_thread = encoders[0].begin_thread
        self.is_independent = all(encoder.is_independent for encoder in encoders)
        self.unit_texts = encoders[0].unit_texts
        self.kind = kind_of(named, encoders[0].dim if keep_embeddings else None)
        self.first: First | None = None
        """Rules documents out before the encoder reads them."""
        self.effort.forget()

    def records(self, texts: Sequence[str]) -> Records:
        """What is made of each text (n_texts,), by the thread that calls."""
        if self.first is not None:
            return self.records_behind(self.first, texts)
        found = np.zeros(len(texts), self.kind)
        for encoder, endings in self.passes:
            self.note(found, encoder.embed_unit(texts), endings)
        return found

    def records_behind(self, first: First, texts: Sequence[str]) -> Records:
        """The same, of texts that the first student does not rule out; nothing of the others."""
        [(encoder, endings)] = self.passes
        found, read = np.zeros(len(texts), self.kind), encoder.read_unit(texts)
        passing = first.passes(self.features(read))
        if passing.any():
            made = found[passing]
            self.note(made, encoder.embed_windows(windows.of_texts(read, passing)), endings)
            found[passing] = made
        found["ruled_out"] = ~passing
        return found

    def both(self, texts: Sequence[str]) -> tuple[Floats, Records]:
        """What a first student sees of each text (n_texts, n_features), and what is made of all of them."""
        [(encoder, endings)] = self.passes
        found, read = np.zeros(len(texts), self.kind), encoder.read_unit(texts)
        self.note(found, encoder.embed_windows(read), endings)
        return self.features(read), found

    def features(self, read: Windows) -> Floats:
        """What a first student sees of each text (n_texts, n_features): its first window's tokens."""
        with self.effort.spent("ruling out"):
            return cascade.features(read.firsts, self.passes[0][0].word_embeddings)

    def note(self, found: Records, embedded: Embedded, endings: Sequence[str]) -> None:
        """Note what students make of embedded texts."""
        with self.effort.spent("computing"):
            for ending in endings:
                found[f"outputs{ending}"] = self.named[ending].outputs(embedded)
            if "" in endings:
                describe(found, embedded)

    def columns(self, records: Records) -> Columns:
        """The columns of all students."""
        return {
            name + ending: values
            for ending, student in self.named.items()
            for name, values in student.columns(records[f"outputs{ending}"]).items()
        }


def kind_of(named: Named, dim: int | None) -> np.dtype[Any]:
    """What is kept of a text: outputs of all heads of each student; as the first student reads it, its windows,
    whether they lack something of it and, if asked, its mean embedding (dim,); of one that a cascade ruled out nothing
    but that."""
    outputs = [(f"outputs{ending}", "<f4", (student.n_outputs,)) for ending, student in named.items()]
    embedding = [] if dim is None else [("embedding", "<f2", (dim,))]
    return np.dtype([*outputs, ("n_windows", "<i4"), ("truncated", "?"), ("ruled_out", "?"), *embedding])


def describe(records: Records, embedded: Embedded) -> None:
    """Note how texts were read, and their embeddings if these are kept."""
    records["n_windows"] = np.bincount(embedded.owners, minlength=len(records))
    records["truncated"] = embedded.truncated
    if "embedding" in (records.dtype.names or ()):
        limit = np.finfo(np.float16).max
        records["embedding"] = np.clip(embedded.documents(), -limit, limit)


def passes(named: Named) -> list[tuple[Encoder, list[str]]]:
    """Different encoders, each with the endings of the students on it; the first student's comes first."""
    if len(named) == 1:
        return [(student.encoder, [ending]) for ending, student in named.items()]
    found: dict[tuple[Any, ...], tuple[Encoder, list[str]]] = {}
    for ending, student in named.items():
        encoder = student.encoder
        how = (encoder.fingerprint, encoder.settings.dtype, encoder.settings.engine, encoder.settings.batch_tokens)
        found.setdefault(how, (encoder, []))[1].append(ending)
        del student.encoder  # one copy of the same weights is enough
    return list(found.values())


# -- which students ---------------------------------------------------------------------------------------------------


def load(recipe: Recipe) -> Named:
    """All students that were asked for, without their encoders."""
    folder = upstream(recipe.score.student, recipe, "train/student", "score")
    return {"": students.load(folder, recipe.encoder), **load_more(recipe)}


def load_more(recipe: Recipe) -> Named:
    """The students beside the first."""
    found: Named = {}
    for given in recipe.score.more_students:
        name, _, folder = given.partition("=")
        if not re.fullmatch(r"\w+", name) or not folder:
            raise UserError(
                f"score.more_students: {given!r} is not NAME=FOLDER, such as da=runs/da/train/student; a name has"
                " letters, digits and _ only"
            )
        if f"_{name}" in found:
            raise UserError(f"score.more_students: {name} is there twice; give each student a name of its own")
        if not Path(folder).is_dir():
            raise UserError(f"score.more_students: {folder} does not exist; give the folder of a student")
        found[f"_{name}"] = students.load(folder, recipe.encoder)
    return found


def added(recipe: Recipe, named: Named) -> pa.Schema:
    """The columns that are added to a corpus."""
    reason = [] if recipe.score.cascade_keep_share is None else [pa.field(scored.REASON, pa.string())]
    return pa.schema([*schema_of(named), *reason])


def schema_of(named: Named) -> pa.Schema:
    """The columns of all students and their types."""
    found = [field.with_name(field.name + ending) for ending, student in named.items() for field in student.schema]
    names = [field.name for field in found]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise UserError(f"score.more_students: two columns would be called {repeated[0]}; give another name")
    return pa.schema(found)
