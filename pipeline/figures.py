"""How well a student learned each target: the figures on its test part."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from pipeline import calibration, metrics
from pipeline.label_figures import Intervals, LabelFigures, MultiLabelFigures
from pipeline.metrics import Floats


class ScoreFigures(BaseModel, frozen=True, extra="forbid"):
    """How well a score was learned; every figure but cuts and curve is on the test part, which nothing was chosen
    on."""

    n_test: int
    n_missing: int
    """Documents without this score, of which something else is known."""
    head: str
    strength: float
    """Penalty on the squared weights."""
    good_from: float
    """Teacher score from which a document counts as good."""
    good_share: float
    """Share of the test part that is: the precision of keeping everything."""
    cut: float
    """Student score that finds them best, chosen on held-out predictions."""
    spearman: float | None
    mae: float
    kappa: float | None
    """Quadratic weighted kappa of the whole scores as they are written."""
    kappa_half_up: float | None
    macro_f1: float
    """F1 averaged over the whole scores as they are written."""
    macro_f1_half_up: float
    auc: float | None
    """Student's score against good or not by the teacher."""
    kept: dict[str, float]
    """Precision, recall and F1 of what the student keeps at `cut`, against the teacher."""
    kept_at_good_from: dict[str, float]
    """The same with the student cut at good_from itself."""
    intervals: Intervals
    rounding: str
    """How whole scores are written: fitted or half_up."""
    int_cuts: list[float]
    """Lowest score of each whole score above the lowest, fitted on held-out predictions."""
    int_score_counts: dict[str, dict[str, int]]
    """Documents at each whole score: by the teacher, and by the student under either rounding."""
    kept_shares: dict[str, float]
    """Share of documents whose whole score is at least good_from, under either rounding."""
    confusion: dict[str, dict[str, int]]
    """Documents by the teacher's whole score, then by the student's as written."""
    calibration: list[dict[str, Any]]
    """Mean predicted and actual score in bins of the prediction."""
    ceiling: dict[str, Any] | None
    """The teacher's agreement with itself, over documents that it rated more than once, and whether the student's
    kappa reaches its interval."""
    learning_curve: dict[str, Any] | None
    gold: dict[str, Any] | None
    """The student against the known quality."""


Figures = ScoreFigures | LabelFigures | MultiLabelFigures


class Judged(NamedTuple):
    """The student's scores beside the teacher's, and how they are read."""

    truth: Floats
    """(n,)"""
    guess: Floats
    """(n,)"""
    scale: tuple[float, float]
    good_from: float
    cut: float
    cuts: tuple[float, ...]
    """Of the fitted rounding."""
    rounding: str


def of_score(judged: Judged, ceiling: dict[str, Any] | None, **known: Any) -> ScoreFigures:
    """Figures of the test part; the ceiling and what else is `known` come from elsewhere."""
    truth, guess, scale, good_from = judged.truth, judged.guess, judged.scale, judged.good_from
    whole = whole_scores(judged)
    of_all: dict[str, Any] = {name: value(rows, *arrays) for name, (rows, arrays) in measures(judged).items()}
    ranges = {name: metrics.bootstrap_interval(rows, *arrays) for name, (rows, arrays) in measures(judged).items()}
    return ScoreFigures(
        n_test=len(truth),
        good_from=good_from,
        good_share=float((truth >= good_from).mean()),
        cut=judged.cut,
        **{name: found for name, found in of_all.items() if "." not in name},
        kept=metrics.kept_class(truth >= good_from, guess >= judged.cut),
        kept_at_good_from=metrics.kept_class(truth >= good_from, guess >= good_from),
        intervals=ranges,
        rounding=judged.rounding,
        int_cuts=list(judged.cuts),
        int_score_counts={name: calibration.counts(ints, scale) for name, ints in whole.items()},
        kept_shares={name: float((whole[name] >= good_from).mean()) for name in ("fitted", "half_up")},
        confusion=confusion(whole["teacher"], whole[judged.rounding]),
        calibration=calibration.curve(truth, guess),
        ceiling=ceiling and {**ceiling, "reached": reaches(of_all["kappa"], ceiling)},
        **known,
    )


def whole_scores(judged: Judged) -> dict[str, NDArray[np.int8]]:
    """The teacher's whole scores, and the student's under either rounding: (n,) each."""
    return {
        "teacher": metrics.int_scores(judged.truth, judged.scale),
        "fitted": metrics.int_scores(judged.guess, judged.scale, judged.cuts),
        "half_up": metrics.int_scores(judged.guess, judged.scale),
    }


Measure = tuple[Callable[..., Floats], tuple[NDArray[Any], ...]]


def measures(judged: Judged) -> dict[str, Measure]:
    """Each figure that has an interval: a function of rows, and the arrays (n,) that it takes."""
    truth, guess, whole = judged.truth, judged.guess, whole_scores(judged)
    good = truth >= judged.good_from
    written, half_up = ((whole["teacher"], whole[name]) for name in (judged.rounding, "half_up"))
    found: dict[str, Measure] = {
        "spearman": (metrics.spearman_rows, (truth, guess)),
        "mae": (metrics.mae_rows, (truth, guess)),
        "kappa": (metrics.kappa_rows, written),
        "kappa_half_up": (metrics.kappa_rows, half_up),
        "macro_f1": (metrics.macro_f1_rows, written),
        "macro_f1_half_up": (metrics.macro_f1_rows, half_up),
        "auc": (metrics.auc_rows, (good, guess)),
    }
    for name, cut in (("kept", judged.cut), ("kept_at_good_from", judged.good_from)):
        found |= {f"{name}.{share}": (kept(share), (good, guess >= cut)) for share in ("precision", "recall", "f1")}
    return found


def kept(share: str) -> Callable[..., Floats]:
    """Precision, recall or F1 of rows."""
    return lambda truth, kept: metrics.kept_rows(truth, kept)[share]


def value(rows: Callable[..., Floats], *arrays: NDArray[Any]) -> float | None:
    """A measure of all documents; None where it is not defined."""
    found = float(rows(*(array[None] for array in arrays))[0])
    return found if np.isfinite(found) else None


def confusion(truth: NDArray[np.int8], guess: NDArray[np.int8]) -> dict[str, dict[str, int]]:
    """Documents by the teacher's whole score, then by the student's; pairs that do not occur are left out."""
    table: dict[str, dict[str, int]] = {}
    for (a, b), n in zip(*np.unique(np.stack([truth, guess], axis=1), axis=0, return_counts=True), strict=True):
        table.setdefault(str(a), {})[str(b)] = int(n)
    return table


def reaches(kappa: float | None, ceiling: dict[str, Any]) -> bool:
    """Whether the student agrees with the teacher as well as the teacher with itself, as far as can be told."""
    interval = ceiling["kappa_interval"]
    return kappa is not None and interval is not None and kappa >= interval[0]


def ceiling_of(repeated: tuple[Floats, ...], scale: tuple[float, float]) -> dict[str, Any] | None:
    """How far the teacher agrees with itself: repeats of one teacher with one prompt, (n_repeats, n_documents) each,
    of those that the most documents were rated with; None without."""
    from pipeline.consensus import pairwise

    found = max((pairwise(scores, scale) for scores in repeated), key=lambda each: each["n"], default=None)
    return found if found and found["n"] > 2 else None
