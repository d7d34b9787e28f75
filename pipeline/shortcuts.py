"""Shortcuts: how much of the score can be told without reading, and whether the end of a document counts.

A shortcut sorts documents into groups without reading them: by length, source, language, a column, or a beginning that
they share. How well the mean score of a group predicts the scores of documents that were left out of the mean tells
how far a student could get by it alone. A good filter may well prefer some sources; it is for a person to say whether
the preference is meant.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline import metrics
from pipeline.config import Recipe
from pipeline.corpus import is_text
from pipeline.errors import UserError
from pipeline.examples import Row
from pipeline.metrics import Bools, Floats, Interval

log = logging.getLogger("gristmill")

COLUMNS = {
    "source": ("source", "domain", "site", "dataset", "url", "warc_url"),
    "language": ("language", "lang", "language_code"),
}
"""Columns that tell a source or a language, the first of them that is there; within a struct too (meta.url)."""
LENGTH_BINS = 20
"""Groups of length, equally many documents each."""
FEWEST_IN_BIN = 25
BEGINNING = 24
"""Characters of a beginning that documents share; digits count as one, so that years and numbers don't divide them."""
FEWEST_SHARING = 5
"""Documents with one beginning from which it is a prefix, not chance."""
N_FOLDS = 5
SHRINKAGE = 4.0
"""Documents of mean score that each group's mean is drawn towards the overall mean by."""
FEWEST = 50
"""Documents below which nothing is said."""
N_RESAMPLES = 400
N_SHOWN = 12
"""Groups shown of each shortcut."""
LARGE_R2, LARGE_SHIFT = 0.2, 0.1
"""From here on a shortcut is worth a warning: share of the score explained, share of the scale."""
N_LONG = 200
"""Long documents read at begin, middle and end."""

Groups = NDArray[np.int64]
"""(n,) group of each document."""


class Grouping(NamedTuple):
    """One way to sort documents without reading them."""

    name: str
    groups: Groups
    names: list[str]
    """What each group is called."""


def find(sample: Sequence[Row], cut: float | None, columns: dict[str, str], seed: int) -> dict[str, Any]:
    """Every shortcut through a sample of scored documents; `columns` are those of the sample, by what they tell."""
    scores = np.array([row["score"] for row in sample], dtype=np.float64)
    found: dict[str, Any] = {"n": len(sample), "cut": cut, "shortcuts": []}
    if len(sample) < FEWEST or np.ptp(scores) == 0:
        return found
    good = None if cut is None else scores >= cut
    for each in groupings(sample, columns):
        if len(set(each.groups.tolist())) > 1:
            found["shortcuts"].append(judged(each, scores, good, seed))
    return found


# -- groups -----------------------------------------------------------------------------------------------------------


def columns_there(schema: pa.Schema, by: Sequence[str]) -> dict[str, str]:
    """Columns of a scored corpus that may be shortcuts, by what they tell; those named in `by` tell themselves."""
    names = [name for name, kind in leaves(schema) if is_text(kind)]
    found: dict[str, str] = {}
    for what, known in COLUMNS.items():
        there = [name for end in known for name in names if name.split(".")[-1] == end]
        found |= {what: there[0]} if there else {}
    return found | {name: name for name in by if name in names and name not in found.values()}


def leaves(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    """Columns and the fields of structs, by dotted name."""
    for field in schema:
        yield field.name, field.type
        if pa.types.is_struct(field.type):
            yield from ((f"{field.name}.{inner.name}", inner.type) for inner in field.type)


def groupings(sample: Sequence[Row], columns: dict[str, str]) -> Iterator[Grouping]:
    """Every way to sort the documents."""
    yield by_length([len(row["text"]) for row in sample])
    if "source" not in columns:
        yield named("source", [row["shard"].split("/")[0] if "/" in row["shard"] else "" for row in sample])
    for what, name in columns.items():
        yield named(what, [source_of(row[name]) for row in sample])
    yield by_beginning([row["text"] for row in sample])


def by_length(lengths: Sequence[int]) -> Grouping:
    """Groups of length with equally many documents."""
    n_bins = int(np.clip(len(lengths) // FEWEST_IN_BIN, 2, LENGTH_BINS))
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, n_bins + 1)))
    groups = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(len(edges) - 2, 0))
    called = [f"{low:,.0f} to {high:,.0f} characters" for low, high in pairwise(edges)]
    return Grouping("length", groups.astype(np.int64), called or ["one length"])


def source_of(value: Any) -> str:
    """A source as it stands; of a URL its host."""
    text = "" if value is None else str(value)
    try:
        return (urlsplit(text).hostname or text).removeprefix("www.") if "://" in text else text
    except ValueError:
        return text


def named(what: str, values: Sequence[str]) -> Grouping:
    """Groups of one value each."""
    names = sorted(set(values))
    place = {name: number for number, name in enumerate(names)}
    return Grouping(what, np.array([place[value] for value in values]), [name or "(none)" for name in names])


def by_beginning(texts: Sequence[str]) -> Grouping:
    """Groups of documents that begin alike, and one of those that begin like few others."""
    begins = [re.sub(r"\d+", "0", " ".join(text[:200].split()).lower())[:BEGINNING] for text in texts]
    counts = Counter(begins)
    return named("beginning", [begin if counts[begin] >= FEWEST_SHARING else "" for begin in begins])


# -- what they tell ---------------------------------------------------------------------------------------------------


def judged(each: Grouping, scores: Floats, good: Bools | None, seed: int) -> dict[str, Any]:
    """What one way of sorting tells of the score, and its commonest groups."""
    guess = left_out_means(each.groups, scores, seed)
    between, within = variances(each.groups, scores)
    some = good is not None and 0 < good.sum() < len(good)
    return {
        "name": each.name,
        "n_groups": len(set(each.groups.tolist())),
        "r2": r2(scores, guess),
        "r2_interval": interval(r2_rows, scores, guess),
        "auc": metrics.auc(good, guess) if good is not None and some else None,
        "auc_interval": interval(metrics.auc_rows, good, guess) if good is not None and some else None,
        "variance_between": between,
        "variance_within": within,
        "groups": commonest(each, scores, good),
    }


def left_out_means(groups: Groups, scores: Floats, seed: int) -> Floats:
    """For each document (n,) the mean score of its group among the documents of the other folds, drawn towards the
    overall mean where the group is small."""
    folds = np.random.default_rng(seed).permutation(len(scores)) % N_FOLDS
    guess, n_groups = np.empty(len(scores)), int(groups.max()) + 1
    for fold in range(N_FOLDS):
        other, own = folds != fold, folds == fold
        overall = scores[other].mean()
        sums = np.bincount(groups[other], scores[other] - overall, n_groups)
        counts = np.bincount(groups[other], minlength=n_groups)
        guess[own] = overall + (sums / (counts + SHRINKAGE))[groups[own]]
    return guess


def r2(scores: Floats, guess: Floats) -> float:
    """Share of the scores' variance that a guess explains; below 0 where the mean does better."""
    return float(r2_rows(scores[None], guess[None])[0])


def r2_rows(scores: Floats, guess: Floats) -> Floats:
    """R2 of each row of (n_resamples, n), NaN where the scores are constant."""
    return np.asarray(1 - metrics.ratio(((scores - guess) ** 2).mean(axis=1), scores.var(axis=1)))


def interval(statistic: Any, *arrays: Any) -> Interval | None:
    """95% interval over resampled documents."""
    return metrics.bootstrap_interval(statistic, *arrays, n=N_RESAMPLES)


def variances(groups: Groups, scores: Floats) -> tuple[float, float]:
    """Variance of the score between groups (of their means, by size) and within them; they add up to all of it."""
    counts = np.bincount(groups)
    means = np.bincount(groups, scores) / np.maximum(counts, 1)
    within = float(np.mean((scores - means[groups]) ** 2))
    return float(np.average((means - scores.mean()) ** 2, weights=counts)), within


def commonest(each: Grouping, scores: Floats, good: Bools | None) -> list[dict[str, Any]]:
    """The groups with most documents; of lengths all, in order."""
    counts = np.bincount(each.groups, minlength=len(each.names))
    order = range(len(counts)) if each.name == "length" else np.argsort(-counts, kind="stable")[:N_SHOWN].tolist()
    return [
        {
            "name": each.names[number],
            "n": int(counts[number]),
            "mean": float(scores[each.groups == number].mean()),
            "kept_share": None if good is None else float(good[each.groups == number].mean()),
        }
        for number in order
        if counts[number]
    ]


# -- begin, middle and end --------------------------------------------------------------------------------------------


def along(recipe: Recipe, sample: Sequence[Row], cut: float | None) -> dict[str, Any] | None:
    """What the student says of the begin, middle and end of long documents; None without it, or without any."""
    from pipeline import embeddings, encoder
    from pipeline import student as students

    try:
        student = students.load(recipe.score.student or recipe.run_folder / "train" / "student", recipe.encoder)
        reader = encoder.Encoder(student.source.model_copy(update={"windows": "spread"}))
    except UserError as error:
        log.info("report: begin, middle and end of documents are not compared: %s", error)
        return None
    heads = [head for head in student.heads if head.name == "score"]
    texts = [row["text"] for row in sample if len(row["text"]) > 2 * reader.max_tokens][: 2 * N_LONG]
    if not texts or not heads:
        return None
    embedded = embeddings.embed(reader, texts, embeddings.cache_path(recipe))
    scores = heads[0].outputs(embedded.vectors)[:, 0].astype(np.float64)
    return compared(in_thirds(scores, embedded.owners, embedded.tokens)[:N_LONG], cut)


def in_thirds(scores: Floats, owners: NDArray[np.int64], tokens: NDArray[np.int64]) -> Floats:
    """Scores (n, 3) of the documents with three windows, the last one of them not much shorter than the others."""
    three = np.flatnonzero(np.bincount(owners) == 3)
    parts = [np.flatnonzero(owners == owner) for owner in three]
    return np.array([scores[part] for part in parts if tokens[part].min() >= tokens.max() / 2]).reshape(-1, 3)


def compared(parts: Floats, cut: float | None) -> dict[str, Any] | None:
    """Scores (n, 3) of begin, middle and end: their means, and how far the others agree with the begin."""
    if len(parts) < 3:
        return None
    begin, middle, end = parts.T
    others = {"middle": middle, "end": end}
    return {
        "n": len(parts),
        "means": dict(zip(("begin", "middle", "end"), parts.mean(axis=0).tolist(), strict=True)),
        "spearman": {name: metrics.spearman(begin, part) for name, part in others.items()},
        "spearman_interval": {name: interval(metrics.spearman_rows, begin, part) for name, part in others.items()},
        "difference": {name: float(np.mean(part - begin)) for name, part in others.items()},
        "n_otherwise": None if cut is None else int(np.sum((begin >= cut) != (parts.mean(axis=1) >= cut))),
    }


# -- in words ---------------------------------------------------------------------------------------------------------

SPOKEN = {
    "length": "Length alone explains",
    "source": "The source alone explains",
    "language": "The language alone explains",
    "beginning": "The first characters alone explain",
}


def warnings(found: dict[str, Any], scale: tuple[float, float]) -> list[str]:
    """Sentences on what a person should look at."""
    told = []
    for each in found["shortcuts"]:
        if each["r2"] >= LARGE_R2:
            who = SPOKEN.get(each["name"], f"The column {each['name']} alone explains")
            told.append(f"{who} {each['r2']:.0%} of the score.")
    parts = found.get("along")
    for name, difference in (parts or {}).get("difference", {}).items():
        if abs(difference) >= LARGE_SHIFT * (scale[1] - scale[0]):
            way = "lower" if difference < 0 else "higher"
            told.append(f"The {name} of long documents scores {abs(difference):.2f} {way} than their begin.")
    if parts and parts["n_otherwise"] is not None and parts["n_otherwise"] > 0.1 * parts["n"]:
        told.append(
            f"{parts['n_otherwise']} of {parts['n']} long documents would be judged otherwise if their middle and end"
            " counted as much as their begin (encoder.windows: spread)."
        )
    return told
