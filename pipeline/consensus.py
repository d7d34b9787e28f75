"""What several opinions on a document come to, and how far the raters agree."""

from collections import Counter
from itertools import combinations, groupby
from typing import Any, NamedTuple

import numpy as np

from pipeline import metrics
from pipeline.metrics import Floats
from pipeline.panel import Opinions
from pipeline.reading import Reading, Reason


class Verdict(NamedTuple):
    """What the opinions on one document come to. `probabilities` of each value: where each score is a mean of some."""

    score: float | None
    reason: Reason | None
    attributes: dict[str, float]
    spread: float | None
    n_opinions: int
    probabilities: dict[float, float] | None = None


def verdicts(panel: list[Opinions], consensus: str) -> list[Verdict]:
    """One verdict per document."""
    middle = {"mean": np.mean, "median": np.median}[consensus]
    return [verdict(list(readings), middle) for readings in zip(*(each.readings for each in panel), strict=True)]


def verdict(readings: list[Reading], middle: Any) -> Verdict:
    """The middle of the opinions that gave a score; without any, the commonest reason."""
    scores = [reading.score for reading in readings if reading.score is not None]
    named: dict[str, list[float]] = {}
    for reading in readings:
        for name, value in (reading.attributes or {}).items():
            named.setdefault(name, []).append(value)
    attributes = {name: float(middle(values)) for name, values in named.items()}
    if not scores:
        reason = Counter(reading.reason for reading in readings if reading.reason).most_common(1)[0][0]
        return Verdict(None, reason, attributes, None, 0)
    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return Verdict(float(middle(scores)), None, attributes, spread, len(scores), mean_probabilities(readings))


def mean_probabilities(readings: list[Reading]) -> dict[float, float] | None:
    """The mean probability of each value over the opinions that gave a score; None if one of them has none."""
    given = [reading.probabilities for reading in readings if reading.score is not None]
    known = [each for each in given if each is not None]
    if len(known) < len(given):
        return None
    return {value: float(np.mean([each.get(value, 0.0) for each in known])) for each in known for value in each}


def agreements(panel: list[Opinions], scale: tuple[float, float]) -> list[dict[str, Any]]:
    """How far repeats, prompts and teachers agree on the same documents: the ceiling of any student."""
    return [*between_repeats(panel, scale), *between(panel, "prompt", scale), *between(panel, "teacher", scale)]


def between_repeats(panel: list[Opinions], scale: tuple[float, float]) -> list[dict[str, Any]]:
    """Mean over all pairs of repeats of one teacher with one prompt."""
    found = []
    for name, group in groupby(panel, key=lambda each: (each.rater.prompt.name, each.rater.called)):
        repeats = np.array([each.scores for each in group])
        if len(repeats) > 1:
            found.append({"between": f"repeats of {name[0]}, {name[1]}", **pairwise(repeats, scale)})
    return found


def between(panel: list[Opinions], what: str, scale: tuple[float, float]) -> list[dict[str, Any]]:
    """Each pair of prompts or of teachers: the means of those opinions that both gave, all else equal."""
    sides: dict[str, dict[tuple[str, int], Floats]] = {}
    for each in panel:
        prompt, called = each.rater.prompt.name, each.rater.called
        name, other = (prompt, called) if what == "prompt" else (called, prompt)
        sides.setdefault(name, {})[other, each.rater.repeat] = each.scores
    return [
        {"between": f"{a} and {b}", **pairwise(means_of_both(sides[a], sides[b]), scale)}
        for a, b in combinations(sides, 2)
    ]


def means_of_both(a: dict[tuple[str, int], Floats], b: dict[tuple[str, int], Floats]) -> Floats:
    """(2, n_documents): each side's mean over the opinions that both have of a document, NaN without any."""
    shared = [key for key in a if key in b]
    scores = np.array([[side[key] for key in shared] for side in (a, b)])
    both = np.isfinite(scores).all(axis=0)
    n = both.sum(axis=0)
    total = np.where(both, scores, 0.0).sum(axis=1)
    return np.asarray(np.divide(total, n, out=np.full(total.shape, np.nan), where=n > 0))


def pairwise(scores: Floats, scale: tuple[float, float]) -> dict[str, Any]:
    """Agreement of raters, (n_raters, n_documents), on the documents that all of them scored: the mean over all
    pairs for which it is defined, its intervals by resampling documents."""
    both = scores[:, np.isfinite(scores).all(axis=0)]
    ints = metrics.int_scores(both, scale)
    found: dict[str, Any] = {"n": both.shape[1]}
    for name, rows, measure in (("spearman", both, metrics.spearman_rows), ("kappa", ints, metrics.kappa_rows)):

        def over_pairs(*resampled: Any, measure: Any = measure) -> Floats:
            pairs = np.array([measure(a, b) for a, b in combinations(resampled, 2)])
            n = np.isfinite(pairs).sum(axis=0)
            return np.asarray(np.divide(np.nansum(pairs, axis=0), n, out=np.full(n.shape, np.nan), where=n > 0))

        whole = float(over_pairs(*(row[None] for row in rows))[0]) if both.shape[1] > 2 else np.nan
        found[name] = whole if np.isfinite(whole) else None
        found[f"{name}_interval"] = metrics.bootstrap_interval(over_pairs, *rows)
    return found
