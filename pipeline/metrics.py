"""Pure functions on arrays."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def int_scores(scores: NDArray[np.floating], scale: tuple[float, float]) -> NDArray[np.int8]:
    """Scores as whole numbers of the scale: half up (2.5 becomes 3), then clipped. Shape kept."""
    rounded = np.floor(np.asarray(scores, dtype=np.float64) + 0.5)
    return np.clip(rounded, np.ceil(scale[0]), np.floor(scale[1])).astype(np.int8)


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


def is_binary(gold: Sequence[float | None]) -> bool:
    """Whether a known quality is true/false."""
    return {value for value in gold if value is not None} <= {0.0, 1.0}


def against_gold(scores: Floats, gold: Sequence[float | None], binary: bool) -> dict[str, float | int | None] | None:
    """Agreement with a known quality: AUC where that is true/false, else Spearman; None where nothing is known."""
    known = np.array([value is not None for value in gold], dtype=bool)
    truth = np.array([value for value in gold if value is not None], dtype=np.float64)
    if not known.any():
        return None
    if binary:
        return {"n": len(truth), "auc": auc(truth == 1.0, scores[known])}
    return {"n": len(truth), "spearman": spearman(truth, scores[known])}


# -- exact order statistics in constant memory


def sortable(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Float32 as unsigned integers of the same order."""
    bits = np.ascontiguousarray(scores, dtype=np.float32).view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))


def unsortable(key: int) -> float:
    """The float32 behind one such integer."""
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.array([bits], dtype=np.uint32).view(np.float32)[0])
