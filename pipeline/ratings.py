"""The ratings file: what a teacher said of each document of a sample."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import UserError
from pipeline.metrics import Floats
from pipeline.prompts import Prompt, Reading
from pipeline.sample import Document
from pipeline.storage import write_table
from pipeline.teacher import Answer

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "text": pa.string(),
        "score": pa.float64(),
        "reason": pa.string(),
        "answer": pa.string(),
        "log_probs": pa.map_(pa.string(), pa.float64()),
        "mass": pa.float64(),
        "entropy": pa.float64(),
        "was_truncated": pa.bool_(),
        "prompt_tokens": pa.int64(),
        "answer_tokens": pa.int64(),
        "stratum": pa.string(),
        "gold": pa.float64(),
        "prompt": pa.string(),
        "teacher": pa.string(),
    }
)
"""A rating. It holds no clock time, so that an interrupted run ends with the same bytes; seconds are in the answer
store."""


class Ratings(NamedTuple):
    """Scored documents, aligned: ids, texts, scores (n,), gold or None, and where they come from."""

    ids: list[str]
    texts: list[str]
    scores: Floats
    gold: list[float | None]
    scale: tuple[float, float]
    prompt: str
    teacher: str
    n_unscored: int


def write(
    path: Path,
    prompt: Prompt,
    teacher: str | None,
    documents: Iterable[Document],
    answers: Iterable[Answer],
    readings: Iterable[Reading],
) -> None:
    """Ratings, one row a document, in the order of the sample; the scale stands in the file's metadata."""
    rows = [
        {
            **document._asdict(),
            "score": reading.score,
            "reason": reading.reason,
            "answer": answer.text,
            "log_probs": list(answer.log_probs.items()) if answer.log_probs is not None else None,
            "mass": reading.mass,
            "entropy": reading.entropy,
            "was_truncated": answer.was_truncated,
            "prompt_tokens": answer.prompt_tokens,
            "answer_tokens": answer.answer_tokens,
            "prompt": prompt.digest,
            "teacher": teacher,
        }
        for document, answer, reading in zip(documents, answers, readings, strict=True)
    ]
    scale = {"scale": f"{prompt.scale[0]:g} {prompt.scale[1]:g}"}
    write_table(path, pa.Table.from_pylist(rows, SCHEMA.with_metadata(scale)))


def read(path: Path) -> Ratings:
    """Ratings that have a score; the others are counted."""
    try:
        low, high = (pq.read_schema(path).metadata or {})[b"scale"].split()
        table = pq.read_table(path, columns=["id", "text", "score", "gold", "prompt", "teacher"])
        scored = table.filter(pc.is_valid(table["score"]))
    except (pa.ArrowInvalid, OSError, KeyError) as error:
        raise UserError(
            f"train.ratings: {path} is no ratings file ({error}); give one made by gristmill rate"
        ) from None
    rows = scored.to_pydict()
    if len(set(rows["prompt"])) > 1:
        raise UserError(f"train.ratings: {path} mixes ratings of {len(set(rows['prompt']))} prompts; rate with one")
    prompt, teacher = (rows[name][0] if rows[name] else "" for name in ("prompt", "teacher"))
    scores = np.array(rows["score"], dtype=np.float64)
    scale = float(low), float(high)
    return Ratings(rows["id"], rows["text"], scores, rows["gold"], scale, prompt, teacher, len(table) - len(scored))
