"""How a cascade begins: the student scores a sample, from which the first student learns and by which it is
calibrated."""

import logging
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import cascade, seen
from pipeline.cascade import Costs, First, Floats
from pipeline.config import Recipe, digest
from pipeline.errors import UserError
from pipeline.sample import priority, sample
from pipeline.scoring import Named, Scoring
from pipeline.seen import Records, Seen
from pipeline.tracking import progress
from pipeline.workers import in_order

log = logging.getLogger("gristmill")

FILE = "cascade.safetensors"
LEARNED = 0.25
"""Share of the sample that is learned from, but for `MOST_LEARNED`; the rest is calibrated on."""
MOST_LEARNED = 2000
"""More would cost more for each document of the corpus."""


class Cascade(NamedTuple):
    """A calibrated first student, and what the result says of it."""

    first: First
    about: dict[str, Any]


def check(recipe: Recipe, named: Named) -> None:
    """Refuse what a cascade cannot rule documents out for: anything but one score, and another choice than of the
    best."""
    share = recipe.score.cascade_keep_share
    if share is None:
        return
    heads = [head.name + ending for ending, student in named.items() for head in student.heads]
    if heads != ["score"]:
        raise UserError(
            f"score.cascade_keep_share: one score rules documents out, but the students give {', '.join(heads)}; leave"
            " it out"
        )
    cascade.check_filter(recipe.filter, share)


def kept(folder: Path, made_from: dict[str, Any]) -> Cascade | None:
    """The cascade that was made from the same before, if there is one."""
    found = cascade.load(folder / FILE)
    if found is None or found[1].pop("made_from") != digest(made_from):
        return None
    return Cascade(*found)


def make(recipe: Recipe, scoring: Scoring, known: Seen, folder: Path, made_from: dict[str, Any]) -> Cascade:
    """Score a sample, learn and calibrate; refuses where that saves too little or cannot be sure of its recall. What
    was made of the sample is then known."""
    texts = draw(recipe)
    features, records = read(scoring, texts)
    made = calibrated(recipe, features, records, scoring)
    cascade.save(made.first, {**made.about, "made_from": digest(made_from)}, folder / FILE)
    if scoring.is_independent:  # else a document's score depends on those computed beside it, which are others later
        remember(scoring, known, texts, records, made.first.passes(features))
    return made


def draw(recipe: Recipe) -> list[str]:
    """Different texts of the corpus, in random order; by a seed of their own, as the student has learned from those
    that were drawn to be rated."""
    size = recipe.score.cascade_sample
    documents, _ = sample(recipe.corpus, size, priority("cascade", recipe.seed))
    if len(documents) < size:
        raise UserError(
            f"score.cascade_sample: all {len(documents)} different texts of the corpus are in a sample of {size}, so"
            " there is nothing to save; leave score.cascade_keep_share out"
        )
    return [document.text for document in documents]


def read(scoring: Scoring, texts: list[str]) -> tuple[Floats, Records]:
    """What the first student sees of each text (n_texts, n_features), and what the encoder makes of it."""
    units = [texts[i : i + scoring.unit_texts] for i in range(0, len(texts), scoring.unit_texts)]
    found = []
    with progress("score: sample", len(texts)) as step:
        for unit, made in in_order(scoring.both, units, scoring.n_workers, scoring.begin_thread):
            found.append(made)
            step(len(unit))
    features, records = zip(*found, strict=True)
    return np.concatenate(features), np.concatenate(records)


def calibrated(recipe: Recipe, features: Floats, records: Records, scoring: Scoring) -> Cascade:
    """Learn from the first part of the sample, set the threshold by the rest, and tell what that gives."""
    scores, sizes = records["outputs"][:, 0].astype(np.float64), cascade.n_tokens(features) * records["n_windows"]
    share, recall = recipe.score.cascade_keep_share or 1.0, recipe.score.cascade_recall
    n_learned = min(math.ceil(LEARNED * len(scores)), MOST_LEARNED)
    learned, rest = slice(n_learned), slice(n_learned, None)
    cut = float(np.quantile(scores[learned], 1 - share))
    n_above = int((scores[rest] >= cut).sum())
    check_enough(n_above, recipe, cascade.fewest(recall))
    first = cascade.learn(features[learned], scores[learned], recipe.seed)
    said, seconds = timed_scores(first, features[rest], scoring.unit_texts)
    first = first._replace(threshold=cascade.calibrate(said, scores[rest], cut, recall))
    passing = said >= first.threshold
    token_share = float(sizes[rest][passing].sum() / sizes[rest].sum())
    gain = cascade.speed_up(token_share, costs(scoring, seconds * len(scores) / len(said)))
    about = {
        "keep_share": share,
        "cut": cut,
        "recall": recall,
        "n_learned": n_learned,
        "n_calibrated": len(said),
        "n_above": n_above,
        "n_missed": int((~passing[scores[rest] >= cut]).sum()),
        "passing_share": float(passing.mean()),
        "passing_token_share": token_share,
        "speed_up": gain,
    }
    log.info(
        "score: a first student lets %.0f%% pass and misses %d of the %d best of %d documents: %.2f times as fast",
        *(100 * passing.mean(), about["n_missed"], n_above, len(said), gain),
    )
    cascade.check_gain(gain, token_share)
    return Cascade(first, about)


def check_enough(n_above: int, recipe: Recipe, needed: int) -> None:
    """Refuse a sample with too few of the best documents for the bound."""
    settings = recipe.score
    if n_above < needed:
        size = math.ceil(1.1 * needed / ((1 - LEARNED) * (settings.cascade_keep_share or 1)) / 100) * 100
        raise UserError(
            f"score.cascade_sample: {settings.cascade_sample} documents hold {n_above} of the best beside those"
            f" learned from; to be 95% sure of a recall of {settings.cascade_recall:g} takes {needed}: set it to"
            f" {max(size, settings.cascade_sample + 100)}"
        )


def timed_scores(first: First, features: Floats, n: int) -> tuple[Floats, float]:
    """The first student's scores, so many documents at a time as later, and the seconds that they took."""
    begin = time.perf_counter()
    said = np.concatenate([first.scores(features[i : i + n]) for i in range(0, len(features), n)])
    return said, time.perf_counter() - begin


def costs(scoring: Scoring, seconds: float) -> Costs:
    """Seconds of the sample, of which the first student's scores took so many."""
    spent = scoring.effort.seconds
    return Costs(spent["tokenising"], spent["ruling out"] + seconds, spent["computing"])


def remember(scoring: Scoring, known: Seen, texts: list[str], records: Records, passing: NDArray[np.bool_]) -> None:
    """Keep what was made of the sample, so that it is not made again. The first student decides about it too: a
    document's fate does not hang on whether it was drawn."""
    records = np.where(passing, records, np.zeros_like(records))
    records["ruled_out"] = ~passing
    keys = known.claim([seen.key_of(text) for text in texts])
    known.add(keys, records)
    scoring.effort.count(duplicates=-len(keys))  # these are known, but nowhere before
