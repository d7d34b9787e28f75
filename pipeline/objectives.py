"""What a teacher that rates is tuned by: how its scores agree with those that are known."""

import difflib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import metrics
from pipeline.errors import UserError
from pipeline.metrics import Bools, Floats, Interval

Scale = tuple[float, float]


class Objective(NamedTuple):
    """A measure of agreement with known scores."""

    name: str
    good_from: float
    """The known score from which a document is good."""
    binary: bool
    """Documents are known as good or not, without a scale."""


def f1_rows(truth: Bools, kept: Bools) -> Floats:
    """F1 of the good documents in each row of (n_resamples, n), NaN where all or none are good."""
    both = truth.any(axis=1) & ~truth.all(axis=1)
    return np.where(both, metrics.kept_rows(truth, kept)["f1"], np.nan)


ROWS: dict[str, Callable[..., Floats]] = {
    "spearman": metrics.spearman_rows,
    "kappa": metrics.kappa_rows,
    "auc": metrics.auc_rows,
    "f1": f1_rows,
}
"""Each measure over resamples: of two sides (n_resamples, n_documents) to (n_resamples,), NaN where not defined."""
FEWEST_OTHERS = 5
"""Documents of all known scores but the commonest, below which a gain may be luck whatever its interval."""
N_RESAMPLES = 2000

RANKED = ("spearman", "auc")
"""Measures that heed only the order of scores."""


def of(name: str | None, good_from: float | None, truth: Floats, scale: Scale) -> Objective:
    """The objective for these known scores (n,), with what was not set; `scale` is that of the teacher."""
    binary = metrics.is_binary(truth.tolist())
    name = name or ("auc" if binary else "spearman")
    if name not in ROWS:
        near = difflib.get_close_matches(name, ROWS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(ROWS)}"
        raise UserError(f"tune.objective: {name} is no measure of ratings; {hint}")
    if good_from is None and name in ("auc", "f1") and not binary and not is_on(truth, scale):
        raise UserError(
            f"tune.good_from is not set, and the known scores, {truth.min():g} to {truth.max():g}, are not on the"
            f" prompt's scale of {scale[0]:g} to {scale[1]:g}; say from which score a document counts as good"
        )
    middle = 1.0 if binary else (scale[0] + scale[1]) / 2
    found = Objective(name, middle if good_from is None else good_from, binary)
    check_defined(found, truth, scale)
    return found


def check_defined(objective: Objective, truth: Floats, scale: Scale) -> None:
    """Refuse known scores that the objective has no meaning for."""
    n_good = int((truth >= objective.good_from).sum())
    if objective.name in ("auc", "f1") and n_good in (0, len(truth)):
        raise UserError(
            f"tune.objective: {objective.name} needs good documents and others, but {n_good} of {len(truth)} have a"
            f" known score from {objective.good_from:g} up; set tune.good_from"
        )
    if objective.name == "kappa" and not is_on(truth, scale):
        raise UserError(
            f"tune.objective: kappa needs known scores on the prompt's scale of {scale[0]:g} to {scale[1]:g}, but they"
            f" go from {truth.min():g} to {truth.max():g}; take spearman, or a prompt with their scale"
        )


def is_on(truth: Floats, scale: Scale) -> bool:
    """Whether known scores are on a scale, as far as can be told: true and false, and means of them, are on no other
    than 0 to 1."""
    low, high = truth.min(), truth.max()
    return bool(scale[0] <= low and high <= scale[1]) and (low < 0 or high > 1 or tuple(scale) == (0, 1))


def sides(
    objective: Objective, truth: Floats, scores: Floats, scale: Scale, cut: float
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What the objective compares, (n,) each: known scores and the teacher's, as whole scores of the scale for kappa,
    as good or not for auc and f1, where the teacher finds good what reaches the `cut`."""
    good = truth >= objective.good_from
    found: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
        "spearman": (truth, scores),
        "kappa": (metrics.int_scores(truth, scale), metrics.int_scores(scores, scale)),
        "auc": (good, scores),
        "f1": (good, scores >= cut),
    }
    return found[objective.name]


def filled(scores: Floats, like: Floats) -> Floats:
    """Scores (n,) with the mean of `like` where there is none: it says nothing of the document."""
    return np.where(np.isnan(scores), np.nanmean(like), scores)


def standardised(scores: Floats, like: Floats) -> Floats:
    """Scores (n,) in standard deviations from the mean of `like`, so that those of several teachers go together."""
    return (scores - np.nanmean(like)) / max(float(np.nanstd(like)), 1e-9)


def whole(
    objective: Objective, truth: Floats, scores: Floats, scale: Scale, cut: float
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Known scores and the teacher's as whole ones, (n,) each: of the scale, or 0 and 1 where that is known."""
    if objective.binary:
        return truth.astype(np.int8), (scores >= cut).astype(np.int8)
    return metrics.int_scores(truth, scale), metrics.int_scores(scores, scale)


def value(name: str, truth: NDArray[Any], guess: NDArray[Any]) -> float | None:
    """The measure of two sides (n,); None where it is not defined."""
    found = float(ROWS[name](truth[None], guess[None])[0]) if len(truth) else np.nan
    return found if np.isfinite(found) else None


def interval(name: str, truth: NDArray[Any], guess: NDArray[Any]) -> Interval | None:
    """Its 95% interval."""
    return metrics.bootstrap_interval(ROWS[name], truth, guess)


def gain_interval(
    name: str, best: tuple[NDArray[Any], NDArray[Any]], default: tuple[NDArray[Any], NDArray[Any]], n_folds: int = 1
) -> Interval | None:
    """95% interval of how much better one teacher is than another on the same documents, resampled for both alike;
    None with too few documents of all but the commonest known score."""
    n = n_others(best[0])
    if n < FEWEST_OTHERS:
        return None
    drawn = metrics.resamples([*best, *default], seed=0, n=N_RESAMPLES)
    gains = np.concatenate([ROWS[name](*rows[:2]) - ROWS[name](*rows[2:]) for rows in drawn])
    defined = gains[np.isfinite(gains)]
    if len(defined) <= N_RESAMPLES // 2:
        return None
    beyond = tail(n, n_folds)
    low, high = np.quantile(defined, [beyond, 1 - beyond])
    return float(low), float(high)


def n_others(truth: NDArray[Any]) -> int:
    """How many documents have another known score than the commonest."""
    return len(truth) - int(np.unique(truth, return_counts=True)[1].max(initial=0))


def tail(n: int, n_folds: int) -> float:
    """Share of resamples beyond either end of a 95% interval that is not too narrow for so few documents (the expanded
    percentile interval, Hesterberg 2015), nor for folds, of which each helps to choose the best of the others (Nadeau
    and Bengio 2003)."""
    from scipy import stats

    wider = math.sqrt(1 + n_folds / (n_folds - 1)) if n_folds > 1 else 1.0
    return float(stats.norm.cdf(wider * math.sqrt(n / (n - 1)) * stats.t.ppf(0.025, n - 1)))


def confusion(truth: NDArray[np.integer], guess: NDArray[np.integer]) -> dict[str, dict[str, int]]:
    """Documents by the known whole score, then by the teacher's: every score that occurs, also where there is none."""
    values = np.unique(np.concatenate([truth, guess])).tolist()
    return {
        str(known): {str(given): int(((truth == known) & (guess == given)).sum()) for given in values}
        for known in values
    }
