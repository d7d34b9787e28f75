"""Pure functions on arrays."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Interval = tuple[float, float]
"""Low and high end of a 95% confidence interval."""
Figures = dict[str, int | float | Interval | None]
"""Figures by name; None where one is not defined."""


def int_scores(
    scores: NDArray[np.floating], scale: tuple[float, float], cuts: Sequence[float] = ()
) -> NDArray[np.int8]:
    """Scores as whole numbers of the scale, shape kept: with cuts (the lowest score of each whole score above the
    lowest) by how many of them a score reaches; without, half up (2.5 becomes 3), then clipped."""
    values = np.asarray(scores, dtype=np.float64)
    lowest, highest = np.ceil(scale[0]), np.floor(scale[1])
    if not len(cuts):
        return np.clip(np.floor(values + 0.5), lowest, highest).astype(np.int8)
    assert len(cuts) == highest - lowest, f"{len(cuts)} cuts for {lowest:g} to {highest:g}"
    reached = np.searchsorted(np.asarray(cuts, dtype=np.float64), values, side="right")
    return np.asarray(lowest + reached).astype(np.int8)


def spearman(a: Floats, b: Floats) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None if either side is constant."""
    from scipy.stats import spearmanr

    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)


def auc(positive: Bools, scores: Floats) -> float | None:
    """Chance that a positive document scores above a negative one (ties half); None if one kind is missing."""
    from sklearn.metrics import roc_auc_score

    return None if len(set(positive.tolist())) < 2 else float(roc_auc_score(positive, scores))


def kept_class(truth: Bools, kept: Bools) -> dict[str, float]:
    """Precision, recall and F1 of the kept documents; 0 where a share has no members."""
    hits = float(np.sum(truth & kept))
    precision = hits / max(float(kept.sum()), 1.0)
    recall = hits / max(float(truth.sum()), 1.0)
    return {
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-12),
    }


def macro_f1(truth: NDArray[np.int8], predicted: NDArray[np.int8]) -> float:
    """F1 averaged over the whole scores that occur on either side."""
    from sklearn.metrics import f1_score

    return float(f1_score(truth, predicted, average="macro", zero_division=0))


def best_cut(truth: Bools, predicted: Floats) -> float:
    """The predicted score from which keeping gives the best F1 against `truth`, halfway to the next lower score."""
    order = np.argsort(-predicted, kind="stable")
    hits = np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + max(int(truth.sum()), 1))
    ranked = predicted[order]
    last_of_tie = np.append(ranked[1:] < ranked[:-1], True)
    best = int(np.argmax(np.where(last_of_tie, f1, -1.0)))
    below = ranked[best + 1] if best + 1 < len(ranked) else ranked[best]
    return float((ranked[best] + below) / 2)


def quadratic_weighted_kappa(
    a: NDArray[np.integer], b: NDArray[np.integer], scale: tuple[float, float]
) -> float | None:
    """Cohen's kappa of whole scores, a miss weighted by its square; None where both sides are one constant."""
    from sklearn.metrics import cohen_kappa_score

    if len(a) == 0 or (np.ptp(a) == 0 and np.ptp(b) == 0 and a[0] == b[0]):
        return None
    labels = np.arange(np.ceil(scale[0]), np.floor(scale[1]) + 1).astype(int)
    return float(cohen_kappa_score(a, b, labels=labels, weights="quadratic"))


# -- agreement with a known quality -----------------------------------------------------------------------------------


def is_binary(gold: Sequence[float | None]) -> bool:
    """Whether a known quality is true/false."""
    return {value for value in gold if value is not None} <= {0.0, 1.0}


def against_gold(
    scores: Floats, gold: Sequence[float | None], binary: bool, scale: tuple[float, float] | None = None
) -> Figures | None:
    """Agreement with a known quality, with 95% intervals; None where nothing is known.

    AUC where the quality is true/false; else Spearman, and where it is on the `scale` of the scores, all of
    `agreement`.
    """
    known = np.array([value is not None for value in gold], dtype=bool)
    truth = np.array([value for value in gold if value is not None], dtype=np.float64)
    if not known.any():
        return None
    if binary:
        return separation(truth == 1.0, scores[known])
    if scale:
        return agreement(scores[known], truth, scale)
    return correlation(scores[known], truth)


def separation(positive: Bools, scores: Floats) -> Figures:
    """How well scores tell the positive documents from the others."""
    interval = bootstrap_interval(auc_rows, positive, scores)
    return {"n": len(scores), "auc": auc(positive, scores), "auc_interval": interval}


def correlation(a: Floats, b: Floats) -> Figures:
    """How alike two raters rank documents."""
    interval = bootstrap_interval(spearman_rows, a, b)
    return {"n": len(a), "spearman": spearman(a, b), "spearman_interval": interval}


def agreement(
    a: Sequence[float | None] | Floats, b: Sequence[float | None] | Floats, scale: tuple[float, float]
) -> Figures:
    """How alike two raters rank documents (Spearman) and grade them (quadratic weighted kappa of the int scores), and
    how much higher the first one is. Documents that one of them left out (None, NaN) do not count."""
    first, second = paired(a, b)
    ints = int_scores(first, scale), int_scores(second, scale)
    return {
        **correlation(first, second),
        "kappa": quadratic_weighted_kappa(*ints, scale),
        "kappa_interval": bootstrap_interval(kappa_rows, *ints),
        "mean_difference": float((first - second).mean()) if len(first) else None,
    }


def paired(a: Sequence[float | None] | Floats, b: Sequence[float | None] | Floats) -> tuple[Floats, Floats]:
    """The values of two raters where both have one (not None, not NaN)."""
    first, second = np.array(a, dtype=np.float64), np.array(b, dtype=np.float64)
    both = ~(np.isnan(first) | np.isnan(second))
    return first[both], second[both]


RESAMPLED = 2**20
"""Documents drawn at a time, over all resamples."""


def bootstrap_interval(
    statistic: Callable[..., Floats],
    *arrays: NDArray[Any],
    seed: int = 0,
    n: int = 1000,
) -> Interval | None:
    """95% percentile interval of a statistic over `n` resamples of the documents (Efron & Tibshirani 1993, ch. 13).

    The statistic takes the arrays as (n_resamples, n_documents) each and gives (n_resamples,), NaN where it is not
    defined. Resamples without a value are left out; the interval is None if they are the majority, or if there are
    fewer than three documents.
    """
    if len(arrays[0]) < 3:
        return None
    values = np.concatenate([statistic(*rows) for rows in resamples(arrays, seed, n)])
    return percentile_interval(values)


def percentile_interval(values: Floats) -> Interval | None:
    """95% of resampled values (n_resamples,); None where the majority is not defined."""
    defined = values[np.isfinite(values)]
    if len(defined) <= len(values) // 2:
        return None
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def resamples(arrays: Sequence[NDArray[Any]], seed: int, n: int) -> Iterator[list[NDArray[Any]]]:
    """The arrays at the same documents, drawn with replacement: (n_resamples, n_documents) each, a part at a time."""
    rng = np.random.default_rng(seed)
    n_documents = len(arrays[0])
    at_a_time = max(1, RESAMPLED // n_documents)
    for start in range(0, n, at_a_time):
        drawn = rng.integers(0, n_documents, (min(at_a_time, n - start), n_documents))
        yield [array[drawn] for array in arrays]


def spearman_rows(a: Floats, b: Floats) -> Floats:
    """Spearman of each row of (n_resamples, n), NaN where one side is constant or n is under three."""
    if a.shape[1] < 3:
        return np.full(len(a), np.nan)
    first, second = centred(ranks(a)), centred(ranks(b))
    spread = np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return ratio((first * second).sum(axis=1), spread)


def auc_rows(positive: Bools, scores: Floats) -> Floats:
    """AUC of each row of (n_resamples, n), from the rank sum (Mann-Whitney), NaN where one kind is missing."""
    n_positive = positive.sum(axis=1)
    above = (ranks(scores) * positive).sum(axis=1) - n_positive * (n_positive + 1) / 2
    return ratio(above, n_positive * (positive.shape[1] - n_positive))


def kappa_rows(a: NDArray[np.integer], b: NDArray[np.integer]) -> Floats:
    """Quadratic weighted kappa of each row of (n_resamples, n): one less the squared misses over those of chance."""
    first, second = a.astype(np.float64), b.astype(np.float64)
    misses = ((first - second) ** 2).mean(axis=1)
    chance = first.var(axis=1) + second.var(axis=1) + (first.mean(axis=1) - second.mean(axis=1)) ** 2
    return 1 - ratio(misses, chance)


def mae_rows(a: Floats, b: Floats) -> Floats:
    """Mean absolute difference of each row of (n_resamples, n)."""
    return np.asarray(np.abs(a - b).mean(axis=1))


def macro_f1_rows(truth: NDArray[np.integer], guess: NDArray[np.integer]) -> Floats:
    """F1 of each row of (n_resamples, n), averaged over the whole scores that occur on either side of that row."""
    values = np.unique(np.concatenate([truth.ravel(), guess.ravel()]))
    f1 = np.array([kept_rows(truth == value, guess == value)["f1"] for value in values])
    occurs = np.array([((truth == value) | (guess == value)).any(axis=1) for value in values])
    return ratio((f1 * occurs).sum(axis=0), occurs.sum(axis=0))


def kept_rows(truth: Bools, kept: Bools) -> dict[str, Floats]:
    """Precision, recall and F1 of the kept documents in each row of (n_resamples, n); 0 where a share has no
    members."""
    hits, n_kept, n_true = (side.sum(axis=1).astype(np.float64) for side in (truth & kept, kept, truth))
    return {
        "precision": hits / np.maximum(n_kept, 1),
        "recall": hits / np.maximum(n_true, 1),
        "f1": 2 * hits / np.maximum(n_kept + n_true, 1),
    }


def ranks(rows: Floats) -> Floats:
    """Ranks within each row, from 1, ties at their mean rank."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(rows, axis=1), dtype=np.float64)


def centred(rows: Floats) -> Floats:
    """Rows less their means."""
    return np.asarray(rows - rows.mean(axis=1, keepdims=True))


def ratio(above: NDArray[Any], below: NDArray[Any]) -> Floats:
    """Quotients, NaN where the divisor is zero."""
    undefined = np.full(len(above), np.nan)
    return np.asarray(np.divide(above, below, out=undefined, where=below > 1e-12))


# -- exact order statistics in constant memory


def sortable(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Float32 as unsigned integers of the same order."""
    bits = np.ascontiguousarray(scores, dtype=np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))


def unsortable(key: int) -> float:
    """The float32 behind one such integer."""
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])
