"""The labels file: what a teacher found each document of a sample to be, and how often each label was given."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.panel import Opinions
from pipeline.prompts import Prompt
from pipeline.reading import Reading
from pipeline.sample import Document
from pipeline.storage import write_table
from pipeline.taxonomy import Taxonomy

LISTED = 20
"""Unknown labels that the result lists."""
LONGEST = 80
"""Characters of an unknown label in the result; the file has it whole."""

LevelCounts = dict[str, dict[str, int]]
"""Documents by level and label, all labels of the taxonomy among them; the last level's in full (Health > Nursing)."""


def schema(taxonomy: Taxonomy, multi: bool) -> pa.Schema:
    """Columns of the labels, one for each level; every name that a level can hold stands in the metadata."""
    level = pa.list_(pa.string()) if multi else pa.string()
    return pa.schema(
        {
            "id": pa.string(),
            "text": pa.string(),
            **dict.fromkeys(taxonomy.levels, level),
            "labels": pa.list_(pa.string()),
            "reason": pa.string(),
            "unknown": pa.list_(pa.string()),
            "answer": pa.string(),
            "was_truncated": pa.bool_(),
            "prompt_tokens": pa.int64(),
            "answer_tokens": pa.int64(),
            "stratum": pa.string(),
            "prompt": pa.string(),
            "prompt_digest": pa.string(),
            "teacher": pa.string(),
        }
    ).with_metadata({"levels": json.dumps(names(taxonomy), ensure_ascii=False)})


def names(taxonomy: Taxonomy) -> dict[str, list[str]]:
    """What each level's column can hold, in the order of the taxonomy."""
    columns = [taxonomy.columns(path) for path in taxonomy.paths]
    return {level: list(dict.fromkeys(str(each[level]) for each in columns)) for level in taxonomy.levels}


def write(path: Path, documents: Iterable[Document], said: Opinions) -> None:
    """Labels, one row a document, in the order of the sample."""
    prompt = said.rater.prompt
    assert prompt.labels is not None
    rows = [row(document, said, position) for position, document in enumerate(documents)]
    write_table(path, pa.Table.from_pylist(rows, schema(prompt.labels, prompt.multi)))


def row(document: Document, said: Opinions, position: int) -> dict[str, Any]:
    """One document and its labels, or the reason there are none."""
    rater, answer, reading = said.rater, said.answers[position], said.readings[position]
    return {
        "id": document.id,
        "text": document.text,
        **by_level(rater.prompt, reading),
        "labels": list(reading.labels) or None,
        "reason": reading.reason,
        "unknown": list(reading.unknown),
        "answer": answer.text,
        "was_truncated": answer.was_truncated,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.answer_tokens,
        "stratum": document.stratum,
        "prompt": rater.prompt.name,
        "prompt_digest": rater.prompt.digest,
        "teacher": rater.teacher.model,
    }


def by_level(prompt: Prompt, reading: Reading) -> dict[str, Any]:
    """The value of each level's column: a name, or the names where a document may have several labels."""
    assert prompt.labels is not None
    if not reading.labels:
        return dict.fromkeys(prompt.labels.levels)
    columns = [prompt.labels.columns(label) for label in reading.labels]
    if not prompt.multi:
        return dict(columns[0])
    return {level: list(dict.fromkeys(each[level] for each in columns)) for level in prompt.labels.levels}


# -- in figures -------------------------------------------------------------------------------------------------------


def level_counts(taxonomy: Taxonomy, readings: Iterable[Reading]) -> LevelCounts:
    """How many documents have each label, at each level; a document counts once for each."""
    counts: LevelCounts = {level: {} for level in taxonomy.levels}
    for path in taxonomy.paths:
        for level, name in in_full(taxonomy, path).items():
            counts[level][name] = 0
    for reading in readings:
        found = [in_full(taxonomy, label) for label in reading.labels]
        for level in taxonomy.levels:
            for name in {each[level] for each in found}:
                counts[level][name] += 1
    return counts


def in_full(taxonomy: Taxonomy, path: str) -> dict[str, str]:
    """A label by level, the last level's name in full, so that no two are alike."""
    return {**{level: str(name) for level, name in taxonomy.columns(path).items()}, taxonomy.levels[-1]: path}


def in_figures(prompt: Prompt, readings: list[Reading]) -> dict[str, Any]:
    """What was found; every document has a label or a reason."""
    assert prompt.labels is not None
    labelled = [reading for reading in readings if reading.labels]
    unlabelled = Counter(str(reading.reason) for reading in readings if not reading.labels)
    assert len(readings) == len(labelled) + unlabelled.total(), "every sampled document has a label or a reason"
    n_no_match = sum(reading.labels == (prompt.labels.no_match_path,) for reading in labelled)
    return {
        "n_labelled": len(labelled),
        "unlabelled": dict(unlabelled),
        "unlabelled_rate": unlabelled.total() / len(readings),
        "labels_per_document": sum(len(each.labels) for each in labelled) / len(labelled) if labelled else None,
        "levels": level_counts(prompt.labels, readings),
        "no_match": prompt.labels.no_match_path,
        "no_match_share": n_no_match / len(labelled) if labelled else None,
        **unknown_in_figures(readings),
    }


def unknown_in_figures(readings: list[Reading]) -> dict[str, Any]:
    """What was written that the taxonomy does not have, commonest first."""
    written = Counter(name for reading in readings for name in reading.unknown)
    shown: Counter[str] = Counter()
    for name, count in written.items():
        shown[name if len(name) <= LONGEST else f"{name[:LONGEST]}…"] += count
    return {
        "n_unknown_labels": written.total(),
        "n_different_unknown_labels": len(written),
        "unknown_labels": dict(shown.most_common(LISTED)),
    }
