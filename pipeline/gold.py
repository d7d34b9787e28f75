"""Human scores from a file, to measure a teacher against, and the agreement of the humans among themselves."""

import codecs
import csv
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import metrics, storage
from pipeline.corpus import is_empty, text_id
from pipeline.errors import UserError
from pipeline.sample import Document

log = logging.getLogger("gristmill")

NUMBER = re.compile(r"[+-]?(?:\d+(?:[.,]\d*)?|[.,]\d+)")
"""A score as people type it, with a decimal point or comma."""
FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
"""Begins a cell that a spreadsheet may run as a formula, or one that looks as if it had been defused."""
DEFUSED = re.compile(r"'+[=+\-@\t\r\n＝＋－＠]")
LONGEST_CELL = 2**31 - 1

Row = dict[str, Any]


class GoldDocument(NamedTuple):
    """What humans gave a document, by the column of each; known by its id, its text or both."""

    id: str | None
    text: str | None
    scores: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over the humans who scored it."""
        return sum(self.scores.values()) / len(self.scores)


def read(path: Path) -> tuple[list[GoldDocument], int]:
    """The documents of a gold file that have a human score, and the number of rows that have none."""
    rows = list(numbered_rows(path))
    check_columns(path, list(dict.fromkeys(name for _, row in rows for name in row)))
    found = [gold_document(path, number, row) for number, row in rows]
    scored = [document for document in found if document.scores]
    if not scored:
        raise UserError(f"{path} has no human score in {len(rows)} rows; fill in a column that begins with human")
    check_once(path, scored)
    n_unscored = len(rows) - len(scored)
    if n_unscored:
        log.info("%s: %d of %d rows have no human score and are left out", path, n_unscored, len(rows))
    return scored, n_unscored


def content(path: Path, setting: str) -> str:
    """16 hex digits of the file's content; `setting` names it."""
    try:
        return storage.content(path)
    except OSError as error:
        raise UserError(f"{setting}: {path} cannot be read ({error.strerror}); give a file of human scores") from None


def documents(
    gold: Sequence[GoldDocument],
    sampled: Sequence[Document],
    setting: str = "rate.gold",
    place: str = "the sample",
) -> list[Document]:
    """The documents to rate, with the mean human score as gold; each text once.

    One whose id was sampled has the text of the corpus, as spreadsheets shorten long cells, unless its own is another;
    one that has neither such an id nor a text of its own is left out. `setting` named the file, and `place` is where
    the sampled documents are.
    """
    by_id = {document.id: document for document in sampled}
    other = [each.id for each in gold if each.id in by_id and not is_text_of(each, by_id[each.id])]
    if other:
        log.warning(
            "%s: %d rows, such as id %s, hold another text than the corpus under that id; theirs is rated",
            setting,
            len(other),
            other[0],
        )
    found: dict[str, Document] = {}
    lost = []
    for each in gold:
        document = to_rate(each, by_id.get(each.id or ""))
        if document is None:
            lost.append(str(each.id))
        else:
            found.setdefault(document.text, document)
    if not found:
        raise UserError(f"{setting}: none of {len(lost)} ids, such as {lost[0]}, is in {place}; add a column text")
    if lost:
        log.warning(
            "%s: %d ids, such as %s, are not in %s and have no text; left out", setting, len(lost), lost[0], place
        )
    return list(found.values())


def to_rate(gold: GoldDocument, sampled: Document | None) -> Document | None:
    """One document to rate, None where nothing says its text."""
    if sampled is not None and is_text_of(gold, sampled):
        return sampled._replace(gold=gold.mean)
    if gold.text is None or is_empty(gold.text):
        return None
    return Document(gold.id or text_id(gold.text), gold.text, gold.mean)


def is_text_of(gold: GoldDocument, sampled: Document) -> bool:
    """Whether humans saw this document: they name no text, or its beginning, whitespace aside."""
    seen, whole = ("".join(text.split()) for text in (gold.text or "", sampled.text))
    return whole.startswith(seen)


def shared_scale(documents: Sequence[GoldDocument], scale: tuple[float, float]) -> tuple[float, float] | None:
    """The scale, if all human scores are on it; without one there is no kappa."""
    scores = [score for document in documents for score in document.scores.values()]
    if scale[0] <= min(scores) and max(scores) <= scale[1]:
        return scale
    log.warning(
        "rate.gold: human scores go from %g to %g, the prompt's scale from %g to %g; kappa is left out",
        min(scores),
        max(scores),
        *scale,
    )
    return None


def between_raters(documents: Sequence[GoldDocument], scale: tuple[float, float] | None) -> metrics.Figures | None:
    """The ceiling: mean agreement over the pairs of humans who both scored three documents or more; None with one
    human. `n` counts the documents that several scored; kappa is only told on a scale."""
    raters = sorted({name for document in documents for name in document.scores})
    if len(raters) < 2:
        return None
    scores = {name: np.array([document.scores.get(name, np.nan) for document in documents]) for name in raters}
    pairs = [metrics.paired(scores[a], scores[b]) for a, b in combinations(raters, 2)]
    pairs = [pair for pair in pairs if len(pair[0]) >= 3]
    found: metrics.Figures = {
        "n": sum(len(document.scores) > 1 for document in documents),
        "n_raters": len(raters),
        "spearman": mean_defined(metrics.spearman(a, b) for a, b in pairs),
    }
    return {**found, "kappa": mean_defined(kappa(a, b, scale) for a, b in pairs)} if scale else found


def kappa(a: metrics.Floats, b: metrics.Floats, scale: tuple[float, float]) -> float | None:
    """Quadratic weighted kappa of two humans' scores as whole numbers."""
    return metrics.quadratic_weighted_kappa(metrics.int_scores(a, scale), metrics.int_scores(b, scale), scale)


def mean_defined(values: Iterable[float | None]) -> float | None:
    """Mean of those that are defined."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


# -- rows -------------------------------------------------------------------------------------------------------------


def numbered_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows as the file's own program numbers them, the header of a CSV being row 1; those without a value left out."""
    readers = {".csv": csv_rows, ".tsv": csv_rows, ".jsonl": json_rows, ".ndjson": json_rows, ".parquet": parquet_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: human scores are read from .csv, .tsv, .jsonl or .parquet; save the file as one")
    try:
        for number, row in readers[path.suffix.lower()](path):
            if any(value not in (None, "") for value in row.values()):
                yield number, row
    except (OSError, pa.ArrowException) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        raise UserError(f"{path} cannot be read ({why}); give a file of human scores") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it again as UTF-8") from None


def csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a CSV in the dialect of whichever spreadsheet wrote it: comma, semicolon or tab, byte order mark."""
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding=encoding(path), newline="") as file:
        try:
            records = csv.reader(file, delimiter=delimiter(file), strict=True)
            header = [name.strip() for name in next(records, [])]
            check_header(path, header)
            for number, cells in enumerate(records, 2):
                yield number, dict(zip(header, fitted(path, number, cells, len(header)), strict=True))
        except csv.Error as error:
            raise UserError(f"{path} is no CSV near line {records.line_num} ({error}); save it again") from None


def encoding(path: Path) -> str:
    """UTF-8, or the UTF-16 that spreadsheets call Unicode text."""
    with path.open("rb") as file:
        head = file.read(2)
    return "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def delimiter(file: IO[str]) -> str:
    """What parts the columns: as a first line sep=; says, else whichever parts most in the first line."""
    line = file.readline()
    if said := re.fullmatch(r'"?sep=(.)"?\s*', line):
        return said[1]
    file.seek(0)
    return max(",;\t", key=re.sub(r'"[^"]*"', "", line).count)


def fitted(path: Path, number: int, cells: list[str], width: int) -> list[str]:
    """The cells of a row, as many as the header has; those to the right of it must be empty."""
    if any(cells[width:]):
        raise UserError(
            f"{path} row {number} has {len(cells)} cells under {width} columns; put quotes around its text"
        )
    return [*cells, *[""] * (width - len(cells))][:width]


def json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a JSON lines file."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, json_row(path, number, line)


def json_row(path: Path, number: int, line: str) -> Row:
    """One JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} row {number} is not JSON ({error}); mend it") from None
    if not isinstance(row, dict):
        raise UserError(f"{path} row {number} is not a JSON object; write one a line")
    return row


def parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a parquet file, those columns that matter."""
    file = pq.ParquetFile(path)
    check_header(path, file.schema_arrow.names)
    wanted = [name for name in file.schema_arrow.names if name in ("id", "text") or is_human(name)]
    batches = file.iter_batches(columns=wanted)
    return enumerate((row for batch in batches for row in batch.to_pylist()), 1)


# -- columns and values -----------------------------------------------------------------------------------------------


def is_human(name: str) -> bool:
    """Whether a column holds a human's scores."""
    return name.lower().startswith("human")


def check_header(path: Path, names: list[str]) -> None:
    """Refuse a column that stands twice."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise UserError(f"{path} has several columns called {twice[0]!r}; rename all but one")


def check_columns(path: Path, names: list[str]) -> None:
    """There is something to know a document by, and a human."""
    there = ", ".join(map(repr, names)) or "none"
    if not {"id", "text"} & set(names):
        raise UserError(f"{path} has neither a column 'id' nor 'text'; there are: {there}")
    if not any(map(is_human, names)):
        raise UserError(f"{path} has no column of human scores, such as human_score; there are: {there}")


def gold_document(path: Path, number: int, row: Row) -> GoldDocument:
    """A row as a document."""
    scores = {name: human_score(path, number, name, value) for name, value in row.items() if is_human(name)}
    document = GoldDocument(
        id=undefused(path, number, "id", row.get("id")),
        text=undefused(path, number, "text", row.get("text")),
        scores={name: score for name, score in scores.items() if score is not None},
    )
    if document.scores and document.id is None and document.text is None:
        raise UserError(f"{path} row {number} has a human score, but neither id nor text; fill in one")
    return document


def human_score(path: Path, number: int, name: str, value: object) -> float | None:
    """A human's score; an empty cell, null or NaN is missing."""
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        return float(value.strip().replace(",", "."))
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise UserError(f"{path} row {number} column {name!r}: {value!r} is no score; write a number or leave it empty")


def undefused(path: Path, number: int, name: str, value: object) -> str | None:
    """An id or text as it was before `defused`; None if there is none."""
    if isinstance(value, float) and value.is_integer():  # what pandas makes of whole numbers with gaps
        value = int(value)
    if value is not None and value == value and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise UserError(f"{path} row {number} column {name!r}: {value!r} is neither text nor a whole number")
    text = "" if value is None or value != value else str(value)
    return (text[1:] if DEFUSED.match(text) else text) or None


def defused(text: str) -> str:
    """Text for a spreadsheet cell: what would run as a formula begins with an apostrophe."""
    return "'" + text if FORMULA.match(text) else text


def check_once(path: Path, documents: Sequence[GoldDocument]) -> None:
    """Refuse an id, or a text without one, that stands twice."""
    names = Counter(
        (document.id is None, document.text if document.id is None else document.id) for document in documents
    )
    for (is_text, name), count in names.items():
        if count > 1:
            what = "text" if is_text else "id"
            raise UserError(
                f"{path}: {what} {str(name)[:60]!r} stands in {count} rows; give each human a column instead"
            )
