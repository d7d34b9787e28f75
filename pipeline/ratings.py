"""The ratings file: what teachers said of each document of a sample."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.consensus import Verdict
from pipeline.pairs import pairs
from pipeline.panel import Opinions
from pipeline.sample import Document
from pipeline.storage import write_table

OPINION = pa.struct(
    {
        "prompt": pa.string(),
        "prompt_digest": pa.string(),
        "teacher": pa.string(),
        "repeat": pa.int32(),
        "score": pa.float64(),
        "reason": pa.string(),
        "attributes": pairs(pa.string()),
        "answer": pa.string(),
        "log_probs": pairs(pa.string()),
        "mass": pa.float64(),
        "entropy": pa.float64(),
        "was_truncated": pa.bool_(),
        "prompt_tokens": pa.int64(),
        "answer_tokens": pa.int64(),
    }
)
"""One rater's answer, and how it was read."""

BEFORE = {"id": pa.string(), "text": pa.string(), "score": pa.float64(), "reason": pa.string()}
AFTER = {
    "spread": pa.float64(),
    "n_opinions": pa.int32(),
    "probabilities": pairs(pa.float64()),
    "stratum": pa.string(),
    "group": pa.string(),
    "round": pa.int32(),
    "gold": pa.float64(),
    "opinions": pa.list_(OPINION),
}


def schema(scale: tuple[float, float], attributes: dict[str, tuple[float, float]]) -> pa.Schema:
    """Columns of the ratings, one for each named score; the scales stand in the metadata. There is no clock time, so
    that an interrupted run ends with the same bytes; seconds are in the answer store."""
    metadata = {"scale": f"{scale[0]:g} {scale[1]:g}", "attributes": json.dumps(attributes)}
    return pa.schema({**BEFORE, **dict.fromkeys(attributes, pa.float64()), **AFTER}).with_metadata(metadata)


def write(path: Path, documents: Iterable[Document], panel: list[Opinions], verdicts: Iterable[Verdict]) -> None:
    """Ratings, one row a document, in the order given."""
    write_table(path, table(documents, panel, verdicts))


def table(documents: Iterable[Document], panel: list[Opinions], verdicts: Iterable[Verdict]) -> pa.Table:
    """What the opinions on each document come to, and every rater's own."""
    prompt = panel[0].rater.prompt
    rows = [
        {
            **document._asdict(),
            **dict.fromkeys(prompt.attributes),
            **verdict.attributes,
            "score": verdict.score,
            "reason": verdict.reason,
            "spread": verdict.spread,
            "n_opinions": verdict.n_opinions,
            "probabilities": None if verdict.probabilities is None else sorted(verdict.probabilities.items()),
            "opinions": [opinion(each, position) for each in panel],
        }
        for position, (document, verdict) in enumerate(zip(documents, verdicts, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema(prompt.scale, prompt.attributes))


def opinion(opinions: Opinions, position: int) -> dict[str, Any]:
    """One rater's opinion on one document."""
    rater, answer, reading = opinions.rater, opinions.answers[position], opinions.readings[position]
    return {
        "prompt": rater.prompt.name,
        "prompt_digest": rater.prompt.digest,
        "teacher": rater.called,
        "repeat": rater.repeat,
        "score": reading.score,
        "reason": reading.reason,
        "attributes": None if reading.attributes is None else list(reading.attributes.items()),
        "answer": answer.text,
        "log_probs": None if answer.log_probs is None else list(answer.log_probs.items()),
        "mass": reading.mass,
        "entropy": reading.entropy,
        "was_truncated": answer.was_truncated,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.answer_tokens,
    }
