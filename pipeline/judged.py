"""Documents of which both the teacher's judgement and an honest score of the student are known."""

import logging
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import Recipe, digest
from pipeline.metrics import Bools, Floats
from pipeline.storage import read_table
from pipeline.tracking import read_json
from pipeline.weighting import N_STRATA, Chance, Quality, Strata, estimate, strata

log = logging.getLogger("gristmill")

PER_STRATUM = 20
"""With fewer judged documents a stratum, there are fewer strata."""


class Judged(NamedTuple):
    """Scores (n,) by heads that have not learned from these documents, and whether the teacher finds them good."""

    by: Literal["audit", "ratings", "test part"]
    good_from: float
    ids: list[str]
    scores: Floats
    good: Bools


def to_choose(recipe: Recipe) -> Judged | None:
    """What cuts are chosen by: the audit, drawn on the corpus itself, or else the ratings but for the test part."""
    found = audited(recipe)
    if not is_scored_by_the_student(recipe):
        log.warning("the corpus was scored by an earlier student; run gristmill score --redo")
    if (recipe.run_folder / "audit" / "result.json").exists() and not is_of_these_scores(recipe):
        log.warning("the audit is about earlier scores and does not count; run gristmill audit --redo")
    return rated(recipe, test=False) if found is None else found


def to_report(recipe: Recipe) -> Judged | None:
    """What nothing is chosen by: the test part of the ratings."""
    return rated(recipe, test=True)


def files(recipe: Recipe) -> list[Path]:
    """Where the judgements are that cuts are chosen by."""
    audit = recipe.run_folder / "audit" / "ratings.parquet"
    return [audit if audited(recipe) else recipe.run_folder / "train" / "predictions.parquet"]


def rated(recipe: Recipe, test: bool) -> Judged | None:
    """Rated documents with their held-out scores, those of the uniform or stratified sample alone; None where the
    corpus may have been scored by another student."""
    known = (read_json(recipe.run_folder / "train" / "result.json") or {}).get("targets", {}).get("score", {})
    path = recipe.run_folder / "train" / "predictions.parquet"
    known_student = is_scored_by_the_student(recipe) and not recipe.score.student and not recipe.filter.scored
    if not known_student or not path.exists() or known.get("good_from") is None:
        return None
    table = read_table(path, ["id", "split", "score", "held_out_score", "round"])
    of_part = pc.equal(table["split"], "test") if test else pc.not_equal(table["split"], "test")
    table = table.filter(pc.and_(of_part, pc.equal(table["round"], 0)))
    return judged("test part" if test else "ratings", table, "held_out_score", known["good_from"])


def audited(recipe: Recipe) -> Judged | None:
    """Scored documents that the teacher rated again."""
    result = read_json(recipe.run_folder / "audit" / "result.json")
    path = recipe.run_folder / "audit" / "ratings.parquet"
    if result is None or recipe.filter.scored or not path.exists() or not is_of_these_scores(recipe):
        return None
    return judged("audit", read_table(path), "student_score", result["good_from"])


def of_scores(recipe: Recipe) -> str:
    """16 hex digits of what the corpus was scored from."""
    return digest(read_json(recipe.run_folder / "score" / "inputs.json"))


def is_of_these_scores(recipe: Recipe) -> bool:
    """Whether the audit is about the scores that there are."""
    return (read_json(recipe.run_folder / "audit" / "inputs.json") or {}).get("scores") == of_scores(recipe)


def is_scored_by_the_student(recipe: Recipe) -> bool:
    """Whether the scores are by the run's student as it is, as far as files tell."""
    made = (read_json(recipe.run_folder / "score" / "inputs.json") or {}).get("settings", {}).get("weights")
    student = read_json(recipe.run_folder / "train" / "student" / "student.json")
    return made is None or student is None or made == digest(student["files"])


def judged(
    by: Literal["audit", "ratings", "test part"], table: pa.Table, column: str, good_from: float
) -> Judged | None:
    """The rows that have both scores; None if there are none."""
    table = table.filter(pc.and_(pc.is_finite(table["score"]), pc.is_finite(table[column])))
    scores, teacher = (table[name].to_numpy().astype(np.float64) for name in (column, "score"))
    return Judged(by, good_from, table["id"].to_pylist(), scores, teacher >= good_from) if len(scores) else None


def quality(
    found: Judged | None, scores: NDArray[np.floating], counts: NDArray[np.int64], kept: Chance
) -> dict[str, Any] | None:
    """What the judged documents say of the corpus, of which so many documents have these scores: figures of a
    result."""
    if found is None or not len(scores):
        return None
    known = estimate(found.scores, found.good, strata_for(found, scores, counts), kept)
    return {"judged_by": found.by, "good_from": found.good_from, **figures(known)}


def strata_for(found: Judged, scores: NDArray[np.floating], counts: NDArray[np.int64] | None = None) -> Strata:
    """Deciles of the corpus, fewer where few documents are judged."""
    return strata(scores, max(1, min(N_STRATA, len(found.scores) // PER_STRATUM)), counts)


def figures(quality: Quality) -> dict[str, Any]:
    """An estimate as JSON holds it."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in quality._asdict().items()}
