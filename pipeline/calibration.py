"""Whole scores as frequent as the teacher's, and what a score comes to."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.metrics import Floats, int_scores

N_BINS = 10
FEWEST_PER_BIN = 10

ROUNDING = {
    "fitted": "int_score counts the cuts (int_cuts) that a score reaches; they give each whole score as often as the"
    " teacher gave it, on held-out predictions",
    "half_up": "int_score is floor(score + 0.5), clipped to the scale",
}
"""How a score becomes a whole one, in words."""


def fitted_cuts(truth: Floats, guess: Floats, scale: tuple[float, float]) -> tuple[float, ...]:
    """The lowest student score of each whole score above the scale's lowest, such that each occurs as often among
    `guess` (n,) as among the teacher's `truth` (equipercentile linking, Kolen & Brennan 2014, ch. 2).

    Scores at the ends that the teacher never gave keep their place half up, or lie beyond all that were seen; those
    between are never given. Ties stay together, on the nearer side.
    """
    levels = np.arange(np.ceil(scale[0]) + 1, np.floor(scale[1]) + 1)
    ranked, whole = np.sort(guess.astype(np.float64)), int_scores(truth, scale)
    cuts = [cut_at(ranked, int(np.sum(whole < level)), float(level) - 0.5) for level in levels]
    return tuple(np.maximum.accumulate(cuts).tolist()) if cuts else ()


def cut_at(ranked: Floats, n_below: int, half_up: float) -> float:
    """A score with so many of `ranked` (n,), rising, below it: midway between its neighbours."""
    if n_below == 0:
        return min(half_up, float(ranked[0]))
    if n_below == len(ranked):
        return max(half_up, float(np.nextafter(ranked[-1], np.inf)))
    tie = ranked[n_below]
    begin, end = np.searchsorted(ranked, tie, "left"), np.searchsorted(ranked, tie, "right")
    nearest = int(begin if n_below - begin <= end - n_below and begin > 0 else end)
    if nearest == len(ranked):
        return max(half_up, float(np.nextafter(ranked[-1], np.inf)))
    return float((ranked[nearest - 1] + ranked[nearest]) / 2)


def curve(truth: Floats, guess: Floats) -> list[dict[str, Any]]:
    """Mean predicted and actual score in up to ten bins of rising predictions, as many documents in each."""
    order = np.argsort(guess, kind="stable")
    n_bins = max(1, min(N_BINS, len(order) // FEWEST_PER_BIN))
    return [
        {"predicted": float(guess[rows].mean()), "actual": float(truth[rows].mean()), "n": len(rows)}
        for rows in np.array_split(order, n_bins)
    ]


def counts(whole: Sequence[int] | np.ndarray[Any, Any], scale: tuple[float, float]) -> dict[str, int]:
    """Documents at each whole score of the scale."""
    values = np.asarray(whole)
    levels = range(int(np.ceil(scale[0])), int(np.floor(scale[1])) + 1)
    return {str(level): int(np.sum(values == level)) for level in levels}
